//! What templates can call: filters, tests, methods and global functions, as Jinja2 has them in the
//! sandbox of transformers.

mod access;
mod args;
mod braces;
mod checks;
mod filters;
mod globals;
mod json;
mod methods;
mod numbers;
mod percent;
mod sequences;
mod strftime;
mod text;

pub(crate) use access::{attribute, item};
pub(crate) use args::Args;
pub(crate) use checks::{is_test, test};
pub(crate) use filters::{filter, is_filter};
pub(crate) use globals::{Calls, function, global};
pub(crate) use methods::method;
pub(crate) use percent::percent_format;

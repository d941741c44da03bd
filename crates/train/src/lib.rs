//! Recipe to plan to run: everything between a recipe file and a finished adapter.
//!
//! [`run::train`] is the way in: it reads from top to bottom what happens. This is the only crate
//! that knows burn-train.

pub mod base;
pub mod commands;
pub mod device;
mod error;
mod files;
pub mod inputs;
pub mod memory;
pub mod optimizer;
pub mod recipe;
pub mod run;
pub mod run_dir;
pub mod signals;
pub mod task;
mod text;
pub mod training;

pub use crate::text::{bytes_text, quoted, shown, thousands};
pub use enamel_kernels::Compute;
pub use error::TrainError;
pub use run::{TrainOptions, train};
pub use run_dir::Resume;
pub use run_dir::results::RunOutcome;

/// The README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

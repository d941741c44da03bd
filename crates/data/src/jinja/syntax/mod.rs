//! From a template's source to its syntax tree.

pub(crate) mod ast;
mod expressions;
mod lexer;
mod statements;
mod strings;
mod walk;

pub(crate) use statements::parse;

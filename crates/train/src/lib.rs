//! Recipe to plan to run: everything between a recipe file and a finished adapter.

pub mod recipe;

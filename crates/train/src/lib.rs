//! Recipe to plan to run: everything between a recipe file and a finished adapter.
//!
//! [`run::train`] is the way in: it reads from top to bottom what happens. This is the only crate
//! that knows burn-train.

pub mod adapters;
mod belongings;
pub mod bench;
pub mod chat;
mod checkpoint_check;
pub mod checkpoints;
pub mod compare;
pub mod device;
mod error;
pub mod eva;
pub mod eval;
pub mod export;
pub mod fingerprint;
pub mod footprint;
mod former;
pub mod gradients;
pub mod ground;
mod hold;
pub mod inputs;
pub mod inspect;
pub mod journal;
pub mod loaded;
pub mod loftq;
mod lora_plus;
pub mod measures;
pub mod memory;
pub mod merge;
pub mod optimizer;
mod outputs;
pub mod plan;
pub mod provenance;
pub mod quantize;
pub mod recipe;
mod renderer;
mod report;
pub mod run;
mod run_dir;
mod run_lock;
mod run_notes;
pub mod samples;
pub mod schedule;
pub mod score;
mod shown;
pub mod signals;
pub mod steps;
pub mod strategy;
pub mod trainee;
mod whole;

pub use enamel_kernels::Compute;
pub use error::TrainError;
pub use run::{RunOutcome, TrainOptions, train};
pub use run_dir::Resume;
pub use run_notes::thousands;
pub use shown::{quoted, shown};

//! What can go wrong between a recipe and a finished run.

pub(crate) mod recipe;

use std::path::PathBuf;

use enamel_kernels::CPU_VARIABLE;
use thiserror::Error;

/// An error of planning, training, evaluating, scoring or merging.
#[derive(Debug, Error)]
pub enum TrainError {
    /// `device` names nothing known.
    #[error("unknown device \"{asked}\"\n  help: write one of {forms}")]
    UnknownDevice {
        /// What was asked for.
        asked: String,
        /// The names there are.
        forms: &'static str,
    },
    /// A device that is not compiled in or not there.
    #[error("device \"{asked}\" is not available: {why}\n  help: available here: {}", present.join(", "))]
    DeviceAbsent {
        /// What was asked for.
        asked: String,
        /// Why it cannot be had.
        why: String,
        /// What can be had.
        present: Vec<String>,
    },
    /// `ENAMEL_CPU` names what this machine has not.
    #[error(transparent)]
    CpuPath(#[from] CpuPathAbsent),
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::RecipeError),
    /// The data.
    #[error(transparent)]
    Data(#[from] enamel_data::DataError),
    /// The adapter: targets, files, shapes.
    #[error(transparent)]
    Adapter(#[from] enamel_adapter::AdapterError),
    /// Finding or fetching the base model.
    #[error(transparent)]
    Source(#[from] enamel_model::source::SourceError),
    /// Reading the base model's files.
    #[error(transparent)]
    Checkpoint(#[from] enamel_model::checkpoint::CheckpointError),
    /// The base model's configuration.
    #[error(transparent)]
    Config(#[from] enamel_model::config::ConfigError),
    /// Putting the base model together.
    #[error(transparent)]
    Load(#[from] enamel_model::LoadError),
    /// Generating text.
    #[error(transparent)]
    Generate(#[from] enamel_model::GenerateError),
    /// Writing a model.
    #[error(transparent)]
    Save(#[from] enamel_model::save::SaveError),
    /// A file of the run directory.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A run directory or checkpoint that cannot be used as asked.
    #[error("{}: {reason}\n  help: {help}", path.display())]
    Run {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What to do.
        help: String,
    },
    /// The loss or a gradient was NaN or infinite.
    #[error(
        "the {what} became {value} at step {step} (rows {}); the step was not applied\n  \
         help: the last good checkpoint is {}; try a lower train.learning_rate, a longer warm-up \
         or train.max_grad_norm", rows.join(", "),
        checkpoint.as_ref().map_or_else(|| "not there yet".to_string(), |p| p.display().to_string())
    )]
    NonFinite {
        /// "loss" or "gradient norm".
        what: &'static str,
        /// The value.
        value: f64,
        /// Optimizer step, counted from 1.
        step: usize,
        /// `file:line` of the rows in the step.
        rows: Vec<String>,
        /// The newest checkpoint.
        checkpoint: Option<PathBuf>,
    },
    /// More memory is wanted than there is.
    #[error("{0}")]
    Memory(String),
    /// The base model's tokenizer.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// The model.
        path: PathBuf,
        /// What is wrong with it.
        source: enamel_data::DataError,
    },
    /// The tokenizer and the model disagree.
    #[error("{0}")]
    Mismatch(String),
    /// Something in the training framework.
    #[error("training stopped: {0}")]
    Framework(String),
}

impl TrainError {
    /// Wraps an I/O error with the file and what was being done to it.
    pub fn io(path: &std::path::Path, what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, what, source }
    }
}

/// `ENAMEL_CPU` names no path of this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{CPU_VARIABLE}={asked}: this machine has {}; unset it or name one of these", available.join(", "))]
pub struct CpuPathAbsent {
    /// What it says.
    pub asked: String,
    /// The paths there are, the plainest first.
    pub available: Vec<&'static str>,
}

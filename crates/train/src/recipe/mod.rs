//! The recipe: one TOML file that says what to train, on what, and how.
//!
//! [`RecipeFile`] is what was written, [`Recipe`] what it means: checked, with every default filled
//! in. `settings.rs` declares each setting once; code past [`RecipeFile::resolve`] never sees an
//! unchecked one.

mod adapter;
mod convert;
mod lock;
pub(crate) mod optim;
mod quantization;
mod read;
mod reference;
mod resolve;
mod section;
mod settings;
mod task;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::error::recipe::{Origin, Problem, Problems, RecipeError};
pub use adapter::{AdapterSettings, InitWeights, LoftqSettings, Modules, Ordered};
pub use lock::{FileHash, LockInfo, write_lock};
pub(crate) use quantization::NOT_QUANTISED;
pub use quantization::{FourBitCompute, FourBitType, QuantizationSettings};
pub use read::{RecipeFile, Variant};
pub use reference::reference;
pub use section::Setting;
pub use settings::{
    CheckMemory, ComputeDtype, DataSettings, GradientCheckpointing, ModelSettings, OutputSettings,
    Paths, Schedule, Strategy, TemplateArguments, TrainSettings,
};
pub use task::TaskName;

/// A recipe with nothing left open. Paths of models and data are absolute; the output directory is
/// relative to the current directory unless it was given as absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seeds everything that is drawn.
    pub seed: u64,
    /// What the model is for.
    #[serde(default)]
    pub task: TaskName,
    /// Where to compute.
    pub device: String,
    /// The frozen base.
    pub model: ModelSettings,
    /// What is trained.
    pub adapter: AdapterSettings,
    /// What it is trained on.
    pub data: DataSettings,
    /// For how long and how.
    pub train: TrainSettings,
    /// Where the run goes.
    pub output: OutputSettings,
}

/// How long training lasts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Passes over the training rows.
    Epochs(f64),
    /// Optimizer steps.
    Steps(usize),
}

/// How often something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cadence {
    /// Never.
    Never,
    /// Every so many optimizer steps.
    Steps(usize),
    /// At the end of each epoch.
    Epoch,
}

impl Recipe {
    /// Reads and resolves a recipe (or lock) file in one go.
    pub fn load<S: AsRef<str>>(path: &Path, overrides: &[S]) -> Result<Self, RecipeError> {
        RecipeFile::read(path)?.with_overrides(overrides).resolve()
    }

    /// A recipe for `base` alone, for questions that no data are needed for. A path is relative to
    /// the current directory.
    pub fn for_model<S: AsRef<str>>(base: &str, overrides: &[S]) -> Result<Self, RecipeError> {
        let text = "data.train = 'none'\n".to_owned();
        let mut recipe = RecipeFile::from_text(Path::new("(command line)"), text)
            .with_overrides(overrides)
            .resolve()?;
        recipe.model.base = resolve::model_reference(base);
        Ok(recipe)
    }

    /// The run directory.
    pub fn output_dir(&self) -> PathBuf {
        self.output
            .dir
            .clone()
            .unwrap_or_else(|| PathBuf::from("runs"))
    }
}

impl ModelSettings {
    /// The chat template that replaces the model's own, read from its file if it is one.
    pub fn chat_template_text(&self) -> Result<Option<String>, RecipeError> {
        match &self.chat_template {
            Some(text) if !resolve::is_inline_template(text) => {
                let path = PathBuf::from(text);
                std::fs::read_to_string(&path)
                    .map(Some)
                    .map_err(|source| RecipeError::Read { path, source })
            }
            text => Ok(text.clone()),
        }
    }
}

impl TrainSettings {
    /// How long training lasts.
    pub fn length(&self) -> Length {
        match self.max_steps {
            Some(steps) => Length::Steps(steps),
            None => Length::Epochs(self.epochs.unwrap_or(3.0)),
        }
    }

    /// Steps of rising learning rate among `total`, rounded up from a ratio as transformers does.
    pub fn warmup(&self, total: usize) -> usize {
        match self.warmup_steps {
            0 => (total as f64 * self.warmup_ratio).ceil() as usize,
            steps => steps,
        }
    }

    /// How often to validate.
    pub fn eval_cadence(&self) -> Cadence {
        cadence(self.eval_strategy, self.eval_steps)
    }

    /// How often to save a checkpoint.
    pub fn save_cadence(&self) -> Cadence {
        cadence(self.save_strategy, self.save_steps)
    }
}

fn cadence(strategy: Option<Strategy>, steps: Option<usize>) -> Cadence {
    match (strategy, steps) {
        (Some(Strategy::Steps), Some(n)) => Cadence::Steps(n),
        (Some(Strategy::Epoch), _) => Cadence::Epoch,
        _ => Cadence::Never,
    }
}

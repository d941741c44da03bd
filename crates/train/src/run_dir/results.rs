//! What a run leaves besides models: `summary.json` and `samples.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::memory::Footprint;
use crate::run_dir::checkpoints::Best;

/// What a run came to; `summary.json` holds the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunOutcome {
    /// The run directory.
    pub dir: PathBuf,
    /// The finished adapter; none when the run was interrupted, or trained the base itself.
    pub adapter: Option<PathBuf>,
    /// The finished model of a run that trained the base itself.
    #[serde(default)]
    pub model: Option<PathBuf>,
    /// Newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The signal that interrupted it.
    pub interrupted: Option<i32>,
    /// Interrupted from the dashboard.
    pub stopped_by_user: bool,
    /// Whether early stopping ended it.
    pub stopped_early: bool,
    /// Steps done.
    pub step: usize,
    /// Steps planned.
    pub total_steps: usize,
    /// Validation loss before the first step.
    pub first_valid_loss: Option<f64>,
    /// The task's other metrics before the first step.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub first_metrics: Map<String, Value>,
    /// Validation loss of the adapter that was kept.
    pub valid_loss: Option<f64>,
    /// The task's other metrics of the adapter that was kept.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metrics: Map<String, Value>,
    /// The best validation and its step.
    pub best: Option<Best>,
    /// Mean training loss of the last stretch.
    pub train_loss: Option<f64>,
    /// Trainable parameters.
    pub trainable: usize,
    /// Tokens trained on, padding left out.
    pub tokens: u64,
    /// Time spent in training steps, interruptions left out.
    pub seconds: f64,
    /// Tokens a second in training steps.
    pub tokens_per_second: f64,
    /// Most resident memory, in bytes.
    pub peak_memory: u64,
    /// What was expected of it before the run, by part.
    #[serde(default)]
    pub estimated_memory: Option<Footprint>,
    /// Answers before and after.
    pub samples: Vec<Sample>,
}

/// A question with the answers to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The question.
    pub prompt: String,
    /// The answer in the data.
    pub reference: Option<String>,
    /// The base model's answer.
    pub before: String,
    /// The adapted model's answer.
    pub after: String,
}

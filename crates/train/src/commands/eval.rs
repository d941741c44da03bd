//! `enamel eval`: a task's metrics of a model on a recipe's validation rows.

use std::path::Path;

use burn::train::InferenceStep;
use enamel_data::Note;
use enamel_model::source::PullProgress;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::base::provenance;
use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::inputs::loftq;
use crate::recipe::Recipe;
use crate::task::measured::{ClassScores, values};
use crate::task::{Measured, Task, for_task};
use crate::training::data_loader::EvalLoader;
use crate::training::train_step::TrainModel;

/// What an evaluation measured.
#[derive(Clone, Debug, Serialize)]
pub struct EvalReport {
    /// Rows read.
    pub rows: usize,
    /// How many labels the loss counts, and the task's metrics: `loss`, and `perplexity` of a language model.
    #[serde(flatten)]
    pub metrics: Map<String, Value>,
    /// How good a classifier is on each of its classes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassScores>,
    /// Wall time in seconds, loading left out.
    pub seconds: f64,
    /// Where it ran.
    pub device: String,
    /// What products with the base multiplied: `f32` or `bf16`.
    pub compute_dtype: &'static str,
    /// What is worth saying of the rows.
    #[serde(skip)]
    pub notes: Vec<Note>,
    /// What is to be known of the adapter on this base.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapter_notes: Vec<String>,
}

/// Evaluates the recipe's base, with `adapter` if one is given, on the validation rows.
///
/// # Errors
/// Anything wrong with the inputs, or a recipe without validation rows.
pub fn evaluate(
    recipe: &Recipe,
    adapter: Option<&Path>,
    progress: &mut dyn PullProgress,
) -> Result<EvalReport, TrainError> {
    for_task!(recipe.task, T => evaluate_task::<T>(recipe, adapter, progress))
}

fn evaluate_task<T: Task>(
    recipe: &Recipe,
    adapter: Option<&Path>,
    progress: &mut dyn PullProgress,
) -> Result<EvalReport, TrainError> {
    let mut recipe = recipe.clone();
    if let Some(dir) = adapter {
        for_task_type(dir, T::TASK_TYPE)?;
        // Its outputs are what it was trained for, whatever classes the rows name.
        let labels = enamel_adapter::made(dir).labels;
        if recipe.data.labels.is_empty() {
            recipe.data.labels = labels;
        }
    }
    let recipe = &recipe;
    let mut inputs = Inputs::<T>::open(recipe, None, progress)?;
    if inputs.valid.is_empty() {
        return Err(TrainError::Mismatch(
            "the recipe has no validation rows\n  help: set data.valid or data.valid_fraction"
                .to_string(),
        ));
    }
    if let Some(dir) = adapter {
        inputs.base.for_adapter_dirs(&[dir.to_owned()])?;
    }
    let mut model = inputs.base.weights(&inputs.device, &inputs.loading())?;
    let mut notes = Vec::new();
    if let Some(dir) = adapter {
        let loaded = enamel_adapter::load_pretrained(&mut model, dir, false)?;
        notes = provenance::notes(dir, Some(&inputs.base));
        notes.extend(loftq::beside_dense(&loaded.config, &model).map(str::to_owned));
    }
    let trainee = TrainModel {
        model,
        task: inputs.task.clone(),
    };
    let started = std::time::Instant::now();
    let loader = EvalLoader::new(&inputs.task, &inputs.valid, recipe.train.batch_size);
    let mut measured = Measured::default();
    for batch in loader.batches() {
        measured.add(&InferenceStep::step(&trainee, batch.clone()));
    }
    let mut metrics = Map::new();
    if T::COUNTED != "rows" {
        metrics.insert(T::COUNTED.to_owned(), measured.count.into());
    }
    metrics.extend(values(T::METRICS.iter(), &measured));
    Ok(EvalReport {
        rows: inputs.valid.len(),
        metrics,
        classes: inputs.task.class_scores(&measured.tally),
        seconds: started.elapsed().as_secs_f64(),
        device: inputs.device_name,
        compute_dtype: inputs.compute.name(),
        notes: inputs.train.notes,
        adapter_notes: notes,
    })
}

/// Refuses an adapter that is for another task.
///
/// # Errors
/// That; a configuration that cannot be read.
pub(crate) fn for_task_type(adapter: &Path, wanted: &str) -> Result<(), TrainError> {
    match enamel_adapter::load_config(adapter)?.task_type() {
        Some(other) if other != wanted => Err(TrainError::Mismatch(format!(
            "{} is for task_type = {other}, and {wanted} is asked for\n  \
             help: set `task` in the recipe to the task that the adapter was trained for",
            adapter.display()
        ))),
        _ => Ok(()),
    }
}

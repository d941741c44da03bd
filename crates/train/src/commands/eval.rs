//! `enamel eval`: loss and perplexity of a model on a recipe's validation rows.

use std::path::Path;

use burn::train::InferenceStep;
use enamel_data::Note;
use enamel_model::source::PullProgress;
use serde::Serialize;

use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::inputs::loftq;
use crate::inputs::provenance;
use crate::recipe::Recipe;
use crate::training::data_loader::EvalLoader;
use crate::training::train_step::TrainModel;

/// What an evaluation measured.
#[derive(Clone, Debug, Serialize)]
pub struct EvalReport {
    /// Rows read.
    pub rows: usize,
    /// Tokens with a label.
    pub trained_tokens: usize,
    /// Mean negative log-likelihood, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
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
    let mut inputs = Inputs::open(recipe, None, progress)?;
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
    let trainee = TrainModel { model };
    let pad = inputs.base.tokenizer.padding_id();
    let started = std::time::Instant::now();
    let loader = EvalLoader::new(&inputs.valid, recipe.train.batch_size, pad);
    let (mut sum, mut count) = (0.0, 0);
    for batch in loader.batches() {
        let out = InferenceStep::step(&trainee, batch.clone());
        sum += out.loss_sum;
        count += out.trained_tokens;
    }
    let loss = sum / count.max(1) as f64;
    Ok(EvalReport {
        rows: inputs.valid.len(),
        trained_tokens: count,
        loss,
        perplexity: loss.exp(),
        seconds: started.elapsed().as_secs_f64(),
        device: inputs.device_name,
        compute_dtype: inputs.compute.name(),
        notes: inputs.train.notes,
        adapter_notes: notes,
    })
}

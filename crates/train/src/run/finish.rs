//! What a run leaves: the adapter or the model, samples, summary and report.

use std::path::Path;

use enamel_adapter::{AdapterConfig, MethodConfig};
use enamel_model::Model;

use super::launch::allocator;
use super::{Prepared, notes, pair, report, save_full, write_json};
use crate::error::TrainError;
use crate::run_dir::RunDir;
use crate::run_dir::belongings::{MODEL, SAMPLES, SUMMARY};
use crate::run_dir::checkpoints::{ADAPTER, Checkpoints};
use crate::run_dir::results::RunOutcome;
use crate::task::Task;
use crate::training::training_loop::LoopEnd;

/// The adapter of a method that moves ranks, cut down to those that the checkpoint beside it has left; others as they
/// are.
fn trimmed(
    model: &mut Model,
    adapter: AdapterConfig,
    checkpoint: &Path,
) -> Result<AdapterConfig, TrainError> {
    match allocator(model, &adapter, Some(checkpoint))? {
        Some(allocator) => Ok(allocator.trimmed(model)?),
        None => Ok(adapter),
    }
}

impl<T: Task> Prepared<'_, T> {
    /// Writes the adapter, the samples, the summary and the report.
    pub(super) fn finish(
        &self,
        run: &RunDir,
        (mut model, adapter): (Model, AdapterConfig),
        end: LoopEnd,
        before: Vec<String>,
    ) -> Result<RunOutcome, TrainError> {
        let (recipe, inputs, prompts) = (self.recipe, &self.inputs, &self.prompts);
        let interrupted = end.signal.is_some() || end.stopped_by_user;
        let mut outcome = RunOutcome {
            dir: run.path.clone(),
            adapter: None,
            model: None,
            checkpoint: end
                .checkpoint
                .or_else(|| Checkpoints::new(&run.path, 1).latest()),
            interrupted: end.signal,
            stopped_by_user: end.stopped_by_user,
            stopped_early: end.stopped_early,
            step: end.state.step,
            total_steps: end.state.total_steps,
            first_valid_loss: end.state.first_valid_loss,
            first_metrics: end.state.first_metrics,
            valid_loss: end.state.valid_loss,
            metrics: end.state.metrics,
            best: end.state.best,
            train_loss: end.state.train_loss,
            trainable: inputs.plan.trainable,
            tokens: end.state.tokens,
            seconds: end.state.seconds,
            tokens_per_second: end.state.tokens as f64 / end.state.seconds.max(1e-9),
            peak_memory: end.state.peak_memory,
            estimated_memory: Some(self.memory.footprint),
            samples: pair(prompts, before.clone(), Vec::new()),
        };
        if interrupted {
            return Ok(outcome);
        }
        // Whose ranks count, if the method chooses some: those of the adapter that is kept.
        let mut kept = end.state.step;
        if let (true, Some(best)) = (recipe.train.load_best_model_at_end, outcome.best.clone())
            && best.step != end.state.step
        {
            let dir = Checkpoints::new(&run.path, 1).path(best.step).join(ADAPTER);
            enamel_adapter::detach(&mut model);
            enamel_adapter::load_pretrained(&mut model, &dir, false)?;
            kept = best.step;
            outcome.valid_loss = Some(best.loss);
            outcome.metrics.clone_from(&best.metrics);
            let (metric, order) = match self.metric.higher_is_better {
                true => (self.metric.key, "highest"),
                false => (self.metric.key, "lowest"),
            };
            (self.say)(&format!(
                "keeping the adapter of step {}, whose validation {metric} is {order}",
                best.step
            ));
        }
        if adapter.trains_everything() {
            let write = |dir: &Path| save_full::write(&model, &inputs.base.checkpoint, dir);
            outcome.model = Some(run.hold.place(MODEL, write)?);
        } else {
            let checkpoint = Checkpoints::new(&run.path, 1).path(kept);
            let adapter = trimmed(&mut model, adapter, &checkpoint)?;
            let card = notes::card(recipe, inputs, &outcome);
            let meta = self.save_meta(Some(card));
            let write = |dir: &Path| {
                Ok(enamel_adapter::save_pretrained(
                    &model, &adapter, &meta, dir,
                )?)
            };
            outcome.adapter = Some(run.hold.place(ADAPTER, write)?);
        }
        let after = self.answers(&model)?;
        outcome.samples = pair(prompts, before, after);
        write_json(&run.hold, SAMPLES, &outcome.samples)?;
        run.hold.check()?;
        report::write(&run.path, &run.state.run, recipe, inputs, &outcome)?;
        // Last: with it the run counts as finished.
        write_json(&run.hold, SUMMARY, &outcome)?;
        Ok(outcome)
    }
}

//! What a run says about itself: before it starts, and on the adapter's model card.

use std::fmt::Write;

use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::recipe::{LockInfo, Recipe, RecipeFile};
use crate::run_dir::results::RunOutcome;
use crate::run_dir::{LOCK, Resume, RunDir};
use crate::task::Task;
use crate::text::LogLine;
use crate::text::thousands;
use crate::training::training_loop::Intervals;
use enamel_data::Row;

/// Training from a lock file promises the same bits, so changed files are an error.
///
/// # Errors
/// When a file's hash is not what the lock says; all of them at once.
pub fn refuse_changed_lock(locked: Option<&LockInfo>, now: &LockInfo) -> Result<(), TrainError> {
    let changed = locked
        .map(|then| then.changed_files(now))
        .unwrap_or_default();
    if changed.is_empty() {
        return Ok(());
    }
    Err(TrainError::Mismatch(format!(
        "the lock file was written for other files:\n  {}\n  help: put the files back as they were, \
         or train from the recipe",
        changed.join("\n  ")
    )))
}

/// The time that a chat template with a date in it shows: that of the lock file, or of the run that is
/// gone on with; the clock's for a new run.
pub fn template_time(recipe: &Recipe, resume: &Resume, locked: Option<&LockInfo>) -> Option<i64> {
    if let Some(locked) = locked {
        return locked.template_time;
    }
    let own = match resume {
        Resume::No => return None,
        Resume::Latest => None,
        // It may go on in another directory.
        Resume::From(checkpoint) => checkpoint.canonicalize().ok(),
    };
    let own = own.and_then(|checkpoint| Some(checkpoint.parent()?.parent()?.to_owned()));
    let mut runs = own.into_iter().chain([recipe.output_dir()]);
    let lock = runs.find_map(|run| RecipeFile::read(&run.join(LOCK)).ok())?;
    lock.lock_info().ok().flatten()?.template_time
}

/// Says what will happen, from the inputs as they were found.
pub fn announce<T: Task>(
    say: &LogLine,
    recipe: &Recipe,
    inputs: &Inputs<T>,
    run: &RunDir,
    rhythm: &Intervals,
) {
    let plan = &inputs.plan;
    say(&format!(
        "model    {} ({})",
        inputs.base.local.reference, inputs.base.local.source_note
    ));
    say(&format!(
        "device   {}, {} threads",
        inputs.device_name, inputs.lock.threads
    ));
    say(&format!("compute  {}", inputs.computing()));
    say(&format!(
        "adapter  {} on {} modules: {} of {} parameters trained ({:.3} %)",
        recipe.adapter.method,
        plan.targets.len(),
        thousands(plan.trainable as u64),
        thousands(plan.total as u64),
        plan.percent(),
    ));
    let train = &inputs.train;
    let tokens: usize = train.rows.iter().map(T::Row::tokens).sum();
    let mut data = format!(
        "data     {} rows to train on ({} tokens), {} to validate on",
        train.rows.len(),
        thousands(tokens as u64),
        inputs.valid.len()
    );
    if train.truncated > 0 {
        let _ = write!(data, "; {} truncated", train.truncated);
    }
    if !train.skipped.is_empty() {
        let _ = write!(data, "; {} bad rows skipped", train.skipped.len());
    }
    say(&data);
    for note in &inputs.task_notes {
        say(&format!("task     {note}"));
    }
    for note in &train.notes {
        say(&format!("note     {note}"));
    }
    let checkpointing = recipe.train.gradient_checkpointing;
    if checkpointing.0.is_some() {
        say(&format!(
            "memory   keeps {checkpointing} and computes the blocks again"
        ));
    }
    run.tell(0, say);
    let from = match run.state.step {
        0 => String::new(),
        n => format!(", resuming after step {n}"),
    };
    say(&format!(
        "steps    {} ({} an epoch){from}; output {}",
        rhythm.total,
        rhythm.per_epoch,
        run.path.display()
    ));
}

/// What the model card says about the training.
pub fn card<T: Task>(recipe: &Recipe, inputs: &Inputs<T>, outcome: &RunOutcome) -> String {
    let t = &recipe.train;
    let mut card = format!(
        "## Training\n\nTrained with Enamel {} on `{}`.\n\n| | |\n|---|---|\n",
        inputs.lock.enamel, inputs.device_name
    );
    let mut row = |name: &str, value: String| {
        let _ = writeln!(card, "| {name} | {value} |");
    };
    row("compute dtype", inputs.compute.name().to_owned());
    if let Some(format) = inputs.quantization.format {
        row("base held as", format.to_string());
    }
    row("rows", inputs.train.rows.len().to_string());
    row("optimizer steps", outcome.step.to_string());
    row(
        "rows a step",
        (t.batch_size * t.gradient_accumulation_steps).to_string(),
    );
    row("learning rate", format!("{}", t.learning_rate));
    row("seed", recipe.seed.to_string());
    let variables = &recipe.data.chat_template_kwargs;
    if !variables.0.is_empty() {
        // What would end the code or the cell is written as JSON's escapes.
        let json = variables.to_string();
        let json = json.replace('`', "\\u0060").replace('|', "\\u007c");
        row("chat template variables", format!("`{json}`"));
    }
    if let Some(loss) = outcome.first_valid_loss {
        row("validation loss before", format!("{loss:.4}"));
    }
    if let Some(loss) = outcome.valid_loss {
        row("validation loss after", format!("{loss:.4}"));
    }
    for metric in T::METRICS.iter().filter(|metric| metric.key != "loss") {
        let (key, before) = (metric.key, outcome.first_metrics.get(metric.key));
        for (when, value) in [("before", before), ("after", outcome.metrics.get(key))] {
            if let Some(value) = value.and_then(serde_json::Value::as_f64) {
                row(&format!("validation {key} {when}"), metric.text(value));
            }
        }
    }
    card
}

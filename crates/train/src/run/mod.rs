//! `enamel train`: from a recipe to an adapter, in one straight line.

mod finish;
mod launch;
pub(crate) mod notes;
pub(crate) mod report;
pub(crate) mod save_full;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use enamel_adapter::SaveMeta;
use enamel_model::Model;
use enamel_model::source::PullProgress;
use serde::Serialize;

use crate::error::TrainError;
use crate::inputs::{Inputs, metric_for_best_model};
use crate::memory::{Estimate, oom_notice};
use crate::recipe::{LockInfo, Recipe};
use crate::run_dir::belongings::SAMPLES;
use crate::run_dir::checkpoints::ADAPTER;
use crate::run_dir::ground;
use crate::run_dir::ground::Ground;
use crate::run_dir::hold::Hold;
use crate::run_dir::results::RunOutcome;
use crate::run_dir::results::Sample;
use crate::run_dir::{Resume, RunDir, Standing};
use crate::signals::StopFlag;
use crate::task::{MetricSpec, Prompt, Task, for_task};
use crate::text::LogLine;
use crate::text::shown;

/// How to run, besides what the recipe says.
pub struct TrainOptions<'a> {
    /// Whether to go on with a run.
    pub resume: Resume,
    /// Go on although what computed the checkpoint gives other bits than what computes here.
    pub other_bits: bool,
    /// Draw burn-train's dashboard; needs a terminal.
    pub dashboard: bool,
    /// Says lines to the person who waits.
    pub say: LogLine,
    /// Set by signals.
    pub stop: StopFlag,
    /// Told of downloads.
    pub progress: &'a mut dyn PullProgress,
    /// What the run stood on that wrote the recipe, if it is a lock file.
    pub locked: Option<LockInfo>,
}

/// Trains as `recipe` says.
///
/// # Errors
/// Anything wrong with the recipe's inputs, found before training and before anything in the run directory is
/// changed; afterwards a non-finite loss, a full disk or a failing device. The run directory then keeps its last
/// checkpoint, and the old run that was to be replaced comes back if there is none.
pub fn train(recipe: &Recipe, options: TrainOptions<'_>) -> Result<RunOutcome, TrainError> {
    let say = options.say.clone();
    let mut run = RunDir::claim(recipe, &options.resume)?;
    let hold = Arc::downgrade(&run.hold);
    options
        .stop
        .on_leaving(move || hold.upgrade().iter().for_each(|hold| hold.abandon()));
    let outcome = for_task!(recipe.task, T => train_in::<T>(&mut run, recipe, options));
    run.leave(&say);
    outcome
}

/// A run whose inputs are open.
struct Prepared<'a, T: Task> {
    recipe: &'a Recipe,
    inputs: Inputs<T>,
    /// What makes one validation better than another.
    metric: &'static MetricSpec<T::Tally>,
    memory: Estimate,
    prompts: Vec<Prompt>,
    say: LogLine,
}

/// The same in a directory that nobody else uses meanwhile.
fn train_in<T: Task>(
    run: &mut RunDir,
    recipe: &Recipe,
    options: TrainOptions<'_>,
) -> Result<RunOutcome, TrainError> {
    let time = notes::template_time(recipe, &options.resume, options.locked.as_ref());
    let inputs = Inputs::<T>::open(recipe, time, options.progress)?;
    let lock = inputs.lock.clone();
    notes::refuse_changed_lock(options.locked.as_ref(), &lock)?;
    if let Standing::Finished(outcome) = run.open(recipe, &lock, &options.resume)? {
        run.tell(0, &options.say);
        (options.say)(&format!(
            "the run in {} is finished: nothing to go on with, and nothing was changed",
            run.path.display()
        ));
        return Ok(*outcome);
    }
    let now = Ground::from(&lock);
    let compute = recipe.model.compute_dtype;
    if let Some(checkpoint) = &run.checkpoint {
        let then = run.state.ground.as_ref();
        let accept = options.other_bits;
        run.notes
            .extend(ground::check(checkpoint, then, &now, compute, accept)?);
    }
    run.notes.extend(ground::note_of_lock(
        options.locked.as_ref(),
        &lock,
        compute,
    ));
    run.state.ground = Some(now);
    let plan = Arc::new(launch::step_plan(recipe, &inputs));
    let rhythm = launch::rhythm(recipe, plan.rows().len());
    run.check_length(rhythm.total)?;
    notes::announce(&options.say, recipe, &inputs, run, &rhythm);
    let memory = Estimate::of_inputs(recipe, &inputs);
    memory.check(recipe.train.check_memory, &*options.say)?;
    let _notice = OutOfMemory::at_hand(&memory, &run.path);

    let resumed = run.checkpoint.as_deref();
    let from = resumed.map(|c| c.join(ADAPTER));
    let (mut model, adapter) = inputs.model(recipe, from.as_deref(), &*options.say)?;
    model.set_recompute(recipe.train.gradient_checkpointing.0);
    let rows = if inputs.valid.is_empty() {
        &inputs.train.rows
    } else {
        &inputs.valid
    };
    let prepared = Prepared {
        recipe,
        metric: metric_for_best_model::<T>(recipe).unwrap_or(&MetricSpec::LOSS),
        prompts: inputs.task.prompts(&recipe.train, rows, &inputs.base)?,
        inputs,
        memory,
        say: options.say.clone(),
    };
    // All that is read has been: from here on the directory changes.
    let said = run.notes.len();
    run.prepare(recipe, &lock)?;
    run.tell(said, &options.say);
    let before = prepared.answers_before(run, &model)?;

    let launched = prepared.launch(run, plan, rhythm, (model, adapter.clone()), &options);
    let (model, mut end) =
        launched.map_err(|error| refused_memory(error, &prepared.memory, &run.path))?;
    if let Some(error) = end.error.take() {
        return Err(error);
    }
    prepared.finish(run, (model.model, adapter), end, before)
}

/// While it lives, an allocator that is refused memory has something to say
/// (see [`oom_notice::end`](crate::memory::oom_notice::end)).
struct OutOfMemory;

impl OutOfMemory {
    fn at_hand(memory: &Estimate, run: &Path) -> Self {
        oom_notice::prepare(format!("error: {}\n", memory.out_of_memory(&go_on(run))));
        Self
    }
}

impl Drop for OutOfMemory {
    fn drop(&mut self) {
        oom_notice::clear();
    }
}

fn go_on(run: &Path) -> String {
    format!(
        "checkpoints in {} are whole: go on from the newest with --resume, after memory settings \
         that change no number",
        run.join("checkpoints").display()
    )
}

/// An error of the device that was refused memory, with the table.
fn refused_memory(error: TrainError, memory: &Estimate, run: &Path) -> TrainError {
    let said = error.to_string().to_ascii_lowercase();
    let words = [
        "out of memory",
        "out_of_memory",
        "outofmemory",
        "can't allocate",
    ];
    match words.iter().any(|word| said.contains(word)) {
        true => TrainError::Memory(memory.out_of_memory(&go_on(run))),
        false => error,
    }
}

impl<T: Task> Prepared<'_, T> {
    /// The base's answers: computed before the first step, read back when resuming.
    fn answers_before(&self, run: &RunDir, model: &Model) -> Result<Vec<String>, TrainError> {
        // A checkpoint of another directory has them beside it.
        let begun = |checkpoint: &PathBuf| Some(checkpoint.parent()?.parent()?.join(SAMPLES));
        let beside = run.checkpoint.as_ref().and_then(begun);
        let mut old = [Some(run.path.join(SAMPLES)), beside].into_iter().flatten();
        if run.checkpoint.is_some()
            && let Some(bytes) = old.find_map(|path| std::fs::read(path).ok())
            && let Ok(old) = serde_json::from_slice::<Vec<Sample>>(&bytes)
            && old.len() == self.prompts.len()
        {
            return Ok(old.into_iter().map(|s| s.before).collect());
        }
        if !self.prompts.is_empty() {
            (self.say)(&format!(
                "answering {} sample questions before training",
                self.prompts.len()
            ));
        }
        let answers = self.answers(model)?;
        let samples = pair(&self.prompts, answers.clone(), Vec::new());
        write_json(&run.hold, SAMPLES, &samples)?;
        Ok(answers)
    }

    fn answers(&self, model: &Model) -> Result<Vec<String>, TrainError> {
        let inputs = &self.inputs;
        let most = self.recipe.train.max_new_tokens;
        inputs
            .task
            .answers(model, &inputs.base, &self.prompts, most)
    }

    fn save_meta(&self, extra_readme: Option<String>) -> SaveMeta {
        let inputs = &self.inputs;
        SaveMeta {
            base_model_name_or_path: inputs.base.name_for_peft(),
            revision: inputs.base.revision_for_peft(),
            task_type: Some(T::TASK_TYPE.to_string()),
            made: enamel_adapter::Made {
                base: inputs.base.identity(),
                labels: inputs.task.labels().to_vec(),
            },
            extra_readme,
        }
    }
}

fn pair(prompts: &[Prompt], before: Vec<String>, after: Vec<String>) -> Vec<Sample> {
    let after = after.into_iter().chain(std::iter::repeat(String::new()));
    let all = prompts.iter().zip(before).zip(after);
    all.map(|((prompt, before), after)| Sample {
        prompt: prompt.text.clone(),
        reference: prompt.reference.clone(),
        before,
        after,
    })
    .collect()
}

fn write_json<T: Serialize>(hold: &Hold, name: &str, value: &T) -> Result<(), TrainError> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|e| TrainError::Framework(format!("writing {name}: {e}")))?;
    // The same JSON, also for somebody who prints it on a terminal.
    hold.write(name, shown(&json).as_bytes())
}

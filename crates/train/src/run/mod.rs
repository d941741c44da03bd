//! `enamel train`: from a recipe to an adapter, in one straight line.

pub(crate) mod notes;
pub(crate) mod report;
pub mod samples;
pub(crate) mod save_full;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::optim::AdamWConfig;
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};
use enamel_adapter::{AdapterConfig, MethodConfig, RankAllocator, SaveMeta};
use enamel_kernels::AdamW;
use enamel_model::source::PullProgress;
use serde::Serialize;

use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::inputs::step_counts;
use crate::memory::{Estimate, oom_notice};
use crate::optimizer::Optimizer;
use crate::recipe::{Cadence, LockInfo, Recipe};
use crate::run::samples::Prompt;
use crate::run_dir::belongings::{METRICS, MODEL, SAMPLES, SUMMARY};
use crate::run_dir::checkpoints;
use crate::run_dir::checkpoints::{ADAPTER, Checkpoints, RunState};
use crate::run_dir::ground;
use crate::run_dir::ground::Ground;
use crate::run_dir::hold::Hold;
use crate::run_dir::results::RunOutcome;
use crate::run_dir::results::Sample;
use crate::run_dir::{Resume, RunDir, Standing};
use crate::signals::StopFlag;
use crate::text::LogLine;
use crate::text::shown;
use crate::training::data_loader::{EvalLoader, StepLoader, StepPlan, StepSettings};
use crate::training::lora_plus;
use crate::training::lr_schedule::Schedule;
use crate::training::metrics::{
    GradNorm, LearningRate, Loss, Memory, Perplexity, Progress, Scalar, TokensPerSecond,
};
use crate::training::metrics_log::MetricsLog;
use crate::training::renderer::{Dashboard, Lines};
use crate::training::train_step::TrainModel;
use crate::training::training_loop::{Intervals, LoopEnd, StepStrategy};

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
    let outcome = train_in(&mut run, recipe, options);
    run.leave(&say);
    outcome
}

/// The same in a directory that nobody else uses meanwhile.
fn train_in(
    run: &mut RunDir,
    recipe: &Recipe,
    options: TrainOptions<'_>,
) -> Result<RunOutcome, TrainError> {
    let time = notes::template_time(recipe, &options.resume, options.locked.as_ref());
    let inputs = Inputs::open(recipe, time, options.progress)?;
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
    let plan = Arc::new(step_plan(recipe, &inputs));
    let rhythm = rhythm(recipe, &plan);
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
    let prompts = samples::prompts(&recipe.train, rows, &inputs.base.tokenizer)?;
    // All that is read has been: from here on the directory changes.
    let said = run.notes.len();
    run.prepare(recipe, &lock)?;
    run.tell(said, &options.say);
    let before = answers_before(recipe, run, &inputs, &model, &prompts, &options.say)?;

    let start = (model, adapter.clone());
    let launched = launch(recipe, &inputs, run, plan, rhythm, start, &options);
    let (model, mut end) = launched.map_err(|error| refused_memory(error, &memory, &run.path))?;
    if let Some(error) = end.error.take() {
        return Err(error);
    }
    finish(
        recipe,
        &inputs,
        run,
        (model, adapter),
        end,
        (&prompts, before),
        &memory,
        &options.say,
    )
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

fn step_plan(recipe: &Recipe, inputs: &Inputs) -> StepPlan {
    let settings = StepSettings {
        batch_size: recipe.train.batch_size,
        accumulation: recipe.train.gradient_accumulation_steps,
        seed: recipe.seed,
        shuffle: recipe.data.shuffle,
        group_by_length: recipe.data.group_by_length,
        pad_id: inputs.base.tokenizer.padding_id(),
        max_grad_norm: recipe.train.max_grad_norm,
        label_smoothing: recipe.train.label_smoothing_factor,
    };
    StepPlan::new(inputs.train.rows.clone(), settings)
}

fn rhythm(recipe: &Recipe, plan: &StepPlan) -> Intervals {
    let t = &recipe.train;
    let (per_epoch, total) = step_counts(recipe, plan.rows().len());
    let per_epoch = per_epoch.max(1);
    let every = |cadence| match cadence {
        Cadence::Never => None,
        Cadence::Steps(n) => Some(n),
        Cadence::Epoch => Some(per_epoch),
    };
    Intervals {
        total,
        per_epoch,
        eval: every(t.eval_cadence()),
        save: every(t.save_cadence()),
        save_best: t.load_best_model_at_end,
        log: t.logging_steps,
        patience: t.early_stopping_patience,
        threshold: t.early_stopping_threshold,
    }
}

/// The base's answers: computed before the first step, read back when resuming.
fn answers_before(
    recipe: &Recipe,
    run: &RunDir,
    inputs: &Inputs,
    model: &enamel_model::CausalLm,
    prompts: &[Prompt],
    say: &LogLine,
) -> Result<Vec<String>, TrainError> {
    // A checkpoint of another directory has them beside it.
    let begun = |checkpoint: &PathBuf| Some(checkpoint.parent()?.parent()?.join(SAMPLES));
    let beside = run.checkpoint.as_ref().and_then(begun);
    let mut old = [Some(run.path.join(SAMPLES)), beside].into_iter().flatten();
    if run.checkpoint.is_some()
        && let Some(bytes) = old.find_map(|path| std::fs::read(path).ok())
        && let Ok(old) = serde_json::from_slice::<Vec<Sample>>(&bytes)
        && old.len() == prompts.len()
    {
        return Ok(old.into_iter().map(|s| s.before).collect());
    }
    if !prompts.is_empty() {
        say(&format!(
            "answering {} sample questions before training",
            prompts.len()
        ));
    }
    let answers = samples::answers(model, &inputs.base, prompts, recipe.train.max_new_tokens)?;
    write_json(
        &run.hold,
        SAMPLES,
        &pair(prompts, answers.clone(), Vec::new()),
    )?;
    Ok(answers)
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

/// Hands the model to burn-train, with our strategy in charge of the loop.
fn launch(
    recipe: &Recipe,
    inputs: &Inputs,
    run: &RunDir,
    plan: Arc<StepPlan>,
    rhythm: Intervals,
    (model, adapter): (enamel_model::CausalLm, AdapterConfig),
    options: &TrainOptions<'_>,
) -> Result<(TrainModel, LoopEnd), TrainError> {
    let t = &recipe.train;
    let model = TrainModel { model };
    let settings = AdamW {
        beta1: t.adam_beta1,
        beta2: t.adam_beta2,
        epsilon: t.adam_epsilon,
        weight_decay: t.weight_decay,
    };
    let mut optimizer =
        Optimizer::with_optim(settings, t.optim, (&run.path, &run.state.run), &model)?;
    if let Some(checkpoint) = &run.checkpoint {
        checkpoints::load_optimizer(checkpoint, &mut optimizer, &model)?;
    }
    let total = rhythm.total;
    let at_rate = |rate: f64| {
        Schedule::new(t.lr_scheduler_type, rate, t.warmup(total), total).starting_at(run.state.step)
    };
    let scheduler = match t.loraplus_lr_ratio {
        Some(ratio) => lora_plus::scheduler(&model.model, t, ratio, &at_rate),
        None => at_rate(t.learning_rate).into(),
    };
    let allocator = allocator(&model.model, &adapter, run.checkpoint.as_deref())?;
    let valid: &[_] = if rhythm.eval.is_some() {
        &inputs.valid
    } else {
        &[]
    };
    let valid = Arc::new(EvalLoader::new(
        valid,
        t.batch_size,
        inputs.base.tokenizer.padding_id(),
    ));
    let train = Arc::new(StepLoader::new(plan.clone(), total));
    let end = Arc::new(Mutex::new(LoopEnd::default()));
    let interrupter = Interrupter::new();
    let strategy = StepStrategy {
        device: inputs.device.clone().autodiff(),
        optimizer: Mutex::new(optimizer),
        scheduler: scheduler.clone(),
        start: RunState {
            total_steps: total,
            ..run.state.clone()
        },
        rhythm,
        plan,
        checkpoints: Checkpoints::new(&run.path, t.save_total_limit),
        hold: run.hold.clone(),
        adapter,
        allocator,
        meta: save_meta(inputs, None),
        stop: options.stop.clone(),
        say: if options.dashboard {
            Arc::new(|_| {})
        } else {
            options.say.clone()
        },
        journal: Mutex::new(MetricsLog::open(
            &run.path.join(METRICS),
            &run.state.run,
            run.state.step,
            &*options.say,
        )?),
        end: end.clone(),
    };
    let renderer: Box<dyn burn::train::renderer::MetricsRenderer> = if options.dashboard {
        Box::new(Dashboard::new(interrupter.clone(), run.state.step, total))
    } else {
        Box::new(Lines)
    };
    let training = SupervisedTraining::new(&run.path, train, valid)
        .metric_train_numeric(Scalar::<Loss>::new())
        .metric_valid_numeric(Scalar::<Loss>::new())
        .metric_train_numeric(Scalar::<Perplexity>::new())
        .metric_valid_numeric(Scalar::<Perplexity>::new())
        .metric_train_numeric(Scalar::<LearningRate>::new())
        .metric_train_numeric(Scalar::<GradNorm>::new())
        .metric_train_numeric(Scalar::<TokensPerSecond>::new())
        .metric_train_numeric(Scalar::<Memory>::new())
        .metric_train(Progress::new())
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
        .with_application_logger(None)
        .with_metric_logger(burn::train::logger::InMemoryMetricLogger::default())
        .with_interrupter(interrupter)
        .renderer(renderer)
        .label(&run.path.display().to_string());
    // The learner has to have an optimizer; the strategy steps with its own.
    let learner = Learner::new(model, AdamWConfig::new().init(), scheduler);
    // burn-train answers "stop immediately" on the dashboard with a panic.
    let result =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| training.launch(learner)))
            .map_err(|panic| TrainError::Framework(reason(&*panic)))?;
    let end = std::mem::take(&mut *end.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((result.model, end))
}

/// What a panic said, where it said anything.
fn reason(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    match text.or(panic.downcast_ref::<&str>().copied()) {
        Some(text) => format!("it was killed or failed inside burn-train: {text}"),
        None => "it was killed or failed inside burn-train".to_owned(),
    }
}

/// The budget of a method that moves ranks, as it stands in the checkpoint or before the first step; none for others.
fn allocator(
    model: &enamel_model::CausalLm,
    adapter: &AdapterConfig,
    checkpoint: Option<&Path>,
) -> Result<Option<RankAllocator>, TrainError> {
    let mut allocator = RankAllocator::of(adapter, model);
    if let (Some(allocator), Some(checkpoint)) = (&mut allocator, checkpoint) {
        checkpoints::load_budget(checkpoint, allocator)?;
    }
    Ok(allocator)
}

fn save_meta(inputs: &Inputs, extra_readme: Option<String>) -> SaveMeta {
    SaveMeta {
        base_model_name_or_path: inputs.base.name_for_peft(),
        revision: inputs.base.revision_for_peft(),
        task_type: Some("CAUSAL_LM".to_string()),
        base_identity: inputs.base.identity(),
        extra_readme,
    }
}

/// The adapter of a method that moves ranks, cut down to those that the checkpoint beside it has left; others as they
/// are.
fn trimmed(
    model: &mut enamel_model::CausalLm,
    adapter: AdapterConfig,
    checkpoint: &Path,
) -> Result<AdapterConfig, TrainError> {
    match allocator(model, &adapter, Some(checkpoint))? {
        Some(allocator) => Ok(allocator.trimmed(model)?),
        None => Ok(adapter),
    }
}

/// Writes the adapter, the samples, the summary and the report.
#[allow(clippy::too_many_arguments)]
fn finish(
    recipe: &Recipe,
    inputs: &Inputs,
    run: &RunDir,
    (trainee, adapter): (TrainModel, AdapterConfig),
    end: LoopEnd,
    (prompts, before): (&[Prompt], Vec<String>),
    memory: &Estimate,
    say: &LogLine,
) -> Result<RunOutcome, TrainError> {
    let mut model = trainee.model;
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
        valid_loss: end.state.valid_loss,
        best: end.state.best,
        train_loss: end.state.train_loss,
        trainable: inputs.plan.trainable,
        tokens: end.state.tokens,
        seconds: end.state.seconds,
        tokens_per_second: end.state.tokens as f64 / end.state.seconds.max(1e-9),
        peak_memory: end.state.peak_memory,
        estimated_memory: Some(memory.footprint),
        samples: pair(prompts, before.clone(), Vec::new()),
    };
    if interrupted {
        return Ok(outcome);
    }
    // Whose ranks count, if the method chooses some: those of the adapter that is kept.
    let mut kept = end.state.step;
    if let (true, Some(best)) = (recipe.train.load_best_model_at_end, end.state.best)
        && best.step != end.state.step
    {
        let dir = Checkpoints::new(&run.path, 1).path(best.step).join(ADAPTER);
        enamel_adapter::detach(&mut model);
        enamel_adapter::load_pretrained(&mut model, &dir, false)?;
        kept = best.step;
        outcome.valid_loss = Some(best.loss);
        say(&format!(
            "keeping the adapter of step {}, whose validation loss is lowest",
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
        let meta = save_meta(inputs, Some(card));
        let write = |dir: &Path| {
            Ok(enamel_adapter::save_pretrained(
                &model, &adapter, &meta, dir,
            )?)
        };
        outcome.adapter = Some(run.hold.place(ADAPTER, write)?);
    }
    let after = samples::answers(&model, &inputs.base, prompts, recipe.train.max_new_tokens)?;
    outcome.samples = pair(prompts, before, after);
    write_json(&run.hold, SAMPLES, &outcome.samples)?;
    run.hold.check()?;
    report::write(&run.path, &run.state.run, recipe, inputs, &outcome)?;
    // Last: with it the run counts as finished.
    write_json(&run.hold, SUMMARY, &outcome)?;
    Ok(outcome)
}

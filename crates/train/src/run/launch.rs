//! From open inputs to burn-train's Learner.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn::optim::AdamWConfig;
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};
use enamel_adapter::{AdapterConfig, RankAllocator};
use enamel_kernels::AdamW;
use enamel_model::Model;

use super::{Prepared, TrainOptions};
use crate::error::TrainError;
use crate::inputs::{Inputs, step_counts};
use crate::optimizer::Optimizer;
use crate::recipe::{Cadence, Recipe};
use crate::run_dir::RunDir;
use crate::run_dir::belongings::METRICS;
use crate::run_dir::checkpoints;
use crate::run_dir::checkpoints::{Checkpoints, RunState};
use crate::task::Task;
use crate::training::collective::Alone;
use crate::training::data_loader::{EvalLoader, StepLoader, StepPlan, StepSettings};
use crate::training::lora_plus;
use crate::training::lr_schedule::Schedule;
use crate::training::metrics::{
    GradNorm, LearningRate, Memory, Progress, Scalar, TaskMetric, TokensPerSecond,
};
use crate::training::metrics_log::MetricsLog;
use crate::training::renderer::{Dashboard, Lines};
use crate::training::train_step::TrainModel;
use crate::training::training_loop::{Intervals, LoopEnd, StepStrategy};

pub(super) fn step_plan<T: Task>(recipe: &Recipe, inputs: &Inputs<T>) -> StepPlan<T> {
    let settings = StepSettings {
        batch_size: recipe.train.batch_size,
        accumulation: recipe.train.gradient_accumulation_steps,
        seed: recipe.seed,
        shuffle: recipe.data.shuffle,
        group_by_length: recipe.data.group_by_length,
        label_smoothing: recipe.train.label_smoothing_factor,
    };
    StepPlan::new(inputs.task.clone(), inputs.train.rows.clone(), settings)
}

pub(super) fn rhythm(recipe: &Recipe, rows: usize) -> Intervals {
    let t = &recipe.train;
    let (per_epoch, total) = step_counts(recipe, rows);
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

impl<T: Task> Prepared<'_, T> {
    /// Hands the model to burn-train, with our strategy in charge of the loop.
    pub(super) fn launch(
        &self,
        run: &RunDir,
        plan: Arc<StepPlan<T>>,
        rhythm: Intervals,
        (model, adapter): (Model, AdapterConfig),
        options: &TrainOptions<'_>,
    ) -> Result<(TrainModel<T>, LoopEnd), TrainError> {
        let (recipe, inputs) = (self.recipe, &self.inputs);
        let t = &recipe.train;
        let model = TrainModel {
            model,
            task: inputs.task.clone(),
        };
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
            Schedule::new(t.lr_scheduler_type, rate, t.warmup(total), total)
                .starting_at(run.state.step)
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
        let valid = Arc::new(EvalLoader::new(&inputs.task, valid, t.batch_size));
        let train = Arc::new(StepLoader::new(plan.clone(), total));
        let end = Arc::new(Mutex::new(LoopEnd::default()));
        let interrupter = Interrupter::new();
        let strategy = StepStrategy {
            collective: Arc::new(Alone),
            metric: self.metric,
            max_grad_norm: t.max_grad_norm,
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
            meta: self.save_meta(None),
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
        let mut training = SupervisedTraining::new(&run.path, train, valid);
        for metric in T::METRICS {
            if metric.in_training {
                training = training.metric_train_numeric(TaskMetric::new(metric));
            }
            training = training.metric_valid_numeric(TaskMetric::new(metric));
        }
        let training = training
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
pub(super) fn allocator(
    model: &Model,
    adapter: &AdapterConfig,
    checkpoint: Option<&Path>,
) -> Result<Option<RankAllocator>, TrainError> {
    let mut allocator = RankAllocator::of(adapter, model);
    if let (Some(allocator), Some(checkpoint)) = (&mut allocator, checkpoint) {
        checkpoints::load_budget(checkpoint, allocator)?;
    }
    Ok(allocator)
}

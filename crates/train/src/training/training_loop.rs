//! The training loop: burn-train's learning strategy with step-based validation, saving, early
//! stopping and bit-exact resumption.
//!
//! burn-train counts epochs; here one "epoch" of its event processor is the stretch between two
//! validations, so that its means, plots and summary cover just that.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::data::dataloader::Progress;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{
    EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent,
    SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
    TrainingComponents, TrainingItem, ValidLoader,
};
use enamel_adapter::{AdapterConfig, DEFAULT, RankAllocator, SaveForm, SaveMeta};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::memory::process::Memory;
use crate::optimizer::Optimizer;
use crate::run_dir::checkpoints::{Best, Checkpoints, RunState};
use crate::run_dir::hold::Hold;
use crate::signals::{Phase, StopFlag};
use crate::task::measured::values;
use crate::task::{Measured, MetricSpec, Tally, Task};
use crate::text::LogLine;
use crate::text::duration_text;
use crate::training::collective::Collective;
use crate::training::data_loader::StepPlan;
use crate::training::grad_clipping::Clipping;
use crate::training::metrics_log::{Entry, MetricsLog};
use crate::training::train_step::{StepOutput, TrainModel};

/// When things happen, in optimizer steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Intervals {
    /// Steps of the run.
    pub total: usize,
    /// Steps an epoch, for display.
    pub per_epoch: usize,
    /// Validate every so many steps.
    pub eval: Option<usize>,
    /// Save every so many steps.
    pub save: Option<usize>,
    /// Save whenever a validation is the best so far, so that the best adapter can be kept.
    pub save_best: bool,
    /// Log a line every so many steps.
    pub log: usize,
    /// Stop after so many validations without gain; 0 never.
    pub patience: usize,
    /// By how much the metric must get better to count as a gain.
    pub threshold: f64,
}

/// How the loop ended.
#[derive(Debug, Default)]
pub struct LoopEnd {
    /// Where it stands.
    pub state: RunState,
    /// The signal that stopped it.
    pub signal: Option<i32>,
    /// Stopped from the dashboard.
    pub stopped_by_user: bool,
    /// Early stopping ended it.
    pub stopped_early: bool,
    /// What went wrong.
    pub error: Option<TrainError>,
    /// Newest checkpoint of this process.
    pub checkpoint: Option<PathBuf>,
}

/// The strategy and everything it owns. burn-train's `Learner` offers no way to read its optimizer
/// back, so the strategy has its own.
pub struct StepStrategy<T: Task> {
    /// The other processes.
    pub collective: Arc<dyn Collective>,
    /// What makes one validation better than another.
    pub metric: &'static MetricSpec<T::Tally>,
    /// Bound on the global gradient norm; 0 for none.
    pub max_grad_norm: f64,
    /// Autodiff device to train on.
    pub device: Device,
    /// AdamW, with its moments when resuming; the loop takes them.
    pub optimizer: Mutex<Optimizer>,
    /// The schedule, standing at the first step to do.
    pub scheduler: ModuleLrScheduler,
    /// Where to start.
    pub start: RunState,
    /// When things happen.
    pub rhythm: Intervals,
    /// The rows of each step, to name them in errors.
    pub plan: Arc<StepPlan<T>>,
    /// Where checkpoints go.
    pub checkpoints: Checkpoints,
    /// The run directory, which has to stay the one that the run began in.
    pub(crate) hold: Arc<Hold>,
    /// How adapters are written.
    pub adapter: AdapterConfig,
    /// What is written beside them.
    pub meta: SaveMeta,
    /// AdaLoRA's budget, as it stands at the first step to do.
    pub allocator: Option<RankAllocator>,
    /// Set by signals.
    pub stop: StopFlag,
    /// Says lines when there is no dashboard.
    pub say: LogLine,
    /// `metrics.jsonl`.
    pub journal: Mutex<MetricsLog>,
    /// Filled in when the loop ends.
    pub end: Arc<Mutex<LoopEnd>>,
}

type Events<T> = SupervisedTrainingEventProcessor<TrainModel<T>>;

impl<T: Task> SupervisedLearningStrategy<TrainModel<T>> for StepStrategy<T> {
    fn fit(
        &self,
        components: TrainingComponents<TrainModel<T>>,
        learner: Learner<TrainModel<T>>,
        train: TrainLoader<TrainModel<T>>,
        valid: ValidLoader<TrainModel<T>>,
        _starting_epoch: usize,
    ) -> (TrainModel<T>, Events<T>) {
        // `train` puts the gradient flags, set on a plain device, into force.
        let model = learner.model().fork(&self.device).train();
        // It would keep the first values of every parameter until the end.
        drop(learner);
        let mut optimizer = self
            .optimizer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut run = Run {
            s: self,
            model,
            optimizer: optimizer.take(),
            scheduler: self.scheduler.clone(),
            allocator: self.allocator.clone(),
            state: self.start.clone(),
            end: LoopEnd::default(),
            events: components.event_processor,
            interrupter: components.interrupter,
            valid,
            memory: Memory::new(),
        };
        if let Err(error) = run.train(&train) {
            run.end.error = Some(error);
        }
        self.stop.enter(Phase::After);
        // One that came too late for the last step to see it still means to stop.
        run.end.signal = run.end.signal.or(self.stop.signal());
        if let Some(error) = run.interrupter.error() {
            run.end
                .error
                .get_or_insert(TrainError::Framework(error.to_string()));
        }
        run.note_memory();
        run.end.state = run.state;
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = run.end;
        (run.model, run.events)
    }
}

/// The loop's moving parts.
struct Run<'a, T: Task> {
    s: &'a StepStrategy<T>,
    model: TrainModel<T>,
    optimizer: Optimizer,
    scheduler: ModuleLrScheduler,
    allocator: Option<RankAllocator>,
    state: RunState,
    end: LoopEnd,
    events: Events<T>,
    interrupter: Interrupter,
    valid: ValidLoader<TrainModel<T>>,
    memory: Memory,
}

impl<T: Task> Run<'_, T> {
    fn train(&mut self, train: &TrainLoader<TrainModel<T>>) -> Result<(), TrainError> {
        let total = self.s.rhythm.total;
        self.end.stopped_early = self.gained_too_little();
        if self.state.step >= total || self.end.stopped_early {
            // It was killed before its result was handed over, perhaps even before the last save was through.
            self.s.checkpoints.prune(&self.state);
            return Ok(());
        }
        if self.state.step == 0 && self.validates() {
            let measured = self.validate_quietly()?;
            self.state.first_valid_loss = Some(measured.loss());
            self.state.first_metrics = others::<T>(&measured);
        }
        let loader = train.slice(self.state.step, total);
        let started = Instant::now();
        let first = self.state.step;
        let steps = loader.iter();
        self.start_window();
        self.s.stop.enter(Phase::Steps);
        for item in steps {
            let item = item.map_err(|e| TrainError::Framework(e.to_string()))?;
            let step_started = Instant::now();
            let out = TrainStep::step(&self.model, item);
            let mut measured = out.item;
            let grads = self.s.collective.sum(out.grads)?;
            self.sum_up(&mut measured)?;
            let clipping = Clipping::of(&self.model, &grads, self.s.max_grad_norm);
            (measured.grad_norm, measured.grad_factor) = (clipping.norm, clipping.factor);
            self.check_finite(&measured)?;
            let rate = self.scheduler.step();
            measured.learning_rate = rate.base();
            let factor = measured.grad_factor;
            if let Some(allocator) = &mut self.allocator {
                let gradient_of = |id| grads.get(id);
                allocator.note_gradients(&self.model.model, &gradient_of, factor)?;
            }
            self.optimizer.step(&mut self.model, grads, factor, &rate);
            self.allocate(total)?;
            self.state.step += 1;

            measured.total_steps = total;
            measured.seconds = step_started.elapsed().as_secs_f64();
            measured.memory = self.memory.resident();
            let done = (self.state.step - first) as f64;
            let left = (total - self.state.step) as f64;
            measured.eta_seconds = started.elapsed().as_secs_f64() / done * left;
            self.record(&measured)?;
            let place = Progress::new(self.state.step, total, Some("steps".to_string()));
            let item = TrainingItem::new(measured, place, Some(self.state.step), Some(rate));
            self.interrupter
                .fail_on_error(self.events.process_train(LearnerEvent::ProcessedItem(item)));

            if self.after_step()? {
                break;
            }
        }
        Ok(())
    }

    /// What a step measured on all processes.
    fn sum_up(&self, out: &mut StepOutput<T::Tally>) -> Result<(), TrainError> {
        let measured = &mut out.measured;
        let mut numbers = vec![measured.loss_sum, measured.count as f64, out.tokens as f64];
        numbers.extend(measured.tally.numbers().map(|n| *n as f64));
        self.s.collective.sum_numbers(&mut numbers)?;
        let mut sums = numbers.into_iter();
        let mut next = || sums.next().unwrap_or(f64::NAN);
        measured.loss_sum = next();
        measured.count = next() as usize;
        out.tokens = next() as usize;
        measured.tally.numbers().for_each(|n| *n = next() as u64);
        Ok(())
    }

    /// AdaLoRA's part of a step: which ranks the budget still pays for.
    fn allocate(&mut self, total: usize) -> Result<(), TrainError> {
        let Some(allocator) = &mut self.allocator else {
            return Ok(());
        };
        let step = self.state.step;
        let done = allocator.update(&mut self.model.model, step)?;
        if step + 1 == total {
            allocator.mask(&mut self.model.model);
        }
        let Some(kept) = done.kept else {
            return Ok(());
        };
        let ranks = kept
            .iter()
            .map(|(_, kept)| kept.iter().filter(|k| **k).count());
        self.write(&Entry::Budget {
            step: step + 1,
            budget: done.budget,
            ranks: ranks.collect(),
        })
    }

    /// Validation, saving and reasons to stop after a step; whether to stop.
    fn after_step(&mut self) -> Result<bool, TrainError> {
        // Into a directory that has gone, journal and checkpoints would go unseen.
        self.s.hold.check()?;
        let rhythm = &self.s.rhythm;
        let step = self.state.step;
        let last = step == rhythm.total;
        self.end.signal = self.s.stop.signal();
        self.end.stopped_by_user = self.interrupter.interruption().is_some();
        let stopping = self.end.signal.is_some() || self.interrupter.should_stop();
        let stopping = self.s.collective.any(stopping)?;

        let due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n));
        // A run that is being stopped still validates where it is due: resumed, it will not come by
        // this step again, and has to come to the same results as one that was never stopped.
        if self.validates() && (due(rhythm.eval) || last) {
            self.validate_on_dashboard()?;
        } else if last || stopping {
            self.close_window();
        }
        self.end.stopped_early = self.gained_too_little();
        let stop_early = self.end.stopped_early;
        let best = rhythm.save_best && self.state.best.as_ref().is_some_and(|b| b.step == step);
        if last || stopping || stop_early || best || due(rhythm.save) {
            self.save()?;
        }
        Ok(stopping || stop_early)
    }

    /// Whether early stopping ends the run before its last step.
    fn gained_too_little(&self) -> bool {
        let Intervals {
            patience, total, ..
        } = self.s.rhythm;
        patience > 0 && self.state.evals_without_gain >= patience && self.state.step < total
    }

    fn note_memory(&mut self) {
        self.state.peak_memory = self.state.peak_memory.max(self.memory.peak());
    }

    fn validates(&self) -> bool {
        self.valid.num_items() > 0
    }

    fn epoch(&self) -> f64 {
        self.state.step as f64 / self.s.rhythm.per_epoch.max(1) as f64
    }

    fn check_finite(&self, out: &StepOutput<T::Tally>) -> Result<(), TrainError> {
        let bad = [
            ("loss", out.measured.loss()),
            ("gradient norm", out.grad_norm),
        ];
        match bad.into_iter().find(|(_, v)| !v.is_finite()) {
            None => Ok(()),
            Some((what, value)) => Err(TrainError::NonFinite {
                what,
                value,
                step: out.step,
                rows: self.s.plan.sources(out.step),
                checkpoint: self.s.checkpoints.latest(),
            }),
        }
    }

    /// Notes a step in the journal and, every so often, says a line.
    fn record(&mut self, out: &StepOutput<T::Tally>) -> Result<(), TrainError> {
        let (loss, count) = (out.measured.loss(), out.measured.count);
        let logged = T::METRICS.iter().filter(|m| m.logged_in_training);
        let mut metrics = values(logged, &out.measured);
        metrics.insert(T::COUNTED.to_owned(), count.into());
        self.state.trained_tokens += count as u64;
        self.state.tokens += out.tokens as u64;
        self.state.seconds += out.seconds;
        let window = &mut self.state.window;
        window.loss += loss * count as f64;
        window.trained += count;
        window.tokens += out.tokens;
        window.seconds += out.seconds;
        self.write(&Entry::Train {
            step: out.step,
            epoch: self.epoch(),
            loss,
            learning_rate: out.learning_rate,
            grad_norm: out.grad_norm,
            tokens: out.tokens,
            metrics,
            tokens_per_second: out.tokens as f64 / out.seconds.max(1e-9),
            memory_bytes: out.memory,
        })?;
        if out.step.is_multiple_of(self.s.rhythm.log) || out.step == out.total_steps {
            let w = std::mem::take(&mut self.state.window);
            let loss = w.loss / w.trained.max(1) as f64;
            self.state.train_loss = Some(loss);
            (self.s.say)(&format!(
                "step {:>5}/{}  epoch {:.2}  loss {loss:.4}  lr {:.2e}  grad norm {:.3}  \
                 {:.0} tokens/s  {} MiB  {} left",
                out.step,
                out.total_steps,
                self.epoch(),
                out.learning_rate,
                out.grad_norm,
                w.tokens as f64 / w.seconds.max(1e-9),
                out.memory >> 20,
                duration_text(out.eta_seconds),
            ));
        }
        Ok(())
    }

    fn write(&self, entry: &Entry) -> Result<(), TrainError> {
        self.s
            .journal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(entry)
    }

    /// Number of the stretch between two validations, from 1.
    fn window_number(&self) -> usize {
        let step = self.state.step;
        1 + self.s.rhythm.eval.map_or(0, |n| step.saturating_sub(1) / n)
    }

    fn start_window(&mut self) {
        let event = LearnerEvent::StartSplit {
            epoch_number: 1 + self.s.rhythm.eval.map_or(0, |n| self.state.step / n),
            total_items: self.s.rhythm.total,
        };
        self.interrupter
            .fail_on_error(self.events.process_train(event));
    }

    fn close_window(&mut self) {
        let number = self.window_number();
        for event in [
            LearnerEvent::EndSplit(number),
            LearnerEvent::EndEpoch(number),
        ] {
            self.interrupter
                .fail_on_error(self.events.process_train(event));
        }
        self.interrupter.fail_on_error(self.events.flush());
    }

    /// Validates without the dashboard: before the first step there is no window yet.
    fn validate_quietly(&mut self) -> Result<Measured<T::Tally>, TrainError> {
        let started = Instant::now();
        let model = self.model.valid();
        let mut sum = Measured::default();
        for batch in self.valid.iter() {
            let batch = batch.map_err(|e| TrainError::Framework(e.to_string()))?;
            sum.add(&InferenceStep::step(&model, batch));
        }
        self.note_validation(&sum, started)?;
        Ok(sum)
    }

    fn validate_on_dashboard(&mut self) -> Result<(), TrainError> {
        let number = self.window_number();
        let started = Instant::now();
        let model = self.model.valid();
        let total = self.valid.num_items();
        self.interrupter
            .fail_on_error(self.events.process_train(LearnerEvent::EndSplit(number)));
        let start = LearnerEvent::StartSplit {
            epoch_number: number,
            total_items: total,
        };
        self.interrupter
            .fail_on_error(self.events.process_valid(start));
        let mut sum = Measured::default();
        let valid = self.valid.clone();
        for (index, batch) in valid.iter().enumerate() {
            let batch = batch.map_err(|e| TrainError::Framework(e.to_string()))?;
            let out = InferenceStep::step(&model, batch);
            sum.add(&out);
            let place = Progress::new(index + 1, total, Some("batches".to_string()));
            let item = TrainingItem::new(out, place, Some(index + 1), None);
            self.interrupter
                .fail_on_error(self.events.process_valid(LearnerEvent::ProcessedItem(item)));
        }
        self.interrupter
            .fail_on_error(self.events.process_valid(LearnerEvent::EndSplit(number)));
        self.interrupter
            .fail_on_error(self.events.process_train(LearnerEvent::EndEpoch(number)));
        self.interrupter.fail_on_error(self.events.flush());
        self.note_validation(&sum, started)?;
        self.judge(&sum);
        if self.state.step < self.s.rhythm.total {
            self.start_window();
        }
        Ok(())
    }

    fn note_validation(
        &mut self,
        measured: &Measured<T::Tally>,
        started: Instant,
    ) -> Result<(), TrainError> {
        let loss = measured.loss();
        let metrics = others::<T>(measured);
        self.state.valid_loss = Some(loss);
        self.state.metrics.clone_from(&metrics);
        let mut logged = metrics;
        logged.insert(T::COUNTED.to_owned(), measured.count.into());
        self.write(&Entry::Valid {
            step: self.state.step,
            epoch: self.epoch(),
            loss,
            metrics: logged,
            seconds: started.elapsed().as_secs_f64(),
        })?;
        let when = match self.state.step {
            0 => "before training".to_string(),
            step => format!("after step {step}"),
        };
        let words = T::METRICS.iter().map(|metric| {
            let value = metric.text((metric.of)(measured));
            format!("{} {value}", metric.key)
        });
        let words: Vec<_> = words.collect();
        (self.s.say)(&format!("validation {when}: {}", words.join("  ")));
        Ok(())
    }

    /// Remembers the best validation and counts those without gain.
    fn judge(&mut self, measured: &Measured<T::Tally>) {
        let metric = self.s.metric;
        let value = (metric.of)(measured);
        // Less is better from here on.
        let sign = if metric.higher_is_better { -1.0 } else { 1.0 };
        let best = self.state.best.as_ref().map(|best| best.value(metric.key));
        if value.is_finite() && best.is_none_or(|best| sign * value < sign * best) {
            self.state.best = Some(Best {
                step: self.state.step,
                loss: measured.loss(),
                metrics: others::<T>(measured),
            });
        }
        let gained = match self.state.patience_loss {
            None => value.is_finite(),
            Some(reference) => sign * value < sign * reference - self.s.rhythm.threshold,
        };
        if gained {
            self.state.patience_loss = Some(value);
            self.state.evals_without_gain = 0;
        } else {
            self.state.evals_without_gain += 1;
        }
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let journal = &self.s.journal;
        let journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.sync()?;
        drop(journal);
        self.note_memory();
        let model = self.model.valid();
        let _changing = self.s.hold.changing();
        self.s.hold.check()?;
        let path = self.s.checkpoints.save(
            &self.state,
            &self.optimizer,
            self.allocator.as_ref(),
            |dir| {
                let (config, meta) = (&self.s.adapter, &self.s.meta);
                let form = SaveForm::Resume;
                Ok(enamel_adapter::save_pretrained_as(
                    &model.model,
                    DEFAULT,
                    config,
                    meta,
                    dir,
                    form,
                )?)
            },
        )?;
        self.end.checkpoint = Some(path);
        self.s.hold.settle();
        Ok(())
    }
}

/// A task's metrics but the loss.
fn others<T: Task>(measured: &Measured<T::Tally>) -> Map<String, Value> {
    let others = T::METRICS.iter().filter(|metric| metric.key != "loss");
    values(others, measured)
}

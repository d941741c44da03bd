//! Which rows make up which optimizer step, as burn-train data loaders.

use std::sync::{Arc, Mutex};

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::DatasetError;
use burn::tensor::Device;
use enamel_data::{Row, epoch_order};

use crate::inputs::steps_per_epoch;
use crate::task::{Task, TaskBatch};
use crate::training::train_step::StepItem;

/// The rows of every step of a run: a pure function of settings, seed and step number.
#[derive(Debug)]
pub struct StepPlan<T: Task> {
    task: T,
    rows: Vec<T::Row>,
    settings: StepSettings,
    /// Epoch and its order of rows, made once an epoch.
    order: Mutex<Option<(usize, Arc<Vec<usize>>)>>,
}

/// What decides the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSettings {
    /// Rows a forward pass.
    pub batch_size: usize,
    /// Forward passes an optimizer step.
    pub accumulation: usize,
    /// Seed of the order and of dropout.
    pub seed: u64,
    /// A new order each epoch.
    pub shuffle: bool,
    /// Put rows of like length into one batch.
    pub group_by_length: bool,
    /// Share of each label that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
}

impl<T: Task> StepPlan<T> {
    /// Plans steps over `rows`.
    pub fn new(task: T, rows: Vec<T::Row>, settings: StepSettings) -> Self {
        Self {
            task,
            rows,
            settings,
            order: Mutex::new(None),
        }
    }

    /// Optimizer steps an epoch; the last may be smaller than the others.
    pub fn steps_per_epoch(&self) -> usize {
        let s = &self.settings;
        steps_per_epoch(self.rows.len(), s.batch_size, s.accumulation)
    }

    /// The rows themselves.
    pub fn rows(&self) -> &[T::Row] {
        &self.rows
    }

    fn order(&self, epoch: usize) -> Arc<Vec<usize>> {
        let mut cached = self
            .order
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*cached {
            Some((e, order)) if *e == epoch => order.clone(),
            _ => {
                let s = &self.settings;
                let mut order = epoch_order(self.rows.len(), s.seed, epoch, s.shuffle);
                if s.group_by_length {
                    let window = s.batch_size * s.accumulation * 16;
                    let lengths: Vec<usize> = self.rows.iter().map(T::Row::tokens).collect();
                    order = enamel_data::group_by_length(
                        &order,
                        &lengths,
                        s.batch_size,
                        window,
                        s.seed,
                        epoch,
                    );
                }
                let order = Arc::new(order);
                *cached = Some((epoch, order.clone()));
                order
            }
        }
    }

    /// The rows of optimizer step `index`, counted from 0.
    fn rows_of(&self, index: usize) -> Vec<&T::Row> {
        let s = &self.settings;
        let per_epoch = self.steps_per_epoch().max(1);
        let order = self.order(index / per_epoch);
        let width = s.batch_size * s.accumulation;
        let start = (index % per_epoch) * width;
        let rows = &order[start.min(order.len())..(start + width).min(order.len())];
        rows.iter().map(|row| &self.rows[*row]).collect()
    }

    /// The work of optimizer step `index`, counted from 0.
    pub fn item(&self, index: usize) -> StepItem<T::Batch> {
        let s = &self.settings;
        let rows = self.rows_of(index);
        let micro = rows.chunks(s.batch_size);
        StepItem {
            step: index + 1,
            seed: s.seed,
            micro: micro.map(|rows| self.task.collate(rows)).collect(),
            rank: 0,
            count: rows.iter().map(|row| row.trained()).sum(),
            label_smoothing: s.label_smoothing,
        }
    }

    /// `file:line` of the rows in optimizer step `step`, counted from 1, for messages.
    pub fn sources(&self, step: usize) -> Vec<String> {
        let rows = self.rows_of(step.saturating_sub(1));
        rows.iter().map(|row| row.source().to_string()).collect()
    }
}

/// Steps `start .. end` of a plan, one item a step.
#[derive(Clone, Debug)]
pub struct StepLoader<T: Task> {
    plan: Arc<StepPlan<T>>,
    start: usize,
    end: usize,
}

impl<T: Task> StepLoader<T> {
    /// All steps of a run.
    pub fn new(plan: Arc<StepPlan<T>>, total: usize) -> Self {
        Self {
            plan,
            start: 0,
            end: total,
        }
    }
}

impl<T: Task> DataLoader<StepItem<T::Batch>> for StepLoader<T> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<StepItem<T::Batch>> + 'a> {
        Box::new(Counted {
            next: self.start,
            start: self.start,
            end: self.end,
            make: Box::new(|i| self.plan.item(i)),
            unit: "steps",
        })
    }

    fn num_items(&self) -> usize {
        self.end - self.start
    }

    fn to_device(&self, _: &Device) -> Arc<dyn DataLoader<StepItem<T::Batch>>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<StepItem<T::Batch>>> {
        let end = (self.start + end).min(self.end);
        Arc::new(Self {
            plan: self.plan.clone(),
            start: (self.start + start).min(end),
            end,
        })
    }
}

/// Validation batches, always in the same order.
#[derive(Clone, Debug)]
pub struct EvalLoader<B> {
    batches: Arc<Vec<B>>,
}

impl<B: TaskBatch> EvalLoader<B> {
    /// Batches of `batch_size` rows in file order.
    pub fn new<T: Task<Batch = B>>(task: &T, rows: &[T::Row], batch_size: usize) -> Self {
        let batches = rows
            .chunks(batch_size.max(1))
            .map(|rows| task.collate(&rows.iter().collect::<Vec<_>>()));
        Self {
            batches: Arc::new(batches.collect()),
        }
    }

    /// The batches.
    pub fn batches(&self) -> &[B] {
        &self.batches
    }
}

impl<B: TaskBatch> DataLoader<B> for EvalLoader<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<B> + 'a> {
        Box::new(Counted {
            next: 0,
            start: 0,
            end: self.batches.len(),
            make: Box::new(|i| self.batches[i].clone()),
            unit: "batches",
        })
    }

    fn num_items(&self) -> usize {
        self.batches.len()
    }

    fn to_device(&self, _: &Device) -> Arc<dyn DataLoader<B>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B>> {
        let end = end.min(self.batches.len());
        Arc::new(Self {
            batches: Arc::new(self.batches[start.min(end)..end].to_vec()),
        })
    }
}

/// Items made by number.
struct Counted<'a, T> {
    next: usize,
    start: usize,
    end: usize,
    make: Box<dyn Fn(usize) -> T + 'a>,
    unit: &'static str,
}

impl<T> Iterator for Counted<'_, T> {
    type Item = Result<T, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.next < self.end).then(|| {
            self.next += 1;
            Ok((self.make)(self.next - 1))
        })
    }
}

impl<T> DataLoaderIterator<T> for Counted<'_, T> {
    fn progress(&self) -> Progress {
        let (done, total) = (self.next - self.start, self.end - self.start);
        Progress::new(done, total, Some(self.unit.to_string()))
    }
}

//! What training and validation measure: the loss, and what a task counts besides.

use std::fmt::Debug;

use burn::backend::ExecutionError;
use burn::train::ItemLazy;
use serde::Serialize;
use serde_json::{Map, Value};

/// What a task counts besides the loss.
pub trait Tally: Clone + Debug + Default + PartialEq + Send + Sync + 'static {
    /// Adds what was counted elsewhere.
    fn add(&mut self, other: &Self);

    /// All counts, for processes that tell each other theirs.
    fn numbers(&mut self) -> impl Iterator<Item = &mut u64>;
}

/// Nothing.
impl Tally for () {
    fn add(&mut self, (): &Self) {}

    fn numbers(&mut self) -> impl Iterator<Item = &mut u64> {
        std::iter::empty()
    }
}

/// What was measured over some rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured<Y> {
    /// Sum of the losses of all labels, in nats.
    pub loss_sum: f64,
    /// Labels that the loss counts.
    pub count: usize,
    /// What the task counts besides.
    pub tally: Y,
}

impl<Y: Tally> Measured<Y> {
    /// Adds what was measured over other rows.
    pub fn add(&mut self, other: &Self) {
        self.loss_sum += other.loss_sum;
        self.count += other.count;
        self.tally.add(&other.tally);
    }
}

impl<Y> Measured<Y> {
    /// Mean loss of a label.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.count.max(1) as f64
    }
}

impl<Y: Tally> ItemLazy for Measured<Y> {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// How good a classifier is on one of its classes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScores {
    /// The class.
    pub label: String,
    /// Rows that have it.
    pub rows: u64,
    /// Share of the rows taken for it that have it.
    pub precision: f64,
    /// Share of the rows that have it that are taken for it.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
    /// What rows that have it are taken for: a number for each class.
    pub predicted: Vec<u64>,
}

/// A number that tells how good a model is.
pub struct MetricSpec<Y: 'static> {
    /// Its name in `metrics.jsonl`, in `summary.json` and for `metric_for_best_model`.
    pub key: &'static str,
    /// Its name on the dashboard; training and validation share a plot by it.
    pub label: &'static str,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// Whether the dashboard shows it for training steps too.
    pub in_training: bool,
    /// Whether `metrics.jsonl` has it for training steps too.
    pub logged_in_training: bool,
    /// Decimals to show.
    pub decimals: usize,
    /// The number.
    pub of: fn(&Measured<Y>) -> f64,
}

impl<Y> MetricSpec<Y> {
    /// The mean loss, which every task has.
    pub const LOSS: Self = Self {
        key: "loss",
        label: "Loss",
        higher_is_better: false,
        in_training: true,
        logged_in_training: false,
        decimals: 4,
        of: Measured::loss,
    };

    /// A value as the dashboard writes it.
    pub fn text(&self, value: f64) -> String {
        format!("{value:.*}", self.decimals)
    }
}

/// The values of metrics, by their keys.
pub fn values<'a, Y: 'static>(
    metrics: impl Iterator<Item = &'a MetricSpec<Y>>,
    measured: &Measured<Y>,
) -> Map<String, Value> {
    metrics
        .map(|metric| (metric.key.to_owned(), Value::from((metric.of)(measured))))
        .collect()
}

//! What a model is trained for: the rows, the loss, the metrics and the head of a task.
//!
//! A task is one file here, a name in the recipe ([`TaskName`]) and an arm in the list below.

pub mod causal_lm;
pub mod measured;
pub mod sequence_classification;

use std::fmt::Debug;

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::AdapterConfig;
use enamel_data::{Row, Rows, split_rows};
use enamel_model::{HeadConfig, Model};

use crate::base::OpenBase;
use crate::error::TrainError;
use crate::recipe::{Recipe, TaskName, TrainSettings};
pub use causal_lm::CausalLm;
pub use measured::{ClassScores, Measured, MetricSpec, Tally};
pub use sequence_classification::SequenceClassification;

/// A task.
pub trait Task: Clone + Debug + Send + Sync + 'static {
    /// A row that is ready to train on.
    type Row: Row;
    /// Several rows as a model takes them.
    type Batch: TaskBatch;
    /// What is counted besides the loss.
    type Tally: Tally;

    /// Its name in the recipe.
    const NAME: TaskName;
    /// Its name in PEFT's `task_type`.
    const TASK_TYPE: &'static str;
    /// What the loss counts, as `metrics.jsonl` names it.
    const COUNTED: &'static str;
    /// Its metrics, the loss first.
    const METRICS: &'static [MetricSpec<Self::Tally>];

    /// The head that a model needs, as far as it is known before the rows are read: its names are right, its
    /// size need not be.
    fn provisional_head() -> HeadConfig;

    /// Reads the rows of a recipe.
    ///
    /// # Errors
    /// All bad rows at once.
    fn open(recipe: &Recipe, base: &OpenBase, source: Source) -> Result<Opened<Self>, TrainError>;

    /// The head that a model needs.
    fn head(&self) -> HeadConfig {
        Self::provisional_head()
    }

    /// What the outputs of its head are called, where each has a name.
    fn labels(&self) -> &[String] {
        &[]
    }

    /// Pads rows to one batch. Deterministic: the same rows give the same batch.
    fn collate(&self, rows: &[&Self::Row]) -> Self::Batch;

    /// The sum of the losses of a batch's labels `[1]`, in nats, and what is counted besides.
    fn loss(
        &self,
        model: &Model,
        batch: &Self::Batch,
        settings: LossSettings,
    ) -> (Tensor<1>, Self::Tally);

    /// How good a classifier is on each of its classes.
    fn class_scores(&self, _: &Self::Tally) -> Vec<ClassScores> {
        Vec::new()
    }

    /// What to ask the model before and after training, so that a person sees what changed.
    ///
    /// # Errors
    /// When a question cannot be made ready.
    fn prompts(
        &self,
        settings: &TrainSettings,
        rows: &[Self::Row],
        base: &OpenBase,
    ) -> Result<Vec<Prompt>, TrainError>;

    /// What the model says to these.
    ///
    /// # Errors
    /// When its output is not a number or the device fails.
    fn answers(
        &self,
        model: &Model,
        base: &OpenBase,
        prompts: &[Prompt],
        max_new_tokens: usize,
    ) -> Result<Vec<String>, TrainError>;
}

/// Which rows of a recipe are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Those to train on and those to validate on.
    Both,
    /// Those to validate on alone.
    Validation,
}

/// A task with its rows.
#[derive(Clone, Debug)]
pub struct Opened<T: Task> {
    /// The task, as the rows and the base have it.
    pub task: T,
    /// Rows to train on.
    pub train: Rows<T::Row>,
    /// Rows to validate on.
    pub valid: Rows<T::Row>,
    /// What is worth saying of the task.
    pub notes: Vec<String>,
}

/// A batch of a task.
pub trait TaskBatch: Clone + Debug + Send + Sync + 'static {
    /// Labels that the loss counts.
    fn count(&self) -> usize;
    /// Tokens that are not padding.
    fn tokens(&self) -> usize;
}

/// What a loss depends on besides model and batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSettings {
    /// Share of each label that is spread evenly over all of them.
    pub label_smoothing: f64,
    /// In training, decides what the blocks draw; see [`enamel_model::ModelInput::seed`].
    pub seed: Option<u64>,
}

/// A question for the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// What a person reads.
    pub text: String,
    /// What the model reads.
    pub ids: Vec<u32>,
    /// The answer in the data, if the question comes from there.
    pub reference: Option<String>,
}

/// Takes the validation share out of the training rows.
pub(crate) fn hold_back<R: Row>(mut train: Rows<R>, recipe: &Recipe) -> (Rows<R>, Rows<R>) {
    let mut valid = Rows::default();
    let fraction = recipe.data.valid_fraction;
    if fraction > 0.0 {
        let (keep, held) = split_rows(train.rows.len(), fraction, recipe.seed);
        let take = |places: Vec<usize>| places.into_iter().map(|i| train.rows[i].clone()).collect();
        valid.rows = take(held);
        train.rows = take(keep);
    }
    (train, valid)
}

/// The sum over rows of the negative log-likelihood of each row's label `[1]`, with `smoothing` as the share of it
/// that is spread evenly over all of them.
///
/// # Shapes
/// - logits: `[rows, labels]`; labels: one a row
pub(crate) fn cross_entropy(logits: Tensor<2>, labels: Vec<i64>, smoothing: f64) -> Tensor<1> {
    let device = logits.device();
    let log_probs = burn::tensor::activation::log_softmax(logits, 1);
    let count = log_probs.dims()[1] as f64;
    let sharp = -log_probs
        .clone()
        .gather(1, indices(labels, &device).unsqueeze_dim(1))
        .sum();
    if smoothing == 0.0 {
        return sharp;
    }
    let even = -log_probs.sum().div_scalar(count);
    sharp.mul_scalar(1.0 - smoothing) + even.mul_scalar(smoothing)
}

/// Whole numbers as a tensor.
pub(crate) fn indices(values: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// Token ids as a tensor `[rows, len]`.
pub(crate) fn ids(values: Vec<i64>, shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// `count` of `rows`, evenly spaced.
pub(crate) fn spread<R>(rows: &[R], count: usize) -> impl Iterator<Item = &R> {
    let count = count.min(rows.len());
    (0..count).filter_map(move |i| rows.get(i * rows.len() / count))
}

/// Does the same for whichever task a recipe names: `for_task!(recipe.task, T => f::<T>(..))`. The list of tasks.
macro_rules! for_task {
    ($name:expr, $task:ident => $body:expr) => {
        match $name {
            $crate::recipe::TaskName::CausalLm => {
                type $task = $crate::task::CausalLm;
                $body
            }
            $crate::recipe::TaskName::SeqCls => {
                type $task = $crate::task::SequenceClassification;
                $body
            }
        }
    };
}
pub(crate) use for_task;

/// The task that an adapter was trained for, if its configuration names one of the list.
pub fn of_adapter(config: &AdapterConfig) -> Option<TaskName> {
    let wanted = config.task_type()?;
    let all = TaskName::ALL.iter().copied();
    all.into_iter().find(|task| task_type(*task) == wanted)
}

/// The head that a model for a task needs, as far as it is known before rows are read.
pub(crate) fn provisional_head(task: TaskName) -> HeadConfig {
    for_task!(task, T => T::provisional_head())
}

/// A task's name in PEFT's `task_type`.
pub(crate) fn task_type(task: TaskName) -> &'static str {
    for_task!(task, T => T::TASK_TYPE)
}

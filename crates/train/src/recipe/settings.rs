//! Every setting of a recipe, declared once: name, type, default, what it does, what it accepts.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use burn::tensor::Device;
use enamel_data::check_arguments;
use enamel_data::{OnBadRow, RecordFormat, TrainOn, Truncation};
use enamel_kernels::Compute;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::recipe::optim::Optim;
use crate::recipe::task::TaskName;

use super::quantization::QuantizationSettings;
use super::section::{
    Verdict, any, at_least_two, at_most, below_one, given, not_empty, not_negative, positive,
    positive_number, section, verdict,
};

section! {
    /// Settings above the first table.
    pub struct General in "" {
        /// Seeds the adapter's first values, dropout, the order of rows and the choice of a
        /// validation part.
        seed: u64 = 42, at_most(i64::MAX as u64);
        /// What the model is for: `causal_lm` (each token predicts the next) or `seq_cls` (a text's class: the
        /// model gets a head of its own, which is trained and saved with the adapter).
        task: TaskName = TaskName::CausalLm, any;
        /// Where to compute: `auto`, `flex`, `ndarray`, `cuda`, `cuda:N` or `wgpu`.
        device: String = "auto".to_owned(), not_empty;
    }
}

section! {
    /// `[model]`: the frozen base.
    pub struct ModelSettings in "model" {
        /// The base model: a directory in Hugging Face layout or a `.gguf` file (a path starts with
        /// `.` or `/`, or holds a `/`, or ends in `.gguf`), `hf:org/name[@revision]`, or a name from
        /// the catalogue.
        base: String = "smollm2-135m-instruct".to_owned(), not_empty;
        /// A chat template to use instead of the model's own: a path, or the Jinja text itself.
        chat_template: Option<String> = None, given(not_empty);
        /// How the frozen base is held and multiplied. `bf16` rounds it to bf16, as torch's
        /// `dtype=bfloat16` does, and multiplies bf16 with sums in f32 where the processor has bf16
        /// instructions (in f32 elsewhere); `f32` rounds nothing. Norms, softmax, adapter, gradients,
        /// optimizer and loss are f32 in both.
        compute_dtype: ComputeDtype = ComputeDtype::F32, any;
        /// A table of its own, below: the base in 4 or 8 bits.
        quantization: QuantizationSettings = QuantizationSettings::default(), any;
    }
}

section! {
    /// `[data]`: what it is trained on.
    pub struct DataSettings in "data" {
        /// JSONL files: a file, a directory of them, or a list.
        train: Paths = Paths(Vec::new()), any;
        /// Rows to validate on, in the same way.
        valid: Paths = Paths(Vec::new()), any;
        /// Without `valid`: this share of the training rows is held back, chosen by `seed`.
        valid_fraction: f64 = 0.0, below_one;
        /// What a row looks like: `messages`, `prompt_completion`, `text`, `tokens` (`input_ids`, and
        /// `labels` or masks), `sharegpt`, `alpaca`, `dolly`, or `auto`, which finds out from each file.
        format: RecordFormat = RecordFormat::Auto, any;
        /// A classifier's text: the name of its column, or of two for a pair. Left out: `text` (with `text_pair`
        /// if there is one), `sentence`, `sentence1` and `sentence2`, `premise` and `hypothesis`, `question1`
        /// and `question2`, `question` and `sentence`, or `question` and `passage`; or `input_ids`.
        text_columns: Vec<String> = Vec::new(), one_or_two;
        /// The column of a classifier's classes, by name or by number from 0.
        label_column: String = "label".to_owned(), not_empty;
        /// The names of the classes in the order of their numbers. Left out: those that the rows name, in
        /// alphabetical order; `LABEL_0` and so on where they are numbers.
        labels: Vec<String> = Vec::new(), distinct;
        /// Tokens a row may have.
        max_length: usize = 1024, at_least_two;
        /// What to do with a longer row: `keep_start`, `keep_end`, `drop` (counted), or `error`, which
        /// makes it a bad row. A row left without a trained token is always a bad one.
        truncation: Truncation = Truncation::KeepStart, any;
        /// What to do with rows that cannot be used: list them and stop (`error`), or leave them out
        /// and count them (`skip`).
        on_bad_row: OnBadRow = OnBadRow::Error, any;
        /// Which tokens of a conversation count in the loss: every `assistant` turn, the
        /// `last_assistant` turn, or `all`.
        train_on: TrainOn = TrainOn::Assistant, any;
        /// Variables for the chat template, as `{ enable_thinking = false }`; a row's own column of this name comes
        /// before it.
        chat_template_kwargs: TemplateArguments = TemplateArguments::default(), settable;
        /// Columns to read rows without. What none reads is said once a file, and what other trainers act on (weights,
        /// labels, images, ..) is an error unless it stands here.
        ignore_columns: Vec<String> = Vec::new(), any;
        /// Draw rows in a new order each epoch, decided by `seed`.
        shuffle: bool = true, any;
        /// Put rows of like length into one batch: less padding, a less random order.
        group_by_length: bool = false, any;
    }
}

section! {
    /// `[train]`: for how long and how.
    pub struct TrainSettings in "train" {
        /// Passes over the training rows (3 unless `max_steps` is given); fractions are allowed.
        epochs: Option<f64> = None, given(positive_number);
        /// Stop after this many optimizer steps instead.
        max_steps: Option<usize> = None, given(positive);
        /// Rows a forward pass.
        batch_size: usize = 8, positive;
        /// Forward passes an optimizer step; gradients are averaged over all their trained tokens.
        gradient_accumulation_steps: usize = 1, positive;
        /// Save memory: keep only the input of each block (`true`) or of N blocks at a time (`"every:N"`) and
        /// compute the blocks once more in the backward pass, for about a third more time. The result is
        /// the same, bit for bit.
        gradient_checkpointing: GradientCheckpointing = GradientCheckpointing::default(), any;
        /// What to do when the run is estimated to need more memory than there is (see `enamel plan`): stop
        /// before it starts (`error`, unless the estimate's own error may be the reason), or say so and
        /// start (`warn`).
        check_memory: CheckMemory = CheckMemory::default(), any;
        /// Highest learning rate.
        learning_rate: f64 = 2e-4, positive_number;
        /// LoRA+: how many times the rate B (and what has one axis) learns at. Left out: as all else.
        loraplus_lr_ratio: Option<f64> = None, given(positive_number);
        /// LoRA+: the rate of an embedding's factors.
        loraplus_lr_embedding: f64 = 1e-6, positive_number;
        /// How the rate falls after warm-up: `linear`, `cosine`, `constant` or
        /// `constant_with_warmup`.
        lr_scheduler_type: Schedule = Schedule::Linear, any;
        /// Steps over which the rate rises from 0.
        warmup_steps: usize = 0, any;
        /// The same as a share of all steps.
        warmup_ratio: f64 = 0.0, below_one;
        /// How AdamW holds its two moments: `adamw_torch` in f32; `adamw_8bit` in 8 bits, as bitsandbytes does
        /// (f32 for tensors of fewer than 4096 elements); `paged_adamw_32bit` and `paged_adamw_8bit` the same in a
        /// file of the run directory, from which the moments of tensors of 100000 elements and more are brought
        /// into memory by the page while a step needs them. Paging changes no bit of the result.
        optim: Optim = Optim::default(), any;
        /// Decoupled weight decay of AdamW.
        weight_decay: f64 = 0.0, not_negative;
        /// AdamW's decay of the first moment.
        adam_beta1: f64 = 0.9, below_one;
        /// AdamW's decay of the second moment.
        adam_beta2: f64 = 0.999, below_one;
        /// AdamW's guard against division by zero.
        adam_epsilon: f64 = 1e-8, positive_number;
        /// Scale gradients down to this global norm; 0 leaves them alone.
        max_grad_norm: f64 = 1.0, not_negative;
        /// Share of each label that is spread evenly over the vocabulary while training; the validation
        /// loss stays that of the labels as they are.
        label_smoothing_factor: f64 = 0.0, below_one;
        /// When to validate: `no`, `steps` or `epoch`. Left out: `steps` if `eval_steps` is given,
        /// else `epoch` if there is validation data, else `no`.
        eval_strategy: Option<Strategy> = None, any;
        /// Steps between validations (`logging_steps` if left out).
        eval_steps: Option<usize> = None, given(positive);
        /// When to save a checkpoint: `no`, `steps` or `epoch`. Left out: as `eval_strategy`, and
        /// `epoch` where that is `no`.
        save_strategy: Option<Strategy> = None, any;
        /// Steps between checkpoints (`eval_steps` if left out).
        save_steps: Option<usize> = None, given(positive);
        /// Steps between two log lines.
        logging_steps: usize = 10, positive;
        /// Checkpoints to keep; the best one is kept besides when `load_best_model_at_end` is set.
        save_total_limit: usize = 3, positive;
        /// Keep the adapter that did best in validation, not the last one.
        load_best_model_at_end: bool = false, any;
        /// What makes one better than another, here and for early stopping: `loss` or `perplexity`; for a
        /// classifier `loss`, `accuracy` or `f1` (the mean over the classes).
        metric_for_best_model: String = "loss".to_owned(), not_empty;
        /// Stop after this many validations without a better value; 0 never stops early.
        early_stopping_patience: usize = 0, any;
        /// How much better it must be to count.
        early_stopping_threshold: f64 = 0.0, not_negative;
        /// Questions to answer before and after training, taken from the validation rows.
        samples: usize = 3, any;
        /// Questions to answer instead of those.
        sample_prompts: Vec<String> = Vec::new(), any;
        /// Length of such an answer, in tokens.
        max_new_tokens: usize = 64, positive;
    }
}

section! {
    /// `[output]`: where the run goes.
    pub struct OutputSettings in "output" {
        /// The run directory, relative to the current directory. Left out: `runs/` and the names of
        /// the recipe's folder and file (`datasets/handbook/lora.toml` gives `runs/handbook-lora`).
        dir: Option<PathBuf> = None, any;
        /// Replace a run that is already there; it goes when the new one has its first checkpoint.
        overwrite: bool = false, any;
    }
}

/// One path or several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Paths(pub Vec<PathBuf>);

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a path or a list of paths")]
        enum OneOrMany {
            One(PathBuf),
            Many(Vec<PathBuf>),
        }
        Ok(Self(match OneOrMany::deserialize(deserializer)? {
            OneOrMany::One(path) => vec![path],
            OneOrMany::Many(paths) => paths,
        }))
    }
}

/// Variables for the chat template.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TemplateArguments(pub Map<String, Value>);

impl fmt::Display for TemplateArguments {
    /// As JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Value::Object(self.0.clone()).fmt(f)
    }
}

fn one_or_two<S: AsRef<[String]>>(columns: &S) -> Verdict {
    let columns = columns.as_ref();
    verdict(
        columns.len() <= 2 && columns.iter().all(|name| !name.is_empty()),
        "must name one column, or two",
    )
}

fn distinct<S: AsRef<[String]>>(names: &S) -> Verdict {
    let names = names.as_ref();
    let all: std::collections::BTreeSet<&String> = names.iter().collect();
    match names.len() {
        1 => Err("must name at least two classes".to_owned()),
        count => verdict(all.len() == count, "must name each class once"),
    }
}

/// Whether rendering leaves these variables to a recipe, and JSON has their types.
fn settable(arguments: &TemplateArguments) -> Verdict {
    fn is_date(value: &Value) -> bool {
        match value {
            Value::Object(map) => {
                map.keys().any(|key| key.starts_with("$__toml")) || map.values().any(is_date)
            }
            Value::Array(items) => items.iter().any(is_date),
            _ => false,
        }
    }
    check_arguments(&arguments.0)?;
    match arguments.0.values().any(is_date) {
        true => Err("a date is no JSON; write it as a string".to_owned()),
        false => Ok(()),
    }
}

/// How many blocks at a time are computed again in the backward pass; `None` for not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GradientCheckpointing(pub Option<NonZeroUsize>);

impl GradientCheckpointing {
    /// Whether the device, called `name`, can compute blocks again.
    ///
    /// # Errors
    /// If it is asked for and the device cannot.
    pub fn check(self, device: &Device, name: &impl fmt::Display) -> Result<(), TrainError> {
        if self.0.is_none() || enamel_kernels::can_checkpoint(device) {
            return Ok(());
        }
        Err(TrainError::Mismatch(format!(
            "train.gradient_checkpointing does not work on device \"{name}\"\n  \
             help: remove it and lower train.batch_size instead, or choose device = \"flex\""
        )))
    }
}

impl fmt::Display for GradientCheckpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.map(NonZeroUsize::get) {
            None => f.write_str("all activations"),
            Some(1) => f.write_str("the activations of one block at a time"),
            Some(n) => write!(f, "the activations of {n} blocks at a time"),
        }
    }
}

impl std::str::FromStr for GradientCheckpointing {
    type Err = String;

    /// `every:N`, or `true` or `false`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "expected true, false or \"every:N\" with a number of blocks of at least 1, not \"{text}\""
            )
        };
        match text {
            "true" => Ok(Self(Some(NonZeroUsize::MIN))),
            "false" => Ok(Self(None)),
            text => {
                let number = text.strip_prefix("every:").ok_or_else(wrong)?;
                // "+2" would parse.
                let digits = number.bytes().all(|c| c.is_ascii_digit());
                let every = number.parse().ok().filter(|_| digits).ok_or_else(wrong)?;
                Ok(Self(Some(every)))
            }
        }
    }
}

impl Serialize for GradientCheckpointing {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.map(NonZeroUsize::get) {
            None => serializer.serialize_bool(false),
            Some(1) => serializer.serialize_bool(true),
            Some(n) => serializer.serialize_str(&format!("every:{n}")),
        }
    }
}

impl<'de> Deserialize<'de> for GradientCheckpointing {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected true, false or \"every:N\" with a number of blocks of at least 1"
        )]
        enum FlagOrEvery {
            Flag(bool),
            Every(String),
        }
        match FlagOrEvery::deserialize(deserializer)? {
            FlagOrEvery::Flag(on) => Ok(Self(on.then_some(NonZeroUsize::MIN))),
            FlagOrEvery::Every(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// What the base is rounded to and products multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// f32.
    #[default]
    F32,
    /// bf16, with sums in f32.
    Bf16,
}

impl From<ComputeDtype> for Compute {
    fn from(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::F32 => Self::F32,
            ComputeDtype::Bf16 => Self::Bf16,
        }
    }
}

/// How the learning rate falls, as in transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// To 0, in a straight line.
    Linear,
    /// To 0, along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
    /// Not at all, after warm-up.
    ConstantWithWarmup,
}

/// What sets the rhythm of validating or saving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Never.
    No,
    /// Every so many optimizer steps.
    Steps,
    /// At the end of each epoch.
    Epoch,
}

/// What happens where a run is estimated to need more memory than there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckMemory {
    /// It does not start if even an estimate that is too high by its error would not fit.
    #[default]
    Error,
    /// It says so and starts.
    Warn,
}

//! Every setting of a recipe, declared once: name, type, default, what it does, what it accepts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use enamel_data::{OnBadRow, RecordFormat, TrainOn, Truncation};
use serde::{Deserialize, Serialize};

use super::read::SectionReader;

/// A setting as the reference in `docs/recipe.md` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name within its section.
    pub name: &'static str,
    /// What it does.
    pub doc: String,
    /// The default as TOML; empty where leaving it out means something of its own.
    pub default: String,
}

/// A table of a recipe.
pub(super) trait Section: Sized {
    /// The table's name; empty for the settings above the first table.
    const NAME: &'static str;
    /// Its settings, in the order in which they are documented.
    fn settings() -> Vec<Setting>;
    /// Takes its settings from what was written, defaults for the rest.
    fn read(reader: &mut SectionReader<'_, '_>) -> Self;
}

macro_rules! section {
    (
        $(#[$meta:meta])*
        pub struct $name:ident in $table:literal {
            $( $(#[doc = $doc:literal])+ $field:ident : $ty:ty = $default:expr, $check:expr; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $( $(#[doc = $doc])+ pub $field: $ty, )* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* }
            }
        }

        impl Section for $name {
            const NAME: &'static str = $table;

            fn settings() -> Vec<Setting> {
                let default = Self::default();
                vec![ $( Setting {
                    name: stringify!($field),
                    doc: [$($doc),+].map(str::trim).join(" "),
                    default: default_text(&default.$field),
                }, )* ]
            }

            fn read(reader: &mut SectionReader<'_, '_>) -> Self {
                let mut section = Self::default();
                $( if let Some(value) = reader.take(stringify!($field), $check) {
                    section.$field = value;
                } )*
                section
            }
        }
    };
}

/// A value as it would be written after `name = `, empty for an absent one.
fn default_text<T: Serialize>(value: &T) -> String {
    toml::Value::try_from(value)
        .map(|v| v.to_string())
        .unwrap_or_default()
}

section! {
    /// Settings above the first table.
    pub struct General in "" {
        /// Seeds the adapter's first values, dropout, the order of rows and the choice of a
        /// validation part.
        seed: u64 = 42, at_most(i64::MAX as u64);
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
    }
}

section! {
    /// `[adapter]`: what is trained. Names and meanings are PEFT's.
    pub struct AdapterSettings in "adapter" {
        /// The method; `lora`.
        method: String = "lora".to_owned(), supported_method;
        /// Rank of the update.
        r: usize = 8, positive;
        /// The update is scaled by `lora_alpha / r`.
        lora_alpha: f64 = 8.0, positive_number;
        /// Probability with which an input of the adapter is dropped while training.
        lora_dropout: f64 = 0.0, below_one;
        /// Which linear layers to adapt: `"all-linear"`, a regular expression that must match the
        /// whole module name, or a list of name endings.
        target_modules: Modules =
            Modules::List(vec!["q_proj".to_owned(), "v_proj".to_owned()]), modules;
        /// Modules to leave out, in the same notation.
        exclude_modules: Option<Modules> = None, given(modules);
        /// Modules to train whole and save with the adapter (`lm_head`, `embed_tokens`).
        modules_to_save: Vec<String> = Vec::new(), any;
        /// Adapt only these layers, counted from 0; empty for all.
        layers_to_transform: Vec<usize> = Vec::new(), any;
        /// Name of the list of layers, when `layers_to_transform` is used on an unusual model.
        layers_pattern: Option<String> = None, given(not_empty);
        /// Ranks of single modules: name ending or regular expression to rank. Where two match, the
        /// first in alphabetical order counts.
        rank_pattern: BTreeMap<String, usize> = BTreeMap::new(), all_positive;
        /// The same for `lora_alpha`.
        alpha_pattern: BTreeMap<String, f64> = BTreeMap::new(), any;
        /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
        use_rslora: bool = false, any;
        /// First values: `true` for Kaiming-uniform A and zero B, `"gaussian"` for normal A and
        /// zero B, `false` for a B that is not zero.
        init_lora_weights: InitWeights = InitWeights::Default(true), any;
        /// Start from the adapter in this directory instead of from new values; its own `r`,
        /// `lora_alpha` and targets then hold.
        init_from: Option<PathBuf> = None, any;
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
        /// What a row looks like: `messages`, `prompt_completion`, `text`, `tokens` (`input_ids` and
        /// perhaps `labels`), or `auto`, which finds out from each file.
        format: RecordFormat = RecordFormat::Auto, any;
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
        /// Highest learning rate.
        learning_rate: f64 = 2e-4, positive_number;
        /// How the rate falls after warm-up: `linear`, `cosine`, `constant` or
        /// `constant_with_warmup`.
        lr_scheduler_type: Schedule = Schedule::Linear, any;
        /// Steps over which the rate rises from 0.
        warmup_steps: usize = 0, any;
        /// The same as a share of all steps.
        warmup_ratio: f64 = 0.0, below_one;
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
        /// Keep the adapter with the lowest validation loss, not the last one.
        load_best_model_at_end: bool = false, any;
        /// Stop after this many validations without a lower loss; 0 never stops early.
        early_stopping_patience: usize = 0, any;
        /// How much lower the loss must be to count.
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
        /// Replace a run that is already there.
        overwrite: bool = false, any;
    }
}

/// `"all-linear"`, a regular expression, or a list of name endings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"all-linear\", a regular expression or a list of names"
)]
pub enum Modules {
    /// `"all-linear"` or a regular expression that must match a whole module name.
    Pattern(String),
    /// Names or ends of names.
    List(Vec<String>),
}

/// `init_lora_weights` as PEFT writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"gaussian\"")]
pub enum InitWeights {
    /// `true`: Kaiming-uniform A, zero B. `false`: a B that is not zero.
    Default(bool),
    /// A named scheme.
    Named(NamedInit),
}

/// Named first values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamedInit {
    /// Normal A with deviation `1 / r`, zero B.
    Gaussian,
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

const LATER_METHODS: [&str; 14] = [
    "adalora", "adapter", "dora", "full", "ia3", "loha", "lokr", "lora_fa", "oft", "p_tuning",
    "prefix", "prompt", "qlora", "vera",
];

type Verdict = Result<(), String>;

fn any<T>(_: &T) -> Verdict {
    Ok(())
}

fn given<T>(check: impl Fn(&T) -> Verdict) -> impl Fn(&Option<T>) -> Verdict {
    move |value| value.as_ref().map_or(Ok(()), &check)
}

fn verdict(ok: bool, must: &str) -> Verdict {
    if ok { Ok(()) } else { Err(must.to_owned()) }
}

fn positive(value: &usize) -> Verdict {
    verdict(*value > 0, "must be at least 1")
}

fn at_least_two(value: &usize) -> Verdict {
    verdict(*value >= 2, "must be at least 2")
}

fn at_most(limit: u64) -> impl Fn(&u64) -> Verdict {
    move |value| verdict(*value <= limit, &format!("must be at most {limit}"))
}

fn positive_number(value: &f64) -> Verdict {
    verdict(value.is_finite() && *value > 0.0, "must be greater than 0")
}

fn not_negative(value: &f64) -> Verdict {
    verdict(value.is_finite() && *value >= 0.0, "must be 0 or more")
}

fn below_one(value: &f64) -> Verdict {
    verdict((0.0..1.0).contains(value), "must be at least 0 and below 1")
}

fn not_empty<S: AsRef<str>>(value: &S) -> Verdict {
    verdict(!value.as_ref().trim().is_empty(), "must not be empty")
}

fn modules(value: &Modules) -> Verdict {
    verdict(
        match value {
            Modules::Pattern(pattern) => !pattern.is_empty(),
            Modules::List(names) => !names.is_empty() && names.iter().all(|n| !n.is_empty()),
        },
        "must name at least one module",
    )
}

fn all_positive(value: &BTreeMap<String, usize>) -> Verdict {
    verdict(
        value.values().all(|r| *r > 0),
        "every rank must be at least 1",
    )
}

fn supported_method<S: AsRef<str>>(value: &S) -> Verdict {
    let value = value.as_ref();
    let name = value.to_lowercase().replace('-', "_");
    if name == "lora" && value == "lora" {
        Ok(())
    } else if LATER_METHODS.contains(&name.as_str()) {
        Err(format!(
            "`{value}` is not supported yet; the method there is: lora"
        ))
    } else {
        Err(format!(
            "there is no method `{value}`; the method there is: lora"
        ))
    }
}

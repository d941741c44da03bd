//! LoRA's configuration, named as in PEFT, and its `adapter_config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{AdapterError, Result};

/// Which modules are meant: PEFT's string (a regular expression, or `all-linear`) or list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "TargetsForm", into = "TargetsForm")]
pub enum Targets {
    /// Every linear layer but the one that yields logits.
    AllLinear,
    /// Modules whose whole name matches.
    Regex(String),
    /// Modules with one of these names, or a name that ends in a dot and one of these.
    List(Vec<String>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TargetsForm {
    One(String),
    Many(Vec<String>),
}

impl From<TargetsForm> for Targets {
    fn from(form: TargetsForm) -> Self {
        match form {
            TargetsForm::One(s) if s.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            TargetsForm::One(s) => Self::Regex(s),
            TargetsForm::Many(names) => Self::List(names),
        }
    }
}

impl From<Targets> for TargetsForm {
    fn from(targets: Targets) -> Self {
        match targets {
            Targets::AllLinear => Self::One("all-linear".into()),
            Targets::Regex(s) => Self::One(s),
            Targets::List(names) => Self::Many(names),
        }
    }
}

/// How the factors start (`init_lora_weights`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "InitForm", into = "InitForm")]
pub enum InitLora {
    /// `true`: A from U(±1/√in), B zero, so that the output starts unchanged.
    #[default]
    Default,
    /// `false`: A and B both random; the output starts changed.
    Random,
    /// `"gaussian"`: A from N(0, 1/r) (the standard deviation), B zero.
    Gaussian,
    /// Another of PEFT's names. Such an adapter may be read, but not started here.
    Other(String),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum InitForm {
    Flag(bool),
    Name(String),
}

impl From<InitForm> for InitLora {
    fn from(form: InitForm) -> Self {
        match form {
            InitForm::Flag(true) => Self::Default,
            InitForm::Flag(false) => Self::Random,
            InitForm::Name(s) if s.eq_ignore_ascii_case("gaussian") => Self::Gaussian,
            InitForm::Name(s) => Self::Other(s),
        }
    }
}

impl From<InitLora> for InitForm {
    fn from(init: InitLora) -> Self {
        match init {
            InitLora::Default => Self::Flag(true),
            InitLora::Random => Self::Flag(false),
            InitLora::Gaussian => Self::Name("gaussian".into()),
            InitLora::Other(s) => Self::Name(s),
        }
    }
}

/// What a configuration is about to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// New parameters.
    Initialise,
    /// Parameters from a file.
    Load,
}

/// PEFT's `LoraConfig`. The defaults are PEFT's.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Probability with which an element of the adapter's input is dropped in training.
    pub lora_dropout: f64,
    /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
    pub target_modules: Option<Targets>,
    /// Modules to leave out of them.
    pub exclude_modules: Option<Targets>,
    /// Modules of which a full copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// Only these layers (with a list of target names).
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name before the layer's number, where the first number in a name is not the layer's.
    pub layers_pattern: Option<Vec<String>>,
    /// Scale by `alpha / √r` in place of `alpha / r`.
    pub use_rslora: bool,
    /// How the factors start.
    pub init_lora_weights: InitLora,
    /// Other ranks for some modules, first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas for some modules, first match wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Which biases are trained; only `"none"` is supported.
    pub bias: String,
    /// What the model is for (`CAUSAL_LM`).
    pub task_type: Option<String>,
    /// The base model's name or directory.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// Every other key of the file, kept as read.
    pub other: Map<String, Value>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            modules_to_save: None,
            layers_to_transform: None,
            layers_pattern: None,
            use_rslora: false,
            init_lora_weights: InitLora::Default,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: "none".into(),
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            other: Map::new(),
        }
    }
}

/// Keys of PEFT's that switch something on that is not here, with what it is.
const FEATURES: [(&str, &str); 15] = [
    ("use_dora", "DoRA"),
    ("lora_bias", "a bias on lora_B"),
    ("fan_in_fan_out", "weights stored as [in, out]"),
    ("alora_invocation_tokens", "activated LoRA"),
    (
        "trainable_token_indices",
        "training single tokens' embeddings",
    ),
    ("target_parameters", "LoRA on bare parameters"),
    ("layer_replication", "replicating layers"),
    ("megatron_config", "Megatron's parallel layers"),
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("arrow_config", "Arrow routing"),
    ("velora_config", "VeLoRA"),
    ("monteclora_config", "Monte Carlo LoRA"),
    ("kasa_config", "KaSA"),
    ("ensure_weight_tying", "adapters shared between tied layers"),
];

/// Keys that PEFT 0.18 to 0.21 read and that ask for nothing by themselves: bookkeeping, or the
/// settings of an initialisation that `init_lora_weights` would have to name.
const PASSIVE: [&str; 10] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
];

/// The version whose key set a new file is written in. Later ones fill in what is missing, so that
/// every PEFT from here on reads it without a warning about unknown keys.
const PEFT_VERSION: &str = "0.18.1";

impl LoraConfig {
    /// Reads `adapter_config.json`; `origin` names the file in errors. All wrong values are reported
    /// at once, and so is what [`LoraConfig::unsupported`] finds for loading.
    pub fn from_json(value: &Value, origin: &str) -> Result<Self> {
        let fail = |problems| AdapterError::Config {
            origin: origin.to_string(),
            problems,
        };
        let Some(object) = value.as_object() else {
            return Err(fail(vec!["not a JSON object".into()]));
        };
        match object.get("peft_type") {
            Some(Value::String(s)) if s == "LORA" => {}
            Some(kind) => {
                return Err(fail(vec![format!(
                    "peft_type is {kind}; only \"LORA\" is supported"
                )]));
            }
            None => {
                return Err(fail(vec![
                    "peft_type is missing: not an adapter configuration".into(),
                ]));
            }
        }
        let mut read = Reader {
            left: object.clone(),
            problems: Vec::new(),
        };
        read.left.shift_remove("peft_type");
        let default = Self::default();
        let config = Self {
            r: read.take("r", default.r),
            lora_alpha: read.take("lora_alpha", default.lora_alpha),
            lora_dropout: read.take("lora_dropout", default.lora_dropout),
            target_modules: read.take("target_modules", None),
            exclude_modules: read.take("exclude_modules", None),
            modules_to_save: read.take("modules_to_save", None),
            layers_to_transform: read
                .take::<Option<OneOrMany<usize>>>("layers_to_transform", None)
                .map(OneOrMany::list),
            layers_pattern: read
                .take::<Option<OneOrMany<String>>>("layers_pattern", None)
                .map(OneOrMany::list),
            use_rslora: read.take("use_rslora", false),
            init_lora_weights: read.take("init_lora_weights", InitLora::Default),
            rank_pattern: read.pattern("rank_pattern"),
            alpha_pattern: read.pattern("alpha_pattern"),
            bias: read.take("bias", default.bias),
            task_type: read.take("task_type", None),
            base_model_name_or_path: read.take("base_model_name_or_path", None),
            revision: read.take("revision", None),
            other: read.left,
        };
        let mut problems = read.problems;
        if problems.is_empty() {
            problems = config.unsupported(Purpose::Load);
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(fail(problems))
        }
    }

    /// The file's contents, keys sorted. Patterns keep their order, which decides between them.
    pub fn to_json(&self) -> Value {
        let mut map = written_defaults();
        map.extend(self.other.clone());
        let own = [
            ("peft_type", json!("LORA")),
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("target_modules", json!(self.target_modules)),
            ("exclude_modules", json!(self.exclude_modules)),
            ("modules_to_save", json!(self.modules_to_save)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("layers_pattern", json!(self.layers_pattern)),
            ("use_rslora", json!(self.use_rslora)),
            ("init_lora_weights", json!(self.init_lora_weights)),
            (
                "rank_pattern",
                self.rank_pattern
                    .iter()
                    .map(|(k, v)| (k.clone(), json!(v)))
                    .collect(),
            ),
            (
                "alpha_pattern",
                self.alpha_pattern
                    .iter()
                    .map(|(k, v)| (k.clone(), number(*v)))
                    .collect(),
            ),
            ("bias", json!(self.bias)),
            ("task_type", json!(self.task_type)),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("revision", json!(self.revision)),
        ];
        map.extend(own.into_iter().map(|(key, value)| (key.to_string(), value)));
        map.sort_keys();
        Value::Object(map)
    }

    /// Options that are out of range or ask for what is not supported, one line each.
    pub fn unsupported(&self, purpose: Purpose) -> Vec<String> {
        let mut problems = Vec::new();
        if self.r == 0 {
            problems.push("r = 0: the rank must be at least 1".into());
        }
        for (key, r) in &self.rank_pattern {
            if *r == 0 {
                problems.push(format!(
                    "rank_pattern.{key:?} = 0: the rank must be at least 1"
                ));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            problems.push(format!(
                "lora_dropout = {}: must be at least 0 and below 1",
                self.lora_dropout
            ));
        }
        let alphas = self
            .alpha_pattern
            .iter()
            .map(|(k, a)| (format!("alpha_pattern.{k:?}"), *a));
        for (key, alpha) in alphas.chain([("lora_alpha".to_string(), self.lora_alpha)]) {
            if !alpha.is_finite() {
                problems.push(format!("{key} = {alpha}: must be a finite number"));
            }
        }
        if self.bias != "none" {
            problems.push(format!(
                "bias = {:?}: training biases is not supported; use \"none\"",
                self.bias
            ));
        }
        let by_list = matches!(self.target_modules, None | Some(Targets::List(_)));
        if !by_list && self.layers_to_transform.is_some() {
            problems.push("layers_to_transform needs target_modules as a list of names".into());
        }
        if !by_list && self.layers_pattern.is_some() {
            problems.push("layers_pattern needs target_modules as a list of names".into());
        }
        if self.layers_pattern.as_ref().is_some_and(|p| !p.is_empty())
            && self.layers_to_transform.is_none()
        {
            problems.push("layers_pattern needs layers_to_transform".into());
        }
        for (key, what) in FEATURES {
            if self.other.get(key).is_some_and(asks) {
                problems.push(format!(
                    "{key} = {}: {what} is not supported",
                    self.other[key]
                ));
            }
        }
        problems.extend(self.init_problem(purpose));
        problems
    }

    /// Keys that neither this crate nor PEFT 0.21 knows and that hold something: kept in the file,
    /// without effect here. Worth telling the user.
    pub fn unknown_keys(&self) -> Vec<&str> {
        let known = |key: &str| PASSIVE.contains(&key) || FEATURES.iter().any(|(k, _)| *k == key);
        self.other
            .iter()
            .filter(|(key, value)| !known(key) && asks(value))
            .map(|(key, _)| key.as_str())
            .collect()
    }

    fn init_problem(&self, purpose: Purpose) -> Option<String> {
        let InitLora::Other(name) = &self.init_lora_weights else {
            return None;
        };
        match (purpose, name.as_str()) {
            // These leave the base alone, so the file holds all there is.
            (Purpose::Load, "eva" | "orthogonal") => None,
            (Purpose::Initialise, _) => Some(format!(
                "init_lora_weights = {name:?} is not supported; use true, false or \"gaussian\""
            )),
            (Purpose::Load, _) => Some(format!(
                "init_lora_weights = {name:?} may have changed the base weights, which the adapter's file does not \
                 hold; write it from PEFT with save_pretrained(.., path_initial_model_for_weight_conversion=..)"
            )),
        }
    }
}

/// What PEFT 0.18 writes for the keys that have no field here.
fn written_defaults() -> Map<String, Value> {
    let off = [
        "fan_in_fan_out",
        "lora_bias",
        "use_dora",
        "use_qalora",
        "ensure_weight_tying",
    ];
    let none = [
        "alora_invocation_tokens",
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "eva_config",
        "layer_replication",
        "megatron_config",
        "target_parameters",
        "trainable_token_indices",
    ];
    let rest = [
        ("inference_mode", json!(true)),
        ("loftq_config", json!({})),
        ("megatron_core", json!("megatron.core")),
        ("peft_version", json!(PEFT_VERSION)),
        ("qalora_group_size", json!(16)),
    ];
    let off = off.into_iter().map(|key| (key, json!(false)));
    let none = none.into_iter().map(|key| (key, Value::Null));
    off.chain(none)
        .chain(rest)
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

/// Whether a value switches its feature on.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// As Python would have written it: whole numbers without a point.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn list(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Takes known keys out of the object and notes those of the wrong type.
struct Reader {
    left: Map<String, Value>,
    problems: Vec<String>,
}

impl Reader {
    fn take<T: serde::de::DeserializeOwned>(&mut self, key: &str, default: T) -> T {
        // `shift_remove` keeps the order of the rest.
        match self.left.shift_remove(key) {
            None => default,
            Some(value) => match serde_json::from_value(value.clone()) {
                Ok(parsed) => parsed,
                // Older versions wrote null for what they did not set.
                Err(_) if value.is_null() => default,
                Err(_) => {
                    self.problems
                        .push(format!("{key} = {value}: not a value this option takes"));
                    default
                }
            },
        }
    }

    fn pattern<T: serde::de::DeserializeOwned>(&mut self, key: &str) -> Vec<(String, T)> {
        let Some(map) = self.take::<Option<Map<String, Value>>>(key, None) else {
            return Vec::new();
        };
        let mut pairs = Vec::new();
        for (name, value) in map {
            match serde_json::from_value(value.clone()) {
                Ok(parsed) => pairs.push((name, parsed)),
                Err(_) => self.problems.push(format!(
                    "{key}.{name:?} = {value}: not a value this option takes"
                )),
            }
        }
        pairs
    }
}

#[cfg(test)]
mod tests;

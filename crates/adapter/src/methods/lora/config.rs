//! LoRA's configuration.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Targets;
use crate::config::fields::{Pattern, PeftValue, peft_config, through_serde};
use crate::config::{Bias, Purpose, TokenIndices};
use crate::methods::MethodConfig;

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
    /// `"orthogonal"`: A and B random with row and column spaces that are orthogonal, so that the
    /// output starts unchanged though neither is zero; even ranks only.
    Orthogonal,
    /// `"pissa"`: the leading singular vectors of the weight, which the adapter takes over from it.
    Pissa,
    /// `"pissa_niter_N"`: the same by a randomised decomposition with N power iterations.
    PissaNiter(usize),
    /// `"olora"`: the leading columns of the weight's QR decomposition.
    Olora,
    /// `"eva"`: A from the leading directions of the layer's inputs over the training data, B zero.
    Eva,
    /// `"loftq"`: B·A from what quantising the weight lost.
    Loftq,
    /// Another of PEFT's names. Such an adapter may be read, but not started here.
    Other(String),
}

impl InitLora {
    /// Whether the adapter starts with a part of the base's weight that the base is understood to
    /// have given up: `W·x` becomes `(W − s·B₀·A₀)·x`.
    pub fn subtracts_initial(&self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }
}

/// Why there is one iteration of LoftQ and no more.
pub const ONE_LOFTQ_ITERATION: &str = "from the second iteration on LoftQ changes the quantised base too, which no \
     adapter's file can hold; use 1, where the base is the quantised model";

/// LoftQ's settings; `None` for one that is no whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loftq {
    /// Bits that the base is quantised to (`loftq_bits`).
    pub bits: Option<u64>,
    /// Turns of quantising and decomposing (`loftq_iter`).
    pub iterations: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum InitForm {
    Flag(bool),
    Name(String),
}

impl From<InitForm> for InitLora {
    fn from(form: InitForm) -> Self {
        let name = match form {
            InitForm::Flag(true) => return Self::Default,
            InitForm::Flag(false) => return Self::Random,
            InitForm::Name(name) => name,
        };
        match name.to_ascii_lowercase().as_str() {
            "gaussian" => Self::Gaussian,
            "orthogonal" => Self::Orthogonal,
            "pissa" => Self::Pissa,
            "olora" => Self::Olora,
            "eva" => Self::Eva,
            "loftq" => Self::Loftq,
            lower => match lower.strip_prefix("pissa_niter_").map(str::parse) {
                Some(Ok(steps)) => Self::PissaNiter(steps),
                _ => Self::Other(name),
            },
        }
    }
}

impl From<InitLora> for InitForm {
    fn from(init: InitLora) -> Self {
        match init {
            InitLora::Default => Self::Flag(true),
            InitLora::Random => Self::Flag(false),
            InitLora::Gaussian => Self::Name("gaussian".into()),
            InitLora::Orthogonal => Self::Name("orthogonal".into()),
            InitLora::Pissa => Self::Name("pissa".into()),
            InitLora::PissaNiter(steps) => Self::Name(format!("pissa_niter_{steps}")),
            InitLora::Olora => Self::Name("olora".into()),
            InitLora::Eva => Self::Name("eva".into()),
            InitLora::Loftq => Self::Name("loftq".into()),
            InitLora::Other(s) => Self::Name(s),
        }
    }
}

through_serde!(InitLora);

peft_config! {
    /// PEFT's `LoraConfig`. The defaults are PEFT's.
    pub struct LoraConfig in "LORA" {
        /// Rank of the update.
        r: usize = 8;
        /// Numerator of the scale.
        lora_alpha: f64 = 8.0;
        /// Probability with which an element of the adapter's input is dropped in training.
        lora_dropout: f64 = 0.0;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
        /// Only these layers (with a list of target names).
        layers_to_transform: Option<Vec<usize>> = None;
        /// The name before the layer's number, where the first number in a name is not the layer's.
        layers_pattern: Option<Vec<String>> = None;
        /// Scale by `alpha / √r` in place of `alpha / r`.
        use_rslora: bool = false;
        /// DoRA: learn the length of each output's weights by itself.
        use_dora: bool = false;
        /// How the factors start.
        init_lora_weights: InitLora = InitLora::Default;
        /// Other ranks for some modules, first match wins.
        rank_pattern: Pattern<usize> = Vec::new();
        /// Other alphas for some modules, first match wins.
        alpha_pattern: Pattern<f64> = Vec::new();
        /// Which biases of the base are trained.
        bias: Bias = Bias::None;
        /// A bias of its own behind B.
        lora_bias: bool = false;
        /// Tokens of which the embedding's row is trained.
        trainable_token_indices: Option<TokenIndices> = None;
        /// On a model whose head shares the embedding's weights: whether the head follows what is trained
        /// of the embedding.
        ensure_weight_tying: bool = false;
    }
    written {
        // About the base's own storage, which is `[out, in]` here whatever a file says.
        "fan_in_fan_out": json!(false);
        "alora_invocation_tokens": Value::Null;
        "arrow_config": Value::Null;
        "corda_config": Value::Null;
        "eva_config": Value::Null;
        "layer_replication": Value::Null;
        "loftq_config": json!({});
        "megatron_config": Value::Null;
        "megatron_core": json!("megatron.core");
        "qalora_group_size": json!(16);
        "target_parameters": Value::Null;
        "use_qalora": json!(false);
    }
    refused {
        "alora_invocation_tokens": "activated LoRA";
        "target_parameters": "LoRA on bare parameters";
        "layer_replication": "replicating layers";
        "megatron_config": "Megatron's parallel layers";
        "use_qalora": "QA-LoRA";
        "use_bdlora": "block-diagonal LoRA";
        "arrow_config": "Arrow routing";
        "velora_config": "VeLoRA";
        "monteclora_config": "Monte Carlo LoRA";
        "kasa_config": "KaSA";
    }
}

impl LoraConfig {
    /// Options that are out of range or ask for what is not supported, one line each.
    pub fn unsupported(&self, purpose: Purpose) -> Vec<String> {
        let mut problems = crate::config::rank_problems(
            self.r,
            &self.rank_pattern,
            ("lora_alpha", self.lora_alpha),
            &self.alpha_pattern,
        );
        problems.extend(crate::config::probability(
            "lora_dropout",
            self.lora_dropout,
        ));
        problems.extend(crate::config::layer_problems(
            self.target_modules.as_ref(),
            self.layers_to_transform.as_deref(),
            self.layers_pattern.as_deref(),
        ));
        if self.use_dora && self.lora_bias {
            problems.push("lora_bias = true: DoRA has no place for it; use one of the two".into());
        }
        let plain = matches!(self.init_lora_weights, InitLora::Default | InitLora::Random);
        if self.lora_bias && !plain {
            problems.push(
                "lora_bias = true: PEFT takes it with init_lora_weights true or false alone, and would not load \
                 the adapter"
                    .into(),
            );
        }
        problems.extend(self.refused());
        problems.extend(self.init_problem(purpose));
        problems
    }

    /// EVA's settings (`eva_config`): how far ranks may be moved between modules.
    pub fn eva_rho(&self) -> f64 {
        let rho = self.other.get("eva_config").and_then(|c| c.get("rho"));
        rho.and_then(Value::as_f64).unwrap_or(2.0)
    }

    /// LoftQ's settings (`loftq_config`), PEFT's defaults for what is left out. An adapter that began as LoftQ
    /// keeps them: its base is the quantised one.
    pub fn loftq(&self) -> Option<Loftq> {
        let config = self.other.get("loftq_config")?.as_object()?;
        let number = |key: &str, default| match config.get(key) {
            None => Some(default),
            Some(value) => value.as_u64(),
        };
        (!config.is_empty()).then(|| Loftq {
            bits: number("loftq_bits", 4),
            iterations: number("loftq_iter", 1),
        })
    }

    /// Notes in `loftq_config` that the adapter began, or is to begin, as LoftQ on a base of so many bits.
    pub fn set_loftq(&mut self, bits: u64) {
        let config = json!({ "loftq_bits": bits, "loftq_iter": 1 });
        self.other.insert("loftq_config".to_owned(), config);
    }

    fn loftq_setting(&self, key: &str) -> &Value {
        let config = self.other.get("loftq_config");
        config
            .and_then(|config| config.get(key))
            .unwrap_or(&Value::Null)
    }

    fn loftq_problem(&self) -> Option<String> {
        let Loftq { bits, iterations } = self.loftq()?;
        if iterations != Some(1) {
            let asked = self.loftq_setting("loftq_iter");
            return Some(format!("loftq_iter = {asked}: {ONE_LOFTQ_ITERATION}"));
        }
        if !matches!(bits, Some(4 | 8)) {
            let asked = self.loftq_setting("loftq_bits");
            return Some(format!("loftq_bits = {asked}: LoftQ is for 4 or 8 bits"));
        }
        None
    }

    fn init_problem(&self, purpose: Purpose) -> Option<String> {
        let name = self.init_lora_weights.write();
        if purpose == Purpose::Initialise
            && self.use_dora
            && self.init_lora_weights.subtracts_initial()
        {
            return Some(format!(
                "init_lora_weights = {name} together with use_dora is not supported: the length of \
                 the weights would be taken from a base that the adapter changes"
            ));
        }
        match (&self.init_lora_weights, purpose) {
            (InitLora::Orthogonal, Purpose::Initialise) => {
                let ranks = self.rank_pattern.iter().map(|(_, r)| r);
                let odd = ranks.chain([&self.r]).find(|r| *r % 2 == 1)?;
                Some(format!(
                    "init_lora_weights = \"orthogonal\" needs even ranks, not {odd}"
                ))
            }
            (InitLora::Other(_), Purpose::Initialise) => Some(format!(
                "init_lora_weights = {name} is not supported; use true, false, \"gaussian\", \
                 \"orthogonal\", \"pissa\", \"pissa_niter_N\", \"olora\", \"eva\" or \"loftq\""
            )),
            (InitLora::Loftq, Purpose::Initialise) => self.loftq_problem(),
            (InitLora::Loftq, Purpose::Load) => Some(
                "init_lora_weights = \"loftq\": PEFT took the base weights apart as it made this adapter, and its \
                 file does not hold what was left of them; where loftq_iter was 1 they are the quantised model's: \
                 set init_lora_weights to true and use the adapter on a base with load_in_4bit"
                    .to_owned(),
            ),
            (InitLora::Other(_), Purpose::Load) => Some(format!(
                "init_lora_weights = {name} may have changed the base weights, which the adapter's file does not \
                 hold; write it from PEFT with save_pretrained(.., path_initial_model_for_weight_conversion=..)"
            )),
            _ => None,
        }
    }
}

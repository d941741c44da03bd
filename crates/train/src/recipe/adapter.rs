//! `[adapter]`: every method's settings, and which method has which.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use enamel_adapter::methods::lora::config::ONE_LOFTQ_ITERATION;
use enamel_adapter::{Bias, TokenIndices};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::section::{
    Verdict, any, below_one, given, not_empty, not_negative, positive, positive_number, section,
    verdict,
};

section! {
    /// `[adapter]`: what is trained. Names and meanings are PEFT's; each method takes the settings that
    /// are its own.
    #[allow(non_snake_case)]
    pub struct AdapterSettings in "adapter" {
        /// The method: `lora`, `dora`, `loha`, `lokr`, `adalora`, `vera`, `ia3`, `miss`, `xlora`, `full` (the
        /// base itself) or `head` (only `modules_to_save`).
        method: String = "lora".to_owned(), supported_method;
        /// Rank of the update (8; 256 for VeRA, 64 for MiSS, where it is the length of the pieces that inputs are
        /// summed over).
        r: Option<usize> = None, given(positive);
        /// The update is scaled by `lora_alpha / r`, and 8 unless given. LoHa and LoKr store it as
        /// `alpha`; AdaLoRA divides by `init_r`.
        lora_alpha: f64 = 8.0, positive_number;
        /// LoRA, DoRA, AdaLoRA: probability with which an input of the adapter is dropped while training.
        lora_dropout: f64 = 0.0, below_one;
        /// LoHa, LoKr: probability with which an output of the update is dropped while training.
        rank_dropout: f64 = 0.0, below_one;
        /// LoKr: divide what `rank_dropout` leaves by its share.
        rank_dropout_scale: bool = false, any;
        /// LoHa, LoKr: probability with which a layer goes without its update in a forward pass.
        module_dropout: f64 = 0.0, below_one;
        /// Which layers to adapt: `"all-linear"`, a regular expression that must match the whole module
        /// name, or a list of name endings. Left out: `q_proj` and `v_proj`; for (IA)³ `k_proj`, `v_proj`
        /// and `down_proj`.
        target_modules: Option<Modules> = None, given(modules);
        /// Modules to leave out, in the same notation.
        exclude_modules: Option<Modules> = None, given(modules);
        /// Modules to train whole and save with the adapter (`lm_head`, `embed_tokens`).
        modules_to_save: Vec<String> = Vec::new(), any;
        /// Adapt only these layers, counted from 0; empty for all.
        layers_to_transform: Vec<usize> = Vec::new(), any;
        /// Name of the list of layers, when `layers_to_transform` is used on an unusual model.
        layers_pattern: Option<String> = None, given(not_empty);
        /// Ranks of single modules: name ending or regular expression to rank. Where two match, the
        /// first counts.
        rank_pattern: Ordered<usize> = Ordered::default(), all_positive;
        /// The same for `lora_alpha`.
        alpha_pattern: Ordered<f64> = Ordered::default(), any;
        /// LoRA, DoRA: scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
        use_rslora: bool = false, any;
        /// LoRA: learn the length of each row of the weight by itself; the same as `method = "dora"`.
        use_dora: bool = false, any;
        /// LoRA, DoRA: biases of the base to train along: `none`, `lora_only` (those of adapted layers)
        /// or `all`.
        bias: Bias = Bias::None, any;
        /// LoRA: a bias behind B.
        lora_bias: bool = false, any;
        /// LoRA, DoRA: tokens of which the embedding's row is trained: a list of ids, or a table from
        /// embedding to such a list.
        trainable_token_indices: Option<TokenIndices> = None, any;
        /// LoRA, DoRA, head: on a model whose `lm_head` shares the embedding's weights, have it follow what is
        /// trained of the embedding. Left at false, an embedding or head that is adapted or saved is so by itself,
        /// and merging gives the head a matrix of its own.
        ensure_weight_tying: bool = false, any;
        /// LoRA, DoRA: first values. `true` for Kaiming-uniform A and zero B, `false` for a B that is not
        /// zero, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"pissa_niter_N"` (N power iterations),
        /// `"olora"`, `"eva"` (from the inputs of the layers on the training data), or `"loftq"` (from what
        /// `load_in_4bit` or `load_in_8bit` loses of the base's weights).
        init_lora_weights: InitWeights = InitWeights::Flag(true), known_start;
        /// With `init_lora_weights = "eva"`: how many times `r` a module's rank may become as ranks
        /// move to where the inputs vary most; 1 leaves them alone.
        eva_rho: f64 = 2.0, at_least_one;
        /// With `init_lora_weights = "loftq"`: PEFT's `{ loftq_bits = 4, loftq_iter = 1 }`; the bits are those
        /// of `[model.quantization]`, and there is one iteration, which leaves the base the quantised model.
        loftq_config: Option<LoftqSettings> = None, given(one_iteration);
        /// LoHa, LoKr, VeRA, MiSS: `true` for first values that change nothing, `false` for random ones; for
        /// LoKr also `"lycoris"`, where the other factor is the zero one; for MiSS also `"bat"`, where blocks
        /// multiply the base's weights, and `"mini"`, where one matrix repeats every `mini_r` outputs.
        init_weights: InitWeights = InitWeights::Flag(true), known_form;
        /// LoKr: whether the first factor may be a product too.
        decompose_both: bool = false, any;
        /// LoKr: largest side of the first factor; -1 for as near to a square as may be.
        decompose_factor: i64 = -1, factor;
        /// AdaLoRA: rank of each module at the start.
        init_r: usize = 12, positive;
        /// AdaLoRA: mean rank that the budget comes down to.
        target_r: usize = 8, positive;
        /// AdaLoRA: steps before the budget begins to fall.
        tinit: usize = 0, any;
        /// AdaLoRA: last steps, in which ranks stay as they are.
        tfinal: usize = 0, any;
        /// AdaLoRA: steps between two choices of ranks.
        deltaT: usize = 1, positive;
        /// AdaLoRA: decay of the mean importance.
        beta1: f64 = 0.85, below_one;
        /// AdaLoRA: decay of the importance's uncertainty.
        beta2: f64 = 0.85, below_one;
        /// AdaLoRA: weight of the term that keeps the factors orthogonal.
        orth_reg_weight: f64 = 0.5, positive_number;
        /// VeRA: probability with which an input of the adapter is dropped while training.
        vera_dropout: f64 = 0.0, below_one;
        /// VeRA: first value of the inner scales.
        d_initial: f64 = 0.1, any;
        /// VeRA: seed of the matrices that all layers share.
        projection_prng_key: u64 = 0, any;
        /// VeRA: store those matrices with the adapter.
        save_projection: bool = true, any;
        /// (IA)³: those of the adapted layers whose inputs are scaled. Left out: `down_proj`.
        feedforward_modules: Option<Modules> = None, given(modules);
        /// (IA)³: start at one, which changes nothing.
        init_ia3_weights: bool = true, any;
        /// MiSS: probability with which an input of the adapter is dropped while training.
        miss_dropout: f64 = 0.0, below_one;
        /// MiSS with `init_weights = "mini"`: outputs after which the matrix repeats.
        mini_r: usize = 1, positive;
        /// X-LoRA: the experts: name to adapter directory.
        adapters: Ordered<PathBuf> = Ordered::default(), any;
        /// X-LoRA: linear layers of the classifier.
        xlora_depth: usize = 1, positive;
        /// X-LoRA: width of its hidden layers.
        xlora_size: usize = 2048, positive;
        /// X-LoRA: dropout in it.
        xlora_dropout_p: f64 = 0.2, below_one;
        /// X-LoRA: a mixture of its own for each layer.
        layerwise_scalings: bool = false, any;
        /// X-LoRA: softmax over the experts.
        enable_softmax: bool = true, any;
        /// X-LoRA: softmax over those that `top_k_lora` leaves.
        enable_softmax_topk: bool = false, any;
        /// X-LoRA: temperature of the softmax.
        softmax_temperature: f64 = 1.0, positive_number;
        /// X-LoRA: only so many experts a token.
        top_k_lora: Option<usize> = None, given(positive);
        /// X-LoRA: factor of the experts in the first pass, which the classifier looks at.
        scaling_pass_value: f64 = 0.0, not_negative;
        /// X-LoRA: factor of the mixture.
        global_scaling_weight: f64 = 1.0, positive_number;
        /// X-LoRA: train the experts too.
        use_trainable_adapters: bool = false, any;
        /// Start from the adapter in this directory instead of from new values; its own method, `r`,
        /// `lora_alpha` and targets then hold.
        init_from: Option<PathBuf> = None, any;
    }
}

const LORA: &[&str] = &["lora", "dora"];
const LYCORIS: &[&str] = &["loha", "lokr"];
const RANKED: &[&str] = &["lora", "dora", "loha", "lokr"];
const TARGETED: &[&str] = &[
    "lora", "dora", "loha", "lokr", "adalora", "vera", "ia3", "miss",
];
const LAYERED: &[&str] = &["lora", "dora", "loha", "lokr", "adalora", "vera", "miss"];
const SAVING: &[&str] = &[
    "lora", "dora", "loha", "lokr", "adalora", "vera", "ia3", "miss", "head",
];

/// Which methods a setting means something to; what is not here is for all.
const OWNERS: &[(&str, &[&str])] = &[
    ("r", &["lora", "dora", "loha", "lokr", "vera", "miss"]),
    ("lora_alpha", &["lora", "dora", "loha", "lokr", "adalora"]),
    ("lora_dropout", &["lora", "dora", "adalora"]),
    ("rank_dropout", LYCORIS),
    ("rank_dropout_scale", &["lokr"]),
    ("module_dropout", LYCORIS),
    ("target_modules", TARGETED),
    (
        "exclude_modules",
        &["lora", "dora", "loha", "lokr", "adalora", "ia3", "miss"],
    ),
    ("modules_to_save", SAVING),
    ("layers_to_transform", LAYERED),
    ("layers_pattern", LAYERED),
    ("rank_pattern", RANKED),
    ("alpha_pattern", RANKED),
    ("use_rslora", LORA),
    ("use_dora", LORA),
    ("bias", LORA),
    ("lora_bias", &["lora"]),
    ("trainable_token_indices", LORA),
    ("ensure_weight_tying", &["lora", "dora", "head"]),
    ("init_lora_weights", LORA),
    ("eva_rho", LORA),
    ("loftq_config", LORA),
    ("init_weights", &["loha", "lokr", "vera", "miss"]),
    ("decompose_both", &["lokr"]),
    ("decompose_factor", &["lokr"]),
    ("init_r", &["adalora"]),
    ("target_r", &["adalora"]),
    ("tinit", &["adalora"]),
    ("tfinal", &["adalora"]),
    ("deltaT", &["adalora"]),
    ("beta1", &["adalora"]),
    ("beta2", &["adalora"]),
    ("orth_reg_weight", &["adalora"]),
    ("vera_dropout", &["vera"]),
    ("d_initial", &["vera"]),
    ("projection_prng_key", &["vera"]),
    ("save_projection", &["vera"]),
    ("feedforward_modules", &["ia3"]),
    ("init_ia3_weights", &["ia3"]),
    ("miss_dropout", &["miss"]),
    ("mini_r", &["miss"]),
    ("adapters", &["xlora"]),
    ("xlora_depth", &["xlora"]),
    ("xlora_size", &["xlora"]),
    ("xlora_dropout_p", &["xlora"]),
    ("layerwise_scalings", &["xlora"]),
    ("enable_softmax", &["xlora"]),
    ("enable_softmax_topk", &["xlora"]),
    ("softmax_temperature", &["xlora"]),
    ("top_k_lora", &["xlora"]),
    ("scaling_pass_value", &["xlora"]),
    ("global_scaling_weight", &["xlora"]),
    ("use_trainable_adapters", &["xlora"]),
];

impl AdapterSettings {
    /// Puts a setting back to its default.
    pub(super) fn forget(&mut self, name: &str) {
        if let Ok(toml::Value::Table(mut table)) = toml::Value::try_from(&*self) {
            table.remove(name);
            if let Ok(rest) = toml::Value::Table(table).try_into() {
                *self = rest;
            }
        }
    }
}

/// Settings that differ from their defaults and mean nothing to the method, with the methods they are
/// for.
pub(super) fn misplaced(
    settings: &AdapterSettings,
) -> Vec<(&'static str, &'static [&'static str])> {
    let table = |settings: &AdapterSettings| match toml::Value::try_from(settings) {
        Ok(toml::Value::Table(table)) => table,
        _ => toml::Table::new(),
    };
    let (given, default) = (table(settings), table(&AdapterSettings::default()));
    let strange = OWNERS.iter().filter(|(name, owners)| {
        given.get(*name) != default.get(*name) && !owners.contains(&settings.method.as_str())
    });
    strange.copied().collect()
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

/// How first values are made, as PEFT writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or the name of a scheme")]
pub enum InitWeights {
    /// `true`: the method's own scheme, which changes nothing. `false`: all random.
    Flag(bool),
    /// A named scheme.
    Named(String),
}

/// PEFT's `LoftQConfig`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoftqSettings {
    /// Bits that the base is quantised to: those of `[model.quantization]`.
    pub loftq_bits: Option<u64>,
    /// Turns of quantising and decomposing.
    pub loftq_iter: Option<u64>,
}

/// A table whose order counts: of two patterns that match, the first decides.
#[derive(Clone, Debug, PartialEq)]
pub struct Ordered<T>(pub Vec<(String, T)>);

impl<T> Default for Ordered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for Pairs<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Ordered(pairs))
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

/// Every method there is.
pub(super) const METHODS: [&str; 11] = [
    "lora", "dora", "loha", "lokr", "adalora", "vera", "ia3", "miss", "xlora", "full", "head",
];

fn supported_method<S: AsRef<str>>(value: &S) -> Verdict {
    let value = value.as_ref();
    if METHODS.contains(&value) {
        return Ok(());
    }
    let plain: String = value
        .to_lowercase()
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .collect();
    let near = METHODS
        .iter()
        .map(|method| (strsim::jaro_winkler(&plain, method), method))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = near.map_or(String::new(), |(_, method)| {
        format!(" (did you mean `{method}`?)")
    });
    Err(format!(
        "there is no method `{value}`{hint}; there are {}",
        METHODS.join(", ")
    ))
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

fn all_positive(value: &Ordered<usize>) -> Verdict {
    verdict(
        value.0.iter().all(|(_, r)| *r > 0),
        "every rank must be at least 1",
    )
}

fn known_start(value: &InitWeights) -> Verdict {
    let InitWeights::Named(name) = value else {
        return Ok(());
    };
    let steps = name.strip_prefix("pissa_niter_");
    let known = ["gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"];
    let known = known.contains(&name.as_str()) || steps.is_some_and(|n| n.parse::<usize>().is_ok());
    verdict(
        known,
        "must be true, false, \"gaussian\", \"orthogonal\", \"pissa\", \"pissa_niter_N\", \"olora\", \"eva\" or \"loftq\"",
    )
}

fn one_iteration(loftq: &LoftqSettings) -> Verdict {
    match loftq.loftq_iter {
        None | Some(1) => Ok(()),
        Some(asked) => Err(format!("loftq_iter = {asked}: {ONE_LOFTQ_ITERATION}")),
    }
}

/// Names of a scheme, with the method that has it.
pub(super) const FORMS: [(&str, &str); 3] =
    [("lycoris", "lokr"), ("bat", "miss"), ("mini", "miss")];

fn known_form(value: &InitWeights) -> Verdict {
    let known = |name: &str| FORMS.iter().any(|(form, _)| *form == name);
    verdict(
        matches!(value, InitWeights::Flag(_))
            || matches!(value, InitWeights::Named(name) if known(name)),
        "must be true, false, \"lycoris\" (LoKr), \"bat\" or \"mini\" (MiSS)",
    )
}

fn at_least_one(value: &f64) -> Verdict {
    verdict(value.is_finite() && *value >= 1.0, "must be at least 1")
}

fn factor(value: &i64) -> Verdict {
    verdict(*value == -1 || *value > 0, "must be -1 or at least 1")
}

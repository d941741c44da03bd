//! `[model.quantization]`: how the base's linear layers are held, named as in `BitsAndBytesConfig`.

use enamel_kernels::quantized::formats::{BLOCK_SIZES, FloatKind, FourBit};
use serde::{Deserialize, Serialize};

use super::resolve::Findings;
use super::section::{Verdict, any, given, not_negative, section, verdict};
use super::settings::ModelSettings;

section! {
    /// `[model.quantization]`: the frozen base held in fewer bits.
    pub struct QuantizationSettings in "model.quantization" {
        /// QLoRA: hold the linear layers of the base in 4 bits. Each is quantised as soon as it is read;
        /// embedding, norms, biases, `lm_head` and `skip_modules` stay as they are.
        load_in_4bit: bool = false, any;
        /// The 16 numbers that a 4-bit code stands for: `nf4`, or `fp4` (which transformers takes unless it
        /// is told otherwise).
        bnb_4bit_quant_type: FourBitType = FourBitType::Nf4, any;
        /// Quantise the blocks' scales in turn, to 8 bits: about 0.4 bits less for each weight.
        bnb_4bit_use_double_quant: bool = false, any;
        /// What a weight is rounded to when it is read: `float32`, `bfloat16` or `float16` (or `f32`,
        /// `bf16`, `f16`).
        bnb_4bit_compute_dtype: FourBitCompute = FourBitCompute::Float32, any;
        /// Weights that share a scale: a power of two from 32 to 4096.
        bnb_4bit_blocksize: usize = 64, block_size;
        /// LLM.int8(): hold the linear layers in 8 bits, a scale for each row.
        load_in_8bit: bool = false, any;
        /// With `load_in_8bit`: inputs of this magnitude and more are multiplied in floating point; 0 rounds
        /// all of them to 8 bits.
        llm_int8_threshold: f64 = 6.0, not_negative;
        /// Linear layers to leave as they are: names, their beginnings (`model.layers.0`) or their ends
        /// (`down_proj`).
        skip_modules: Vec<String> = Vec::new(), named;
        /// transformers' name for `skip_modules`.
        llm_int8_skip_modules: Option<Vec<String>> = None, given(named);
        /// Hold weights that are quantised in the model's files (GGUF, bitsandbytes) dense, not in the blocks
        /// they lie in.
        dequantize: bool = false, any;
    }
}

/// What 4-bit codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FourBitType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// Small floating-point numbers.
    Fp4,
}

impl From<FourBitType> for FourBit {
    fn from(kind: FourBitType) -> Self {
        match kind {
            FourBitType::Nf4 => Self::Nf4,
            FourBitType::Fp4 => Self::Fp4,
        }
    }
}

/// What a weight of 4 bits is rounded to when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FourBitCompute {
    /// Nothing is rounded.
    #[serde(alias = "f32")]
    Float32,
    /// bfloat16.
    #[serde(alias = "bf16")]
    Bfloat16,
    /// IEEE half precision.
    #[serde(alias = "f16")]
    Float16,
}

impl From<FourBitCompute> for FloatKind {
    fn from(dtype: FourBitCompute) -> Self {
        match dtype {
            FourBitCompute::Float32 => Self::F32,
            FourBitCompute::Bfloat16 => Self::Bf16,
            FourBitCompute::Float16 => Self::F16,
        }
    }
}

fn block_size(size: &usize) -> Verdict {
    verdict(
        BLOCK_SIZES.contains(size),
        "must be one of 32, 64, 128, 256, 512, 1024, 2048 and 4096",
    )
}

fn named<L: AsRef<[String]>>(names: &L) -> Verdict {
    verdict(
        names.as_ref().iter().all(|name| !name.trim().is_empty()),
        "must not hold an empty name, which would be the end of every name",
    )
}

const FOUR: &str = "model.quantization.load_in_4bit";
const EIGHT: &str = "model.quantization.load_in_8bit";
const DEQUANTIZE: &str = "model.quantization.dequantize";
const SKIP: &str = "model.quantization.skip_modules";
const SKIP_ALIAS: &str = "model.quantization.llm_int8_skip_modules";

/// Settles which of the formats is meant, and finds what goes with none.
pub(super) fn check(model: &mut ModelSettings, found: &mut Findings<'_>) {
    let set = &mut model.quantization;
    if let Some(names) = set.llm_int8_skip_modules.take() {
        match found.written(SKIP) {
            true if found.gives_way(SKIP_ALIAS, SKIP) => {}
            true if !found.gives_way(SKIP, SKIP_ALIAS) => found.add(
                SKIP_ALIAS,
                "skip_modules and llm_int8_skip_modules are one setting under two names",
                "remove one of them",
            ),
            _ => set.skip_modules = names,
        }
    }
    // An override that turns one format on takes the place of the file's other one.
    if set.load_in_4bit && set.load_in_8bit {
        if found.gives_way(FOUR, EIGHT) {
            set.load_in_4bit = false;
        } else if found.gives_way(EIGHT, FOUR) {
            set.load_in_8bit = false;
        } else {
            found.add(
                EIGHT,
                "model.quantization.load_in_4bit and load_in_8bit exclude each other",
                "remove one of them",
            );
        }
    }
    for (name, on) in [
        (FOUR, &mut set.load_in_4bit),
        (EIGHT, &mut set.load_in_8bit),
    ] {
        if *on && set.dequantize {
            if found.gives_way(name, DEQUANTIZE) {
                *on = false;
            } else if found.gives_way(DEQUANTIZE, name) {
                set.dequantize = false;
            } else {
                found.add(
                    DEQUANTIZE,
                    &format!("{DEQUANTIZE} holds the base dense, which {name} excludes"),
                    "remove one of them",
                );
            }
        }
    }
    let plain = QuantizationSettings::default();
    let either = set.load_in_4bit || set.load_in_8bit;
    macro_rules! needs {
        ($($field:ident, $there:expr, $owner:expr, $switches:expr;)*) => { $(
            if !$there && set.$field != plain.$field {
                let name = concat!("model.quantization.", stringify!($field));
                if $switches.iter().any(|switch| found.gives_way(name, switch)) {
                    set.$field = plain.$field.clone();
                } else {
                    found.add(
                        name,
                        &format!("{name} means nothing without {}", $owner),
                        &format!("set model.quantization.{} = true, or remove it", $owner),
                    );
                }
            }
        )* };
    }
    needs! {
        bnb_4bit_quant_type, set.load_in_4bit, "load_in_4bit", [FOUR, EIGHT, DEQUANTIZE];
        bnb_4bit_use_double_quant, set.load_in_4bit, "load_in_4bit", [FOUR, EIGHT, DEQUANTIZE];
        bnb_4bit_compute_dtype, set.load_in_4bit, "load_in_4bit", [FOUR, EIGHT, DEQUANTIZE];
        bnb_4bit_blocksize, set.load_in_4bit, "load_in_4bit", [FOUR, EIGHT, DEQUANTIZE];
        llm_int8_threshold, set.load_in_8bit, "load_in_8bit", [FOUR, EIGHT, DEQUANTIZE];
        skip_modules, either, "load_in_4bit", [FOUR, EIGHT, DEQUANTIZE];
    }
}

/// What trains or rewrites the base's weights cannot have them packed.
pub(super) fn check_method(recipe: &mut super::Recipe, found: &mut Findings<'_>) {
    let set = &recipe.model.quantization;
    let format = match (set.load_in_4bit, set.load_in_8bit) {
        (true, _) => "int4",
        (_, true) => "int8",
        _ => return,
    };
    if recipe.adapter.method == "full" {
        found.add(
            "adapter.method",
            &format!(
                "adapter.method = \"full\" trains the base, and {format} weights cannot be trained"
            ),
            "choose adapter.method = \"lora\" or another adapter, or remove [model.quantization]",
        );
    }
    if let super::InitWeights::Named(name) = &recipe.adapter.init_lora_weights
        && (name.starts_with("pissa") || name == "olora")
    {
        found.add(
            "adapter.init_lora_weights",
            &format!(
                "adapter.init_lora_weights = \"{name}\" takes a part out of the base's weights, and {format} \
                 weights cannot be changed"
            ),
            "choose true, \"gaussian\", \"orthogonal\", \"eva\" or \"loftq\", or remove [model.quantization]",
        );
    }
}

/// LoftQ makes up for what quantising loses, so there must be some; its bits are those of the base.
pub(super) fn check_loftq(recipe: &mut super::Recipe, found: &mut Findings<'_>) {
    const INIT: &str = "adapter.init_lora_weights";
    const CONFIG: &str = "adapter.loftq_config";
    let adapter = &mut recipe.adapter;
    if adapter.init_lora_weights != super::InitWeights::Named("loftq".into()) {
        if adapter.loftq_config.is_none() {
            return;
        }
        if found.gives_way(CONFIG, INIT) {
            adapter.loftq_config = None;
            return;
        }
        found.add(
            CONFIG,
            &format!("{CONFIG} means nothing without {INIT} = \"loftq\""),
            "set it, or remove loftq_config",
        );
        return;
    }
    // Another adapter's values are the start then.
    if adapter.init_from.is_some() {
        return;
    }
    let set = &recipe.model.quantization;
    let bits = match (set.load_in_4bit, set.load_in_8bit) {
        (true, _) => 4,
        (_, true) => 8,
        _ => {
            return found.add(
                INIT,
                &format!("{INIT} = \"loftq\": {NOT_QUANTISED}"),
                "set model.quantization.load_in_4bit or load_in_8bit = true, or choose another start",
            );
        }
    };
    let loftq = adapter.loftq_config.get_or_insert_default();
    loftq.loftq_iter = Some(1);
    let asked = *loftq.loftq_bits.get_or_insert(bits);
    if asked == bits {
        return;
    }
    if found.gives_way(CONFIG, FOUR) || found.gives_way(CONFIG, EIGHT) {
        loftq.loftq_bits = Some(bits);
        return;
    }
    found.add(
        CONFIG,
        &format!(
            "{CONFIG}: loftq_bits is {asked}, and [model.quantization] holds the base in {bits} bits"
        ),
        "leave loftq_bits out, or quantise to as many bits",
    );
}

/// Why LoftQ needs a recipe that quantises.
pub(crate) const NOT_QUANTISED: &str = "it makes up for what quantising the base loses, and nothing is quantised \
     while this base is loaded (weights that the model's files have quantised have nothing to be compared with)";

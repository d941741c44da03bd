//! The architectures, one file each, with Hugging Face's parameter names.
//!
//! An architecture is two things: its configuration ([`Architecture`]), which says all that is known without
//! weights, and its blocks ([`Backbone`]). The list below is the only place that names them.

mod gguf;
pub mod gpt2;
mod list;
pub mod llama;
pub mod qwen3;
mod vit;

use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_adapter::{Embedding, ModuleShape, Slots};
use serde_json::Value;

pub(crate) use gguf::{GgufArch, GgufFacts, GgufSettings, Permuted};
pub use list::{AnyBackbone, ArchConfig};

use crate::config::{Common, DecoderConfig, Reader};
use crate::error::LoadError;
use crate::heads::{CLASSIFIER, HEAD, Head, HeadConfig};
use crate::nn::input::ModelInput;
use crate::nn::kv_cache::KvCache;
use crate::nn::weights::Weights;

/// All that is known of a model without its weights.
pub trait Architecture: Sized {
    /// The `model_type`s that are of this architecture.
    const MODEL_TYPES: &'static [&'static str];
    /// The full name of the embedding, which a tied head shares.
    const EMBEDDING: &'static str;
    /// What a checkpoint's names begin with, and what comes next: names without the former are of a model that
    /// was saved without its head.
    const INNER: (&'static str, &'static [&'static str]) =
        ("model", &["embed_tokens", "layers", "norm"]);
    /// PEFT's default `target_modules` of LoRA and its kin for these types.
    const DEFAULT_TARGETS: &'static [&'static str] = &["q_proj", "v_proj"];
    /// Its blocks.
    type Backbone: Backbone;

    /// Reads the settings; what is wrong goes to `read.problems`.
    fn read(read: &mut Reader<'_>, model_type: &str) -> Self;
    /// What every architecture has.
    fn common(&self) -> &Common;
    /// The same, to change it.
    fn common_mut(&mut self) -> &mut Common;
    /// Its sizes, where its blocks are [`DecoderLayer`](crate::nn::decoder_layer::DecoderLayer)s.
    fn decoder(&self) -> &DecoderConfig;
    /// What a person should know of how the model is run.
    fn notes(&self) -> &[String] {
        &[]
    }
    /// The linear layers of a block, as memory is counted.
    fn block(&self) -> BlockShape {
        BlockShape::DECODER
    }
    /// The modules, asked for once each in the order in which a loaded model lists them.
    ///
    /// # Errors
    /// What `weights` cannot give.
    fn build(&self, weights: &mut Weights<'_, '_>) -> Result<Self::Backbone, LoadError>;
    /// What llama.cpp calls it and its parts, if it knows it.
    fn gguf() -> &'static [GgufArch];
}

/// The linear layers of a block by what they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// What stands before a block's number.
    pub prefix: &'static str,
    /// Queries (or queries, keys and values in one), keys, values, attention's output, the MLP's gate, its way up
    /// and its way down; none where the architecture has no such layer.
    pub parts: [Option<&'static str>; 7],
    /// Whether norms and the layers behind them are one operation where all of them are frozen.
    pub fuses: bool,
}

impl BlockShape {
    /// That of [`DecoderLayer`](crate::nn::decoder_layer::DecoderLayer).
    pub const DECODER: Self = Self {
        prefix: "model.layers",
        parts: [
            Some("self_attn.q_proj"),
            Some("self_attn.k_proj"),
            Some("self_attn.v_proj"),
            Some("self_attn.o_proj"),
            Some("mlp.gate_proj"),
            Some("mlp.up_proj"),
            Some("mlp.down_proj"),
        ],
        fuses: true,
    };
}

/// A model without its head.
pub trait Backbone: Module + Slots {
    /// The last norm's output `[batch, tokens, hidden]`. Positions count from 0, or from the cache's length.
    fn hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3>;
    /// The embedding, which a tied head shares.
    fn embedding(&self) -> &Embedding;
    /// In training: keeps only the input of so many blocks at a time.
    fn set_recompute(&mut self, blocks: Option<NonZeroUsize>);
}

/// The modules of a model that can be planned for, but not run; `None` where the configuration is of no such
/// architecture.
///
/// # Errors
/// Sizes that are missing or make no sense, all at once.
pub fn described_modules(
    json: &Value,
) -> Option<Result<Vec<ModuleShape>, crate::config::ConfigError>> {
    (model_type(json) == Some(vit::MODEL_TYPE)).then(|| vit::modules(json))
}

/// The `model_type` of a configuration.
pub(crate) fn model_type(json: &Value) -> Option<&str> {
    json.get("model_type").and_then(Value::as_str)
}

/// Makes the enums of configurations and backbones, and passes every call on.
macro_rules! architectures {
    ($($variant:ident => $module:ident: $config:ident, $backbone:ident;)+) => {
        use $crate::arch::{Architecture, Backbone, BlockShape, GgufArch};

        /// The configuration of a model of any architecture.
        #[derive(Clone, Debug, PartialEq)]
        pub enum ArchConfig {
            $(
                #[allow(missing_docs)]
                $variant($crate::arch::$module::$config),
            )+
        }

        /// A model of any architecture, without its head.
        #[derive(Module, Debug)]
        #[allow(clippy::large_enum_variant, reason = "there is one a program")]
        pub enum AnyBackbone {
            $(
                #[allow(missing_docs)]
                $variant($crate::arch::$module::$backbone),
            )+
        }

        impl ArchConfig {
            /// Every `model_type` that can be read.
            pub fn model_types() -> impl Iterator<Item = &'static str> {
                let all: &[&[&str]] = &[$(<$crate::arch::$module::$config>::MODEL_TYPES),+];
                all.iter().copied().flatten().copied()
            }

            /// Every architecture that llama.cpp has a name for.
            pub(crate) fn gguf_architectures() -> impl Iterator<Item = &'static GgufArch> {
                [$(<$crate::arch::$module::$config>::gguf()),+]
                    .into_iter()
                    .flatten()
            }

            pub(super) fn read(read: &mut Reader<'_>, name: &str) -> Option<Self> {
                $(
                    if <$crate::arch::$module::$config>::MODEL_TYPES.contains(&name) {
                        let config = Architecture::read(read, name);
                        return Some(Self::$variant(config));
                    }
                )+
                None
            }

            /// What every architecture has.
            pub fn common(&self) -> &Common {
                match self { $(Self::$variant(config) => config.common(),)+ }
            }

            pub(super) fn common_mut(&mut self) -> &mut Common {
                match self { $(Self::$variant(config) => config.common_mut(),)+ }
            }

            /// The sizes of its blocks.
            pub fn decoder(&self) -> &DecoderConfig {
                match self { $(Self::$variant(config) => config.decoder(),)+ }
            }

            /// What a person should know of how the model is run.
            pub fn notes(&self) -> &[String] {
                match self { $(Self::$variant(config) => config.notes(),)+ }
            }

            /// The linear layers of a block.
            pub fn block(&self) -> BlockShape {
                match self { $(Self::$variant(config) => config.block(),)+ }
            }

            /// PEFT's default `target_modules` for LoRA and its kin.
            pub fn default_targets(&self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant(_) => <$crate::arch::$module::$config>::DEFAULT_TARGETS,)+
                }
            }

            /// What the names of every architecture begin with, and what comes next.
            pub(crate) fn inner_names()
            -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
                [$(<$crate::arch::$module::$config>::INNER),+].into_iter()
            }

            /// The full name of the embedding, which a tied head shares.
            pub fn embedding(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$crate::arch::$module::$config>::EMBEDDING,)+ }
            }

            pub(crate) fn build(
                &self,
                weights: &mut Weights<'_, '_>,
            ) -> Result<AnyBackbone, LoadError> {
                match self {
                    $(Self::$variant(config) => Ok(AnyBackbone::$variant(config.build(weights)?)),)+
                }
            }
        }

        impl Backbone for AnyBackbone {
            fn hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.hidden(input, cache),)+ }
            }

            fn embedding(&self) -> &Embedding {
                match self { $(Self::$variant(model) => model.embedding(),)+ }
            }

            fn set_recompute(&mut self, blocks: Option<NonZeroUsize>) {
                match self { $(Self::$variant(model) => model.set_recompute(blocks),)+ }
            }
        }

        impl Slots for AnyBackbone {
            fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
                match self { $(Self::$variant(model) => model.slots(name, f),)+ }
            }

            fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
                match self { $(Self::$variant(model) => model.slots_ref(name, f),)+ }
            }
        }
    };
}
pub(crate) use architectures;

impl ArchConfig {
    /// Reads a `config.json`. Every problem is in the one error.
    ///
    /// # Errors
    /// What is no configuration, is of a type that is not known, or has settings that are missing, make no sense
    /// or ask for what is not here.
    pub fn from_json(json: &Value) -> Result<Self, crate::config::ConfigError> {
        use crate::config::ConfigError;
        let supported = || Self::model_types().collect::<Vec<_>>().join(", ");
        let raw = json.as_object().ok_or(ConfigError::NotAnObject)?;
        let name = model_type(json).ok_or_else(|| ConfigError::NoModelType {
            supported: supported(),
        })?;
        let mut read = Reader::new(raw);
        let config =
            Self::read(&mut read, name).ok_or_else(|| ConfigError::UnsupportedModelType {
                found: name.to_owned(),
                supported: supported(),
            })?;
        let mut problems = read.problems;
        if problems.is_empty() {
            return Ok(config);
        }
        problems.dedup();
        Err(ConfigError::Invalid { problems })
    }

    /// The same settings with a head of its own (`tie_word_embeddings: false`).
    pub fn untied(&self) -> Self {
        let mut config = self.clone();
        config.common_mut().untie();
        config
    }

    /// The most tokens of a text that the positions allow.
    pub fn context_length(&self) -> usize {
        self.decoder().rope.context_length()
    }

    /// Every module with parameters, in the order in which a loaded model lists them. Needs no
    /// weights. A tied head is not listed: it has no parameters of its own.
    pub fn modules(&self) -> Vec<ModuleShape> {
        let device = burn::tensor::Device::flex();
        Weights::shapes(&device, |weights| {
            self.build(weights)?;
            self.build_head(weights).map(drop)
        })
    }

    /// The same model with another head; `padding` is the padding token for a file that names none.
    pub fn with_head(&self, head: HeadConfig, padding: Option<u32>) -> Self {
        let mut config = self.clone();
        config.common_mut().set_head(head, padding);
        config
    }

    /// The same model with its head among its tensors.
    pub fn with_stored_head(&self) -> Self {
        let mut config = self.clone();
        if let HeadConfig::SequenceClassification { stored, .. } = &mut config.common_mut().head {
            *stored = true;
        }
        config
    }

    /// The module that the head is: the embedding where they are tied.
    pub fn head_module(&self) -> &'static str {
        match self.common().head {
            HeadConfig::CausalLm if self.ties_head() => self.embedding(),
            HeadConfig::CausalLm => HEAD,
            HeadConfig::SequenceClassification { .. } => CLASSIFIER,
        }
    }

    /// How many logits the head yields: tokens, or classes.
    pub fn outputs(&self) -> usize {
        match &self.common().head {
            HeadConfig::CausalLm => self.common().vocab_size,
            HeadConfig::SequenceClassification { labels, .. } => labels.len(),
        }
    }

    /// Whether the head is the embedding.
    pub fn ties_head(&self) -> bool {
        self.common().tie_word_embeddings && self.common().head == HeadConfig::CausalLm
    }

    /// The head, from its weights.
    pub(crate) fn build_head(&self, weights: &mut Weights<'_, '_>) -> Result<Head, LoadError> {
        let hidden = self.common().hidden_size;
        match &self.common().head {
            HeadConfig::CausalLm if self.ties_head() => Ok(Head::Lm(None)),
            HeadConfig::CausalLm => {
                let head = weights.head(HEAD, [self.outputs(), hidden], false)?;
                Ok(Head::Lm(Some(head)))
            }
            HeadConfig::SequenceClassification { labels, .. } => {
                let head = weights.head(CLASSIFIER, [labels.len(), hidden], false)?;
                Ok(Head::Classifier(head))
            }
        }
    }
}

impl std::ops::Deref for ArchConfig {
    type Target = Common;

    fn deref(&self) -> &Common {
        self.common()
    }
}

#[cfg(test)]
mod tests;

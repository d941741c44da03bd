//! A model with an adapter as memory sees it: widths, ranks, and what each method keeps.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use burn::tensor::Device;
use enamel_adapter::{AdapterConfig, AdapterPlan, MethodConfig, ModuleShape};
use enamel_kernels::{holds_bf16, on_host};
use enamel_model::ArchConfig;

use crate::base::Packed;
use crate::inputs::loftq;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Flex, with this crate's kernels.
    Kernels,
    /// Plain Burn operations on the processor, which keep every intermediate result.
    Reference,
    /// Plain Burn operations on a graphics processor. Nothing but the device's memory counts.
    Gpu,
}

impl Kind {
    /// Of a device.
    pub fn of(device: &Device) -> Self {
        match (holds_bf16(device), on_host(device)) {
            (true, _) => Self::Kernels,
            (false, true) => Self::Reference,
            (false, false) => Self::Gpu,
        }
    }
}

/// A linear layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Full name; empty where the block has none.
    pub name: String,
    /// Columns of its input.
    pub input: usize,
    /// Columns of its output.
    pub out: usize,
    /// Rank of the adapter beside it.
    pub rank: Option<usize>,
    /// Whether the layer itself is trained.
    pub whole: bool,
}

/// A decoder block: q, k, v, o, gate, up and down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// The linear layers in that order.
    pub parts: [Part; 7],
}

/// What the output head is, which may be the embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Whether a gradient for it is wanted: it is trained, or an adapter is on it.
    pub trained: bool,
    /// Whether an adapter is on it, so that it is formed anew in every pass.
    pub adapted: bool,
    /// Whether it does more than multiply: logits of all labelled rows exist at once then.
    pub whole_logits: bool,
}

/// A model and an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSizes {
    /// The decoder blocks.
    pub blocks: Vec<Block>,
    /// Whether the kernels fuse a frozen block's norms with what is behind them.
    pub fuses: bool,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Logits of a row: tokens, or classes.
    pub outputs: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The output head.
    pub head: Head,
    /// The adapter.
    pub adapter: AdapterConfig,
    /// All modules of the base.
    pub modules: Vec<ModuleShape>,
    /// Which of the base's matrices its files have in a quantised form.
    pub packed: Packed,
    /// Numbers of each trained tensor.
    pub trained: Vec<usize>,
    /// Numbers of frozen tensors that come with the adapter.
    pub shared: usize,
    /// Bytes that the adapter's first values are made in, where they are made of the weights (LoftQ).
    pub start: usize,
}

impl ModelSizes {
    /// From a model's configuration and what an adapter's matches.
    pub fn new(config: &ArchConfig, adapter: &AdapterConfig, plan: &AdapterPlan) -> Self {
        let (modules, decoder) = (config.modules(), config.decoder());
        let ranks: HashMap<&str, usize> = plan
            .targets
            .iter()
            .map(|t| (t.name.as_str(), t.r))
            .collect();
        let whole = |name: &str| {
            adapter.trains_everything()
                || plan.saved.iter().any(|s| s.name == name)
                || plan.biases.iter().any(|b| b.name == name)
        };
        let shapes: HashMap<&str, &[usize]> = modules
            .iter()
            .map(|m| (m.name.as_str(), m.shape.as_slice()))
            .collect();
        let shape = config.block();
        let part = |layer: usize, name: Option<&str>| {
            let Some(name) = name else {
                return Part::default();
            };
            let name = format!("{}.{layer}.{name}", shape.prefix);
            let (out, input) = match shapes.get(name.as_str()) {
                Some([out, input]) => (*out, *input),
                _ => (0, 0),
            };
            Part {
                input,
                out,
                rank: ranks.get(name.as_str()).copied(),
                whole: whole(&name),
                name,
            }
        };
        let blocks = (0..config.num_hidden_layers).map(|layer| Block {
            parts: shape.parts.map(|name| part(layer, name)),
        });
        let blocks = blocks.collect();
        let head = config.head_module();
        let adapted = ranks.contains_key(head);
        let rows_trained = plan.tokens.iter().any(|t| t.name == head);
        let bias = plan.biases.iter().any(|b| b.name == head);
        Self {
            blocks,
            fuses: shape.fuses,
            hidden: config.hidden_size,
            inner: decoder.intermediate_size,
            heads: decoder.num_attention_heads,
            head_dim: decoder.head_dim,
            kv_heads: decoder.num_key_value_heads,
            vocabulary: config.vocab_size,
            outputs: config.outputs(),
            tied: config.ties_head(),
            head: Head {
                trained: whole(head) || adapted || rows_trained,
                adapted: adapted || rows_trained,
                whole_logits: bias || (adapted && adapter.drops_inputs()),
            },
            adapter: adapter.clone(),
            packed: Packed::new(),
            trained: trained(&modules, adapter, plan),
            start: match loftq::config(adapter) {
                Some(_) => enamel_adapter::init::loftq::working_bytes(&plan.targets),
                None => 0,
            },
            shared: plan
                .shared
                .iter()
                .map(|(_, [rows, columns])| rows * columns)
                .sum(),
            modules,
        }
    }

    /// Whether nothing of the base is frozen.
    pub fn trains_base(&self) -> bool {
        self.adapter.trains_everything()
    }

    /// Bytes of the gradients that are not there yet when the backward pass enters its last block, or the last
    /// segment of `every` blocks: the blocks' own, as if all were alike, and that of an embedding of its own.
    pub(super) fn gradients_to_come(&self, every: Option<NonZeroUsize>) -> usize {
        let all = super::FLOAT * self.trained.iter().sum::<usize>();
        let of_head = self.head_gradient().min(all);
        let embedding = match self.trains_base() && !self.tied {
            true => super::FLOAT * self.vocabulary * self.hidden,
            false => 0,
        };
        let blocks = all.saturating_sub(of_head + embedding);
        let count = self.blocks.len().max(1);
        let last = every.map_or(1, NonZeroUsize::get).min(count);
        embedding + blocks / count * last
    }

    /// Bytes of the head's gradient, which is there from the loss on.
    pub(super) fn head_gradient(&self) -> usize {
        match self.head.trained {
            true => super::FLOAT * self.outputs * self.hidden,
            false => 0,
        }
    }
}

/// Numbers of each trained tensor.
fn trained(modules: &[ModuleShape], adapter: &AdapterConfig, plan: &AdapterPlan) -> Vec<usize> {
    let product = |shape: &[usize]| shape.iter().product::<usize>();
    if adapter.trains_everything() {
        let weights = modules.iter().map(|m| product(&m.shape));
        let biases = modules
            .iter()
            .filter(|m| m.bias)
            .filter_map(|m| m.shape.first().copied());
        return weights.chain(biases).collect();
    }
    let mut all = Vec::new();
    for target in &plan.targets {
        let parameters = adapter.parameters(target);
        all.extend(parameters.iter().map(|(_, shape)| product(shape)));
    }
    all.extend(plan.saved.iter().map(|saved| saved.params));
    all.extend(plan.biases.iter().map(|bias| bias.len));
    all.extend(plan.tokens.iter().map(|t| t.indices.len() * t.width));
    let rest = plan.trainable.saturating_sub(all.iter().sum());
    // What the plan counts besides: a part of the adapter that belongs to no module.
    all.extend((rest > 0).then_some(rest));
    all
}

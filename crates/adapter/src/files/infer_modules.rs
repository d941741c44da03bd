//! Which modules an adapter is for, from its tensors' names and shapes alone.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::BTreeMap;

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::methods::AdapterConfig;
use crate::methods::facts::{BaseShape, OwnShapes};
use crate::plan::PREFIX;

/// The module that a key of an adapter's file belongs to.
pub fn module_of(key: &str) -> Option<&str> {
    split(key).map(|(module, _)| module)
}

/// What parameters beside a method's own are called after the module's name, in PEFT's files.
const COMMON: [&str; 5] = [
    TOKENS,
    "base_layer.bias",
    "base_layer.weight",
    "weight",
    "bias",
];
/// Single rows of an embedding.
const TOKENS: &str = "token_adapter.trainable_tokens_delta";

/// Module and own name of a key.
pub(crate) fn split(key: &str) -> Option<(&str, &str)> {
    let key = key.strip_prefix(PREFIX).unwrap_or(key);
    let mut found = AdapterConfig::all_keys().chain(COMMON).filter_map(|own| {
        let module = key.strip_suffix(own)?.strip_suffix('.')?;
        key.get(module.len().saturating_add(1)..)
            .map(|own| (module, own))
    });
    found.next()
}

/// The modules that an adapter's tensors (key and shape) are for, with the shapes of the base's weights
/// as far as they follow from them: one side of (IA)³ and the rows of an embedding of which single rows
/// are trained do not, and stand at the least they can be. Where the input's width is a shared matrix's, it is each
/// module's own only where all are of one kind.
pub fn modules_of(config: &AdapterConfig, tensors: &[(&str, &[usize])]) -> Vec<ModuleShape> {
    let mut by_module: BTreeMap<&str, BTreeMap<&str, &[usize]>> = BTreeMap::new();
    for (key, shape) in tensors {
        if let Some((module, own)) = split(key) {
            by_module.entry(module).or_default().insert(own, shape);
        }
    }
    let modules = by_module.into_iter().filter_map(|(name, own)| {
        let shared = tensors;
        module(config, name, &OwnShapes { own, shared })
    });
    modules.collect()
}

fn module(config: &AdapterConfig, name: &str, own: &OwnShapes<'_>) -> Option<ModuleShape> {
    let head = name.rsplit('.').next() == Some("lm_head");
    let linear = if head {
        ModuleKind::Head
    } else {
        ModuleKind::Linear
    };
    let found = |kind, shape: Vec<usize>| {
        Some(ModuleShape {
            name: name.to_string(),
            kind,
            shape,
            bias: own.own.contains_key("bias") || own.own.contains_key("base_layer.bias"),
            transposed: false,
        })
    };
    match config.base_of(own) {
        Some(BaseShape::Linear(out, width)) => return found(linear, vec![out, width]),
        Some(BaseShape::Embedding(rows, width)) => {
            return found(ModuleKind::Embedding, vec![rows, width]);
        }
        None => {}
    }
    if let Some(width) = own.side(TOKENS, 1) {
        let rows = crate::methods::MethodConfig::token_indices(config)
            .and_then(|t| t.for_module(name))
            .and_then(|indices| indices.iter().max())
            .map_or(1, |largest| largest.saturating_add(1));
        return found(ModuleKind::Embedding, vec![rows, width]);
    }
    match own.own.get("weight").map(|shape| shape.to_vec()) {
        Some(shape) if shape.len() == 1 => found(ModuleKind::Norm, shape),
        Some(shape) if name.rsplit('.').next().is_some_and(|n| n.contains("embed")) => {
            found(ModuleKind::Embedding, shape)
        }
        Some(shape) => found(linear, shape),
        // A bias trained by itself: nothing else is known of the layer.
        None => found(linear, vec![own.side("bias", 0)?, 1]),
    }
}

/// Names of the last parts of an adapter's targets, for messages: `q_proj`, `v_proj`.
pub fn kind_of(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

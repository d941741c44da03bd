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
use crate::plan::PREFIX;

/// The module that a key of an adapter's file belongs to.
pub fn module_of(key: &str) -> Option<&str> {
    split(key).map(|(module, _)| module)
}

/// Names that parameters have after the module's, in PEFT's files.
const OWN: [&str; 24] = [
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".lora_A",
    ".lora_B",
    ".lora_E",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_w1",
    ".lokr_w2",
    ".vera_lambda_b",
    ".vera_lambda_d",
    ".ia3_l",
    ".token_adapter.trainable_tokens_delta",
    ".base_layer.bias",
];

/// Module and own name of a key.
pub(crate) fn split(key: &str) -> Option<(&str, &str)> {
    let key = key.strip_prefix(PREFIX).unwrap_or(key);
    let ends = OWN
        .iter()
        .chain(&[".base_layer.weight", ".weight", ".bias"]);
    let mut found = ends.filter_map(|own| {
        let module = key.strip_suffix(own)?;
        Some((module, own.strip_prefix('.')?))
    });
    found.next()
}

/// The modules that an adapter's tensors (key and shape) are for, with the shapes of the base's weights
/// as far as they follow from them: one side of (IA)³ and the rows of an embedding of which single rows
/// are trained do not, and stand at the least they can be. With VeRA the input's width is the shared
/// matrix's, which is each module's own only where all are of one kind.
pub fn modules_of(config: &AdapterConfig, tensors: &[(&str, &[usize])]) -> Vec<ModuleShape> {
    let mut by_module: BTreeMap<&str, BTreeMap<&str, &[usize]>> = BTreeMap::new();
    for (key, shape) in tensors {
        if let Some((module, own)) = split(key) {
            by_module.entry(module).or_default().insert(own, shape);
        }
    }
    let wide = tensors.iter().find(|(key, _)| *key == "base_model.vera_A");
    let wide = wide.and_then(|(_, shape)| shape.get(1).copied());
    let modules = by_module
        .into_iter()
        .filter_map(|(name, own)| module(config, name, &own, wide));
    modules.collect()
}

fn module(
    config: &AdapterConfig,
    name: &str,
    own: &BTreeMap<&str, &[usize]>,
    wide: Option<usize>,
) -> Option<ModuleShape> {
    let side = |key: &str, axis: usize| own.get(key).and_then(|shape| shape.get(axis)).copied();
    let head = name.rsplit('.').next() == Some("lm_head");
    let linear = if head {
        ModuleKind::Head
    } else {
        ModuleKind::Linear
    };
    // Where one of two is missing, what it would have said stands at the least.
    let pair = |b: &str, a: &str| {
        let known = own.contains_key(b) || own.contains_key(a);
        known.then(|| (side(b, 0).unwrap_or(1), side(a, 1).unwrap_or(1)))
    };
    let product = |x: Option<(usize, usize)>, y: Option<(usize, usize)>| {
        let ((a, b), (c, d)) = (x?, y?);
        Some((a.checked_mul(c)?, b.checked_mul(d)?))
    };
    let lokr =
        |whole: &str, left: &str, right: &str| pair(whole, whole).or_else(|| pair(left, right));
    let shape = pair("lora_B.weight", "lora_A.weight")
        .or_else(|| pair("lora_B", "lora_A"))
        .or_else(|| pair("hada_w1_a", "hada_w1_b"))
        .or_else(|| {
            product(
                lokr("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
                lokr("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            )
        })
        .or_else(|| Some((side("vera_lambda_b", 0)?, wide.unwrap_or(1))))
        .or_else(|| pair("ia3_l", "ia3_l"));
    let found = |kind, shape: Vec<usize>| {
        Some(ModuleShape {
            name: name.to_string(),
            kind,
            shape,
            bias: own.contains_key("bias") || own.contains_key("base_layer.bias"),
            transposed: false,
        })
    };
    if let Some((out, width)) = shape {
        return found(linear, vec![out, width]);
    }
    if let Some((width, rows)) = pair("lora_embedding_B", "lora_embedding_A") {
        return found(ModuleKind::Embedding, vec![rows, width]);
    }
    if let Some(width) = side("token_adapter.trainable_tokens_delta", 1) {
        let rows = crate::methods::MethodConfig::token_indices(config)
            .and_then(|t| t.for_module(name))
            .and_then(|indices| indices.iter().max())
            .map_or(1, |largest| largest.saturating_add(1));
        return found(ModuleKind::Embedding, vec![rows, width]);
    }
    match own.get("weight").map(|shape| shape.to_vec()) {
        Some(shape) if shape.len() == 1 => found(ModuleKind::Norm, shape),
        Some(shape) if name.rsplit('.').next().is_some_and(|n| n.contains("embed")) => {
            found(ModuleKind::Embedding, shape)
        }
        Some(shape) => found(linear, shape),
        // A bias trained by itself: nothing else is known of the layer.
        None => found(linear, vec![side("bias", 0)?, 1]),
    }
}

/// Names of the last parts of an adapter's targets, for messages: `q_proj`, `v_proj`.
pub fn kind_of(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

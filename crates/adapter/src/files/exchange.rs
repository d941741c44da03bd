//! PiSSA and OLoRA as plain LoRA, for programs that know nothing of what they took from the base.

use std::collections::HashMap;

use crate::files::store::AdapterFile;
use crate::methods::AdapterConfig;
use crate::methods::lora::config::InitLora;
use crate::model::trainable::HostTensor;

/// Plain LoRA that adds on the untouched base what this adapter and its start add together:
/// `B·A − B₀·A₀ = [B, −B₀]·[A; A₀]`, of twice the rank and, for the same scale, `scale·2r` as alpha.
pub(crate) fn converted(file: AdapterFile, origin: Vec<HostTensor>) -> AdapterFile {
    let AdapterConfig::Lora(mut config) = file.config else {
        return file;
    };
    let double = |r: usize| r.saturating_mul(2);
    // alpha/(2r) = old/r, and alpha/√(2r) = old/√r.
    let factor = if config.use_rslora {
        2.0_f64.sqrt()
    } else {
        2.0
    };
    config.r = double(config.r);
    // Fifteen digits, which come back from JSON as the same number whoever reads them.
    let scaled = |alpha: f64| {
        let product = alpha * factor;
        format!("{product:.14e}").parse().unwrap_or(product)
    };
    config.lora_alpha = scaled(config.lora_alpha);
    // A pattern of one kind alone would leave the other's default in force.
    config
        .rank_pattern
        .iter_mut()
        .for_each(|(_, r)| *r = double(*r));
    config
        .alpha_pattern
        .iter_mut()
        .for_each(|(_, alpha)| *alpha = scaled(*alpha));
    config.init_lora_weights = InitLora::Default;
    let mut origin: HashMap<String, Vec<f32>> = origin
        .into_iter()
        .map(|(key, _, values)| (key, values))
        .collect();
    let tensors = file.tensors.into_iter().map(|(key, shape, values)| {
        let start = match origin.remove(&key) {
            Some(start) => start,
            // An embedding's factors took nothing, but the rank is theirs too.
            None if key.contains(".lora_embedding_") => vec![0.0; values.len()],
            None => return (key, shape, values),
        };
        let [rows, cols] = match shape.as_slice() {
            [rows, cols] => [*rows, *cols],
            // No factor.
            _ => return (key, shape, values),
        };
        if key.ends_with("lora_A.weight") || key.ends_with("lora_embedding_A") {
            let both = values.into_iter().chain(start).collect();
            return (key, vec![double(rows), cols], both);
        }
        let mut both = Vec::with_capacity(double(values.len()));
        for (now, then) in values.chunks(cols.max(1)).zip(start.chunks(cols.max(1))) {
            both.extend_from_slice(now);
            both.extend(then.iter().map(|v| -v));
        }
        (key, vec![rows, double(cols)], both)
    });
    AdapterFile {
        tensors: tensors.collect(),
        config: config.into(),
        base: file.base,
    }
}

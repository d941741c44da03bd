//! What LoRA says of itself, and how one that took a part of the base becomes one that did not.

use std::collections::BTreeMap;

use super::config::{InitLora, LoraConfig};
use super::{A, B, B_BIAS, MAGNITUDE, embedding};
use crate::methods::facts::{
    BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Tensors, Weighing,
};

impl MethodFacts for LoraConfig {
    const KEYS: &'static [&'static str] = &[A, B, B_BIAS, embedding::A, embedding::B, MAGNITUDE];
    // A module of its own from PEFT 0.12 on.
    const LONGER_KEYS: &'static [&'static str] = &["lora_magnitude_vector.weight"];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        if let Some((out, width)) = own.pair(B, A) {
            return Some(BaseShape::Linear(out, width));
        }
        let (width, rows) = own.pair(embedding::B, embedding::A)?;
        Some(BaseShape::Embedding(rows, width))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        match (self.use_dora, self.use_rslora) {
            (true, _) => "DoRA",
            (false, true) => "rsLoRA",
            (false, false) => "LoRA",
        }
    }

    fn headline(&self) -> &'static [&'static str] {
        &["r", "lora_alpha", "lora_dropout"]
    }

    fn remarks(&self) -> Vec<&'static str> {
        let mut remarks = Vec::new();
        if self.use_dora && self.use_rslora {
            remarks.push("rsLoRA");
        }
        if self.init_lora_weights == InitLora::Loftq {
            remarks.push("LoftQ's start");
        }
        if self.init_lora_weights == InitLora::Eva && self.eva_rho() > 1.0 {
            remarks.push("ranks as written (EVA moves them once it has seen the data)");
        }
        remarks
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "r",
            "rank_pattern",
            "lora_alpha",
            "alpha_pattern",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "bias",
            "lora_bias",
            "trainable_token_indices",
            "modules_to_save",
        ]
    }

    fn card_note(&self) -> Option<String> {
        let bits = self.loftq()?.bits?;
        Some(format!(
            "It began as LoftQ: it makes up for what its base lost when it was quantised to {bits} bits. Use it on the \
             base quantised so, not on the dense one."
        ))
    }

    fn rank(&self) -> Option<usize> {
        Some(self.r)
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        if self.use_dora || self.init_lora_weights.subtracts_initial() {
            return Weighing::None;
        }
        Weighing::Factor {
            keys: &[B, B_BIAS, embedding::B],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, has_start: bool) -> Option<&'static str> {
        if self.use_dora {
            return Some(
                "DoRA sets the length of the base's rows, so what it adds depends on the base",
            );
        }
        let took = self.init_lora_weights.subtracts_initial();
        (took && !has_start).then_some(
            "it began with a part of the base's weights (init_lora_weights), and initial_adapter/ \
             with that part is not there",
        )
    }

    fn factor_keys(&self, embedding: bool) -> Option<[&'static str; 2]> {
        match (self.use_dora, embedding) {
            (true, _) => None,
            (false, true) => Some([embedding::A, embedding::B]),
            (false, false) => Some([A, B]),
        }
    }

    fn bias_key(&self) -> Option<&'static str> {
        Some(B_BIAS)
    }

    /// A randomised decomposition cannot be repeated from the weight alone.
    fn start_is_lost(&self) -> Option<String> {
        let InitLora::PissaNiter(steps) = self.init_lora_weights else {
            return None;
        };
        Some(format!(
            "init_lora_weights = \"pissa_niter_{steps}\" took from the base what a randomised decomposition found"
        ))
    }

    /// PiSSA and OLoRA as plain LoRA, which adds on the untouched base what this adapter and its start add
    /// together: `B·A − B₀·A₀ = [B, −B₀]·[A; A₀]`, of twice the rank and, for the same scale, `scale·2r` as alpha.
    fn with_start(
        mut self,
        tensors: Tensors,
        start: BTreeMap<String, Vec<f32>>,
    ) -> (Self, Tensors) {
        let double = |r: usize| r.saturating_mul(2);
        // alpha/(2r) = old/r, and alpha/√(2r) = old/√r.
        let factor = match self.use_rslora {
            true => 2.0_f64.sqrt(),
            false => 2.0,
        };
        self.r = double(self.r);
        // Fifteen digits, which come back from JSON as the same number whoever reads them.
        let scaled = |alpha: f64| {
            let product = alpha * factor;
            format!("{product:.14e}").parse().unwrap_or(product)
        };
        self.lora_alpha = scaled(self.lora_alpha);
        // A pattern of one kind alone would leave the other's default in force.
        self.rank_pattern
            .iter_mut()
            .for_each(|(_, r)| *r = double(*r));
        self.alpha_pattern
            .iter_mut()
            .for_each(|(_, alpha)| *alpha = scaled(*alpha));
        self.init_lora_weights = InitLora::Default;
        let tensors = tensors.into_iter().map(|(key, shape, values)| {
            let is = |own: &str| key.strip_suffix(own).is_some_and(|k| k.ends_with('.'));
            let start = match start.get(&key) {
                Some(start) => start.clone(),
                // An embedding's factors took nothing, but the rank is theirs too.
                None if is(embedding::A) || is(embedding::B) => vec![0.0; values.len()],
                None => return (key, shape, values),
            };
            let [rows, cols] = match shape.as_slice() {
                [rows, cols] => [*rows, *cols],
                // No factor.
                _ => return (key, shape, values),
            };
            if is(A) || is(embedding::A) {
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
        let tensors = tensors.collect();
        (self, tensors)
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        let r = layer.rank;
        if self.use_dora {
            // The base's lengths and DoRA's, and the sum before the factor, which the lengths' gradient wants.
            let own = match self.drops_inputs() {
                true => Kept::dropped(layer, r, 2 * layer.out),
                false => Kept::low_rank(layer, 2 * layer.out),
            };
            return Kept {
                row: own.row + layer.out,
                ..own
            };
        }
        let starts = self.init_lora_weights.subtracts_initial();
        match (self.drops_inputs(), starts) {
            (true, _) if !layer.kernels || starts => Kept::dropped(layer, 2 * r, 0),
            (_, true) => Kept {
                row: 2 * r,
                fuses: !layer.whole,
                ..Kept::low_rank(layer, 2 * layer.factors())
            },
            _ => Kept {
                fuses: !self.lora_bias && !layer.whole,
                ..Kept::low_rank(layer, 0)
            },
        }
    }

    fn drops_inputs(&self) -> bool {
        self.lora_dropout > 0.0
    }
}

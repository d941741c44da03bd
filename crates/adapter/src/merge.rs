//! Folding an adapter into the base weights: the one place that changes them.

use burn::tensor::Tensor;

use crate::error::{AdapterError, Result};
use crate::frozen::Frozen;
use crate::linear::Linear;
use crate::slot::{Adaptable, Slot, SlotRef};

/// The layer's weight with its adapter folded in, `[out, in]`, outside any graph. The layer stays as
/// it is.
pub fn merged_weight(linear: &Linear) -> Tensor<2> {
    untracked(match (&linear.saved, &linear.adapter) {
        (Some(saved), _) => saved.weight.val(),
        (None, Some(adapter)) => linear.weight.val() + adapter.delta_weight(),
        (None, None) => linear.weight.val(),
    })
}

/// A leaf that was trained stays one when it is detached, so both are needed.
fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().set_require_grad(false)
}

/// Folds adapters and trained copies into the base and removes them. All results are checked first:
/// where one is not finite the model stays as it was and the error names the tensor.
pub fn merge<M: Adaptable>(model: &mut M) -> Result<()> {
    if crate::attach::attached(model).is_none() {
        return Err(AdapterError::NoAdapter);
    }
    check(model)?;
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => {
            if linear.adapter.is_some() || linear.saved.is_some() {
                let weight = merged_weight(linear);
                linear.weight = linear.weight.clone().map(|_| weight);
            }
            if let Some(bias) = linear.saved.as_ref().and_then(|saved| saved.bias.as_ref()) {
                let bias = untracked(bias.val());
                linear.bias = linear.bias.take().map(|old| old.map(|_| bias));
            }
            linear.adapter = None;
            linear.saved = None;
            linear.enabled = true;
        }
        Slot::Embedding(table) => fold(table),
        Slot::Norm(norm) => fold(norm),
    });
    Ok(())
}

fn fold<const D: usize>(frozen: &mut Frozen<D>) {
    if let Some(saved) = &frozen.saved {
        let value = untracked(saved.val());
        frozen.weight = frozen.weight.clone().map(|_| value);
    }
    frozen.drop_saved();
}

fn check<M: Adaptable>(model: &M) -> Result<()> {
    let mut bad = None;
    model.for_each_slot_ref(&mut |name, slot| {
        if bad.is_some() {
            return;
        }
        let fine = match slot {
            SlotRef::Linear(linear) => {
                let weight = linear.adapter.is_none() && linear.saved.is_none()
                    || finite(merged_weight(linear));
                let bias = linear.saved.as_ref().and_then(|saved| saved.bias.as_ref());
                weight && bias.is_none_or(|b| finite(b.val()))
            }
            SlotRef::Embedding(table) => {
                table.saved.as_ref().is_none_or(|saved| finite(saved.val()))
            }
            SlotRef::Norm(norm) => norm.saved.as_ref().is_none_or(|saved| finite(saved.val())),
        };
        if !fine {
            bad = Some(format!("{name}.weight, merged,"));
        }
    });
    bad.map_or(Ok(()), |name| Err(AdapterError::NonFinite(name)))
}

/// Whether no element is NaN or infinite.
fn finite<const D: usize>(tensor: Tensor<D>) -> bool {
    // One value to read back. A sum would overflow on large finite values; the largest magnitude
    // cannot.
    tensor
        .without_autodiff()
        .is_finite()
        .all()
        .into_scalar::<bool>()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::config::{LoraConfig, Targets};
    use crate::testing::{Tiny, difference, perturb};
    use crate::{attach, export_trainable, import_trainable, trainable};
    use burn::module::Module;
    use burn::tensor::Device;

    fn adapted(device: &Device) -> Tiny {
        let cfg = LoraConfig {
            target_modules: Some(Targets::AllLinear),
            modules_to_save: Some(vec![
                "lm_head".into(),
                "embed_tokens".into(),
                "model.norm".into(),
            ]),
            lora_alpha: 16.0,
            ..LoraConfig::default()
        };
        let mut model = Tiny::new(device);
        attach(&mut model, &cfg, 1).unwrap();
        perturb(&mut model);
        model
    }

    #[test]
    fn the_merged_model_computes_what_the_adapted_one_did() {
        let mut model = adapted(&Device::flex());
        let with = model.logits();
        merge(&mut model).unwrap();
        assert!(trainable(&model).is_empty());
        // W + s·B·A is rounded once per element before the product: 64 to 96 products below 1, six
        // layers deep.
        let largest = with.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(difference(&with, &model.logits()) < 1e-5 * largest.max(1.0));
        assert!(matches!(merge(&mut model), Err(AdapterError::NoAdapter)));
    }

    #[test]
    fn a_merged_training_model_is_frozen_and_outside_the_graph() {
        let mut model = adapted(&Device::flex()).train();
        merge(&mut model).unwrap();
        assert!(
            !model
                .forward(crate::testing::ids(&Device::flex().autodiff()))
                .is_tracked()
        );
        assert!(
            !model
                .valid()
                .train()
                .forward(crate::testing::ids(&Device::flex().autodiff()))
                .is_tracked()
        );
    }

    #[test]
    fn a_result_that_is_not_finite_is_refused_and_nothing_changes() {
        let mut model = adapted(&Device::flex());
        let mut state = export_trainable(&model).unwrap();
        let place = state
            .iter()
            .position(|(key, ..)| key.contains("1.mlp.up_proj.lora_A"))
            .unwrap();
        state[place].2[0] = f32::INFINITY;
        import_trainable(&mut model, state).unwrap();
        let before = export_trainable(&model).unwrap();
        let message = merge(&mut model).unwrap_err().to_string();
        assert!(
            message.contains("model.layers.1.mlp.up_proj.weight"),
            "{message}"
        );
        assert_eq!(export_trainable(&model).unwrap(), before);
    }
}

//! Folding adapters into the base weights and taking them out again: the one place that changes them.

use std::sync::Arc;

use burn::module::Param;
use burn::tensor::Tensor;

use crate::base::Base;
use crate::base::ids::frozen_param;
use crate::base::routing::Routing;
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, Slot, SlotRef, UseOfPart, model_part};
use crate::layers::frozen::{Frozen, UnmergedFrozen};
use crate::layers::linear::{Linear, UnmergedLinear};
use crate::model::active::{refuse_merged, routing};
use crate::model::attach::detach;

/// The layer's weight with the adapters in use folded in, `[out, in]`, outside any graph. The layer
/// stays as it is.
pub fn merged_weight(linear: &Linear) -> Tensor<2> {
    untracked(linear.weight_in_use())
}

/// A leaf that was trained stays one when it is detached, so both are needed.
fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().set_require_grad(false)
}

/// Folds the adapters in use (their copies, biases and rows too) into the base and removes all of them:
/// PEFT's `merge_and_unload`. All results are checked first: where one is not finite the model stays as
/// it was and the error names the tensor.
///
/// # Errors
/// Nothing to merge, a batch whose rows have adapters of their own, a result that is not finite.
pub fn merge<M: Adaptable>(model: &mut M) -> Result<()> {
    let names = in_use(model)?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    merge_adapters(model, &names)?;
    forget(model);
    detach(model);
    Ok(())
}

/// Folds the named adapters into the base (in f32, whatever it was held in), one after the other, and keeps what was there for
/// [`unmerge`]: PEFT's `merge_adapter`. What adapters are in use makes no difference until then.
///
/// # Errors
/// As for [`merge`]; adapters that are merged already.
pub fn merge_adapters<M: Adaptable>(model: &mut M, names: &[&str]) -> Result<()> {
    refuse_model_part(model)?;
    let have = crate::model::active::adapters(model);
    if names.is_empty() || have.is_empty() {
        return Err(AdapterError::NoAdapter);
    }
    let missing = names.iter().filter(|name| !have.iter().any(|h| h == *name));
    let problems: Vec<String> = missing
        .map(|name| format!("there is no adapter {name:?}"))
        .collect();
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    refuse_merged(model)?;
    let names = crate::model::active::each_once(names);
    let once: Vec<&str> = names.iter().map(String::as_str).collect();
    let problems = crate::model::active::conflicts(model, &once);
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    check(model, &names)?;
    model.for_each_slot(&mut |name, slot| match slot {
        Slot::Linear(linear) => {
            if linear.parts.iter().any(|part| names.contains(&part.name)) {
                let base = linear.folded(&names);
                let old = UnmergedLinear {
                    weight: linear.weight.clone(),
                    bias: linear.bias.clone(),
                };
                let merged = untracked(base.weight.dense());
                linear.weight = old.weight.with_values(&format!("{name}.weight"), merged);
                linear.bias = match (&old.bias, base.bias) {
                    (Some(old), Some(new)) => Some(with_value(old, new)),
                    // An adapter with a bias of its own on a layer that had none.
                    (None, Some(new)) => {
                        Some(frozen_param(&format!("{name}.bias"), untracked(new)))
                    }
                    (_, None) => None,
                };
                linear.unmerged = Some(old);
            }
        }
        Slot::Embedding(table) => {
            if table.parts.iter().any(|part| names.contains(&part.name)) {
                let old = table.weight.clone();
                let merged = untracked(table.folded(&names).dense());
                table.weight = old.with_values(&format!("{name}.weight"), merged);
                table.unmerged = Some(old);
            }
        }
        Slot::Norm(norm) => fold(norm, &names),
        Slot::Conv(conv) => fold(conv, &names),
        Slot::Param(param) => fold(param, &names),
    });
    Ok(())
}

/// Takes merged adapters out again. What was kept is put back, so the base is what it was to the bit.
pub fn unmerge<M: Adaptable>(model: &mut M) {
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => {
            if let Some(old) = linear.unmerged.take() {
                linear.weight = old.weight;
                linear.bias = old.bias;
            }
        }
        Slot::Embedding(table) => {
            if let Some(old) = table.unmerged.take() {
                table.weight = old;
            }
        }
        Slot::Norm(norm) => unfold(norm),
        Slot::Conv(conv) => unfold(conv),
        Slot::Param(param) => unfold(param),
    });
}

/// Makes a merge final.
fn forget<M: Adaptable>(model: &mut M) {
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => linear.unmerged = None,
        Slot::Embedding(table) => table.unmerged = None,
        Slot::Norm(norm) => norm.unmerged = None,
        Slot::Conv(conv) => conv.unmerged = None,
        Slot::Param(param) => param.unmerged = None,
    });
}

/// The adapters in use, where every row has the same.
fn in_use<M: Adaptable>(model: &M) -> Result<Arc<[String]>> {
    refuse_model_part(model)?;
    match routing(model) {
        Routing::Active(names) => Ok(names),
        Routing::Rows(_) => Err(AdapterError::Choice {
            problems: vec![
                "the rows of a batch have adapters of their own; choose one first".into(),
            ],
        }),
        Routing::Gated(_) => Err(AdapterError::Choice {
            problems: vec![
                "adapters are mixed anew for each token, so no weights stand for them".into(),
            ],
        }),
    }
}

/// Nothing is merged beside an adapter with a part at the model: its other parts would no longer be beside the
/// base they know.
fn refuse_model_part<M: Adaptable>(model: &M) -> Result<()> {
    match model_part(model) {
        None => Ok(()),
        Some(part) => Err(AdapterError::Choice {
            problems: vec![part.refusal(UseOfPart::Merged)],
        }),
    }
}

fn with_value<const D: usize>(param: &Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let value = untracked(value);
    param.clone().map(|_| value)
}

/// Puts the trained copies that these adapters have in the place of the base's.
fn fold<const D: usize>(module: &mut Frozen<D>, names: &[String]) {
    if !module.parts.iter().any(|part| names.contains(&part.name)) {
        return;
    }
    let old = UnmergedFrozen {
        weight: module.weight.clone(),
        bias: module.bias.clone(),
    };
    let bias = module.folded_bias(names);
    module.weight = with_value(&old.weight, module.folded(names));
    module.bias = match (&old.bias, bias) {
        (Some(old), Some(new)) => Some(with_value(old, new)),
        _ => None,
    };
    module.unmerged = Some(old);
}

/// Puts the base's own values back.
fn unfold<const D: usize>(module: &mut Frozen<D>) {
    if let Some(old) = module.unmerged.take() {
        module.weight = old.weight;
        module.bias = old.bias;
    }
}

/// Which parameter is not finite under these adapters.
fn not_finite<const D: usize>(module: &Frozen<D>, names: &[String]) -> Option<&'static str> {
    if !finite(module.folded(names)) {
        return Some("weight");
    }
    let bias = module.folded_bias(names);
    bias.filter(|bias| !finite(bias.clone())).map(|_| "bias")
}

fn check<M: Adaptable>(model: &M, names: &[String]) -> Result<()> {
    let mut bad = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let touched = slot.adapters().iter().any(|a| names.iter().any(|n| n == a));
        if bad.is_some() || !touched {
            return;
        }
        let parameter = match slot {
            SlotRef::Linear(linear) => {
                let Base { weight, bias } = linear.folded(names);
                if !finite(weight.dense()) {
                    Some("weight")
                } else if bias.is_some_and(|bias| !finite(bias)) {
                    Some("bias")
                } else {
                    None
                }
            }
            SlotRef::Embedding(table) => (!finite(table.folded(names).dense())).then_some("weight"),
            SlotRef::Norm(norm) => not_finite(norm, names),
            SlotRef::Conv(conv) => not_finite(conv, names),
            SlotRef::Param(param) => not_finite(param, names),
        };
        bad = parameter.map(|parameter| format!("{name}.{parameter}, merged,"));
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
    use crate::config::Targets;
    use crate::methods::lora::config::LoraConfig;
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

//! Folding an adapter into the base weights: the one place that changes them.

use burn::tensor::Tensor;

use crate::error::{AdapterError, Result};
use crate::frozen::Frozen;
use crate::linear::Linear;
use crate::slot::{Adaptable, Slot, SlotRef};

/// The layer's weight with its adapter folded in, `[out, in]`, outside any graph. The layer stays as
/// it is.
pub fn merged_weight(linear: &Linear) -> Tensor<2> {
    match (&linear.saved, &linear.adapter) {
        (Some(saved), _) => saved.weight.val().detach(),
        (None, Some(adapter)) => (linear.weight.val() + adapter.delta_weight()).detach(),
        (None, None) => linear.weight.val().detach(),
    }
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
                let bias = bias.val().detach();
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
        let value = saved.val().detach();
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

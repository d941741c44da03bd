//! LoftQ: first values of LoRA's factors that make up for what quantising the base lost.
//!
//! Li et al. 2023 (arXiv:2310.08659) look in turn for a quantised Q and factors with `Q + s·B·A` near the
//! weight W. This is their first turn, which leaves the base alone: Q is W quantised, and `s·B·A` is the best
//! approximation of rank r to `W − Q` (Eckart and Young), as PEFT's `replace_lora_weights_loftq` has it. From
//! the second turn on Q is another base than the quantised model, which an adapter's file could not name.
//!
//! PEFT leaves the scale out of it, so that its factors make up for the loss at `s = 1` alone (at `s = 2` the
//! leading terms change their sign and nothing is gained). Here they are divided by it, as PiSSA's are.

use std::collections::BTreeMap;
use std::fmt;

use enamel_kernels::PackedWeight;
use rayon::prelude::*;

use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::linalg::{LinalgError, Matrix, svd_truncated};
use crate::methods::InitFactors;
use crate::methods::lora::config::LoraConfig;
use crate::methods::lora::init::{failed, shared};
use crate::model::attach::shapes;
use crate::model::plan::plan;
use crate::plan::TargetPlan;

/// Layers that are decomposed at a time, at most: each takes memory for a few dense copies of its weight.
const AT_ONCE: usize = 2;

/// Bytes that [`start`] works in at its largest: a layer's residual in f32 and f64, and nine squares of its
/// smaller side in f64 (measured: what the decomposition keeps and forms), for the largest two layers.
pub fn working_bytes(targets: &[TargetPlan]) -> usize {
    let linear = targets.iter().filter(|target| !target.embedding);
    let mut sizes: Vec<usize> = linear
        .map(|target| {
            let (out, width) = (target.out_features, target.in_features);
            12 * out * width + 72 * out.min(width).pow(2)
        })
        .collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.into_iter().take(AT_ONCE).sum()
}

/// The values of a module's weight `[out, in]` as they were before it was quantised, row-major.
pub type Original<'a> = dyn Fn(&str) -> Result<Vec<f32>> + Sync + 'a;

/// What LoftQ starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct LoftqStart {
    /// The factors of each layer that is quantised and lost something by it, by module.
    pub factors: BTreeMap<String, InitFactors>,
    /// `‖W − Q‖²` (Frobenius) of each of them, and `‖W − Q − s·B·A‖²`.
    pub errors: BTreeMap<String, [f64; 2]>,
    /// Adapted layers that are not quantised, or lost nothing: they start as LoRA does.
    pub others: usize,
}

impl LoftqStart {
    /// The factors' first values for [`attach_given`](crate::attach_given).
    pub fn given(&self) -> impl Fn(&str) -> Option<InitFactors> + '_ {
        |module| self.factors.get(module).cloned()
    }
}

impl fmt::Display for LoftqStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = |i: usize| self.errors.values().map(|e| e[i]).sum::<f64>().sqrt();
        let (before, after) = (total(0), total(1));
        write!(
            f,
            "{} quantised layers are off by {before:.3} in all (Frobenius), with their factors by {after:.3}",
            self.factors.len()
        )?;
        match self.others {
            0 => Ok(()),
            n => write!(f, "; {n} other adapted layers start as LoRA does"),
        }
    }
}

/// LoftQ's factors for the quantised layers among `config`'s targets. `original` is asked for one weight at a
/// time on each of a few threads. The same on any number of them.
///
/// # Errors
/// Targets that do not fit; none that is quantised; what `original` says; values that are not finite.
pub fn start<M: Adaptable>(
    model: &M,
    config: &LoraConfig,
    original: &Original<'_>,
) -> Result<LoftqStart> {
    let plan = plan(&shapes(model), config)?;
    let mut layers: Vec<(&TargetPlan, PackedWeight)> = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        let target = plan.targets.iter().find(|target| target.name == name);
        if let (Some(target), SlotRef::Linear(linear)) = (target, slot)
            && let Some(packed) = linear.weight.packed()
        {
            layers.push((target, packed.clone()));
        }
    });
    if layers.is_empty() {
        return Err(AdapterError::Config {
            origin: "adapter configuration".into(),
            problems: vec![
                "init_lora_weights = \"loftq\" makes up for what quantising the base lost, and no layer among \
                 target_modules is quantised"
                    .into(),
            ],
        });
    }
    let mut start = LoftqStart {
        factors: BTreeMap::new(),
        errors: BTreeMap::new(),
        others: plan.targets.len() - layers.len(),
    };
    for some in layers.chunks(AT_ONCE) {
        let made: Vec<_> = some
            .par_iter()
            .map(|(target, packed)| Ok((*target, layer(target, packed, original)?)))
            .collect::<Result<_>>()?;
        for (target, made) in made {
            let Some((factors, errors)) = made else {
                start.others += 1;
                continue;
            };
            start.factors.insert(target.name.clone(), factors);
            start.errors.insert(target.name.clone(), errors);
        }
    }
    Ok(start)
}

/// The factors of one layer, and the squares of its error without and with them; nothing where it has none.
fn layer(
    target: &TargetPlan,
    packed: &PackedWeight,
    original: &Original<'_>,
) -> Result<Option<(InitFactors, [f64; 2])>> {
    let mut residual = original(&target.name)?;
    let size = target.out_features * target.in_features;
    if residual.len() != size {
        let error = LinalgError::Shape(format!(
            "the weight before it was quantised has {} values, not {size}",
            residual.len()
        ));
        return Err(failed(target, error));
    }
    residual
        .iter_mut()
        .zip(packed.values())
        .for_each(|(w, q)| *w -= q);
    let lost = residual.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
    if lost == 0.0 {
        return Ok(None);
    }
    let residual = Matrix::new(target.out_features, target.in_features, residual);
    let svd = residual
        .and_then(|residual| svd_truncated(&residual, target.r))
        .map_err(|error| failed(target, error))?;
    let made_up = svd.s.iter().map(|s| s * s).sum::<f64>();
    let (a, b) = shared(&svd, target);
    let factors = InitFactors { a, b: Some(b) };
    Ok(Some((factors, [lost, (lost - made_up).max(0.0)])))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

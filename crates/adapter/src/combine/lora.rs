//! One module's factors from several LoRAs (PEFT's `add_weighted_adapter`, one layer of it).

use super::prune::{Draw, Masks, by_magnitude, by_mask, elected_mean, weighted_sum};
use super::{CombinationType, CombineError, CombinePlan};
use crate::linalg::{LinalgError, Matrix, Svd, ThinSvd};

/// A LoRA's share of one layer's weight: the delta is `scale · b · a`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFactors {
    /// `lora_A`, `[r, in]`.
    pub a: Matrix,
    /// `lora_B`, `[out, r]`.
    pub b: Matrix,
    /// `lora_alpha / r`, or what takes its place.
    pub scale: f64,
}

impl LoraFactors {
    /// The delta, `[out, in]`.
    pub fn delta(&self) -> Result<Matrix, LinalgError> {
        Ok(self.b.matmul(&self.a)?.scaled(self.scale as f32))
    }
}

/// An adapter in a module: its place in the list, its weight, its factors.
type Input<'a> = (usize, f64, &'a LoraFactors);

/// The factors of the combined adapter in one module, of the plan's rank and with scale 1.
///
/// `adapters` are in the order in which the plan was made; an adapter that does not change this module
/// is `None` and left out, as PEFT leaves it out. At least one has to be there. Where the result has a
/// lower rank than the plan (an adapter is missing from `cat`, a `rank_pattern`, a layer smaller than
/// the rank), the rest of the factors is zero.
pub fn combine_module(
    plan: &CombinePlan,
    module: &str,
    adapters: &[Option<&LoraFactors>],
    masks: &mut dyn Masks,
) -> Result<LoraFactors, CombineError> {
    let inputs: Vec<Input<'_>> = adapters
        .iter()
        .zip(&plan.weights)
        .enumerate()
        .filter_map(|(place, (factors, &weight))| factors.map(|f| (place, weight, f)))
        .collect();
    check(plan, adapters.len(), &inputs).map_err(|problems| CombineError::Module {
        module: module.to_owned(),
        problems,
    })?;
    let linalg = |source| CombineError::Linalg {
        module: module.to_owned(),
        source,
    };
    let (a, b) = match plan.kind {
        CombinationType::Cat => cat(&inputs).map_err(linalg)?,
        CombinationType::Svd => {
            let (a, b) = cat(&inputs).map_err(linalg)?;
            let svd = ThinSvd::of_product(&b, &a).map_err(linalg)?;
            truncated(plan, &svd).map_err(linalg)?
        }
        kind if kind.truncates() => {
            let (rows, cols) = (inputs[0].2.b.rows(), inputs[0].2.a.cols());
            let mut deltas = Vec::with_capacity(inputs.len());
            for (_, _, factors) in &inputs {
                deltas.push(factors.delta().map_err(linalg)?.into_data());
            }
            let weights: Vec<f32> = inputs.iter().map(|&(_, weight, _)| weight as f32).collect();
            let merged = merge(
                plan,
                module,
                "delta_weight",
                deltas,
                &inputs,
                &weights,
                masks,
            )?;
            let merged = Matrix::new(rows, cols, merged).map_err(linalg)?;
            let svd = ThinSvd::new(&merged).map_err(linalg)?;
            truncated(plan, &svd).map_err(linalg)?
        }
        _ => by_factor(plan, module, &inputs, masks)?,
    };
    let (rows, cols) = (b.rows(), a.cols());
    let a = a.padded(plan.rank, cols).map_err(linalg)?;
    let b = b.padded(rows, plan.rank).map_err(linalg)?;
    Ok(LoraFactors { a, b, scale: 1.0 })
}

fn check(plan: &CombinePlan, given: usize, inputs: &[Input<'_>]) -> Result<(), Vec<String>> {
    let mut problems = Vec::new();
    if given != plan.weights.len() {
        problems.push(format!(
            "{given} adapters are given, but the combination was planned for {}",
            plan.weights.len()
        ));
    }
    let Some((_, _, first)) = inputs.first() else {
        problems.push("none of the adapters changes this module; leave it out".to_owned());
        return Err(problems);
    };
    let stacked = !plan.kind.truncates() && plan.kind != CombinationType::Cat;
    let mut ranks = 0;
    for (place, _, factors) in inputs {
        let (a, b) = (&factors.a, &factors.b);
        let number = place + 1;
        if a.rows() != b.cols() {
            problems.push(format!(
                "adapter {number} has a lora_A of rank {} and a lora_B of rank {}",
                a.rows(),
                b.cols()
            ));
        }
        if (a.cols(), b.rows()) != (first.a.cols(), first.b.rows()) {
            problems.push(format!(
                "adapter {number} is for a [{}, {}] weight, others for [{}, {}]",
                b.rows(),
                a.cols(),
                first.b.rows(),
                first.a.cols()
            ));
        }
        if stacked && a.rows() != first.a.rows() {
            problems.push(format!(
                "adapter {number} has rank {} here, others {}; {} needs one rank, use cat or svd",
                a.rows(),
                first.a.rows(),
                plan.kind.name()
            ));
        }
        if !factors.scale.is_finite() {
            problems.push(format!("adapter {number} has the scale {}", factors.scale));
        }
        // An election would drop a NaN without a word.
        for (name, part) in [("lora_A", a), ("lora_B", b)] {
            if let Err(error) = part.check_finite() {
                problems.push(format!("{name} of adapter {number}: {error}"));
            }
        }
        ranks = if stacked {
            ranks.max(a.rows())
        } else {
            ranks + a.rows()
        };
    }
    if !plan.kind.truncates() && ranks > plan.rank {
        problems.push(format!(
            "the factors have rank {ranks}, more than the {} that was planned from the \
             configurations",
            plan.rank
        ));
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// Every `A` with weight and scale above the other, every `B` beside the other.
fn cat(inputs: &[Input<'_>]) -> Result<(Matrix, Matrix), LinalgError> {
    let a: Vec<Matrix> = inputs
        .iter()
        .map(|&(_, weight, f)| f.a.clone().scaled(weight as f32).scaled(f.scale as f32))
        .collect();
    let b: Vec<&Matrix> = inputs.iter().map(|(_, _, f)| &f.b).collect();
    Ok((
        Matrix::stack_rows(&a.iter().collect::<Vec<_>>())?,
        Matrix::stack_cols(&b)?,
    ))
}

/// `A` and `B` merged each on its own. Both get the root of weight times scale; a negative sign goes
/// to `A` alone, or the two would cancel.
fn by_factor(
    plan: &CombinePlan,
    module: &str,
    inputs: &[Input<'_>],
    masks: &mut dyn Masks,
) -> Result<(Matrix, Matrix), CombineError> {
    let share = |&(_, weight, f): &Input<'_>| weight * f.scale;
    let roots: Vec<f32> = inputs
        .iter()
        .map(|i| share(i).abs().sqrt() as f32)
        .collect();
    let signed: Vec<f32> = inputs
        .iter()
        .zip(&roots)
        .map(|(i, root)| if share(i) >= 0.0 { *root } else { -root })
        .collect();
    let mut merged = |tensor, weights: &[f32], part: fn(&LoraFactors) -> &Matrix| {
        let tensors = inputs
            .iter()
            .map(|(_, _, f)| part(f).data().to_vec())
            .collect();
        let values = merge(plan, module, tensor, tensors, inputs, weights, masks)?;
        let shape = part(inputs[0].2);
        Matrix::new(shape.rows(), shape.cols(), values).map_err(|source| CombineError::Linalg {
            module: module.to_owned(),
            source,
        })
    };
    Ok((
        merged("lora_A", &signed, |f| &f.a)?,
        merged("lora_B", &roots, |f| &f.b)?,
    ))
}

/// Prunes the tensors of all adapters and merges them, as the plan's type says.
fn merge(
    plan: &CombinePlan,
    module: &str,
    tensor: &'static str,
    mut tensors: Vec<Vec<f32>>,
    inputs: &[Input<'_>],
    weights: &[f32],
    masks: &mut dyn Masks,
) -> Result<Vec<f32>, CombineError> {
    use CombinationType as T;
    match plan.kind {
        T::Ties | T::TiesSvd | T::MagnitudePrune | T::MagnitudePruneSvd => {
            tensors
                .iter_mut()
                .for_each(|values| by_magnitude(values, plan.density));
        }
        T::DareLinear | T::DareLinearSvd | T::DareTies | T::DareTiesSvd if plan.density < 1.0 => {
            for (values, &(adapter, ..)) in tensors.iter_mut().zip(inputs) {
                let draw = Draw {
                    module,
                    tensor,
                    adapter,
                };
                let mask = masks.mask(draw, plan.density, values.len());
                if mask.len() != values.len() {
                    return Err(CombineError::Module {
                        module: module.to_owned(),
                        problems: vec![format!(
                            "the mask for {tensor} of adapter {} has {} entries, not {}",
                            adapter + 1,
                            mask.len(),
                            values.len()
                        )],
                    });
                }
                by_mask(values, &mask, plan.density);
            }
        }
        _ => {}
    }
    Ok(match plan.kind {
        T::Ties | T::TiesSvd | T::DareTies | T::DareTiesSvd => {
            elected_mean(&tensors, weights, plan.majority_sign)
        }
        _ => weighted_sum(&tensors, weights),
    })
}

/// `A = Vᵀ` and `B = U·S` at the plan's rank, or at the rank that the layer can have.
fn truncated(plan: &CombinePlan, svd: &ThinSvd) -> Result<(Matrix, Matrix), LinalgError> {
    let terms: Svd = svd.truncated(plan.rank.min(svd.singular_values().len()))?;
    let (mut a, mut b) = (terms.vt.clone(), terms.us());
    if let Some(quantile) = plan.svd_clamp {
        let high = quantile_of(b.data().iter().chain(a.data()).copied().collect(), quantile);
        for value in a.data_mut().iter_mut().chain(b.data_mut()) {
            *value = value.max(-high).min(high);
        }
    }
    Ok((a, b))
}

/// The quantile with linear interpolation between neighbours (`torch.quantile`); 0 of nothing.
fn quantile_of(mut values: Vec<f32>, quantile: f64) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    values.sort_unstable_by(f32::total_cmp);
    let place = quantile * (values.len() - 1) as f64;
    let (low, high) = (
        values[place.floor() as usize],
        values[place.ceil() as usize],
    );
    (f64::from(low) + (f64::from(high) - f64::from(low)) * place.fract()) as f32
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;

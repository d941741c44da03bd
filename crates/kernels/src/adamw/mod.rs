//! The optimizer's part of a step: the gradient's norm and AdamW, each one pass over all parameters.
//!
//! Parameters are handed in together, as vectors: an adapter has hundreds of small ones, and taken one by
//! one neither the threads nor the memory would be kept busy.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// Elements that share a scale where moments are held in 8 bits, as in bitsandbytes' 8-bit optimizers.
pub const MOMENT_BLOCK: usize = 256;

/// AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as `torch.optim.AdamW` computes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, a rate to be multiplied by the learning rate.
    pub weight_decay: f64,
}

/// One parameter before a step. Tensors whose last handle this is are overwritten, others copied.
#[derive(Clone, Debug)]
pub struct AdamWInput {
    /// The parameter.
    pub value: Tensor<1>,
    /// Its gradient, before the step's factor.
    pub grad: Tensor<1>,
    /// The moments; zeros before the first step.
    pub moments: Moments,
    /// Learning rate.
    pub rate: f64,
    /// Which step of this parameter it is, counted from 1.
    pub time: usize,
}

/// Running means of a parameter's gradient and of its square.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Mean of the gradient.
    pub first: Tensor<1>,
    /// Mean of the gradient's square.
    pub second: Tensor<1>,
}

/// The numbers of one parameter's step, from double precision as PyTorch has them.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    /// Factor of the gradient.
    factor: f64,
    /// What weight decay leaves: `1 − rate · weight_decay`.
    kept: f64,
    /// `1 − β1`.
    rest1: f64,
    beta2: f64,
    /// `1 − β2`.
    rest2: f64,
    /// `(1 − β1^t) / √(1 − β2^t)`: the first moment's correction is taken into the divisor, as beside the rate it
    /// could carry a very high one beyond f32.
    root: f64,
    /// `(1 − β1^t) ε`.
    epsilon: f64,
    rate: f64,
}

impl AdamW {
    fn numbers(&self, factor: f64, rate: f64, time: usize) -> Numbers {
        let past = |beta: f64| 1.0 - beta.powf(time as f64);
        Numbers {
            factor,
            kept: 1.0 - rate * self.weight_decay,
            rest1: 1.0 - self.beta1,
            beta2: self.beta2,
            rest2: 1.0 - self.beta2,
            root: past(self.beta1) / past(self.beta2).sqrt(),
            epsilon: past(self.beta1) * self.epsilon,
            rate,
        }
    }
}

/// One step of AdamW for every parameter; the new values and moments, in the order of the parameters.
/// With `g` the gradient times `factor` (of clipping; 1 for none):
///
/// - `m ← m + (1 − β1)(g − m)`, `v ← β2 v + (1 − β2) g²`
/// - `p ← (1 − rate · decay) p − rate / (1 − β1^t) · m / (√v / √(1 − β2^t) + ε)`
///
/// No gradient flows: the tensors are plain ones, without autodiff. The result does not depend on the
/// number of threads.
///
/// # Panics
/// If the tensors of a parameter differ in length.
pub fn adamw(
    settings: &AdamW,
    factor: f64,
    parameters: Vec<AdamWInput>,
) -> Vec<(Tensor<1>, Moments)> {
    for p in &parameters {
        let n = p.value.dims();
        assert!(
            n == p.grad.dims() && n == p.moments.first.dims() && n == p.moments.second.dims(),
            "a parameter, its gradient and its moments have the same length"
        );
    }
    let fast = parameters.iter().all(|p| {
        let moments = &p.moments;
        [&p.value, &p.grad, &moments.first, &moments.second]
            .iter()
            .all(|t| plain(t))
    });
    if fast {
        return cpu::adamw(settings, factor, parameters);
    }
    if let Some(p) = parameters.first() {
        note_fallback("adamw", &[&p.value, &p.grad]);
    }
    let step = |p: AdamWInput| reference::adamw(&settings.numbers(factor, p.rate, p.time), p);
    parameters.into_iter().map(step).collect()
}

/// Sum of the squares of all elements: with its root, the global norm of a gradient. Read back from the
/// device once, NaN if that fails; in double precision on a CPU, and the same bits whatever the number of
/// threads.
pub fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    if tensors.iter().all(plain) {
        return cpu::sum_of_squares(tensors);
    }
    if let Some(t) = tensors.first() {
        note_fallback("gradient norm", &[t]);
    }
    reference::sum_of_squares(tensors)
}

fn plain(t: &Tensor<1>) -> bool {
    t.on_flex() && !t.is_autodiff()
}

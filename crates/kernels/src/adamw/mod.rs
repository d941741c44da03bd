//! The optimizer's part of a step: the gradient's norm and AdamW, each one pass over all parameters.
//!
//! Parameters are handed in together, as vectors: an adapter has hundreds of small ones, and taken one by
//! one neither the threads nor the memory would be kept busy.

mod cpu;
mod eight_bit;
mod host;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::{DType, Device, Int, Tensor};

pub use host::{HostCodes, HostMoments, Paging, adamw_host};

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
pub struct AdamWInput<M = Moments> {
    /// The parameter.
    pub value: Tensor<1>,
    /// Its gradient, before the step's factor.
    pub grad: Tensor<1>,
    /// The moments; zeros before the first step.
    pub moments: M,
    /// Learning rate.
    pub rate: f64,
    /// Which step of this parameter it is, counted from 1.
    pub time: usize,
}

impl AdamWInput<()> {
    /// The parameter with its moments.
    pub fn with<M>(self, moments: M) -> AdamWInput<M> {
        AdamWInput {
            value: self.value,
            grad: self.grad,
            moments,
            rate: self.rate,
            time: self.time,
        }
    }
}

impl<M> AdamWInput<M> {
    /// The moments, and the rest.
    fn split(self) -> (M, AdamWInput<()>) {
        let rest = AdamWInput {
            value: self.value,
            grad: self.grad,
            moments: (),
            rate: self.rate,
            time: self.time,
        };
        (self.moments, rest)
    }

    /// The same with its moments turned into others.
    fn map<N>(self, f: impl FnOnce(M) -> N) -> AdamWInput<N> {
        let (moments, rest) = self.split();
        rest.with(f(moments))
    }
}

/// Running means of a parameter's gradient and of its square.
#[derive(Clone, Debug)]
pub struct Moments<T = Tensor<1>> {
    /// Mean of the gradient.
    pub first: T,
    /// Mean of the gradient's square.
    pub second: T,
}

impl<T> Moments<T> {
    /// The same of both.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Moments<U> {
        Moments {
            first: f(self.first),
            second: f(self.second),
        }
    }
}

/// A moment in 8 bits: an element is the value of its code in bitsandbytes' dynamic map (the signed one for
/// the first moment, the unsigned one for the second) times the scale of its block.
#[derive(Clone, Debug)]
pub struct Codes {
    /// A code for each element, `[elements]`: bytes, or the device's own integers where it has none.
    pub codes: Tensor<1, Int>,
    /// The largest magnitude of each block of [`MOMENT_BLOCK`], the last of which may be shorter, `[blocks]`.
    pub absmax: Tensor<1>,
}

impl Codes {
    /// The type in which a device holds codes.
    pub fn dtype(device: &Device) -> DType {
        match device.supports_dtype(DType::U8) {
            true => DType::U8,
            false => DType::I32,
        }
    }

    /// A moment of zeros, as it is before the first step.
    pub fn zeros(elements: usize, device: &Device) -> Self {
        Self {
            codes: Tensor::zeros([elements], (device, Self::dtype(device))),
            absmax: Tensor::zeros([elements.div_ceil(MOMENT_BLOCK)], (device, DType::F32)),
        }
    }
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

/// One step of AdamW as [`adamw`] makes it, for parameters whose moments are held in 8 bits: each block's
/// moments are dequantised, updated, and quantised anew, their scale being their largest magnitude.
/// bitsandbytes' 8-bit AdamW (Dettmers et al. 2022, arXiv:2110.02861), with the codes that its CPU kernels
/// choose (see [`crate::quantized::formats::DynamicBlocks::quantise`]).
///
/// A gradient that is not finite makes its parameter and moments so, as without codes; and as the scale of
/// the block is lost, all parameters of the block from the next step on.
///
/// # Panics
/// If the tensors of a parameter do not fit each other.
pub fn adamw_8bit(
    settings: &AdamW,
    factor: f64,
    parameters: Vec<AdamWInput<Moments<Codes>>>,
) -> Vec<(Tensor<1>, Moments<Codes>)> {
    let mut fast = true;
    for p in &parameters {
        let [n] = p.value.dims();
        for moment in [&p.moments.first, &p.moments.second] {
            let (codes, scales) = (moment.codes.dims(), moment.absmax.dims());
            assert!(
                p.grad.dims() == [n] && codes == [n] && scales == [n.div_ceil(MOMENT_BLOCK)],
                "a parameter has as many gradients and codes, and a scale for each block"
            );
            fast &= moment.codes.dtype() == DType::U8 && plain(&moment.absmax);
        }
        fast &= plain(&p.value) && plain(&p.grad);
    }
    if fast {
        return cpu::adamw_8bit(settings, factor, parameters);
    }
    if let Some(p) = parameters.first() {
        note_fallback("adamw", &[&p.value, &p.grad]);
    }
    let step = |p: AdamWInput<Moments<Codes>>| {
        reference::adamw_8bit(&settings.numbers(factor, p.rate, p.time), p)
    };
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

//! The gradient's norm and AdamW on Flex: all parameters are cut into chunks, and the chunks of all of them
//! are spread over the threads at once.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::host::{HostCodes, HostMoments, Paging};
use super::{AdamW, AdamWInput, Codes, Moments, Numbers, eight_bit};
use crate::cpu::simd::{Level, dot, level, simd_fn};
use crate::cpu::storage::{CHUNK, dense, owned, values};

/// Elements whose squares are added up in single precision; the sums of such blocks are added up in double.
const BLOCK: usize = 1024;

macro_rules! flex {
    ($tensor:expr) => {
        match $tensor.try_into_primitive::<Flex>() {
            Ok(t) => t,
            Err(_) => unreachable!("the caller has seen that the tensor is a plain one on Flex"),
        }
    };
}

/// Elements that a task brings in at once: calls of the system cost more than the step of few elements.
pub(super) const PAGED_CHUNK: usize = 4 * CHUNK;

/// The numbers as the loop takes them.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    factor: f32,
    kept: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    root: f32,
    epsilon: f32,
    rate: f32,
}

impl From<Numbers> for Rounded {
    fn from(n: Numbers) -> Self {
        Self {
            factor: n.factor as f32,
            kept: n.kept as f32,
            rest1: n.rest1 as f32,
            beta2: n.beta2 as f32,
            rest2: n.rest2 as f32,
            root: n.root as f32,
            epsilon: n.epsilon as f32,
            rate: n.rate as f32,
        }
    }
}

/// The step of some elements of one parameter, in operations that round alike on every instruction set.
#[inline(always)]
pub(super) fn update(
    n: Rounded,
    value: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    grad: &[f32],
) {
    let moments = first.iter_mut().zip(second);
    for ((p, g), (m, v)) in value.iter_mut().zip(grad).zip(moments) {
        let g = g * n.factor;
        *m += n.rest1 * (g - *m);
        *v = n.beta2 * *v + n.rest2 * (g * g);
        *p = n.kept * *p - n.rate * (*m / (v.sqrt() * n.root + n.epsilon));
    }
}

simd_fn! {
    fn step<L>(
        n: Rounded,
        value: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        grad: &[f32],
    ) {
        update(n, value, first, second, grad);
    }
}

simd_fn! {
    fn square<L>(x: &[f32]) -> f64 {
        x.chunks(BLOCK).map(|block| f64::from(dot::<L>(block, block))).sum()
    }
}

/// What one task updates.
struct Chunk<'a> {
    numbers: Rounded,
    value: &'a mut [f32],
    grad: &'a [f32],
    moments: HostMoments<'a>,
}

impl Chunk<'_> {
    fn step(self, level: Level, paging: Option<&dyn Paging>) {
        if let Some(paging) = paging {
            self.moments.pages(|bytes| paging.bring_in(bytes));
        }
        let (n, value, grad) = (self.numbers, self.value, self.grad);
        let moments = match self.moments {
            HostMoments::F32(Moments { first, second }) => {
                step(level, n, value, first, second, grad);
                HostMoments::F32(Moments { first, second })
            }
            HostMoments::EightBit(mut codes) => {
                eight_bit::step(level, n, value, grad, &mut codes);
                HostMoments::EightBit(codes)
            }
        };
        if let Some(paging) = paging {
            moments.pages(|bytes| paging.let_go(bytes));
        }
    }
}

/// A parameter as the tasks see it.
struct Whole<'a> {
    numbers: Rounded,
    value: &'a mut [f32],
    grad: &'a [f32],
    moments: HostMoments<'a>,
}

/// Cuts the parameters into chunks and updates them, on all threads if there is more than one.
fn run(parameters: Vec<Whole<'_>>, paging: Option<&dyn Paging>) {
    let total: usize = parameters.iter().map(|p| p.value.len()).sum();
    // Value and both moments are read and written, the gradient is read.
    let moments: usize = parameters.iter().map(|p| p.moments.bytes()).sum();
    let _timer = crate::profile::op("adamw", 14 * total, 12 * total + 2 * moments);
    let size = if paging.is_some() { PAGED_CHUNK } else { CHUNK };
    let mut chunks = Vec::with_capacity(parameters.len() + total / size);
    for p in parameters {
        let parts = p.value.chunks_mut(size).zip(p.grad.chunks(size));
        let parts = parts.zip(p.moments.chunks(size));
        chunks.extend(parts.map(|((value, grad), moments)| Chunk {
            numbers: p.numbers,
            value,
            grad,
            moments,
        }));
    }
    let level = level();
    if total <= CHUNK {
        chunks.into_iter().for_each(|c| c.step(level, paging));
    } else {
        chunks.into_par_iter().for_each(|c| c.step(level, paging));
    }
}

/// A parameter's tensors, apart from its moments: its value as a buffer of its own, and its gradient.
struct Held {
    numbers: Rounded,
    value: FlexTensor,
    grad: FlexTensor,
}

impl Held {
    fn new<M>(settings: &AdamW, factor: f64, p: AdamWInput<M>) -> (Self, M) {
        let held = Self {
            numbers: Rounded::from(settings.numbers(factor, p.rate, p.time)),
            value: owned(flex!(p.value)),
            grad: dense(flex!(p.grad)),
        };
        (held, p.moments)
    }

    fn with<'a>(&'a mut self, moments: HostMoments<'a>) -> Whole<'a> {
        Whole {
            numbers: self.numbers,
            value: self.value.storage_mut::<f32>(),
            grad: values(&self.grad),
            moments,
        }
    }
}

/// Both parts of a moment in 8 bits, as buffers of their own.
struct HeldCodes {
    codes: FlexTensor,
    absmax: FlexTensor,
}

pub(super) fn adamw(
    settings: &AdamW,
    factor: f64,
    parameters: Vec<AdamWInput>,
) -> Vec<(Tensor<1>, Moments)> {
    let all = parameters.into_iter().map(|p| {
        let (held, moments) = Held::new(settings, factor, p);
        (held, moments.map(|t| owned(flex!(t))))
    });
    let mut all: Vec<(Held, Moments<FlexTensor>)> = all.collect();
    let slices = all.iter_mut().map(|(held, Moments { first, second })| {
        held.with(HostMoments::F32(Moments {
            first: first.storage_mut::<f32>(),
            second: second.storage_mut::<f32>(),
        }))
    });
    run(slices.collect(), None);
    let done = all.into_iter().map(|(held, moments)| {
        let moments = moments.map(Tensor::from_primitive::<Flex>);
        (Tensor::from_primitive::<Flex>(held.value), moments)
    });
    done.collect()
}

pub(super) fn adamw_8bit(
    settings: &AdamW,
    factor: f64,
    parameters: Vec<AdamWInput<Moments<Codes>>>,
) -> Vec<(Tensor<1>, Moments<Codes>)> {
    let all = parameters.into_iter().map(|p| {
        let (held, moments) = Held::new(settings, factor, p);
        let moments = moments.map(|moment| HeldCodes {
            codes: owned(flex!(moment.codes)),
            absmax: owned(flex!(moment.absmax)),
        });
        (held, moments)
    });
    let mut all: Vec<(Held, Moments<HeldCodes>)> = all.collect();
    let slices = all.iter_mut().map(|(held, Moments { first, second })| {
        let moments = Moments { first, second }.map(|moment| HostCodes {
            codes: moment.codes.storage_mut::<u8>(),
            absmax: moment.absmax.storage_mut::<f32>(),
        });
        held.with(HostMoments::EightBit(moments))
    });
    run(slices.collect(), None);
    let done = all.into_iter().map(|(held, moments)| {
        let moments = moments.map(|moment| Codes {
            codes: Tensor::from_primitive::<Flex>(moment.codes),
            absmax: Tensor::from_primitive::<Flex>(moment.absmax),
        });
        (Tensor::from_primitive::<Flex>(held.value), moments)
    });
    done.collect()
}

pub(super) fn adamw_host(
    settings: &AdamW,
    factor: f64,
    paging: &dyn Paging,
    parameters: Vec<AdamWInput<HostMoments<'_>>>,
) -> Vec<Tensor<1>> {
    let all = parameters
        .into_iter()
        .map(|p| Held::new(settings, factor, p));
    let (mut all, moments): (Vec<Held>, Vec<HostMoments<'_>>) = all.unzip();
    let slices = all.iter_mut().zip(moments);
    run(slices.map(|(held, m)| held.with(m)).collect(), Some(paging));
    let done = all.into_iter();
    done.map(|held| Tensor::from_primitive::<Flex>(held.value))
        .collect()
}

pub(super) fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    let total: usize = tensors.iter().map(|t| t.dims()[0]).sum();
    let _timer = crate::profile::op("gradient norm", 2 * total, 4 * total);
    let tensors: Vec<FlexTensor> = tensors.iter().map(|t| dense(flex!(t.clone()))).collect();
    let chunks: Vec<&[f32]> = tensors
        .iter()
        .flat_map(|t| values(t).chunks(CHUNK))
        .collect();
    let level = level();
    if total <= CHUNK {
        chunks.into_iter().map(|x| square(level, x)).sum()
    } else {
        let sums: Vec<f64> = chunks.into_par_iter().map(|x| square(level, x)).collect();
        sums.into_iter().sum()
    }
}

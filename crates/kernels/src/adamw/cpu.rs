//! The gradient's norm and AdamW on Flex: all parameters are cut into chunks, and the chunks of all of them
//! are spread over the threads at once.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{AdamW, AdamWInput, Moments, Numbers};
use crate::cpu::simd::{Level, dot, level, simd_fn};
use crate::cpu::storage::{CHUNK, dense, owned, values};

/// Elements whose squares are added up in single precision; the sums of such blocks are added up in double.
const BLOCK: usize = 1024;

fn flex(t: Tensor<1>) -> FlexTensor {
    match t.try_into_primitive::<Flex>() {
        Ok(t) => t,
        Err(_) => unreachable!("the caller has seen that the tensor is a plain one on Flex"),
    }
}

/// The numbers as the loop takes them.
#[derive(Clone, Copy)]
struct Rounded {
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

simd_fn! {
    fn step<L>(
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
    first: &'a mut [f32],
    second: &'a mut [f32],
    grad: &'a [f32],
}

impl Chunk<'_> {
    fn step(self, level: Level) {
        step(
            level,
            self.numbers,
            self.value,
            self.first,
            self.second,
            self.grad,
        );
    }
}

pub(super) fn adamw(
    settings: &AdamW,
    factor: f64,
    parameters: Vec<AdamWInput>,
) -> Vec<(Tensor<1>, Moments)> {
    let total: usize = parameters.iter().map(|p| p.value.dims()[0]).sum();
    // Four tensors are read and three written.
    let _timer = crate::profile::op("adamw", 14 * total, 28 * total);
    let mut numbers = Vec::with_capacity(parameters.len());
    let mut tensors = Vec::with_capacity(parameters.len());
    for p in parameters {
        numbers.push(Rounded::from(settings.numbers(factor, p.rate, p.time)));
        let Moments { first, second } = p.moments;
        let own = [p.value, first, second].map(|t| owned(flex(t)));
        tensors.push((own, dense(flex(p.grad))));
    }

    let mut chunks = Vec::with_capacity(tensors.len() + total / CHUNK);
    for ((own, grad), numbers) in tensors.iter_mut().zip(numbers) {
        let [value, first, second] = own.each_mut().map(|t| t.storage_mut::<f32>());
        let moments = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
        let values = value.chunks_mut(CHUNK).zip(values(grad).chunks(CHUNK));
        chunks.extend(
            values
                .zip(moments)
                .map(|((value, grad), (first, second))| Chunk {
                    numbers,
                    value,
                    first,
                    second,
                    grad,
                }),
        );
    }
    let level = level();
    if total <= CHUNK {
        chunks.into_iter().for_each(|chunk| chunk.step(level));
    } else {
        chunks.into_par_iter().for_each(|chunk| chunk.step(level));
    }

    let done = tensors.into_iter().map(|(own, _)| {
        let [value, first, second] = own.map(Tensor::from_primitive::<Flex>);
        (value, Moments { first, second })
    });
    done.collect()
}

pub(super) fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    let total: usize = tensors.iter().map(|t| t.dims()[0]).sum();
    let _timer = crate::profile::op("gradient norm", 2 * total, 4 * total);
    let tensors: Vec<FlexTensor> = tensors.iter().map(|t| dense(flex(t.clone()))).collect();
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

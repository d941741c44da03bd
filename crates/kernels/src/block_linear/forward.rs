//! The forward pass on Flex: the input is made row by row as it is packed for the products, which write
//! side by side into one result, onto the residual stream where there is one.

use std::sync::atomic::{AtomicU32, Ordering};

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::operands::{Factors, Operands, Part, Source};
use super::rows::{add_bias, gated, normalise};
use crate::base_weight::Held;
use crate::cpu::dropout::{Dropout, Mask, masked};
use crate::cpu::gemm::{Compute, Packed, Weight, times_t};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatMut, MatRef, dims, readable};
use crate::cpu::simd::level;
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, tensor, values};

/// From so many rows on, one product with all a on top of each other is worth the copy that stacks them.
const STACKED_FROM: usize = 16;

/// What the backward pass may want of the forward pass's work.
#[derive(Clone, Debug)]
pub struct Kept<T> {
    /// `1/rms` of each row of x, `[rows]`, where there is a norm.
    pub inverse: Option<T>,
    /// `x̂ · aᵀ` of all adapters side by side, `[rows, Σ r]`, where there is one of a rank above 0.
    pub low: Option<T>,
}

impl Source<FlexTensor> {
    /// Name of the operation, forward and backward.
    pub(super) fn names(&self, adds: bool) -> [&'static str; 2] {
        match (self, adds) {
            (Self::Gated, _) => ["swiglu_project", "swiglu_project backward"],
            (_, true) => ["project_add", "project_add backward"],
            (_, false) => ["project", "project backward"],
        }
    }
}

/// The adapters' a, `[Σ r, in]`, on top of each other: one product in place of several narrow ones.
pub(super) enum Stacked {
    One(FlexTensor),
    Many {
        values: Vec<f32>,
        rows: usize,
        width: usize,
    },
}

impl Stacked {
    pub(super) fn new(mut all: Vec<FlexTensor>, width: usize) -> Self {
        if all.len() == 1 {
            return Self::One(readable(all.remove(0)));
        }
        let rows = all.iter().map(|a| dims(a).0).sum();
        let mut stacked = Vec::with_capacity(rows * width);
        for a in all {
            assert_eq!(dims(&a).1, width, "a is as wide as the input");
            stacked.extend_from_slice(values(&dense(a)));
        }
        Self::Many {
            values: stacked,
            rows,
            width,
        }
    }

    pub(super) fn view(&self) -> MatRef<'_> {
        match self {
            Self::One(a) => MatRef::of(a),
            Self::Many {
                values,
                rows,
                width,
            } => MatRef::rows_of(values, *rows, *width),
        }
    }
}

/// x made into the projections' input and packed, with some of it dropped where that is asked for; with its
/// width, and `1/rms` of each row where there is a norm.
fn packed(
    x: &FlexTensor,
    source: Source<FlexTensor>,
    dropout: Option<Dropout>,
    compute: Compute,
) -> (Packed, usize, Option<Vec<f32>>) {
    let (xs, level, (rows, columns)) = (values(x), level(), dims(x));
    let row = |i: usize| &xs[i * columns..(i + 1) * columns];
    let mask = dropout.map(Mask::from);
    let drop = |i: usize, out: &mut [f32]| {
        if let Some(mask) = mask {
            let start = (i * out.len()) as u32;
            masked(level, out, mask, start);
        }
    };
    match source {
        Source::Rows => {
            let fill = |i: usize, out: &mut [f32]| {
                out.copy_from_slice(row(i));
                drop(i, out);
            };
            (Packed::new(rows, columns, compute, fill), columns, None)
        }
        Source::Normed { weight, eps } => {
            let weight = dense(weight);
            let ws = values(&weight);
            assert_eq!(ws.len(), columns, "the norm is as wide as the input");
            let inverse: Vec<AtomicU32> = (0..rows).map(|_| AtomicU32::new(0)).collect();
            let packed = Packed::new(rows, columns, compute, |i, out| {
                let inv = normalise(level, row(i), ws, eps as f32, out);
                inverse[i].store(inv.to_bits(), Ordering::Relaxed);
                drop(i, out);
            });
            let inverse = inverse.into_iter().map(|v| f32::from_bits(v.into_inner()));
            (packed, columns, Some(inverse.collect()))
        }
        Source::Gated => {
            assert!(columns % 2 == 0, "gate and up are of one width");
            let inner = columns / 2;
            let packed = Packed::new(rows, inner, compute, |i, out| {
                let (gate, up) = row(i).split_at(inner);
                gated(level, gate, up, out);
                drop(i, out);
            });
            (packed, inner, None)
        }
    }
}

/// An adapter's part of the sum: `scale · low` packed, and b.
type Low<'a> = Option<(Packed, &'a FlexTensor)>;

pub(super) fn forward(
    operands: Operands<FlexTensor>,
    compute: Compute,
) -> (FlexTensor, Kept<FlexTensor>) {
    let Operands {
        x,
        source,
        residual,
        parts,
    } = operands;
    let x = dense(x);
    let parts: Vec<Part<FlexTensor>> = parts.into_iter().map(ready).collect();
    let rows = dims(&x).0;
    let total: usize = parts.iter().map(|part| out(&part.weight)).sum();
    let _timer = {
        let [name, _] = source.names(residual.is_some());
        let width = parts
            .first()
            .map_or(0, |part| Weight::held(&part.weight).width());
        let (flops, bytes) = work(&parts, rows, width);
        let moved = rows * (dims(&x).1 + total * (1 + usize::from(residual.is_some())));
        crate::profile::op(name, flops, bytes + 4 * moved)
    };

    let (input, width, inverse) = packed(&x, source.clone(), None, compute);
    let dropped = |dropout| packed(&x, source.clone(), Some(dropout), compute).0;
    let low = low(&input, dropped, &parts, rows, width);
    let ranks: usize = parts.iter().map(rank).sum();
    let mut at = 0;
    let lows = parts.iter().map(|part| {
        let (r, from) = (rank(part), at);
        at += r;
        let (lora, low) = (part.lora.as_ref()?, low.as_ref()?);
        let view = MatRef::strided(low, from, rows, r, ranks);
        (r > 0).then(|| (Packed::of(view, lora.scale as f32, compute), &lora.b))
    });
    let lows: Vec<Low<'_>> = lows.collect();

    let shape = Shape::from(vec![rows, total]);
    let mut y = match residual {
        Some(residual) => {
            assert_eq!(
                dims(&residual),
                (rows, total),
                "the residual is as the result"
            );
            let mut y = owned(residual);
            let ptr = y.storage_mut::<f32>().as_mut_ptr();
            // SAFETY: the buffer is `rows · total` long, and this is its one borrow.
            unsafe { products(ptr, rows, total, Into::Add, &input, &parts, &lows) };
            y
        }
        None => {
            let mut y = Fresh::new(rows * total);
            // SAFETY: the buffer is `rows · total` long and fresh; the products set all of it.
            unsafe {
                let ptr = y.as_mut_ptr();
                products(ptr, rows, total, Into::Set, &input, &parts, &lows);
                y.into_tensor(shape)
            }
        }
    };
    biases(&mut y, total, &parts);
    let kept = Kept {
        inverse: inverse.map(|inverse| tensor(inverse, Shape::from(vec![rows]))),
        low: low.map(|low| tensor(low, Shape::from(vec![rows, ranks]))),
    };
    (y, kept)
}

fn ready(part: Part<FlexTensor>) -> Part<FlexTensor> {
    Part {
        weight: part.weight.map(held),
        bias: part.bias.map(dense),
        lora: part.lora.map(|lora| Factors {
            b: readable(lora.b),
            ..lora
        }),
    }
}

fn out(weight: &Held<FlexTensor>) -> usize {
    Weight::held(weight).out()
}

fn rank(part: &Part<FlexTensor>) -> usize {
    part.lora.as_ref().map_or(0, |lora| dims(&lora.a).0)
}

/// Floating-point operations of the forward pass, and bytes of the weights.
fn work(parts: &[Part<FlexTensor>], rows: usize, width: usize) -> (usize, usize) {
    let mut sum = (0, 0);
    for part in parts {
        let (out, r) = (out(&part.weight), rank(part));
        sum.0 += 2 * rows * (out * width + r * (out + width));
        sum.1 += Weight::held(&part.weight).bytes() + 4 * r * (out + width);
    }
    sum
}

/// `x̂ · aᵀ` of all adapters, side by side; of an adapter with dropout it is `drop(x̂) · aᵀ`.
fn low(
    packed: &Packed,
    dropped: impl Fn(Dropout) -> Packed,
    parts: &[Part<FlexTensor>],
    rows: usize,
    width: usize,
) -> Option<Vec<f32>> {
    let all = parts.iter().filter(|part| rank(part) > 0);
    let all: Vec<_> = all
        .filter_map(|part| part.lora.as_ref())
        .map(|lora| (lora.a.clone(), lora.dropout))
        .collect();
    if all.is_empty() {
        return None;
    }
    let ranks = all.iter().map(|(a, _)| dims(a).0).sum();
    let apart = rows < STACKED_FROM || all.iter().any(|(_, dropout)| dropout.is_some());
    let groups: Vec<(Vec<FlexTensor>, Option<Dropout>)> = if apart {
        all.into_iter().map(|(a, drop)| (vec![a], drop)).collect()
    } else {
        vec![(all.into_iter().map(|(a, _)| a).collect(), None)]
    };
    let (mut low, mut at) = (Fresh::new(rows * ranks), 0);
    for (group, dropout) in groups {
        let stacked = Stacked::new(group, width);
        let a = stacked.view();
        // Each mask is another input.
        let own = dropout.map(&dropped);
        let packed = own.as_ref().unwrap_or(packed);
        // SAFETY: columns `at .. at + a.rows()` of the buffer, which has `rows · ranks` elements.
        let mut dst = unsafe { MatMut::raw(low.as_mut_ptr().add(at), rows, a.rows(), ranks) };
        times_t(&mut dst, Into::Set, &[(packed, Weight::F32(a))]);
        at += a.rows();
    }
    // SAFETY: the products have set all columns.
    Some(unsafe { low.into_vec() })
}

/// Every projection's columns of the result.
///
/// # Safety
/// `y` is `rows · total` long and nothing else touches it; it is initialised where it is added to.
unsafe fn products(
    y: *mut f32,
    rows: usize,
    total: usize,
    into: Into,
    packed: &Packed,
    parts: &[Part<FlexTensor>],
    lows: &[Low<'_>],
) {
    let mut at = 0;
    for (part, low) in parts.iter().zip(lows) {
        let out = out(&part.weight);
        // SAFETY: columns `at .. at + out` of the matrix; the next projection has others.
        let mut dst = unsafe { MatMut::raw(y.add(at), rows, out, total) };
        let mut terms = vec![(packed, Weight::held(&part.weight))];
        if let Some((low, b)) = low {
            terms.push((low, Weight::of(b)));
        }
        times_t(&mut dst, into, &terms);
        at += out;
    }
}

fn biases(y: &mut FlexTensor, total: usize, parts: &[Part<FlexTensor>]) {
    if parts.iter().all(|part| part.bias.is_none()) || total == 0 {
        return;
    }
    let level = level();
    let task = (CHUNK / total).max(1) * total;
    y.storage_mut::<f32>()
        .par_chunks_mut(task)
        .for_each(|rows| {
            let mut at = 0;
            for part in parts {
                if let Some(bias) = &part.bias {
                    add_bias(level, rows, total, at, values(bias));
                }
                at += out(&part.weight);
            }
        });
}

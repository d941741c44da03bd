//! The backward pass on Flex, of one gradient for all projections: products with the strided columns of it,
//! one sum for the input, and the input's own backward in place over that sum.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::forward::Stacked;
use super::operands::Source;
use super::rows::{gated, gated_backward, normalise_again};
use crate::base_weight::Held;
use crate::cpu::dropout::{Dropout, dropped, dropped_sum};
use crate::cpu::gemm::{Compute, Weight, outer, times};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatMut, MatRef, dims, filled, readable};
use crate::cpu::simd::{Level, level};
use crate::cpu::storage::{CHUNK, dense, owned, tensor, values};
use crate::rms_norm::cpu::backward as norm_backward;

/// What the backward pass needs, each only if some tracked parent's gradient uses it.
#[derive(Clone, Debug)]
pub struct Saved<T> {
    /// For the gradient of an a, and of x unless the source is [`Source::Rows`].
    pub x: Option<T>,
    /// How the input was made.
    pub source: Source<T>,
    /// As x, of a normalised input.
    pub inverse: Option<T>,
    /// For the gradient of a b.
    pub low: Option<T>,
    /// In order.
    pub parts: Vec<SavedPart<T>>,
    /// Columns of the projections' input.
    pub width: usize,
    /// Whether x is tracked.
    pub wants_x: bool,
    /// Whether the result was added to a residual stream.
    pub adds: bool,
    /// What the products round to.
    pub compute: Compute,
}

/// A projection's share of [`Saved`].
#[derive(Clone, Debug)]
pub struct SavedPart<T> {
    /// For the gradient of x.
    pub weight: Option<Held<T>>,
    /// For the gradient of x.
    pub a: Option<T>,
    /// For the gradients of a and x.
    pub b: Option<T>,
    /// In front of the adapter's product.
    pub scale: f64,
    /// On the adapter's input.
    pub dropout: Option<Dropout>,
    /// Columns of the result.
    pub out: usize,
    /// Rank of the adapter, 0 without.
    pub rank: usize,
    /// Whether a and b are tracked.
    pub wants: [bool; 2],
}

/// Gradients of what is tracked.
#[derive(Clone, Debug)]
pub struct Grads<T> {
    /// As x.
    pub x: Option<T>,
    /// Of a and b, by projection.
    pub factors: Vec<[Option<T>; 2]>,
}

impl<T> Saved<T> {
    fn wants_a(&self) -> bool {
        self.parts.iter().any(|part| part.wants[0])
    }

    /// Floating-point operations, and bytes of gradients and weights.
    fn work(&self, rows: usize) -> (usize, usize) {
        let (width, mut flops, mut numbers) = (self.width, 0, 0);
        for SavedPart {
            out, rank, wants, ..
        } in &self.parts
        {
            let [a, b, x] = [wants[0], wants[1], self.wants_x].map(usize::from);
            let inner = usize::from(a + x > 0);
            flops += 2 * rows * (x * out * width + rank * ((b + inner) * out + (a + x) * width));
            numbers += rows * out + x * out * width + rank * ((b + inner) * out + (a + x) * width);
        }
        // x is read, and overwritten with its gradient or written beside it.
        let columns = match self.source {
            Source::Gated => 2 * width,
            Source::Rows | Source::Normed { .. } => width,
        };
        let made = usize::from(self.x.is_some()) + usize::from(self.wants_x);
        (flops, 4 * (numbers + rows * columns * made))
    }
}

pub(super) fn backward(saved: Saved<FlexTensor>, grad: FlexTensor) -> Grads<FlexTensor> {
    let grad = dense(grad);
    let (rows, total) = dims(&grad);
    let _timer = {
        let [_, name] = saved.source.names(saved.adds);
        let (flops, bytes) = saved.work(rows);
        crate::profile::op(name, flops, bytes)
    };
    let wants_a = saved.wants_a();
    let Saved {
        x,
        source,
        inverse,
        low,
        parts,
        width,
        wants_x,
        compute,
        ..
    } = saved;
    let columns = Columns {
        grad: values(&grad),
        rows,
        total,
        ranks: parts.iter().map(|part| part.rank).sum(),
    };
    let d_b = columns.of_b(&parts, low.as_ref());
    let d_low = columns.of_low(&parts, compute);
    let d_low = d_low.as_deref();
    let d_input = wants_x.then(|| columns.of_input(&parts, d_low, width, compute));

    let (d_x, input) = undo(x, source, inverse, d_input, [rows, width], wants_a);
    let mut d_a: Vec<Option<FlexTensor>> = parts.iter().map(|_| None).collect();
    if let (Some(d_low), Some(input)) = (d_low, &input) {
        d_a = columns.of_a(&parts, d_low, input);
    }
    Grads {
        x: d_x,
        factors: d_a.into_iter().zip(d_b).map(|(a, b)| [a, b]).collect(),
    }
}

/// The result's gradient, whose columns belong to the projections in turn.
struct Columns<'a> {
    grad: &'a [f32],
    rows: usize,
    total: usize,
    /// Sum of the ranks.
    ranks: usize,
}

impl<'a> Columns<'a> {
    /// The projections with their gradients, and where their rows of the stacked a begin.
    fn by_part<'b, T>(
        &'b self,
        parts: &'b [SavedPart<T>],
    ) -> impl Iterator<Item = (&'b SavedPart<T>, MatRef<'a>, usize)> {
        parts.iter().scan((0, 0), |(column, row), part| {
            let grad = MatRef::strided(self.grad, *column, self.rows, part.out, self.total);
            let at = *row;
            *column += part.out;
            *row += part.rank;
            Some((part, grad, at))
        })
    }

    /// `scale · gᵀ · low` where b is tracked.
    fn of_b(
        &self,
        parts: &[SavedPart<FlexTensor>],
        low: Option<&FlexTensor>,
    ) -> Vec<Option<FlexTensor>> {
        let low = low.map(values);
        self.by_part(parts)
            .map(|(part, grad, at)| {
                let (out, rank) = (part.out, part.rank);
                part.wants[1].then(|| match low {
                    Some(low) if rank > 0 => {
                        let low = MatRef::strided(low, at, self.rows, rank, self.ranks);
                        filled(out, rank, |dst| {
                            outer(dst, Into::Set, part.scale as f32, grad, low);
                        })
                    }
                    _ => tensor(vec![0.0; out * rank], Shape::from(vec![out, rank])),
                })
            })
            .collect()
    }

    /// `scale · g · b` of all adapters side by side, where b is kept; zeros elsewhere.
    fn of_low(&self, parts: &[SavedPart<FlexTensor>], compute: Compute) -> Option<Vec<f32>> {
        let kept = |part: &SavedPart<FlexTensor>| part.b.is_some() && part.rank > 0;
        if !parts.iter().any(kept) {
            return None;
        }
        let (rows, ranks) = (self.rows, self.ranks);
        let mut d_low = vec![0.0f32; rows * ranks];
        for (part, grad, at) in self.by_part(parts) {
            let (Some(b), true) = (&part.b, kept(part)) else {
                continue;
            };
            let b = readable(b.clone());
            // SAFETY: columns `at .. at + rank` of a matrix that this is the one borrow of.
            let mut dst =
                unsafe { MatMut::raw(d_low.as_mut_ptr().add(at), rows, part.rank, ranks) };
            times(&mut dst, Into::Set, &[(grad, Weight::of(&b))], compute);
            let scale = part.scale as f32;
            for row in d_low.chunks_exact_mut(ranks) {
                row[at..at + part.rank].iter_mut().for_each(|v| *v *= scale);
            }
        }
        Some(d_low)
    }

    /// The columns of `d_low` of a part whose rows of the stacked a begin at `at`.
    fn low_of<'c, T>(&self, part: &SavedPart<T>, d_low: &'c [f32], at: usize) -> MatRef<'c> {
        MatRef::strided(d_low, at, self.rows, part.rank, self.ranks)
    }

    /// `Σ g · w + d_low · a`; what an adapter with dropout adds is dropped where its input was.
    fn of_input(
        &self,
        parts: &[SavedPart<FlexTensor>],
        d_low: Option<&[f32]>,
        width: usize,
        compute: Compute,
    ) -> FlexTensor {
        let ready: Vec<_> = self
            .by_part(parts)
            .filter_map(|(part, grad, _)| part.weight.clone().map(|w| (grad, w.map(held))))
            .collect();
        let mut terms: Vec<_> = ready.iter().map(|(g, w)| (*g, Weight::held(w))).collect();
        let apart = any_drops(parts);
        let all = parts.iter().filter(|part| part.rank > 0);
        let all: Vec<_> = all.filter_map(|part| part.a.clone()).collect();
        let stacked = (!all.is_empty() && !apart).then(|| Stacked::new(all, width));
        if let (Some(d_low), Some(stacked)) = (d_low, &stacked) {
            let d_low = MatRef::rows_of(d_low, self.rows, self.ranks);
            terms.push((d_low, Weight::F32(stacked.view())));
        }
        let mut sum = filled(self.rows, width, |dst| {
            times(dst, Into::Set, &terms, compute);
        });
        let Some(d_low) = d_low.filter(|_| apart) else {
            return sum;
        };
        for (part, _, at) in self.by_part(parts) {
            let (Some(a), true) = (part.a.clone(), part.rank > 0) else {
                continue;
            };
            let a = readable(a);
            let own = filled(self.rows, width, |dst| {
                let terms = [(self.low_of(part, d_low, at), Weight::of(&a))];
                times(dst, Into::Set, &terms, compute);
            });
            // A probability of zero drops nothing.
            let dropout = part.dropout.unwrap_or(Dropout {
                probability: 0.0,
                seed: 0,
            });
            sum = dropped_sum(sum, own, dropout);
        }
        sum
    }

    /// `d_lowᵀ · x̂`: of all adapters at once, then cut into theirs; one by one where some of x̂ is dropped.
    fn of_a(
        &self,
        parts: &[SavedPart<FlexTensor>],
        d_low: &[f32],
        input: &FlexTensor,
    ) -> Vec<Option<FlexTensor>> {
        let width = dims(input).1;
        if any_drops(parts) {
            let by_part = self.by_part(parts).map(|(part, _, at)| {
                part.wants[0].then(|| {
                    let own = match part.dropout {
                        Some(dropout) => dropped(input.clone(), dropout),
                        None => input.clone(),
                    };
                    let d_low = self.low_of(part, d_low, at);
                    filled(part.rank, width, |dst| {
                        outer(dst, Into::Set, 1.0, d_low, MatRef::of(&own));
                    })
                })
            });
            return by_part.collect();
        }
        let ranks = self.ranks;
        let d_low = MatRef::rows_of(d_low, self.rows, ranks);
        let all = filled(ranks, width, |dst| {
            outer(dst, Into::Set, 1.0, d_low, MatRef::of(input));
        });
        let cut = self.by_part(parts).map(|(part, _, from)| {
            part.wants[0].then(|| {
                let rows = values(&all)[from * width..(from + part.rank) * width].to_vec();
                tensor(rows, Shape::from(vec![part.rank, width]))
            })
        });
        cut.collect()
    }
}

fn any_drops<T>(parts: &[SavedPart<T>]) -> bool {
    parts.iter().any(|part| part.dropout.is_some())
}

/// From the gradient of the projections' input to that of x, where it is wanted, and the input once more,
/// where it is wanted.
fn undo(
    x: Option<FlexTensor>,
    source: Source<FlexTensor>,
    inverse: Option<FlexTensor>,
    d_input: Option<FlexTensor>,
    [rows, width]: [usize; 2],
    wants_input: bool,
) -> (Option<FlexTensor>, Option<FlexTensor>) {
    let level = level();
    let task = (CHUNK / width.max(1)).max(1);
    match (source, x) {
        (Source::Normed { weight, .. }, Some(x)) => {
            let (x, weight, inverse) = (dense(x), dense(weight), inverse.map(dense));
            let norm = Normed {
                level,
                x: values(&x),
                weight: values(&weight),
                inverse: inverse.as_ref().map_or(&[][..], values),
                task,
            };
            // The input first: its pass leaves x's rows as they are.
            let input = wants_input.then(|| {
                let mut input = vec![0.0f32; rows * width];
                norm.again(&mut input);
                tensor(input, Shape::from(vec![rows, width]))
            });
            let d_x = d_input.map(|mut d| {
                norm.undo(d.storage_mut::<f32>());
                d
            });
            (d_x, input)
        }
        (Source::Gated, Some(x)) => match d_input {
            Some(mut d) => {
                // One pass: x becomes its gradient, and the input's gradient becomes the input.
                let mut x = owned(x);
                let grads = d.storage_mut::<f32>().par_chunks_mut(task * width);
                x.storage_mut::<f32>()
                    .par_chunks_mut(task * 2 * width)
                    .zip(grads)
                    .for_each(|(x, d)| {
                        let rows = x.chunks_exact_mut(2 * width).zip(d.chunks_exact_mut(width));
                        for (x, d) in rows {
                            let (gate, up) = x.split_at_mut(width);
                            gated_backward(level, gate, up, d);
                        }
                    });
                (Some(x), wants_input.then_some(d))
            }
            None => {
                let x = dense(x);
                let mut input = vec![0.0f32; rows * width];
                input
                    .par_chunks_mut(task * width)
                    .zip(values(&x).par_chunks(task * 2 * width))
                    .for_each(|(input, x)| {
                        let rows = input.chunks_exact_mut(width).zip(x.chunks_exact(2 * width));
                        for (input, x) in rows {
                            let (gate, up) = x.split_at(width);
                            gated(level, gate, up, input);
                        }
                    });
                (None, Some(tensor(input, Shape::from(vec![rows, width]))))
            }
        },
        (Source::Rows, x) => (d_input, x.filter(|_| wants_input).map(readable)),
        // Nothing that is tracked uses x.
        (Source::Normed { .. } | Source::Gated, None) => (None, None),
    }
}

/// A norm whose `1/rms` is known.
struct Normed<'a> {
    level: Level,
    x: &'a [f32],
    weight: &'a [f32],
    inverse: &'a [f32],
    /// Rows that one task takes.
    task: usize,
}

impl Normed<'_> {
    fn again(&self, input: &mut [f32]) {
        let chunk = self.task * self.weight.len().max(1);
        input
            .par_chunks_mut(chunk)
            .zip(self.x.par_chunks(chunk))
            .zip(self.inverse.par_chunks(self.task))
            .for_each(|((input, x), inverse)| {
                normalise_again(self.level, x, self.weight, inverse, input);
            });
    }

    fn undo(&self, d: &mut [f32]) {
        let chunk = self.task * self.weight.len().max(1);
        d.par_chunks_mut(chunk)
            .zip(self.x.par_chunks(chunk))
            .zip(self.inverse.par_chunks(self.task))
            .for_each(|((d, x), inverse)| {
                norm_backward(self.level, x, self.weight, inverse, d, &mut []);
            });
    }
}

//! Khatri-Rao products on Flex: one pass forward, one backward, without copies of the factors as large
//! as the product.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::Pairs;
use crate::cpu::matrix::dims;
use crate::cpu::simd::{fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, tensor, values};
use crate::profile;

/// Columns whose gradients one task computes: with the product of two factors of rank 8, 64 KiB.
const COLUMNS: usize = 256;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait KhatriRaoOps: Backend {
    /// The numbers of a and b by pairs.
    fn enamel_khatri_rao(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        pairs: Pairs,
    ) -> FloatTensor<Self>;

    /// Gradients of a and b.
    fn enamel_khatri_rao_backward(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        pairs: Pairs,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

pub(super) fn khatri_rao(a: Tensor<2>, b: Tensor<2>, pairs: Pairs) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as KhatriRaoOps>::enamel_khatri_rao(
        a.into_dispatch(),
        b.into_dispatch(),
        pairs,
    ))
}

/// [`rows_of`] for rows of b whose length the compiler knows, so that a row is a vector or two.
#[inline(always)]
fn rows_of_known<const K: usize>(a: &[f32], b: &[f32], out: &mut [MaybeUninit<f32>]) {
    let l = out.len() / b.len();
    let rows = a.chunks_exact(l).zip(b.as_chunks::<K>().0);
    for ((a, b), out) in rows.zip(out.chunks_exact_mut(l * K)) {
        for (a, out) in a.iter().zip(out.as_chunks_mut::<K>().0) {
            for q in 0..K {
                out[q].write(a * b[q]);
            }
        }
    }
}

simd_fn! {
    /// The products of some rows with `k` numbers of b each.
    fn rows_of<L>(a: &[f32], b: &[f32], k: usize, out: &mut [MaybeUninit<f32>]) {
        match k {
            4 => return rows_of_known::<4>(a, b, out),
            8 => return rows_of_known::<8>(a, b, out),
            16 => return rows_of_known::<16>(a, b, out),
            _ => {}
        }
        let l = out.len() / b.len();
        let rows = a.chunks_exact(l).zip(b.chunks_exact(k));
        for ((a, b), out) in rows.zip(out.chunks_exact_mut(l * k)) {
            for (a, out) in a.iter().zip(out.chunks_exact_mut(k)) {
                for (b, out) in b.iter().zip(out) {
                    out.write(a * b);
                }
            }
        }
    }
}

/// [`rows_backward`] for rows of b whose length the compiler knows, a power of two.
#[inline(always)]
fn rows_backward_known<const L: u8, const K: usize>(
    a: &[f32],
    b: &[f32],
    grad: &[f32],
    da: &mut [f32],
    db: &mut [f32],
) {
    let l = grad.len() / b.len();
    let inputs = a.chunks_exact(l).zip(b.as_chunks::<K>().0);
    let outputs = da.chunks_exact_mut(l).zip(db.as_chunks_mut::<K>().0);
    let grads = grad.chunks_exact(l * K);
    for (((a, b), (da, db)), g) in inputs.zip(outputs).zip(grads) {
        let mut sums = [0.0f32; K];
        for ((a, da), g) in a.iter().zip(da).zip(g.as_chunks::<K>().0) {
            let mut products = [0.0f32; K];
            for q in 0..K {
                products[q] = g[q] * b[q];
                sums[q] = fma::<L>(g[q], *a, sums[q]);
            }
            let mut half = K / 2;
            while half > 0 {
                for q in 0..half {
                    products[q] += products[q + half];
                }
                half /= 2;
            }
            *da = products[0];
        }
        *db = sums;
    }
}

simd_fn! {
    /// Gradients of some rows with `k` numbers of b each: `da[p] = Σ g[p, q]·b[q]`,
    /// `db[q] = Σ g[p, q]·a[p]`.
    fn rows_backward<L>(
        a: &[f32],
        b: &[f32],
        grad: &[f32],
        k: usize,
        da: &mut [f32],
        db: &mut [f32],
    ) {
        match k {
            4 => return rows_backward_known::<L, 4>(a, b, grad, da, db),
            8 => return rows_backward_known::<L, 8>(a, b, grad, da, db),
            16 => return rows_backward_known::<L, 16>(a, b, grad, da, db),
            _ => {}
        }
        let l = grad.len() / b.len();
        let inputs = a.chunks_exact(l).zip(b.chunks_exact(k));
        let outputs = da.chunks_exact_mut(l).zip(db.chunks_exact_mut(k));
        for (((a, b), (da, db)), g) in inputs.zip(outputs).zip(grad.chunks_exact(l * k)) {
            for ((a, da), g) in a.iter().zip(da).zip(g.chunks_exact(k)) {
                let mut sum = 0.0;
                for ((g, b), db) in g.iter().zip(b).zip(&mut *db) {
                    sum = fma::<L>(*g, *b, sum);
                    *db = fma::<L>(*g, *a, *db);
                }
                *da = sum;
            }
        }
    }
}

simd_fn! {
    /// The product of one row of a with one of b.
    fn columns_of<L>(a: &[f32], b: &[f32], out: &mut [MaybeUninit<f32>]) {
        for ((a, b), out) in a.iter().zip(b).zip(out) {
            out.write(a * b);
        }
    }
}

simd_fn! {
    /// Gradients of `da`'s columns from `from` on: `da[p] = Σ g[p, q]·b[q]`, `db[q] = Σ g[p, q]·a[p]`.
    /// The inputs have `n` columns, the outputs, which are zero, `width`.
    fn columns_backward<L>(
        a: &[f32],
        b: &[f32],
        grad: &[f32],
        n: usize,
        from: usize,
        width: usize,
        da: &mut [f32],
        db: &mut [f32],
    ) {
        let k = db.len() / width;
        for (p, da) in da.chunks_exact_mut(width).enumerate() {
            let a = &a[p * n + from..][..width];
            for (q, db) in db.chunks_exact_mut(width).enumerate() {
                let b = &b[q * n + from..][..width];
                let g = &grad[(p * k + q) * n + from..][..width];
                for i in 0..width {
                    da[i] = fma::<L>(g[i], b[i], da[i]);
                    db[i] = fma::<L>(g[i], a[i], db[i]);
                }
            }
        }
    }
}

/// As many rows of `width` numbers as make a task.
fn rows_a_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

fn by_rows(n: usize, l: usize, k: usize, a: &[f32], b: &[f32], out: &mut [MaybeUninit<f32>]) {
    let (task, level) = (rows_a_task(l * k), level());
    let part = |((a, b), out): ((&[f32], &[f32]), _)| rows_of(level, a, b, k, out);
    if n <= task {
        return part(((a, b), out));
    }
    let inputs = a.par_chunks(task * l).zip(b.par_chunks(task * k));
    inputs.zip(out.par_chunks_mut(task * l * k)).for_each(part);
}

fn by_columns(n: usize, k: usize, a: &[f32], b: &[f32], out: &mut [MaybeUninit<f32>]) {
    let (task, level) = (rows_a_task(n), level());
    out.par_chunks_mut(task * n)
        .enumerate()
        .for_each(|(i, out)| {
            for (j, out) in out.chunks_exact_mut(n).enumerate() {
                let (p, q) = ((i * task + j) / k, (i * task + j) % k);
                columns_of(level, &a[p * n..][..n], &b[q * n..][..n], out);
            }
        });
}

fn by_rows_backward(
    n: usize,
    [l, k]: [usize; 2],
    a: &[f32],
    b: &[f32],
    g: &[f32],
) -> [Vec<f32>; 2] {
    let (task, level) = (rows_a_task(l * k), level());
    let (mut da, mut db) = (vec![0.0f32; n * l], vec![0.0f32; n * k]);
    let inputs = a.par_chunks(task * l).zip(b.par_chunks(task * k));
    let outputs = da.par_chunks_mut(task * l).zip(db.par_chunks_mut(task * k));
    inputs
        .zip(g.par_chunks(task * l * k))
        .zip(outputs)
        .for_each(|(((a, b), g), (da, db))| rows_backward(level, a, b, g, k, da, db));
    [da, db]
}

fn by_columns_backward(
    n: usize,
    [l, k]: [usize; 2],
    a: &[f32],
    b: &[f32],
    g: &[f32],
) -> [Vec<f32>; 2] {
    let level = level();
    let pieces: Vec<_> = (0..n.div_ceil(COLUMNS))
        .into_par_iter()
        .map(|i| {
            let (from, width) = (i * COLUMNS, COLUMNS.min(n - i * COLUMNS));
            let (mut da, mut db) = (vec![0.0f32; l * width], vec![0.0f32; k * width]);
            columns_backward(level, a, b, g, n, from, width, &mut da, &mut db);
            (from, width, [da, db])
        })
        .collect();
    let mut sums = [vec![0.0f32; l * n], vec![0.0f32; k * n]];
    for (from, width, piece) in pieces {
        for (sums, piece) in sums.iter_mut().zip(piece) {
            for (row, piece) in sums.chunks_exact_mut(n).zip(piece.chunks_exact(width)) {
                row[from..from + width].copy_from_slice(piece);
            }
        }
    }
    sums
}

impl KhatriRaoOps for Flex {
    fn enamel_khatri_rao(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        pairs: Pairs,
    ) -> FloatTensor<Self> {
        let (a, b) = (dense(a), dense(b));
        let (a_dims, b_dims) = (dims(&a), dims(&b));
        let (n, [l, k], shape) = sizes(a_dims, b_dims, pairs);
        let _timer = profile::op("khatri_rao", n * l * k, 4 * n * (l * k + l + k));
        let mut out = Fresh::new(n * l * k);
        if n * l * k > 0 {
            match pairs {
                Pairs::Rows => by_rows(n, l, k, values(&a), values(&b), out.slots()),
                Pairs::Columns => by_columns(n, k, values(&a), values(&b), out.slots()),
            }
        }
        // SAFETY: rows, or pieces of them, cover the output.
        unsafe { out.into_tensor(Shape::from(shape)) }
    }

    fn enamel_khatri_rao_backward(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        pairs: Pairs,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (a, b, grad) = (dense(a), dense(b), dense(grad));
        let (n, lk, _) = sizes(dims(&a), dims(&b), pairs);
        let (av, bv, g) = (values(&a), values(&b), values(&grad));
        assert_eq!(
            g.len(),
            n * lk[0] * lk[1],
            "the gradient has the product's shape"
        );
        let numbers = g.len() + 2 * (av.len() + bv.len());
        let _timer = profile::op("khatri_rao backward", 4 * g.len(), 4 * numbers);
        let [da, db] = if g.is_empty() {
            [vec![0.0; av.len()], vec![0.0; bv.len()]]
        } else {
            match pairs {
                Pairs::Rows => by_rows_backward(n, lk, av, bv, g),
                Pairs::Columns => by_columns_backward(n, lk, av, bv, g),
            }
        };
        (
            tensor(da, a.layout().shape().clone()),
            tensor(db, b.layout().shape().clone()),
        )
    }
}

/// The common axis, the two others, and the product's shape.
fn sizes(a: (usize, usize), b: (usize, usize), pairs: Pairs) -> (usize, [usize; 2], Vec<usize>) {
    let (n, other, l, k) = match pairs {
        Pairs::Rows => (a.0, b.0, a.1, b.1),
        Pairs::Columns => (a.1, b.1, a.0, b.0),
    };
    assert_eq!(n, other, "the factors' common axis");
    let shape = match pairs {
        Pairs::Rows => vec![n, l * k],
        Pairs::Columns => vec![l * k, n],
    };
    (n, [l, k], shape)
}

#[derive(Debug)]
struct KhatriRaoStep;

impl<B: KhatriRaoOps> Backward<B, 2> for KhatriRaoStep {
    type State = (FloatTensor<B>, FloatTensor<B>, Pairs);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [a_node, b_node] = ops.parents;
        let (a, b, pairs) = ops.state;
        let (da, db) = B::enamel_khatri_rao_backward(a, b, grad, pairs);
        if let Some(node) = a_node {
            grads.register::<B>(node.id, da);
        }
        if let Some(node) = b_node {
            grads.register::<B>(node.id, db);
        }
    }
}

impl<B: KhatriRaoOps, C: CheckpointStrategy> KhatriRaoOps for Autodiff<B, C> {
    fn enamel_khatri_rao(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        pairs: Pairs,
    ) -> FloatTensor<Self> {
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        match KhatriRaoStep
            .prepare::<C>([a_node, b_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = (a.clone(), b.clone(), pairs);
                prep.finish(state, B::enamel_khatri_rao(a, b, pairs))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_khatri_rao(a, b, pairs)),
        }
    }

    fn enamel_khatri_rao_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Pairs,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of a Khatri-Rao product")
    }
}

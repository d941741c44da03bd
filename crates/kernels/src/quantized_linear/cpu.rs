//! The map on Flex: the products of the dense map, over a weight that is read as it lies.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::int8::{self, Rounding};
use crate::cpu::gemm::{Compute, Packed, Reading, Weight, times, times_t};
use crate::cpu::matrix::{Into, MatMut, MatRef, dims, filled, readable};
use crate::cpu::storage::{CHUNK, dense, tensor, values};
use crate::quantized::PackedWeight;
use crate::quantized::formats::Int8Rows;

/// Floating-point operations, and bytes of rows and weight.
fn cost(rows: usize, w: &PackedWeight) -> (usize, usize) {
    let [out, width] = w.dims();
    (2 * rows * out * width, w.bytes() + 4 * rows * (out + width))
}

pub(super) fn forward(
    x: FlexTensor,
    w: &PackedWeight,
    rounds: bool,
    compute: Compute,
) -> FlexTensor {
    let (rows, out) = (dims(&x).0, w.dims()[0]);
    let (flops, bytes) = cost(rows, w);
    let _timer = crate::profile::op("packed_linear", flops, bytes);
    if let Some((codes, threshold)) = int8::rows(w).filter(|_| rounds) {
        let y = eight_bit(&dense(x), w, codes, threshold, compute);
        return tensor(y, Shape::from(vec![rows, out]));
    }
    let x = readable(x);
    let x = Packed::of(MatRef::of(&x), 1.0, compute);
    filled(rows, out, |y| {
        times_t(y, Into::Set, &[(&x, Weight::packed(w, Reading::Values))])
    })
}

/// The integers are exact in f32 and bf16, and so are sums of their products up to 2²⁴.
fn eight_bit(
    x: &FlexTensor,
    w: &PackedWeight,
    codes: &Int8Rows,
    threshold: f32,
    compute: Compute,
) -> Vec<f32> {
    let ((rows, width), out) = (dims(x), w.dims()[0]);
    let rounding = Rounding::of(values(x), width, threshold);
    let mut y = vec![0.0f32; rows * out];
    if y.is_empty() {
        return y;
    }
    {
        let integers = Packed::new(rows, width, compute, |i, row| rounding.codes(i, row));
        let terms = [(&integers, Weight::packed(w, Reading::Codes))];
        times_t(&mut whole_of(&mut y, rows, out), Into::Set, &terms);
    }
    let task = (CHUNK / out).max(1);
    y.par_chunks_mut(task * out).enumerate().for_each(|(t, y)| {
        for (i, row) in y.chunks_exact_mut(out).enumerate() {
            rounding.scale(t * task + i, codes.absmax(), row);
        }
    });
    let columns = rounding.outliers.as_slice();
    if !columns.is_empty() {
        let large = Packed::new(rows, columns.len(), compute, |i, row| {
            rounding.large(i, row)
        });
        let terms = [(&large, Weight::packed(w, Reading::Columns(columns)))];
        times_t(&mut whole_of(&mut y, rows, out), Into::Add, &terms);
    }
    y
}

fn whole_of(values: &mut [f32], rows: usize, cols: usize) -> MatMut<'_> {
    assert_eq!(values.len(), rows * cols);
    // SAFETY: the slice is borrowed for as long as the matrix, and has its elements.
    unsafe { MatMut::raw(values.as_mut_ptr(), rows, cols, cols) }
}

/// `g · w`.
pub(super) fn backward(g: FlexTensor, w: &PackedWeight, compute: Compute) -> FlexTensor {
    let (rows, width) = (dims(&g).0, w.dims()[1]);
    let (flops, bytes) = cost(rows, w);
    let _timer = crate::profile::op("packed_linear backward", flops, bytes);
    let g = readable(g);
    filled(rows, width, |dst| {
        times(
            dst,
            Into::Set,
            &[(MatRef::of(&g), Weight::packed(w, Reading::Values))],
            compute,
        );
    })
}

//! The map on any backend, a tile of the weight's rows at a time: they are read on the host and live on the
//! device for one product.

use burn::backend::Backend;
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Shape, Slice, Tensor, TensorData, read_sync};

use super::int8::{self, Rounding};
use crate::quantized::PackedWeight;

/// Rows of the weight that are a tensor at once.
const TILE: usize = 256;

/// The tiles' first rows and their heights.
fn tiles(w: &PackedWeight) -> impl Iterator<Item = (usize, usize)> {
    let out = w.dims()[0];
    (0..out)
        .step_by(TILE)
        .map(move |first| (first, TILE.min(out - first)))
}

fn matrix(rows: usize, cols: usize, fill: impl Fn(usize, &mut [f32])) -> TensorData {
    let mut values = vec![0.0; rows * cols];
    for (i, row) in values.chunks_exact_mut(cols.max(1)).enumerate() {
        fill(i, row);
    }
    TensorData::new(values, [rows, cols])
}

/// What the rows of a tile stand for.
fn values(w: &PackedWeight, first: usize, count: usize) -> TensorData {
    matrix(count, w.dims()[1], |i, row| w.read(first + i, 0, row))
}

/// LLM.int8()'s input, ready to be multiplied.
struct Rounded<T> {
    /// `[rows, in]`
    codes: T,
    /// `[rows, outliers]`
    large: Option<T>,
    columns: Vec<usize>,
    /// `[rows, out]`, what the integers' products are multiplied by.
    scales: TensorData,
}

impl Rounded<TensorData> {
    fn of(x: &[f32], w: &PackedWeight) -> Option<Self> {
        let (codes, threshold) = int8::rows(w)?;
        let [out, width] = w.dims();
        let rounding = Rounding::of(x, width, threshold);
        let rows = x.len() / width.max(1);
        let columns = rounding.outliers.clone();
        let large = matrix(rows, columns.len(), |i, row| rounding.large(i, row));
        Some(Self {
            codes: matrix(rows, width, |i, row| rounding.codes(i, row)),
            large: (!columns.is_empty()).then_some(large),
            columns,
            scales: matrix(rows, out, |i, row| {
                row.fill(1.0);
                rounding.scale(i, codes.absmax(), row);
            }),
        })
    }
}

/// The integers of a tile, and its values in the outliers' columns.
fn integers(w: &PackedWeight, first: usize, count: usize, columns: &[usize]) -> [TensorData; 2] {
    let width = w.dims()[1];
    let codes = matrix(count, width, |i, row| w.read_codes(first + i, 0, row));
    let large = matrix(count, columns.len(), |i, row| {
        w.read_columns(first + i, columns, row);
    });
    [codes, large]
}

/// `x · wᵀ`.
pub(super) fn forward<B: Backend>(
    x: FloatTensor<B>,
    w: &PackedWeight,
    rounds: bool,
) -> FloatTensor<B> {
    let device = x.device();
    let on_device = |data: TensorData| B::float_from_data(data, &device);
    let rows = x.shape()[0];
    let times = |tile: TensorData, x: &FloatTensor<B>| {
        // The transposed product: NdArray copies a transposed operand, and the tile is the larger one.
        let y = B::float_matmul(on_device(tile), B::float_transpose(x.clone()));
        B::float_transpose(y)
    };
    if rows == 0 {
        return joined::<B>(Vec::new(), rows, w, &device);
    }
    let rounded = match int8::rows(w).filter(|_| rounds) {
        Some(_) => host::<B>(x.clone()).and_then(|x| Rounded::of(&x, w)),
        None => None,
    };
    let mut columns = Vec::new();
    match rounded {
        None => {
            for (first, count) in tiles(w) {
                columns.push(times(values(w, first, count), &x));
            }
            joined::<B>(columns, rows, w, &device)
        }
        Some(Rounded {
            codes,
            large,
            columns: outliers,
            scales,
        }) => {
            let (codes, large) = (on_device(codes), large.map(on_device));
            let mut plain = Vec::new();
            for (first, count) in tiles(w) {
                let [tile, beside] = integers(w, first, count, &outliers);
                columns.push(times(tile, &codes));
                if let Some(large) = &large {
                    plain.push(times(beside, large));
                }
            }
            let y = B::float_mul(joined::<B>(columns, rows, w, &device), on_device(scales));
            match large {
                Some(_) => B::float_add(y, joined::<B>(plain, rows, w, &device)),
                None => y,
            }
        }
    }
}

/// Side by side, `[rows, out]`.
fn joined<B: Backend>(
    mut columns: Vec<FloatTensor<B>>,
    rows: usize,
    w: &PackedWeight,
    device: &burn::backend::tensor::Device<B>,
) -> FloatTensor<B> {
    match columns.len() {
        0 => B::float_from_data(
            TensorData::new(Vec::<f32>::new(), [rows, w.dims()[0]]),
            device,
        ),
        1 => columns.remove(0),
        _ => B::float_cat(columns, 1),
    }
}

fn host<B: Backend>(x: FloatTensor<B>) -> Option<Vec<f32>> {
    read_sync(B::float_into_data(x)).ok()?.try_into_vec().ok()
}

/// `g · w`.
pub(super) fn backward<B: Backend>(g: FloatTensor<B>, w: &PackedWeight) -> FloatTensor<B> {
    let (device, rows, width) = (g.device(), g.shape()[0], w.dims()[1]);
    let mut sum = None;
    for (first, count) in tiles(w).filter(|_| rows > 0) {
        let tile = B::float_from_data(values(w, first, count), &device);
        let range = [Slice::from(0..rows), Slice::from(first..first + count)];
        let part = B::float_matmul(B::float_slice(g.clone(), &range), tile);
        sum = Some(match sum {
            Some(sum) => B::float_add(sum, part),
            None => part,
        });
    }
    sum.unwrap_or_else(|| {
        let zeros = vec![0.0f32; rows * width];
        B::float_from_data(
            TensorData::new(zeros, Shape::from(vec![rows, width])),
            &device,
        )
    })
}

/// The same in plain tensors, where there is no node for the backend.
pub(super) fn packed_linear(x: Tensor<2>, w: &PackedWeight, rounds: bool) -> Tensor<2> {
    let ([rows, _], device) = (x.dims(), x.device().without_autodiff());
    let on_device = |data: TensorData| Tensor::<2>::from_data(data, &device);
    let plain = |x: &Tensor<2>| {
        let part = |(first, count)| {
            x.clone()
                .matmul(on_device(values(w, first, count)).transpose())
        };
        let columns: Vec<_> = tiles(w).map(part).collect();
        match columns.is_empty() {
            true => Tensor::zeros([rows, 0], &x.device()),
            false => Tensor::cat(columns, 1),
        }
    };
    if int8::rows(w).filter(|_| rounds).is_none() {
        return plain(&x);
    }
    // The values of the rounded product with the gradient of the plain one.
    let unrounded = plain(&x);
    let host: Vec<f32> = match x.clone().detach().into_data().try_into_vec() {
        Ok(host) => host,
        Err(_) => return unrounded,
    };
    let Some(Rounded {
        codes,
        large,
        columns,
        scales,
    }) = Rounded::of(&host, w)
    else {
        return unrounded;
    };
    let (codes, large) = (on_device(codes), large.map(on_device));
    let (mut integer, mut beside) = (Vec::new(), Vec::new());
    for (first, count) in tiles(w) {
        let [tile, other] = integers(w, first, count, &columns);
        integer.push(codes.clone().matmul(on_device(tile).transpose()));
        if let Some(large) = &large {
            beside.push(large.clone().matmul(on_device(other).transpose()));
        }
    }
    if integer.is_empty() {
        return unrounded;
    }
    let mut y = Tensor::cat(integer, 1) * on_device(scales);
    if !beside.is_empty() {
        y = y + Tensor::cat(beside, 1);
    }
    let difference = y - unrounded.clone().detach().inner();
    unrounded + Tensor::from_inner(difference)
}

//! The products: tiles of the packed weight are decoded into the memory that a cube's units share, multiplied and
//! forgotten.

#![allow(clippy::too_many_arguments)] // `#[cube(launch)]` adds the client, the cubes and the units

use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::decode::{RUN, row_scale, run};
use super::layout::{Layout, Spec};
use crate::quantized_linear::int8::PER_PRODUCT;

/// Units of a cube.
const UNITS: usize = 256;
/// A cube makes a square of so many rows and columns of the result,
const TILE: usize = 64;
/// in steps of so many products.
const DEPTH: usize = 32;
/// Columns of a tile in shared memory: one more, so that units that write a column's numbers meet no bank twice.
const STRIDE: usize = TILE + 1;
/// Rows and columns of the result that one unit makes.
const EACH: usize = 4;
/// Units of a cube where one makes a column of the result.
const FEW_UNITS: usize = 64;
/// Up to so many rows a cube makes a column of the result and the weight is read once.
const FEW: usize = 8;

/// `x · wᵀ` (`times` false) or `x · w` (`times` true); a `scaled` result is multiplied by its row's number in
/// `scales` and its column's scale in the weight, for sums of products of integers.
#[cube(launch)]
fn tiles(
    x: &[f32],
    words: &[u32],
    scales: &[f32],
    y: &mut [f32],
    rows: usize,
    out: usize,
    width: usize,
    #[comptime] times: bool,
    #[comptime] scaled: bool,
    #[comptime] spec: Spec,
) {
    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * STRIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(DEPTH * STRIDE));
    let unit = UNIT_POS as usize;
    let first_row = CUBE_POS_Y as usize * TILE;
    let first_column = CUBE_POS_X as usize * TILE;
    let (depth, columns) = if comptime!(times) {
        (out, width)
    } else {
        (width, out)
    };

    let mut sums = Array::<f32>::new(comptime!(EACH * EACH));
    #[unroll]
    for i in 0..comptime!(EACH * EACH) {
        sums[i] = 0.0;
    }
    let mut values = Array::<f32>::new(RUN);
    let (my_row, my_column) = (unit / (TILE / EACH) * EACH, unit % (TILE / EACH) * EACH);

    let mut start = 0usize;
    while start < depth {
        // A unit fetches eight neighbours of a row of x,
        let (row, at) = (unit / (DEPTH / RUN), unit % (DEPTH / RUN) * RUN);
        #[unroll]
        for j in 0..RUN {
            let mut value = 0.0f32;
            if first_row + row < rows && start + at + j < depth {
                value = x[(first_row + row) * depth + start + at + j];
            }
            left[(at + j) * STRIDE + row] = value;
        }
        // and eight neighbours of a row of the weight.
        #[unroll]
        for j in 0..RUN {
            values[j] = 0.0;
        }
        if comptime!(times) {
            let (row, at) = (unit / (TILE / RUN), unit % (TILE / RUN) * RUN);
            if start + row < out && first_column + at < width {
                run(
                    words,
                    start + row,
                    first_column + at,
                    width,
                    &mut values,
                    spec,
                );
            }
            #[unroll]
            for j in 0..RUN {
                right[row * STRIDE + at + j] = values[j];
            }
        } else {
            if first_column + row < out && start + at < width {
                run(
                    words,
                    first_column + row,
                    start + at,
                    width,
                    &mut values,
                    spec,
                );
            }
            #[unroll]
            for j in 0..RUN {
                right[(at + j) * STRIDE + row] = values[j];
            }
        }
        sync_cube();
        for k in 0..DEPTH {
            #[unroll]
            for i in 0..EACH {
                let a = left[k * STRIDE + my_row + i];
                #[unroll]
                for j in 0..EACH {
                    sums[i * EACH + j] += a * right[k * STRIDE + my_column + j];
                }
            }
        }
        sync_cube();
        start += DEPTH;
    }

    #[unroll]
    for i in 0..EACH {
        #[unroll]
        for j in 0..EACH {
            let (row, column) = (first_row + my_row + i, first_column + my_column + j);
            if row < rows && column < columns {
                let mut sum = sums[i * EACH + j];
                if comptime!(scaled) {
                    sum = sum * (scales[row] * row_scale(words, column)) * PER_PRODUCT;
                }
                y[row * columns + column] = sum;
            }
        }
    }
}

/// `x · wᵀ` of few rows: a cube makes one column of the result.
#[cube(launch)]
fn few(
    x: &[f32],
    words: &[u32],
    scales: &[f32],
    y: &mut [f32],
    out: usize,
    width: usize,
    #[comptime] rows: usize,
    #[comptime] scaled: bool,
    #[comptime] spec: Spec,
) {
    let column = CUBE_POS;
    if column >= out {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let mut sums = Array::<f32>::new(rows);
    #[unroll]
    for i in 0..rows {
        sums[i] = 0.0;
    }
    let mut values = Array::<f32>::new(RUN);
    let mut from = unit * RUN;
    while from < width {
        run(words, column, from, width, &mut values, spec);
        #[unroll]
        for i in 0..rows {
            #[unroll]
            for j in 0..RUN {
                if comptime!(spec.whole) || from + j < width {
                    sums[i] += x[i * width + from + j] * values[j];
                }
            }
        }
        from += comptime!(FEW_UNITS * RUN);
    }
    let mut shared = Shared::<[f32]>::new_slice(comptime!(FEW_UNITS * rows));
    #[unroll]
    for i in 0..rows {
        shared[i * FEW_UNITS + unit] = sums[i];
    }
    sync_cube();
    // A unit adds up a row's sums, always in the same order.
    if unit < rows {
        let mut sum = 0.0f32;
        for i in 0..FEW_UNITS {
            sum += shared[unit * FEW_UNITS + i];
        }
        if comptime!(scaled) {
            sum = sum * (scales[unit] * row_scale(words, column)) * PER_PRODUCT;
        }
        y[unit * out + column] = sum;
    }
}

/// `x · wᵀ`, or `x · w` if `times`; `scales`, `[rows]`, are what sums of products of integers are multiplied by.
///
/// # Shapes
/// - x: `[rows, in]` or, if `times`, `[rows, out]`; the result is the other
pub(super) fn product(
    x: CubeTensor,
    words: CubeTensor,
    scales: Option<CubeTensor>,
    layout: Layout,
    times: bool,
) -> CubeTensor {
    let Layout {
        spec, out, width, ..
    } = layout;
    let x = into_contiguous(x);
    let rows = x.meta.shape()[0];
    let columns = if times { width } else { out };
    let shape = Shape::new([rows, columns]);
    let (client, device) = (x.client.clone(), x.device.clone());
    let y = empty_device_contiguous_dtype(client.clone(), device, shape, DType::F32);
    if rows == 0 || columns == 0 {
        return y;
    }
    let scaled = scales.is_some();
    // Not read where nothing is scaled.
    let scales = scales.unwrap_or_else(|| x.clone());
    let (x, words, scales) = (
        x.into_buffer_arg(),
        words.into_buffer_arg(),
        scales.into_buffer_arg(),
    );
    let to = y.clone().into_buffer_arg();
    if !times && rows <= FEW {
        let cubes = cubecl::calculate_cube_count_elemwise(&client, out, CubeDim::new_single());
        let units = CubeDim::new_1d(FEW_UNITS as u32);
        few::launch(
            &client, cubes, units, x, words, scales, to, out, width, rows, scaled, spec,
        );
    } else {
        let cubes = |size: usize| size.div_ceil(TILE) as u32;
        let cubes = CubeCount::Static(cubes(columns), cubes(rows), 1);
        let units = CubeDim::new_1d(UNITS as u32);
        tiles::launch(
            &client, cubes, units, x, words, scales, to, rows, out, width, times, scaled, spec,
        );
    }
    y
}

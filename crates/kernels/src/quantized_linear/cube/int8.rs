//! The input of a product with LLM.int8()'s rows on a CubeCL device, rounded as on the host (`packed_linear::int8`)
//! without a number that leaves the device.

#![allow(clippy::too_many_arguments)] // `#[cube(launch)]` adds the client, the cubes and the units

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, cubecl};
use cubecl::prelude::*;

use super::decode::rounded;
use super::layout::{Format, Layout};
use super::product::product;
use crate::quantized::formats::FloatKind;

/// Units of a cube.
const UNITS: usize = 256;
/// The bits of an infinite f32: of a magnitude's, those above are a NaN's.
const INFINITE: u32 = 0x7F80_0000;

/// 1 for a column in which a row reaches the threshold, else 0.
#[cube(launch)]
fn outliers(x: &[f32], flags: &mut [f32], rows: usize, width: usize, threshold: f32) {
    let column = ABSOLUTE_POS;
    if column >= width {
        terminate!();
    }
    let mut flag = 0.0f32;
    for row in 0..rows {
        if rounded(x[row * width + column], FloatKind::F16).abs() >= threshold {
            flag = 1.0;
        }
    }
    flags[column] = flag;
}

/// `127 · x / scale` to the nearest integer, ties to even; 0 where it is none of [-127, 127].
#[cube]
fn code(x: f32, factor: f32) -> f32 {
    let value = x * factor;
    let below = value.floor();
    let rest = value - below;
    let half = below / 2.0;
    let mut code = below;
    if rest > 0.5 || (rest == 0.5 && half != half.floor()) {
        code += 1.0;
    }
    // Outliers, which are not multiplied this way, may be infinite.
    if code.abs() <= 127.0 {
        code
    } else {
        0.0f32.runtime()
    }
}

/// A cube rounds a row: its integers, what it has in the outliers' columns, and its scale.
#[cube(launch)]
fn round_rows(
    x: &[f32],
    flags: &[f32],
    codes: &mut [f32],
    large: &mut [f32],
    scales: &mut [f32],
    rows: usize,
    width: usize,
    threshold: f32,
    #[comptime] some: bool,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    // Magnitudes are compared by their bits, among which a NaN's are the greatest.
    let mut most = 0u32;
    let mut column = unit;
    while column < width {
        let size = rounded(x[row * width + column], FloatKind::F16).abs();
        let bits = u32::reinterpret(size);
        if comptime!(some) {
            let inside = bits < u32::reinterpret(threshold) || bits > INFINITE;
            if inside && bits > most {
                most = bits;
            }
        } else if bits > most {
            most = bits;
        }
        column += UNITS;
    }
    let mut shared = Shared::<[u32]>::new_slice(UNITS);
    shared[unit] = most;
    sync_cube();
    if unit == 0 {
        for i in 0..UNITS {
            if shared[i] > most {
                most = shared[i];
            }
        }
        shared[0] = most;
        scales[row] = f32::reinterpret(most);
    }
    sync_cube();
    let scale = f32::reinterpret(shared[0]);
    let mut factor = 127.0 / scale;
    if u32::reinterpret(factor) >= INFINITE {
        factor = 0.0;
    }
    let mut column = unit;
    while column < width {
        let at = row * width + column;
        let value = x[at];
        let mut integer = code(rounded(value, FloatKind::F16), factor);
        if comptime!(some) {
            let mut rest = 0.0f32;
            if flags[column] > 0.5 {
                integer = 0.0;
                rest = value;
            }
            large[at] = rest;
        }
        codes[at] = integer;
        column += UNITS;
    }
}

/// The product with x rounded as `packed_linear` says.
pub(super) fn rounded_product(x: CubeTensor, words: CubeTensor, layout: Layout) -> CubeTensor {
    let x = into_contiguous(x);
    let (rows, width) = (x.meta.shape()[0], layout.width);
    if rows == 0 || width == 0 {
        return product(x, words, None, layout, false);
    }
    let client = x.client.clone();
    let empty = |shape: Shape| {
        let (client, device) = (client.clone(), x.device.clone());
        empty_device_contiguous_dtype(client, device, shape, DType::F32)
    };
    let some = layout.threshold > 0.0;
    let codes = empty(Shape::new([rows, width]));
    let scales = empty(Shape::new([rows]));
    // Where there is no threshold nothing is written to these.
    let (flags, large) = match some {
        true => (empty(Shape::new([width])), empty(Shape::new([rows, width]))),
        false => (empty(Shape::new([1])), empty(Shape::new([1]))),
    };
    let units = CubeDim::new_1d(UNITS as u32);
    if some {
        let cubes = cubecl::calculate_cube_count_elemwise(&client, width, units);
        let (x, flags) = (x.clone().into_buffer_arg(), flags.clone().into_buffer_arg());
        outliers::launch(
            &client,
            cubes,
            units,
            x,
            flags,
            rows,
            width,
            layout.threshold,
        );
    }
    let cubes = cubecl::calculate_cube_count_elemwise(&client, rows, CubeDim::new_single());
    round_rows::launch(
        &client,
        cubes,
        units,
        x.into_buffer_arg(),
        flags.into_buffer_arg(),
        codes.clone().into_buffer_arg(),
        large.clone().into_buffer_arg(),
        scales.clone().into_buffer_arg(),
        rows,
        width,
        layout.threshold,
        some,
    );
    let mut integers = layout;
    integers.spec.format = Format::Integers;
    let y = product(codes, words.clone(), Some(scales), integers, false);
    match some {
        true => CubeBackend::float_add(y, product(large, words, None, layout, false)),
        false => y,
    }
}

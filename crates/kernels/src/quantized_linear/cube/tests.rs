//! The kernels against the host's products, on whichever device CubeCL finds.

use burn::tensor::{Device, Tensor};

use crate::check::*;
use crate::quantized::formats::{
    Absmax, BLOCK_SIZES, FloatKind, FourBit, FourBitOptions, FourBitTensor,
};
use crate::quantized::{GgufKind, GgufRows, PackedRows, PackedWeight};
use crate::quantized_linear::{packed_linear, values_linear};
use crate::{Compute, Dropout, dora_linear, lora_linear_dropout};

/// Sums of up to 1536 products in another order.
const TOLERANCE: f32 = 1e-5;

fn weight(rows: PackedRows, compute: FloatKind) -> PackedWeight {
    PackedWeight::new(rows, compute, &Device::flex()).unwrap()
}

fn four_bit(shape: [usize; 2], kind: FourBit, block: usize, double: bool) -> PackedRows {
    let options = FourBitOptions {
        kind,
        block,
        double,
        dtype: FloatKind::F32,
    };
    let values = noise(3, shape[0] * shape[1]);
    PackedRows::FourBit(FourBitTensor::quantise(&values, &shape, options).unwrap())
}

fn int8(shape: [usize; 2], threshold: f32) -> PackedWeight {
    crate::quantized_linear::tests::int8(&noise(5, shape[0] * shape[1]), shape, threshold)
}

/// Random codes under scales that are numbers of order one; a block of them tests every bit.
fn blocks(kind: GgufKind, shape: [usize; 2]) -> PackedRows {
    let count = shape[0] * shape[1] / kind.elements();
    let mut bytes: Vec<u8> = draws(7)
        .map(|x| (x >> 40) as u8)
        .take(count * kind.bytes())
        .collect();
    let halves: &[usize] = match kind {
        GgufKind::Q4_0 | GgufKind::Q5_0 | GgufKind::Q8_0 => &[0],
        GgufKind::Q6K => &[208],
        _ => &[0, 2],
    };
    for (i, block) in bytes.chunks_exact_mut(kind.bytes()).enumerate() {
        for at in halves {
            // From about 2e-6, which is below the normal numbers of half precision, to 1e-2.
            let number = half::f16::from_f32(0.01 / (1 << (i % 13)) as f32);
            block[*at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
    }
    PackedRows::Blocks(GgufRows::new(kind, shape, bytes).unwrap())
}

/// Every format, with widths that are whole runs and such that are not.
fn weights() -> Vec<(String, PackedWeight)> {
    let mut all = Vec::new();
    for (kind, compute) in [
        (FourBit::Nf4, FloatKind::F32),
        (FourBit::Nf4, FloatKind::Bf16),
        (FourBit::Fp4, FloatKind::F16),
    ] {
        for width in [64, 88, 33] {
            for double in [false, true] {
                let name = format!("{kind:?} {compute:?} {width} {double}");
                all.push((
                    name,
                    weight(four_bit([75, width], kind, 64, double), compute),
                ));
            }
        }
    }
    for block in BLOCK_SIZES {
        let name = format!("blocks of {block}");
        let rows = four_bit([9, 1000], FourBit::Nf4, block, true);
        all.push((name, weight(rows, FloatKind::F32)));
    }
    for threshold in [0.0, 0.8, 1e-9] {
        for width in [64, 37] {
            let name = format!("int8 {width} {threshold}");
            all.push((name, int8([75, width], threshold)));
        }
    }
    // As wide as a real layer, with some outliers among what is twice the noise.
    let name = "int8 1536".to_owned();
    all.push((name, int8([75, 1536], 1.99)));
    for kind in GgufKind::ALL {
        let name = format!("{kind:?}");
        all.push((name, weight(blocks(kind, [70, 512]), FloatKind::F32)));
    }
    all
}

/// Runs on the host and on the device; both have the weight.
fn on(device: &Device, w: &PackedWeight) -> PackedWeight {
    PackedWeight::new(w.rows().clone(), w.compute(), device).unwrap()
}

/// One row, as many as a column's cube takes, one more, and several tiles of them.
#[test]
fn products_and_gradients_are_those_of_the_host() {
    let Some(gpu) = gpu() else { return };
    for (name, w) in weights() {
        let width = w.dims()[1];
        for rows in [1, 8, 9, 130] {
            let run = |device: &Device| {
                let x = leaf(1, [rows, width], true, device);
                let y = packed_linear(x.clone() * 2.0, on(device, &w), Compute::F32);
                let grads = backward(&y, 7);
                (floats(y), vec![grad(&x, &grads)])
            };
            let (got, want) = (run(&gpu), run(&flex()));
            let what = format!("{name}, {rows} rows");
            close(&what, &got.0, &want.0, TOLERANCE);
            close_grads(&what, &got.1, &want.1, TOLERANCE);
        }
    }
}

/// A product with rows of the identity is the weight's values. A device may join the product with a scale and the sum with
/// a minimum into one operation that rounds once: then the two differ by a rounding of the larger.
#[test]
fn values_are_decoded_to_the_bit() {
    let Some(gpu) = gpu() else { return };
    for (name, w) in weights() {
        let [out, width] = w.dims();
        let values = w.values();
        let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let exact =
            matches!(w.rows(), PackedRows::FourBit(t) if matches!(t.absmax(), Absmax::Plain(_)));
        for rows in [7, 40] {
            let mut one = vec![0.0; rows * width];
            (0..rows.min(width)).for_each(|i| one[i * width + i] = 1.0);
            let x = tensor(one, [rows, width], false, &gpu);
            let y = floats(values_linear(x, on(&gpu, &w), Compute::F32));
            for i in 0..rows.min(width) {
                for j in 0..out {
                    let (got, want) = (y[i * out + j], values[j * width + i]);
                    let off = (got - want).abs();
                    let bound = if exact { 0.0 } else { largest * f32::EPSILON };
                    assert!(off <= bound, "{name}: [{j}, {i}] is {got}, not {want}");
                }
            }
        }
    }
}

#[test]
fn every_half_precision_scale_is_read() {
    let Some(gpu) = gpu() else { return };
    // Blocks of ones under every positive finite scale.
    let count = 0x7C00;
    let bytes = (0..count as u16).flat_map(|bits| {
        let mut block = [1u8; 34];
        block[..2].copy_from_slice(&bits.to_le_bytes());
        block
    });
    let rows = GgufRows::new(GgufKind::Q8_0, [count, 32], bytes.collect()).unwrap();
    let w = weight(PackedRows::Blocks(rows), FloatKind::F32);
    let x = tensor([1.0; 1].repeat(32), [1, 32], false, &gpu);
    let x = x * tensor(
        (0..32).map(|i| f32::from(i == 5)).collect(),
        [1, 32],
        false,
        &gpu,
    );
    let y = floats(values_linear(x, on(&gpu, &w), Compute::F32));
    for (bits, got) in y.iter().enumerate() {
        assert_eq!(
            *got,
            half::f16::from_bits(bits as u16).to_f32(),
            "{bits:#x}"
        );
    }
}

#[test]
fn a_number_that_is_none_stays_none() {
    let Some(gpu) = gpu() else { return };
    for (name, w) in weights() {
        let width = w.dims()[1];
        let mut values = noise(1, 10 * width);
        values[3 * width + 1] = f32::NAN;
        let x = tensor(values, [10, width], false, &gpu);
        let y = floats(packed_linear(x, on(&gpu, &w), Compute::F32));
        for (row, y) in y.chunks_exact(w.dims()[0]).enumerate() {
            assert_eq!(y.iter().all(|y| y.is_nan()), row == 3, "{name}, row {row}");
        }
    }
}

#[test]
fn empty_and_untracked_inputs_pass() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.without_autodiff();
    for (m, k, n) in [(0, 8, 5), (3, 8, 5), (1, 8, 1)] {
        let four = four_bit([n, k], FourBit::Nf4, 64, true);
        for w in [int8([n, k], 0.5), weight(four, FloatKind::F32)] {
            let x = leaf(2, [m, k], false, &device);
            let y = packed_linear(x, on(&device, &w), Compute::F32);
            assert_eq!(y.dims(), [m, n]);
        }
    }
}

/// What is put together from the product: an adapter's map with dropout, and DoRA.
#[test]
fn adapters_over_packed_rows_compute_as_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let (m, k, n, r) = (9, 40, 30, 3);
    let w = weight(four_bit([n, k], FourBit::Nf4, 64, true), FloatKind::F32);
    let run = |device: &Device| {
        let at = |seed, shape: [usize; 2]| leaf::<2>(seed, shape, true, device);
        let (x, a, b) = (at(1, [m, k]), at(2, [r, k]), at(3, [n, r]));
        let length = leaf::<1>(6, [n], true, device);
        let squares = tensor(w.row_squares(), [n], false, device);
        let dropout = Dropout {
            probability: 0.3,
            seed: 4,
        };
        let (low, up, packed) = (a.clone(), b.clone(), on(device, &w));
        let dora = dora_linear(
            x.clone(),
            packed.clone(),
            low,
            up,
            length.clone(),
            squares,
            0.5,
        );
        let lora = lora_linear_dropout(x.clone(), packed, a.clone(), b.clone(), 0.5, dropout);
        let y = Tensor::cat(vec![dora, lora], 1);
        let grads = backward(&y, 7);
        let mut all: Vec<_> = [x, a, b].iter().map(|t| grad(t, &grads)).collect();
        all.push(grad(&length, &grads));
        (floats(y), all)
    };
    let (got, want) = (run(&gpu), run(&ndarray()));
    close("adapters", &got.0, &want.0, TOLERANCE);
    close_grads("adapters", &got.1, &want.1, TOLERANCE);
}

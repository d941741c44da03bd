use burn::tensor::Tensor;

use super::*;
use crate::check::{backward, close, draws, flex, floats, grad, noise, tensor};
use crate::quantized::formats::{FourBitOptions, Int8Rows};
use crate::{BaseWeight, Compute, Held, LowRank, Projection, project};

/// A matrix of random values in each format.
fn formats(shape: [usize; 2], device: &Device) -> Vec<PackedWeight> {
    let values = noise(3, shape[0] * shape[1]);
    let four = |double, dtype| {
        let options = FourBitOptions {
            double,
            dtype,
            ..FourBitOptions::default()
        };
        PackedRows::FourBit(FourBitTensor::quantise(&values, &shape, options).unwrap())
    };
    let eight = Int8Rows::quantise(&values, shape).unwrap();
    let mut all = vec![
        (four(false, FloatKind::F32), FloatKind::F32),
        (four(true, FloatKind::Bf16), FloatKind::F16),
    ];
    all.push((
        PackedRows::Int8 {
            rows: eight,
            threshold: 0.0,
        },
        FloatKind::Bf16,
    ));
    if shape[1].is_multiple_of(32) {
        // Scales of 1/16 and small minima: half-precision numbers as bytes.
        let mut bytes = draws(4).map(|x| (x >> 40) as u8);
        let blocks = shape[0] * shape[1] / 32;
        let block = |_| {
            [0x00, 0x2C, 0x10, 0xB0]
                .into_iter()
                .chain(bytes.by_ref().take(16))
                .collect()
        };
        let bytes: Vec<Vec<u8>> = (0..blocks).map(block).collect();
        let rows = GgufRows::new(GgufKind::Q4_1, shape, bytes.concat()).unwrap();
        all.push((PackedRows::Blocks(rows), FloatKind::F32));
    }
    let wrap = |(rows, compute)| PackedWeight::new(rows, compute, device).unwrap();
    all.into_iter().map(wrap).collect()
}

/// Values and gradients of x, a and b.
fn run(weight: BaseWeight, rows: usize) -> Vec<Vec<f32>> {
    let device = weight.device();
    let [out, width] = weight.dims();
    let leaf = |seed, shape: [usize; 2]| -> Tensor<2> {
        tensor(noise(seed, shape[0] * shape[1]), shape, true, &device)
    };
    let (x, a, b) = (
        leaf(4, [rows, width]),
        leaf(5, [3, width]),
        leaf(6, [out, 3]),
    );
    let lora = LowRank {
        a: a.clone(),
        b: b.clone(),
        scale: 0.5,
        dropout: None,
    };
    let projection = Projection {
        weight: weight.matrix().clone(),
        bias: None,
        lora: Some(lora),
    };
    let y = project(x.clone(), None, vec![projection], weight.compute());
    let grads = backward(&y, 7);
    let mut all = vec![floats(y)];
    all.extend([x, a, b].map(|t| grad(&t, &grads).unwrap()));
    all
}

/// The same numbers go through the same loops. LLM.int8() rounds the input too, which `packed_linear` tests.
#[test]
fn a_packed_weight_is_multiplied_as_its_dequantised_values_are() {
    for (rows, shape) in [(1, [5, 96]), (3, [70, 33]), (40, [70, 96])] {
        let all = formats(shape, &flex()).into_iter();
        for packed in all.filter(|w| !matches!(w.rows(), PackedRows::Int8 { .. })) {
            let name = packed.rows().name();
            let dense = BaseWeight::new(packed.dense(), Compute::F32);
            let packed = BaseWeight::new(Held::Packed(packed), Compute::F32);
            let (got, want) = (run(packed, rows), run(dense, rows));
            for (got, want) in got.iter().zip(&want) {
                close(name, got, want, 1e-6);
            }
        }
    }
}

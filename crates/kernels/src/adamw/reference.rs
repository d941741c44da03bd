//! The gradient's norm and AdamW in plain Burn operations.

use burn::tensor::{DType, Device, Int, IntDType, Tensor, TensorData};

use super::{AdamWInput, Codes, MOMENT_BLOCK, Moments, Numbers};
use crate::quantized::formats;
use crate::quantized::formats::{STEPS, dynamic_map, unsigned_dynamic_map};

pub(super) fn adamw(n: &Numbers, p: AdamWInput) -> (Tensor<1>, Moments) {
    let grad = if n.factor == 1.0 {
        p.grad
    } else {
        p.grad.mul_scalar(n.factor)
    };
    let Moments { first, second } = p.moments;
    let first = (grad.clone() - first.clone()).mul_scalar(n.rest1) + first;
    let second = second.mul_scalar(n.beta2) + grad.square().mul_scalar(n.rest2);
    let root = second
        .clone()
        .sqrt()
        .mul_scalar(n.root)
        .add_scalar(n.epsilon);
    let value = p.value.mul_scalar(n.kept) - (first.clone() / root).mul_scalar(n.rate);
    (value, Moments { first, second })
}

pub(super) fn adamw_8bit(
    n: &Numbers,
    p: AdamWInput<Moments<Codes>>,
) -> (Tensor<1>, Moments<Codes>) {
    let device = p.value.device();
    let p = p.map(|Moments { first, second }| Moments {
        first: dequantised(first, dynamic_map()),
        second: dequantised(second, unsigned_dynamic_map()),
    });
    let (value, Moments { first, second }) = adamw(n, p);
    let moments = Moments {
        first: quantised(first, formats::nearest(), &device),
        second: quantised(second, formats::unsigned_nearest(), &device),
    };
    (value, moments)
}

fn dequantised(moment: Codes, map: &[f32; 256]) -> Tensor<1> {
    let device = moment.absmax.device();
    let ([elements], [blocks]) = (moment.codes.dims(), moment.absmax.dims());
    let map = Tensor::<1>::from_data(TensorData::from(*map), (&device, DType::F32));
    let values = map.select(0, moment.codes.cast(IntDType::I32));
    let scales = moment.absmax.reshape([blocks, 1]);
    let scales = scales.repeat_dim(1, MOMENT_BLOCK);
    let scales = scales.reshape([blocks * MOMENT_BLOCK]);
    values * scales.narrow(0, 0, elements)
}

/// Each block's largest magnitude, NaN if one of them is not finite, and the codes of what is divided by it.
fn quantised(moment: Tensor<1>, nearest: &[u8; STEPS], device: &Device) -> Codes {
    let [elements] = moment.dims();
    let blocks = elements.div_ceil(MOMENT_BLOCK);
    let missing = blocks * MOMENT_BLOCK - elements;
    let filler = Tensor::<1>::zeros([missing], (device, DType::F32));
    let padded: Tensor<2> = match missing {
        0 => moment.reshape([blocks, MOMENT_BLOCK]),
        _ => Tensor::cat(vec![moment, filler], 0).reshape([blocks, MOMENT_BLOCK]),
    };
    // What is not finite is NaN times zero; where all is finite, this adds zero.
    let spoilt = padded.clone().mul_scalar(0.0).sum_dim(1);
    let absmax = padded.clone().abs().max_dim(1) + spoilt;
    let scaled = (padded * absmax.clone().recip()).clamp(-1.0, 1.0);
    let scaled = scaled.clone().mask_fill(scaled.is_nan(), -1.0);
    let last = (STEPS - 1) as f32;
    let steps = scaled.add_scalar(1.0).mul_scalar(0.5);
    let steps = steps.mul_scalar(last).add_scalar(0.5).int();
    let steps = steps.clamp(0, STEPS as i64 - 1);
    let steps = steps
        .reshape([blocks * MOMENT_BLOCK])
        .narrow(0, 0, elements);
    let nearest = TensorData::new(nearest.to_vec(), [STEPS]);
    let nearest = Tensor::<1, Int>::from_data(nearest, (device, Codes::dtype(device)));
    Codes {
        codes: nearest.select(0, steps),
        absmax: absmax.reshape([blocks]),
    }
}

pub(super) fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    let squares = tensors.iter().map(|t| t.clone().square().sum());
    let sum = squares.reduce(|a, b| a + b).map(Tensor::try_into_data);
    match sum {
        None => 0.0,
        Some(Ok(data)) => data.iter::<f64>().next().unwrap_or(f64::NAN),
        Some(Err(_)) => f64::NAN,
    }
}

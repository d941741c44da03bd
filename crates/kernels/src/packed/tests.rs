use burn::tensor::Tensor;

use super::*;
use crate::check::{backward, close, flex, floats, grad, noise, tensor};
use crate::quant::FourBitOptions;
use crate::{BaseWeight, Compute, Held, LowRank, Projection, project};

fn nf4(shape: [usize; 2], device: &Device) -> PackedWeight {
    let values = noise(3, shape[0] * shape[1]);
    let rows = FourBitTensor::quantise(&values, &shape, FourBitOptions::default()).unwrap();
    PackedWeight::new(PackedRows::FourBit(rows), FloatKind::F32, device).unwrap()
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

/// The same numbers go through the same loops.
#[test]
fn a_packed_weight_is_multiplied_as_its_dequantised_values_are() {
    for (rows, shape) in [(1, [5, 96]), (3, [70, 33]), (40, [70, 96])] {
        let packed = nf4(shape, &flex());
        let dense = BaseWeight::new(packed.dense(), Compute::F32);
        let packed = BaseWeight::new(Held::Packed(packed), Compute::F32);
        let (got, want) = (run(packed, rows), run(dense, rows));
        for (got, want) in got.iter().zip(&want) {
            close("packed", got, want, 1e-6);
        }
    }
}

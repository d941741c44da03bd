//! A frozen linear map whose weight is packed: the forward product and the input's gradient read it a few rows
//! at a time, and the graph keeps a handle of it and nothing of x.
//!
//! Rows of LLM.int8() ask for more than their values: the input is rounded to 8 bits too, but for the columns
//! that are too large for it (Dettmers et al. 2022, arXiv:2208.07339, and bitsandbytes' `MatMul8bitLt`).

mod cpu;
#[cfg(feature = "cube")]
pub(crate) mod cube;
mod int8;
mod node;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::base_weight::{Held, Matrix};
use crate::cpu::gemm::Compute;
use crate::quantized::PackedWeight;
use crate::recompute::can_checkpoint;

/// `y = x · wᵀ`.
///
/// Values that the weight stands for are multiplied as a dense weight of them would be. With rows of LLM.int8(),
/// x is rounded to f16; columns in which one of this call's rows reaches the threshold (0: none) are multiplied
/// as they are with the weight's values; of the rest, each row is rounded to integers, `127 · x / max|x|` to
/// the nearest and among two to the even one, and their products with the weight's are summed and scaled:
///
/// `y[i,j] = (Σ cx[i,k] · cw[j,k]) · max|x[i]| · max|w[j]| / 127² + Σ' x[i,k] · w[j,k]`
///
/// The gradient of x is `g · w` in either case, as if nothing had been rounded.
///
/// On Flex the products read the packed rows themselves, and on CubeCL's devices (features `cuda` and `wgpu`) kernels
/// decode a tile of them at a time, in f32. On NdArray, and on Flex without this crate's kernels, 256 rows of the
/// weight are a tensor at a time, forward and backward. On other backends they are too, but the graph keeps them where x
/// is tracked.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, result: `[rows, out]`
///
/// # Panics
/// If the shapes do not fit together.
pub fn packed_linear(x: Tensor<2>, w: PackedWeight, compute: Compute) -> Tensor<2> {
    assert!(
        x.dims()[1] == w.dims()[1],
        "packed_linear: x {:?} and w {:?} do not fit; a row of w is as long as one of x",
        x.dims(),
        w.dims(),
    );
    product(x, w, true, compute)
}

/// The product with the values that the weight stands for, whatever the format: LLM.int8() rounds nothing here.
pub(crate) fn values_linear(x: Tensor<2>, w: PackedWeight, compute: Compute) -> Tensor<2> {
    product(x, w, false, compute)
}

fn product(x: Tensor<2>, w: PackedWeight, rounds: bool, compute: Compute) -> Tensor<2> {
    // The backends that the node is for are those that blocks can be run again on.
    match can_checkpoint(&x.device()) {
        true => node::packed_linear(x, w, rounds, compute),
        false => reference::packed_linear(x, &w, rounds),
    }
}

/// Whether a product with the matrix rounds what it is multiplied with.
pub(crate) fn rounds_input(w: &Matrix) -> bool {
    match w {
        Held::Dense(_) => false,
        Held::Packed(packed) => int8::rows(packed).is_some(),
    }
}

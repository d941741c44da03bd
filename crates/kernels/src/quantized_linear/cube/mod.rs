//! The map on CubeCL's devices (CUDA, Metal, ROCm, Vulkan, WebGPU): the weight lies on the device as it is packed,
//! and the kernels decode a tile of it at a time.

mod decode;
mod int8;
mod layout;
mod product;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::OnceLock;

use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Cube, TensorMetadata, backend_extension};
use burn::tensor::{Shape, TensorData};
use burn_cubecl::CubeBackend;

pub use layout::Layout;

use super::node::PackedLinearOps;
use crate::cpu::gemm::Compute;
use crate::quantized::PackedWeight;

/// The weight's words on its device, sent there when a product first asks for them.
#[derive(Debug, Default)]
pub(crate) struct OnDevice(OnceLock<IntTensor<Cube>>);

impl OnDevice {
    fn words(
        &self,
        w: &PackedWeight,
        device: &burn::backend::tensor::Device<Cube>,
    ) -> IntTensor<Cube> {
        let send = || {
            let words = layout::words(w);
            let count = words.len();
            Cube::int_from_data(TensorData::new(words, [count]), device)
        };
        self.0.get_or_init(send).clone()
    }
}

/// The kernels as a backend extension, so that they take their place among fused operations.
#[backend_extension(Cube, Fusion)]
pub trait PackedCubeOps: Backend {
    /// `x · wᵀ`; `rounds` says whether x is rounded where the format does that.
    #[fusion(dtype = x, shape = product_shape(x, layout, &false))]
    fn enamel_packed_product(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        layout: Layout,
        rounds: bool,
    ) -> FloatTensor<Self>;

    /// `g · w`.
    #[fusion(dtype = g, shape = product_shape(g, layout, &true))]
    fn enamel_packed_gradient(
        g: FloatTensor<Self>,
        words: IntTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;
}

fn product_shape(x: &Shape, layout: &Layout, times: &bool) -> Shape {
    let columns = if *times { layout.width } else { layout.out };
    Shape::new([x[0], columns])
}

impl PackedCubeOps for CubeBackend {
    fn enamel_packed_product(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        layout: Layout,
        rounds: bool,
    ) -> FloatTensor<Self> {
        match rounds && layout.rounds() {
            true => int8::rounded_product(x, words, layout),
            false => product::product(x, words, None, layout, false),
        }
    }

    fn enamel_packed_gradient(
        g: FloatTensor<Self>,
        words: IntTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        product::product(g, words, None, layout, true)
    }
}

impl PackedLinearOps for Cube {
    fn enamel_packed_linear(
        x: FloatTensor<Self>,
        w: PackedWeight,
        rounds: bool,
        _: Compute,
    ) -> FloatTensor<Self> {
        let words = w.on_device().words(&w, &x.device());
        Self::enamel_packed_product(x, words, Layout::of(&w), rounds)
    }

    fn enamel_packed_times(g: FloatTensor<Self>, w: PackedWeight, _: Compute) -> FloatTensor<Self> {
        let words = w.on_device().words(&w, &g.device());
        Self::enamel_packed_gradient(g, words, Layout::of(&w))
    }
}

//! Test support: seeded inputs and comparisons. The reference runs on NdArray, the operation under
//! test on Flex, so that the two share no code below the `Tensor` API.

pub(crate) mod property;

use burn::tensor::{Device, Gradients, Tensor, TensorData};

pub(crate) fn flex() -> Device {
    Device::flex().autodiff()
}

#[allow(deprecated)]
pub(crate) fn ndarray() -> Device {
    Device::ndarray().autodiff()
}

/// A device of CubeCL's, if this machine has one. Tests that need one pass without, unless the variable
/// `ENAMEL_NEEDS_GPU` is set.
#[cfg(feature = "cube")]
#[allow(clippy::panic, clippy::print_stderr)]
pub(crate) fn gpu() -> Option<Device> {
    use burn::tensor::DeviceType;
    let kinds = [
        #[cfg(feature = "cuda")]
        DeviceType::Cuda,
        #[cfg(feature = "wgpu")]
        DeviceType::Wgpu,
    ];
    let found = kinds
        .into_iter()
        .find_map(|kind| Device::enumerate(kind).into_iter().next());
    if found.is_none() {
        assert!(
            std::env::var_os("ENAMEL_NEEDS_GPU").is_none(),
            "ENAMEL_NEEDS_GPU is set and there is no GPU"
        );
        eprintln!("no GPU: nothing was tested");
    }
    found.map(Device::autodiff)
}

/// Uniform in `[-1, 1)`, from SplitMix64.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    draws(seed)
        .map(|x| (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        .take(n)
        .collect()
}

/// The same random words for one seed.
pub(crate) fn draws(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// A leaf tensor with noise in it.
pub(crate) fn leaf<const D: usize>(
    seed: u64,
    shape: [usize; D],
    tracked: bool,
    device: &Device,
) -> Tensor<D> {
    let n = shape.iter().product();
    tensor(noise(seed, n), shape, tracked, device)
}

pub(crate) fn tensor<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    tracked: bool,
    device: &Device,
) -> Tensor<D> {
    let t = Tensor::from_data(TensorData::new(values, shape), device);
    if tracked { t.require_grad() } else { t }
}

pub(crate) fn floats<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec::<f32>().unwrap()
}

pub(crate) fn grad<const D: usize>(t: &Tensor<D>, grads: &Gradients) -> Option<Vec<f32>> {
    t.grad(grads).map(floats)
}

/// Gradients of `Σ y · weight`, with noise as the weights.
pub(crate) fn backward<const D: usize>(y: &Tensor<D>, seed: u64) -> Gradients {
    let weights = leaf(seed, y.dims(), false, &y.device());
    (y.clone() * weights).sum().backward()
}

/// `|got − want| ≤ tolerance · max |want|` everywhere: rounding errors of a sum scale with its
/// terms, which are as large as the largest results, not with the result at hand. The inputs are of
/// order one, so where all results cancel the terms' own size, 0.1, is the measure.
pub(crate) fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(0.1);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * scale,
            "{what}[{i}]: got {g}, want {w}, scale {scale}"
        );
    }
}

/// Equal in whether they exist, and [`close`] if so.
pub(crate) fn close_grads(
    what: &str,
    got: &[Option<Vec<f32>>],
    want: &[Option<Vec<f32>>],
    tolerance: f32,
) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        match (g, w) {
            (Some(g), Some(w)) => close(&format!("{what}: gradient {i}"), g, w, tolerance),
            (None, None) => {}
            _ => panic!("{what}: gradient {i} exists in one only"),
        }
    }
}

/// Runs `f` on pools of 1, 2 and 8 threads; the results must be the same bits.
pub(crate) fn same_on_any_pool(f: impl Fn() -> Vec<Vec<f32>> + Send + Sync) {
    let mut first: Option<Vec<Vec<u32>>> = None;
    for threads in [1, 2, 8] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let got: Vec<Vec<u32>> = pool
            .install(&f)
            .into_iter()
            .map(|v| v.into_iter().map(f32::to_bits).collect())
            .collect();
        assert!(got.iter().flatten().count() > 0);
        match &first {
            None => first = Some(got),
            Some(first) => assert!(*first == got, "{threads} threads differ from one"),
        }
    }
}

/// Central difference of `f` in direction `d` at `x`, in f64.
pub(crate) fn slope(x: &[f32], d: &[f32], step: f32, f: impl Fn(Vec<f32>) -> f64) -> f64 {
    let at = |s: f32| f(x.iter().zip(d).map(|(x, d)| x + s * d).collect());
    (at(step) - at(-step)) / (2.0 * f64::from(step))
}

/// `Σ a·b` in f64.
pub(crate) fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}

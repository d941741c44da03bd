//! The weight of a base's linear map or embedding, as products read it.

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::gemm::Compute;
use crate::cpu::path::CpuPath;
use crate::cpu::storage::{is_flex, weight_on_flex};
use crate::quantized::PackedWeight;

/// A matrix as it is held: a tensor, or packed.
#[derive(Clone, Debug)]
pub enum Held<T> {
    /// f32 or bf16.
    Dense(T),
    /// Quantised, and frozen.
    Packed(PackedWeight),
}

/// A matrix `[out, in]`.
pub type Matrix = Held<Tensor<2>>;

impl<T> Held<T> {
    /// The same of what `f` makes of a tensor.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Held<U> {
        match self {
            Self::Dense(tensor) => Held::Dense(f(tensor)),
            Self::Packed(packed) => Held::Packed(packed),
        }
    }

    /// The tensor, if it is one.
    pub fn tensor(&self) -> Option<&T> {
        match self {
            Self::Dense(tensor) => Some(tensor),
            Self::Packed(_) => None,
        }
    }
}

impl Matrix {
    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Packed(packed) => packed.dims(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Packed(packed) => packed.device(),
        }
    }

    /// Whether it gets a gradient.
    pub fn is_tracked(&self) -> bool {
        self.tensor().is_some_and(Tensor::is_tracked)
    }

    /// The values in f32: those that are held, or a copy made for the occasion.
    pub fn dense(&self) -> Tensor<2> {
        match self {
            Self::Dense(tensor) => widened(tensor.clone()),
            Self::Packed(packed) => packed.dense(),
        }
    }

    /// What it holds, in words for a profile.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Dense(tensor) => tensor.dtype().name(),
            Self::Packed(packed) => packed.rows().name(),
        }
    }
}

/// Whether a matrix lies where the CPU kernels can read it: see [`weight_on_flex`].
pub(crate) fn matrix_on_flex(w: &Matrix) -> bool {
    match w {
        Held::Dense(tensor) => weight_on_flex(tensor),
        Held::Packed(packed) => {
            CpuPath::chosen() != CpuPath::Reference && is_flex(&packed.device())
        }
    }
}

impl From<Tensor<2>> for Matrix {
    fn from(tensor: Tensor<2>) -> Self {
        Self::Dense(tensor)
    }
}

impl From<PackedWeight> for Matrix {
    fn from(packed: PackedWeight) -> Self {
        Self::Packed(packed)
    }
}

/// A matrix `[out, in]` and what products with it round their factors to. Its values are f32, bf16 or
/// packed; an f32 one may be trained, the others are frozen. A clone is another handle of the same values.
#[derive(Clone, Debug)]
pub struct BaseWeight {
    matrix: Matrix,
    compute: Compute,
}

impl From<Tensor<2>> for BaseWeight {
    fn from(values: Tensor<2>) -> Self {
        Self::new(values, Compute::F32)
    }
}

impl From<PackedWeight> for BaseWeight {
    fn from(packed: PackedWeight) -> Self {
        Self::new(packed, Compute::F32)
    }
}

impl From<Matrix> for BaseWeight {
    fn from(matrix: Matrix) -> Self {
        Self::new(matrix, Compute::F32)
    }
}

impl BaseWeight {
    /// Wraps a tensor of f32 or bf16, or a packed matrix.
    pub fn new(matrix: impl Into<Matrix>, compute: Compute) -> Self {
        Self {
            matrix: matrix.into(),
            compute,
        }
    }

    /// Rows (outputs) and columns (inputs).
    pub fn dims(&self) -> [usize; 2] {
        self.matrix.dims()
    }

    /// Where the values are.
    pub fn device(&self) -> Device {
        self.matrix.device()
    }

    /// What products round their factors to.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The matrix as it is held.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// The values as a tensor, f32 or bf16: those that are held, or a packed matrix's made for the occasion.
    pub fn values(&self) -> Tensor<2> {
        match &self.matrix {
            Held::Dense(tensor) => tensor.clone(),
            Held::Packed(packed) => packed.dense(),
        }
    }

    /// The values in f32: those that are held, or a widened copy made for the occasion.
    pub fn dense(&self) -> Tensor<2> {
        self.matrix.dense()
    }

    /// What `f` makes of [`Self::dense`], under the same products.
    pub fn map(self, f: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Self {
        Self::new(f(self.dense()), self.compute)
    }
}

/// The tensor in f32.
pub fn widened<const D: usize>(values: Tensor<D>) -> Tensor<D> {
    match values.dtype() {
        DType::F32 => values,
        _ => values.cast(DType::F32),
    }
}

/// An f32 rounded to bf16, to the nearest and among two to the even one.
pub fn rounded(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Values of a matrix on the host, on their way to a device.
#[derive(Clone, Debug)]
pub enum HostValues {
    /// In f32.
    F32(Vec<f32>),
    /// In bf16.
    Bf16(Vec<bf16>),
}

/// Values a thread converts at once.
const CHUNK: usize = 1 << 16;

impl HostValues {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rounded to bf16, to the nearest and among two to the even one.
    pub fn rounded(self) -> Self {
        match self {
            Self::F32(values) => Self::Bf16(converted(&values, |x| bf16::from_f32(*x))),
            rounded => rounded,
        }
    }

    /// See [`transposed`].
    pub fn transposed(self, columns: usize) -> Self {
        match self {
            Self::F32(values) => Self::F32(transposed(&values, columns)),
            Self::Bf16(values) => Self::Bf16(transposed(&values, columns)),
        }
    }

    /// In f32.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::Bf16(values) => converted(&values, |x| x.to_f32()),
        }
    }

    /// The values on a device: bf16 stays bf16 where the kernels read it (see [`holds_bf16`]) and is widened
    /// elsewhere.
    ///
    /// # Panics
    /// If they are not as many as the shape holds.
    pub fn into_tensor<const D: usize>(self, shape: [usize; D], device: &Device) -> Tensor<D> {
        match self {
            Self::Bf16(values) if holds_bf16(device) => {
                Tensor::from_data(TensorData::new(values, shape), (device, DType::BF16))
            }
            values => Tensor::from_data(
                TensorData::new(values.into_f32(), shape),
                (device, DType::F32),
            ),
        }
    }
}

/// The row-major values of a matrix of so many columns, the other way round.
pub fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let column = |c: usize| values.iter().skip(c).step_by(columns).copied();
    (0..columns).flat_map(column).collect()
}

fn converted<A: Sync, B: Copy + Default + Send>(
    values: &[A],
    f: impl Fn(&A) -> B + Sync,
) -> Vec<B> {
    let mut out = vec![B::default(); values.len()];
    out.par_chunks_mut(CHUNK)
        .zip(values.par_chunks(CHUNK))
        .for_each(|(out, values)| {
            for (out, value) in out.iter_mut().zip(values) {
                *out = f(value);
            }
        });
    out
}

/// Whether kernels read bf16 weights on the device as they lie. Elsewhere they are held in f32.
pub fn holds_bf16(device: &Device) -> bool {
    is_flex(device) && CpuPath::chosen() != CpuPath::Reference
}

impl Compute {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// What becomes of it on a device, in words. `stored_bf16` says whether the model's file is in bf16.
    pub fn on(self, device: &Device, stored_bf16: bool) -> String {
        let held = holds_bf16(device);
        if self == Self::F32 {
            return match stored_bf16 && held {
                true => "f32 products; weights stay in bf16, as the file has them".to_owned(),
                false => "f32 weights and products".to_owned(),
            };
        }
        if !held {
            let why = match is_flex(device) {
                true => "the reference path has no bf16",
                false => "this device's kernels have no bf16",
            };
            return format!("weights rounded to bf16 and held in f32, f32 products: {why}");
        }
        match CpuPath::chosen() {
            CpuPath::Amx => "bf16 weights and products, f32 sums (AMX)".to_owned(),
            CpuPath::Avx512Bf16 => "bf16 weights and products, f32 sums (AVX-512 BF16)".to_owned(),
            path if CpuPath::available().contains(&CpuPath::Amx)
                || CpuPath::available().contains(&CpuPath::Avx512Bf16) =>
            {
                format!(
                    "bf16 weights, f32 products: {} = {} has no bf16 instructions",
                    crate::CPU_VARIABLE,
                    path.name()
                )
            }
            _ => "bf16 weights, f32 products: this CPU has no bf16 instructions".to_owned(),
        }
    }
}

impl std::str::FromStr for Compute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::F32, Self::Bf16]
            .into_iter()
            .find(|compute| compute.name() == text)
            .ok_or_else(|| format!("there is no compute dtype {text:?}; there are f32 and bf16"))
    }
}

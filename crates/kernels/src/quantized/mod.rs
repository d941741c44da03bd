//! Frozen matrices that stay quantised: what the products read a few rows of at a time, so that nothing
//! dense of the matrix's size ever exists.

pub mod formats;
mod gguf;
pub(crate) mod read;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

pub use gguf::{GgufKind, GgufRows};

use crate::cpu::simd::level;
use crate::quantized::formats::{FloatKind, FourBitTensor, Int8Rows, QuantError};

/// A frozen matrix in one of the quantised formats, in host memory. A clone is another handle.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    inner: Arc<Inner>,
    device: Device,
}

#[derive(Debug)]
struct Inner {
    rows: PackedRows,
    dims: [usize; 2],
    compute: FloatKind,
    #[cfg(feature = "cube")]
    on_device: crate::quantized_linear::cube::OnDevice,
}

/// The formats.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedRows {
    /// NF4 or FP4 of bitsandbytes.
    FourBit(FourBitTensor),
    /// Rows of LLM.int8().
    Int8 {
        /// Codes and scales.
        rows: Int8Rows,
        /// Inputs of this magnitude and more are multiplied in floating point (`llm_int8_threshold`);
        /// 0 rounds all of them.
        threshold: f32,
    },
    /// Blocks of a GGUF file.
    Blocks(GgufRows),
}

impl PackedRows {
    /// Rows and columns.
    ///
    /// # Errors
    /// If it is not a matrix.
    pub fn dims(&self) -> Result<[usize; 2], QuantError> {
        match self {
            Self::FourBit(tensor) => match *tensor.shape() {
                [rows, columns] => Ok([rows, columns]),
                ref shape => Err(QuantError::NotMatrix(shape.to_vec())),
            },
            Self::Int8 { rows, .. } => Ok(rows.shape()),
            Self::Blocks(rows) => Ok(rows.shape()),
        }
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        match self {
            Self::FourBit(tensor) => tensor.bytes(),
            Self::Int8 { rows, .. } => rows.bytes(),
            Self::Blocks(rows) => rows.bytes(),
        }
    }

    /// The format's name, as people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::FourBit(tensor) => tensor.kind().name(),
            Self::Int8 { .. } => "int8",
            Self::Blocks(rows) => rows.kind().name(),
        }
    }
}

impl PackedWeight {
    /// Wraps quantised rows for a device. Their values are rounded to `compute` when they are read
    /// (`bnb_4bit_compute_dtype`), as in bitsandbytes' forward product: the dtype that the weight had before it
    /// was quantised plays no part. Its backward product goes through that dtype; here both read the same values,
    /// so that gradients are those of the forward pass.
    ///
    /// # Errors
    /// If it is not a matrix.
    pub fn new(rows: PackedRows, compute: FloatKind, device: &Device) -> Result<Self, QuantError> {
        let dims = rows.dims()?;
        let inner = Arc::new(Inner {
            rows,
            dims,
            compute,
            #[cfg(feature = "cube")]
            on_device: Default::default(),
        });
        let device = device.clone();
        Ok(Self { inner, device })
    }

    /// Rows (outputs) and columns (inputs).
    pub fn dims(&self) -> [usize; 2] {
        self.inner.dims
    }

    /// The device whose products read it.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// The format.
    pub fn rows(&self) -> &PackedRows {
        &self.inner.rows
    }

    /// What values are rounded to when they are read.
    pub fn compute(&self) -> FloatKind {
        self.inner.compute
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.inner.rows.bytes()
    }

    /// Its copy on a CubeCL device.
    #[cfg(feature = "cube")]
    pub(crate) fn on_device(&self) -> &crate::quantized_linear::cube::OnDevice {
        &self.inner.on_device
    }

    /// Reads a row from column `from` on, as f32.
    ///
    /// # Panics
    /// If the row does not have so many columns.
    pub fn read(&self, row: usize, from: usize, to: &mut [f32]) {
        let [_, width] = self.inner.dims;
        assert!(from + to.len() <= width, "columns past the end of a row");
        let (level, compute) = (level(), self.inner.compute);
        match &self.inner.rows {
            PackedRows::FourBit(tensor) => {
                let start = row * width + from;
                return read::four_bit(level, tensor, start, compute, compute, to);
            }
            PackedRows::Int8 { rows, .. } => rows.read(level, row, from, to),
            PackedRows::Blocks(rows) => rows.read(level, row, from, to),
        }
        if compute != FloatKind::F32 {
            read::round(level, compute, to);
        }
    }

    /// Reads a row's integers from column `from` on: LLM.int8()'s codes, and of other formats the values.
    ///
    /// # Panics
    /// If the row does not have so many columns.
    pub(crate) fn read_codes(&self, row: usize, from: usize, to: &mut [f32]) {
        match &self.inner.rows {
            PackedRows::Int8 { rows, .. } => rows.read_codes(level(), row, from, to),
            PackedRows::FourBit(_) | PackedRows::Blocks(_) => self.read(row, from, to),
        }
    }

    /// Reads a row's values in some columns, as f32.
    ///
    /// # Panics
    /// If there are not as many places as columns, or a column is not there.
    pub(crate) fn read_columns(&self, row: usize, columns: &[usize], to: &mut [f32]) {
        assert_eq!(columns.len(), to.len(), "a place for each column");
        if let PackedRows::Int8 { rows, .. } = &self.inner.rows {
            rows.gather(row, columns, to);
            return read::round(level(), self.inner.compute, to);
        }
        for (to, column) in to.iter_mut().zip(columns) {
            self.read(row, *column, std::slice::from_mut(to));
        }
    }

    /// The sum of each row's squares.
    pub fn row_squares(&self) -> Vec<f32> {
        let [rows, width] = self.dims();
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let of_row = |row: usize| {
            let mut values = vec![0.0; width];
            self.read(row, 0, &mut values);
            values.iter().map(square).sum::<f64>() as f32
        };
        (0..rows).into_par_iter().map(of_row).collect()
    }

    /// All values, row-major: for merging and for what cannot read it packed.
    pub fn values(&self) -> Vec<f32> {
        let [rows, width] = self.dims();
        let mut values = vec![0.0; rows * width];
        if width > 0 {
            values
                .par_chunks_mut(width)
                .enumerate()
                .for_each(|(row, to)| self.read(row, 0, to));
        }
        values
    }

    /// All values as a dense tensor `[out, in]` in f32.
    pub fn dense(&self) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.values(), self.dims()), &self.device)
    }
}

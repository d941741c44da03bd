//! A packed weight as CubeCL's kernels read it: one buffer of 32-bit words.
//!
//! All formats keep the bytes they have on the host, four to a word, lowest first: the codes, and scales in f32 or,
//! doubly quantised, as they are. A head of [`HEAD`] words comes first: the 16 numbers of a 4-bit code, then
//! where in the buffer the scales lie, where the scales of the scales lie, and the scales' mean.

use crate::quantized::formats::{Absmax, FloatKind};
use crate::quantized::{GgufKind, PackedRows, PackedWeight};

/// Words before the codes.
pub(super) const HEAD: usize = 20;
/// The word that says where the scales begin.
pub(super) const SCALES: usize = 16;
/// The word that says where the map and the scales of doubly quantised scales begin.
pub(super) const NESTED: usize = 17;
/// The word that holds the mean of doubly quantised scales.
pub(super) const MEAN: usize = 18;

/// What a kernel is compiled for. Sizes are values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Format {
    /// 4-bit codes in blocks; `nested` is 0 or the block of doubly quantised scales.
    FourBit { block: usize, nested: usize },
    /// Bytes with a scale a row.
    Int8,
    /// The same bytes as the integers they are.
    Integers,
    /// Blocks of a GGUF file.
    Blocks(GgufKind),
}

/// A format and what its values are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub(super) format: Format,
    pub(super) compute: FloatKind,
    /// Whether a row is whole runs of eight columns.
    pub(super) whole: bool,
}

/// What travels with the words.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub(super) spec: Spec,
    /// Rows, the outputs.
    pub(super) out: usize,
    /// Columns, the inputs.
    pub(super) width: usize,
    /// From which magnitude on an input is an outlier; 0: none is.
    pub(super) threshold: f32,
}

impl Layout {
    /// Whether the format rounds what it is multiplied with.
    pub(super) fn rounds(&self) -> bool {
        self.spec.format == Format::Int8
    }

    pub(super) fn of(w: &PackedWeight) -> Self {
        let [out, width] = w.dims();
        let (format, threshold) = match w.rows() {
            PackedRows::FourBit(tensor) => {
                let nested = match tensor.absmax() {
                    Absmax::Plain(_) => 0,
                    Absmax::Nested { blocks, .. } => blocks.block,
                };
                let block = tensor.block();
                (Format::FourBit { block, nested }, 0.0)
            }
            PackedRows::Int8 { threshold, .. } => (Format::Int8, *threshold),
            PackedRows::Blocks(rows) => (Format::Blocks(rows.kind()), 0.0),
        };
        Self {
            spec: Spec {
                format,
                compute: w.compute(),
                whole: width.is_multiple_of(8),
            },
            out,
            width,
            threshold,
        }
    }
}

/// Bytes four to a word, the last filled with zeros.
fn push_bytes(words: &mut Vec<u32>, bytes: &[u8]) {
    let (whole, rest) = bytes.as_chunks::<4>();
    words.extend(whole.iter().map(|four| u32::from_le_bytes(*four)));
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        words.push(u32::from_le_bytes(last));
    }
}

fn push_numbers(words: &mut Vec<u32>, numbers: &[f32]) {
    words.extend(numbers.iter().map(|x| x.to_bits()));
}

/// The buffer's words.
pub(super) fn words(w: &PackedWeight) -> Vec<u32> {
    let mut words = Vec::with_capacity(HEAD + w.bytes().div_ceil(4) + 260);
    words.resize(HEAD, 0);
    match w.rows() {
        PackedRows::FourBit(tensor) => {
            for (word, number) in words.iter_mut().zip(tensor.kind().table()) {
                *word = number.to_bits();
            }
            push_bytes(&mut words, tensor.codes());
            words[SCALES] = words.len() as u32;
            match tensor.absmax() {
                Absmax::Plain(scales) => push_numbers(&mut words, scales),
                Absmax::Nested { blocks, offset } => {
                    push_bytes(&mut words, &blocks.codes);
                    words[NESTED] = words.len() as u32;
                    words[MEAN] = offset.to_bits();
                    push_numbers(&mut words, &blocks.map);
                    push_numbers(&mut words, &blocks.absmax);
                }
            }
        }
        PackedRows::Int8 { rows, .. } => {
            push_bytes(&mut words, bytemuck::cast_slice(rows.codes()));
            words[SCALES] = words.len() as u32;
            push_numbers(&mut words, rows.absmax());
        }
        PackedRows::Blocks(rows) => push_bytes(&mut words, rows.data()),
    }
    words
}

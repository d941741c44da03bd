//! The GGUF container, written: metadata, tensor list, and tensors one after the other.
//!
//! Layout as in `header`; version 3, little-endian, alignment 32.

use std::io::{self, Write};

use super::header::{DEFAULT_ALIGNMENT, ValueType};
use super::quant::BlockType;

/// Metadata entries, encoded as they come.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    /// Takes over an entry of another file: key, type and value as they stand there.
    pub fn raw(&mut self, entry: &[u8]) {
        self.count = self.count.saturating_add(1);
        self.bytes.extend(entry);
    }

    pub fn string(&mut self, key: &str, value: &str) {
        self.start(key, ValueType::String);
        self.text(value);
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.start(key, ValueType::U32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f64) {
        self.start(key, ValueType::F32);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.start(key, ValueType::Bool);
        self.bytes.push(value.into());
    }

    pub fn strings<T: AsRef<str>>(&mut self, key: &str, values: &[T]) {
        self.start_array(key, ValueType::String, values.len());
        for value in values {
            self.text(value.as_ref());
        }
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        self.start_array(key, ValueType::I32, values.len());
        self.bytes
            .extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        self.start_array(key, ValueType::F32, values.len());
        self.bytes
            .extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    fn start(&mut self, key: &str, kind: ValueType) {
        self.count = self.count.saturating_add(1);
        self.text(key);
        self.bytes.extend((kind as u32).to_le_bytes());
    }

    fn start_array(&mut self, key: &str, element: ValueType, count: usize) {
        self.start(key, ValueType::Array);
        self.bytes.extend((element as u32).to_le_bytes());
        self.bytes.extend((count as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }
}

/// A tensor to write, under its GGUF name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub name: String,
    /// Outermost first; whole blocks in a row.
    pub shape: Vec<usize>,
    pub block: BlockType,
}

impl Listed {
    /// Bytes of its data, without padding.
    pub fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        let blocks = elements.checked_div(self.block.elements());
        blocks.unwrap_or(0).saturating_mul(self.block.bytes()) as u64
    }
}

/// Writes everything before the data.
pub(crate) fn header(
    out: &mut impl Write,
    metadata: &Metadata,
    tensors: &[Listed],
) -> io::Result<()> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend(metadata.count.to_le_bytes());
    bytes.extend(&metadata.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        bytes.extend((tensor.name.len() as u64).to_le_bytes());
        bytes.extend(tensor.name.as_bytes());
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        let innermost_first = tensor.shape.iter().rev();
        bytes.extend(innermost_first.flat_map(|dim| (*dim as u64).to_le_bytes()));
        bytes.extend(tensor.block.code().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let bytes = tensor.bytes().next_multiple_of(DEFAULT_ALIGNMENT);
        offset = offset.saturating_add(bytes);
    }
    pad(&mut bytes);
    out.write_all(&bytes)
}

/// Zeros up to the alignment.
fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
}

/// What went wrong with a tensor's data.
pub(crate) enum DataFault {
    OutOfRange,
    Io(io::Error),
}

/// Elements encoded at a time; whole blocks of every type.
const CHUNK: usize = 1 << 20;

/// Writes the data of one tensor, padded.
pub(crate) fn data(
    out: &mut impl Write,
    block: BlockType,
    values: &[f32],
) -> Result<(), DataFault> {
    let mut buffer = Vec::new();
    let mut written: usize = 0;
    for chunk in values.chunks(CHUNK) {
        buffer.clear();
        block
            .quantise(chunk, &mut buffer)
            .map_err(|_| DataFault::OutOfRange)?;
        out.write_all(&buffer).map_err(DataFault::Io)?;
        written = written.saturating_add(buffer.len());
    }
    let alignment = DEFAULT_ALIGNMENT as usize;
    let missing = written.next_multiple_of(alignment).saturating_sub(written);
    out.write_all(&vec![0; missing]).map_err(DataFault::Io)
}

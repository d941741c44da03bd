//! The GGUF container (versions 2 and 3): its metadata and tensor list, read without trusting it.
//!
//! Layout: `GGUF`, version u32, tensor count u64, metadata count u64, metadata, tensor infos,
//! padding, data. Strings are a u64 length and UTF-8. Every count is checked against the bytes that
//! are left before anything is reserved for it, and arrays stay in the file until asked for.
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::quant::BlockType;
use crate::checkpoint::CheckpointError;
use crate::error::Problems;

/// A metadata value; arrays are kept as a place in the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(ArrayPlace),
}

/// Where an array's elements are, and of which type they are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ArrayPlace {
    element: ValueType,
    count: usize,
    range: Range<usize>,
}

/// A tensor as the file lists it: GGUF name, shape outermost first, type and place.
#[derive(Clone, Debug)]
pub(crate) struct RawTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub block: BlockType,
    pub range: Range<usize>,
}

/// Everything before the data.
#[derive(Debug)]
pub(crate) struct Header {
    metadata: HashMap<String, Value>,
    /// Keys in the file's order, each with the bytes of its whole entry.
    pub entries: Vec<(String, Range<usize>)>,
    pub tensors: Vec<RawTensor>,
}

/// GGUF's value types; a type's code is its place in this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_code(code: u32) -> Option<Self> {
        use ValueType::*;
        const CODES: [ValueType; 13] = [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ];
        CODES.get(usize::try_from(code).ok()?).copied()
    }

    /// Bytes of an element, for types whose elements are all alike.
    fn width(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    /// Fewest bytes an element can take: a length for a string, a type and a count for an array.
    fn least(self) -> usize {
        match self {
            Self::String => 8,
            Self::Array => 12,
            other => other.width().unwrap_or(1),
        }
    }
}

/// Arrays inside arrays are followed this deep; real files hold none.
const MAX_NESTING: usize = 4;
/// `general.alignment` when a file does not say.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's own limit on dimensions.
const MAX_DIMS: u32 = 4;
/// Key and string length, type and one byte: the least a metadata entry takes.
const LEAST_ENTRY: usize = 8 + 4 + 1;
/// Name length, dimension count, type and offset: the least a tensor info takes.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

/// Reads the header of the file with these bytes.
pub(crate) fn read(path: &Path, bytes: &[u8]) -> Result<Header, CheckpointError> {
    let malformed = |problem: String| CheckpointError::malformed(path, problem);
    let mut cursor = Cursor { bytes, at: 0 };
    match cursor.take(4) {
        Ok(b"GGUF") => {}
        Ok(b"FUGG") => return Err(big_endian(path)),
        _ => return Err(malformed("it does not start with GGUF".into())),
    }
    match cursor.u32().map_err(malformed)? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => return Err(big_endian(path)),
        version => {
            return Err(CheckpointError::unsupported(
                path,
                format!("GGUF version {version}; versions 2 and 3 are read: convert it again"),
            ));
        }
    }
    let tensor_count = cursor
        .count("tensors", LEAST_TENSOR, 16)
        .map_err(malformed)?;
    let entry_count = cursor
        .count("metadata entries", LEAST_ENTRY, 0)
        .map_err(malformed)?;

    let mut problems = Problems::default();
    let mut metadata = HashMap::new();
    let mut entries = Vec::new();
    for number in 0..entry_count {
        let start = cursor.at;
        let (key, value) = cursor
            .entry()
            .map_err(|e| malformed(format!("metadata entry {number} of {entry_count}: {e}")))?;
        entries.push((key.clone(), start..cursor.at));
        if metadata.insert(key.clone(), value).is_some() {
            problems.push(format!("metadata key '{key}' occurs twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => {
            return Err(malformed(format!(
                "general.alignment is {other:?}, not a power of two"
            )));
        }
    };

    let mut listed = Vec::new();
    for number in 0..tensor_count {
        let info = cursor
            .tensor_info()
            .map_err(|e| malformed(format!("tensor {number} of {tensor_count}: {e}")))?;
        listed.push(info);
    }
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    let mut unsupported = Problems::default();
    let mut tensors = Vec::new();
    for info in listed {
        match info.check(data_start, alignment, bytes.len() as u64) {
            Ok(tensor) => tensors.push(tensor),
            Err(TensorFault::Malformed(problem)) => problems.push(problem),
            Err(TensorFault::Unsupported(problem)) => unsupported.push(problem),
        }
    }
    check_overlaps(&tensors, &mut problems);
    problems.into_malformed(path)?;
    if !unsupported.0.is_empty() {
        return Err(CheckpointError::Unsupported {
            path: path.to_owned(),
            problems: unsupported,
        });
    }
    Ok(Header {
        metadata,
        entries,
        tensors,
    })
}

fn big_endian(path: &Path) -> CheckpointError {
    CheckpointError::unsupported(path, "a big-endian GGUF; only little-endian ones are read")
}

fn check_overlaps(tensors: &[RawTensor], problems: &mut Problems) {
    let mut names: HashMap<&str, ()> = HashMap::new();
    for tensor in tensors {
        if names.insert(&tensor.name, ()).is_some() {
            problems.push(format!("tensor '{}' is listed twice", tensor.name));
        }
    }
    let mut order: Vec<&RawTensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.range.start, t.range.end));
    for (first, second) in order.iter().zip(order.iter().skip(1)) {
        if second.range.start < first.range.end {
            problems.push(format!(
                "tensors '{}' and '{}' overlap",
                first.name, second.name
            ));
        }
    }
}

impl Header {
    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Puts one number in the place of a list of equal ones, one a layer.
    pub fn collapse(&mut self, key: &str, bytes: &[u8]) {
        let Some(list) = self.ints(key, bytes) else {
            return;
        };
        if let Some(first) = list
            .first()
            .filter(|first| list.iter().all(|n| n == *first))
        {
            self.metadata.insert(key.to_owned(), Value::Signed(*first));
        }
    }

    pub fn u64(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A float that was stored as f32 comes back as the shortest decimal with the same bits, so
    /// that 1e-5 reads 1e-5 and not 9.999999747378752e-6.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The key of a setting of the file's architecture: `llama.block_count`.
    pub fn key(&self, name: &str) -> String {
        let arch = self.str("general.architecture").unwrap_or_default();
        format!("{arch}.{name}")
    }

    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// The elements of a string array, borrowed from the file's bytes.
    pub fn strings<'a>(&self, key: &str, bytes: &'a [u8]) -> Option<Vec<&'a str>> {
        let Value::Array(place) = self.get(key)? else {
            return None;
        };
        if place.element != ValueType::String {
            return None;
        }
        let mut cursor = place.cursor(bytes)?;
        (0..place.count).map(|_| cursor.str().ok()).collect()
    }

    /// The elements of an integer array.
    pub fn ints(&self, key: &str, bytes: &[u8]) -> Option<Vec<i64>> {
        self.scalars(key, bytes, |value| match value {
            Value::Unsigned(n) => i64::try_from(n).ok(),
            Value::Signed(n) => Some(n),
            _ => None,
        })
    }

    /// The elements of a float array.
    pub fn floats(&self, key: &str, bytes: &[u8]) -> Option<Vec<f64>> {
        self.scalars(key, bytes, |value| match value {
            Value::Float(x) => Some(x),
            _ => None,
        })
    }

    fn scalars<T>(
        &self,
        key: &str,
        bytes: &[u8],
        convert: fn(Value) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Value::Array(place) = self.get(key)? else {
            return None;
        };
        place.element.width()?;
        let mut cursor = place.cursor(bytes)?;
        (0..place.count)
            .map(|_| convert(cursor.value(place.element, 0).ok()?))
            .collect()
    }
}

impl ArrayPlace {
    fn cursor<'a>(&self, bytes: &'a [u8]) -> Option<Cursor<'a>> {
        Some(Cursor {
            bytes: bytes.get(..self.range.end)?,
            at: self.range.start,
        })
    }
}

/// A tensor info before it is checked.
struct ListedTensor {
    name: String,
    /// Innermost first, as the file has it.
    dims: Vec<u64>,
    code: u32,
    offset: u64,
}

enum TensorFault {
    Malformed(String),
    Unsupported(String),
}

impl ListedTensor {
    fn check(self, data_start: u64, alignment: u64, file: u64) -> Result<RawTensor, TensorFault> {
        let Self {
            name,
            dims,
            code,
            offset,
        } = self;
        let malformed = |problem: String| TensorFault::Malformed(problem);
        let block = BlockType::from_code(code).map_err(|ty| {
            TensorFault::Unsupported(format!(
                "tensor '{name}' has type {ty}; read are {}",
                BlockType::NAMES
            ))
        })?;
        let count = dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .filter(|&count| count > 0)
            .ok_or_else(|| {
                malformed(format!("tensor '{name}' has the impossible shape {dims:?}"))
            })?;
        let row = dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(block.elements() as u64) {
            return Err(malformed(format!(
                "tensor '{name}' has rows of {row} elements, not a multiple of {}'s block of {}",
                block.name(),
                block.elements()
            )));
        }
        let blocks = count.checked_div(block.elements() as u64);
        let size = blocks.and_then(|n| n.checked_mul(block.bytes() as u64));
        let start = data_start.checked_add(offset);
        let end = size.and_then(|size| start?.checked_add(size));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= file)) else {
            return Err(malformed(format!(
                "tensor '{name}' (shape {dims:?}, {}, offset {offset}) reaches past the end of \
                 the file; it is truncated or its header lies",
                block.name()
            )));
        };
        if !offset.is_multiple_of(alignment) {
            return Err(malformed(format!(
                "tensor '{name}' starts at offset {offset}, not a multiple of {alignment}"
            )));
        }
        let to_usize = |value: u64| {
            usize::try_from(value).map_err(|e| malformed(format!("tensor '{name}': {e}")))
        };
        let shape: Vec<usize> = dims
            .iter()
            .rev()
            .map(|&dim| to_usize(dim))
            .collect::<Result<_, _>>()?;
        let range = to_usize(start)?..to_usize(end)?;
        Ok(RawTensor {
            name,
            shape,
            block,
            range,
        })
    }
}

/// Reads little-endian values and never past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let (end, bytes) = taken.ok_or_else(|| {
            format!(
                "{count} bytes are announced at byte {} but {} are left; the file is truncated",
                self.at,
                self.left()
            )
        })?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each, `after` bytes further on.
    fn count(&mut self, what: &str, least: usize, after: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let room = self.left().saturating_sub(after).checked_div(least);
        let room = room.unwrap_or(0);
        usize::try_from(count)
            .ok()
            .filter(|&count| count <= room)
            .ok_or_else(|| {
                format!("{count} {what} are announced, but the file has room for at most {room}")
            })
    }

    fn str(&mut self) -> Result<&'a str, String> {
        let length = self.count("bytes of text", 1, 0)?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|e| format!("text that is not UTF-8 ({e})"))
    }

    fn value_type(&mut self) -> Result<ValueType, String> {
        let code = self.u32()?;
        ValueType::from_code(code).ok_or_else(|| format!("unknown value type {code}"))
    }

    fn entry(&mut self) -> Result<(String, Value), String> {
        let key = self.str()?.to_owned();
        let value = self
            .value_type()
            .and_then(|ty| self.value(ty, 0))
            .map_err(|e| format!("'{key}': {e}"))?;
        Ok((key, value))
    }

    fn value(&mut self, ty: ValueType, depth: usize) -> Result<Value, String> {
        Ok(match ty {
            ValueType::U8 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            ValueType::U32 => Value::Unsigned(self.u32()?.into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            ValueType::U64 => Value::Unsigned(self.u64()?),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::Float(shortest(f32::from_le_bytes(self.array()?))),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(self.array::<1>()? != [0]),
            ValueType::String => Value::String(self.str()?.to_owned()),
            ValueType::Array => Value::Array(self.skip_array(depth)?),
        })
    }

    /// Walks over an array, so that its end is known and its lengths are checked.
    fn skip_array(&mut self, depth: usize) -> Result<ArrayPlace, String> {
        if depth >= MAX_NESTING {
            return Err(format!("arrays nested deeper than {MAX_NESTING}"));
        }
        let element = self.value_type()?;
        let count = self.count("array elements", element.least(), 0)?;
        let start = self.at;
        match element.width() {
            Some(width) => {
                // `count` was checked against the bytes left, so the product is what they are at most.
                self.take(count.saturating_mul(width))?;
            }
            None if element == ValueType::String => {
                for _ in 0..count {
                    self.str()?;
                }
            }
            None => {
                for _ in 0..count {
                    self.skip_array(depth.saturating_add(1))?;
                }
            }
        }
        Ok(ArrayPlace {
            element,
            count,
            range: start..self.at,
        })
    }

    fn tensor_info(&mut self) -> Result<ListedTensor, String> {
        let name = self.str()?.to_owned();
        let dim_count = self.u32()?;
        if dim_count > MAX_DIMS {
            return Err(format!(
                "'{name}' has {dim_count} dimensions, above {MAX_DIMS}"
            ));
        }
        let dims = (0..dim_count)
            .map(|_| self.u64())
            .collect::<Result<_, _>>()
            .map_err(|e| format!("'{name}': {e}"))?;
        let code = self.u32()?;
        let offset = self.u64()?;
        Ok(ListedTensor {
            name,
            dims,
            code,
            offset,
        })
    }
}

/// The f64 with the shortest decimal form among those that round to `x`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| x.into())
}

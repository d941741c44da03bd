//! safetensors files: a length, a JSON header, and data.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::mutate;
use crate::random::Random;

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

/// All types of the format, with their bytes, and some that are none.
const TYPES: [(&str, usize); 18] = [
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("U8", 1),
    ("I8", 1),
    ("F64", 8),
    ("I64", 8),
    ("U64", 8),
    ("I32", 4),
    ("U32", 4),
    ("I16", 2),
    ("U16", 2),
    ("BOOL", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F4", 1),
    ("f32", 4),
    ("", 1),
];

/// 32-bit values that are no ordinary numbers.
const VALUES: [u32; 8] = [
    0x7F80_0000,
    0xFF80_0000,
    0x7FC0_0000,
    0,
    0x8000_0000,
    1,
    0x7F7F_FFFF,
    0xFFFF_FFFF,
];

impl Tensor {
    /// A tensor of small, different values.
    pub fn new(name: &str, dtype: &'static str, shape: &[u64]) -> Self {
        let count = shape.iter().product::<u64>();
        let value = |at: u64| ((at * 37 + name.len() as u64 * 11) % 64) as f32 / 64.0 - 0.5;
        let bits = (0..count).map(|at| value(at).to_bits());
        let data = match dtype {
            "BF16" => bits
                .flat_map(|b| ((b >> 16) as u16).to_le_bytes())
                .collect(),
            // 1.0 and a few bits of fraction.
            "F16" => (0..count)
                .flat_map(|at| (0x3C00 | (at % 64) as u16).to_le_bytes())
                .collect(),
            _ => bits.flat_map(u32::to_le_bytes).collect(),
        };
        Self {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            data,
        }
    }
}

/// The tensors of a sound file.
pub fn parse(bytes: &[u8]) -> Result<Vec<Tensor>> {
    let length = bytes.first_chunk().context("no length")?;
    let (header, data) = bytes[8..].split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header)?;
    let tensors = header.as_object().context("no header")?.iter();
    let tensors = tensors.filter(|(name, _)| *name != "__metadata__");
    tensors
        .map(|(name, entry)| {
            let numbers = |key: &str| -> Option<Vec<u64>> {
                entry[key].as_array()?.iter().map(Value::as_u64).collect()
            };
            let offsets = numbers("data_offsets").context("no offsets")?;
            let own = TYPES.iter().find(|(t, _)| entry["dtype"] == *t);
            Ok(Tensor {
                name: name.clone(),
                dtype: own.context("no type")?.0,
                shape: numbers("shape").context("no shape")?,
                data: data[offsets[0] as usize..offsets[1] as usize].to_vec(),
            })
        })
        .collect()
}

/// What is wrong with a file as a whole.
#[derive(Default)]
pub struct Faults {
    /// A tensor by its place, and other offsets for it.
    offsets: Option<(usize, u64, u64)>,
    header_length: Option<u64>,
    metadata: Option<&'static str>,
    /// Spaces behind the header.
    padding: usize,
}

/// The file with these tensors, one behind the other.
pub fn write(tensors: &[Tensor], faults: &Faults) -> Vec<u8> {
    let mut header = String::with_capacity(tensors.len() * 96 + 64);
    header.push('{');
    if let Some(metadata) = faults.metadata {
        let _ = write!(header, "\"__metadata__\":{metadata},");
    }
    let mut at = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        if index > 0 {
            header.push(',');
        }
        let mut range = (at, at + tensor.data.len() as u64);
        at = range.1;
        if let Some((place, start, end)) = faults.offsets
            && place == index
        {
            range = (start, end);
        }
        let _ = write!(
            header,
            "{}:{{\"dtype\":\"{}\",\"shape\":{:?},\"data_offsets\":[{},{}]}}",
            Value::from(tensor.name.as_str()),
            tensor.dtype,
            tensor.shape,
            range.0,
            range.1
        );
    }
    header.push('}');
    header.extend(std::iter::repeat_n(' ', faults.padding));
    let length = faults.header_length.unwrap_or(header.len() as u64);
    let mut bytes = Vec::with_capacity(8 + header.len() + at as usize);
    bytes.extend(length.to_le_bytes());
    bytes.extend(header.as_bytes());
    tensors.iter().for_each(|t| bytes.extend(&t.data));
    bytes
}

/// The file with some things changed: values only (which keeps it sound), tensors, the header, bytes.
/// `names` are tensor names that mean something.
pub fn changed(random: &mut Random, tensors: &[Tensor], names: &[&str]) -> Vec<u8> {
    let mut tensors = tensors.to_vec();
    let mut faults = Faults::default();
    if random.once_in(8) {
        values(random, &mut tensors);
        return write(&tensors, &faults);
    }
    if !random.once_in(4) {
        for _ in 0..random.few() {
            structure(random, &mut tensors, names);
        }
    }
    let total: u64 = tensors.iter().map(|t| t.data.len() as u64).sum();
    if random.once_in(4) && !tensors.is_empty() {
        let place = random.below(tensors.len());
        let start: u64 = tensors[..place].iter().map(|t| t.data.len() as u64).sum();
        let end = start + tensors[place].data.len() as u64;
        let (from, to) = match random.below(6) {
            0 => (mutate::number(random, start), end),
            1 => (start, mutate::number(random, end)),
            2 => (end, start),
            3 => (0, total),
            4 => (total, total),
            _ => (mutate::number(random, start), mutate::number(random, end)),
        };
        faults.offsets = Some((place, from, to));
    }
    if random.once_in(8) {
        faults.header_length = Some(mutate::number(random, total));
    }
    if random.once_in(8) {
        let metadata = [
            "{}",
            "null",
            "3",
            "{\"format\":\"pt\"}",
            "{\"a\":1}",
            "[[[",
            "{\"a\":\"\\u0000\"}",
        ];
        faults.metadata = Some(random.word(&metadata));
    }
    if random.once_in(8) {
        faults.padding = random.below(16);
    }
    let mut bytes = write(&tensors, &faults);
    if random.once_in(5) {
        // Mostly where a change says something: in the header.
        let header = bytes.len().saturating_sub(total as usize);
        match random.once_in(3) {
            true => mutate::bytes(random, &mut bytes),
            false => {
                let mut head: Vec<u8> = bytes.drain(..header).collect();
                match random.once_in(2) {
                    true => mutate::bytes(random, &mut head),
                    false => mutate::text(random, &mut head, &WORDS),
                }
                head.append(&mut bytes);
                bytes = head;
            }
        }
    }
    bytes
}

/// Pieces of a header.
const WORDS: [&str; 20] = [
    "\"dtype\":",
    "\"shape\":",
    "\"data_offsets\":",
    "[]",
    "[0]",
    "[0,0]",
    "[1]",
    "{}",
    "{",
    "}",
    "]",
    ",",
    "-1",
    "1e3",
    "18446744073709551615",
    "18446744073709551616",
    "\"F32\"",
    "null",
    "\\ud800",
    "\"a\":1,",
];

/// Other values in the data of one tensor.
fn values(random: &mut Random, tensors: &mut [Tensor]) {
    if tensors.is_empty() {
        return;
    }
    let at = random.below(tensors.len());
    let data = &mut tensors[at].data;
    for _ in 0..random.few() {
        let at = random.below(data.len() / 4) * 4;
        if let Some(place) = data.get_mut(at..at + 4) {
            let value = match random.once_in(2) {
                true => *random.pick(&VALUES),
                false => random.next() as u32,
            };
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn structure(random: &mut Random, tensors: &mut Vec<Tensor>, names: &[&str]) {
    if tensors.is_empty() {
        tensors.push(Tensor::new("a", "F32", &[2]));
        return;
    }
    let at = random.below(tensors.len());
    let other = random.below(tensors.len());
    let others_name = tensors[other].name.clone();
    let tensor = &mut tensors[at];
    match random.below(14) {
        0 => {
            tensor.name = match random.below(4) {
                0 => others_name,
                1 => format!("{}.x", tensor.name),
                2 => (*random.pick(&["", "__metadata__", "\0", "é.weight", "a\u{1b}[2Jb", "."]))
                    .to_owned(),
                _ if names.is_empty() => String::new(),
                _ => (*random.pick(names)).to_owned(),
            };
        }
        1 => tensor.dtype = random.pick(&TYPES).0,
        2 => {
            // A type that fits its data.
            let (dtype, width) = *random.pick(&TYPES);
            let count = tensor.shape.iter().product::<u64>() as usize;
            tensor.dtype = dtype;
            tensor.data.resize((count * width).min(1 << 16), 0x3C);
        }
        3 => {
            let place = random.below(tensor.shape.len());
            if let Some(dim) = tensor.shape.get_mut(place) {
                *dim = mutate::number(random, *dim);
            }
        }
        4 => tensor.shape.push(*random.pick(&mutate::EXTREMES)),
        5 => {
            tensor.shape.pop();
        }
        6 => tensor.shape.reverse(),
        7 => {
            // Another shape of as many elements.
            let count = tensor.shape.iter().product::<u64>();
            tensor.shape = match random.below(4) {
                0 => vec![count],
                1 => vec![1, count],
                2 => vec![count, 1],
                _ => vec![count / 2, 2],
            };
        }
        8 => {
            let length = tensor.data.len() as u64;
            let new = mutate::number(random, length).min(1 << 14);
            tensor.data.resize(new as usize, 0);
        }
        9 => {
            let copy = tensor.clone();
            tensors.push(copy);
        }
        10 => {
            tensors.remove(at);
        }
        11 => tensors.swap(at, other),
        12 => {
            // Rows more or fewer, with data that fit.
            let Some(first) = tensor.shape.first().copied().filter(|n| *n > 0) else {
                return;
            };
            let row = tensor.data.len() / first as usize;
            let rows = first
                .wrapping_add(random.below(5) as u64)
                .wrapping_sub(2)
                .min(64);
            tensor.shape[0] = rows;
            tensor.data.resize(rows as usize * row, 0x3C);
        }
        _ => values(random, tensors),
    }
}

//! The header of one safetensors file.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::super::mapped::MappedFile;
use super::super::{CheckpointError, SourceDtype, TensorInfo, json};
use super::names;
use crate::error::Problems;

/// The format's own limit on a header, kept by its reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor as a header lists it, checked.
pub(super) struct Entry {
    pub info: TensorInfo,
    pub range: Range<usize>,
    /// Whether it is no weight of the model and left out.
    pub ignored: bool,
}

/// A tensor as a header spells it.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads and checks a file's header: lengths, offsets, sizes, overlaps, names and types.
pub(super) fn read_header(file: &MappedFile, packed: bool) -> Result<Vec<Entry>, CheckpointError> {
    let path = file.path();
    let bytes = file.bytes();
    let malformed = |problem: String| CheckpointError::malformed(path, problem);
    if bytes.starts_with(json::POINTER) {
        return Err(malformed(
            "it is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
                .to_owned(),
        ));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(malformed(format!(
            "the file is {} bytes long, too short for a safetensors header; download it again",
            bytes.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(malformed(format!(
            "its header claims {length} bytes, above the format's limit of {MAX_HEADER}; \
             this is not a safetensors file"
        )));
    }
    let header = usize::try_from(length)
        .ok()
        .and_then(|length| rest.split_at_checked(length));
    let Some((header, data)) = header else {
        return Err(malformed(format!(
            "its header claims {length} bytes, but only {} follow; the download is incomplete",
            rest.len()
        )));
    };
    let raw: Header = serde_json::from_slice(header)
        .map_err(|e| malformed(format!("its header is not valid ({e})")))?;

    let data_start = bytes.len().saturating_sub(data.len());
    let mut problems = Problems::default();
    for name in raw.duplicates {
        problems.push(format!("tensor '{name}' is listed twice"));
    }
    let mut entries = Vec::with_capacity(raw.entries.len());
    for (name, entry) in raw.entries {
        match check_entry(&name, &entry, data_start, data.len(), packed) {
            Ok(entry) => entries.push(entry),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.0.is_empty() {
        check_coverage(&entries, data_start, bytes.len(), &mut problems);
    }
    problems.into_malformed(path)?;
    Ok(entries)
}

fn check_entry(
    name: &str,
    raw: &RawEntry,
    data_start: usize,
    data_len: usize,
    packed: bool,
) -> Result<Entry, String> {
    let buffer = names::is_buffer(name);
    // Of what is left out, the type is not looked at: it is never read.
    let left_out = |width: u64| (SourceDtype::Quantised, width);
    let whole = !names::is_weight(name);
    let mut ignored = buffer;
    let (dtype, width) = match raw.dtype.as_str() {
        "F32" => (SourceDtype::F32, 4u64),
        "F16" => (SourceDtype::F16, 2),
        "BF16" => (SourceDtype::BF16, 2),
        "F64" if buffer => left_out(8),
        "U8" | "I8" if packed || buffer => left_out(1),
        // Parameters are no whole numbers and no yes or no.
        kind @ ("BOOL" | "U8" | "I8" | "U16" | "I16" | "U32" | "I32" | "U64" | "I64")
            if buffer || whole =>
        {
            ignored = true;
            left_out(match kind {
                "BOOL" | "U8" | "I8" => 1,
                "U16" | "I16" => 2,
                "U32" | "I32" => 4,
                _ => 8,
            })
        }
        other => {
            let why = match other {
                "I8" | "U8" => " (is this an already quantised checkpoint?)",
                _ => "",
            };
            return Err(format!(
                "tensor '{name}' has dtype {other}{why}; F32, F16 and BF16 are read"
            ));
        }
    };
    let (start, end) = raw.data_offsets;
    let size = raw
        .shape
        .iter()
        .try_fold(width, |size, &dim| size.checked_mul(dim))
        .ok_or_else(|| format!("tensor '{name}' has the impossible shape {:?}", raw.shape))?;
    let Some(length) = end.checked_sub(start) else {
        return Err(format!(
            "tensor '{name}' ends (byte {end}) before it starts (byte {start})"
        ));
    };
    if length != size {
        return Err(format!(
            "tensor '{name}' of shape {:?} needs {size} bytes but is given {length}",
            raw.shape
        ));
    }
    if end > data_len as u64 {
        return Err(format!(
            "tensor '{name}' ends at byte {end} of the data, but the file holds {data_len}; \
             the download is incomplete"
        ));
    }
    let to_usize = |value: u64| usize::try_from(value).map_err(|e| format!("tensor '{name}': {e}"));
    // Within the file, whose length is a usize.
    let place = |offset: u64| to_usize(offset).map(|offset| data_start.saturating_add(offset));
    Ok(Entry {
        info: TensorInfo {
            name: name.to_owned(),
            shape: raw
                .shape
                .iter()
                .map(|&d| to_usize(d))
                .collect::<Result<_, _>>()?,
            dtype,
        },
        range: place(start)?..place(end)?,
        ignored,
    })
}

/// The format allows neither overlaps nor holes: bytes that no tensor owns could hide anything.
fn check_coverage(entries: &[Entry], start: usize, end: usize, problems: &mut Problems) {
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|entry| (entry.range.start, entry.range.end));
    let mut reached = start;
    for entry in order {
        let name = &entry.info.name;
        if entry.range.start < reached {
            problems.push(format!("tensor '{name}' overlaps the one before it"));
        } else if entry.range.start > reached {
            let hole = entry.range.start.saturating_sub(reached);
            problems.push(format!("{hole} bytes before tensor '{name}' are unused"));
        }
        reached = reached.max(entry.range.end);
    }
    if reached < end && problems.0.is_empty() {
        problems.push(format!(
            "{} bytes after the last tensor are unused",
            end.saturating_sub(reached)
        ));
    }
}

/// A header's tensors in file order, with the names that occur twice (which JSON maps would hide).
struct Header {
    entries: Vec<(String, RawEntry)>,
    duplicates: Vec<String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut unique = UniqueMap::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry = map.next_value::<RawEntry>()?;
                        unique.insert(name, entry);
                    }
                }
                Ok(Header {
                    entries: unique.entries,
                    duplicates: unique.duplicates,
                })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON map that remembers which keys came twice.
pub(super) struct UniqueMap<T> {
    pub entries: Vec<(String, T)>,
    seen: std::collections::HashSet<String>,
    pub duplicates: Vec<String>,
}

impl<T> Default for UniqueMap<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            seen: Default::default(),
            duplicates: Vec::new(),
        }
    }
}

impl<T> UniqueMap<T> {
    fn insert(&mut self, key: String, value: T) {
        if self.seen.insert(key.clone()) {
            self.entries.push((key, value));
        } else {
            self.duplicates.push(key);
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UniqueVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueVisitor<T> {
            type Value = UniqueMap<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<T>, A::Error> {
                let mut unique = UniqueMap::default();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    unique.insert(key, value);
                }
                Ok(unique)
            }
        }
        deserializer.deserialize_map(UniqueVisitor(std::marker::PhantomData))
    }
}

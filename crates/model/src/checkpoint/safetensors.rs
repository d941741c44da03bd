//! The safetensors format: a strict reader of headers, for single files and sharded sets.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::error::Problems;
use super::mapped::MappedFile;
use super::{CheckpointError, SourceDtype, TensorInfo, widen};

/// The format's own limit on a header, kept by its reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Name of the index of a sharded checkpoint.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the only file of a checkpoint that is not sharded.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";

/// Where one tensor's bytes are.
#[derive(Debug)]
struct Place {
    file: usize,
    range: Range<usize>,
}

/// One or more safetensors files that together hold a model.
#[derive(Debug)]
pub(crate) struct SafetensorsSet {
    files: Vec<MappedFile>,
    places: Vec<Place>,
}

impl SafetensorsSet {
    /// Opens `model.safetensors`, or else all shards of the index, in `dir`.
    /// `packed` says whether tensors of bytes are met, which are codes of quantised weights.
    pub(crate) fn open(
        dir: &Path,
        packed: bool,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        let single = dir.join(SINGLE_FILE);
        if single.is_file() {
            return Self::open_files(vec![single], packed);
        }
        let index = dir.join(INDEX_FILE);
        if index.is_file() {
            return Self::open_sharded(dir, &index, packed);
        }
        Err(CheckpointError::NotACheckpoint {
            path: dir.to_owned(),
            reason: missing_weights(dir),
        })
    }

    /// Opens `paths` as the parts of one model.
    pub(crate) fn open_files(
        paths: Vec<PathBuf>,
        packed: bool,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        let mut set = Self {
            files: Vec::new(),
            places: Vec::new(),
        };
        let mut infos: Vec<TensorInfo> = Vec::new();
        let mut owner: HashMap<String, usize> = HashMap::new();
        for (file, path) in paths.into_iter().enumerate() {
            let mapped = MappedFile::open(&path)?;
            let mut problems = Problems::default();
            for entry in read_header(&mapped, packed)? {
                if let Some(first) = owner.insert(entry.info.name.clone(), file) {
                    problems.push(format!(
                        "tensor '{}' is also in {}",
                        entry.info.name,
                        set.files
                            .get(first)
                            .map_or(path.display(), |f| f.path().display())
                    ));
                }
                infos.push(entry.info);
                set.places.push(Place {
                    file,
                    range: entry.range,
                });
            }
            problems.into_malformed(&path)?;
            set.files.push(mapped);
        }
        Ok((set, infos))
    }

    fn open_sharded(
        dir: &Path,
        index: &Path,
        packed: bool,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: UniqueMap<String>,
        }
        let text = std::fs::read(index).map_err(|e| CheckpointError::io(index, e))?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|e| {
            CheckpointError::malformed(index, format!("not a shard index ({e}); download it again"))
        })?;

        let mut problems = Problems::default();
        for name in weight_map.duplicates {
            problems.push(format!("tensor '{name}' is listed twice"));
        }
        let mut wanted: BTreeMap<String, String> = BTreeMap::new();
        let mut shards: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (name, shard) in weight_map.entries {
            // A shard is a plain name beside the index: an index must not reach other files.
            if shard.contains(['/', '\\']) || shard == ".." || !shard.ends_with(".safetensors") {
                problems.push(format!(
                    "tensor '{name}' is in '{shard}', which is not a plain .safetensors file name"
                ));
                continue;
            }
            let path = dir.join(&shard);
            if !shards.contains_key(&shard) {
                if !path.is_file() {
                    problems.push(format!("shard '{shard}' is missing"));
                }
                shards.insert(shard.clone(), path);
            }
            wanted.insert(name, shard);
        }
        if wanted.is_empty() && problems.0.is_empty() {
            problems.push("the index lists no tensors");
        }
        problems.into_malformed(index)?;

        let names: Vec<String> = shards.keys().cloned().collect();
        let (set, infos) = Self::open_files(shards.into_values().collect(), packed)?;
        let mut problems = Problems::default();
        for (info, place) in infos.iter().zip(&set.places) {
            let found = names.get(place.file).map_or("", String::as_str);
            match wanted.remove(&info.name) {
                Some(listed) if listed == found => {}
                Some(listed) => problems.push(format!(
                    "tensor '{}' is listed under {listed} but lies in {found}",
                    info.name
                )),
                None => problems.push(format!(
                    "tensor '{}' lies in {found} but is not listed",
                    info.name
                )),
            }
        }
        for (name, shard) in wanted {
            problems.push(format!(
                "tensor '{name}' is listed under {shard} but is not there"
            ));
        }
        problems.into_malformed(index)?;
        Ok((set, infos))
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
    }

    /// The values of tensor number `index` (in the order `open` gave them).
    pub(crate) fn read_f32(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<f32>, CheckpointError> {
        let (place, file, bytes) = self.bytes_of(index, info)?;
        let values = match info.dtype {
            SourceDtype::F32 => widen::f32_le(bytes),
            SourceDtype::F16 => widen::f16_le(bytes),
            SourceDtype::BF16 => widen::bf16_le(bytes),
            SourceDtype::Quantised => {
                return Err(CheckpointError::unsupported(
                    file.path(),
                    format!("tensor '{}' is quantised", info.name),
                ));
            }
        };
        file.release(&place.range);
        Ok(values)
    }

    /// The same of a tensor that is bf16 in the file, as it is there.
    pub(crate) fn read_bf16(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<half::bf16>, CheckpointError> {
        let (place, file, bytes) = self.bytes_of(index, info)?;
        let values = widen::bf16_le_kept(bytes);
        file.release(&place.range);
        Ok(values)
    }

    /// The bytes of a tensor as they are in the file.
    pub(crate) fn read_bytes(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<u8>, CheckpointError> {
        let (place, file, bytes) = self.bytes_of(index, info)?;
        let values = bytes.to_vec();
        file.release(&place.range);
        Ok(values)
    }

    /// How many bytes tensor number `index` has.
    pub(crate) fn size_of(&self, index: usize) -> usize {
        self.places.get(index).map_or(0, |place| place.range.len())
    }

    /// The name of the file that tensor number `index` lies in.
    pub(crate) fn file_of(&self, index: usize) -> String {
        let file = self.places.get(index).and_then(|p| self.files.get(p.file));
        let name = file.and_then(|file| file.path().file_name());
        name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    fn bytes_of(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<(&Place, &MappedFile, &[u8]), CheckpointError> {
        let found = self.places.get(index).and_then(|place| {
            let file = self.files.get(place.file)?;
            Some((place, file, file.slice(&place.range)?))
        });
        found.ok_or_else(|| CheckpointError::NoSuchTensor {
            name: info.name.clone(),
            nearest: None,
        })
    }
}

/// Says what else lies in a directory without safetensors, since that decides the next step.
fn missing_weights(dir: &Path) -> String {
    let mut pickled = false;
    let mut gguf = None;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        pickled |= name.starts_with("pytorch_model") && name.ends_with(".bin");
        if name.ends_with(".gguf") {
            gguf = Some(entry.path());
        }
    }
    if let Some(file) = gguf {
        return format!(
            "it has no {SINGLE_FILE}; to use its GGUF file, name the file itself: {}",
            file.display()
        );
    }
    if pickled {
        return format!(
            "it has only pickled weights (pytorch_model*.bin), which are never unpickled here; \
             save the model with transformers' save_pretrained to get {SINGLE_FILE}"
        );
    }
    format!("neither {SINGLE_FILE} nor {INDEX_FILE} is in it")
}

/// A tensor as a header lists it, checked.
struct Entry {
    info: TensorInfo,
    range: Range<usize>,
}

/// A tensor as a header spells it.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads and checks a file's header: lengths, offsets, sizes, overlaps, names and types.
fn read_header(file: &MappedFile, packed: bool) -> Result<Vec<Entry>, CheckpointError> {
    let path = file.path();
    let bytes = file.bytes();
    let malformed = |problem: String| CheckpointError::malformed(path, problem);
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
    let (dtype, width) = match raw.dtype.as_str() {
        "F32" => (SourceDtype::F32, 4u64),
        "F16" => (SourceDtype::F16, 2),
        "BF16" => (SourceDtype::BF16, 2),
        "U8" | "I8" if packed => (SourceDtype::Quantised, 1),
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
struct UniqueMap<T> {
    entries: Vec<(String, T)>,
    seen: std::collections::HashSet<String>,
    duplicates: Vec<String>,
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

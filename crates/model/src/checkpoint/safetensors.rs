//! The safetensors format: a strict reader of headers, for single files and sharded sets.

mod files;
mod header;
mod names;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use self::header::read_header;
pub(crate) use self::names::is_buffer;
use super::mapped::MappedFile;
use super::{CheckpointError, SourceDtype, TensorInfo, widen};
use crate::error::Problems;

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
    /// Names of tensors that are left out.
    ignored: HashSet<String>,
    /// What a person should know of them.
    notes: Vec<String>,
}

impl SafetensorsSet {
    /// Opens `model.safetensors`, or else all shards, in `dir`.
    /// `packed` says whether tensors of bytes are met, which are codes of quantised weights.
    pub(crate) fn open(
        dir: &Path,
        packed: bool,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        let (mut set, mut infos) = files::open(dir, packed)?;
        let renamed = names::usual(&mut infos);
        match renamed {
            Ok(notes) => set.notes.extend(notes),
            Err(problems) => problems.into_malformed(dir)?,
        }
        Ok((set, infos))
    }

    /// Opens `paths` as the parts of one model.
    pub(crate) fn open_files(
        paths: Vec<PathBuf>,
        packed: bool,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        let mut set = Self {
            files: Vec::new(),
            places: Vec::new(),
            ignored: HashSet::new(),
            notes: Vec::new(),
        };
        let mut ignored: Vec<String> = Vec::new();
        let mut infos: Vec<TensorInfo> = Vec::new();
        let mut owner: HashMap<String, usize> = HashMap::new();
        for (file, path) in paths.into_iter().enumerate() {
            let mapped = MappedFile::open(&path)?;
            let mut problems = Problems::default();
            for entry in read_header(&mapped, packed)? {
                if entry.ignored {
                    ignored.push(entry.info.name);
                    continue;
                }
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
        if let Some(note) = names::left_out(&ignored) {
            set.notes.push(note);
        }
        set.ignored.extend(ignored);
        Ok((set, infos))
    }

    /// What a person should know of the files.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
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

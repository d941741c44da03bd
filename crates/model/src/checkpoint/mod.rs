//! Where a model's tensors come from: names and shapes first, values one tensor at a time.

mod bitsandbytes;
mod directory;
pub(crate) use directory::SIDE_FILES;
pub(crate) mod gguf;
mod json;
mod mapped;
mod safetensors;
mod sentencepiece;
mod widen;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use enamel_kernels::quantized::formats::FloatKind;
use enamel_kernels::{HostValues, PackedRows};
use rayon::prelude::*;
use serde_json::Value;

use self::directory::Directory;
use self::gguf::GgufFile;
use crate::digest::sha256_file;
use crate::heads::HEAD;

pub use crate::error::{CheckpointError, Problems};

pub use self::json::parse as parse_json;
pub use self::mapped::mapped_at;
pub(crate) use self::safetensors::is_buffer;

/// The element type a tensor has in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceDtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    BF16,
    /// One of GGUF's block-quantised types, or of bitsandbytes'.
    Quantised,
}

/// A tensor of a checkpoint, before any of its values is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).
    pub name: String,
    /// The shape, outermost axis first (`[out, in]` for a linear layer).
    pub shape: Vec<usize>,
    /// The element type in the file.
    pub dtype: SourceDtype,
}

/// Tensors by Hugging Face name.
pub trait TensorSource {
    /// All tensors, with their shapes.
    fn tensors(&self) -> &[TensorInfo];
    /// The values of one tensor, row-major, widened or dequantised to f32.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError>;
    /// The same in bf16 where the file has them so, else in f32.
    fn read(&self, name: &str) -> Result<HostValues, CheckpointError> {
        Ok(HostValues::F32(self.read_f32(name)?))
    }
    /// What 4-bit weights of [`Self::read_packed`] are rounded to when they are read
    /// (`bnb_4bit_compute_dtype`).
    fn packed_compute(&self) -> FloatKind {
        FloatKind::F32
    }
    /// A matrix in the quantised form that the file has it in, if it is one that products read as it lies.
    fn read_packed(&self, _name: &str) -> Result<Option<PackedRows>, CheckpointError> {
        Ok(None)
    }
}

/// A matrix that its file has in a quantised form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredPacked {
    /// Bytes that it takes in memory, about those that it takes in the file.
    pub bytes: usize,
    /// Whether it is in one of bitsandbytes' formats; else it is in GGUF's blocks.
    pub bitsandbytes: bool,
}

/// An opened base model: a directory in Hugging Face layout, or a GGUF file that is presented as
/// if it were one. Opening checks every header; values stay on disk until they are read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Directory(Box<Directory>),
    Gguf(Box<GgufFile>),
}

impl Checkpoint {
    /// Opens a directory with `config.json` and safetensors, or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let meta = std::fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?;
        let (backing, tensors, config) = if meta.is_dir() {
            let (directory, tensors, config) = Directory::open(path)?;
            (Backing::Directory(Box::new(directory)), tensors, config)
        } else if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
        {
            let (gguf, tensors, config) = GgufFile::open(path)?;
            (Backing::Gguf(Box::new(gguf)), tensors, config)
        } else {
            return Err(CheckpointError::NotACheckpoint {
                path: path.to_owned(),
                reason: "give a directory with config.json and model.safetensors, or a .gguf file"
                    .into(),
            });
        };
        let index = tensors
            .iter()
            .enumerate()
            .map(|(i, info)| (info.name.clone(), i))
            .collect();
        Ok(Self {
            path: path.to_owned(),
            config,
            tensors,
            index,
            backing,
        })
    }

    /// Shows the one matrix of a tied embedding and head under both names, for a head that is to be held, and
    /// changed, by itself. A name that the file has stays as it is.
    pub fn show_head_apart(&mut self, embedding: &str) {
        let table = format!("{embedding}.weight");
        let head = format!("{HEAD}.weight");
        for (name, other) in [(&head, &table), (&table, &head)] {
            let Some(&at) = self.index.get(other) else {
                continue;
            };
            let Some(info) = self
                .tensors
                .get(at)
                .filter(|_| !self.index.contains_key(name.as_str()))
            else {
                continue;
            };
            let info = TensorInfo {
                name: name.clone(),
                ..info.clone()
            };
            self.tensors.push(info);
            self.index.insert(name.clone(), at);
        }
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`, from its file or from GGUF metadata.
    pub fn config_json(&self) -> &Value {
        &self.config
    }

    /// Whether it is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.backing, Backing::Gguf(_))
    }

    /// The GGUF file, if it is one.
    pub(crate) fn gguf(&self) -> Option<&GgufFile> {
        match &self.backing {
            Backing::Directory(_) => None,
            Backing::Gguf(gguf) => Some(gguf),
        }
    }

    /// What a person should know of how its files were read.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        let (directory, gguf) = match &self.backing {
            Backing::Directory(directory) => (Some(directory.notes()), None),
            Backing::Gguf(gguf) => (None, Some(gguf.notes())),
        };
        let gguf = gguf.unwrap_or_default().iter().map(String::as_str);
        directory.into_iter().flatten().chain(gguf)
    }

    /// Whether it comes with a tokenizer. Models for tests may have none.
    pub fn has_tokenizer(&self) -> bool {
        match &self.backing {
            Backing::Directory(directory) => directory.has_tokenizer(),
            Backing::Gguf(gguf) => gguf.has_tokenizer(),
        }
    }

    /// The bytes of `tokenizer.json`, from its file or built from GGUF metadata.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, CheckpointError> {
        match &self.backing {
            Backing::Directory(directory) => directory.tokenizer_json(),
            Backing::Gguf(gguf) => gguf.tokenizer_json(),
        }
    }

    /// `tokenizer_config.json`, from its file or built from GGUF metadata.
    pub fn tokenizer_config(&self) -> Option<Value> {
        match &self.backing {
            Backing::Directory(directory) => directory.tokenizer_config(),
            Backing::Gguf(gguf) => gguf.tokenizer_config(),
        }
    }

    /// `special_tokens_map.json`, where there is one; GGUF has no such file.
    pub fn special_tokens_map(&self) -> Option<Value> {
        match &self.backing {
            Backing::Directory(directory) => directory.json("special_tokens_map.json"),
            Backing::Gguf(_) => None,
        }
    }

    /// `added_tokens.json`, where there is one; GGUF has no such file.
    pub fn added_tokens(&self) -> Option<Value> {
        match &self.backing {
            Backing::Directory(directory) => directory.json("added_tokens.json"),
            Backing::Gguf(_) => None,
        }
    }

    /// The chat template: `chat_template.jinja`, else the tokenizer configuration's, else GGUF's.
    pub fn chat_template(&self) -> Option<String> {
        match &self.backing {
            Backing::Directory(directory) => directory.chat_template(),
            Backing::Gguf(gguf) => gguf.chat_template(),
        }
    }

    /// `generation_config.json`, where there is one, or what GGUF metadata says of it.
    pub fn generation_config(&self) -> Option<Value> {
        match &self.backing {
            Backing::Directory(directory) => directory.json("generation_config.json"),
            Backing::Gguf(gguf) => Some(gguf.generation_config()),
        }
    }

    /// The files of the directory that are no weights (`config.json`, tokenizer and template files
    /// that exist); none for GGUF, which holds all in one file.
    pub fn side_files(&self) -> Vec<PathBuf> {
        match &self.backing {
            Backing::Directory(directory) => directory.side_files(),
            Backing::Gguf(_) => Vec::new(),
        }
    }

    /// All files that make up the model: weights, configuration, tokenizer.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.backing {
            Backing::Directory(directory) => directory.files(),
            Backing::Gguf(gguf) => vec![gguf.path().to_owned()],
        }
    }

    /// The SHA-256 of every file, in hexadecimal, in the order of [`Checkpoint::files`].
    pub fn hashes(&self) -> Result<Vec<(PathBuf, String)>, CheckpointError> {
        self.files()
            .into_par_iter()
            .map(|path| {
                let hash = sha256_file(&path).map_err(|e| CheckpointError::io(&path, e))?;
                Ok((path, hash))
            })
            .collect()
    }
}

impl TensorSource for Checkpoint {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (index, info) = self.find(name)?;
        match &self.backing {
            Backing::Directory(directory) => directory.read_f32(index, info),
            Backing::Gguf(gguf) => gguf.read_f32(index, info),
        }
    }

    fn read(&self, name: &str) -> Result<HostValues, CheckpointError> {
        let (index, info) = self.find(name)?;
        match &self.backing {
            Backing::Directory(directory) if info.dtype == SourceDtype::BF16 => {
                Ok(HostValues::Bf16(directory.read_bf16(index, info)?))
            }
            _ => Ok(HostValues::F32(self.read_f32(name)?)),
        }
    }

    fn packed_compute(&self) -> FloatKind {
        match &self.backing {
            Backing::Directory(directory) => directory.packed_compute(),
            Backing::Gguf(_) => FloatKind::F32,
        }
    }

    fn read_packed(&self, name: &str) -> Result<Option<PackedRows>, CheckpointError> {
        let (index, info) = self.find(name)?;
        match &self.backing {
            Backing::Directory(directory) => directory.read_packed(index),
            Backing::Gguf(gguf) => Ok(gguf.read_packed(index, info)?.map(PackedRows::Blocks)),
        }
    }
}

impl Checkpoint {
    /// Whether matrices come in bf16 ([`TensorSource::read`]): what a directory's file says.
    pub fn is_bf16(&self) -> bool {
        let matrix = |info: &&TensorInfo| info.shape.len() == 2;
        let dtype = self.tensors.iter().find(matrix).map(|info| info.dtype);
        !self.is_gguf() && dtype == Some(SourceDtype::BF16)
    }

    /// The matrices for which [`TensorSource::read_packed`] has rows, by their tensors' names. No value is read.
    pub fn packed(&self) -> HashMap<String, StoredPacked> {
        let bitsandbytes = matches!(self.backing, Backing::Directory(_));
        let bytes = |index| match &self.backing {
            Backing::Directory(directory) => directory.packed_bytes(index),
            Backing::Gguf(gguf) => gguf.packed_bytes(index),
        };
        // A second name of a tensor has no bytes of its own.
        let own = |(index, info): &(usize, &TensorInfo)| self.index.get(&info.name) == Some(index);
        let all = self.tensors.iter().enumerate().filter(own);
        all.filter_map(|(index, info)| {
            let stored = StoredPacked {
                bytes: bytes(index)?,
                bitsandbytes,
            };
            Some((info.name.clone(), stored))
        })
        .collect()
    }

    fn find(&self, name: &str) -> Result<(usize, &TensorInfo), CheckpointError> {
        let found = self.index.get(name);
        let found = found.and_then(|&i| Some((i, self.tensors.get(i)?)));
        found.ok_or_else(|| CheckpointError::NoSuchTensor {
            name: name.to_owned(),
            nearest: self.nearest(name),
        })
    }

    fn nearest(&self, name: &str) -> Option<String> {
        self.tensors
            .iter()
            .map(|info| (strsim::jaro_winkler(name, &info.name), &info.name))
            .filter(|(likeness, _)| *likeness > 0.8)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, name)| name.clone())
    }
}

#[cfg(test)]
mod tests;

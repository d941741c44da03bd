//! A model directory in Hugging Face layout.

use std::path::{Path, PathBuf};

use enamel_kernels::PackedRows;
use enamel_kernels::quant::FloatKind;
use serde_json::Value;

use super::bitsandbytes::{Quantised, Settings};
use super::safetensors::{INDEX_FILE, SafetensorsSet};
use super::{CheckpointError, TensorInfo};

/// Files beside the weights that belong to a model. All but the first are optional.
pub(crate) const SIDE_FILES: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// An opened directory.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    weights: SafetensorsSet,
    /// How the tensors are made of the stored ones, where these are quantised.
    quantised: Option<Quantised>,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<TensorInfo>, Value), CheckpointError> {
        let config_path = path.join("config.json");
        if !config_path.is_file() {
            return Err(CheckpointError::NotACheckpoint {
                path: path.to_owned(),
                reason: "config.json is not in it".into(),
            });
        }
        let text = std::fs::read(&config_path).map_err(|e| CheckpointError::io(&config_path, e))?;
        let config: Value = serde_json::from_slice(&text)
            .map_err(|e| CheckpointError::malformed(&config_path, format!("not JSON ({e})")))?;
        if !config.is_object() {
            return Err(CheckpointError::malformed(
                &config_path,
                "not a JSON object",
            ));
        }
        let settings = Settings::of(&config, &config_path)?;
        let (weights, stored) = SafetensorsSet::open(path, settings.is_some())?;
        let (quantised, tensors) = match settings {
            Some(settings) => {
                let (all, tensors) = Quantised::gather(path, &weights, stored, settings)?;
                (Some(all), tensors)
            }
            None => (None, stored),
        };
        let directory = Self {
            path: path.to_owned(),
            weights,
            quantised,
        };
        Ok((directory, tensors, config))
    }

    pub(crate) fn read_f32(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<f32>, CheckpointError> {
        match self.read_packed(index)? {
            // As products read it, so that a model made dense computes what the packed one does: the dtype that
            // the weight once had plays no part.
            Some(PackedRows::FourBit(tensor)) => Ok(tensor.dequantise(self.packed_compute())),
            Some(PackedRows::Int8 { rows, .. }) => Ok(rows.dequantise(FloatKind::F32)),
            Some(PackedRows::Blocks(rows)) => Ok(rows.kind().dequantise(rows.data())),
            None => {
                let (index, info) = self.stored(index, info);
                self.weights.read_f32(index, info)
            }
        }
    }

    /// What 4-bit weights are rounded to when they are read.
    pub(crate) fn packed_compute(&self) -> FloatKind {
        let quantised = self.quantised.as_ref();
        quantised.map_or(FloatKind::F32, Quantised::compute)
    }

    /// A weight in the form bitsandbytes gave it, if it is in one.
    pub(crate) fn read_packed(&self, index: usize) -> Result<Option<PackedRows>, CheckpointError> {
        match &self.quantised {
            Some(quantised) => quantised.rows(&self.weights, index),
            None => Ok(None),
        }
    }

    /// Bytes of a weight that [`Self::read_packed`] reads.
    pub(crate) fn packed_bytes(&self, index: usize) -> Option<usize> {
        self.quantised.as_ref()?.bytes(index)
    }

    /// The stored tensor that holds a dense one.
    fn stored<'a>(&'a self, index: usize, info: &'a TensorInfo) -> (usize, &'a TensorInfo) {
        let plain = self.quantised.as_ref().and_then(|all| all.plain(index));
        plain.unwrap_or((index, info))
    }

    /// The values of a tensor that the file has in bf16.
    pub(crate) fn read_bf16(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<half::bf16>, CheckpointError> {
        let (index, info) = self.stored(index, info);
        self.weights.read_bf16(index, info)
    }

    pub(crate) fn tokenizer_json(&self) -> Result<Vec<u8>, CheckpointError> {
        let path = self.path.join("tokenizer.json");
        if path.is_file() {
            return std::fs::read(&path).map_err(|e| CheckpointError::io(&path, e));
        }
        let old = ["tokenizer.model", "vocab.json"]
            .into_iter()
            .find(|name| self.path.join(name).is_file());
        Err(CheckpointError::NotACheckpoint {
            path,
            reason: match old {
                Some(old) => format!(
                    "the model has only {old}; load its tokenizer with transformers and save it \
                     with save_pretrained to get tokenizer.json"
                ),
                None => "the model comes without a tokenizer".into(),
            },
        })
    }

    /// A JSON file of the directory, where there is a valid one.
    pub(crate) fn json(&self, name: &str) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.path.join(name)).ok()?).ok()
    }

    pub(crate) fn chat_template(&self) -> Option<String> {
        if let Ok(text) = std::fs::read_to_string(self.path.join("chat_template.jinja")) {
            return Some(text);
        }
        ["tokenizer_config.json", "chat_template.json"]
            .into_iter()
            .find_map(|name| default_template(self.json(name)?.get("chat_template")?))
    }

    pub(crate) fn side_files(&self) -> Vec<PathBuf> {
        SIDE_FILES
            .iter()
            .map(|name| self.path.join(name))
            .filter(|path| path.is_file())
            .collect()
    }

    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.weights.paths().map(Path::to_owned).collect();
        let index = self.path.join(INDEX_FILE);
        if files.len() > 1 && index.is_file() {
            files.push(index);
        }
        files.extend(self.side_files());
        files
    }
}

/// A template is a text, or a list of named ones of which "default" is meant.
fn default_template(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = value.as_array()?;
    let text = named
        .iter()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))?
        .get("template")?
        .as_str()?;
    Some(text.to_owned())
}

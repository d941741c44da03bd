//! A model directory in Hugging Face layout.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use enamel_kernels::PackedRows;
use enamel_kernels::quantized::formats::FloatKind;
use serde_json::Value;

use super::bitsandbytes::{Quantised, Settings};
use super::safetensors::{INDEX_FILE, SafetensorsSet};
use super::sentencepiece::{Converted, Fault};
use super::{CheckpointError, TensorInfo, json, sentencepiece};
use crate::error::Problems;

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

/// The JSON files among them that are read, besides `config.json`.
const JSON_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
];
const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER: &str = "tokenizer.json";
const PIECES: &str = "tokenizer.model";
/// Files of other forms of tokenizers.
const OTHER_TOKENIZERS: [&str; 7] = [
    PIECES,
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
];

/// An opened directory.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    weights: SafetensorsSet,
    /// How the tensors are made of the stored ones, where these are quantised.
    quantised: Option<Quantised>,
    side: Side,
    /// What `tokenizer.model` amounts to where there is no `tokenizer.json`.
    pieces: Option<Result<Converted, Fault>>,
}

/// What lies beside the weights and says something of the model.
#[derive(Debug, Default)]
struct Side {
    json: BTreeMap<&'static str, Value>,
    /// `chat_template.jinja`.
    template: Option<String>,
    notes: Vec<String>,
}

impl Side {
    /// Reads all files of `dir` that are there.
    ///
    /// # Errors
    /// Every file that is there and cannot be read, at once: what it says must not be taken for absent.
    fn read(dir: &Path) -> Result<(Value, Self), CheckpointError> {
        let mut side = Self::default();
        let mut config = None;
        let mut faults: Vec<(PathBuf, String)> = Vec::new();
        for name in ["config.json"].into_iter().chain(JSON_FILES) {
            let path = dir.join(name);
            let read = present(&path).map(|bytes| {
                let value: Value = json::parse(&bytes?)?;
                match value.is_object() {
                    true => Ok(value),
                    false => Err("not a JSON object".to_owned()),
                }
            });
            match read {
                None => {}
                Some(Ok(value)) if name == "config.json" => config = Some(value),
                Some(Ok(value)) => {
                    side.json.insert(name, value);
                }
                Some(Err(fault)) => faults.push((path, fault)),
            }
        }
        let path = dir.join(TEMPLATE);
        match present(&path).map(|bytes| text(bytes?)) {
            None => {}
            Some(Ok((template, marked))) => {
                if marked {
                    side.notes.push(format!(
                        "{TEMPLATE}: starts with a byte order mark, which is not taken for text"
                    ));
                }
                side.template = Some(template);
            }
            Some(Err(fault)) => faults.push((path, fault)),
        }
        match (faults.as_slice(), config) {
            ([], Some(config)) => Ok((config, side)),
            ([], None) => Err(CheckpointError::NotACheckpoint {
                path: dir.to_owned(),
                reason: "config.json is not in it".into(),
            }),
            ([(path, fault)], _) => Err(CheckpointError::malformed(path, fault)),
            (faults, _) => {
                let name = |path: &Path| path.file_name().map(|name| name.display().to_string());
                let lines = faults
                    .iter()
                    .map(|(path, fault)| format!("{}: {fault}", name(path).unwrap_or_default()));
                let mut problems = Problems::default();
                lines.for_each(|line| problems.push(line));
                Err(CheckpointError::Malformed {
                    path: dir.to_owned(),
                    problems,
                })
            }
        }
    }
}

impl Side {
    fn pieces(&mut self, dir: &Path, config: &Value) -> Option<Result<Converted, Fault>> {
        if dir.join(TOKENIZER).symlink_metadata().is_ok() {
            return None;
        }
        let bytes = match present(&dir.join(PIECES))? {
            Ok(bytes) => bytes,
            Err(fault) => return Some(Err(Fault::Malformed(fault))),
        };
        let model_type = config.get("model_type").and_then(Value::as_str);
        let settings = self.json.get("tokenizer_config.json");
        let converted = match json::instead(&bytes) {
            Some(instead) => Err(Fault::Malformed(instead.to_owned())),
            None => sentencepiece::convert(&bytes, model_type.unwrap_or_default(), settings),
        };
        if let Ok(converted) = &converted {
            self.notes.push(format!(
                "there is no {TOKENIZER}; {PIECES} is read as transformers 5 reads it"
            ));
            self.notes.extend(converted.notes.iter().cloned());
        }
        Some(converted)
    }
}

/// The bytes of a file; nothing where there is none. A link to nowhere is there.
fn present(path: &Path) -> Option<Result<Vec<u8>, String>> {
    match std::fs::read(path) {
        Ok(bytes) => Some(Ok(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            None
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Some(Err(
            "it is a link to a file that is not there; fetch it again".to_owned(),
        )),
        Err(error) => Some(Err(error.to_string())),
    }
}

/// A text, and whether it started with a byte order mark.
fn text(bytes: Vec<u8>) -> Result<(String, bool), String> {
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error
            .as_bytes()
            .get(..error.utf8_error().valid_up_to())
            .unwrap_or_default();
        let line = good
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            .saturating_add(1);
        format!("line {line} is not UTF-8")
    })?;
    Ok(match text.strip_prefix('\u{FEFF}') {
        Some(rest) => (rest.to_owned(), true),
        None => (text, false),
    })
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<TensorInfo>, Value), CheckpointError> {
        let config_path = path.join("config.json");
        let (config, mut side) = Side::read(path)?;
        let pieces = side.pieces(path, &config);
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
            side,
            pieces,
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

    pub(crate) fn has_tokenizer(&self) -> bool {
        match &self.pieces {
            Some(Ok(_) | Err(Fault::Malformed(_))) => true,
            Some(Err(Fault::Unsupported(_))) => false,
            // A link to nowhere is there, and reading it says so.
            None => self.path.join(TOKENIZER).symlink_metadata().is_ok(),
        }
    }

    /// `tokenizer_config.json`, with what `tokenizer.model` adds to it if that is the tokenizer.
    pub(crate) fn tokenizer_config(&self) -> Option<Value> {
        match &self.pieces {
            Some(Ok(converted)) => Some(converted.config.clone()),
            _ => self.json("tokenizer_config.json"),
        }
    }

    pub(crate) fn tokenizer_json(&self) -> Result<Vec<u8>, CheckpointError> {
        let path = self.path.join(TOKENIZER);
        let mut other = None;
        match &self.pieces {
            Some(Ok(converted)) => {
                let json = serde_json::to_vec(&converted.json);
                return json.map_err(|e| CheckpointError::malformed(&path, e.to_string()));
            }
            Some(Err(Fault::Malformed(fault))) => {
                return Err(CheckpointError::malformed(&self.path.join(PIECES), fault));
            }
            Some(Err(Fault::Unsupported(what))) => other = Some(what),
            None => {}
        }
        if self.has_tokenizer() {
            let bytes = std::fs::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
            return match json::instead(&bytes) {
                Some(instead) => Err(CheckpointError::malformed(&path, instead)),
                None => Ok(bytes),
            };
        }
        let old = OTHER_TOKENIZERS
            .into_iter()
            .find(|name| self.path.join(name).is_file());
        let (reason, help) = match old {
            Some(old) => (
                match other {
                    Some(what) => format!("there is no {TOKENIZER}, only {old}: {what}"),
                    None => format!("there is no {TOKENIZER}, only {old}"),
                },
                format!(
                    "convert it once: python -c \"from transformers import AutoTokenizer as T; \
                     T.from_pretrained('{0}').save_pretrained('{0}')\"",
                    self.path.display()
                ),
            ),
            None => (
                "the model comes without a tokenizer".to_owned(),
                format!(
                    "put its {TOKENIZER} beside config.json, or give rows of token ids (input_ids)"
                ),
            ),
        };
        Err(CheckpointError::NoTokenizer {
            path: self.path.clone(),
            reason,
            help,
        })
    }

    /// A JSON file of the directory, by its name.
    pub(crate) fn json(&self, name: &str) -> Option<Value> {
        self.side.json.get(name).cloned()
    }

    /// What a person should know of the files.
    pub(crate) fn notes(&self) -> impl Iterator<Item = &str> {
        let notes = self.side.notes.iter().chain(self.weights.notes());
        notes.map(String::as_str)
    }

    pub(crate) fn chat_template(&self) -> Option<String> {
        if let Some(template) = &self.side.template {
            return Some(template.clone());
        }
        ["tokenizer_config.json", "chat_template.json"]
            .into_iter()
            .find_map(|name| default_template(self.side.json.get(name)?.get("chat_template")?))
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

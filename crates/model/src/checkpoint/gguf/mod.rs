//! GGUF files of Llama models, presented under Hugging Face names.

mod config;
mod header;
mod hyper;
mod keys;
mod quant;
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "computes on blocks of a fixed size"
)]
mod quantise;
mod rows;
mod tokenizer;
mod vocabulary;
mod write;

use std::path::Path;

use enamel_kernels::GgufRows;
use enamel_kernels::HostValues;
use serde_json::Value;

pub(crate) use self::config::ROPE_FACTORS;
use self::header::{Header, RawTensor};
pub(crate) use self::hyper::{architecture, describe as describe_config, rope_factors};
pub(crate) use self::quant::BlockType;
pub(crate) use self::rows::permute;
pub(crate) use self::vocabulary::{Described, describe as describe_tokenizer};
pub(crate) use self::write::{DataFault, Listed, Metadata, data, header};
use super::mapped::MappedFile;
use super::{CheckpointError, SourceDtype, TensorInfo};
use crate::arch::{GgufArch, Permuted};
use crate::error::Problems;

/// An open GGUF file. `tensors` is in the order of the infos that `open` returned.
#[derive(Debug)]
pub(crate) struct GgufFile {
    file: MappedFile,
    header: Header,
    tensors: Vec<RawTensor>,
    arch: &'static GgufArch,
    query_heads: usize,
    key_heads: usize,
    notes: Vec<String>,
}

/// Tensors that hold nothing of the model: tables that are derived from the configuration.
const DERIVED: [&str; 1] = [config::ROPE_FACTORS];

impl GgufFile {
    /// Opens and checks the file; gives its tensors under their Hugging Face names, and the
    /// configuration its metadata amounts to.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<TensorInfo>, Value), CheckpointError> {
        let file = MappedFile::open(path)?;
        let mut header = header::read(path, file.bytes())?;
        let arch = config::architecture(path, &header)?;
        for key in keys::PER_LAYER {
            header.collapse(&header.key(key), file.bytes());
        }
        if let Some(parts) = header.u64("split.count").filter(|&n| n > 1) {
            return Err(CheckpointError::unsupported(
                path,
                format!(
                    "one of {parts} parts of a split GGUF; join them with llama.cpp's \
                     `llama-gguf-split --merge`"
                ),
            ));
        }
        let config = config::config_json(path, &header, file.bytes(), arch)?;
        let heads = |key: &str| {
            let count = config.get(key).and_then(Value::as_u64);
            count.and_then(|n| usize::try_from(n).ok()).unwrap_or(1)
        };
        let (query_heads, key_heads) = (heads("num_attention_heads"), heads("num_key_value_heads"));

        let mut problems = Problems::default();
        let mut tensors = Vec::new();
        let mut infos = Vec::new();
        for raw in &header.tensors {
            if DERIVED.contains(&raw.name.as_str()) {
                continue;
            }
            let Some(name) = arch.hugging_face(&raw.name) else {
                problems.push(format!(
                    "tensor '{}' is not of a model of architecture '{}'",
                    raw.name, arch.name
                ));
                continue;
            };
            let heads = match arch.permutation(&name) {
                Some(Permuted::Query) => query_heads,
                Some(Permuted::Key) => key_heads,
                None => 1,
            };
            let rows = raw.shape.first().copied().unwrap_or(1);
            if heads > 1 && !rows.is_multiple_of(heads.saturating_mul(2)) {
                problems.push(format!(
                    "tensor '{}' has {rows} rows, which {heads} heads cannot share",
                    raw.name
                ));
            }
            let mut shape = raw.shape.clone();
            if arch.is_transposed(&name) {
                shape.reverse();
            }
            infos.push(TensorInfo {
                name,
                shape,
                dtype: source_dtype(raw.block),
            });
            tensors.push(raw.clone());
        }
        problems.into_malformed(path)?;
        let mut gguf = Self {
            file,
            header,
            tensors,
            arch,
            query_heads,
            key_heads,
            notes: Vec::new(),
        };
        gguf.notes.extend(gguf.no_pre_tokenizer());
        Ok((gguf, infos, config))
    }

    /// llama.cpp warns of the same.
    fn no_pre_tokenizer(&self) -> Option<String> {
        let byte_level = self.header.str("tokenizer.ggml.model") == Some("gpt2");
        let missing = byte_level && self.header.get("tokenizer.ggml.pre").is_none();
        missing.then(|| {
            "metadata key 'tokenizer.ggml.pre' is missing, so texts are split as GPT-2 splits them; if the model's own \
             tokenizer does not, convert the model again"
                .to_owned()
        })
    }

    /// What a person should know of the file.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The values of tensor number `index`, with q and k in Hugging Face's row order.
    pub(crate) fn read_f32(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Vec<f32>, CheckpointError> {
        let (raw, bytes) = self.raw(index, info)?;
        let values = raw.block.dequantise(bytes);
        self.file.release(&raw.range);
        if let (true, &[_, columns]) = (self.arch.is_transposed(&info.name), raw.shape.as_slice()) {
            return Ok(HostValues::F32(values).transposed(columns).into_f32());
        }
        match self.heads(info) {
            Some(heads) => self.unpermute(raw, &values, heads),
            None => Ok(values),
        }
    }

    /// A matrix of one of the block types as it lies in the file, with whole rows of q and k in Hugging
    /// Face's order; nothing for another tensor.
    pub(crate) fn read_packed(
        &self,
        index: usize,
        info: &TensorInfo,
    ) -> Result<Option<GgufRows>, CheckpointError> {
        let (raw, bytes) = self.raw(index, info)?;
        let (BlockType::Blocks(kind), &[rows, columns]) = (raw.block, raw.shape.as_slice()) else {
            return Ok(None);
        };
        let bytes = match self.heads(info) {
            Some(heads) => self.unpermute(raw, bytes, heads)?,
            None => bytes.to_vec(),
        };
        self.file.release(&raw.range);
        let packed = GgufRows::new(kind, [rows, columns], bytes);
        let packed = packed.map_err(|e| {
            CheckpointError::malformed(self.path(), format!("tensor '{}': {e}", raw.name))
        })?;
        Ok(Some(packed))
    }

    /// Bytes of a tensor that [`Self::read_packed`] reads.
    pub(crate) fn packed_bytes(&self, index: usize) -> Option<usize> {
        let raw = self.tensors.get(index)?;
        let packed = matches!(raw.block, BlockType::Blocks(_)) && raw.shape.len() == 2;
        packed.then(|| raw.range.len())
    }

    /// Where a tensor is, and its bytes.
    fn raw(&self, index: usize, info: &TensorInfo) -> Result<(&RawTensor, &[u8]), CheckpointError> {
        let raw = self.tensors.get(index);
        let bytes = raw.and_then(|raw| self.file.slice(&raw.range));
        raw.zip(bytes).ok_or_else(|| CheckpointError::NoSuchTensor {
            name: info.name.clone(),
            nearest: None,
        })
    }

    /// The heads for which a tensor's rows are permuted, if they are.
    fn heads(&self, info: &TensorInfo) -> Option<usize> {
        match self.arch.permutation(&info.name)? {
            Permuted::Query => Some(self.query_heads),
            Permuted::Key => Some(self.key_heads),
        }
    }

    fn unpermute<T: Copy>(
        &self,
        raw: &RawTensor,
        values: &[T],
        heads: usize,
    ) -> Result<Vec<T>, CheckpointError> {
        let rows = raw.shape.first().copied().unwrap_or(1);
        rows::unpermute(values, rows, heads).ok_or_else(|| {
            CheckpointError::malformed(
                self.path(),
                format!(
                    "tensor '{}' of shape {:?} does not divide into {heads} heads of an even size",
                    raw.name, raw.shape
                ),
            )
        })
    }

    /// A `tokenizer.json` with the vocabulary and rules of the metadata.
    pub(crate) fn tokenizer_json(&self) -> Result<Vec<u8>, CheckpointError> {
        if !self.has_tokenizer() {
            let model = self.header.str("tokenizer.ggml.model");
            return Err(CheckpointError::NoTokenizer {
                path: self.path().to_owned(),
                reason: format!(
                    "the file comes without a tokenizer (tokenizer.ggml.model is {})",
                    model.map_or_else(|| "missing".to_owned(), |model| format!("'{model}'"))
                ),
                help: "take a file with one, or give rows of token ids (input_ids)".to_owned(),
            });
        }
        tokenizer::tokenizer_json(self.path(), &self.header, self.file.bytes())
    }

    /// A `tokenizer_config.json` with the special tokens of the metadata.
    pub(crate) fn tokenizer_config(&self) -> Option<Value> {
        tokenizer::tokenizer_config(&self.header, self.file.bytes())
    }

    pub(crate) fn chat_template(&self) -> Option<String> {
        self.header
            .str("tokenizer.chat_template")
            .map(str::to_owned)
    }

    /// Whether there is one that can be read; a file may say that it has "none".
    pub(crate) fn has_tokenizer(&self) -> bool {
        match self.header.str("tokenizer.ggml.model") {
            Some(model) => model != "none" && model != "no_vocab",
            // Its name is asked for where it is read.
            None => self.header.get("tokenizer.ggml.tokens").is_some(),
        }
    }

    /// Takes over the metadata that holds of every model of this shape and tokenizer, as the file has it.
    pub(crate) fn carried(&self, to: &mut Metadata) {
        const OF_THIS_FILE: [&str; 3] = [
            "general.file_type",
            "general.quantization_version",
            "general.alignment",
        ];
        for (key, range) in &self.header.entries {
            let about_it = OF_THIS_FILE.contains(&key.as_str())
                || key.starts_with("split.")
                || key.starts_with("quantize.");
            if let Some(entry) = self.file.bytes().get(range.clone()).filter(|_| !about_it) {
                to.raw(entry);
            }
        }
    }

    /// All metadata entries by key, as the file has them.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> std::collections::BTreeMap<String, Vec<u8>> {
        let bytes = |range: &std::ops::Range<usize>| self.file.bytes()[range.clone()].to_vec();
        let entries = self.header.entries.iter();
        entries
            .map(|(key, range)| (key.clone(), bytes(range)))
            .collect()
    }

    /// Names, shapes and values of the tables that are derived from the configuration.
    pub(crate) fn derived(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let tables = self.header.tensors.iter();
        let tables = tables.filter(|raw| DERIVED.contains(&raw.name.as_str()));
        tables
            .map(|raw| {
                let bytes = self.file.slice(&raw.range).unwrap_or_default();
                let values = raw.block.dequantise(bytes);
                (raw.name.clone(), raw.shape.clone(), values)
            })
            .collect()
    }

    pub(crate) fn generation_config(&self) -> Value {
        config::generation_config(&self.header)
    }
}

fn source_dtype(block: BlockType) -> SourceDtype {
    match block {
        BlockType::F32 => SourceDtype::F32,
        BlockType::F16 => SourceDtype::F16,
        BlockType::BF16 => SourceDtype::BF16,
        _ => SourceDtype::Quantised,
    }
}

#[cfg(test)]
mod tests;

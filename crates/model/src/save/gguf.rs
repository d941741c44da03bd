//! Writing a model, or a LoRA beside one, as a GGUF file for llama.cpp, tensor by tensor.
//!
//! Which tensor gets which type follows llama.cpp: its converter (`convert_hf_to_gguf.py`) for f32, f16, bf16
//! and q8_0, `llama-quantize` for q4_0, where the matrix of the output head is finer than the others.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use enamel_adapter::staging::{self, StagedFile};
use enamel_kernels::transposed;
use serde_json::{Map, Value};

use super::{ReadTensor, SaveError, io};
use crate::arch::{ArchConfig, GgufArch, Permuted};
use crate::checkpoint::gguf::{
    BlockType, DataFault, Described, Listed, Metadata, ROPE_FACTORS, architecture, data,
    describe_config, describe_tokenizer, header, permute, rope_factors,
};
use crate::checkpoint::{Checkpoint, parse_json};
use crate::config::DecoderConfig;

/// The element type of a GGUF file's matrices (`--outtype` of llama.cpp's converter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    BF16,
    /// Eight bits and a scale for 32 elements.
    Q8_0,
    /// Four bits and a scale for 32 elements.
    Q4_0,
}

impl OutType {
    /// The name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// llama.cpp's number for a file mostly of this type (`general.file_type`).
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::BF16 => 32,
        }
    }

    /// The type of a tensor of this shape; `head`: what logits are computed with.
    fn of(self, shape: &[usize], head: bool) -> BlockType {
        let [.., _, width] = shape else {
            return BlockType::F32;
        };
        let finest = match (self, head) {
            (Self::F32, _) => return BlockType::F32,
            (Self::F16, _) => return BlockType::F16,
            (Self::BF16, _) => return BlockType::BF16,
            (Self::Q8_0, _) => [BlockType::Q8_0, BlockType::Q8_0],
            (Self::Q4_0, false) => [BlockType::Q4_0, BlockType::Q4_0],
            (Self::Q4_0, true) => [BlockType::Q6K, BlockType::Q8_0],
        };
        let fits = |block: &BlockType| width.is_multiple_of(block.elements());
        finest.into_iter().find(fits).unwrap_or(BlockType::F16)
    }
}

/// How to write a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufOptions {
    /// The type of the matrices.
    pub outtype: OutType,
    /// Whether a file that is there is replaced.
    pub overwrite: bool,
    /// `general.name`; a base that is a GGUF file keeps its own.
    pub name: Option<String>,
    /// The tokens of a directory, where other files than `tokenizer.json` and `tokenizer_config.json` have a say.
    pub tokens: Option<GgufTokens>,
}

/// Tokens that a directory's files declare together.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokens {
    /// The added ones, as `tokenizer.json` lists its own.
    pub added: Value,
    /// (`eos_token`, `</s>`), …
    pub named: Vec<(String, String)>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedGguf {
    /// Size of the file.
    pub bytes: u64,
    /// How many tensors there are of each type, by ggml's names.
    pub types: BTreeMap<&'static str, usize>,
    /// The kind of tokenizer, in words; none in an adapter's file.
    pub tokenizer: Option<String>,
    /// What llama.cpp will do otherwise, and what could not be had in the type that was asked for.
    pub notes: Vec<String>,
}

/// The factors of one module: it adds `alpha / r · b · a` to the weight.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufLora {
    /// The module's name in Hugging Face's words, without `.weight`.
    pub module: String,
    /// Whether it is the embedding, whose weight is `[vocabulary, hidden]` and whose `b · a` is its transpose.
    pub embedding: bool,
    /// Rank.
    pub r: usize,
    /// `[r, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, r]`
    pub b: Vec<f32>,
}

/// Writes a whole model to one file. Arguments as those of [`write_hf`](super::write_hf): one tensor at a time is
/// in memory, everything else comes from `source`. The metadata of a GGUF base is carried over as it is. Nothing
/// is at `path` before all is written.
///
/// # Errors
/// A file that is there already; all that llama.cpp's architecture or tokenizers cannot represent; a value
/// beyond the type's range.
pub fn write_gguf(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    read: ReadTensor<'_>,
    source: &Checkpoint,
    options: &GgufOptions,
) -> Result<SavedGguf, SaveError> {
    let config = ArchConfig::from_json(source.config_json())?;
    let (mut problems, mut notes) = (Vec::new(), Vec::new());
    let Some(arch) = architecture(&config, &mut problems) else {
        return Err(SaveError::NoGguf { problems });
    };
    let mut metadata = Metadata::default();
    let mut extra: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let tokenizer = if let Some(base) = source.gguf() {
        base.carried(&mut metadata);
        extra = base.derived();
        "that of the base, as its metadata says".to_owned()
    } else {
        metadata.string("general.architecture", arch.name);
        metadata.string("general.type", "model");
        if let Some(name) = &options.name {
            metadata.string("general.name", name);
        }
        let decoder = config.decoder();
        describe_config(arch, decoder, &mut metadata, &mut problems);
        if let Some(factors) = rope_factors(&decoder.rope, decoder.head_dim) {
            extra.push((ROPE_FACTORS.to_owned(), vec![factors.len()], factors));
        }
        let to = (&mut metadata, &mut problems, &mut notes);
        tokenizer(source, &config, options.tokens.as_ref(), to)?
    };
    let head = if tensors.iter().any(|(name, _)| name == "lm_head.weight") {
        "output.weight"
    } else {
        "token_embd.weight"
    };
    let mut listed = Vec::new();
    for (name, shape) in tensors {
        let Some(own) = arch.llama_cpp(name) else {
            problems.push(format!(
                "tensor '{name}' has no name in architecture '{}'",
                arch.name
            ));
            continue;
        };
        let mut shape = shape.clone();
        if arch.is_transposed(name) {
            shape.reverse();
        }
        listed.push(Listed {
            block: options.outtype.of(&shape, own == head),
            name: own,
            shape,
        });
    }
    if !problems.is_empty() {
        return Err(SaveError::NoGguf { problems });
    }
    note_fallbacks(&listed, options.outtype, &mut notes);
    listed.extend(extra.iter().map(|(name, shape, _)| Listed {
        name: name.clone(),
        shape: shape.clone(),
        block: BlockType::F32,
    }));
    finish_metadata(&mut metadata, options.outtype);
    let mut values = |index: usize| {
        let Some((name, shape)) = tensors.get(index) else {
            let more = extra.get_mut(index - tensors.len());
            return Ok(more
                .map(|(.., values)| std::mem::take(values))
                .unwrap_or_default());
        };
        let values = read(name).map_err(|source| SaveError::Read {
            name: name.clone(),
            source,
        })?;
        if values.len() != shape.iter().product::<usize>() {
            return Err(SaveError::WrongLength {
                name: name.clone(),
                shape: shape.clone(),
                found: values.len(),
            });
        }
        in_order(
            name,
            values,
            shape.first().copied().unwrap_or(1),
            (arch, config.decoder()),
        )
    };
    let bytes = write_file(path, options.overwrite, &metadata, &listed, &mut values)?;
    Ok(SavedGguf {
        bytes,
        types: counts(&listed),
        tokenizer: Some(tokenizer),
        notes,
    })
}

/// Writes a LoRA that llama.cpp adds to its base when it runs (`--lora`), of one `alpha` for all modules.
/// `config` is that of the base.
///
/// # Errors
/// As [`write_gguf`]; a module that has no name there.
pub fn write_gguf_lora(
    path: &Path,
    modules: &[GgufLora],
    alpha: f64,
    config: &ArchConfig,
    options: &GgufOptions,
) -> Result<SavedGguf, SaveError> {
    let (mut listed, mut problems) = (Vec::new(), Vec::new());
    let Some(arch) = architecture(config, &mut problems) else {
        return Err(SaveError::NoGguf { problems });
    };
    let mut metadata = Metadata::default();
    metadata.string("general.architecture", arch.name);
    metadata.string("general.type", "adapter");
    if let Some(name) = &options.name {
        metadata.string("general.name", name);
    }
    metadata.string("adapter.type", "lora");
    metadata.f32("adapter.lora.alpha", alpha);
    for module in modules {
        let name = format!("{}.weight", module.module);
        let Some(own) = arch.llama_cpp(&name) else {
            problems.push(format!(
                "module '{}' has no name in architecture '{}'",
                module.module, arch.name
            ));
            continue;
        };
        let (a, b) = (module.a.len() / module.r, module.b.len() / module.r);
        // Rows of the embedding are looked up in A, which is stored the other way round for it.
        let a = if module.embedding {
            [a, module.r]
        } else {
            [module.r, a]
        };
        for (end, shape) in [("lora_a", a), ("lora_b", [b, module.r])] {
            listed.push(Listed {
                name: format!("{own}.{end}"),
                shape: shape.to_vec(),
                block: options.outtype.of(&shape, false),
            });
        }
    }
    if !problems.is_empty() {
        return Err(SaveError::NoGguf { problems });
    }
    finish_metadata(&mut metadata, options.outtype);
    let mut notes = Vec::new();
    note_fallbacks(&listed, options.outtype, &mut notes);
    let mut values = |index: usize| {
        let Some(module) = modules.get(index / 2) else {
            return Ok(Vec::new());
        };
        match (index % 2, module.embedding) {
            (0, false) => Ok(module.a.clone()),
            (0, true) => Ok(transposed(&module.a, module.a.len() / module.r)),
            _ => {
                let (name, rows) = (
                    format!("{}.weight", module.module),
                    module.b.len() / module.r,
                );
                rows_in_order(&name, module.b.clone(), rows, (arch, config.decoder()))
            }
        }
    };
    let bytes = write_file(path, options.overwrite, &metadata, &listed, &mut values)?;
    Ok(SavedGguf {
        bytes,
        types: counts(&listed),
        tokenizer: None,
        notes,
    })
}

/// The tokenizer's metadata of a Hugging Face directory.
fn tokenizer(
    source: &Checkpoint,
    config: &ArchConfig,
    tokens: Option<&GgufTokens>,
    (metadata, problems, notes): (&mut Metadata, &mut Vec<String>, &mut Vec<String>),
) -> Result<String, SaveError> {
    if !source.has_tokenizer() {
        metadata.string("tokenizer.ggml.model", "none");
        let ids = [
            ("bos", config.bos_token_id),
            ("eos", config.eos_token_ids.first().copied()),
            ("padding", config.pad_token_id),
        ];
        for (key, id) in ids {
            if let Some(id) = id {
                metadata.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
            }
        }
        notes.push(
            "the model comes without tokenizer.json, so the file has no tokenizer".to_owned(),
        );
        return Ok("none".to_owned());
    }
    let mut json: Value = match parse_json(&source.tokenizer_json()?) {
        Ok(json) => json,
        Err(error) => {
            problems.push(format!("tokenizer.json: {error}"));
            return Ok(String::new());
        }
    };
    let mut settings = source.tokenizer_config();
    if let Some(tokens) = tokens {
        if let Some(json) = json.as_object_mut() {
            json.insert("added_tokens".to_owned(), tokens.added.clone());
        }
        let settings = settings.get_or_insert_with(|| Value::Object(Map::new()));
        if let Some(settings) = settings.as_object_mut() {
            let named = tokens.named.iter().cloned();
            settings.extend(named.map(|(name, token)| (name, token.into())));
        }
    }
    let generation = source.generation_config();
    let stated = |key: &str| -> Vec<u32> {
        let value = generation.as_ref().and_then(|config| config.get(key));
        let all = match value {
            Some(Value::Array(ids)) => ids.iter().collect(),
            other => other.into_iter().collect::<Vec<_>>(),
        };
        let ids = all.into_iter().filter_map(Value::as_u64);
        ids.filter_map(|id| u32::try_from(id).ok()).collect()
    };
    let mut eos = config.eos_token_ids.clone();
    for id in stated("eos_token_id") {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    let template = source.chat_template();
    let from = Described {
        tokenizer: &json,
        config: settings.as_ref(),
        bos: config
            .bos_token_id
            .or(stated("bos_token_id").first().copied()),
        eos: &eos,
        pad: config
            .pad_token_id
            .or(stated("pad_token_id").first().copied()),
        template: template.as_deref(),
        rows: config.vocab_size,
    };
    Ok(describe_tokenizer(&from, metadata, problems, notes))
}

fn finish_metadata(metadata: &mut Metadata, outtype: OutType) {
    metadata.u32("general.file_type", outtype.file_type());
    metadata.u32("general.quantization_version", 2);
}

/// Values in llama.cpp's order.
fn in_order(
    name: &str,
    values: Vec<f32>,
    rows: usize,
    (arch, config): (&GgufArch, &DecoderConfig),
) -> Result<Vec<f32>, SaveError> {
    match arch.is_transposed(name) {
        true => Ok(transposed(&values, values.len() / rows)),
        false => rows_in_order(name, values, rows, (arch, config)),
    }
}

/// Rows in llama.cpp's order, of what is not stored the other way round.
fn rows_in_order(
    name: &str,
    values: Vec<f32>,
    rows: usize,
    (arch, config): (&GgufArch, &DecoderConfig),
) -> Result<Vec<f32>, SaveError> {
    let heads = match arch.permutation(name) {
        Some(Permuted::Query) => config.num_attention_heads,
        Some(Permuted::Key) => config.num_key_value_heads,
        None => return Ok(values),
    };
    permute(&values, rows, heads).ok_or_else(|| SaveError::NoGguf {
        problems: vec![format!(
            "tensor '{name}' of {rows} rows does not divide into {heads} heads of an even size"
        )],
    })
}

fn counts(listed: &[Listed]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for tensor in listed {
        *counts.entry(tensor.block.name()).or_default() += 1;
    }
    counts
}

/// Says which matrices are not in blocks though blocks were asked for.
fn note_fallbacks(listed: &[Listed], outtype: OutType, notes: &mut Vec<String>) {
    if !matches!(outtype, OutType::Q8_0 | OutType::Q4_0) {
        return;
    }
    let fallen: Vec<&str> = listed
        .iter()
        .filter(|tensor| tensor.block == BlockType::F16)
        .map(|tensor| tensor.name.as_str())
        .collect();
    if let Some(first) = fallen.first() {
        notes.push(format!(
            "{} of {} matrices are f16, since the width of their rows is no multiple of 32 ({first}{})",
            fallen.len(),
            listed.iter().filter(|tensor| tensor.shape.len() > 1).count(),
            if fallen.len() > 1 { ", …" } else { "" }
        ));
    }
}

/// Writes under a temporary name in the same directory, syncs and renames; gives the size.
fn write_file(
    path: &Path,
    overwrite: bool,
    metadata: &Metadata,
    listed: &[Listed],
    values: &mut dyn FnMut(usize) -> Result<Vec<f32>, SaveError>,
) -> Result<u64, SaveError> {
    if !overwrite && path.exists() {
        return Err(SaveError::FileExists(path.to_owned()));
    }
    let parent = staging::parent(path);
    fs::create_dir_all(parent).map_err(io(parent))?;
    let staged = StagedFile::beside(path).map_err(io(parent))?;
    let mut out = BufWriter::with_capacity(1 << 20, staged);
    header(&mut out, metadata, listed).map_err(io(path))?;
    for (index, tensor) in listed.iter().enumerate() {
        let values = values(index)?;
        data(&mut out, tensor.block, &values).map_err(|fault| match fault {
            DataFault::Io(error) => io(path)(error),
            DataFault::OutOfRange => SaveError::OutOfRange {
                name: tensor.name.clone(),
            },
        })?;
    }
    out.flush().map_err(io(path))?;
    let staged = out.into_inner().map_err(|e| io(path)(e.into_error()))?;
    let bytes = staged.as_file().metadata().map_err(io(path))?.len();
    let placed = staged.finish(path, overwrite);
    placed.map_err(|refused| match refused.kind() {
        std::io::ErrorKind::AlreadyExists => SaveError::FileExists(path.to_owned()),
        _ => io(path)(refused),
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;

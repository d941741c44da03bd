//! Writing a model as a directory in Hugging Face layout, tensor by tensor; as GGUF: [`write_gguf`].

pub mod bitsandbytes;
mod shard;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use enamel_adapter::staging::{self, StagedDir};
use enamel_kernels::quantized::formats::FloatKind;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use self::shard::{Group, PartType, Shard};
use crate::arch::ArchConfig;
use crate::checkpoint::{Checkpoint, CheckpointError, SIDE_FILES, SourceDtype, TensorSource};
use crate::config::ConfigError;
use crate::heads::HeadConfig;

mod gguf;

pub use gguf::{
    GgufLora, GgufOptions, GgufTokens, OutType, SavedGguf, write_gguf, write_gguf_lora,
};

/// The element type of a saved model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    BF16,
}

impl SaveDtype {
    /// From `f32`, `f16`, `bf16` or PyTorch's `float32`, `float16`, `bfloat16`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("torch.").unwrap_or(text) {
            "f32" | "float32" | "float" => Some(Self::F32),
            "f16" | "float16" | "half" => Some(Self::F16),
            "bf16" | "bfloat16" => Some(Self::BF16),
            _ => None,
        }
    }

    /// The type that a `config.json` names (`dtype` or `torch_dtype`); f32 when it names none.
    pub fn of_config(config: &Value) -> Self {
        ["dtype", "torch_dtype"]
            .into_iter()
            .find_map(|key| Self::parse(config.get(key)?.as_str()?))
            .unwrap_or(Self::F32)
    }

    /// The same type as kernels name it, which rounds to it.
    pub fn kind(self) -> FloatKind {
        match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::BF16 => FloatKind::Bf16,
        }
    }

    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    fn part(self) -> PartType {
        match self {
            Self::F32 => PartType::F32,
            Self::F16 => PartType::F16,
            Self::BF16 => PartType::BF16,
        }
    }

    /// The element type that most of a checkpoint has; f32, which loses nothing, for a quantised one.
    pub fn native(checkpoint: &Checkpoint) -> Self {
        let count = |dtype| {
            let same = checkpoint.tensors().iter().filter(|t| t.dtype == dtype);
            same.map(|t| t.shape.iter().product::<usize>())
                .sum::<usize>()
        };
        let kinds = [
            (SourceDtype::F32, Self::F32),
            (SourceDtype::F16, Self::F16),
            (SourceDtype::BF16, Self::BF16),
            (SourceDtype::Quantised, Self::F32),
        ];
        let most = kinds.into_iter().max_by_key(|(dtype, _)| count(*dtype));
        most.map_or(Self::F32, |(_, dtype)| dtype)
    }
}

/// How to save.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// The element type.
    pub dtype: SaveDtype,
    /// Whether a directory that holds something is replaced.
    pub overwrite: bool,
    /// The most bytes of tensors in one file; larger models are split into shards.
    pub shard_bytes: u64,
    /// Further files, by name, which the directory is never seen without.
    pub extra: Vec<(String, Vec<u8>)>,
    /// The model's `config.json` where it is not the source's: of a model with another head.
    pub config: Option<Value>,
}

impl SaveOptions {
    /// Shards of 5 GB, the size transformers uses, and never over an existing directory.
    pub fn new(dtype: SaveDtype) -> Self {
        Self {
            dtype,
            overwrite: false,
            shard_bytes: 5_000_000_000,
            extra: Vec::new(),
            config: None,
        }
    }

    /// The same for a model of this configuration, which may have another head than the source.
    pub fn for_model(mut self, config: &ArchConfig) -> Self {
        self.config = (config.head != HeadConfig::CausalLm).then(|| config.to_json());
        self
    }
}

/// Gives the values of a named tensor, row-major.
pub type ReadTensor<'a> =
    &'a mut dyn FnMut(&str) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedModel {
    /// Names of all files, in the order written.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Why a model cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The target holds something.
    #[error("{} exists and is not empty; give another directory, or allow overwriting", .0.display())]
    Exists(PathBuf),
    /// The file is there.
    #[error("{} exists; give another file, or allow overwriting", .0.display())]
    FileExists(PathBuf),
    /// The model is none that a GGUF file of architecture "llama" can hold.
    #[error("this model cannot be written as GGUF:{}", crate::config::bullets(.problems))]
    NoGguf {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// The base model's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value cannot be had in the chosen type.
    #[error("tensor '{name}' has values beyond the range of f16; save as bf16 or f32")]
    OutOfRange {
        /// The tensor.
        name: String,
    },
    /// A tensor's values do not fit its shape.
    #[error("tensor '{name}' of shape {shape:?} was given {found} values")]
    WrongLength {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The number of values that came.
        found: usize,
    },
    /// A tensor's values could not be had.
    #[error("tensor '{name}': {source}")]
    Read {
        /// The tensor.
        name: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A model that the asked-for format cannot hold.
    #[error("the model cannot be quantised: {}", .0.join("\n  - "))]
    Quantise(Vec<String>),
    /// The base's weights do not fit its configuration, or cannot be quantised.
    #[error(transparent)]
    Load(#[from] crate::error::LoadError),
    /// The base model's tokenizer or configuration cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> SaveError + '_ {
    move |source| SaveError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes weights, configuration, tokenizer, generation settings and chat template to `dir`.
///
/// `tensors` are names and shapes in the order to write; `read` gives the values of one, row-major,
/// and is called once for each, so that one tensor at a time is in memory. Everything else comes
/// from `source`: copied from a directory, built from metadata for GGUF. All is written under a
/// temporary name beside `dir` and renamed when complete.
pub fn write_hf(
    dir: &Path,
    tensors: &[(String, Vec<usize>)],
    read: ReadTensor<'_>,
    source: &Checkpoint,
    options: &SaveOptions,
) -> Result<SavedModel, SaveError> {
    let groups: Vec<Group> = tensors
        .iter()
        .map(|(name, shape)| Group::dense(name, shape, options.dtype.part()))
        .collect();
    let config = options.config.as_ref().unwrap_or(source.config_json());
    let config = saved_config(config, tensors, options.dtype);
    let mut fill = |group: &Group, shard: &mut Shard| {
        let values = read(&group.name).map_err(|source| SaveError::Read {
            name: group.name.clone(),
            source,
        })?;
        write_values(shard, &group.name, &values, options.dtype)
    };
    write_directory(dir, &groups, &mut fill, &config, source, options)
}

/// Writes the tensors of one group into a shard.
type Fill<'a> = &'a mut dyn FnMut(&Group, &mut Shard) -> Result<(), SaveError>;

/// Writes shards, index, configuration and side files under a temporary name, and renames them.
fn write_directory(
    dir: &Path,
    groups: &[Group],
    fill: Fill<'_>,
    config: &Value,
    source: &Checkpoint,
    options: &SaveOptions,
) -> Result<SavedModel, SaveError> {
    let occupied = is_occupied(dir)?;
    if occupied && !options.overwrite {
        return Err(SaveError::Exists(dir.to_owned()));
    }
    let staged = StagedDir::beside(dir).map_err(io(staging::parent(dir)))?;
    let at = staged.path();

    let mut files = Vec::new();
    let shards = shards(groups, options.shard_bytes);
    let count = shards.len();
    let (mut weight_map, mut tensor_bytes) = (Map::new(), 0);
    for (number, groups) in shards.into_iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut shard = Shard::create(&at.join(&name), groups)?;
        for group in groups {
            fill(group, &mut shard)?;
            for part in &group.parts {
                weight_map.insert(part.name.clone(), name.clone().into());
            }
        }
        tensor_bytes += shard.finish()?;
        files.push(name);
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": tensor_bytes}, "weight_map": weight_map});
        let name = "model.safetensors.index.json";
        write_json(&at.join(name), &index)?;
        files.push(name.to_owned());
    }
    write_json(&at.join("config.json"), config)?;
    files.push("config.json".to_owned());
    files.extend(write_side_files(at, source)?);
    for (name, bytes) in &options.extra {
        write_bytes(&at.join(name), bytes)?;
        files.push(name.clone());
    }

    match occupied {
        true => staged.replace(dir),
        // Onto an empty folder or none.
        false => staged.finish(dir),
    }
    .map_err(io(dir))?;
    Ok(SavedModel {
        files,
        tensor_bytes,
    })
}

/// Whether a directory holds nothing but what saving a model writes, and files called as in `extra`.
pub fn is_only_a_model(dir: &Path, extra: &[&str]) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return false;
    };
    entries.into_iter().all(|entry| {
        let Ok(entry) = entry else {
            return false;
        };
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let weights = name.strip_prefix("model").is_some_and(|rest| {
            rest == ".safetensors"
                || rest == ".safetensors.index.json"
                || (rest.starts_with('-') && rest.ends_with(".safetensors"))
        });
        let known = weights || SIDE_FILES.contains(&&*name) || extra.contains(&&*name);
        known && entry.file_type().is_ok_and(|kind| kind.is_file())
    })
}

fn is_occupied(dir: &Path) -> Result<bool, SaveError> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io(dir)(error)),
    }
}

/// Cuts the list so that no part is above the limit, but for single groups that are.
fn shards(groups: &[Group], limit: u64) -> Vec<&[Group]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, group) in groups.iter().enumerate() {
        let more = group.bytes();
        if i > start && bytes + more > limit {
            shards.extend(groups.get(start..i));
            (start, bytes) = (i, 0);
        }
        bytes += more;
    }
    shards.extend(groups.get(start..));
    shards
}

/// Values converted at a time.
const CHUNK: usize = 1 << 16;

fn write_values(
    shard: &mut Shard,
    name: &str,
    values: &[f32],
    dtype: SaveDtype,
) -> Result<(), SaveError> {
    let shape = shard.shape(name);
    if values.len() != shape.iter().product::<usize>() {
        return Err(SaveError::WrongLength {
            name: name.to_owned(),
            shape,
            found: values.len(),
        });
    }
    shard.begin(name)?;
    let mut buffer: Vec<u8> = Vec::with_capacity(CHUNK * 4);
    for chunk in values.chunks(CHUNK) {
        buffer.clear();
        match dtype {
            SaveDtype::F32 => buffer.extend(chunk.iter().flat_map(|x| x.to_le_bytes())),
            SaveDtype::BF16 => {
                buffer.extend(chunk.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
            }
            SaveDtype::F16 => {
                if chunk
                    .iter()
                    .any(|x| x.is_finite() && f16::from_f32(*x).is_infinite())
                {
                    return Err(SaveError::OutOfRange {
                        name: name.to_owned(),
                    });
                }
                buffer.extend(chunk.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
            }
        }
        shard.write(&buffer)?;
    }
    Ok(())
}

/// The base's configuration, true for what is saved.
fn saved_config(config: &Value, tensors: &[(String, Vec<usize>)], dtype: SaveDtype) -> Value {
    let mut config = config.clone();
    let Some(map) = config.as_object_mut() else {
        return config;
    };
    // transformers 4 reads the one key, 5 the other.
    for key in ["torch_dtype", "dtype"] {
        map.insert(key.into(), dtype.torch_name().into());
    }
    map.shift_remove("quantization_config");
    // A head of its own, which training may have made of a tied one, must not be tied on loading.
    let head = tensors.iter().any(|(name, _)| name == "lm_head.weight");
    map.insert("tie_word_embeddings".into(), (!head).into());
    config
}

/// Copies or builds everything that is neither weights nor `config.json`.
fn write_side_files(at: &Path, source: &Checkpoint) -> Result<Vec<String>, SaveError> {
    let mut files = Vec::new();
    if !source.is_gguf() {
        for from in source.side_files() {
            let Some(name) = from.file_name().filter(|name| *name != "config.json") else {
                continue;
            };
            let to = at.join(name);
            fs::copy(&from, &to).map_err(io(&from))?;
            files.push(name.to_string_lossy().into_owned());
        }
        return Ok(files);
    }
    write_bytes(&at.join("tokenizer.json"), &source.tokenizer_json()?)?;
    files.push("tokenizer.json".to_owned());
    if let Some(template) = source.chat_template() {
        write_bytes(&at.join("chat_template.jinja"), template.as_bytes())?;
        files.push("chat_template.jinja".to_owned());
    }
    if let Some(config) = source.tokenizer_config() {
        write_json(&at.join("tokenizer_config.json"), &config)?;
        let special: Map<String, Value> = ["bos_token", "eos_token", "pad_token", "unk_token"]
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())))
            .collect();
        write_json(&at.join("special_tokens_map.json"), &Value::Object(special))?;
        files.push("tokenizer_config.json".to_owned());
        files.push("special_tokens_map.json".to_owned());
    }
    if let Some(config) = source.generation_config() {
        write_json(&at.join("generation_config.json"), &config)?;
        files.push("generation_config.json".to_owned());
    }
    Ok(files)
}

fn write_json(path: &Path, value: &Value) -> Result<(), SaveError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| io(path)(e.into()))?;
    text.push(b'\n');
    write_bytes(path, &text)
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    let mut file = File::create(path).map_err(io(path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io(path))
}

#[cfg(test)]
mod tests;

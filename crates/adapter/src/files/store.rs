//! An adapter's two files, without a model: `adapter_config.json`, `adapter_model.safetensors`.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};

use crate::base::module_shape::ModuleShape;
use crate::config::Made;
use crate::error::shown;
use crate::error::{AdapterError, Result};
use crate::exact_json;
use crate::files::foreign;
use crate::files::foreign::MLX_WEIGHTS;
use crate::methods::AdapterConfig;
use crate::model::trainable::HostTensor;
use crate::staging::StagedFile;

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// The key in the weights' metadata under which an adapter says which base it was trained on. PEFT reads
/// the tensors alone and is silent about it; of a key in `adapter_config.json` it would warn.
const BASE: &str = "enamel_base";
/// The key under which a classifier's adapter says what its classes are called, as a JSON list; PEFT has no place
/// for them.
const LABELS: &str = "enamel_labels";
/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// An adapter on the host: all that its directory holds.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFile {
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its tensors under PEFT's keys, sorted by key.
    pub tensors: Vec<HostTensor>,
    /// What its file says besides.
    pub made: Made,
}

impl Made {
    fn read(text_of: impl Fn(&str) -> Option<String>) -> Self {
        let labels = text_of(LABELS).and_then(|text| serde_json::from_str(&text).ok());
        Self {
            base: text_of(BASE),
            labels: labels.unwrap_or_default(),
        }
    }

    fn write(&self) -> Map<String, Value> {
        let mut metadata = Map::new();
        if let Some(base) = &self.base {
            metadata.insert(BASE.to_owned(), json!(base));
        }
        if !self.labels.is_empty() {
            metadata.insert(LABELS.to_owned(), json!(json!(self.labels).to_string()));
        }
        metadata
    }
}

impl AdapterFile {
    /// Reads an adapter directory whatever model it is for. Values must be finite.
    ///
    /// # Errors
    /// Missing, damaged or unsupported files; a pickle file alone.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = load_config(dir)?;
        let path = dir.join(WEIGHTS);
        let mut problems = Vec::new();
        let mut tensors = Vec::new();
        let read = read_tensors(dir, &config)?;
        for (key, stored) in read.tensors {
            match stored.values {
                None => problems.push(stored.unreadable(&key)),
                Some(values) if values.iter().any(|v| !v.is_finite()) => {
                    problems.push(not_finite(&key));
                }
                Some(values) => tensors.push((key, stored.shape, values)),
            }
        }
        if problems.is_empty() {
            return Ok(Self {
                config,
                tensors,
                made: read.made,
            });
        }
        Err(AdapterError::Mismatch {
            path,
            problems,
            note: "Write the adapter again from where it was trained.".into(),
        })
    }

    /// Writes the directory. Each file is complete or absent, and the same adapter gives the same
    /// bytes. `card` is its README.md.
    ///
    /// # Errors
    /// When the disk refuses, or a value is not finite: then nothing is written.
    pub fn write(&self, dir: &Path, card: Option<&str>) -> Result<()> {
        let bad = self
            .tensors
            .iter()
            .find(|(_, _, v)| v.iter().any(|v| !v.is_finite()));
        if let Some((key, ..)) = bad {
            return Err(AdapterError::NonFinite(key.clone()));
        }
        let format =
            |path: std::path::PathBuf, reason: String| AdapterError::Format { path, reason };
        let bytes =
            serialize(&self.tensors, &self.made).map_err(|e| format(dir.join(WEIGHTS), e))?;
        let mut json = serde_json::to_string_pretty(&self.config.to_json())
            .map_err(|e| format(dir.join(CONFIG), e.to_string()))?;
        json.push('\n');
        std::fs::create_dir_all(dir).map_err(|source| AdapterError::Io {
            path: dir.to_path_buf(),
            source,
        })?;
        // The configuration last: without it nothing takes the directory for an adapter.
        write(&dir.join(WEIGHTS), &bytes)?;
        if let Some(card) = card {
            write(&dir.join("README.md"), card.as_bytes())?;
        }
        write(&dir.join(CONFIG), json.as_bytes())
    }
}

/// Reads `adapter_config.json`; what is not supported is refused by name. Adapters that it
/// names and that lie beside it are named so that they are found from the working directory. mlx-lm's configuration is read as
/// the LoRA that it means.
pub fn load_config(dir: &Path) -> Result<AdapterConfig> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, e))?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text);
    let mut value = exact_json(text).map_err(|e| AdapterError::Format {
        path: path.clone(),
        reason: format!("not JSON: {e}"),
    })?;
    if foreign::is_mlx(&value) {
        let (keys, _) = header(&mlx_weights(dir)?)?;
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        value = foreign::mlx_config(&value, &keys).map_err(|problems| AdapterError::Config {
            origin: path.display().to_string(),
            problems,
        })?;
    }
    let config = AdapterConfig::from_json(&value, &path.display().to_string())?;
    Ok(config.located(dir))
}

/// mlx-lm's file of weights.
fn mlx_weights(dir: &Path) -> Result<PathBuf> {
    let path = dir.join(MLX_WEIGHTS);
    if path.exists() {
        return Ok(path);
    }
    let there = foreign::what_is_there(dir).map_or(String::new(), |what| format!(" ({what})"));
    Err(AdapterError::Format {
        path: dir.join(CONFIG),
        reason: format!("this is an mlx-lm adapter, and its {MLX_WEIGHTS} is not there{there}"),
    })
}

/// What is to be known of an adapter before it is used, whatever the base: where its files are not as PEFT
/// writes them, and settings that are on and have no effect here. Only headers are read; a file that cannot
/// be read has no notes, since loading will say why. `modules` are the base's, where there is one.
pub fn notes(dir: &Path, modules: Option<&[ModuleShape]>) -> Vec<String> {
    let mut notes = Vec::new();
    let Ok(config) = load_config(dir) else {
        return notes;
    };
    let mlx = dir.join(MLX_WEIGHTS);
    if !dir.join(WEIGHTS).exists() && mlx.exists() {
        notes.push(
            "it is an mlx-lm adapter; read as the LoRA that it is in PEFT's format".to_owned(),
        );
    } else if let Ok((keys, _)) = header(&dir.join(WEIGHTS))
        && !whole(&config)
        && let Ok((keys, of_keys)) =
            foreign::canonical(keys.into_iter().map(|key| (key, ())).collect())
    {
        notes.extend(of_keys);
        let modules = modules.unwrap_or_default();
        if keys
            .keys()
            .any(|key| foreign::moved(key, modules).is_some())
        {
            notes.push(
                "its keys have another start of the modules' names than this model; read as if they had the model's"
                    .to_owned(),
            );
        }
    }
    notes.extend(config.unknown_settings().into_iter().map(|setting| {
        format!("adapter_config.json: {setting} is not known here and has no effect")
    }));
    for (name, member) in config.members() {
        let of_member = self::notes(Path::new(member), modules).into_iter();
        notes.extend(of_member.map(|note| format!("expert {}: {note}", shown(name))));
    }
    notes
}

/// What an adapter's file says of itself; nothing where it cannot be read.
pub fn made(dir: &Path) -> Made {
    header(&dir.join(WEIGHTS)).map_or_else(|_| Made::default(), |(_, made)| made)
}

/// What identifies the weights that an adapter was trained on, if it says so.
pub fn base_identity(dir: &Path) -> Option<String> {
    made(dir).base
}

/// Whether the file's keys are a model's own, and not an adapter's.
fn whole(config: &AdapterConfig) -> bool {
    crate::methods::MethodConfig::trains_everything(config)
}

/// Writes tensors on the host as one safetensors file, whole or not at all.
///
/// # Errors
/// When the disk refuses.
pub fn write_tensors(path: &Path, tensors: &[HostTensor]) -> Result<()> {
    let bytes = serialize(tensors, &Made::default()).map_err(|reason| AdapterError::Format {
        path: path.to_path_buf(),
        reason,
    })?;
    write(path, &bytes)
}

/// Reads what [`write_tensors`] wrote, sorted by name.
///
/// # Errors
/// A file that is missing or damaged.
pub fn read_tensor_file(path: &Path) -> Result<Vec<HostTensor>> {
    let all = read_file(path)?.0.into_iter();
    Ok(all
        .filter_map(|(key, stored)| Some((key, stored.shape, stored.values?)))
        .collect())
}

/// A tensor as it lies in a file.
pub(crate) struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// As f32; `None` where the type is not a float that is read.
    pub values: Option<Vec<f32>>,
}

impl Stored {
    pub fn unreadable(&self, key: &str) -> String {
        let key = shown(key);
        format!("{key} is {:?}; only F32, F16 and BF16 are read", self.dtype)
    }

    /// A matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        let (rows, cols) = match self.shape.as_slice() {
            [rows, cols] => (*rows, *cols),
            _ => return self,
        };
        let values = self.values.map(|values| {
            // A shape may be long on one side and hold nothing.
            let cols = if values.is_empty() { 0 } else { cols };
            let column = |c| values.iter().skip(c).step_by(cols.max(1));
            (0..cols).flat_map(column).copied().collect()
        });
        Self {
            shape: vec![cols, rows],
            values,
            ..self
        }
    }

    /// Whether this is `other` with rows and columns exchanged.
    pub fn is_transpose_of(&self, other: &Self) -> bool {
        let ([rows, cols], [other_rows, other_cols]) =
            (self.shape.as_slice(), other.shape.as_slice())
        else {
            return false;
        };
        let (Some(own), Some(values)) = (&self.values, &other.values) else {
            return false;
        };
        let columns = (0..if values.is_empty() { 0 } else { *other_cols })
            .flat_map(|c| values.iter().skip(c).step_by((*other_cols).max(1)));
        rows == other_cols && cols == other_rows && own.iter().eq(columns)
    }

    /// Whether the file's values are these, rounded as the file's type rounds them.
    pub fn is_rounded(&self, base: &[f32], values: &[f32]) -> bool {
        let mut pairs = base.iter().zip(values);
        base.len() == values.len() && pairs.all(|(b, s)| self.rounded(*b) == *s)
    }

    /// An f32 rounded as the file's type rounds it.
    fn rounded(&self, value: f32) -> f32 {
        match self.dtype {
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        }
    }
}

pub(crate) fn not_finite(key: &str) -> String {
    format!("{} holds a value that is not finite", shown(key))
}

/// The tensors of a directory under PEFT's keys, and what its file says besides.
pub(crate) struct ReadTensors {
    pub tensors: BTreeMap<String, Stored>,
    pub made: Made,
}

/// Every tensor of a directory's `adapter_model.safetensors` (or mlx-lm's file), by PEFT's key.
pub(crate) fn read_tensors(dir: &Path, config: &AdapterConfig) -> Result<ReadTensors> {
    let path = dir.join(WEIGHTS);
    let mlx = dir.join(MLX_WEIGHTS);
    if !path.exists() && mlx.exists() {
        let (tensors, made) = read_file(&mlx)?;
        let tensors = foreign::mlx_tensors(tensors).map_err(|problems| AdapterError::Mismatch {
            path: mlx,
            problems,
            note: "This is an mlx-lm adapter; mlx_lm.fuse makes a model of it.".into(),
        })?;
        return Ok(ReadTensors { tensors, made });
    }
    if !path.exists() && dir.join(PICKLE).exists() {
        return Err(AdapterError::Pickle(dir.to_path_buf()));
    }
    let (tensors, made) = read_file(&path)?;
    if whole(config) {
        return Ok(ReadTensors { tensors, made });
    }
    let (tensors, _) = foreign::canonical(tensors).map_err(|problems| AdapterError::Mismatch {
        path,
        problems,
        note: "Nothing was read of it.".into(),
    })?;
    Ok(ReadTensors { tensors, made })
}

/// Every tensor of a file and what its metadata say. The file is read as a whole: were it
/// mapped, another process that cuts it short could end this one.
fn read_file(path: &Path) -> Result<(BTreeMap<String, Stored>, Made)> {
    let format = |reason: String| AdapterError::Format {
        path: path.to_path_buf(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|e| unreadable(path, e))?;
    if bytes.is_empty() {
        return Err(format("the file is empty".into()));
    }
    let broken = |e: safetensors::SafeTensorError| {
        format(format!(
            "not a whole safetensors file ({}); copy or download it again",
            shown(&e.to_string())
        ))
    };
    // Checks that the header fits the file and that the tensors cover it without gap or overlap.
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let all = file.iter().map(|(key, view)| {
        let stored = Stored {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            values: decode(&view),
        };
        (key.to_string(), stored)
    });
    let metadata = metadata.metadata().as_ref();
    let made = Made::read(|key| metadata.and_then(|all| all.get(key)).cloned());
    Ok((all.collect(), made))
}

/// The keys of a safetensors file and what its metadata say, without its values.
fn header(path: &Path) -> Result<(BTreeSet<String>, Made)> {
    let format = |reason: String| AdapterError::Format {
        path: path.to_path_buf(),
        reason,
    };
    let mut file = File::open(path).map_err(|e| unreadable(path, e))?;
    let mut length = [0; 8];
    let short = |e: std::io::Error| format(format!("not a whole safetensors file ({e})"));
    file.read_exact(&mut length).map_err(short)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(format(format!(
            "not a safetensors file: its header would be {length} bytes long"
        )));
    }
    let mut text = Vec::new();
    let read = file.take(length).read_to_end(&mut text).map_err(short)?;
    if read as u64 != length {
        return Err(format(
            "not a whole safetensors file; copy or download it again".into(),
        ));
    }
    let all: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| format(format!("its header is not JSON: {e}")))?;
    let metadata = all.get("__metadata__");
    let made = Made::read(|key| {
        let text = metadata.and_then(|all| all.get(key))?.as_str();
        text.map(str::to_owned)
    });
    let keys = all.into_iter().map(|(key, _)| key);
    Ok((keys.filter(|key| key != "__metadata__").collect(), made))
}

/// A file that an adapter directory must have.
fn unreadable(path: &Path, source: std::io::Error) -> AdapterError {
    let dir = path.parent().unwrap_or(Path::new("."));
    let there = foreign::what_is_there(dir).map_or(String::new(), |what| format!("; {what}"));
    let path = path.to_path_buf();
    match source.kind() {
        std::io::ErrorKind::NotFound => AdapterError::Format {
            path,
            reason: format!(
                "there is no such file; an adapter directory has adapter_config.json and \
                 adapter_model.safetensors{there}"
            ),
        },
        _ => AdapterError::Io { path, source },
    }
}

/// A safetensors file of f32 tensors, sorted by name. Written here and not by the format's own crate, which
/// puts several metadata in another order each time.
fn serialize(tensors: &[HostTensor], made: &Made) -> std::result::Result<Vec<u8>, String> {
    let mut sorted: Vec<&HostTensor> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    // Transformers wants to know who wrote the file.
    let mut metadata = made.write();
    metadata.insert("format".to_owned(), json!("pt"));
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), Value::Object(metadata));
    let mut start = 0_usize;
    for (key, shape, values) in &sorted {
        let size = values.len().saturating_mul(4);
        if shape.iter().product::<usize>() != values.len() {
            return Err(format!("{key} {shape:?} has {} values", values.len()));
        }
        let end = start.saturating_add(size);
        let place = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        if header.insert(key.clone(), place).is_some() {
            return Err(format!("{key} is there twice"));
        }
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    // The format aligns the data to eight bytes, with spaces.
    header.push_str(
        &" ".repeat(
            header
                .len()
                .next_multiple_of(8)
                .saturating_sub(header.len()),
        ),
    );
    let mut bytes = Vec::with_capacity(start.saturating_add(header.len()).saturating_add(8));
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    for (_, _, values) in sorted {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(bytes)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| AdapterError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut file = StagedFile::beside(path).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.finish(path, true).map_err(io)?;
    Ok(())
}

fn decode(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let (halves, _) = view.data().as_chunks::<2>();
    let halves = halves.iter().copied();
    Some(match view.dtype() {
        Dtype::F32 => {
            let (words, _) = view.data().as_chunks::<4>();
            words.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
        Dtype::F16 => halves.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => halves.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => return None,
    })
}

//! An adapter's two files, without a model: `adapter_config.json`, `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::{AdapterError, Result};
use crate::exact_json;
use crate::methods::AdapterConfig;
use crate::trainable::HostTensor;

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// An adapter on the host: all that its directory holds.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFile {
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its tensors under PEFT's keys, sorted by key.
    pub tensors: Vec<HostTensor>,
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
        for (key, stored) in read_tensors(dir)? {
            match stored.values {
                None => problems.push(stored.unreadable(&key)),
                Some(values) if values.iter().any(|v| !v.is_finite()) => {
                    problems.push(not_finite(&key));
                }
                Some(values) => tensors.push((key, stored.shape, values)),
            }
        }
        if problems.is_empty() {
            return Ok(Self { config, tensors });
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
            serialize(&self.tensors).map_err(|e| format(dir.join(WEIGHTS), e.to_string()))?;
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

/// Reads `adapter_config.json`; what is not supported is refused by name. Experts of an X-LoRA that lie
/// beside it are named so that they are found from the working directory.
pub fn load_config(dir: &Path) -> Result<AdapterConfig> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, e))?;
    let value = exact_json(&text).map_err(|e| AdapterError::Format {
        path: path.clone(),
        reason: format!("not JSON: {e}"),
    })?;
    let config = AdapterConfig::from_json(&value, &path.display().to_string())?;
    Ok(match config {
        AdapterConfig::XLora(config) => config.located(dir).into(),
        config => config,
    })
}

/// Writes tensors on the host as one safetensors file, whole or not at all.
///
/// # Errors
/// When the disk refuses.
pub fn write_tensors(path: &Path, tensors: &[HostTensor]) -> Result<()> {
    let bytes = serialize(tensors).map_err(|e| AdapterError::Format {
        path: path.to_path_buf(),
        reason: e.to_string(),
    })?;
    write(path, &bytes)
}

/// Reads what [`write_tensors`] wrote, sorted by name.
///
/// # Errors
/// A file that is missing or damaged.
pub fn read_tensor_file(path: &Path) -> Result<Vec<HostTensor>> {
    let all = read_file(path)?.into_iter();
    Ok(all
        .filter_map(|(key, stored)| Some((key, stored.shape, stored.values?)))
        .collect())
}

/// A name that may stand for an adapter: it becomes a folder's name and, in PEFT, part of a key.
///
/// # Errors
/// A name that would leave the folder, hide in it, or split a key.
pub fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.contains(['/', '\\', '\0', ':']) {
        "it would name another folder"
    } else if name.contains('.') {
        "PEFT's keys are split at dots"
    } else if name.chars().any(char::is_control) {
        "it holds control characters"
    } else {
        return Ok(());
    };
    Err(AdapterError::Choice {
        problems: vec![format!("{name:?} cannot be an adapter's name: {reason}")],
    })
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
        format!("{key} is {:?}; only F32, F16 and BF16 are read", self.dtype)
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
    format!("{key} holds a value that is not finite")
}

/// Every tensor of a directory's `adapter_model.safetensors`, by key.
pub(crate) fn read_tensors(dir: &Path) -> Result<BTreeMap<String, Stored>> {
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join(PICKLE).exists() {
        return Err(AdapterError::Pickle(dir.to_path_buf()));
    }
    read_file(&path)
}

fn read_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let format = |reason: String| AdapterError::Format {
        path: path.to_path_buf(),
        reason,
    };
    let io = |source| AdapterError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Err(format("the file is empty".into()));
    }
    // SAFETY: the map is only read, and dropped before this function returns; a file that another
    // process cuts short meanwhile is the one case that cannot be guarded against.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    // Checks that the header fits the file and that the tensors cover it without gap or overlap.
    let file = SafeTensors::deserialize(&map).map_err(|e| {
        format(format!(
            "not a whole safetensors file ({e}); copy or download it again"
        ))
    })?;
    let all = file.iter().map(|(key, view)| {
        let stored = Stored {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            values: decode(&view),
        };
        (key.to_string(), stored)
    });
    Ok(all.collect())
}

/// A file that an adapter directory must have.
fn unreadable(path: &Path, source: std::io::Error) -> AdapterError {
    let path = path.to_path_buf();
    match source.kind() {
        std::io::ErrorKind::NotFound => AdapterError::Format {
            path,
            reason: "there is no such file; an adapter directory has adapter_config.json and \
                     adapter_model.safetensors"
                .into(),
        },
        _ => AdapterError::Io { path, source },
    }
}

fn serialize(tensors: &[HostTensor]) -> std::result::Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let raw: Vec<_> = tensors
        .iter()
        .map(|(key, shape, values)| (key, shape, bytes(values)))
        .collect();
    let mut views = Vec::with_capacity(raw.len());
    for (key, shape, bytes) in &raw {
        views.push((
            key.as_str(),
            TensorView::new(Dtype::F32, shape.to_vec(), bytes)?,
        ));
    }
    // Tensors are sorted by name on the way out. Transformers wants to know who wrote the file.
    safetensors::serialize(
        views,
        Some(HashMap::from([("format".to_string(), "pt".to_string())])),
    )
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| AdapterError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // As an ordinary file; a temporary one would be its owner's alone.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(path.parent().unwrap_or(Path::new(".")))
        .map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}

fn decode(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = view.data();
    let halves = || data.chunks_exact(2).map(|b| [b[0], b[1]]);
    Some(match view.dtype() {
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => return None,
    })
}

//! The cache directory, the settings of a pull, and the lock that pulls of one model share.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::path::PathBuf;

use super::{PullProgress, SourceError};

/// The hub that is asked when `HF_ENDPOINT` names no other.
const PUBLIC_HUB: &str = "https://huggingface.co";

/// Where models are kept and how the network may be used. [`PullOptions::from_env`] reads the
/// environment once, so that all code below it depends on this value alone.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// The cache: `ENAMEL_HOME`, else `enamel` in the XDG cache directory.
    pub root: PathBuf,
    /// Where hub repositories are kept, in the hub clients' common layout: `HF_HOME/hub` when that
    /// is set (so that Python sees the same files), else `hub` in the cache.
    pub hub_cache: PathBuf,
    /// A further directory in that layout that is only read: the hub clients' default.
    pub hub_fallback: Option<PathBuf>,
    /// The hub's address (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The hub's access token: `HF_TOKEN`, else the one that `huggingface-cli login` stored.
    pub token: Option<String>,
    /// Whether the hub must not be asked (`HF_HUB_OFFLINE`).
    pub hub_offline: bool,
    /// Whether nothing at all may be fetched.
    pub offline: bool,
}

/// The cache directory: `ENAMEL_HOME`, else `enamel` in the XDG cache directory.
pub fn cache_root() -> Result<PathBuf, SourceError> {
    if let Some(home) = set("ENAMEL_HOME") {
        return Ok(home.into());
    }
    // The XDG specification has relative paths ignored.
    let xdg = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    xdg.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))
        .map(|cache| cache.join("enamel"))
        .ok_or(SourceError::NoCache)
}

/// An environment variable that is set to something.
fn set(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

impl PullOptions {
    /// The settings that the environment asks for.
    pub fn from_env() -> Result<Self, SourceError> {
        let root = cache_root()?;
        let default_hf = set("HOME").map(|home| PathBuf::from(home).join(".cache/huggingface"));
        let hf_home = set("HF_HOME").map(PathBuf::from);
        let stored_token = hf_home
            .iter()
            .chain(&default_hf)
            .find_map(|home| std::fs::read_to_string(home.join("token")).ok());
        let token = set("HF_TOKEN")
            .map(|token| token.to_string_lossy().into_owned())
            .or(stored_token)
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let on = |name: &str| {
            set(name).is_some_and(|value| {
                let value = value.to_string_lossy().to_lowercase();
                matches!(value.as_str(), "1" | "true" | "yes" | "on")
            })
        };
        Ok(Self {
            hub_cache: match hf_home {
                Some(home) => home.join("hub"),
                None => root.join("hub"),
            },
            hub_fallback: default_hf.map(|home| home.join("hub")),
            endpoint: set("HF_ENDPOINT").map_or_else(
                || PUBLIC_HUB.to_owned(),
                |url| url.to_string_lossy().trim_end_matches('/').to_owned(),
            ),
            token,
            hub_offline: on("HF_HUB_OFFLINE"),
            offline: false,
            root,
        })
    }

    /// Settings with everything under `root`, nothing from the environment.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self {
            hub_cache: root.join("hub"),
            hub_fallback: None,
            endpoint: PUBLIC_HUB.to_owned(),
            token: None,
            hub_offline: false,
            offline: false,
            root,
        }
    }

    /// Takes the lock of the model with this reference; it is given back when dropped, and by the
    /// system when the process dies.
    pub(super) fn lock(
        &self,
        reference: &str,
        progress: &mut dyn PullProgress,
    ) -> Result<File, SourceError> {
        let dir = self.root.join("locks");
        std::fs::create_dir_all(&dir).map_err(|e| SourceError::io(&dir, e))?;
        let name: String = reference
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let path = dir.join(format!("{name}.lock"));
        let file = File::create(&path).map_err(|e| SourceError::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.note("waiting for another pull of the same model");
                file.lock().map_err(|e| SourceError::io(&path, e))?;
            }
            Err(TryLockError::Error(e)) => return Err(SourceError::io(&path, e)),
        }
        Ok(file)
    }
}

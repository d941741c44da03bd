//! `recipe.lock.toml`: a recipe with nothing left open, and what the run that wrote it stood on.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Recipe, RecipeError};
use crate::files::write_atomic;

/// What a run stood on besides its recipe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockInfo {
    /// Version of Enamel.
    pub enamel: String,
    /// Version of Burn.
    pub burn: String,
    /// The device that computed, as `enamel devices` names it.
    pub device: String,
    /// The CPU path in use (`ENAMEL_CPU`), on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Operating system and processor architecture (`linux-x86_64`).
    pub platform: String,
    /// Threads that computed.
    pub threads: usize,
    /// Which source the base model came from.
    pub model_source: String,
    /// The time that the chat template's `strftime_now` shows (Unix seconds), if it asks for it: a
    /// template with a date in it renders the same text on another day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_time: Option<i64>,
    /// The model's files.
    #[serde(default)]
    pub model_files: Vec<FileHash>,
    /// The tokenizer's and the chat template's files.
    #[serde(default)]
    pub tokenizer_files: Vec<FileHash>,
    /// The training and validation files.
    #[serde(default)]
    pub data_files: Vec<FileHash>,
    /// The files of the adapter that training started from.
    #[serde(default)]
    pub init_files: Vec<FileHash>,
}

/// A file and what it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileHash {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

impl LockInfo {
    /// Files whose contents are not as they were: one line each, empty if all are. `now` is what the
    /// current run found, compared by position within each group so that a model may have moved.
    pub fn changed_files(&self, now: &Self) -> Vec<String> {
        let groups = [
            (&self.model_files, &now.model_files),
            (&self.tokenizer_files, &now.tokenizer_files),
            (&self.data_files, &now.data_files),
            (&self.init_files, &now.init_files),
        ];
        let mut changed = Vec::new();
        for (then, now) in groups {
            for i in 0..then.len().max(now.len()) {
                match (then.get(i), now.get(i)) {
                    (Some(a), Some(b)) if a.sha256 == b.sha256 => {}
                    (_, Some(b)) if then.len() <= i => {
                        changed.push(format!("{} is new", b.path.display()));
                    }
                    (Some(a), None) => changed.push(format!("{} is gone", a.path.display())),
                    (Some(a), Some(b)) => changed.push(format!(
                        "{} has SHA-256 {}, the lock says {}",
                        b.path.display(),
                        b.sha256,
                        a.sha256
                    )),
                    (None, _) => {}
                }
            }
        }
        changed
    }
}

/// Writes the recipe and the `[lock]` table, atomically, for the run of this id.
pub fn write_lock(
    path: &Path,
    run: &str,
    recipe: &Recipe,
    lock: &LockInfo,
) -> Result<(), RecipeError> {
    #[derive(Serialize)]
    struct Locked<'a> {
        #[serde(flatten)]
        recipe: &'a Recipe,
        lock: &'a LockInfo,
    }
    let fail = |message: String| RecipeError::Write {
        path: path.to_owned(),
        message,
    };
    let body = toml::to_string(&Locked { recipe, lock }).map_err(|e| fail(e.to_string()))?;
    let text = format!(
        "# Written by `enamel train`. Training from this file gives the same adapter again, bit for\n\
         # bit, on the same machine: enamel train recipe.lock.toml --output DIR\n\n{body}"
    );
    write_atomic(path, run, text.as_bytes()).map_err(|e| fail(e.to_string()))
}

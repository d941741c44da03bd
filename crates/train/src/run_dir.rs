//! The run directory: where a run starts, whether it may, and what it leaves.

use std::fs;
use std::path::{Path, PathBuf};

use enamel_model::checkpoint::hex;
use sha2::{Digest, Sha256};

use crate::checkpoints::{self, Checkpoints, RunState};
use crate::error::TrainError;
use crate::recipe::{LockInfo, Recipe, write_lock};

/// Name of the lock file.
pub const LOCK: &str = "recipe.lock.toml";

/// What `--resume` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// A new run.
    #[default]
    No,
    /// Go on from the newest checkpoint of the run directory; start if there is none.
    Latest,
    /// Go on from this checkpoint.
    From(PathBuf),
}

/// An opened run directory.
#[derive(Debug)]
pub struct RunDir {
    /// The directory.
    pub path: PathBuf,
    /// Where the run stands.
    pub state: RunState,
    /// The checkpoint it goes on from.
    pub checkpoint: Option<PathBuf>,
}

impl RunDir {
    /// Opens the recipe's output directory for a new run or a resumed one. Nothing is removed or
    /// written yet.
    ///
    /// # Errors
    /// When another run is there and neither resuming nor overwriting was asked for, or when the
    /// checkpoint was made under another recipe, other files, another seed or another optimizer.
    pub fn open(recipe: &Recipe, resume: &Resume, fingerprint: &str) -> Result<Self, TrainError> {
        let path = recipe.output_dir();
        let fresh = RunState {
            seed: recipe.seed,
            fingerprint: fingerprint.to_string(),
            ..RunState::default()
        };
        let found = Checkpoints::new(&path, 1).latest();
        let checkpoint = match resume {
            Resume::From(dir) => Some(dir.clone()),
            Resume::Latest => found,
            Resume::No => {
                refuse_other_run(&path, recipe.output.overwrite)?;
                None
            }
        };
        let Some(checkpoint) = checkpoint else {
            return Ok(Self {
                path,
                state: fresh,
                checkpoint: None,
            });
        };
        let state = checkpoints::read_state(&checkpoint)?;
        if state.fingerprint != fingerprint {
            return Err(TrainError::Run {
                path: checkpoint,
                reason: "this checkpoint belongs to another recipe, other data or another base; \
                         going on from it would not continue the same run"
                    .into(),
                help: format!(
                    "resume with what it was started with ({}), or start a new run from its \
                     adapter with adapter.init_from",
                    path.join(LOCK).display()
                ),
            });
        }
        checkpoints::check_optimizer(&checkpoint, recipe.train.optim)?;
        Ok(Self {
            path,
            state,
            checkpoint: Some(checkpoint),
        })
    }

    /// Makes the directory ready: removes the former run's files if this one starts anew, and writes
    /// the lock file.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn prepare(&self, recipe: &Recipe, lock: &LockInfo) -> Result<(), TrainError> {
        fs::create_dir_all(&self.path)
            .map_err(TrainError::io(&self.path, "creating the run directory"))?;
        if self.checkpoint.is_none() {
            for name in ["adapter", "checkpoints", "model"] {
                let old = self.path.join(name);
                if old.exists() {
                    fs::remove_dir_all(&old)
                        .map_err(TrainError::io(&old, "removing the former run's"))?;
                }
            }
            for name in ["metrics.jsonl", "summary.json", "report.html"] {
                let old = self.path.join(name);
                if old.exists() {
                    fs::remove_file(&old)
                        .map_err(TrainError::io(&old, "removing the former run's"))?;
                }
            }
        }
        Checkpoints::new(&self.path, 1).sweep();
        crate::optimizer::sweep(&self.path);
        Ok(write_lock(&self.path.join(LOCK), recipe, lock)?)
    }
}

fn refuse_other_run(path: &Path, overwrite: bool) -> Result<(), TrainError> {
    let occupied = path.join(LOCK).exists() || path.join("adapter").exists();
    if overwrite || !occupied {
        return Ok(());
    }
    Err(TrainError::Run {
        path: path.to_path_buf(),
        reason: "there is a run here already".into(),
        help: "go on with it (--resume), choose another directory (--output DIR), or replace it \
               (--set output.overwrite=true)"
            .into(),
    })
}

/// SHA-256 over what decides the numbers of a run: the recipe without its output directory, device
/// and display settings, and the hashes of every file it reads.
///
/// # Errors
/// Never in practice: a resolved recipe always serialises.
pub fn fingerprint(recipe: &Recipe, lock: &LockInfo) -> Result<String, TrainError> {
    let mut recipe = recipe.clone();
    let defaults = crate::recipe::TrainSettings::default();
    recipe.output = crate::recipe::OutputSettings::default();
    recipe.device.clear();
    recipe.model.base.clear();
    recipe.data.train.0.clear();
    recipe.data.valid.0.clear();
    recipe.adapter.init_from = None;
    recipe.train.logging_steps = defaults.logging_steps;
    recipe.train.save_total_limit = defaults.save_total_limit;
    recipe.train.samples = defaults.samples;
    recipe.train.sample_prompts.clear();
    recipe.train.max_new_tokens = defaults.max_new_tokens;
    // The same bits in another amount of memory.
    recipe.train.gradient_checkpointing = defaults.gradient_checkpointing;
    recipe.train.check_memory = defaults.check_memory;
    // The optimizer's state says itself whose it is, and names both where they differ.
    recipe.train.optim = defaults.optim;
    let text = serde_json::to_string(&recipe)
        .map_err(|e| TrainError::Framework(format!("hashing the recipe: {e}")))?;
    let mut hash = Sha256::new();
    hash.update(text.as_bytes());
    let groups = [
        &lock.model_files,
        &lock.tokenizer_files,
        &lock.data_files,
        &lock.init_files,
    ];
    for (number, files) in groups.into_iter().enumerate() {
        hash.update([number as u8]);
        for file in files {
            hash.update(file.sha256.as_bytes());
        }
    }
    Ok(hex(&hash.finalize()))
}

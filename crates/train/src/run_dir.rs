//! The run directory: where a run starts, whether it may, and what it leaves.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint_check::{self, Offered, Sound};
use crate::checkpoints::{self, Checkpoints, RunState};
use crate::error::TrainError;
use crate::fingerprint::{Started, fingerprint, other_run};
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
    /// What a person has to know about it.
    pub note: Option<String>,
}

impl RunDir {
    /// Opens the recipe's output directory for a new run or a resumed one. Nothing is removed or
    /// written yet.
    ///
    /// # Errors
    /// When another run is there and neither resuming nor overwriting was asked for, or when the
    /// checkpoint is damaged, or was made under another recipe, other files, another seed or another optimizer.
    pub fn open(recipe: &Recipe, resume: &Resume, lock: &LockInfo) -> Result<Self, TrainError> {
        let fingerprint = fingerprint(recipe, lock)?;
        let path = recipe.output_dir();
        let fresh = RunState {
            seed: recipe.seed,
            fingerprint: fingerprint.clone(),
            ..RunState::default()
        };
        let found = Checkpoints::new(&path, 1);
        let checkpoint = match resume {
            Resume::From(dir) => Some(dir.clone()),
            Resume::Latest => found.latest(),
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
                note: None,
            });
        };
        let others = Offered {
            run: &path,
            list: &found.list(),
            fingerprint: &fingerprint,
        };
        let Sound {
            mut state,
            unsealed,
        } = checkpoint_check::sound(&checkpoint, &others)?;
        if state.fingerprint != fingerprint {
            let started = Started::find(&checkpoint, &path);
            let changes = started.map(|started| started.changes(recipe, lock));
            // An older version had fewer settings to hash.
            let same = unsealed && changes.as_ref().is_some_and(Vec::is_empty);
            if !same {
                return Err(other_run(&checkpoint, &path, &changes.unwrap_or_default()));
            }
            state.fingerprint = fingerprint;
        }
        checkpoints::check_optimizer(&checkpoint, recipe.train.optim)?;
        Ok(Self {
            path,
            state,
            note: unsealed.then(|| {
                "the checkpoint is of an older version, which noted no hashes: whether it is whole cannot be told"
                    .to_owned()
            }),
            checkpoint: Some(checkpoint),
        })
    }

    /// Refuses a checkpoint of a run of another length than `total`.
    ///
    /// # Errors
    /// That, with both lengths.
    pub fn check_length(&self, total: usize) -> Result<(), TrainError> {
        match &self.checkpoint {
            Some(checkpoint) if self.state.total_steps != total => Err(TrainError::Run {
                path: checkpoint.clone(),
                reason: format!(
                    "it is of a run of {} steps, and this one has {total}",
                    self.state.total_steps
                ),
                help: "resume with the recipe and the data that the run was started with".into(),
            }),
            _ => Ok(()),
        }
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

//! Checkpoints: adapter, optimizer and position of a run, never the base.
//!
//! `checkpoints/step-000120/` holds `adapter/` (PEFT's format, so a checkpoint is an adapter too),
//! `optimizer.bpk` (AdamW's moments, keyed by parameter, as in Burn's record; 8-bit ones as their codes) and
//! `state.json`, which has hashes of all of them. It is
//! written under another name and renamed when complete: a run killed at any instant leaves the
//! last checkpoint loadable. The schedule, the order of rows and dropout depend on the seed and the
//! step alone, so the step is all the random state there is.

use std::ffi::OsStr;
use std::fs::{self};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn::module::Module;
use enamel_adapter::RankAllocator;
use enamel_adapter::files::store::{read_tensor_file, write_tensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::files::{staging, sync_dir, sync_tree, write_synced};
use crate::optimizer::{self, Optim, Optimizer};
use crate::run_dir::checkpoint_check;
use crate::run_dir::ground::Ground;

/// Where a run stands between two optimizer steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Seed of the run.
    pub seed: u64,
    /// The best validation so far and the step it was measured at.
    pub best: Option<Best>,
    /// Validations since the metric last got better, for early stopping.
    pub evals_without_gain: usize,
    /// Best value of `metric_for_best_model` (the loss, if nothing else is chosen) that early stopping has counted.
    pub patience_loss: Option<f64>,
    /// Labels that the loss has counted so far: tokens, or a classifier's rows.
    pub trained_tokens: u64,
    /// Tokens so far, padding left out.
    pub tokens: u64,
    /// Training time so far, interruptions left out.
    pub seconds: f64,
    /// Validation loss before the first step.
    pub first_valid_loss: Option<f64>,
    /// The task's other metrics before the first step.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub first_metrics: Map<String, Value>,
    /// Loss of the last validation.
    #[serde(default)]
    pub valid_loss: Option<f64>,
    /// The task's other metrics of the last validation.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metrics: Map<String, Value>,
    /// Mean training loss of the last line that was said.
    #[serde(default)]
    pub train_loss: Option<f64>,
    /// Steps since then.
    #[serde(default)]
    pub window: Window,
    /// Most resident memory so far, in bytes.
    #[serde(default)]
    pub peak_memory: u64,
    /// What computed the steps; older versions did not note it.
    #[serde(default)]
    pub ground: Option<Ground>,
    /// SHA-256 of what decides the numbers (recipe and files): a run resumes only under the same.
    pub fingerprint: String,
    /// The id in the run directory's `run.lock`; empty in a checkpoint of an older version.
    #[serde(default)]
    pub run: String,
    /// Number of the line that the checkpoint belongs to: a run that goes on from an older checkpoint than
    /// its newest begins another.
    #[serde(default)]
    pub line: usize,
}

/// Sums over the steps since the last line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Loss of each step times its labels.
    pub loss: f64,
    /// Labels that the loss counts.
    pub trained: usize,
    /// Tokens, padding left out.
    pub tokens: usize,
    /// Time.
    pub seconds: f64,
}

/// A validation result worth remembering.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Step after which it was measured.
    pub step: usize,
    /// Mean negative log-likelihood.
    pub loss: f64,
    /// The task's other metrics.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metrics: Map<String, Value>,
}

impl Best {
    /// The value of a metric; NaN where it was not measured.
    pub fn value(&self, key: &str) -> f64 {
        match self.metrics.get(key) {
            Some(value) => value.as_f64().unwrap_or(f64::NAN),
            None if key == "loss" => self.loss,
            None => f64::NAN,
        }
    }
}

/// The checkpoints of one run directory.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

pub(crate) const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.bpk";
/// AdaLoRA's importance and ranks.
const BUDGET: &str = "budget.safetensors";
/// The folder of a run's checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// The adapter's folder within a checkpoint.
pub const ADAPTER: &str = "adapter";

impl Checkpoints {
    /// The checkpoints under `run_dir`, of which the newest `keep` stay (and the best one).
    pub fn new(run_dir: &Path, keep: usize) -> Self {
        Self {
            dir: run_dir.join(CHECKPOINTS),
            keep,
        }
    }

    /// The folder of the checkpoint after `step`.
    pub fn path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("step-{step:06}"))
    }

    /// Complete checkpoints, oldest first.
    pub fn list(&self) -> Vec<(usize, PathBuf)> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|e| {
                let step = step_of(&e.file_name())?;
                e.path().join(STATE).is_file().then(|| (step, e.path()))
            })
            .collect();
        found.sort();
        found
    }

    /// All folders with a checkpoint's name, complete or not.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries
            .filter(|entry| step_of(&entry.file_name()).is_some())
            .map(|entry| entry.path())
            .collect();
        found.sort();
        found
    }

    /// The newest complete checkpoint.
    pub fn latest(&self) -> Option<PathBuf> {
        self.list().pop().map(|(_, path)| path)
    }

    /// Writes the checkpoint of `state.step`; `write_adapter` fills the adapter's folder. Then
    /// removes the oldest ones of its line beyond the limit, never the best.
    ///
    /// # Errors
    /// When the disk refuses, the run directory is gone, or another run's checkpoint has the place; what was
    /// there before stays.
    pub fn save(
        &self,
        state: &RunState,
        optimizer: &Optimizer,
        allocator: Option<&RankAllocator>,
        write_adapter: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<PathBuf, TrainError> {
        // Not with what leads to it: a run directory that is gone must not come back as an empty one.
        match fs::create_dir(&self.dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(TrainError::io(&self.dir, "creating the folder")(error));
            }
            _ => {}
        }
        let staging = staging(&self.dir, &state.run)?;
        write_adapter(&staging.path().join(ADAPTER))?;
        optimizer.save(&staging.path().join(OPTIMIZER))?;
        if let Some(allocator) = allocator {
            write_tensors(&staging.path().join(BUDGET), &allocator.state())?;
        }
        let json = checkpoint_check::sealed(state, staging.path())?;
        write_synced(&staging.path().join(STATE), &json)?;

        sync_tree(staging.path());
        let target = self.path(state.step);
        if fs::symlink_metadata(&target).is_ok() {
            self.remove(&target, &state.run)?;
        }
        let staged = staging.keep();
        fs::rename(&staged, &target).map_err(TrainError::io(&target, "renaming it into place"))?;
        sync_dir(&self.dir);
        self.prune(state);
        Ok(target)
    }

    /// Removes the oldest checkpoints of the line that `state` belongs to, beyond the limit, never the best.
    pub(crate) fn prune(&self, state: &RunState) {
        let best = state.best.as_ref().map(|b| b.step);
        let of_line = self.list().into_iter().filter(|(_, path)| {
            let other = read_state(path);
            other.is_ok_and(|o| o.line == state.line && (o.run == state.run || o.run.is_empty()))
        });
        let all: Vec<_> = of_line.collect();
        let excess = all.len().saturating_sub(self.keep);
        for (step, path) in all.into_iter().take(excess) {
            if Some(step) != best {
                // A checkpoint that cannot be removed costs disk space and nothing else.
                let _ = self.remove(&path, &state.run);
            }
        }
    }

    /// Removes a checkpoint of the run called `run`. Killed meanwhile, it leaves what the next run sweeps.
    fn remove(&self, path: &Path, run: &str) -> Result<(), TrainError> {
        let own = read_state(path).is_ok_and(|state| state.run == run || state.run.is_empty());
        if !own || !is_only_ours(path) {
            return Err(TrainError::Run {
                path: path.to_owned(),
                reason: "it holds what this run did not write".into(),
                help: "move it away".into(),
            });
        }
        let aside = staging(&self.dir, run)?;
        let gone = aside.path().join("old");
        fs::rename(path, &gone).map_err(TrainError::io(path, "removing it"))?;
        aside.close().map_err(TrainError::io(path, "removing it"))
    }
}

/// The step in a checkpoint's name.
pub(crate) fn step_of(name: &OsStr) -> Option<usize> {
    name.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// Whether a checkpoint's folder holds nothing but what a run writes into it.
pub(crate) fn is_only_ours(dir: &Path) -> bool {
    holds_only(dir, &[STATE, OPTIMIZER, BUDGET], &|name, path| {
        name == ADAPTER && is_only_an_adapter(path)
    })
}

/// Whether a folder holds nothing but an adapter's files, and folders of such.
pub(crate) fn is_only_an_adapter(dir: &Path) -> bool {
    let files = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    ];
    holds_only(dir, &files, &|_, path| {
        path.join("adapter_config.json").is_file() && holds_only(path, &files, &|_, _| false)
    })
}

/// Whether all files in `dir` have one of these names, and `folder` is true of all folders.
fn holds_only(dir: &Path, files: &[&str], folder: &dyn Fn(&str, &Path) -> bool) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return false;
    };
    entries.into_iter().all(|entry| {
        let Ok(entry) = entry else {
            return false;
        };
        let name = entry.file_name();
        match (entry.file_type(), name.to_str()) {
            (Ok(kind), Some(name)) if kind.is_file() => files.contains(&name),
            (Ok(kind), Some(name)) if kind.is_dir() => folder(name, &entry.path()),
            _ => false,
        }
    })
}

/// The state of the checkpoint in `dir`.
///
/// # Errors
/// When the file is missing, not one of ours, or not as it was written.
pub fn read_state(dir: &Path) -> Result<RunState, TrainError> {
    checkpoint_check::read_state(dir)
}

/// The state of the checkpoint in `dir`, if all that it holds is what was written.
///
/// # Errors
/// All that is not.
pub fn check(dir: &Path) -> Result<RunState, TrainError> {
    let alone = checkpoint_check::Offered {
        run: dir,
        list: &[],
        fingerprint: "",
    };
    Ok(checkpoint_check::sound(dir, &alone)?.state)
}

/// Refuses the checkpoint in `dir` if its moments are of another optimizer than `optim`.
///
/// # Errors
/// That, naming both, or when the file is missing or damaged.
pub fn check_optimizer(dir: &Path, optim: Optim) -> Result<(), TrainError> {
    optimizer::check_optim(&dir.join(OPTIMIZER), optim)
}

/// Puts the moments of the checkpoint in `dir` into `optimizer`, which trains `model`.
///
/// # Errors
/// When the file is missing, damaged or of another model.
pub fn load_optimizer<M: Module>(
    dir: &Path,
    optimizer: &mut Optimizer,
    model: &M,
) -> Result<(), TrainError> {
    optimizer.load(&dir.join(OPTIMIZER), model)
}

/// Puts the importance and ranks of the checkpoint in `dir` into `allocator`.
///
/// # Errors
/// When the file is missing or damaged.
pub fn load_budget(dir: &Path, allocator: &mut RankAllocator) -> Result<(), TrainError> {
    allocator.restore(read_tensor_file(&dir.join(BUDGET))?);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use enamel_kernels::AdamW;

    fn optimizer() -> Optimizer {
        Optimizer::new(AdamW {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        })
    }

    fn save(c: &Checkpoints, step: usize, best: Option<usize>) {
        let best = best.map(|step| Best {
            step,
            loss: 1.0,
            metrics: Map::new(),
        });
        let state = RunState {
            step,
            best,
            ..RunState::default()
        };
        c.save(&state, &optimizer(), None, |dir| {
            fs::create_dir_all(dir).map_err(TrainError::io(dir, "creating"))
        })
        .unwrap();
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let dir = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(dir.path(), 2);
        for step in 1..=5 {
            save(&c, step, (step >= 2).then_some(2));
        }
        let steps: Vec<usize> = c.list().into_iter().map(|(s, _)| s).collect();
        assert_eq!(steps, [2, 4, 5]);
        assert_eq!(read_state(&c.latest().unwrap()).unwrap().step, 5);
    }

    #[test]
    fn a_failed_save_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(dir.path(), 2);
        save(&c, 1, None);
        let state = RunState {
            step: 1,
            ..RunState::default()
        };
        let failed = c.save(&state, &optimizer(), None, |_| {
            Err(TrainError::Framework("disk full".into()))
        });
        assert!(failed.is_err());
        assert_eq!(c.list().len(), 1);
        assert_eq!(
            fs::read_dir(dir.path().join("checkpoints"))
                .unwrap()
                .count(),
            1
        );
    }

    #[test]
    fn a_half_written_checkpoint_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(dir.path(), 2);
        save(&c, 1, None);
        fs::create_dir_all(c.path(9)).unwrap();
        assert!(c.latest().unwrap().ends_with("step-000001"));
    }
}

//! What decides the numbers of a run: a checkpoint is gone on from under the same recipe and the same files only,
//! and where they differ, the error says which of them do.

use std::path::Path;

use enamel_model::digest::hex;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::optimizer::Optim;
use crate::recipe::{LockInfo, Recipe};
use crate::run_dir::LOCK;
use crate::run_dir::belongings::locked_recipe;

/// SHA-256 over what decides the numbers of a run: the recipe without its output directory, device
/// and display settings, and the hashes of every file it reads.
///
/// # Errors
/// Never in practice: a resolved recipe always serialises.
pub fn fingerprint(recipe: &Recipe, lock: &LockInfo) -> Result<String, TrainError> {
    let text = serde_json::to_string(&deciding(recipe))
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

/// The recipe with those settings at fixed values that change no number.
fn deciding(recipe: &Recipe) -> Recipe {
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
    recipe
}

/// Whether two recipes name the same numbers: all settings but those that change none.
pub(crate) fn same_settings(a: &Recipe, b: &Recipe) -> bool {
    let named = |recipe: &Recipe| {
        let mut all = deciding(recipe);
        all.model.base.clone_from(&recipe.model.base);
        all.data.clone_from(&recipe.data);
        all.adapter.init_from.clone_from(&recipe.adapter.init_from);
        all.train.optim = recipe.train.optim;
        all
    };
    named(a) == named(b)
}

/// What the run that wrote a checkpoint was started with, as its lock file has it.
pub(crate) struct Started {
    recipe: Recipe,
    lock: LockInfo,
}

impl Started {
    /// The lock file of the run that `checkpoint` lies in, else of the run in `run`; none where neither can be read.
    pub fn find(checkpoint: &Path, run: &Path) -> Option<Self> {
        let own = checkpoint.parent().and_then(Path::parent);
        [own, Some(run)].into_iter().flatten().find_map(Self::of)
    }

    /// The lock file in `run`, if it can be read.
    pub fn of(run: &Path) -> Option<Self> {
        let (recipe, lock) = locked_recipe(run)?;
        Some(Self { recipe, lock })
    }

    /// How the run's optimizer held its moments.
    pub fn optim(&self) -> Optim {
        self.recipe.train.optim
    }

    /// Settings that decide the numbers and files that are not as they were, a line each.
    pub fn changes(&self, recipe: &Recipe, lock: &LockInfo) -> Vec<String> {
        let as_json = |recipe: &Recipe| serde_json::to_value(deciding(recipe)).unwrap_or_default();
        let mut changes = Vec::new();
        compare("", &as_json(&self.recipe), &as_json(recipe), &mut changes);
        changes.extend(self.lock.changed_files(lock));
        changes
    }
}

/// Walks two recipes at once.
fn compare(name: &str, then: &Value, now: &Value, changes: &mut Vec<String>) {
    let nothing = Map::new();
    let (a, b) = match (then, now) {
        (Value::Object(a), Value::Object(b)) => (a, b),
        (Value::Object(a), Value::Null) => (a, &nothing),
        (Value::Null, Value::Object(b)) => (&nothing, b),
        _ if then == now => return,
        _ => {
            return changes.push(format!("{name} is {}, and was {}", shown(now), shown(then)));
        }
    };
    let added = b.keys().filter(|key| !a.contains_key(*key));
    for key in a.keys().chain(added) {
        let name = match name.is_empty() {
            true => key.clone(),
            false => format!("{name}.{key}"),
        };
        let at = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
        compare(&name, &at(a), &at(b), changes);
    }
}

/// A value on one short line.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::Null => return "not set".to_owned(),
        value => value.to_string(),
    };
    match text.chars().count() > LONGEST {
        true => text.chars().take(LONGEST).chain(['…']).collect(),
        false => text,
    }
}

/// The refusal to go on with a checkpoint or a directory of another run.
pub(crate) fn other_run(checkpoint: &Path, run: &Path, changes: &[String]) -> TrainError {
    let mut reason =
        "this belongs to another recipe, other data or another base; going on from it would not \
                      continue the same run"
            .to_owned();
    if !changes.is_empty() {
        reason.push_str(&format!(":\n  {}", changes.join("\n  ")));
    }
    TrainError::Run {
        path: checkpoint.to_owned(),
        reason,
        help: format!(
            "resume with what it was started with ({}), or start a new run from its adapter with \
             adapter.init_from",
            run.join(LOCK).display()
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::recipe::{FileHash, RecipeFile};

    fn recipe(overrides: &[&str]) -> Recipe {
        let text = "seed = 1\n[model]\nbase = 'a'\n[data]\ntrain = 'rows.jsonl'\n".to_owned();
        let file = RecipeFile::from_text(Path::new("recipe.toml"), text);
        file.with_overrides(overrides).resolve().unwrap()
    }

    #[test]
    fn what_changed_is_named_and_nothing_else() {
        let files = |sha256: &str| LockInfo {
            data_files: vec![FileHash {
                path: "rows.jsonl".into(),
                sha256: sha256.into(),
            }],
            ..LockInfo::default()
        };
        let then = Started {
            recipe: recipe(&[]),
            lock: files("ab"),
        };
        let same = recipe(&[
            "output.dir='b'",
            "train.logging_steps=7",
            "model.base='elsewhere'",
        ]);
        assert_eq!(then.changes(&same, &files("ab")), [""; 0]);
        let now = recipe(&[
            "seed=2",
            "train.learning_rate=0.5",
            "adapter.rank_pattern={ q_proj = 3 }",
            "model.quantization.load_in_4bit=true",
        ]);
        let changes = then.changes(&now, &files("cd"));
        for (change, part) in changes.iter().zip([
            "seed is 2, and was 1",
            "model.quantization.load_in_4bit is true, and was false",
            "adapter.rank_pattern.q_proj is 3, and was not set",
            "train.learning_rate is 0.5, and was ",
            "rows.jsonl has SHA-256 cd, the lock says ab",
        ]) {
            assert!(change.contains(part), "{part}: {change}");
        }
        assert_eq!(changes.len(), 5, "{changes:?}");
    }
}

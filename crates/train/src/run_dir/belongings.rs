//! What of a run directory is the run's own, and what somebody else has put there.
//!
//! The marker alone gives no right to a name: a folder is the run's if its content is what the run left (a
//! digest in the marker) or says so itself (the id in a checkpoint's `state.json`), a file if a run writes such
//! ones. All else is foreign, and a run refuses to begin where something foreign has a name that it writes.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use enamel_model::digest::{hex, sha256_file};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::recipe::{LockInfo, Recipe, RecipeFile};
use crate::run_dir::checkpoints;
use crate::run_dir::checkpoints::{ADAPTER, CHECKPOINTS, Checkpoints};
use crate::run_dir::lock::{MARKER, Marker};
use crate::run_dir::results::Sample;

/// The lock file.
pub(crate) const LOCK: &str = "recipe.lock.toml";
/// A line a step.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// Answers before and after.
pub(crate) const SAMPLES: &str = "samples.json";
/// What the run came to; written last.
pub(crate) const SUMMARY: &str = "summary.json";
/// A page for people.
pub(crate) const REPORT: &str = "report.html";
/// The folder of a model that was trained whole.
pub(crate) const MODEL: &str = "model";
/// Lines of checkpoints that a run at an older one has left.
pub(crate) const FORMER: &str = "former-lines";

const RECORDS: [&str; 5] = [LOCK, METRICS, SAMPLES, SUMMARY, REPORT];
/// Larger files of a result count by their size alone.
const HASHED: u64 = 16 << 20;

/// What lies in a run directory under the names that runs write.
#[derive(Clone, Debug, Default)]
pub(crate) struct Survey {
    /// The run's own, relative to the directory.
    pub own: Vec<PathBuf>,
    /// Somebody else's, with what makes it so.
    pub foreign: Vec<String>,
    /// Whether a run was here: the marker says so, or an older version's lock file.
    pub known: bool,
    /// An older version's run, or one whose marker is gone: the id that its checkpoints bear, if they do.
    pub unmarked: Option<String>,
}

impl Survey {
    /// Looks through `dir` for a run that is to write the results of these names (`adapter`, `model`).
    pub fn of(dir: &Path, marker: &Marker, results: &[&str]) -> Self {
        let marked = !marker.id.is_empty();
        let older = if marked { None } else { older_run(dir) };
        let mut survey = Self {
            known: marked || older.is_some(),
            ..Self::default()
        };
        for name in RECORDS.into_iter().filter(|name| is_there(&dir.join(name))) {
            let own = survey.known && is_record(name, &dir.join(name));
            survey.note(own, PathBuf::from(name));
        }
        for name in [ADAPTER, MODEL] {
            let path = dir.join(name);
            if !is_there(&path) {
                continue;
            }
            let own = match &older {
                Some(result) => name == *result && is_plain_result(name, &path),
                None => marked && is_result(&path, marker),
            };
            // What this run does not write and no run has written is not in its way.
            if own || results.contains(&name) {
                survey.note(own, PathBuf::from(name));
            }
        }
        survey.checkpoints(dir, marker);
        if !survey.known && is_there(&dir.join(FORMER)) {
            survey.foreign.push(format!("{FORMER}/"));
        }
        survey
    }

    fn note(&mut self, own: bool, path: PathBuf) {
        if own {
            self.own.push(path);
        } else {
            self.foreign.push(path.display().to_string());
        }
    }

    fn checkpoints(&mut self, dir: &Path, marker: &Marker) {
        let folder = dir.join(CHECKPOINTS);
        let Ok(kind) = fs::symlink_metadata(&folder) else {
            return;
        };
        if !self.known || !kind.is_dir() {
            self.foreign.push(CHECKPOINTS.to_owned());
            return;
        }
        let marked = !marker.id.is_empty();
        let mut id = marked.then(|| marker.id.clone());
        for path in Checkpoints::new(dir, 1).folders() {
            let run = checkpoints::read_state(&path).ok().map(|state| state.run);
            let own = match run {
                // A damaged one is told by its files alone; resuming says more about it.
                None => true,
                Some(run) if run.is_empty() => !marked || marker.adopted,
                Some(run) => *id.get_or_insert_with(|| run.clone()) == run,
            };
            let name = path.file_name().unwrap_or_default();
            let name = Path::new(CHECKPOINTS).join(name);
            self.note(own && checkpoints::is_only_ours(&path), name);
        }
        if !marked {
            self.unmarked = id;
        }
    }

    /// Whether something of a run is there.
    pub fn has(&self, name: &str) -> bool {
        self.own.iter().any(|own| own == Path::new(name))
    }

    /// The finished adapter or model.
    pub fn result(&self) -> Option<&Path> {
        let all = self.own.iter().map(PathBuf::as_path);
        all.into_iter()
            .find(|own| *own == Path::new(ADAPTER) || *own == Path::new(MODEL))
    }

    /// Refuses what is not the run's own.
    ///
    /// # Errors
    /// All of it at once.
    pub fn refuse_foreign(&self, dir: &Path) -> Result<(), TrainError> {
        if self.foreign.is_empty() {
            return Ok(());
        }
        let whose = match self.known {
            true => "which the run here did not write or not as it is now",
            false => "which no run has written",
        };
        Err(TrainError::Run {
            path: dir.to_owned(),
            reason: format!(
                "it holds {}, {whose}; a run writes under these names and touches nothing that is not its own",
                self.foreign.join(", ")
            ),
            help: "choose another directory (--output DIR), or move them away".into(),
        })
    }
}

/// Whether there is nothing in `dir` but the marker.
pub(crate) fn is_empty(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.into_iter().all(|e| e.file_name() == MARKER)
}

/// The recipe of the run in `dir` and what it stood on, if its lock file is one of ours.
pub(crate) fn locked_recipe(dir: &Path) -> Option<(Recipe, LockInfo)> {
    let file = RecipeFile::read(&dir.join(LOCK)).ok()?;
    let info = file.lock_info().ok().flatten()?;
    Some((file.resolve().ok()?, info))
}

/// The name of the result of an older version's run in `dir`, if there is one.
fn older_run(dir: &Path) -> Option<&'static str> {
    let (recipe, _) = locked_recipe(dir)?;
    Some(result_of(&recipe))
}

/// The folder that a run leaves in the end.
pub(crate) fn result_of(recipe: &Recipe) -> &'static str {
    match recipe.adapter.method.as_str() {
        "full" => MODEL,
        _ => ADAPTER,
    }
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether a file could be a run's: by its form, not by its name.
pub(crate) fn is_record(name: &str, path: &Path) -> bool {
    #[derive(Deserialize)]
    #[allow(dead_code, reason = "what has to be there")]
    struct Summary {
        dir: PathBuf,
        step: usize,
        total_steps: usize,
    }
    const START_OF_LINE: &[u8] = b"{\"kind\":\"";
    if !fs::symlink_metadata(path).is_ok_and(|m| m.is_file()) {
        return false;
    }
    let all = || fs::read(path).unwrap_or_default();
    match name {
        LOCK => {
            toml::from_str::<toml::Table>(&String::from_utf8_lossy(&all())).is_ok_and(|table| {
                let lock = table.get("lock").and_then(toml::Value::as_table);
                lock.is_some_and(|lock| lock.contains_key("enamel"))
            })
        }
        // A full disk may have cut even the first line, and a bit may have changed in it.
        METRICS => beginning(path, 1 << 16).is_some_and(|start| {
            let mut lines = start.split(|b| *b == b'\n');
            START_OF_LINE.starts_with(&start) || lines.any(|line| line.starts_with(START_OF_LINE))
        }),
        SAMPLES => serde_json::from_slice::<Vec<Sample>>(&all()).is_ok(),
        SUMMARY => serde_json::from_slice::<Summary>(&all()).is_ok(),
        REPORT => beginning(path, 4096)
            .is_some_and(|start| String::from_utf8_lossy(&start).contains("<title>Enamel")),
        _ => false,
    }
}

fn beginning(path: &Path, length: usize) -> Option<Vec<u8>> {
    let mut start = Vec::new();
    let file = File::open(path).ok()?;
    file.take(length as u64).read_to_end(&mut start).ok()?;
    Some(start)
}

/// Whether a folder is a result as the marker remembers it.
pub(crate) fn is_result(path: &Path, marker: &Marker) -> bool {
    !marker.results.is_empty() && digest(path).is_ok_and(|digest| marker.results.contains(&digest))
}

/// Whether a folder could be an older version's result.
fn is_plain_result(name: &str, path: &Path) -> bool {
    let folder = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
    let plain = match name {
        MODEL => enamel_model::save::is_only_a_model(path, &[]),
        _ => checkpoints::is_only_an_adapter(path),
    };
    folder && plain
}

/// What a result is remembered by: names and sizes of all files in it, and the content of all but the largest.
///
/// # Errors
/// When the folder cannot be read.
pub(crate) fn digest(dir: &Path) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    // A link to a folder is not the folder that a run has made.
    let kind = fs::symlink_metadata(dir).map_err(TrainError::io(dir, "reading"))?;
    hash.update([u8::from(kind.is_dir())]);
    add(dir, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

fn add(dir: &Path, hash: &mut Sha256) -> Result<(), TrainError> {
    let entries = fs::read_dir(dir).map_err(TrainError::io(dir, "reading"))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let kind = fs::symlink_metadata(&path).map_err(TrainError::io(&path, "reading"))?;
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        if kind.is_dir() {
            hash.update(b"d");
            add(&path, hash)?;
            hash.update(b"u");
        } else if kind.is_file() {
            hash.update(b"f");
            hash.update(kind.len().to_le_bytes());
            if kind.len() <= HASHED {
                let content = sha256_file(&path).map_err(TrainError::io(&path, "reading"))?;
                hash.update(content.as_bytes());
            }
        } else {
            hash.update(b"?");
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn marker(results: &[String]) -> Marker {
        Marker {
            id: "0".repeat(32),
            results: results.to_vec(),
            ..Marker::default()
        }
    }

    #[test]
    fn without_a_marker_everything_is_foreign() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["adapter", "checkpoints", "model"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join(SUMMARY), "{}").unwrap();
        fs::write(dir.path().join("notes.txt"), "").unwrap();
        let survey = Survey::of(dir.path(), &Marker::default(), &[ADAPTER]);
        assert!(!survey.known && survey.own.is_empty());
        // A run that trains an adapter writes no model.
        assert_eq!(survey.foreign, [SUMMARY, ADAPTER, CHECKPOINTS]);
        survey.refuse_foreign(dir.path()).unwrap_err();
    }

    #[test]
    fn a_result_is_known_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = dir.path().join(ADAPTER);
        fs::create_dir(&adapter).unwrap();
        fs::write(adapter.join("README.md"), "as it was").unwrap();
        let marker = marker(&[digest(&adapter).unwrap()]);
        let of = || Survey::of(dir.path(), &marker, &[ADAPTER]);
        assert!(of().result().is_some() && of().foreign.is_empty());
        fs::write(adapter.join("README.md"), "as it is.").unwrap();
        assert_eq!(of().foreign, [ADAPTER]);
        fs::write(adapter.join("README.md"), "as it was").unwrap();
        fs::write(adapter.join("notes.txt"), "").unwrap();
        assert_eq!(of().foreign, [ADAPTER]);
    }

    #[test]
    fn files_are_known_by_their_form() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, text: &str, own: bool| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            assert_eq!(is_record(name, &path), own, "{name}: {text}");
        };
        check(METRICS, "", true);
        check(METRICS, "{\"ki", true);
        check(METRICS, "{\"kind\":\"train\",\"step\":1}\n", true);
        check(METRICS, "{\"loss\": 1}\n", false);
        check(
            SUMMARY,
            "{\"dir\":\"r\",\"step\":1,\"total_steps\":2}",
            true,
        );
        check(SUMMARY, "{\"accuracy\": 0.9}", false);
        check(SAMPLES, "[]", true);
        check(SAMPLES, "[{\"text\": \"\"}]", false);
        check(LOCK, "seed = 1\n[lock]\nenamel = \"0.1.0\"\n", true);
        check(LOCK, "seed = 1\n", false);
        check(REPORT, "<!doctype html><title>Enamel run: x</title>", true);
        check(REPORT, "<title>Thesis</title>", false);
    }
}

//! Whether a checkpoint is what was written.
//!
//! `state.json` says size and SHA-256 of every other file of its folder, and ends in the SHA-256 of all that
//! stands in it before: any bit that changes anywhere is found before a run goes on from it. Where one has
//! changed, the error says which file, and which checkpoint is sound.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use enamel_adapter::exact_json;
use enamel_model::digest::{hex, sha256_file};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::run_dir::checkpoints::{RunState, STATE};

/// What stands between the rest of `state.json` and its hash.
const SEAL: &str = ",\n  \"sha256\": \"";
/// What stands after it.
const END: &str = "\"\n}\n";
/// Characters of a hash.
const HASH: usize = 64;
/// Far more than a state has bytes.
const LARGEST_STATE: u64 = 1 << 24;
const FILES: &str = "files";

/// Size and hash of a file, by its path in the checkpoint, parts of which are joined by `/`.
type Files = BTreeMap<String, Written>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    bytes: u64,
    sha256: String,
}

/// The text of `state.json` for `state`, in a folder that holds the checkpoint's other files.
///
/// # Errors
/// When one of them cannot be read back.
pub(crate) fn sealed(state: &RunState, dir: &Path) -> Result<Vec<u8>, TrainError> {
    let failed =
        |e: serde_json::Error| TrainError::Framework(format!("writing the run's state: {e}"));
    let mut names = Vec::new();
    list(dir, "", &mut names)?;
    names.retain(|name| name != STATE);
    let files: Files = names
        .into_par_iter()
        .map(|name| Ok((name.clone(), written(&dir.join(&name))?)))
        .collect::<Result<_, TrainError>>()?;
    let mut json = serde_json::to_value(state).map_err(failed)?;
    if let Some(map) = json.as_object_mut() {
        map.insert(FILES.into(), serde_json::to_value(files).map_err(failed)?);
    }
    let mut text = serde_json::to_string_pretty(&json).map_err(failed)?;
    text.truncate(text.trim_end_matches('}').trim_end().len());
    let hash = sha256(text.as_bytes());
    text.push_str(&format!("{SEAL}{hash}{END}"));
    Ok(text.into_bytes())
}

/// Paths of all files under `dir`, each after `prefix`.
fn list(dir: &Path, prefix: &str, names: &mut Vec<String>) -> Result<(), TrainError> {
    let entries = fs::read_dir(dir).map_err(TrainError::io(dir, "reading the folder"))?;
    for entry in entries {
        let entry = entry.map_err(TrainError::io(dir, "reading the folder"))?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => list(&entry.path(), &format!("{name}/"), names)?,
            false => names.push(name),
        }
    }
    Ok(())
}

fn written(path: &Path) -> Result<Written, TrainError> {
    let reading = |error| TrainError::io(path, "reading back what was written")(error);
    Ok(Written {
        bytes: fs::metadata(path).map_err(reading)?.len(),
        sha256: sha256_file(path).map_err(reading)?,
    })
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The state of the checkpoint in `dir`, as it was written; the files beside it are not looked at.
///
/// # Errors
/// When the file is missing, not one of ours, or not as it was written.
pub(crate) fn read_state(dir: &Path) -> Result<RunState, TrainError> {
    match read(dir) {
        Ok((state, _)) => Ok(state),
        Err(reason) => Err(TrainError::Run {
            path: dir.join(STATE),
            reason,
            help: "resume from another checkpoint (--resume DIR), or start again without --resume"
                .into(),
        }),
    }
}

/// The state and, unless an older version wrote it, what the other files have to be.
fn read(dir: &Path) -> Result<(RunState, Option<Files>), String> {
    let mut bytes = Vec::new();
    File::open(dir.join(STATE))
        .and_then(|file| file.take(LARGEST_STATE).read_to_end(&mut bytes))
        .map_err(|e| format!("{STATE} cannot be read: {e}"))?;
    let damaged = |what: &str| format!("{STATE} is not as it was written: {what}");
    let text = std::str::from_utf8(&bytes).map_err(|e| damaged(&format!("it is no text ({e})")))?;
    let mut json =
        exact_json(text).map_err(|e| damaged(&format!("it is not a run's state ({e})")))?;
    let map = json
        .as_object_mut()
        .ok_or_else(|| damaged("it is not a run's state"))?;
    let files = map.shift_remove(FILES);
    let hash = map.shift_remove("sha256");
    let files = match (files, seal(text)) {
        (Some(files), Some((body, hash))) => {
            if sha256(body.as_bytes()) != hash {
                return Err(damaged("its SHA-256 is another than the one at its end"));
            }
            let files: Files =
                serde_json::from_value(files).map_err(|e| damaged(&e.to_string()))?;
            if let Some(name) = files.keys().find(|name| !is_inside(name)) {
                return Err(damaged(&format!("\"{name}\" is no file of a checkpoint")));
            }
            Some(files)
        }
        (None, None) if hash.is_none() => None,
        _ => return Err(damaged("its hash is not where it was written")),
    };
    let state: RunState = serde_json::from_value(json)
        .map_err(|e| damaged(&format!("it is not a run's state ({e})")))?;
    Ok((state, files))
}

/// What is hashed of the text and the hash that it ends in; none in a state of an older version.
fn seal(text: &str) -> Option<(&str, &str)> {
    let sealed = text.strip_suffix(END)?;
    let (body, hash) = sealed.split_at_checked(sealed.len().checked_sub(HASH)?)?;
    Some((body.strip_suffix(SEAL)?, hash))
}

fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    !name.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// A checkpoint in which nothing is wrong.
#[derive(Debug)]
pub(crate) struct Sound {
    /// Where the run stands.
    pub state: RunState,
    /// Whether an older version wrote it, which noted no hashes.
    pub unsealed: bool,
}

/// Reads the checkpoint in `dir` and compares all it holds with what was written.
///
/// # Errors
/// All that is wrong with it.
pub(crate) fn examine(dir: &Path) -> Result<Sound, Vec<String>> {
    let (state, files) = read(dir).map_err(|reason| vec![reason])?;
    let mut wrong = implausible(dir, &state);
    let unsealed = files.is_none();
    let files: Vec<_> = files.unwrap_or_default().into_iter().collect();
    let changed: Vec<String> = files
        .into_par_iter()
        .filter_map(|(name, then)| {
            changed(&dir.join(&name), &then).map(|what| format!("{name} {what}"))
        })
        .collect();
    wrong.extend(changed);
    match wrong.is_empty() {
        true => Ok(Sound { state, unsealed }),
        false => Err(wrong),
    }
}

/// How a file differs from what was written.
fn changed(path: &Path, then: &Written) -> Option<String> {
    let found = match fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Some("is missing".into()),
        Err(e) => return Some(format!("cannot be read: {e}")),
        Ok(found) => found,
    };
    // What is no file may have no end.
    if !found.is_file() {
        return Some("is not a file".into());
    }
    if found.len() != then.bytes {
        return Some(format!(
            "has {} bytes, and {} were written",
            found.len(),
            then.bytes
        ));
    }
    match sha256_file(path) {
        Err(e) => Some(format!("cannot be read: {e}")),
        Ok(now) if now == then.sha256 => None,
        Ok(now) => Some(format!(
            "is not as it was written: its SHA-256 is {now}, and {STATE} says {}",
            then.sha256
        )),
    }
}

/// What cannot be in a state that a run wrote.
fn implausible(dir: &Path, state: &RunState) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut check = |fine: bool, what: String| {
        if !fine {
            wrong.push(format!("{STATE} says what cannot be: {what}"));
        }
    };
    let RunState {
        step, total_steps, ..
    } = *state;
    check(
        (1..=total_steps).contains(&step),
        format!("step {step} of {total_steps}"),
    );
    let name = dir
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let named = name.as_deref().and_then(|name| name.strip_prefix("step-"));
    if let Some(Ok(number)) = named.map(str::parse::<usize>) {
        check(
            number == step,
            format!("step {step} in a folder of step {number}"),
        );
    }
    if let Some(best) = &state.best {
        check(
            best.step <= step,
            format!("the best step is {}, after step {step}", best.step),
        );
    }
    check(
        state.trained_tokens <= state.tokens,
        format!(
            "{} labels in the loss among {} tokens",
            state.trained_tokens, state.tokens
        ),
    );
    let numbers = [
        ("best.loss", state.best.as_ref().map(|best| best.loss)),
        ("patience_loss", state.patience_loss),
        ("valid_loss", state.valid_loss),
        ("train_loss", state.train_loss),
        ("first_valid_loss", state.first_valid_loss),
        ("seconds", Some(state.seconds)),
    ];
    for (name, value) in numbers {
        if let Some(value) = value {
            check(value.is_finite(), format!("{name} is {value}"));
        }
    }
    check(state.seconds >= 0.0, format!("{} seconds", state.seconds));
    wrong
}

/// A run's checkpoints, as they are offered where one of them is damaged.
pub(crate) struct Offered<'a> {
    /// The run directory.
    pub run: &'a Path,
    /// Its complete checkpoints, oldest first.
    pub list: &'a [(usize, PathBuf)],
    /// Whose run they have to be of.
    pub fingerprint: &'a str,
}

/// The checkpoint in `dir`, if it is what was written.
///
/// # Errors
/// All that is wrong with it, and how to go on from the newest of the others that is sound.
pub(crate) fn sound(dir: &Path, others: &Offered<'_>) -> Result<Sound, TrainError> {
    let wrong = match examine(dir) {
        Ok(sound) => return Ok(sound),
        Err(wrong) => wrong,
    };
    let mut reason = "this checkpoint is damaged".to_owned();
    match wrong.as_slice() {
        [only] => reason.push_str(&format!(": {only}")),
        all => all
            .iter()
            .for_each(|what| reason.push_str(&format!("\n  {what}"))),
    }
    let same = |a: &Path, b: &Path| match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    };
    for (step, other) in others.list.iter().rev() {
        if same(other, dir) {
            continue;
        }
        match examine(other) {
            Ok(found) if found.state.fingerprint == others.fingerprint => {
                return Err(TrainError::Run {
                    path: dir.to_owned(),
                    reason,
                    help: format!(
                        "the checkpoint of step {step} is sound; go on from it with\n    {}",
                        command(others.run, other)
                    ),
                });
            }
            // Of another run: of no use here.
            Ok(_) => {}
            Err(wrong) => {
                reason.push_str(&format!(
                    "\n  the checkpoint of step {step} is damaged too: {}",
                    wrong.join("; ")
                ));
            }
        }
    }
    Err(TrainError::Run {
        path: dir.to_owned(),
        reason,
        help: "no other checkpoint of this run is sound; put the damaged files back from a copy, or start \
               again (--overwrite)"
            .into(),
    })
}

/// The command that goes on from `checkpoint`, whatever the recipe was that the run began with.
fn command(run: &Path, checkpoint: &Path) -> String {
    format!(
        "enamel train {} --output {} --resume {}",
        quoted(&run.join(crate::run_dir::LOCK)),
        quoted(run),
        quoted(checkpoint)
    )
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    crate::quoted(&path.display().to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::run_dir::checkpoints::{Best, Window};

    /// A small checkpoint in `dir`, not through the optimizer: its files are any.
    fn checkpoint(dir: &Path, step: usize) -> (PathBuf, RunState) {
        let path = dir.join(format!("step-{step:06}"));
        fs::create_dir_all(path.join("adapter/initial_adapter")).unwrap();
        for name in [
            "optimizer.bpk",
            "adapter/weights",
            "adapter/initial_adapter/weights",
        ] {
            fs::write(path.join(name), format!("{name} {step}")).unwrap();
        }
        let state = RunState {
            step,
            total_steps: 9,
            best: Some(Best {
                metrics: Default::default(),
                step: 1,
                loss: 7.366_080_350_654_069_5,
            }),
            window: Window {
                loss: 2.000_000_000_000_000_4,
                ..Window::default()
            },
            seconds: 1e-300,
            fingerprint: "f".into(),
            ..RunState::default()
        };
        fs::write(path.join(STATE), sealed(&state, &path).unwrap()).unwrap();
        (path, state)
    }

    #[test]
    fn every_flipped_bit_and_every_missing_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (path, state) = checkpoint(dir.path(), 3);
        assert_eq!(examine(&path).unwrap().state, state);
        let mut names = Vec::new();
        list(&path, "", &mut names).unwrap();
        assert_eq!(names.len(), 4);
        for name in names {
            let file = path.join(&name);
            let whole = fs::read(&file).unwrap();
            let is_found = |bytes: &[u8], what: &str| {
                // Writing over a file waits for the disk on some systems.
                fs::remove_file(&file).unwrap();
                fs::write(&file, bytes).unwrap();
                // The state is read first, and alone it is quickly read.
                let wrong = match name == STATE {
                    true => vec![read(&path).map(|_| ()).expect_err(what)],
                    false => examine(&path).map(|_| ()).expect_err(what),
                };
                assert!(
                    wrong.iter().any(|w| w.starts_with(&name)),
                    "{what}: {wrong:?}"
                );
            };
            for bit in 0..8 * whole.len() {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                is_found(&flipped, &format!("{name}: bit {bit}"));
            }
            is_found(&whole[1..], &format!("{name}: cut"));
            is_found(&[&whole[..], b" "].concat(), &format!("{name}: longer"));
            fs::remove_file(&file).unwrap();
            let wrong = examine(&path).map(|_| ()).expect_err("it is missing");
            assert!(wrong.iter().any(|w| w.contains(&name)), "{wrong:?}");
            fs::write(&file, &whole).unwrap();
        }
        // What else lies there is nobody's business.
        fs::write(path.join(".DS_Store"), "x").unwrap();
        assert_eq!(examine(&path).unwrap().state, state);
    }

    #[test]
    fn the_newest_sound_one_of_the_same_run_is_offered() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<_> = (2..=5)
            .map(|step| (step, checkpoint(dir.path(), step).0))
            .collect();
        for (step, path) in &all {
            if *step >= 4 {
                fs::write(path.join("optimizer.bpk"), "other").unwrap();
            }
        }
        let run = dir.path().join("a run's");
        let offered = |fingerprint| Offered {
            run: &run,
            list: &all,
            fingerprint,
        };
        let newest = &all[3].1;
        let error = sound(newest, &offered("f")).unwrap_err().to_string();
        let command = format!(
            "--output '{}' --resume {}",
            dir.path().join("a run'\\''s").display(),
            all[1].1.display()
        );
        for part in [
            "step 4 is damaged too: optimizer.bpk has 5 bytes",
            "step 3 is sound",
            &command,
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error = sound(newest, &offered("g")).unwrap_err().to_string();
        assert!(
            error.contains("no other checkpoint of this run is sound"),
            "{error}"
        );
        assert!(sound(&all[0].1, &offered("f")).is_ok());
    }

    #[test]
    fn a_state_cannot_name_files_elsewhere() {
        for (name, inside) in [
            ("a", true),
            ("a/b", true),
            ("", false),
            ("/a", false),
            ("../a", false),
            ("a/../../b", false),
        ] {
            assert_eq!(is_inside(name), inside, "{name}");
        }
    }
}

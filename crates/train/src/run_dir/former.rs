//! What a run directory held before: an old run that a new one replaces, and lines of checkpoints that a run at
//! an older checkpoint has left.
//!
//! An old run is moved aside within its directory, and put back unless the new one comes to a checkpoint or a
//! finished adapter. Three names of a folder say how far that has come, so that whoever holds the lock after a
//! kill can end it: `.replacing-ID` is not complete, and its content belongs back; `.replaced-ID` is complete,
//! and the new run may have begun to write; `.removing-ID` goes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::TrainError;
use crate::files::SAVING;
use crate::files::WRITING;
use crate::files::sync_dir;
use crate::files::sync_tree;
use crate::run_dir::belongings::MODEL;
use crate::run_dir::belongings::{
    FORMER, LOCK, METRICS, REPORT, SAMPLES, SUMMARY, is_record, is_result,
};
use crate::run_dir::checkpoints::{ADAPTER, CHECKPOINTS, Checkpoints, step_of};
use crate::run_dir::lock::Marker;

/// An old run out of the way.
#[derive(Debug)]
pub(crate) struct Replaced {
    dir: PathBuf,
    id: String,
}

impl Replaced {
    /// Moves what is named in `own` aside.
    ///
    /// # Errors
    /// When the disk refuses; then all is where it was.
    pub fn begin(dir: &Path, id: &str, own: &[PathBuf]) -> Result<Self, TrainError> {
        let replaced = Self {
            dir: dir.to_owned(),
            id: id.to_owned(),
        };
        let aside = replaced.folder("replacing");
        make(&aside)?;
        for path in own {
            if let Err(error) = move_to(&dir.join(path), &aside.join(path)) {
                move_back(&aside, dir)?;
                return Err(error);
            }
        }
        sync_dir(&aside);
        replaced.rename("replacing", "replaced")?;
        Ok(replaced)
    }

    fn folder(&self, state: &str) -> PathBuf {
        self.dir.join(format!(".{state}-{}", self.id))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), TrainError> {
        let (from, to) = (self.folder(from), self.folder(to));
        fs::rename(&from, to).map_err(TrainError::io(&from, "renaming"))?;
        sync_dir(&self.dir);
        Ok(())
    }

    /// Removes the old run. What cannot be removed now is removed by the next run.
    pub fn remove(self) {
        if self.rename("replaced", "removing").is_ok() {
            let _ = fs::remove_dir_all(self.folder("removing"));
        }
    }

    /// Removes what the new run has written so far and puts the old one back.
    ///
    /// # Errors
    /// When the disk refuses, or something foreign is in the way: what is not back yet stays aside.
    pub fn put_back(self) -> Result<(), TrainError> {
        for name in [LOCK, METRICS, SAMPLES, SUMMARY, REPORT] {
            let path = self.dir.join(name);
            if is_record(name, &path) {
                fs::remove_file(&path).map_err(TrainError::io(&path, "removing"))?;
            }
        }
        sweep(&self.dir, &self.id);
        // It may hold something of the user's.
        let _ = fs::remove_dir(self.dir.join(CHECKPOINTS));
        self.rename("replaced", "replacing")?;
        move_back(&self.folder("replacing"), &self.dir)
    }
}

/// Ends what a killed run has left half done: removes its temporary files, and puts an old run back or removes
/// it. A sentence about that, if it was one.
///
/// # Errors
/// When the disk refuses, or something foreign is in the way.
pub(crate) fn recover(dir: &Path, marker: &Marker) -> Result<Option<String>, TrainError> {
    let replaced = Replaced {
        dir: dir.to_owned(),
        id: marker.id.clone(),
    };
    sweep(dir, &marker.id);
    let removing = replaced.folder("removing");
    if removing.is_dir() {
        fs::remove_dir_all(&removing).map_err(TrainError::io(&removing, "removing"))?;
    }
    let back = "a run that was to replace the one here ended before its first checkpoint; the old one is back";
    if replaced.folder("replacing").is_dir() {
        move_back(&replaced.folder("replacing"), dir)?;
        return Ok(Some(back.to_owned()));
    }
    if !replaced.folder("replaced").is_dir() {
        return Ok(None);
    }
    let finished = [ADAPTER, MODEL]
        .iter()
        .any(|name| is_result(&dir.join(name), marker));
    if finished || Checkpoints::new(dir, 1).latest().is_some() {
        replaced.remove();
        return Ok(None);
    }
    replaced.put_back()?;
    Ok(Some(back.to_owned()))
}

/// Removes what killed runs called `id` left half-written.
fn sweep(dir: &Path, id: &str) {
    let prefixes = [SAVING, WRITING, crate::optimizer::PAGES].map(|kind| format!("{kind}{id}-"));
    for dir in [dir.to_owned(), dir.join(CHECKPOINTS)] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if !prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            // What stays costs disk space and nothing else.
            let _ = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => fs::remove_dir_all(entry.path()),
                false => fs::remove_file(entry.path()),
            };
        }
    }
}

/// Moves what a run at the checkpoint after `step` leaves behind, and copies what both have, into a folder of its
/// own: `former-lines/000/`, which is laid out as a run directory.
///
/// # Errors
/// When the disk refuses. What has been moved by then is there.
pub(crate) fn set_aside_line(
    dir: &Path,
    line: usize,
    step: usize,
    own: &[PathBuf],
) -> Result<PathBuf, TrainError> {
    let all = dir.join(FORMER);
    if !all.is_dir() {
        make(&all)?;
    }
    let mut free = (line..).map(|number| all.join(format!("{number:03}")));
    let target = free.find(|path| fs::symlink_metadata(path).is_err());
    let target = target.unwrap_or_else(|| all.join("last"));
    make(&target)?;
    for path in own {
        let (from, to) = (dir.join(path), target.join(path));
        if [LOCK, METRICS, SAMPLES]
            .iter()
            .any(|name| path == Path::new(name))
        {
            fs::copy(&from, &to).map_err(TrainError::io(&from, "copying"))?;
            continue;
        }
        let of_both = path
            .file_name()
            .and_then(step_of)
            .is_some_and(|its| its <= step);
        if !of_both {
            move_to(&from, &to)?;
        }
    }
    sync_tree(&target);
    sync_dir(&all);
    sync_dir(dir);
    Ok(target)
}

fn make(dir: &Path) -> Result<(), TrainError> {
    fs::create_dir(dir).map_err(TrainError::io(dir, "creating the folder"))
}

/// Renames, never onto something.
fn move_to(from: &Path, to: &Path) -> Result<(), TrainError> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(TrainError::Run {
            path: to.to_owned(),
            reason: format!("it is in the way of {}", from.display()),
            help: "move it away and call again".into(),
        });
    }
    if let Some(parent) = to.parent()
        && !parent.is_dir()
    {
        make(parent)?;
    }
    fs::rename(from, to).map_err(TrainError::io(from, "moving it aside"))
}

/// Moves everything in `aside` to where it was, and removes the folder.
fn move_back(aside: &Path, dir: &Path) -> Result<(), TrainError> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>, TrainError> {
        let entries = fs::read_dir(dir).map_err(TrainError::io(dir, "reading"))?;
        Ok(entries.flatten().map(|e| e.path()).collect())
    };
    for path in list(aside)? {
        let name = path.file_name().unwrap_or_default().to_owned();
        if name != CHECKPOINTS {
            move_to(&path, &dir.join(name))?;
            continue;
        }
        for step in list(&path)? {
            let to = dir.join(CHECKPOINTS);
            move_to(&step, &to.join(step.file_name().unwrap_or_default()))?;
        }
        fs::remove_dir(&path).map_err(TrainError::io(&path, "removing"))?;
    }
    fs::remove_dir(aside).map_err(TrainError::io(aside, "removing"))?;
    sync_dir(dir);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const ID: &str = "00000000000000000000000000000000";

    /// A directory with a run of one checkpoint and metrics, and what is its own.
    fn old() -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let step = dir.path().join("checkpoints/step-000005");
        fs::create_dir_all(&step).unwrap();
        fs::write(step.join("state.json"), "{}").unwrap();
        fs::write(dir.path().join("checkpoints/mine.txt"), "mine").unwrap();
        fs::write(dir.path().join(METRICS), "{\"kind\":\"old").unwrap();
        let own = ["checkpoints/step-000005", METRICS].map(PathBuf::from);
        (dir, own.to_vec())
    }

    fn marker() -> Marker {
        Marker {
            id: ID.into(),
            ..Marker::default()
        }
    }

    fn is_old(dir: &Path) -> bool {
        let text = fs::read_to_string(dir.join(METRICS)).unwrap_or_default();
        let step = dir.join("checkpoints/step-000005/state.json").is_file();
        assert!(dir.join("checkpoints/mine.txt").is_file());
        let hidden = fs::read_dir(dir).unwrap().flatten();
        let hidden = hidden.filter(|e| e.file_name().to_string_lossy().starts_with('.'));
        step && text.ends_with("old") && hidden.count() == 0
    }

    #[test]
    fn an_old_run_is_put_back_whenever_the_new_one_ends_too_early() {
        for killed in [false, true] {
            let (dir, own) = old();
            let replaced = Replaced::begin(dir.path(), ID, &own).unwrap();
            assert!(!dir.path().join(METRICS).exists());
            fs::write(dir.path().join(METRICS), "{\"kind\":\"new").unwrap();
            fs::create_dir(dir.path().join(format!("checkpoints/.saving-{ID}-abc"))).unwrap();
            if killed {
                let said = recover(dir.path(), &marker()).unwrap().unwrap();
                assert!(said.contains("is back"), "{said}");
            } else {
                replaced.put_back().unwrap();
            }
            assert!(is_old(dir.path()), "killed: {killed}");
        }
    }

    #[test]
    fn an_old_run_that_is_half_aside_comes_back() {
        let (dir, own) = old();
        let whole = [own.clone(), vec!["not there".into()]].concat();
        Replaced::begin(dir.path(), ID, &whole).unwrap_err();
        assert!(is_old(dir.path()));
        // Killed before the first thing was moved, or after all were.
        let aside = dir.path().join(format!(".replacing-{ID}"));
        fs::create_dir(&aside).unwrap();
        recover(dir.path(), &marker()).unwrap();
        assert!(is_old(dir.path()));
        let replaced = Replaced::begin(dir.path(), ID, &own).unwrap();
        replaced.rename("replaced", "replacing").unwrap();
        recover(dir.path(), &marker()).unwrap();
        assert!(is_old(dir.path()));
    }

    #[test]
    fn an_old_run_goes_once_the_new_one_has_a_checkpoint() {
        for killed in [false, true] {
            let (dir, own) = old();
            let replaced = Replaced::begin(dir.path(), ID, &own).unwrap();
            let step = dir.path().join("checkpoints/step-000001");
            fs::create_dir_all(&step).unwrap();
            fs::write(step.join("state.json"), "{}").unwrap();
            match killed {
                true => assert_eq!(recover(dir.path(), &marker()).unwrap(), None),
                false => replaced.remove(),
            }
            assert!(step.is_dir() && !is_old(dir.path()));
            assert!(!dir.path().join(format!(".replaced-{ID}")).exists());
        }
    }

    #[test]
    fn only_what_bears_the_id_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(CHECKPOINTS)).unwrap();
        let path = |name: &str| dir.path().join(name);
        let mine = [
            ".saving-mine",
            ".writing-thesis.txt",
            "checkpoints/.saving-abcdef",
        ];
        for name in mine {
            fs::write(path(name), "").unwrap();
        }
        for name in [".writing-", ".optimizer-", "checkpoints/.writing-"] {
            fs::write(path(&format!("{name}{ID}-abc")), "").unwrap();
        }
        fs::create_dir_all(path(&format!("checkpoints/.saving-{ID}-abc/adapter"))).unwrap();
        recover(dir.path(), &marker()).unwrap();
        assert!(mine.iter().all(|name| path(name).is_file()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        assert_eq!(fs::read_dir(path(CHECKPOINTS)).unwrap().count(), 1);
    }

    #[test]
    fn a_line_that_is_left_is_kept_and_what_both_have_stays() {
        let (dir, mut own) = old();
        let step = dir.path().join("checkpoints/step-000010");
        fs::create_dir_all(&step).unwrap();
        own.push("checkpoints/step-000010".into());
        let kept = set_aside_line(dir.path(), 0, 5, &own).unwrap();
        assert!(kept.ends_with("former-lines/000"));
        assert!(!step.exists() && kept.join("checkpoints/step-000010").is_dir());
        assert!(dir.path().join("checkpoints/step-000005").is_dir());
        for dir in [dir.path(), kept.as_path()] {
            assert_eq!(fs::read(dir.join(METRICS)).unwrap(), b"{\"kind\":\"old");
        }
        let next = set_aside_line(dir.path(), 0, 5, &own[1..2]).unwrap();
        assert!(next.ends_with("former-lines/001"));
    }
}

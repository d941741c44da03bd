//! A run directory in the hands of a run: what writes there as long as the run lives.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::TrainError;
use crate::files::staging;
use crate::files::sync_dir;
use crate::files::sync_tree;
use crate::files::write_atomic;
use crate::run_dir::belongings;
use crate::run_dir::former::Replaced;
use crate::run_dir::lock::RunLock;

/// What is shared with the training loop.
#[derive(Debug)]
pub(crate) struct Hold {
    dir: PathBuf,
    lock: RunLock,
    replaced: Mutex<Option<Replaced>>,
    /// Held by whoever changes the directory.
    changing: Mutex<()>,
}

impl Hold {
    /// What holds `dir` under its lock.
    pub fn new(dir: &Path, lock: RunLock) -> Self {
        Self {
            dir: dir.to_owned(),
            lock,
            replaced: Mutex::default(),
            changing: Mutex::default(),
        }
    }

    /// The lock, and what its file says.
    pub fn lock(&self) -> &RunLock {
        &self.lock
    }

    /// An old run is out of the way until [`Self::settle`] or [`Self::put_back`].
    pub fn replaces(&self, old: Replaced) {
        let replaced = self.replaced.lock();
        *replaced.unwrap_or_else(PoisonError::into_inner) = Some(old);
    }

    /// Fails when the directory has been removed or moved.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), TrainError> {
        self.lock.check()
    }

    /// The new run has something to show, so the old one goes.
    pub fn settle(&self) {
        let replaced = self.replaced.lock();
        if let Some(old) = replaced.unwrap_or_else(PoisonError::into_inner).take() {
            old.remove();
        }
    }

    /// Held while the directory is changed in more than one step: a signal then leaves that to the next run.
    pub fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends what can be ended at once when the program leaves; nothing changes the directory after it.
    pub fn abandon(&self) {
        if let Ok(changing) = self.changing.try_lock() {
            let _ = self.put_back();
            self.lock.release();
            std::mem::forget(changing);
        }
    }

    /// Removes what the new run has written and puts the old one back, if there is one aside.
    pub fn put_back(&self) -> Option<Result<(), TrainError>> {
        let replaced = self.replaced.lock();
        let old = replaced.unwrap_or_else(PoisonError::into_inner).take()?;
        // In a directory that is not there any more there is nothing to put back.
        Some(self.check().and_then(|()| old.put_back()))
    }

    /// Writes a finished adapter or model into a new folder and puts that in place as a whole.
    ///
    /// # Errors
    /// What `write` fails with; something foreign in its place; a disk that refuses.
    pub fn place(
        &self,
        name: &str,
        write: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<PathBuf, TrainError> {
        let _changing = self.changing();
        self.check()?;
        let marker = self.lock.marker();
        let staging = staging(&self.dir, &marker.id)?;
        let made = staging.path().join(name);
        write(&made)?;
        sync_tree(&made);
        let digest = belongings::digest(&made)?;
        let target = self.dir.join(name);
        let old = fs::symlink_metadata(&target).is_ok();
        if old && !belongings::is_result(&target, &marker) {
            return Err(in_the_way(&target));
        }
        // Known before it is there: killed in between, the next run finds one of both.
        self.lock.update(|marker| {
            marker.results.retain(|known| *known != digest);
            marker.results.push(digest.clone());
            let excess = marker.results.len().saturating_sub(6);
            marker.results.drain(..excess);
        })?;
        let before = staging.path().join("old");
        if old {
            fs::rename(&target, &before).map_err(TrainError::io(&target, "replacing it"))?;
        }
        if let Err(error) = fs::rename(&made, &target) {
            if old {
                let _ = fs::rename(&before, &target);
            }
            return Err(TrainError::io(&target, "renaming it into place")(error));
        }
        sync_dir(&self.dir);
        self.settle();
        self.lock.update(|marker| marker.results = vec![digest])?;
        Ok(target)
    }

    /// Writes a file of the run whole or not at all.
    ///
    /// # Errors
    /// When the disk refuses, or the directory has gone.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
        let _changing = self.changing();
        self.check()?;
        write_atomic(&self.dir.join(name), &self.id(), bytes)
    }

    /// The id of the directory's runs.
    pub fn id(&self) -> String {
        self.lock.marker().id
    }
}

fn in_the_way(path: &Path) -> TrainError {
    TrainError::Run {
        path: path.to_owned(),
        reason: "something that this run did not write is in the place of its result".into(),
        help: "move it away, and go on with --resume".into(),
    }
}

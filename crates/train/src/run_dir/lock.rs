//! `run.lock`: whose a run directory is, and who is at work in it.
//!
//! The file is marker and lock in one. Its id is the only right to replace or remove anything in the
//! directory. It is locked (flock) while a run lives, so the system lets go of it when the run dies, however
//! that happens, also on another machine that shares the directory over NFS. Where a file system has no locks,
//! the owner that the file names decides: one that lives here, or anywhere else, keeps others out.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use enamel_model::digest::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::text::duration_text;

/// Name of the file.
pub(crate) const MARKER: &str = "run.lock";
/// Bytes of one of the file's two lines, which are written in turn: a write that a full disk or the end of the
/// current cuts short leaves the other.
const SIZE: usize = 1024;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marker {
    /// Names the runs of this directory; empty before one has written anything.
    #[serde(rename = "enamel_run")]
    pub id: String,
    /// Number of the line of checkpoints that is gone on with; a run that starts at an older one begins another.
    #[serde(default)]
    pub line: usize,
    /// Whether an older version began the run, whose checkpoints bear no id.
    #[serde(default)]
    pub adopted: bool,
    /// Digests of the finished adapter or model; while it is replaced, of both.
    #[serde(default)]
    pub results: Vec<String>,
    /// Who is at work; nobody after a run has ended by itself.
    #[serde(default)]
    pub owner: Option<Owner>,
    /// Counts the writes: of the two lines the later one counts.
    #[serde(skip)]
    pub written: usize,
}

/// A line of the file, which begins and ends with the number of its write: one that was cut short has two.
#[derive(Serialize, Deserialize)]
struct Line {
    write: usize,
    #[serde(flatten)]
    marker: Marker,
    written: usize,
}

/// A process at work in a run directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    pid: u32,
    host: String,
    /// Unix seconds.
    started: u64,
}

impl Owner {
    fn this() -> Self {
        let host = sysinfo::System::host_name().unwrap_or_default();
        Self {
            pid: std::process::id(),
            // The file has a fixed size; no host needs more of its name to be found.
            host: host
                .chars()
                .filter(char::is_ascii_graphic)
                .take(64)
                .collect(),
            started: now(),
        }
    }

    fn describe(&self) -> String {
        let age = now().saturating_sub(self.started);
        let host = self.host.escape_debug();
        let started = duration_text(age as f64);
        format!("process {} on {host}, started {started} ago", self.pid)
    }

    /// Whether it may still be at work, as far as can be told from here.
    fn may_live(&self, here: &Self) -> bool {
        let itself = self.host == here.host && self.pid == here.pid;
        !itself && self.lives(here)
    }

    /// Whether it is not known to be dead.
    fn lives(&self, here: &Self) -> bool {
        self.host != here.host || process_exists(self.pid)
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(unix)]
fn process_exists(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else {
        return false;
    };
    // SAFETY: signal 0 asks whether the process is there and sends nothing.
    let sent = unsafe { libc::kill(pid, 0) };
    sent == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

#[cfg(not(unix))]
fn process_exists(_: u32) -> bool {
    true
}

/// A held run directory. Dropped, it lets go, and leaves no file or folder behind that it has made for nothing.
#[derive(Debug)]
pub(crate) struct RunLock {
    dir: PathBuf,
    file: File,
    marker: Mutex<Marker>,
    /// The uppermost folder that was made to hold it.
    made: Option<PathBuf>,
    /// Whether there was an empty file of the name before.
    was_empty: bool,
    /// What a person has to know about the lock.
    pub note: Option<String>,
}

impl RunLock {
    /// Takes the directory, which is made if there is none. Nothing else is written.
    ///
    /// # Errors
    /// A run that is at work there, with its process; a `run.lock` that no run wrote; a disk that refuses.
    pub fn take(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join(MARKER);
        let this = Owner::this();
        let (mut made, mut owner) = (None, None);
        // Another run may remove what it has made while this one opens it.
        for _ in 0..100 {
            if let Some(top) = make_folders(dir)? {
                made.get_or_insert(top);
            }
            let (file, is_new) = match open(&path) {
                Ok(opened) => opened,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(TrainError::io(&path, "opening")(error)),
            };
            let locked = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => {
                    owner = read(&file, &path).ok().and_then(|marker| marker.owner);
                    if owner.as_ref().is_some_and(|owner| owner.lives(&this)) {
                        return Err(at_work(dir, owner.as_ref(), LET_IT_END));
                    }
                    // It has just taken the lock and says next who it is, or is just letting go.
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(TryLockError::Error(_)) => false,
            };
            if !is_at(&file, &path) {
                continue;
            }
            let mut marker = read(&file, &path)?;
            let note = match (locked, &marker.owner) {
                (true, _) => None,
                (false, Some(owner)) if owner.may_live(&this) => {
                    return Err(at_work(dir, Some(owner), NO_LOCKS));
                }
                (false, _) => Some(
                    "this file system has no locks: nothing but run.lock's text keeps a second run out".to_owned(),
                ),
            };
            marker.owner = Some(this.clone());
            marker.written += 1;
            let empty = file.metadata().is_ok_and(|m| m.len() == 0);
            let lock = Self {
                dir: dir.to_owned(),
                file,
                marker: Mutex::new(marker.clone()),
                made,
                was_empty: empty && !is_new,
                note,
            };
            lock.write(&marker)?;
            return Ok(lock);
        }
        Err(at_work(dir, owner.as_ref(), LET_IT_END))
    }

    /// What the file says.
    pub fn marker(&self) -> Marker {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, Marker> {
        self.marker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the file says.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn update(&self, change: impl FnOnce(&mut Marker)) -> Result<(), TrainError> {
        let mut marker = self.locked();
        let mut next = marker.clone();
        change(&mut next);
        next.written += 1;
        self.write(&next)?;
        *marker = next;
        Ok(())
    }

    /// Fails when the directory is no longer the one that was taken.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), TrainError> {
        if is_at(&self.file, &self.dir.join(MARKER)) {
            return Ok(());
        }
        Err(TrainError::Run {
            path: self.dir.clone(),
            reason:
                "the run directory was removed, moved or replaced while the run was at work in it"
                    .into(),
            help: "leave the directory alone while a run goes on; what was saved went with it"
                .into(),
        })
    }

    fn write(&self, marker: &Marker) -> Result<(), TrainError> {
        let path = self.dir.join(MARKER);
        let line = Line {
            write: marker.written,
            marker: marker.clone(),
            written: marker.written,
        };
        let json = serde_json::to_string(&line)
            .map_err(|e| TrainError::Framework(format!("writing {}: {e}", path.display())))?;
        let text = format!("{json:<width$}\n", width = SIZE - 1);
        let mut file = &self.file;
        let odd = marker.written % 2 == 1;
        file.seek(SeekFrom::Start(if odd { 0 } else { SIZE as u64 }))
            .and_then(|_| file.write_all(text.as_bytes()))
            .and_then(|()| file.sync_all())
            .map_err(TrainError::io(&path, "writing"))
    }
}

impl RunLock {
    /// Lets go, which dropping does too.
    pub fn release(&self) {
        let path = self.dir.join(MARKER);
        if !is_at(&self.file, &path) {
            return;
        }
        let mut marker = self.marker();
        if !marker.id.is_empty() {
            marker.owner = None;
            marker.written += 1;
            let _ = self.write(&marker);
            return;
        }
        if self.was_empty {
            let _ = self.file.set_len(0);
            return;
        }
        // Still held, so nobody else can have begun anything with it.
        let _ = fs::remove_file(&path);
        let Some(top) = &self.made else {
            return;
        };
        for dir in self.dir.ancestors() {
            // One that holds something stays.
            if fs::remove_dir(dir).is_err() || dir == top {
                break;
            }
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        self.release();
    }
}

const LET_IT_END: &str = "wait for it, stop it, or choose another directory (--output DIR)";
const NO_LOCKS: &str = "this file system has no locks, so whether that process lives cannot be told for sure: wait \
                        for it, choose another directory (--output DIR), or remove run.lock once it has ended";

fn at_work(dir: &Path, owner: Option<&Owner>, help: &str) -> TrainError {
    let who = owner.map_or_else(|| "another process".to_owned(), Owner::describe);
    TrainError::Run {
        path: dir.to_owned(),
        reason: format!("another run is at work here ({who})"),
        help: help.to_owned(),
    }
}

/// A new id.
pub(crate) fn new_id() -> String {
    let mut hash = Sha256::new();
    // Seeded by the system, anew for each.
    for _ in 0..2 {
        hash.update(RandomState::new().build_hasher().finish().to_le_bytes());
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    hash.update(since.map_or(0, |since| since.as_nanos()).to_le_bytes());
    hash.update(std::process::id().to_le_bytes());
    let all = hex(&hash.finalize());
    all.chars().take(32).collect()
}

/// Makes the folder and what leads to it; the uppermost one that was made.
fn make_folders(dir: &Path) -> Result<Option<PathBuf>, TrainError> {
    let missing = dir.ancestors().take_while(|dir| {
        let here = dir.as_os_str().is_empty();
        !here && fs::symlink_metadata(dir).is_err()
    });
    let top = missing.last().map(Path::to_owned);
    fs::create_dir_all(dir).map_err(TrainError::io(dir, "creating the run directory"))?;
    Ok(top)
}

/// The file, and whether it is a new one.
fn open(path: &Path) -> std::io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    // Through a link it would be another directory's; a pipe would not open.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NOFOLLOW | libc::O_NONBLOCK,
    );
    match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok((options.open(path)?, false)),
        new => Ok((new?, true)),
    }
}

/// Whether the name still stands for the open file.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (Ok(open), Ok(there)) = (file.metadata(), fs::symlink_metadata(path)) else {
            return false;
        };
        (open.dev(), open.ino()) == (there.dev(), there.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// What an open file says; an empty one says nothing yet.
fn read(mut file: &File, path: &Path) -> Result<Marker, TrainError> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.take(4 * SIZE as u64).read_to_end(&mut bytes))
        .map_err(TrainError::io(path, "reading"))?;
    if bytes.is_empty() {
        return Ok(Marker::default());
    }
    let plain =
        |id: &str| id.is_empty() || (id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    let lines = bytes
        .chunks(SIZE)
        .filter_map(|line| serde_json::from_slice::<Line>(line).ok())
        .filter(|line| line.write == line.written && plain(&line.marker.id))
        .map(|line| Marker {
            written: line.written,
            ..line.marker
        });
    lines
        .max_by_key(|marker| marker.written)
        .ok_or_else(|| TrainError::Run {
            path: path.to_owned(),
            reason: "no run of Enamel wrote this file, which a run would write".into(),
            help: "choose another directory with --output DIR, or move the file away".into(),
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_the_second_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("a/b");
        let first = RunLock::take(&run).unwrap();
        first.update(|marker| marker.id = new_id()).unwrap();
        let error = RunLock::take(&run).unwrap_err().to_string();
        let pid = format!("process {}", std::process::id());
        assert!(error.contains(&pid) && error.contains("ago"), "{error}");
        let id = first.marker().id;
        drop(first);
        let second = RunLock::take(&run).unwrap();
        assert_eq!(second.marker().id, id);
    }

    #[test]
    fn of_two_at_once_one_wins_and_the_other_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let pid = format!("process {} on ", std::process::id());
        for number in 0..100 {
            // New directories, and ones that a run has been in.
            let run = dir.path().join(format!("{}", number / 4));
            let both = std::sync::Barrier::new(2);
            let take = || {
                both.wait();
                let taken = RunLock::take(&run);
                both.wait();
                if let Ok(lock) = &taken {
                    lock.update(|marker| marker.id = new_id()).unwrap();
                }
                taken.map(|_| ()).map_err(|error| error.to_string())
            };
            let taken = std::thread::scope(|scope| {
                let other = scope.spawn(take);
                [take(), other.join().unwrap()]
            });
            let lost: Vec<_> = taken.into_iter().filter_map(Result::err).collect();
            assert_eq!(lost.len(), 1, "try {number}: {lost:?}");
            assert!(lost[0].contains(&pid), "try {number}: {lost:?}");
        }
    }

    #[test]
    fn what_was_made_for_nothing_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        drop(RunLock::take(&dir.path().join("a/b/c")).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::create_dir(dir.path().join("a")).unwrap();
        drop(RunLock::take(&dir.path().join("a/b")).unwrap());
        assert!(dir.path().join("a").is_dir());
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 0);
    }

    #[test]
    fn a_file_of_that_name_which_no_run_wrote_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MARKER);
        for text in ["mine", "{}", "{\"enamel_run\": \"../x\"}", "[1]"] {
            fs::write(&path, text).unwrap();
            let error = RunLock::take(dir.path()).unwrap_err().to_string();
            assert!(error.contains("no run of Enamel wrote"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        #[cfg(unix)]
        {
            fs::remove_file(&path).unwrap();
            let target = dir.path().join("elsewhere");
            std::os::unix::fs::symlink(&target, &path).unwrap();
            RunLock::take(dir.path()).unwrap_err();
            assert!(!target.exists());
        }
    }

    #[test]
    fn a_directory_that_is_gone_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let lock = RunLock::take(&run).unwrap();
        lock.check().unwrap();
        fs::rename(&run, dir.path().join("moved")).unwrap();
        lock.check().unwrap_err();
        fs::create_dir(&run).unwrap();
        fs::write(run.join(MARKER), "another's").unwrap();
        lock.check().unwrap_err();
        drop(lock);
        assert_eq!(fs::read_to_string(run.join(MARKER)).unwrap(), "another's");
    }

    #[test]
    fn without_locks_the_named_owner_decides() {
        let here = Owner::this();
        let owner = |pid, host: &str| Owner {
            pid,
            host: host.to_owned(),
            started: 0,
        };
        assert!(owner(1, "elsewhere.invalid").may_live(&here));
        assert!(!owner(here.pid, &here.host).may_live(&here));
        // Process 1 is always there, and no process has the largest number.
        assert!(owner(1, &here.host).may_live(&here));
        assert!(!owner(u32::MAX, &here.host).may_live(&here));
    }

    #[test]
    fn a_write_that_is_cut_short_leaves_what_was_said_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MARKER);
        let id = new_id();
        assert_ne!(id, new_id());
        for step in 1..6 {
            let lock = RunLock::take(dir.path()).unwrap();
            lock.update(|marker| {
                marker.id.clone_from(&id);
                marker.line = step;
                marker.results = vec!["f".repeat(64); 7];
            })
            .unwrap();
            let before = fs::read(&path).unwrap();
            lock.update(|marker| marker.line = usize::MAX).unwrap();
            let after = fs::read(&path).unwrap();
            assert_eq!(after.len(), 2 * SIZE, "it does not grow");
            drop(lock);
            let changed = || before.iter().zip(&after).enumerate();
            let first = changed().find(|(_, (a, b))| a != b).unwrap().0;
            for cut in [first + 1, first + 20, first + SIZE / 2] {
                let torn = [&after[..cut], &before[cut..]].concat();
                fs::write(&path, torn).unwrap();
                let marker = read(&File::open(&path).unwrap(), &path).unwrap();
                assert_eq!((&marker.id, marker.line), (&id, step), "cut at {cut}");
            }
            fs::write(&path, before).unwrap();
        }
    }
}

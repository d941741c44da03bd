//! Files and folders that take their name when they are complete.
//!
//! Each is written under a name of its own beside its place, synced, and renamed: whoever looks finds the former
//! one or the whole new one. What a failure, a signal or a kill leaves unfinished is removed, by [`Drop`], by
//! [`abandon`], or by the next one who stages something in the same folder.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tempfile::{NamedTempFile, TempDir};

/// How the names of unfinished files and folders begin.
pub const PREFIX: &str = ".enamel-unfinished-";

/// How often another process may have swept away what was just made, before it could be locked.
const TRIES: usize = 16;

/// What this process has not finished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// An unfinished file.
#[derive(Debug)]
pub struct StagedFile {
    file: NamedTempFile,
    noted: Noted,
}

/// An unfinished folder.
#[derive(Debug)]
pub struct StagedDir {
    dir: TempDir,
    noted: Noted,
    /// Locked, as long as this process lives.
    _lock: Option<File>,
}

/// An entry of [`UNFINISHED`].
#[derive(Debug)]
struct Noted(PathBuf);

impl Noted {
    fn new(path: &Path) -> Self {
        // Whoever abandons it may stand in another folder by then.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        unfinished().push(path.clone());
        Self(path)
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        let mut all = unfinished();
        if let Some(at) = all.iter().position(|path| *path == self.0) {
            all.swap_remove(at);
        }
    }
}

fn unfinished() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder that `path` is to lie in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// What `mode` is without the umask, which the system takes off: a temporary file would be its owner's alone.
#[cfg(unix)]
fn permissions(mode: u32) -> Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

impl StagedFile {
    /// A file beside `path`, which it replaces when it is complete.
    ///
    /// # Errors
    /// When the folder is not there or cannot be written to.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let folder = parent(path);
        sweep(folder);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        #[cfg(unix)]
        builder.permissions(permissions(0o666));
        for _ in 0..TRIES {
            let file = builder.tempfile_in(folder)?;
            if is_ours(file.as_file(), file.path()) {
                let noted = Noted::new(file.path());
                return Ok(Self { file, noted });
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Gives it its name, once it is on the disk. With `replace` it takes the place of what is there; without, it
    /// is an error of the kind `AlreadyExists` if there is anything.
    ///
    /// # Errors
    /// That, or when the disk refuses. Nothing is changed then.
    pub fn finish(self, path: &Path, replace: bool) -> io::Result<File> {
        self.file.as_file().sync_all()?;
        let placed = match replace {
            true => self.file.persist(path),
            false => self.file.persist_noclobber(path),
        };
        let file = placed.map_err(|refused| refused.error)?;
        drop(self.noted);
        sync(parent(path));
        Ok(file)
    }

    /// The file, to be written.
    pub fn as_file(&self) -> &File {
        self.file.as_file()
    }
}

impl io::Write for StagedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl StagedDir {
    /// A folder beside `path`. Folders above `path` are made.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let folder = parent(path);
        fs::create_dir_all(folder)?;
        sweep(folder);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        #[cfg(unix)]
        builder.permissions(permissions(0o777));
        for _ in 0..TRIES {
            let dir = builder.tempdir_in(folder)?;
            // Some systems do not open folders: there, nobody sweeps them either.
            let lock = File::open(dir.path()).ok();
            if lock.as_ref().is_none_or(|lock| is_ours(lock, dir.path())) {
                return Ok(Self {
                    noted: Noted::new(dir.path()),
                    dir,
                    _lock: lock,
                });
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Where it lies until it is complete.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Gives it its name. An empty folder is replaced, one that holds something is an error.
    ///
    /// # Errors
    /// That, or when the disk refuses. It is removed then.
    pub fn finish(self, path: &Path) -> io::Result<()> {
        sync(self.dir.path());
        fs::rename(self.dir.path(), path)?;
        // What it would remove has another name now.
        let _ = self.dir.keep();
        drop(self.noted);
        sync(parent(path));
        Ok(())
    }

    /// Gives it its name, in the place of what is there, which is removed after that.
    ///
    /// Where the system can swap two names there is no moment without either. Elsewhere a kill between two renames
    /// leaves both folders, the former one as `.enamel-former-*`, which no sweep removes.
    ///
    /// # Errors
    /// When the disk refuses; what was there stays then, or is named in the error.
    pub fn replace(self, path: &Path) -> io::Result<()> {
        sync(self.dir.path());
        match swap(self.dir.path(), path) {
            Ok(()) => {
                sync(parent(path));
                // Its name is the former one's now, which goes with it.
                drop(self);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.finish(path),
            Err(_) => {}
        }
        let former = tempfile::Builder::new()
            .prefix(".enamel-former-")
            .tempdir_in(parent(path))?;
        fs::rename(path, former.path().join("former"))?;
        // Never to be removed before the new one is in its place.
        let former = former.keep();
        if let Err(error) = self.finish(path) {
            return Err(match fs::rename(former.join("former"), path) {
                Ok(()) => {
                    let _ = fs::remove_dir(&former);
                    error
                }
                Err(_) => io::Error::other(format!(
                    "{error}; what was there is in {}",
                    former.join("former").display()
                )),
            });
        }
        let _ = fs::remove_dir_all(former);
        Ok(())
    }
}

/// Swaps the names of two folders in one step.
#[cfg(target_os = "linux")]
fn swap(a: &Path, b: &Path) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let [a, b] = [a, b].map(|path| CString::new(path.as_os_str().as_bytes()));
    let (a, b) = (a?, b?);
    // SAFETY: both are strings that end, and live through the call.
    let code = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(not(target_os = "linux"))]
fn swap(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Removes all that this process has not finished, on its way out: the threads that write it may still be at work.
pub fn abandon() {
    for path in unfinished().drain(..) {
        remove(&path);
    }
}

/// Removes what killed processes left unfinished in `folder`.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX)
            // A link is none of ours, and is not followed.
            || entry.file_type().is_ok_and(|kind| kind.is_symlink())
        {
            continue;
        }
        // Held until it is gone, so that nobody takes it for theirs meanwhile.
        if let Ok(dead) = File::open(entry.path())
            && dead.try_lock().is_ok()
        {
            remove(&entry.path());
        }
    }
}

/// Locks what was just made, for as long as it is open; false where a sweep has been faster. A file system
/// without locks keeps everybody from sweeping.
fn is_ours(made: &File, path: &Path) -> bool {
    !matches!(made.try_lock(), Err(TryLockError::WouldBlock)) && path.exists()
}

fn remove(path: &Path) {
    // What cannot be removed costs room on the disk and nothing else.
    let _ = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
}

/// Makes renames in `folder` last where the system lets a folder be synced.
pub fn sync(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_when_it_is_complete() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("a");
        fs::write(&path, "old").unwrap();
        let mut file = StagedFile::beside(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(at.path()).len(), 2);
        file.finish(&path, true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(at.path()), ["a"]);

        let file = StagedFile::beside(&path).unwrap();
        let refused = file.finish(&path, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names(at.path()), ["a"], "and nothing is left of it");
    }

    #[test]
    fn a_folder_replaces_another_whole() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("a");
        for text in ["first", "second"] {
            let dir = StagedDir::beside(&path).unwrap();
            fs::write(dir.path().join(text), text).unwrap();
            dir.replace(&path).unwrap();
            assert_eq!(names(&path), [text]);
            assert_eq!(names(at.path()), ["a"]);
        }
        let dir = StagedDir::beside(&path).unwrap();
        dir.finish(&path).unwrap_err();
        assert_eq!(names(&path), ["second"]);
        assert_eq!(names(at.path()), ["a"]);
    }

    #[test]
    fn only_what_nobody_works_on_is_swept() {
        let at = tempfile::tempdir().unwrap();
        let living = StagedDir::beside(&at.path().join("a")).unwrap();
        let file = StagedFile::beside(&at.path().join("b")).unwrap();
        let dead = at.path().join(format!("{PREFIX}dead"));
        let stranger = at.path().join(".enamel-stranger");
        for dir in [&dead, &stranger] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("x"), "x").unwrap();
        }
        sweep(at.path());
        assert!(!dead.exists());
        assert!(stranger.exists());
        assert!(living.path().exists() && file.file.path().exists());
    }

    #[cfg(unix)]
    #[test]
    fn the_umask_decides_who_may_read() {
        use std::os::unix::fs::PermissionsExt;
        let at = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        // What the standard library makes, which takes the umask off: no test may change that of all.
        let (plain_file, plain_dir) = (at.path().join("f"), at.path().join("d"));
        fs::write(&plain_file, "").unwrap();
        fs::create_dir(&plain_dir).unwrap();
        let file = StagedFile::beside(&at.path().join("a")).unwrap();
        file.finish(&at.path().join("a"), true).unwrap();
        let dir = StagedDir::beside(&at.path().join("b")).unwrap();
        dir.finish(&at.path().join("b")).unwrap();
        assert_eq!(mode(&at.path().join("a")), mode(&plain_file));
        assert_eq!(mode(&at.path().join("b")), mode(&plain_dir));
    }
}

//! Locks on files: given back when dropped, and by the system when the process dies.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

use super::SourceError;

/// Takes the lock that `path` stands for; `waiting` is called before waiting for another's.
///
/// A file that another user made, and may not be written, is locked all the same.
pub(super) fn lock(path: &Path, waiting: &mut dyn FnMut()) -> Result<File, SourceError> {
    let io = |error| SourceError::io(path, error);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| SourceError::io(folder, e))?;
    }
    let mut told = false;
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // A link in a shared cache could have a file made anywhere.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(
            &mut options,
            rustix::fs::OFlags::NOFOLLOW.bits() as i32,
        );
        let file = match options.open(path) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied && path.is_file() => {
                File::open(path)
            }
            other => other,
        }
        .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut told, true) {
                    waiting();
                }
                file.lock().map_err(io)?;
            }
            // A file system without locks: contents are checked in any case.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        // The Python client removes its lock files: one that is gone locks nothing.
        if same_file(&file, path) {
            return Ok(file);
        }
    }
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn same_file(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_and_a_removed_one_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.lock");
        let held = lock(&path, &mut || ()).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = path.clone();
        let thread = std::thread::spawn(move || {
            lock(&other, &mut || sender.send(()).unwrap()).unwrap();
        });
        receiver.recv().unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(held);
        thread.join().unwrap();
        assert!(path.is_file());
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_may_only_be_read_is_locked() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.lock");
        std::fs::write(&path, b"").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
        let _held = lock(&path, &mut || ()).unwrap();
        assert!(File::open(&path).unwrap().try_lock().is_err());
    }
}

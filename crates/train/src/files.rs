//! Files that are written whole or not at all, and are on the disk then.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::error::TrainError;

/// A folder in `dir` for what is not complete yet, named after the run that owns it.
pub(crate) fn staging(dir: &Path, run: &str) -> Result<tempfile::TempDir, TrainError> {
    let prefix = format!("{SAVING}{run}-");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    // Temporary folders are private; what a run leaves is for everybody whom the umask lets in.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder
        .tempdir_in(dir)
        .map_err(TrainError::io(dir, "creating a folder in it"))
}

/// How names of incomplete folders and files begin; the id of the run comes next.
pub(crate) const SAVING: &str = ".saving-";

pub(crate) const WRITING: &str = ".writing-";

/// Writes a file and waits until it is on the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut file = File::create(path).map_err(TrainError::io(path, "creating"))?;
    file.write_all(bytes)
        .map_err(TrainError::io(path, "writing"))?;
    file.sync_all().map_err(TrainError::io(path, "writing"))
}

/// Writes a file whole or not at all, under a temporary name that bears the id of `run` where there is one.
pub(crate) fn write_atomic(path: &Path, run: &str, bytes: &[u8]) -> Result<(), TrainError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let prefix = format!("{WRITING}{run}-");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    // Temporary files are private; what a run leaves is for everybody whom the umask lets in.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder
        .tempfile_in(dir)
        .map_err(TrainError::io(path, "creating"))?;
    file.write_all(bytes)
        .map_err(TrainError::io(path, "writing"))?;
    file.as_file()
        .sync_all()
        .map_err(TrainError::io(path, "writing"))?;
    file.persist(path)
        .map_err(|e| TrainError::io(path, "renaming into place")(e.error))?;
    sync_dir(dir);
    Ok(())
}

/// Waits until a folder and all in it is on the disk, where the system lets folders be synced.
pub(crate) fn sync_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => sync_tree(&entry.path()),
            // Files copied from elsewhere have not been synced where they were written.
            Ok(kind) if kind.is_file() => sync_dir(&entry.path()),
            _ => {}
        }
    }
    sync_dir(dir);
}

/// Makes renames in `dir` durable where the system lets a folder be synced.
pub(crate) fn sync_dir(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = dir.sync_all();
    }
}

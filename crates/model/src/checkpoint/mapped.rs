//! One memory-mapped file, and reading from it without keeping its pages resident.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::CheckpointError;

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let meta = file.metadata().map_err(|e| CheckpointError::io(path, e))?;
        if !meta.is_file() {
            return Err(CheckpointError::malformed(path, "not a regular file"));
        }
        // SAFETY: the mapping is private and read-only. A file cut short by another process while
        // it is mapped faults on access, as with every memory-mapped loader; model files are
        // replaced by renaming (which keeps the old inode), here and in the hub's own cache.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes of `range`, or nothing when it does not lie within the file.
    pub(crate) fn slice(&self, range: &Range<usize>) -> Option<&[u8]> {
        self.map.get(range.clone())
    }

    /// Tells the system that `range` will not be needed again, so that the pages read so far do not
    /// count towards this process: loading then peaks at the model plus one tensor.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 4096;
            let start = range.start.next_multiple_of(PAGE);
            let end = range.end.min(self.map.len()) / PAGE * PAGE;
            if start < end {
                // SAFETY: the mapping is file-backed and never written, so dropped pages are read
                // again from the file. A failure only means that the pages stay.
                let _ = unsafe {
                    self.map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start,
                        end - start,
                    )
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

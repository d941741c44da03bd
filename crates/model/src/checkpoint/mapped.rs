//! One memory-mapped file, and reading from it without keeping its pages resident.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use memmap2::Mmap;

use super::CheckpointError;

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    // After the mapping, so that its place is free only when the mapping is gone.
    _noted: Noted,
}

/// Where a mapping lies and what to say when it faults, for a signal handler: which may neither lock nor allocate.
#[derive(Debug)]
struct Place {
    start: AtomicUsize,
    /// 0 while the place is free.
    end: AtomicUsize,
    message: AtomicPtr<Vec<u8>>,
}

/// More files than a model has; those beyond are mapped without being noted.
const PLACES: usize = 1024;

static NOTED: [Place; PLACES] = [const {
    Place {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        message: AtomicPtr::new(std::ptr::null_mut()),
    }
}; PLACES];

/// What to say of the file at `path`. Never freed, as a handler might be reading it: there is one a path.
fn message(path: &Path) -> &'static Vec<u8> {
    static MESSAGES: Mutex<BTreeMap<PathBuf, &'static Vec<u8>>> = Mutex::new(BTreeMap::new());
    let mut messages = MESSAGES.lock().unwrap_or_else(PoisonError::into_inner);
    messages.entry(path.to_owned()).or_insert_with(|| {
        let message = format!(
            "error: {}: another program cut this file short while it was being read\n  \
             help: fetch or copy it again, and replace model files by renaming, not by writing into them\n",
            path.display().to_string().escape_debug()
        );
        Box::leak(Box::new(message.into_bytes()))
    })
}

/// A place in [`NOTED`], given back on dropping.
#[derive(Debug)]
struct Noted(Option<&'static Place>);

impl Noted {
    fn new(path: &Path, map: &[u8]) -> Self {
        if map.is_empty() {
            return Self(None);
        }
        let start = map.as_ptr().addr();
        let end = start.saturating_add(map.len());
        let free = NOTED.iter().find(|place| {
            let taken = place
                .end
                .compare_exchange(0, end, Ordering::SeqCst, Ordering::SeqCst);
            taken.is_ok()
        });
        if let Some(place) = free {
            let message = std::ptr::from_ref(message(path)).cast_mut();
            place.message.store(message, Ordering::SeqCst);
            place.start.store(start, Ordering::SeqCst);
        }
        Self(free)
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            place.start.store(0, Ordering::SeqCst);
            place.message.store(std::ptr::null_mut(), Ordering::SeqCst);
            place.end.store(0, Ordering::SeqCst);
        }
    }
}

/// What to tell a person when reading at `address` raised SIGBUS, if it lies in a file that is mapped here. For
/// signal handlers: it neither locks nor allocates.
pub fn mapped_at(address: usize) -> Option<&'static [u8]> {
    let place = NOTED.iter().find(|place| {
        let start = place.start.load(Ordering::SeqCst);
        start != 0 && (start..place.end.load(Ordering::SeqCst)).contains(&address)
    })?;
    // SAFETY: null, or what was leaked and is only read.
    let message = unsafe { place.message.load(Ordering::SeqCst).as_ref() };
    message.map(Vec::as_slice)
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let meta = file.metadata().map_err(|e| CheckpointError::io(path, e))?;
        if !meta.is_file() {
            return Err(CheckpointError::malformed(path, "not a regular file"));
        }
        // SAFETY: the mapping is private and read-only. A file cut short by another process while
        // it is mapped faults on access, as with every memory-mapped loader (see `mapped_at`); model files
        // are replaced by renaming (which keeps the old inode), here and in the hub's own cache.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            _noted: Noted::new(path, &map),
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
            let end = range.end.min(self.map.len());
            let end = end.saturating_sub(end % PAGE);
            if start < end {
                // SAFETY: the mapping is file-backed and never written, so dropped pages are read
                // again from the file. A failure only means that the pages stay.
                let _ = unsafe {
                    self.map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start,
                        end.saturating_sub(start),
                    )
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

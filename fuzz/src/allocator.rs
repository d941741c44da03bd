//! An allocator that counts, and refuses what no reader may need.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};

use mimalloc::MiMalloc;

/// Bytes at which memory is refused, which ends the process: four times what an input may take.
const MOST: usize = 2 << 30;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Where a refusal is noted for the supervisor, since the process ends with it.
static REFUSED: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

/// mimalloc, as the program has it, with a count beside it.
pub struct Counting;

impl Counting {
    fn grow(bytes: usize) -> bool {
        let live = LIVE.fetch_add(bytes, Relaxed).saturating_add(bytes);
        if live > MOST {
            LIVE.fetch_sub(bytes, Relaxed);
            // SAFETY: null, or a number that lives as long as the process.
            if let Some(refused) = unsafe { REFUSED.load(Relaxed).as_ref() } {
                refused.store(1, Relaxed);
            }
            return false;
        }
        if live > PEAK.load(Relaxed) {
            PEAK.store(live, Relaxed);
        }
        true
    }
}

// SAFETY: hands on to mimalloc, and what mimalloc gives back; a null address is a refusal.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match Self::grow(layout.size()) {
            // SAFETY: passed on to the caller.
            true => unsafe { MiMalloc.alloc(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match Self::grow(layout.size()) {
            // SAFETY: passed on to the caller.
            true => unsafe { MiMalloc.alloc_zeroed(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !Self::grow(size) {
            return std::ptr::null_mut();
        }
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { MiMalloc.realloc(address, layout, size) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { MiMalloc.dealloc(address, layout) };
    }
}

/// The bytes in use.
pub fn in_use() -> usize {
    LIVE.load(Relaxed)
}

/// Begins to look for a peak; gives the bytes in use.
pub fn begin() -> usize {
    let live = in_use();
    PEAK.store(live, Relaxed);
    live
}

/// The highest number of bytes in use since [`begin`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// Notes refusals as a 1 in `cell`.
pub fn note_refusals_in(cell: &'static AtomicU64) {
    REFUSED.store(std::ptr::from_ref(cell).cast_mut(), Relaxed);
}

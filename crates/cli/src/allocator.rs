//! The allocator of the program: mimalloc, and what happens when it is refused memory.

use std::alloc::{GlobalAlloc, Layout};

use enamel_train::memory::oom_notice;
use mimalloc::MiMalloc;

/// mimalloc, which glibc's allocator cannot match: tensors are allocated and freed at a rate that it answers
/// with page faults. While a run trains, being refused memory ends the process with the run's plan, where the
/// standard library would only say how many bytes it was about.
pub struct Allocator;

impl Allocator {
    fn given(address: *mut u8) -> *mut u8 {
        if address.is_null() {
            oom_notice::end();
        }
        address
    }
}

// SAFETY: hands on to mimalloc, and what mimalloc gives back.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on to the caller.
        Self::given(unsafe { MiMalloc.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on to the caller.
        Self::given(unsafe { MiMalloc.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: passed on to the caller.
        Self::given(unsafe { MiMalloc.realloc(address, layout, size) })
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { MiMalloc.dealloc(address, layout) };
    }
}

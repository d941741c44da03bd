//! What is said when the system refuses memory. Nothing can be made up then: the text lies ready.

use std::sync::atomic::{AtomicPtr, Ordering};

#[cfg(unix)]
use crate::signals::terminal;

static NOTICE: AtomicPtr<Notice> = AtomicPtr::new(std::ptr::null_mut());

struct Notice {
    text: String,
}

/// Keeps `text` ready for [`end`]. Each text is kept for the rest of the process.
pub fn prepare(text: String) {
    let notice = Box::new(Notice { text });
    NOTICE.store(Box::into_raw(notice), Ordering::Release);
}

/// From now on [`end`] does nothing.
pub fn clear() {
    NOTICE.store(std::ptr::null_mut(), Ordering::Release);
}

/// Whether a text lies ready.
pub fn is_prepared() -> bool {
    !NOTICE.load(Ordering::Acquire).is_null()
}

/// For an allocator that has been refused memory: writes the text to stderr and ends the process, without
/// taking memory. Returns where no text lies ready.
#[cfg(unix)]
pub fn end() {
    let notice = NOTICE.swap(std::ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: the pointer is null or came from `Box::into_raw` and is never freed.
    let Some(notice) = (unsafe { notice.as_ref() }) else {
        return;
    };
    terminal::restore_now();
    terminal::end_with(notice.text.as_bytes())
}

/// Where there is no such system call, the process ends as the standard library ends it.
#[cfg(not(unix))]
pub fn end() {}

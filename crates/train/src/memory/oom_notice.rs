//! What is said when the system refuses memory. Nothing can be made up then: the text lies ready.

use std::sync::atomic::{AtomicPtr, Ordering};

#[cfg(unix)]
use crate::signals::terminal;

/// The exit code of a process that ended so: the one of any other error.
pub const EXIT_CODE: i32 = 1;

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
    leave(notice.text.as_bytes())
}

/// Writes `text` to stderr and ends the process, by system calls alone.
#[cfg(unix)]
pub(crate) fn leave(text: &[u8]) -> ! {
    let mut rest = text;
    // SAFETY: system calls with buffers of the length they are given; the process ends here.
    unsafe {
        while !rest.is_empty() {
            let n = libc::write(2, rest.as_ptr().cast(), rest.len());
            match usize::try_from(n) {
                Ok(n) if n > 0 => rest = rest.get(n..).unwrap_or_default(),
                _ => break,
            }
        }
        libc::_exit(EXIT_CODE)
    }
}

/// Where there is no such system call, the process ends as the standard library ends it.
#[cfg(not(unix))]
pub fn end() {}

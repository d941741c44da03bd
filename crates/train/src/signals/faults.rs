//! Files that change under a program: one that is cut short while it is mapped raises SIGBUS where it is read, and
//! a file that would pass the limit of `ulimit -f` raises SIGXFSZ. Both end a process without a word.

/// From now on, a mapped model file that is cut short ends the program with an error that names it, and a file
/// that may not grow is an error of the write. To be called once, when the program starts.
pub fn guard() {
    #[cfg(unix)]
    unix::guard();
}

#[cfg(unix)]
mod unix {
    use std::sync::atomic::{AtomicBool, Ordering};

    use enamel_model::checkpoint::mapped_at;

    use crate::signals::terminal;

    pub(super) fn guard() {
        // SAFETY: the handler does nothing but system calls and atomic loads; all zeros is a value of the
        // structure. A refusal leaves the system's own handling in place.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = cut_short as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
            // The write that went too far then says so ("File too large").
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
    }

    static SPEAKS: AtomicBool = AtomicBool::new(false);

    extern "C" fn cut_short(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system hands over what it says; `si_addr` is the address of a SIGBUS.
        let address = unsafe { info.as_ref().map(|info| info.si_addr().addr()) };
        let Some(message) = address.and_then(mapped_at) else {
            // Not a file of ours: back to the instruction, which faults again, without a handler now.
            // SAFETY: a system call with values of the system's own.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            return;
        };
        // Several threads read at once: one of them speaks and ends the process, the others wait for that.
        if SPEAKS.swap(true, Ordering::SeqCst) {
            loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            }
        }
        terminal::restore_now();
        terminal::end_with(message)
    }
}

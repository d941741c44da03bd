//! The terminal under burn-train's dashboard: it draws on the alternate screen, in raw mode, without a cursor and
//! with the mouse reporting. A process that ends or stops has to give all that back.

/// Leaves the alternate screen, ends mouse reports and shows the cursor.
const LEAVE: &[u8] = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1049l\x1b[?25h";
/// The reverse, in crossterm's order.
#[cfg(unix)]
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?1000h\x1b[?1002h\x1b[?1003h\x1b[?1015h\x1b[?1006h\x1b[?25l";

/// Remembers how the terminal stands, before the dashboard takes it over.
pub fn dashboard_begins() {
    #[cfg(unix)]
    unix::begin();
}

/// The dashboard has given the terminal back.
pub fn dashboard_ends() {
    #[cfg(unix)]
    unix::end();
}

/// Whether the dashboard has the terminal.
pub fn has_dashboard() -> bool {
    #[cfg(unix)]
    return unix::is_on();
    #[cfg(not(unix))]
    false
}

/// Gives the terminal back while the dashboard goes on drawing, into nothing: for a process that ends or stops
/// now. Does nothing without a dashboard.
pub fn leave() {
    #[cfg(unix)]
    unix::leave();
}

/// Takes the terminal again when a stopped process goes on, if it is in the foreground, and has the dashboard
/// draw all of it anew.
pub fn come_back() {
    #[cfg(unix)]
    unix::come_back();
}

/// Called with each step: lets Ctrl-C be a signal while the dashboard has the terminal in raw mode, in which it
/// would be a key that nothing listens to, and comes back from `bg` once the process is in the foreground.
pub fn each_step() {
    #[cfg(unix)]
    unix::each_step();
}

/// What may be done of [`leave`] in a signal handler or when there is no memory left: system calls only.
pub fn restore_now() {
    #[cfg(unix)]
    unix::restore_now();
}

/// Whether the process was started with `signal` ignored, as `nohup` does with SIGHUP.
#[cfg(unix)]
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: asks for the disposition and changes nothing; all zeros is a value of the structure.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut now) == 0
            && now.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(unix)]
mod unix {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
    use std::time::Duration;

    use super::{ENTER, LEAVE};

    /// No dashboard.
    const OFF: u8 = 0;
    /// One on the screen.
    const SHOWN: u8 = 1;
    /// One that draws into nothing, in a process that is about to stop or end.
    const LEFT: u8 = 2;
    /// One that draws into nothing, in a process that goes on in the background.
    const AWAY: u8 = 3;

    static STATE: AtomicU8 = AtomicU8::new(OFF);
    /// Standard output while [`LEFT`] or [`AWAY`]: 1 is /dev/null then.
    static SAVED_OUT: AtomicI32 = AtomicI32::new(-1);
    /// How the terminal stood before the first dashboard.
    static BEFORE: OnceLock<libc::termios> = OnceLock::new();
    /// Twice burn-train's interval between two drawings, and some.
    const REDRAWN: Duration = Duration::from_millis(250);

    pub(super) fn begin() {
        if let Some(now) = attributes() {
            let _ = BEFORE.set(now);
        }
        STATE.store(SHOWN, Ordering::SeqCst);
    }

    pub(super) fn end() {
        draw_again();
        STATE.store(OFF, Ordering::SeqCst);
    }

    pub(super) fn is_on() -> bool {
        STATE.load(Ordering::SeqCst) != OFF
    }

    pub(super) fn leave() {
        if STATE
            .compare_exchange(SHOWN, LEFT, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            return;
        }
        draw_into_nothing();
        // A drawing that is under way gets to its end.
        std::thread::sleep(Duration::from_millis(20));
        write(out(), LEAVE);
        cooked();
    }

    pub(super) fn come_back() {
        let state = STATE.load(Ordering::SeqCst);
        if state == OFF {
            return;
        }
        if !in_foreground() {
            if state == LEFT {
                STATE.store(AWAY, Ordering::SeqCst);
            }
            return;
        }
        raw();
        write(out(), ENTER);
        draw_again();
        STATE.store(SHOWN, Ordering::SeqCst);
        draw_all_anew();
    }

    pub(super) fn each_step() {
        match STATE.load(Ordering::SeqCst) {
            SHOWN => change(|s| s.c_lflag |= libc::ISIG),
            AWAY if in_foreground() => come_back(),
            _ => {}
        }
    }

    pub(super) fn restore_now() {
        if STATE.swap(OFF, Ordering::SeqCst) != SHOWN {
            return;
        }
        write(libc::STDOUT_FILENO, LEAVE);
        cooked();
    }

    /// Standard output as it was, also while the dashboard draws into nothing.
    fn out() -> i32 {
        match SAVED_OUT.load(Ordering::SeqCst) {
            saved if saved >= 0 => saved,
            _ => libc::STDOUT_FILENO,
        }
    }

    fn draw_into_nothing() {
        // SAFETY: system calls on descriptors of ours; a failure leaves standard output as it is.
        unsafe {
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if nothing < 0 {
                return;
            }
            let saved = libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, 3);
            if saved >= 0 {
                SAVED_OUT.store(saved, Ordering::SeqCst);
                libc::dup2(nothing, libc::STDOUT_FILENO);
            }
            libc::close(nothing);
        }
    }

    /// The end of [`draw_into_nothing`].
    fn draw_again() {
        let saved = SAVED_OUT.swap(-1, Ordering::SeqCst);
        if saved >= 0 {
            // SAFETY: both descriptors are ours; the copy is not used any longer.
            unsafe {
                libc::dup2(saved, libc::STDOUT_FILENO);
                libc::close(saved);
            }
        }
    }

    /// The dashboard draws what has changed only, and the screen is empty now. It draws everything where the
    /// terminal's size has changed: so it does, for a moment.
    fn draw_all_anew() {
        let Some(size) = size() else { return };
        let smaller = libc::winsize {
            ws_row: size.ws_row.saturating_sub(1).max(1),
            ..size
        };
        set_size(&smaller);
        std::thread::sleep(REDRAWN);
        set_size(&size);
    }

    fn size() -> Option<libc::winsize> {
        // SAFETY: fills in the structure it is given, for which all zeros is a value.
        unsafe {
            let mut size: libc::winsize = std::mem::zeroed();
            (libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) == 0).then_some(size)
        }
    }

    fn set_size(size: &libc::winsize) {
        // SAFETY: reads the structure; a failure changes nothing.
        unsafe {
            libc::ioctl(
                libc::STDOUT_FILENO,
                libc::TIOCSWINSZ,
                std::ptr::from_ref(size),
            )
        };
    }

    fn in_foreground() -> bool {
        // SAFETY: asks for two numbers.
        unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
    }

    /// Raw mode, but for the signals of Ctrl-C, Ctrl-Z and Ctrl-\.
    fn raw() {
        change(|state| {
            // SAFETY: changes the structure alone.
            unsafe { libc::cfmakeraw(state) };
            state.c_lflag |= libc::ISIG;
        });
    }

    /// As it was before the dashboard.
    fn cooked() {
        if let Some(before) = BEFORE.get() {
            // SAFETY: the structure came from the system; a failure leaves the terminal alone.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
        }
    }

    fn attributes() -> Option<libc::termios> {
        // SAFETY: fills in the structure it is given, for which all zeros is a value, and says whether it did.
        unsafe {
            let mut state: libc::termios = std::mem::zeroed();
            (libc::tcgetattr(libc::STDIN_FILENO, &raw mut state) == 0).then_some(state)
        }
    }

    fn change(edit: impl Fn(&mut libc::termios)) {
        let Some(mut state) = attributes() else {
            return;
        };
        let before = (state.c_lflag, state.c_iflag, state.c_oflag, state.c_cflag);
        edit(&mut state);
        if before != (state.c_lflag, state.c_iflag, state.c_oflag, state.c_cflag) {
            // SAFETY: as above.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const state) };
        }
    }

    fn write(descriptor: i32, bytes: &[u8]) {
        // SAFETY: the buffer has the length that is given. A terminal that is gone wants no answer.
        unsafe { libc::write(descriptor, bytes.as_ptr().cast(), bytes.len()) };
    }
}

/// Writes `text` to stderr and ends the process, by system calls alone.
#[cfg(unix)]
pub(crate) fn end_with(text: &[u8]) -> ! {
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

/// The exit code of a process that ended so: the one of any other error.
pub const EXIT_CODE: i32 = 1;

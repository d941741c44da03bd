//! Ctrl-C and SIGTERM: finish the step, save, leave; a second one leaves at once.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Which signal asked the run to stop, if one did.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicI32>);

impl StopFlag {
    /// The signal's number.
    pub fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|s| *s != 0)
    }

    /// Asks the run to stop as if by `signal`.
    pub fn raise(&self, signal: i32) {
        self.0.store(signal, Ordering::SeqCst);
    }
}

/// Listens as long as it lives.
pub struct Listener {
    handle: Handle,
}

impl Listener {
    /// Starts listening for SIGINT and SIGTERM.
    ///
    /// # Errors
    /// When the system refuses the handlers.
    pub fn start(flag: StopFlag) -> std::io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let handle = signals.handle();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    if flag.signal().is_some() {
                        leave_dashboard();
                        std::process::exit(128 + signal);
                    }
                    flag.raise(signal);
                }
            })?;
        Ok(Self { handle })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Leaves the alternate screen and shows the cursor, for the exit that cannot wait for the
/// dashboard to do so itself.
fn leave_dashboard() {
    let mut out = std::io::stdout();
    if std::io::IsTerminal::is_terminal(&out) {
        let _ = out.write_all(b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1049l\x1b[?25h");
        let _ = out.flush();
        #[cfg(unix)]
        terminal::cooked();
    }
}

/// Lets Ctrl-C be a signal again while the dashboard has the terminal in raw mode, in which it
/// would be a key that nothing listens to. Does nothing without a terminal.
pub fn keep_ctrl_c() {
    #[cfg(unix)]
    terminal::keep_signals();
}

#[cfg(unix)]
mod terminal {
    fn change(edit: impl Fn(&mut libc::termios)) {
        // SAFETY: termios is plain data for which all zeros is a value; the calls get a valid
        // descriptor number and a pointer to it, and their failure leaves the terminal alone.
        unsafe {
            let mut state: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(libc::STDIN_FILENO, &raw mut state) == 0 {
                let before = (state.c_lflag, state.c_iflag, state.c_oflag);
                edit(&mut state);
                if before != (state.c_lflag, state.c_iflag, state.c_oflag) {
                    libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const state);
                }
            }
        }
    }

    pub(super) fn keep_signals() {
        change(|s| s.c_lflag |= libc::ISIG);
    }

    pub(super) fn cooked() {
        change(|s| {
            s.c_lflag |= libc::ISIG | libc::ICANON | libc::ECHO | libc::IEXTEN;
            s.c_iflag |= libc::ICRNL;
            s.c_oflag |= libc::OPOST;
        });
    }
}

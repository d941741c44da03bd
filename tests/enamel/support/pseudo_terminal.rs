//! A terminal of the tests' own: `enamel` runs in it as in a window, and what it draws can be read.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A process with a terminal of 100 columns and 30 rows.
pub struct InTerminal {
    pub child: Child,
    /// Kept open, so that the terminal's state can be asked when the process is gone.
    slave: OwnedFd,
    drawn: Arc<Mutex<Vec<u8>>>,
}

impl InTerminal {
    pub fn start(mut command: Command) -> Self {
        let (mut master, mut slave) = (0, 0);
        let mut size = libc::winsize {
            ws_row: 30,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: fills in two descriptors, which are ours from then on.
        let (master, slave) = unsafe {
            let null = std::ptr::null_mut();
            let opened = libc::openpty(
                &raw mut master,
                &raw mut slave,
                null,
                null.cast(),
                &raw mut size,
            );
            assert_eq!(opened, 0, "a pseudo terminal");
            (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
        };
        let end = || slave.try_clone().expect("a descriptor");
        command.stdin(end()).stdout(end()).stderr(end());
        command.env("TERM", "xterm-256color");
        // SAFETY: system calls only, between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                }
            });
        }
        let child = command.spawn().expect("the binary runs");
        drop(command);
        let drawn = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&drawn);
        std::thread::spawn(move || {
            let mut master = File::from(master);
            let mut buffer = [0; 4096];
            while let Ok(n) = master.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&buffer[..n]);
            }
        });
        Self {
            child,
            slave,
            drawn,
        }
    }

    /// Everything that was drawn so far.
    pub fn drawn(&self) -> String {
        let drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&drawn).into_owned()
    }

    /// Waits until `text` has been drawn behind the first `from` bytes.
    pub fn wait_for(&self, text: &str, from: usize) {
        let started = Instant::now();
        while !self.drawn().get(from..).is_some_and(|d| d.contains(text)) {
            if started.elapsed() > Duration::from_secs(60) {
                let drawn = self.drawn();
                let end = drawn.len().saturating_sub(500);
                let end = String::from_utf8_lossy(&drawn.as_bytes()[end..]).into_owned();
                panic!("{text:?} was not drawn; at the end: {end:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        // SAFETY: a signal to a child of ours that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "kill -{signal}");
    }

    /// Waits until the process has been stopped, as by Ctrl-Z.
    pub fn wait_until_stopped(&self) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        let mut status = 0;
        // SAFETY: waits for a child of ours; a stopped one stays one.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) };
        assert!(
            waited == pid && libc::WIFSTOPPED(status),
            "it did not stop: {status}"
        );
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("a child of ours")
    }

    /// Whether lines are edited and echoed, as a shell expects it.
    pub fn is_cooked(&self) -> bool {
        // SAFETY: fills in the structure, for which all zeros is a value.
        let state = unsafe {
            let mut state: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut state), 0);
            state
        };
        let lines = libc::ICANON | libc::ECHO | libc::ISIG;
        state.c_lflag & lines == lines && state.c_oflag & libc::OPOST != 0
    }

    /// Whether what was drawn leaves the main screen, a cursor and a mouse that tells nothing.
    pub fn is_left(&self) -> bool {
        let drawn = self.drawn();
        let last = |on: &str, off: &str| drawn.rfind(off) > drawn.rfind(on);
        last("\x1b[?1049h", "\x1b[?1049l")
            && last("\x1b[?25l", "\x1b[?25h")
            && last("\x1b[?1000h", "\x1b[?1000l")
            && last("\x1b[?1006h", "\x1b[?1006l")
    }
}

impl Drop for InTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! What a run does when the system tells it something: Ctrl-C and SIGTERM stop it, so does a terminal that is
//! closed (SIGHUP); Ctrl-Z and Ctrl-\ find the terminal as it was before the dashboard; a file that is cut short
//! while it is read ends the program with a word ([`faults`]).
//!
//! While steps are done, the first signal lets the step end, saves and leaves. Before the first step there is
//! nothing to save, and after the last one everything is saved: there the first signal leaves at once, whatever
//! is being hashed, loaded, answered or written. A second one always does. What is not finished then is removed.

use std::io::Write;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use enamel_adapter::staging;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

pub mod faults;
pub mod terminal;

/// What a run is at, which decides what the first signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Something other than a run, which writes whole files or none.
    Outside,
    /// Nothing is trained yet: hashing, loading, answers of the base.
    Before,
    /// Steps are done, and what they came to is saved now and then.
    Steps,
    /// The last step is saved: writing the adapter, answers, the report.
    After,
}

impl Phase {
    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Before,
            1 => Self::Steps,
            2 => Self::After,
            _ => Self::Outside,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Before => 0,
            Self::Steps => 1,
            Self::After => 2,
            Self::Outside => 3,
        }
    }

    /// What a person reads who has stopped the run here.
    fn farewell(self) -> Option<&'static str> {
        Some(match self {
            Self::Outside => return None,
            Self::Before => "before its first step: nothing was trained",
            Self::Steps => {
                "without waiting for the step to end: go on from the newest checkpoint with --resume"
            }
            Self::After => "after its last step, which is saved: --resume hands the result over",
        })
    }
}

/// Which signal asked the run to stop, if one did, and what the run is at.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<Shared>);

#[derive(Default)]
struct Shared {
    signal: AtomicI32,
    phase: AtomicU8,
    farewell: Mutex<Option<Farewell>>,
}

/// What is done before the program leaves at once.
type Farewell = Box<dyn Fn() + Send>;

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "signal {:?} in {:?}", self.signal, self.phase)
    }
}

impl StopFlag {
    /// The signal's number.
    pub fn signal(&self) -> Option<i32> {
        Some(self.0.signal.load(Ordering::SeqCst)).filter(|s| *s != 0)
    }

    /// Asks the run to stop as if by `signal`.
    pub fn raise(&self, signal: i32) {
        self.0.signal.store(signal, Ordering::SeqCst);
    }

    /// Has this done before a signal ends the program at once: quickly, and whatever the run is at.
    pub fn on_leaving(&self, farewell: impl Fn() + Send + 'static) {
        let mut slot = self.0.farewell.lock();
        *slot.as_deref_mut().unwrap_or(&mut None) = Some(Box::new(farewell));
    }

    fn leave(&self) {
        if let Ok(Some(farewell)) = self.0.farewell.lock().as_deref() {
            farewell();
        }
    }

    /// What the run is at.
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.0.phase.load(Ordering::SeqCst))
    }

    /// Says what the run is at from now on.
    pub fn enter(&self, phase: Phase) {
        self.0.phase.store(phase.number(), Ordering::SeqCst);
    }
}

/// Listens as long as it lives.
pub struct Listener {
    handle: Handle,
}

impl Listener {
    /// Starts listening: for what stops a run (SIGINT, SIGTERM, and SIGHUP unless the program was started under
    /// `nohup`), and for what takes the terminal away from it (SIGQUIT, SIGTSTP) or gives it back (SIGCONT).
    ///
    /// # Errors
    /// When the system refuses the handlers.
    pub fn start(flag: StopFlag) -> std::io::Result<Self> {
        let mut wanted = vec![SIGINT, SIGTERM];
        #[cfg(unix)]
        {
            use signal_hook::consts::{SIGCONT, SIGHUP, SIGQUIT, SIGTSTP};
            wanted.extend([SIGQUIT, SIGTSTP, SIGCONT]);
            if !terminal::is_ignored(SIGHUP) {
                wanted.push(SIGHUP);
            }
        }
        let mut signals = Signals::new(wanted)?;
        let handle = signals.handle();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    take(signal, &flag);
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

fn take(signal: i32, flag: &StopFlag) {
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGCONT, SIGQUIT, SIGTSTP};
        use signal_hook::low_level::emulate_default_handler;
        match signal {
            SIGQUIT | SIGTSTP => {
                terminal::leave();
                // What it would have done without us: a core dump, or a stop until SIGCONT.
                let _ = emulate_default_handler(signal);
                return;
            }
            SIGCONT => return terminal::come_back(),
            _ => {}
        }
    }
    let phase = flag.phase();
    if flag.signal().is_none() && phase == Phase::Steps {
        flag.raise(signal);
        if !terminal::has_dashboard() {
            say("stopping after this step; once more leaves at once");
        }
        return;
    }
    terminal::leave();
    flag.leave();
    if let Some(farewell) = phase.farewell() {
        say(&format!("stopped {farewell}"));
    }
    staging::abandon();
    std::process::exit(128 + signal);
}

/// Tells the person at the terminal, if one is left.
#[allow(
    clippy::disallowed_methods,
    reason = "a line of our own, on a thread that has no other way out"
)]
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_begins_before_its_first_step() {
        let flag = StopFlag::default();
        assert_eq!((flag.phase(), flag.signal()), (Phase::Before, None));
        for phase in [Phase::Steps, Phase::After, Phase::Outside, Phase::Before] {
            flag.enter(phase);
            assert_eq!(flag.clone().phase(), phase);
        }
    }

    #[test]
    fn in_between_steps_the_first_signal_only_asks() {
        let flag = StopFlag::default();
        flag.enter(Phase::Steps);
        take(SIGTERM, &flag);
        assert_eq!(flag.signal(), Some(SIGTERM));
    }
}

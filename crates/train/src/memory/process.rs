//! Memory of this process, as the system counts it.

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Watches the resident set of this process.
pub struct Memory {
    system: System,
    pid: Option<Pid>,
    peak: u64,
}

impl Memory {
    /// Starts watching.
    pub fn new() -> Self {
        Self {
            system: System::new(),
            pid: sysinfo::get_current_pid().ok(),
            peak: 0,
        }
    }

    /// Resident bytes now; 0 where the system does not tell.
    pub fn resident(&mut self) -> u64 {
        let Some(pid) = self.pid else { return 0 };
        self.system.refresh_processes_specifics(
            ProcessesToUpdate::Some(&[pid]),
            false,
            ProcessRefreshKind::nothing().with_memory(),
        );
        let now = self.system.process(pid).map_or(0, sysinfo::Process::memory);
        self.peak = self.peak.max(now);
        now
    }

    /// Most bytes resident so far: the kernel's own mark where there is one (Linux), else the
    /// largest value that [`Memory::resident`] has seen.
    pub fn peak(&self) -> u64 {
        kernel_peak().unwrap_or(self.peak)
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

fn kernel_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Page faults of this process so far, those that read a file included.
#[cfg(unix)]
pub fn page_faults() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: fills in the structure it is given, and says whether it did.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    u64::try_from(usage.ru_minflt + usage.ru_majflt).ok()
}

/// Page faults of this process so far: this system does not tell.
#[cfg(not(unix))]
pub fn page_faults() -> Option<u64> {
    None
}

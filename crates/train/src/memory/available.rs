//! How much memory a run may take on its device.

use sysinfo::System;

use super::Kind;
use crate::device;
use crate::memory::process::Memory;

/// Memory that is there for a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may be taken, those that this process holds already included.
    pub bytes: usize,
    /// What says so.
    pub source: String,
}

/// What a device called `name` has for this process: on the processor the smallest of what the system can
/// give, what its control group leaves and `ulimit -v`; on a graphics processor all it has. `None` where
/// nobody tells.
pub fn room(kind: Kind, name: &str) -> Option<Room> {
    if kind == Kind::Gpu {
        let device = device::list().into_iter().find(|d| d.name == name)?;
        return Some(Room {
            bytes: usize::try_from(device.memory?).ok()?,
            source: format!("memory of {name}"),
        });
    }
    let mut system = System::new();
    system.refresh_memory();
    let own = Memory::new().resident();
    let plus_own = |free: u64| usize::try_from(free.saturating_add(own)).unwrap_or(usize::MAX);
    let available = system.available_memory();
    let mut all = Vec::new();
    if available > 0 {
        all.push((plus_own(available), "available memory"));
    }
    if let Some(group) = system.cgroup_limits() {
        // What files fill can be given back; what processes hold cannot.
        let left = group.total_memory.saturating_sub(group.rss);
        if group.total_memory < system.total_memory() {
            all.push((plus_own(left), "left by the control group's limit"));
        }
    }
    if let Some(limit) = address_space() {
        all.push((limit, "ulimit -v"));
    }
    let (bytes, source) = all.into_iter().min()?;
    Some(Room {
        bytes,
        source: source.to_owned(),
    })
}

/// The limit of the address space, if there is one.
#[cfg(unix)]
fn address_space() -> Option<usize> {
    let mut limit = std::mem::MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: fills in the structure it is given, and says whether it did.
    let limit = unsafe {
        if libc::getrlimit(libc::RLIMIT_AS, limit.as_mut_ptr()) != 0 {
            return None;
        }
        limit.assume_init()
    };
    match limit.rlim_cur == libc::RLIM_INFINITY {
        true => None,
        false => usize::try_from(limit.rlim_cur).ok(),
    }
}

#[cfg(not(unix))]
fn address_space() -> Option<usize> {
    None
}

//! Runs: their directory, their checkpoints, signals, full disks, memory.

pub(crate) mod checkpoints;
pub(crate) mod directory;
#[cfg(unix)]
pub(crate) mod disk_full;
pub(crate) mod gradient_checkpointing;
pub(crate) mod memory;
#[cfg(unix)]
pub(crate) mod signals;

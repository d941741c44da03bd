//! Counts that a worker shares with its supervisor, in a mapped file: they outlive a worker that dies.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Result;
use memmap2::MmapRaw;

/// What is counted.
#[derive(Clone, Copy)]
pub enum Count {
    /// The number of the input that is being read.
    Current,
    Inputs,
    Accepted,
    Panics,
    /// Inputs that took more memory than they may.
    Memory,
    /// The most bytes that an input took beyond twice its own.
    Peak,
    /// Whether memory was refused.
    Refused,
    /// Seconds of the slowest input, in microseconds.
    Slowest,
}

const COUNTS: usize = 8;

pub struct State(MmapRaw);

impl State {
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len((COUNTS * 8) as u64)?;
        Ok(Self(MmapRaw::map_raw(&file)?))
    }

    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self(MmapRaw::map_raw(&file)?))
    }

    /// The number itself.
    pub fn cell(&self, count: Count) -> &AtomicU64 {
        // SAFETY: the mapping holds COUNTS aligned numbers, lives as long as `self`, and is written through
        // atomics alone, in both processes.
        unsafe { &*self.0.as_ptr().cast::<AtomicU64>().add(count as usize) }
    }

    pub fn get(&self, count: Count) -> u64 {
        self.cell(count).load(Relaxed)
    }

    pub fn set(&self, count: Count, value: u64) {
        self.cell(count).store(value, Relaxed);
    }

    pub fn add(&self, count: Count) {
        self.set(count, self.get(count) + 1);
    }

    pub fn raise(&self, count: Count, value: u64) {
        if value > self.get(count) {
            self.set(count, value);
        }
    }
}

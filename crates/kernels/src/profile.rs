//! Where the time of a step goes: per operation, its calls, seconds, bytes and floating-point operations.
//!
//! Off unless [`start`] was called; an operation then pays one atomic load.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What one operation took, over all its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// How often it ran.
    pub calls: u64,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// Floating-point operations, a multiplication with its addition counted as two.
    pub flops: u64,
    /// Bytes of operands and results, each counted once.
    pub bytes: u64,
}

/// Totals by operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// Operations, forward and backward apart.
    pub ops: BTreeMap<&'static str, Totals>,
    /// Matrix products, which are inside operations.
    pub products: BTreeMap<&'static str, Totals>,
    /// Calls that no kernel of the device took, by operation and reason.
    pub fallbacks: BTreeMap<(&'static str, String), u64>,
}

static ON: AtomicBool = AtomicBool::new(false);
static PROFILE: Mutex<Profile> = Mutex::new(Profile {
    ops: BTreeMap::new(),
    products: BTreeMap::new(),
    fallbacks: BTreeMap::new(),
});

fn profile() -> MutexGuard<'static, Profile> {
    PROFILE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts over and counts from here on.
pub fn start() {
    *profile() = Profile::default();
    ON.store(true, Ordering::Relaxed);
}

/// Stops counting and hands out what was counted.
pub fn stop() -> Profile {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut *profile())
}

/// A running measurement; it ends when dropped.
#[must_use]
pub(crate) struct Timer(Option<Running>);

struct Running {
    name: &'static str,
    product: bool,
    flops: usize,
    bytes: usize,
    started: Instant,
}

/// Measures an operation until the result is dropped.
pub(crate) fn op(name: &'static str, flops: usize, bytes: usize) -> Timer {
    timer(name, false, flops, bytes)
}

/// Measures a matrix product, part of an operation, until the result is dropped.
pub(crate) fn product(name: &'static str, flops: usize, bytes: usize) -> Timer {
    timer(name, true, flops, bytes)
}

fn timer(name: &'static str, product: bool, flops: usize, bytes: usize) -> Timer {
    Timer(ON.load(Ordering::Relaxed).then(|| Running {
        name,
        product,
        flops,
        bytes,
        started: Instant::now(),
    }))
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(run) = self.0.take() else { return };
        let seconds = run.started.elapsed().as_secs_f64();
        let mut profile = profile();
        let table = if run.product {
            &mut profile.products
        } else {
            &mut profile.ops
        };
        let totals = table.entry(run.name).or_default();
        totals.calls += 1;
        totals.seconds += seconds;
        totals.flops += run.flops as u64;
        totals.bytes += run.bytes as u64;
    }
}

/// Notes that an operation went to the reference although the tensors are on a CPU.
pub(crate) fn fallback(op: &'static str, reason: impl FnOnce() -> String) {
    if ON.load(Ordering::Relaxed) {
        *profile().fallbacks.entry((op, reason())).or_default() += 1;
    }
}

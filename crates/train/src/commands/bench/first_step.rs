//! From the start of the process to the end of its first optimizer step.

use std::sync::OnceLock;
use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

use super::{BenchOptions, Lane, item};
use crate::base::OpenBase;
use crate::error::TrainError;
use crate::memory::process::Memory;

/// When each part of the first step was done, in seconds since the process began.
#[derive(Clone, Debug, Serialize)]
pub struct FirstStep {
    /// The method.
    pub method: String,
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub tokens: usize,
    /// The model's files are open and its tokenizer is made.
    pub opened: f64,
    /// The weights are on the device.
    pub loaded: f64,
    /// The adapter is attached.
    pub attached: f64,
    /// The first optimizer step is finished.
    pub seconds: f64,
    /// Most resident memory so far, in bytes.
    pub peak_memory: u64,
}

/// Rows and tokens of the first step.
const SHAPE: (usize, usize) = (1, 128);

static STARTED: OnceLock<Instant> = OnceLock::new();

/// Notes that the process has begun; for systems that do not tell.
pub fn note_start() {
    STARTED.get_or_init(Instant::now);
}

/// Loads, attaches the first method and takes one step.
pub fn first_step(
    base: OpenBase,
    device: &Device,
    options: &BenchOptions,
) -> Result<FirstStep, TrainError> {
    let opened = since_start();
    let vocabulary = base.config.vocab_size;
    let model = base.weights(device, &options.loading())?;
    let loaded = since_start();
    let method = options.methods.first().map_or("lora", String::as_str);
    let mut lane = Lane::new(model, method, options, device)?;
    let attached = since_start();
    let (rows, tokens) = SHAPE;
    lane.step(item(1, rows, tokens, vocabulary), device)?;
    Ok(FirstStep {
        method: method.to_owned(),
        rows,
        tokens,
        opened,
        loaded,
        attached,
        seconds: since_start(),
        peak_memory: Memory::new().peak(),
    })
}

/// Seconds since the process began: by the system's record of it, else since [`note_start`].
fn since_start() -> f64 {
    let noted = STARTED.get().map_or(0.0, |at| at.elapsed().as_secs_f64());
    age().filter(|age| *age >= noted - TICK).unwrap_or(noted)
}

/// The record's resolution on every usual kernel; a process cannot be younger than what it noted.
const TICK: f64 = 0.01;

#[cfg(target_os = "linux")]
fn age() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // SAFETY: asks for a number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills in the structure it is given.
    if ticks <= 0 || unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) } != 0 {
        return None;
    }
    let now = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
    Some(now - start_ticks(&stat)? as f64 / ticks as f64)
}

#[cfg(not(target_os = "linux"))]
fn age() -> Option<f64> {
    None
}

/// Field 22 of `/proc/PID/stat` (proc(5)): ticks from the system's start to the process's. Field 2 is a
/// name in brackets that may hold anything.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let rest = "S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 4711 21";
        assert_eq!(start_ticks(&format!("1 (a) b) (c) {rest}")), Some(4711));
        assert_eq!(start_ticks("1 (a) S 2"), None);
        assert_eq!(start_ticks(""), None);
    }

    #[test]
    fn time_since_the_start_grows_and_is_no_less_than_was_noted() {
        note_start();
        let before = since_start();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let after = since_start();
        assert!(after >= before + 0.01, "{before} {after}");
        assert!(after >= 0.03 - TICK);
    }
}

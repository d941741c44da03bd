//! One process that reads one input after the other, and says in shared memory which.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::allocator;
use crate::folder::{Folder, Input};
use crate::random::Random;
use crate::readers::{self, Reader};
use crate::state::{Count, State};

/// What a reader may take beyond twice its input.
pub const MEMORY: usize = 500 << 20;

/// What to read.
#[derive(Clone, clap::Args)]
pub struct Work {
    /// The reader's name.
    pub reader: String,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The first input's number.
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// How far apart the numbers are.
    #[arg(long, default_value_t = 1)]
    pub step: u64,
    /// The number to stop before.
    #[arg(long, default_value_t = u64::MAX)]
    pub until: u64,
    /// Seconds after which to stop.
    #[arg(long, default_value_t = f64::MAX)]
    pub seconds: f64,
    /// Where the files of an input go.
    #[arg(long)]
    pub folder: PathBuf,
    /// Where inputs that failed are kept.
    #[arg(long)]
    pub failures: PathBuf,
    /// The file with the counts.
    #[arg(long)]
    pub state: PathBuf,
}

impl Work {
    /// Where a failing input is kept.
    pub fn kept(&self, number: u64) -> PathBuf {
        let name = format!("{}-{}-{number}", self.reader, self.seed);
        self.failures.join(name)
    }
}

/// Where the last panic was, and what it said.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Notes panics instead of printing them.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string);
        let said = info.payload_as_str().unwrap_or("(no text)");
        let text = format!("{}: {said}", place.unwrap_or_default());
        if let Ok(mut last) = PANIC.lock() {
            *last = Some(text);
        }
    }));
}

/// How reading an input ended.
pub enum Ending {
    Read { accepted: bool },
    Panicked(String),
}

/// Reads one input.
///
/// # Errors
/// Where the harness itself fails: files that cannot be written.
pub fn read(reader: &mut dyn Reader, input: &Input, folder: &mut Folder) -> Result<Ending> {
    match catch_unwind(AssertUnwindSafe(|| reader.read(input, folder))) {
        Ok(accepted) => Ok(Ending::Read {
            accepted: accepted?,
        }),
        Err(_) => {
            let said = PANIC.lock().ok().and_then(|mut last| last.take());
            Ok(Ending::Panicked(said.unwrap_or_default()))
        }
    }
}

/// A folder that is there.
pub fn folder(path: &Path) -> Result<Folder> {
    std::fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    Ok(Folder::new(path))
}

/// Bytes in use between two inputs at which a worker ends and another goes on. The tokenizers library keeps a
/// cache for each tokenizer that a thread has used, which is little for a program and much for ten million.
const ENOUGH: usize = 1 << 30;

/// The exit code of a worker that ended so.
pub const HANDS_OVER: u8 = 75;

/// Reads all inputs of `work`; false where some are left for another worker.
pub fn run(work: &Work) -> Result<bool> {
    let state: &'static State = Box::leak(Box::new(State::open(&work.state)?));
    allocator::note_refusals_in(state.cell(Count::Refused));
    note_panics();
    let mut folder = folder(&work.folder)?;
    let mut reader = readers::find(&work.reader)?(&mut folder)?;
    let end = Instant::now() + Duration::from_secs_f64(work.seconds.min(1e9));
    let mut number = work.from;
    let mut now = Instant::now();
    while number < work.until && now < end {
        state.set(Count::Current, number);
        let input = reader.input(&mut Random::of_input(work.seed, number));
        let before = allocator::begin();
        let ending = read(reader.as_mut(), &input, &mut folder)
            .with_context(|| format!("input {number} of {}", work.reader))?;
        let taken = allocator::peak().saturating_sub(before);
        let beyond = taken.saturating_sub(2 * input.bytes());
        state.raise(Count::Peak, beyond as u64);
        state.add(Count::Inputs);
        match ending {
            Ending::Read { accepted: true } => state.add(Count::Accepted),
            Ending::Read { accepted: false } => {}
            Ending::Panicked(said) => {
                state.add(Count::Panics);
                if state.get(Count::Panics) <= 50 {
                    eprintln!("{} {number}: panic at {said}", work.reader);
                    input.keep(&work.kept(number))?;
                }
            }
        }
        if beyond > MEMORY {
            state.add(Count::Memory);
            eprintln!("{} {number}: {taken} bytes", work.reader);
            input.keep(&work.kept(number))?;
        }
        let then = now;
        now = Instant::now();
        state.raise(Count::Slowest, (now - then).as_micros() as u64);
        number += work.step;
        if allocator::in_use() > ENOUGH {
            return Ok(number >= work.until);
        }
    }
    Ok(true)
}

//! What a rendering may use: steps, bytes held at once, levels of nesting.
//!
//! A template comes with a downloaded model, so it is as trustworthy as the model's author. The meter
//! belongs to the thread that renders, and so do all values: what they hold is counted when they are
//! made and given back when they are dropped.

use std::cell::Cell;

use super::error::{Error, Kind, Result};

/// The longest template source, in bytes. Published ones have up to 30 KB.
pub(crate) const SOURCE_BYTES: usize = 256 * 1024;
/// How deep expressions nest; Jinja2 ends at 200 too (CPython's parentheses).
pub(crate) const EXPRESSION_DEPTH: u32 = 200;
/// How deep blocks nest; Jinja2 ends at 100 (CPython's indentation).
pub(crate) const BLOCK_DEPTH: u32 = 100;
/// How deep lists and dictionaries nest.
pub(crate) const VALUE_DEPTH: u32 = 256;
/// How deep macros and recursive loops call each other; Jinja2 ends near 200.
pub(crate) const CALL_DEPTH: u32 = 200;
/// The longest `range`, as in Jinja2's sandbox.
pub(crate) const RANGE_ITEMS: i128 = 100_000;

/// Bytes of work that cost as much as one step.
const BYTES_PER_STEP: usize = 64;
/// Characters that are as much work as one step where each is looked at.
const CHARACTERS_PER_STEP: usize = 16;
/// What adding to a text costs besides the bytes added.
const PUSH_BYTES: usize = 8;

/// The budget of one rendering.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Steps: about one for each operation, item or 64 bytes of text.
    pub(crate) steps: u64,
    /// Bytes all values may hold at once.
    pub(crate) bytes: usize,
    /// Bytes of the rendered text.
    pub(crate) output: usize,
}

impl Limits {
    /// The budget for an input (conversation, tools, arguments) of `bytes`: what every template may
    /// use, and a multiple of what it was given.
    pub(crate) fn for_input(bytes: usize) -> Self {
        Self {
            steps: 10_000_000_u64.saturating_add((bytes as u64).saturating_mul(20)),
            bytes: (48_usize << 20_u32).saturating_add(bytes.saturating_mul(32)),
            output: (16_usize << 20_u32).saturating_add(bytes.saturating_mul(8)),
        }
    }
}

thread_local! {
    static STEPS_LEFT: Cell<u64> = const { Cell::new(0) };
    static STEPS: Cell<u64> = const { Cell::new(0) };
    static HELD: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Starts this thread's meter for one rendering.
pub(crate) fn start(limits: Limits) {
    STEPS.set(limits.steps);
    STEPS_LEFT.set(limits.steps);
    BYTES.set(limits.bytes);
    HELD.set(0);
}

fn out_of_steps() -> Error {
    let steps = STEPS.get();
    Error::new(
        Kind::Budget,
        format!(
            "the template took more than {steps} steps, the most for a conversation of this size"
        ),
    )
}

/// Counts `steps`.
///
/// # Errors
/// Where there are none left.
pub(crate) fn spend(steps: u64) -> Result<()> {
    match STEPS_LEFT.get().checked_sub(steps) {
        Some(left) => {
            STEPS_LEFT.set(left);
            Ok(())
        }
        None => Err(out_of_steps()),
    }
}

/// Counts the work of reading or copying `bytes`.
pub(crate) fn spend_bytes(bytes: usize) -> Result<()> {
    spend((bytes / BYTES_PER_STEP) as u64)
}

/// Counts the work of looking at each character of `bytes` of text.
pub(crate) fn spend_characters(bytes: usize) -> Result<()> {
    spend((bytes / CHARACTERS_PER_STEP) as u64)
}

/// Bytes counted as held until this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Held(usize);

impl Held {
    /// Counts `bytes` more, before they are allocated.
    ///
    /// # Errors
    /// Where all values together would hold too much.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<()> {
        let (held, limit) = (HELD.get(), BYTES.get());
        let wanted = held.saturating_add(bytes);
        if wanted > limit {
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "the template wants {} MiB of memory, more than the {} MiB for a conversation of this size",
                    wanted >> 20_u32,
                    limit >> 20_u32
                ),
            ));
        }
        HELD.set(wanted);
        self.0 = self.0.saturating_add(bytes);
        spend_bytes(bytes)
    }

    /// `bytes` counted as held.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let mut held = Self(0);
        held.grow(bytes)?;
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.set(HELD.get().saturating_sub(self.0));
    }
}

/// Text under construction, counted as it grows.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    text: String,
    held: Held,
    /// Bytes of work not yet counted as steps.
    uncounted: usize,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn len(&self) -> usize {
        self.text.len()
    }

    pub(crate) fn push_str(&mut self, text: &str) -> Result<()> {
        let wanted = self.text.len().saturating_add(text.len());
        if wanted > self.text.capacity() {
            let capacity = wanted.max(self.text.capacity().saturating_mul(2)).max(64);
            self.held
                .grow(capacity.saturating_sub(self.text.capacity()))?;
            self.text
                .reserve_exact(capacity.saturating_sub(self.text.len()));
        }
        self.text.push_str(text);
        let work = self
            .uncounted
            .saturating_add(text.len())
            .saturating_add(PUSH_BYTES);
        if work < BYTES_PER_STEP {
            self.uncounted = work;
            return Ok(());
        }
        self.uncounted = 0;
        spend_bytes(work)
    }

    pub(crate) fn push(&mut self, c: char) -> Result<()> {
        self.push_str(c.encode_utf8(&mut [0; 4]))
    }

    /// `text`, `times` over.
    pub(crate) fn push_repeated(&mut self, text: &str, times: usize) -> Result<()> {
        let bytes = text.len().saturating_mul(times);
        // Asked for before the first is written, so that an absurd count costs nothing.
        drop(Held::new(bytes)?);
        for _ in 0..times {
            self.push_str(text)?;
        }
        Ok(())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// The text and what it holds.
    pub(crate) fn finish(self) -> (String, Held) {
        (self.text, self.held)
    }
}

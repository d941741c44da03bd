//! `enamel plan --fit`: which settings bring a run into so much memory.
//!
//! The cheap ones first: gradient checkpointing costs time alone, and a smaller batch with as many more forward
//! passes a step changes nothing but speed; an optimizer or base in fewer bits changes numbers; shorter rows
//! lose data.

use std::fmt;
use std::num::NonZeroUsize;

use enamel_kernels::quantized::formats::{FloatKind, FourBit};
use enamel_model::{Format, Quantization};

use super::{Footprint, ModelSizes, Settings, estimate};
use crate::optimizer::Optim;

/// Shortest `max_length` that is proposed.
const SHORTEST: usize = 64;

/// NF4 with double quantisation.
const NF4: Format = Format::FourBit {
    kind: FourBit::Nf4,
    block: 64,
    double: true,
    compute: FloatKind::F32,
};

/// One setting to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The recipe's table.
    pub table: &'static str,
    /// The line in it.
    pub line: String,
}

/// Settings that may fit, and what they take.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// Bytes there are.
    pub room: usize,
    /// What to change; empty if the settings fit as they are.
    pub changes: Vec<Change>,
    /// The settings with the changes.
    pub settings: Settings,
    /// What they take.
    pub footprint: Footprint,
}

impl Proposal {
    /// Whether the changes are enough.
    pub fn fits(&self) -> bool {
        self.footprint.peak() <= self.room
    }
}

/// The first settings, in the order above, under which training takes at most `room` bytes; those that take
/// the least where none do.
pub fn fit(model: &ModelSizes, settings: &Settings, room: usize) -> Proposal {
    let fits = |settings: &Settings| estimate(model, settings).peak() <= room;
    let mut now = settings.clone();
    if !fits(&now) && now.every.is_none() {
        now.every = Some(NonZeroUsize::MIN);
    }
    let rows_a_step = settings.batch * settings.accumulation;
    // Batches that divide the step's rows, the largest first.
    let batches: Vec<usize> = (1..=settings.batch)
        .rev()
        .filter(|n| rows_a_step.is_multiple_of(*n))
        .collect();
    let with_batch = |settings: &Settings, batch: usize| Settings {
        batch,
        accumulation: rows_a_step / batch,
        ..settings.clone()
    };
    // The largest batch that fits, or the smallest there is.
    let largest = |settings: &Settings| {
        let mut all = batches.iter().map(|batch| with_batch(settings, *batch));
        all.clone()
            .find(|s| fits(s))
            .or(all.next_back())
            .unwrap_or_else(|| settings.clone())
    };
    now = largest(&now);
    for optim in [Optim::Adamw8bit, Optim::PagedAdamw8bit] {
        if !fits(&now) && settings.optim == Optim::AdamwTorch {
            now = largest(&Settings { optim, ..now });
        }
    }
    let dense = now.quantization.format.is_none() && model.packed.is_empty();
    if !fits(&now) && dense && !model.trains_base() {
        now.quantization = Quantization {
            format: Some(NF4),
            dequantize: false,
            ..now.quantization
        };
        // What that leaves may make other changes needless.
        now = largest(&now);
        let optims = [settings.optim, Optim::Adamw8bit, Optim::PagedAdamw8bit];
        let dearer = optims.into_iter().map(|optim| {
            largest(&Settings {
                optim,
                ..now.clone()
            })
        });
        let batch = now.batch;
        now = dearer
            .into_iter()
            .find(|s| fits(s) && s.batch == batch)
            .unwrap_or(now);
    }
    while !fits(&now) && now.length / 2 >= SHORTEST {
        now.length /= 2;
    }
    Proposal {
        room,
        changes: changes(settings, &now),
        footprint: estimate(model, &now),
        settings: now,
    }
}

fn changes(from: &Settings, to: &Settings) -> Vec<Change> {
    let mut all = Vec::new();
    let mut say = |differs: bool, table, line: String| {
        if differs {
            all.push(Change { table, line });
        }
    };
    let quantised = from.quantization != to.quantization;
    say(
        quantised,
        "model.quantization",
        "load_in_4bit = true".to_owned(),
    );
    say(
        quantised,
        "model.quantization",
        "bnb_4bit_use_double_quant = true".to_owned(),
    );
    let length = format!("max_length = {}", to.length);
    say(from.length != to.length, "data", length);
    let checkpointing = "gradient_checkpointing = true".to_owned();
    say(from.every != to.every, "train", checkpointing);
    let batch = format!("batch_size = {}", to.batch);
    say(from.batch != to.batch, "train", batch);
    let passes = format!("gradient_accumulation_steps = {}", to.accumulation);
    say(from.accumulation != to.accumulation, "train", passes);
    let optim = format!("optim = \"{}\"", to.optim.name());
    say(from.optim != to.optim, "train", optim);
    all
}

impl fmt::Display for Proposal {
    /// The recipe's lines to change, table by table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = "";
        for (i, change) in self.changes.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            if change.table != table {
                writeln!(f, "[{}]", change.table)?;
                table = change.table;
            }
            write!(f, "{}", change.line)?;
        }
        Ok(())
    }
}

/// An amount of memory as a person writes it: `12GB`, `8GiB`, `600M`, a plain number for bytes.
///
/// # Errors
/// What it should look like.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    let wrong = || format!("write an amount of memory as in 12GB, 8GiB or 600MB, not \"{text}\"");
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "tb" | "t" => 1e12,
        "kib" => f64::from(1 << 10),
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        "tib" => 1024.0 * f64::from(1 << 30),
        _ => return Err(wrong()),
    };
    let bytes = number * unit;
    match bytes.is_finite() && (1.0..1e18).contains(&bytes) {
        true => Ok(bytes as usize),
        false => Err(wrong()),
    }
}

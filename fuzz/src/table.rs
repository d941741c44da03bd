//! The table of what has been run: Markdown that is read back and added to.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::supervisor::Outcome;

const HEAD: &str = "| reader | commit | seed | inputs | accepted | refused | panics | aborts | hangs | memory | most beyond 2× input (MB) | slowest (s) | processor (s) | inputs/s of one core |";
const RULE: &str = "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|";

/// A line of the table.
struct Row {
    reader: String,
    commit: String,
    seed: u64,
    outcome: Outcome,
}

impl Row {
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim().strip_prefix('|')?.strip_suffix('|')?;
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [reader, commit, seed, counts @ ..] = cells.as_slice() else {
            return None;
        };
        let seed = seed.parse().ok()?;
        let number = |at: usize| counts.get(at)?.replace(',', "").parse::<f64>().ok();
        let whole = |at: usize| Some(number(at)? as u64);
        let inputs = whole(0)?;
        let outcome = Outcome {
            reached: 0,
            inputs,
            accepted: whole(1)?,
            // Column 2 follows from the others.
            panics: whole(3)?,
            aborts: whole(4)?,
            hangs: whole(5)?,
            memory: whole(6)?,
            peak: (number(7)? * 1e6) as u64,
            slowest: number(8)?,
            seconds: number(9)?,
        };
        Some(Self {
            reader: (*reader).to_owned(),
            commit: (*commit).to_owned(),
            seed,
            outcome,
        })
    }

    fn line(&self) -> String {
        let o = &self.outcome;
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.1} | {:.2} | {:.0} | {} |",
            self.reader,
            self.commit,
            self.seed,
            thousands(o.inputs),
            thousands(o.accepted),
            thousands(o.refused()),
            o.panics,
            o.aborts,
            o.hangs,
            o.memory,
            o.peak as f64 / 1e6,
            o.slowest,
            o.seconds,
            thousands((o.inputs as f64 / o.seconds.max(0.01)) as u64),
        )
    }
}

fn thousands(number: u64) -> String {
    enamel_train::thousands(number)
}

fn read(path: &Path) -> Result<(String, Vec<Row>, String)> {
    let text = match path.exists() {
        true => std::fs::read_to_string(path)?,
        false => String::new(),
    };
    let (mut before, mut rows, mut after) = (String::new(), Vec::new(), String::new());
    let mut seen = false;
    for line in text.lines() {
        match Row::parse(line) {
            Some(row) => rows.push(row),
            None if line == HEAD || line == RULE => seen = true,
            None if seen || !rows.is_empty() => {
                let _ = writeln!(after, "{line}");
            }
            None => {
                let _ = writeln!(before, "{line}");
            }
        }
    }
    Ok((before, rows, after))
}

/// Adds to the row of this reader, commit and seed, and writes the table.
pub fn add(path: &Path, reader: &str, commit: &str, seed: u64, outcome: &Outcome) -> Result<()> {
    let (before, mut rows, after) = read(path)?;
    let same = |row: &&mut Row| row.reader == reader && row.commit == commit && row.seed == seed;
    match rows.iter_mut().find(same) {
        Some(row) => row.outcome.add(outcome),
        None => rows.push(Row {
            reader: reader.to_owned(),
            commit: commit.to_owned(),
            seed,
            outcome: *outcome,
        }),
    }
    let names = crate::readers::READERS.iter().map(|(name, _)| *name);
    let order: Vec<&str> = names.collect();
    rows.sort_by_key(|row| order.iter().position(|name| *name == row.reader));
    let lines: Vec<String> = rows.iter().map(Row::line).collect();
    let table = lines.join("\n");
    let text = format!("{before}{HEAD}\n{RULE}\n{table}\n{after}");
    let part = path.with_extension("part");
    std::fs::write(&part, text).with_context(|| format!("writing {}", part.display()))?;
    std::fs::rename(&part, path).with_context(|| format!("writing {}", path.display()))
}

/// How many inputs of that reader and seed the table has, whatever the commit: where the next ones begin.
pub fn reached(path: &Path, reader: &str, seed: u64) -> Result<u64> {
    let rows = read(path)?.1;
    let same = rows.iter().filter(|r| r.reader == reader && r.seed == seed);
    Ok(same.map(|row| row.outcome.inputs).sum())
}

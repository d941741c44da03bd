//! `metrics.jsonl`: one JSON object a line, for machines.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::files::write_atomic;

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// One optimizer step.
    Train {
        /// Counted from 1.
        step: usize,
        /// In passes over the data.
        epoch: f64,
        /// Mean negative log-likelihood, in nats.
        loss: f64,
        /// Of this step.
        learning_rate: f64,
        /// Before clipping.
        grad_norm: f64,
        /// Tokens that are not padding.
        tokens: usize,
        /// What the task measures of a step, and how many labels the loss counts.
        #[serde(flatten)]
        metrics: Map<String, Value>,
        /// Tokens (not padding) a second.
        tokens_per_second: f64,
        /// Resident memory in bytes.
        memory_bytes: u64,
    },
    /// A new choice of AdaLoRA's ranks.
    Budget {
        /// Steps done.
        step: usize,
        /// Ranks that the budget pays for.
        budget: usize,
        /// Ranks in use, a number for each adapted module in the model's order.
        ranks: Vec<usize>,
    },
    /// One validation.
    Valid {
        /// Steps done before it; 0 is the model before training.
        step: usize,
        /// In passes over the data.
        epoch: f64,
        /// Mean negative log-likelihood, in nats.
        loss: f64,
        /// The task's other metrics, and how many labels the loss counts.
        #[serde(flatten)]
        metrics: Map<String, Value>,
        /// Wall time.
        seconds: f64,
    },
}

impl Entry {
    fn step(&self) -> usize {
        match self {
            Self::Train { step, .. } | Self::Valid { step, .. } | Self::Budget { step, .. } => {
                *step
            }
        }
    }
}

/// The open file.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the file for the run of this id that has done `step` steps; what a killed run wrote past that is
    /// removed, as it will be written again. Lines that are damaged are left out, which `say` is told of; the
    /// file with them then stays under another name.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open(
        path: &Path,
        run: &str,
        step: usize,
        say: &dyn Fn(&str),
    ) -> Result<Self, TrainError> {
        let mut kept = Vec::new();
        if step > 0 {
            let bytes = bytes(path)?;
            let mut damaged = Vec::new();
            for line in lines(&bytes) {
                match line.entry {
                    // As they stand: a number that is read and written again may end in another digit.
                    Ok(entry) if entry.step() <= step => {
                        kept.extend_from_slice(line.bytes);
                        kept.push(b'\n');
                    }
                    Ok(_) => {}
                    Err(reason) => damaged.push((line.number, reason)),
                }
            }
            if !damaged.is_empty() {
                let mut names = std::iter::once("damaged.jsonl".to_owned())
                    .chain((1..).map(|n| format!("damaged-{n}.jsonl")))
                    .map(|extension| path.with_extension(extension));
                let free = names.find(|name| std::fs::symlink_metadata(name).is_err());
                let aside = free.unwrap_or_else(|| path.with_extension("damaged.jsonl"));
                write_atomic(&aside, run, &bytes)?;
                say(&without(path, &damaged, &aside));
            }
        }
        write_atomic(path, run, &kept)?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(TrainError::io(path, "opening"))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&mut self, entry: &Entry) -> Result<(), TrainError> {
        let mut line = serde_json::to_vec(entry)
            .map_err(|e| TrainError::Framework(format!("writing metrics: {e}")))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(TrainError::io(&self.path, "writing"))
    }

    /// Waits until what was written is on the disk: a checkpoint without the lines before it would leave a gap.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file
            .sync_data()
            .map_err(TrainError::io(&self.path, "writing"))
    }
}

/// The lines of a journal; none if there is no such file. What is no entry is left out: a last line cut off by
/// a kill, and damaged ones, of which [`MetricsLog::open`] tells.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read(path: &Path) -> Result<Vec<Entry>, TrainError> {
    let bytes = bytes(path)?;
    Ok(lines(&bytes).filter_map(|line| line.entry.ok()).collect())
}

fn bytes(path: &Path) -> Result<Vec<u8>, TrainError> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(TrainError::io(path, "reading")),
    }
}

struct Line<'a> {
    /// Counted from 1.
    number: usize,
    bytes: &'a [u8],
    entry: Result<Entry, String>,
}

/// All lines but empty ones and a last one that does not end: a kill cut it off.
fn lines(bytes: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let whole = bytes
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    let all = bytes
        .get(..whole)
        .unwrap_or_default()
        .split(|b| *b == b'\n');
    let numbered = all.zip(1..).filter(|(line, _)| !line.is_empty());
    numbered.map(|(bytes, number)| Line {
        number,
        bytes,
        entry: serde_json::from_slice(bytes).map_err(|e| e.to_string()),
    })
}

/// Which lines are not gone on with, and where they are.
fn without(path: &Path, damaged: &[(usize, String)], aside: &Path) -> String {
    const SHOWN: usize = 5;
    let path = path.display();
    let mut all: Vec<_> = damaged
        .iter()
        .take(SHOWN)
        .map(|(number, reason)| format!("{path}:{number} is no line of metrics ({reason})"))
        .collect();
    if damaged.len() > SHOWN {
        all.push(format!("and {} more", damaged.len() - SHOWN));
    }
    format!(
        "note     {}: left out; the file as it was is {}",
        all.join("; "),
        aside.display()
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn valid(step: usize) -> Entry {
        Entry::Valid {
            step,
            epoch: 0.5,
            loss: 1.0,
            metrics: Map::new(),
            seconds: 0.1,
        }
    }

    /// What is cut off is no damage.
    fn quiet(line: &str) {
        panic!("{line}");
    }

    #[test]
    fn resuming_removes_what_lies_past_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut journal = MetricsLog::open(&path, "", 0, &quiet).unwrap();
        for step in [0, 10, 20] {
            journal.write(&valid(step)).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"ki")
            .unwrap();
        let mut journal = MetricsLog::open(&path, "", 10, &quiet).unwrap();
        journal.write(&valid(30)).unwrap();
        let steps: Vec<usize> = read(&path).unwrap().iter().map(Entry::step).collect();
        assert_eq!(steps, [0, 10, 30]);
    }

    #[test]
    fn damaged_lines_are_named_and_the_others_stay_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut journal = MetricsLog::open(&path, "", 0, &quiet).unwrap();
        // Without `float_roundtrip`, serde_json reads the last bit of this one wrong.
        let odd = |step| match valid(step) {
            Entry::Valid {
                step,
                epoch,
                metrics,
                seconds,
                ..
            } => Entry::Valid {
                step,
                epoch,
                loss: 0.110_001_003_242_283_44,
                metrics,
                seconds,
            },
            other => other,
        };
        for step in [0, 10, 20] {
            journal.write(&odd(step)).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        let mut lines: Vec<Vec<u8>> = whole.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        lines[1][9] ^= 0x80;
        let damaged = lines.join(&b'\n');
        std::fs::write(&path, &damaged).unwrap();

        let told = std::cell::RefCell::new(Vec::new());
        MetricsLog::open(&path, "", 20, &|line| {
            told.borrow_mut().push(line.to_owned())
        })
        .unwrap();
        let told = told.into_inner().join("\n");
        assert!(
            told.contains("metrics.jsonl:2 is no line of metrics"),
            "{told}"
        );
        let aside = dir.path().join("metrics.damaged.jsonl");
        assert!(told.contains(&aside.display().to_string()), "{told}");
        assert_eq!(std::fs::read(&aside).unwrap(), damaged);
        lines.remove(1);
        assert_eq!(std::fs::read(&path).unwrap(), lines.join(&b'\n'));
        assert_eq!(read(&path).unwrap(), [odd(0), odd(20)]);
    }
}

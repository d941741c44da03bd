//! `metrics.jsonl`: one JSON object a line, for machines.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoints::write_atomic;
use crate::error::TrainError;

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
        /// Tokens with a label.
        trained_tokens: usize,
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
        /// `exp(loss)`.
        perplexity: f64,
        /// Tokens with a label.
        trained_tokens: usize,
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
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens the file for a run that has done `step` steps; what a killed run wrote past that is
    /// removed, as it will be written again.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open(path: &Path, step: usize) -> Result<Self, TrainError> {
        let kept: Vec<u8> = match step {
            0 => Vec::new(),
            _ => read(path)?
                .into_iter()
                .filter(|e| e.step() <= step)
                .filter_map(|e| serde_json::to_vec(&e).ok())
                .flat_map(|mut line| {
                    line.push(b'\n');
                    line
                })
                .collect(),
        };
        write_atomic(path, &kept)?;
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
}

/// The lines of a journal; none if there is no such file. A last line cut off by a kill is left out.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read(path: &Path) -> Result<Vec<Entry>, TrainError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path, "reading"))?;
    Ok(text
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .collect())
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
            perplexity: 2.7,
            trained_tokens: 3,
            seconds: 0.1,
        }
    }

    #[test]
    fn resuming_removes_what_lies_past_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut journal = Journal::open(&path, 0).unwrap();
        for step in [0, 10, 20] {
            journal.write(&valid(step)).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"ki")
            .unwrap();
        let mut journal = Journal::open(&path, 10).unwrap();
        journal.write(&valid(30)).unwrap();
        let steps: Vec<usize> = read(&path).unwrap().iter().map(Entry::step).collect();
        assert_eq!(steps, [0, 10, 30]);
    }
}

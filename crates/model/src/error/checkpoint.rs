//! Why a checkpoint cannot be read, in words that name the file, the tensor and the next step.

use std::fmt;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A tensor that the checkpoint does not list was asked for.
    #[error("the checkpoint has no tensor '{name}'{}", nearest_hint(.nearest))]
    NoSuchTensor {
        /// The name asked for.
        name: String,
        /// The listed name most like it, when one is close.
        nearest: Option<String>,
    },
    /// The file system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path holds nothing that could be a checkpoint.
    #[error("{} is not a checkpoint: {reason}", .path.display())]
    NotACheckpoint {
        /// The path given.
        path: PathBuf,
        /// What is missing and what to do.
        reason: String,
    },
    /// The model cannot read text.
    #[error("{}: {reason}\n  help: {help}", .path.display())]
    NoTokenizer {
        /// The model.
        path: PathBuf,
        /// What is there instead of a tokenizer.
        reason: String,
        /// What to do.
        help: String,
    },
    /// The file breaks its own format: truncated, oversized or contradictory.
    #[error("{} cannot be read: {problems}", .path.display())]
    Malformed {
        /// The file at fault.
        path: PathBuf,
        /// All that was found wrong with it.
        problems: Problems,
    },
    /// The file is sound, but uses something that is not supported here.
    #[error("{} is not supported: {problems}", .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it uses, and what would be understood.
        problems: Problems,
    },
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            problems: Problems(vec![problem.into()]),
        }
    }

    pub(crate) fn unsupported(path: &Path, problem: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            problems: Problems(vec![problem.into()]),
        }
    }
}

fn nearest_hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; did you mean '{name}'?"))
        .unwrap_or_default()
}

/// Everything found wrong with one file; printed one a line, the first twenty of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl Problems {
    const SHOWN: usize = 20;

    pub(crate) fn push(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    /// An error for `path` when there is any problem.
    pub(crate) fn into_malformed(self, path: &Path) -> Result<(), CheckpointError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Malformed {
            path: path.to_owned(),
            problems: self,
        })
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = self.0.as_slice() {
            return f.write_str(only);
        }
        write!(f, "{} problems", self.0.len())?;
        for problem in self.0.iter().take(Self::SHOWN) {
            write!(f, "\n  - {problem}")?;
        }
        if let Some(more @ 1..) = self.0.len().checked_sub(Self::SHOWN) {
            write!(f, "\n  - and {more} more")?;
        }
        Ok(())
    }
}

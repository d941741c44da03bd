//! What can be wrong with a recipe: every problem at once, each with its place and a next step.

use std::fmt;
use std::path::PathBuf;

/// Where a setting was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of the recipe file, counted from 1.
    Line(usize),
    /// A `--set` argument, as it was given.
    Override(String),
    /// Nowhere: the recipe as a whole, or a default.
    Recipe,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub origin: Origin,
    /// What, with the setting's full name.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// All problems found in one recipe, in the order of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The recipe file.
    pub path: PathBuf,
    /// At least one.
    pub list: Vec<Problem>,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let n = self.list.len();
        if n > 1 {
            write!(f, "{path}: {n} problems")?;
        }
        for (i, problem) in self.list.iter().enumerate() {
            if n > 1 || i > 0 {
                f.write_str("\n  ")?;
            }
            match &problem.origin {
                Origin::Line(line) => write!(f, "{path}:{line}: {}", problem.message)?,
                Origin::Override(text) => write!(f, "--set {text}: {}", problem.message)?,
                Origin::Recipe => write!(f, "{path}: {}", problem.message)?,
            }
            if let Some(help) = &problem.help {
                write!(f, " ({help})")?;
            }
        }
        Ok(())
    }
}

/// Why a recipe or a lock file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file says something that cannot be.
    #[error("{0}")]
    Invalid(Problems),
    /// The lock file cannot be written.
    #[error("cannot write {path}: {message}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        message: String,
    },
}

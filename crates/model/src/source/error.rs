//! Why a base model cannot be found or fetched.

use std::path::{Path, PathBuf};

/// Why a base model cannot be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A reference that is none of the four forms.
    #[error(
        "'{text}' is not a model reference: {hint}\n{}",
        super::reference::FORMS
    )]
    BadReference {
        /// The reference as given.
        text: String,
        /// What is wrong, with the nearest name where there is one.
        hint: String,
    },
    /// The model is not in the cache and may not be fetched.
    #[error("{reference} is not in the cache:{}\nfetch it with `enamel pull {reference}`", listed(.missing))]
    NotCached {
        /// The reference.
        reference: String,
        /// Where it was looked for, and what is missing there, a line each.
        missing: Vec<String>,
    },
    /// The network may not be used.
    #[error("{wanted} cannot be fetched: {what} is not asked, since {why}{}", not_here(.missing))]
    Offline {
        /// What was to be fetched.
        wanted: String,
        /// The source left out.
        what: String,
        /// The setting that says so.
        why: String,
        /// What the caches lack, a line each.
        missing: Vec<String>,
    },
    /// No answer from a source in the time it is given.
    #[error("{host} is unreachable ({reason})")]
    Unreachable {
        /// The host that was asked.
        host: String,
        /// How it failed.
        reason: String,
    },
    /// A source answered that it will not or cannot give the model.
    #[error("{source_name}: {reason}")]
    Refused {
        /// The repository or package.
        source_name: String,
        /// Its answer, and what to do.
        reason: String,
    },
    /// What was fetched is not what should have been.
    #[error(
        "{file} has {kind} {found}, but {expected} was expected; it was thrown away: pull again, and if it stays so, do not trust the source"
    )]
    WrongHash {
        /// The file.
        file: String,
        /// The kind of hash.
        kind: &'static str,
        /// The hash it should have.
        expected: String,
        /// The hash it has.
        found: String,
    },
    /// Every source of a catalogue entry failed.
    #[error("no source of {reference} works:{}", listed(.failures))]
    AllFailed {
        /// The catalogue name.
        reference: String,
        /// One line a source, in the order tried.
        failures: Vec<String>,
    },
    /// The file system refused.
    #[error("{}: {source}{}", .path.display(), permission(.source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no directory to keep models in.
    #[error(
        "no cache directory: neither ENAMEL_HOME, XDG_CACHE_HOME nor HOME is set; set ENAMEL_HOME to a directory"
    )]
    NoCache,
    /// The catalogue that was built in cannot be read.
    #[error("the built-in catalogue is not valid: {0}")]
    Catalogue(String),
}

impl SourceError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

fn listed(failures: &[String]) -> String {
    failures
        .iter()
        .map(|line| format!("\n  - {line}"))
        .collect()
}

fn not_here(missing: &[String]) -> String {
    match missing.is_empty() {
        true => String::new(),
        false => format!(
            "; looked for in:{}\nfetch it where the network may be used, or set HF_HUB_CACHE to \
             the folder that has it",
            listed(missing)
        ),
    }
}

fn permission(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            " (if the cache is another user's, set ENAMEL_HOME, or HF_HOME where it is set, to a \
             directory of your own)"
        }
        _ => "",
    }
}

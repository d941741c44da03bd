//! What can go wrong with an adapter; every message names the datum and the next step.

use std::path::PathBuf;

/// An error of this crate. Problems of one kind are collected and reported together.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Options that are invalid or ask for what is not supported.
    #[error("{origin}: {}", list(.problems))]
    Config {
        /// The file, or "adapter configuration".
        origin: String,
        /// One line an option.
        problems: Vec<String>,
    },
    /// Target patterns that do not fit the model.
    #[error("the adapter does not fit the model: {}", list(.problems))]
    Plan {
        /// One line a pattern or module.
        problems: Vec<String>,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// An adapter's file that does not fit the model: everything that differs.
    #[error("{}: {}\n  {note}", path.display(), list(.problems))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// One line a tensor or module.
        problems: Vec<String>,
        /// What may explain them.
        note: String,
    },
    /// Only a pickle file is there.
    #[error(
        "{}: only adapter_model.bin is there. A pickle file can run any code as it is read, so it is \
         not opened; where you trust its origin, load it with PEFT and write it again with \
         save_pretrained(directory, safe_serialization=True), then use that directory",
        .0.display()
    )]
    Pickle(PathBuf),
    /// A value that is NaN or infinite.
    #[error("{0} holds a value that is not finite; nothing was changed or written")]
    NonFinite(String),
    /// A choice among adapters that cannot be made.
    #[error("{}", list(.problems))]
    Choice {
        /// One line a name or module.
        problems: Vec<String>,
    },
    /// An initialisation that cannot be computed.
    #[error("{module}: {reason}")]
    Start {
        /// The module.
        module: String,
        /// Why, and what to do.
        reason: String,
    },
    /// An adapter is attached already.
    #[error("{0} has an adapter already; detach or merge it first")]
    Attached(String),
    /// No adapter is attached.
    #[error("the model has no adapter; attach or load one first")]
    NoAdapter,
    /// Values to import that do not fit the adapter that is attached.
    #[error("the stored adapter state does not fit this adapter: {}", list(.problems))]
    Import {
        /// One line a tensor.
        problems: Vec<String>,
    },
    /// A tensor's values could not be brought to the host.
    #[error("{name} cannot be read back from its device: {reason}")]
    Read {
        /// The tensor.
        name: String,
        /// The backend's reason.
        reason: String,
    },
}

/// `a` alone, or a line each.
fn list(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => many
            .iter()
            .fold(format!("{} problems", many.len()), |text, line| {
                format!("{text}\n  - {line}")
            }),
    }
}

pub(crate) type Result<T> = std::result::Result<T, AdapterError>;

/// Foreign text for a message: without characters that a terminal obeys.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = !c.is_control();
            let escaped = (!plain).then(|| c.escape_debug());
            escaped
                .into_iter()
                .flatten()
                .chain(plain.then_some(c))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn control_characters_of_foreign_text_are_shown() {
        assert_eq!(shown("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert_eq!(shown("q_proj \"ü\""), "q_proj \"ü\"");
    }
}

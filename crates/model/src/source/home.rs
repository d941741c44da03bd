//! `~` at the start of a path: recipes are not read by a shell, and shells leave `--set x=~/y` alone.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

/// Why a `~` stands for nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HomeError {
    /// Nobody says where the home directory is.
    #[error("{}: there is no home directory for ~ to stand for (HOME is not set)", .0.display())]
    None(PathBuf),
    /// `~name/…`
    #[error(
        "{}: only ~/ is expanded, not another user's home; write the path in full, or ./{} for a folder of \
         that name",
        .0.display(),
        .0.display()
    )]
    OtherUser(PathBuf),
}

/// `path` with a leading `~` replaced by the home directory (`HOME`, else the user database's). A file
/// whose name starts with `~` keeps it; a folder named `~` is `./~`.
///
/// # Errors
/// Where there is no home directory, and for `~name/…`.
pub fn expand_home(path: &Path) -> Result<PathBuf, HomeError> {
    let mut parts = path.components();
    let Some(Component::Normal(first)) = parts.next() else {
        return Ok(path.to_owned());
    };
    if first == OsStr::new("~") {
        let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
        let home = home.ok_or_else(|| HomeError::None(path.to_owned()))?;
        let rest = parts.as_path();
        return Ok(if rest.as_os_str().is_empty() {
            home
        } else {
            home.join(rest)
        });
    }
    if first.as_encoded_bytes().first() == Some(&b'~') && parts.next().is_some() {
        return Err(HomeError::OtherUser(path.to_owned()));
    }
    Ok(path.to_owned())
}

/// The same of an environment variable, whose reader says where home is: what stands for nothing stays as it is.
pub(super) fn expand_variable(text: &str, home: Option<PathBuf>) -> PathBuf {
    match (text.strip_prefix('~'), home) {
        (Some(""), Some(home)) => home,
        (Some(rest), Some(home)) if rest.starts_with('/') => {
            home.join(rest.trim_start_matches('/'))
        }
        _ => PathBuf::from(text),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_leading_tilde_is_the_home_directory_and_no_other_is() {
        let home = std::env::home_dir().unwrap();
        let expand = |text: &str| expand_home(Path::new(text)).unwrap();
        assert_eq!(expand("~"), home);
        assert_eq!(expand("~/"), home);
        assert_eq!(expand("~/a/b"), home.join("a/b"));
        for kept in [
            "./~",
            "./~/a",
            "a/~",
            "/~/a",
            "~backup.jsonl",
            "~$x.json",
            "",
            "a",
        ] {
            assert_eq!(expand(kept), Path::new(kept), "{kept}");
        }
        let error = expand_home(Path::new("~someone/model")).unwrap_err();
        assert!(error.to_string().contains("./~someone/model"), "{error}");
    }
}

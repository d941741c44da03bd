//! How a base model is named: a directory, a GGUF file, a hub repository or a catalogue entry.

use std::fmt;
use std::path::{Path, PathBuf};

use super::catalogue::Catalogue;
use super::{SourceError, expand_home};

/// The four forms, for messages.
pub(crate) const FORMS: &str = "a reference is one of\n  \
    DIR                      a directory with config.json and model.safetensors\n  \
    FILE.gguf                a GGUF file\n  \
    hf:ORG/NAME[@REVISION]   a repository on the Hugging Face hub\n  \
    NAME                     a model of the catalogue";

/// A base model, as a person names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
    /// A `.gguf` file.
    Gguf(PathBuf),
    /// A repository on the hub.
    Hub(HubRef),
    /// A name of the built-in catalogue.
    Catalogue(String),
}

/// A repository on the hub, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubRef {
    /// `org/name`.
    pub repository: String,
    /// Branch, tag or commit; `main` when none is given.
    pub revision: Option<String>,
}

impl HubRef {
    /// The revision to ask for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl ModelRef {
    /// Reads a reference. Paths must exist; a bare name is looked up in the catalogue first, so
    /// that a directory of that name in the current directory does not change what it means.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let bad = |hint: String| SourceError::BadReference {
            text: text.to_owned(),
            hint,
        };
        if text.trim().is_empty() {
            return Err(bad("it is empty".into()));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hub(rest).map(Self::Hub).map_err(bad);
        }
        let catalogue = Catalogue::built_in()?;
        if catalogue.get(text).is_some() {
            return Ok(Self::Catalogue(text.to_owned()));
        }
        let path = expand_home(Path::new(text)).map_err(|error| bad(error.to_string()))?;
        if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
        {
            return if path.is_file() {
                Ok(Self::Gguf(path))
            } else {
                Err(bad(missing_path(&path)))
            };
        }
        if path.is_dir() {
            return Ok(Self::Directory(path));
        }
        if path.is_file() {
            return Err(bad("it is a file, but not a .gguf file".into()));
        }
        Err(bad(guess(text, &path, &catalogue)))
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) | Self::Gguf(path) => write!(f, "{}", path.display()),
            Self::Catalogue(name) => f.write_str(name),
            Self::Hub(hub) => {
                write!(f, "hf:{}", hub.repository)?;
                match &hub.revision {
                    Some(revision) => write!(f, "@{revision}"),
                    None => Ok(()),
                }
            }
        }
    }
}

fn parse_hub(rest: &str) -> Result<HubRef, String> {
    let (repository, revision) = match rest.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (rest, None),
    };
    // The name becomes part of a path and of a URL, so only what the hub itself allows.
    let part_ok = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    match repository.split_once('/') {
        Some((org, name)) if part_ok(org) && part_ok(name) => {}
        _ => {
            return Err(format!(
                "after 'hf:' come an organisation and a name, as in hf:HuggingFaceTB/SmolLM2-135M, \
                 not '{repository}'"
            ));
        }
    }
    if let Some(revision) = revision
        && !revision.split('/').all(part_ok)
    {
        return Err(format!("'{revision}' is not a branch, tag or commit"));
    }
    Ok(HubRef {
        repository: repository.to_owned(),
        revision: revision.map(str::to_owned),
    })
}

fn missing_path(path: &Path) -> String {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let near = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|other| other.ends_with(".gguf") || parent.join(other).is_dir())
        .map(|other| (strsim::jaro_winkler(&name, &other), other))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, other)) => format!(
            "there is no such file; did you mean '{}'?",
            parent.join(other).display()
        ),
        None => "there is no such file or directory".into(),
    }
}

/// What an unknown reference was perhaps meant to be.
fn guess(text: &str, path: &Path, catalogue: &Catalogue) -> String {
    let path_like = text.starts_with(['/', '.', '~']) || text.matches('/').count() > 1;
    if !path_like && parse_hub(text).is_ok() {
        return format!("there is no such directory; for the hub write 'hf:{text}'");
    }
    if path_like || text.contains('/') {
        return missing_path(path);
    }
    let near = catalogue
        .names()
        .map(|name| {
            let likeness = strsim::jaro_winkler(&text.to_lowercase(), name);
            (likeness, name)
        })
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, name)) => format!("did you mean '{name}'?"),
        None => format!(
            "the catalogue has {}, and there is no such directory",
            catalogue.names().collect::<Vec<_>>().join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_four_forms_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, b"").unwrap();
        let parse = |text: &str| ModelRef::parse(text).unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(parse(path), ModelRef::Directory(dir.path().into()));
        assert_eq!(parse(file.to_str().unwrap()), ModelRef::Gguf(file.clone()));
        assert_eq!(
            parse("smollm2-135m-instruct"),
            ModelRef::Catalogue("smollm2-135m-instruct".into())
        );
        assert_eq!(
            parse("hf:org/name@refs/pr/1"),
            ModelRef::Hub(HubRef {
                repository: "org/name".into(),
                revision: Some("refs/pr/1".into()),
            })
        );
        assert_eq!(parse("hf:org/name").to_string(), "hf:org/name");
    }

    #[test]
    fn what_is_none_of_them_gets_a_suggestion_and_the_forms() {
        let cases = [
            (
                "smollm2-135m-instrct",
                "did you mean 'smollm2-135m-instruct'",
            ),
            ("SmolLM2-135M", "did you mean 'smollm2-135m-instruct'"),
            ("HuggingFaceTB/SmolLM2", "write 'hf:HuggingFaceTB/SmolLM2'"),
            ("./nowhere/model.gguf", "no such file"),
            ("zzz", "the catalogue has smollm2-135m-instruct"),
            ("hf:onlyname", "organisation and a name"),
            ("hf:../etc", "organisation and a name"),
            ("hf:a/b@../c", "not a branch"),
            ("", "empty"),
        ];
        for (text, wanted) in cases {
            let error = ModelRef::parse(text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
            assert!(error.contains("hf:ORG/NAME"), "{text}: {error}");
        }
    }

    #[test]
    fn a_misspelt_file_is_recognised_beside_its_neighbour() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("smollm2.gguf"), b"").unwrap();
        let text = dir.path().join("smolm2.gguf");
        let error = ModelRef::parse(text.to_str().unwrap())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("did you mean") && error.contains("smollm2.gguf"),
            "{error}"
        );
    }
}

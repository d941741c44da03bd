//! The hub clients' common cache: `models--org--name/{blobs,refs,snapshots}`, blobs named by their
//! hash, snapshots of links to them.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use enamel_adapter::staging::StagedFile;
use serde_json::Value;

use super::answer::BlobId;
use super::{HubRef, INDEX, SourceError, WEIGHTS};
use crate::source::lock::lock;

/// Bytes of an index of shards that are read at most.
const INDEX_BYTES: u64 = 64 << 20;

/// The folder of one repository in one cache.
pub(super) struct RepoFolder {
    cache: PathBuf,
    name: String,
}

impl RepoFolder {
    pub fn new(cache: &Path, hub: &HubRef) -> Self {
        Self {
            cache: cache.to_owned(),
            name: format!("models--{}", hub.repository.replace('/', "--")),
        }
    }

    pub fn path(&self) -> PathBuf {
        self.cache.join(&self.name)
    }

    pub fn blobs(&self) -> PathBuf {
        self.path().join("blobs")
    }

    pub fn blob(&self, id: &BlobId) -> PathBuf {
        self.blobs().join(id.digits())
    }

    /// What has arrived of a blob.
    pub fn part(&self, id: &BlobId) -> PathBuf {
        self.blobs().join(format!("{}.part", id.digits()))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.path().join("snapshots").join(commit)
    }

    /// The lock under which the Python client, too, fetches a blob.
    pub fn lock(
        &self,
        id: &BlobId,
        waiting: &mut dyn FnMut(),
    ) -> Result<std::fs::File, SourceError> {
        let name = format!("{}.lock", id.digits());
        lock(
            &self.cache.join(".locks").join(&self.name).join(name),
            waiting,
        )
    }

    /// Notes that `revision` is `commit`.
    pub fn set_reference(&self, revision: &str, commit: &str) -> Result<(), SourceError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.path().join("refs").join(revision);
        if std::fs::read_to_string(&path).is_ok_and(|text| text == commit) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&path);
        self.make(folder)?;
        let written = || {
            let mut staged = StagedFile::beside(&path)?;
            staged.write_all(commit.as_bytes())?;
            staged.finish(&path, true)
        };
        written().map(drop).map_err(|e| SourceError::io(&path, e))
    }

    /// The snapshot of a revision and its commit, if all that a model is made of is there; else
    /// what is missing, in words.
    pub fn find(&self, hub: &HubRef) -> Result<(PathBuf, String), String> {
        let folder = self.path();
        if !folder.is_dir() {
            return Err(format!("{} is not there", folder.display()));
        }
        let reference = folder.join("refs").join(hub.revision());
        let commit = match std::fs::read_to_string(&reference) {
            Ok(commit) => commit.trim().to_owned(),
            // A commit names its snapshot itself.
            Err(_) => hub.revision().to_owned(),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let path = self.snapshot(&commit);
        if commit.is_empty() || commit.starts_with('.') || !commit.chars().all(plain) {
            return Err(format!("{} names no commit", reference.display()));
        }
        if !path.is_dir() {
            let known = self.revisions();
            return Err(format!(
                "{} has no snapshot of revision '{}'{}",
                folder.display(),
                hub.revision(),
                match known.is_empty() {
                    true => String::new(),
                    false => format!(" (it has {})", known.join(", ")),
                }
            ));
        }
        let faults = self.faults(&path);
        if faults.is_empty() {
            return Ok((path, commit));
        }
        Err(format!(
            "{} is incomplete: {}",
            path.display(),
            faults.join("; ")
        ))
    }

    /// The branches and tags that have been fetched, at most ten.
    fn revisions(&self) -> Vec<String> {
        let refs = self.path().join("refs");
        let mut names: Vec<String> = std::fs::read_dir(refs)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().is_file())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| !name.starts_with('.') && name.chars().all(|c| !c.is_control()))
            .collect();
        names.sort();
        names.truncate(10);
        names
    }

    /// What keeps a snapshot from being a whole model. Weights are fetched last, so with them the
    /// rest is there too.
    fn faults(&self, snapshot: &Path) -> Vec<String> {
        let mut faults = Vec::new();
        let mut linked = std::collections::BTreeSet::new();
        // No file of it may be one from elsewhere, whether or not a model needs it.
        for entry in std::fs::read_dir(snapshot).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Err(fault) = self.inside(snapshot, &entry.path()) {
                faults.push(format!("{name} {fault}"));
                linked.insert(name);
            }
        }
        let mut need = |name: &str| {
            if !linked.contains(name) && !snapshot.join(name).is_file() {
                faults.push(format!("{name} is missing"));
            }
        };
        need("config.json");
        if snapshot.join(WEIGHTS).is_file() || linked.contains(WEIGHTS) || linked.contains(INDEX) {
            return faults;
        }
        let index = snapshot.join(INDEX);
        if !index.is_file() {
            faults.push(format!("neither {WEIGHTS} nor {INDEX} is there"));
            return faults;
        }
        match read_index(&index) {
            Some(names) => names.iter().for_each(|name| need(name)),
            None => faults.push(format!("{INDEX} is not an index of shards")),
        }
        faults
    }

    /// Whether what a file of a snapshot leads to lies in the cache of this repository, or in the
    /// store that the Python client shares between repositories.
    pub fn inside(&self, snapshot: &Path, pointer: &Path) -> Result<(), String> {
        let target = match std::fs::canonicalize(pointer) {
            Ok(target) => target,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let blob = std::fs::read_link(pointer).unwrap_or_default();
                let blob = blob.file_name().unwrap_or_default().to_string_lossy();
                return Err(format!("is a link to the blob {blob}, which is gone"));
            }
            Err(error) => return Err(format!("cannot be followed ({error})")),
        };
        let roots = [self.blobs(), snapshot.to_owned(), self.cache.join("blobs")];
        let contained = roots
            .iter()
            .filter_map(|root| std::fs::canonicalize(root).ok())
            .any(|root| target.starts_with(root));
        match contained {
            true => Ok(()),
            false => Err("is a link that leads out of the repository's folder".into()),
        }
    }

    /// The blob that a file of a snapshot is a link to.
    pub fn linked(&self, pointer: &Path) -> Option<BlobId> {
        let target = std::fs::read_link(pointer).ok()?;
        BlobId::parse(target.file_name()?.to_str()?)
    }

    /// Makes the folders of a commit, and sees that they are where their names say.
    pub fn prepare(&self, commit: &str) -> Result<PathBuf, SourceError> {
        let snapshot = self.snapshot(commit);
        self.make(&self.blobs())?;
        self.make(&snapshot)?;
        Ok(snapshot)
    }

    /// Makes a folder of the repository. One that is a link to elsewhere is refused: what is
    /// fetched is written to the cache alone.
    fn make(&self, folder: &Path) -> Result<(), SourceError> {
        let io = |e| SourceError::io(folder, e);
        let root = self.path();
        std::fs::create_dir_all(&root).map_err(|e| SourceError::io(&root, e))?;
        let below = folder.strip_prefix(&root).unwrap_or(folder);
        let mut path = root;
        for part in below.iter() {
            path.push(part);
            match path.symlink_metadata() {
                Ok(meta) if meta.is_symlink() => {
                    return Err(SourceError::Refused {
                        source_name: path.display().to_string(),
                        reason: "it is a link, and may lead out of the repository's folder; \
                                 nothing was written"
                            .into(),
                    });
                }
                Ok(_) => {}
                Err(_) => match std::fs::create_dir(&path) {
                    // Another pull was quicker.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    made => made.map_err(io)?,
                },
            }
        }
        Ok(())
    }

    /// Makes `pointer` of a snapshot lead to the blob.
    pub fn link(&self, id: &BlobId, pointer: &Path) -> Result<(), SourceError> {
        let io = |e| SourceError::io(pointer, e);
        if self.linked(pointer).as_ref() == Some(id) {
            return Ok(());
        }
        remove(pointer)?;
        let target = Path::new("../../blobs").join(id.digits());
        match symlink(&target, pointer) {
            Ok(()) => Ok(()),
            // Another pull was quicker.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // A file system without links.
            Err(_) => std::fs::copy(self.blob(id), pointer).map(drop).map_err(io),
        }
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Removes a file or link, not what the link leads to, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), SourceError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(SourceError::io(path, error)),
        _ => Ok(()),
    }
}

/// The shard names of an index, each once.
pub(super) fn read_index(path: &Path) -> Option<Vec<String>> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(INDEX_BYTES).read_to_end(&mut text).ok()?;
    shards(&text)
}

/// The shard names of an index, each once.
pub fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let mut names: Vec<String> = index
        .get("weight_map")?
        .as_object()?
        .values()
        .map(|name| name.as_str().map(str::to_owned))
        .collect::<Option<_>>()?;
    names.sort();
    names.dedup();
    // Where case does not count, one would take the place of the other.
    let mut folded: Vec<String> = names.iter().map(|name| name.to_lowercase()).collect();
    folded.sort();
    folded.dedup();
    if folded.len() != names.len() {
        return None;
    }
    let plain = |name: &String| {
        !name.starts_with('.')
            && name.len() <= 255
            && !name.contains(['/', '\\', ':'])
            && !name.chars().any(super::answer::is_unprintable)
            && name.ends_with(".safetensors")
    };
    (!names.is_empty() && names.iter().all(plain)).then_some(names)
}

//! Fetching one file of a commit: where it stopped, to its announced size, by its hash.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::answer::{self, Announced, BlobId, Listed};
use super::client::{Answer, Client, Failure};
use super::layout::{RepoFolder, remove};
use super::{SourceError, is_weights, refused, unreachable};
use crate::digest::{hex, sha256_file};
use crate::source::network::Network;
use crate::source::{HubRef, PullProgress};

/// How often a file is tried; each try continues where the last one stopped.
const ATTEMPTS: usize = 4;
/// How often a file with wrong contents is fetched before its source is given up.
const WRONG_CONTENTS: usize = 2;
/// Bytes of a file without announced size: weights, and anything else.
const WEIGHTS_CAP: u64 = 50 << 30;
const SMALL_CAP: u64 = 64 << 20;
/// The longest that a hub's wish to wait is followed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What all files of a pull have in common.
pub(super) struct Fetch<'a> {
    pub client: &'a Client,
    pub hub: &'a HubRef,
    pub network: &'a Network,
    pub host: &'a str,
    pub commit: &'a str,
    pub folder: RepoFolder,
    pub snapshot: PathBuf,
}

/// Why one try did not bring the file.
enum Miss {
    Source(SourceError),
    Failed(Failure),
    Wrong(SourceError),
}

impl From<SourceError> for Miss {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<Failure> for Miss {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Fetch<'_> {
    /// Fetches one file of the commit unless it is there, and checks its hash.
    pub fn file(
        &self,
        listed: &Listed,
        progress: &mut dyn PullProgress,
    ) -> Result<PathBuf, SourceError> {
        let name = &listed.name;
        let pointer = self.snapshot.join(name);
        if self.is_there(&pointer, listed)? {
            return Ok(pointer);
        }
        // A later try knows the hash, and so what is there of the file already.
        let mut known = listed.id.clone();
        let (mut attempt, mut wrong) = (1, 0);
        loop {
            let miss = match self.attempt(listed, &mut known, progress) {
                Ok(id) => {
                    self.folder.link(&id, &pointer)?;
                    progress.finish();
                    return Ok(pointer);
                }
                Err(miss) => miss,
            };
            let mut pause = Duration::from_millis(300 << attempt);
            let error = match miss {
                Miss::Source(error) => return Err(error),
                Miss::Wrong(error) => {
                    wrong = usize::saturating_add(wrong, 1);
                    error
                }
                Miss::Failed(Failure::Refused(reason)) => {
                    return Err(refused(self.hub, format!("{name}: {reason}")));
                }
                Miss::Failed(Failure::Broken(reason)) => {
                    unreachable(self.host, format!("{}: {reason}", self.named(name)))
                }
                Miss::Failed(Failure::Later(wait, reason)) => {
                    let longest = LONGEST_WAIT.min(self.network.stall);
                    pause = wait.map_or(pause, |wait| wait.max(pause)).min(longest);
                    unreachable(self.host, format!("{}: {reason}", self.named(name)))
                }
                Miss::Failed(Failure::NoSuchRange) => {
                    let reason = format!("{} could not be continued", self.named(name));
                    unreachable(self.host, reason)
                }
            };
            if attempt == ATTEMPTS || wrong == WRONG_CONTENTS {
                return Err(error);
            }
            progress.note(&format!("{error}; trying {name} again"));
            std::thread::sleep(pause);
            self.client.reconnect();
            attempt = usize::saturating_add(attempt, 1);
        }
    }

    /// A file as messages name it.
    fn named(&self, name: &str) -> String {
        format!("{name} of {}", self.hub.repository)
    }

    /// Whether a file of the snapshot is there and right; one that is wrong is removed.
    fn is_there(&self, pointer: &Path, listed: &Listed) -> Result<bool, SourceError> {
        if pointer.symlink_metadata().is_err() {
            return Ok(false);
        }
        let linked = self.folder.linked(pointer);
        let expected = linked.as_ref().or(listed.id.as_ref());
        let same = listed.id.is_none() || expected == listed.id.as_ref();
        if same && pointer.is_file() && self.folder.inside(&self.snapshot, pointer).is_ok() {
            let Some(id) = expected else {
                return Ok(true);
            };
            if hash_of(pointer, id)? == id.digits() {
                return Ok(true);
            }
            // The link's own blob alone: what is linked from there is another's.
            if linked.is_some() {
                remove(&self.folder.blob(id))?;
            }
        }
        remove(pointer)?;
        Ok(false)
    }

    /// One try; gives the blob's name.
    fn attempt(
        &self,
        listed: &Listed,
        known: &mut Option<BlobId>,
        progress: &mut dyn PullProgress,
    ) -> Result<BlobId, Miss> {
        let waits = || "waiting for another pull of the same file";
        let part_bytes = |id: &BlobId| {
            let part = self.folder.part(id);
            std::fs::symlink_metadata(part).map_or(0, |meta| match meta.is_file() {
                true => meta.len(),
                false => 0,
            })
        };
        let mut held = None;
        if let Some(id) = &known {
            held = Some(self.folder.lock(id, &mut || progress.note(waits()))?);
            if self.blob_is_whole(id)? {
                return Ok(id.clone());
            }
        }
        let mut from = known.as_ref().map(part_bytes).filter(|bytes| *bytes > 0);
        if let (Some(id), Some(bytes), Some(total)) = (&known, from, listed.size)
            && bytes >= total
        {
            // All of it has arrived; if it is not right, it is fetched anew.
            if bytes == total {
                match self.finish(listed, id, None) {
                    Ok(()) => return Ok(id.clone()),
                    Err(Miss::Wrong(_)) => {}
                    Err(other) => return Err(other),
                }
            }
            remove(&self.folder.part(id))?;
            from = None;
        }
        let (mut answer, mut id, mut size) = match self.ask(listed, from) {
            Err(Failure::NoSuchRange) => return self.whole_part(listed, known.as_ref()),
            other => other?,
        };
        if known.as_ref().is_some_and(|known| *known != id) {
            return Err(Failure::Refused("its hash is another than a moment ago".into()).into());
        }
        if held.is_none() {
            held = Some(self.folder.lock(&id, &mut || progress.note(waits()))?);
            *known = Some(id.clone());
            if self.blob_is_whole(&id)? {
                return Ok(id);
            }
            let from = part_bytes(&id);
            if from > 0 {
                drop(answer);
                (answer, id, size) = match self.ask(listed, Some(from)) {
                    Err(Failure::NoSuchRange) => return self.whole_part(listed, Some(&id)),
                    other => other?,
                };
            }
        }
        let from = part_bytes(&id);
        let carried = answer::carried(&answer.head, from).map_err(Failure::Refused)?;
        let total = match (carried.total, size.or(listed.size)) {
            (Some(a), Some(b)) if a != b => {
                return Err(Failure::Refused(format!(
                    "its size is announced as {a} and as {b} bytes"
                ))
                .into());
            }
            (a, b) => a.or(b),
        };
        if let (Some(total), Some(listed)) = (total, listed.size)
            && total != listed
        {
            return Err(Failure::Refused(format!(
                "it has {total} bytes, but {listed} in the file list"
            ))
            .into());
        }
        self.room(total.map(|total| total.saturating_sub(carried.start)))?;
        progress.start(&listed.name, total);
        let digest = self.receive(listed, &id, answer, (carried.start, total), progress)?;
        self.finish(listed, &id, digest)?;
        drop(held);
        Ok(id)
    }

    /// There is nothing after what has arrived: then it is either all, or of no use.
    fn whole_part(&self, listed: &Listed, id: Option<&BlobId>) -> Result<BlobId, Miss> {
        let id = id.ok_or(Failure::NoSuchRange)?;
        match self.finish(listed, id, None) {
            Ok(()) => Ok(id.clone()),
            Err(Miss::Wrong(_)) => Err(Failure::NoSuchRange.into()),
            Err(other) => Err(other),
        }
    }

    /// Asks for a file; gives the answer, the file's hash, and its size where a redirect named it.
    fn ask(
        &self,
        listed: &Listed,
        from: Option<u64>,
    ) -> Result<(Answer, BlobId, Option<u64>), Failure> {
        let parts = self.hub.repository.split('/');
        let parts = parts.chain(["resolve", self.commit]);
        let url = self.client.url(parts.chain(listed.name.split('/')));
        let mut announced = Announced::default();
        let answer = self
            .client
            .get(url, from, self.network.stall, &mut |head, own| {
                announced.hop(head, own, self.commit)
            })?;
        let (id, size) = announced.file().map_err(Failure::Refused)?;
        if listed.id.as_ref().is_some_and(|listed| *listed != id) {
            return Err(Failure::Refused(
                "its hash is another than in the file list".into(),
            ));
        }
        Ok((answer, id, size))
    }

    /// Whether the blob is there already, from another pull or client; a wrong one is removed.
    fn blob_is_whole(&self, id: &BlobId) -> Result<bool, SourceError> {
        let blob = self.folder.blob(id);
        if blob.symlink_metadata().is_err() {
            return Ok(false);
        }
        if blob.is_file()
            && self.folder.inside(&self.snapshot, &blob).is_ok()
            && hash_of(&blob, id)? == id.digits()
        {
            return Ok(true);
        }
        remove(&blob)?;
        Ok(false)
    }

    /// Whether the disk has room for what is to come.
    fn room(&self, bytes: Option<u64>) -> Result<(), Failure> {
        let folder = self.folder.blobs();
        let (Some(bytes), Some(free)) = (bytes, free_bytes(&folder)) else {
            return Ok(());
        };
        if bytes <= free {
            return Ok(());
        }
        Err(Failure::Refused(no_room(bytes, &folder, free)))
    }

    /// Takes the body in; gives its SHA-256, where that is what is asked of it.
    fn receive(
        &self,
        listed: &Listed,
        id: &BlobId,
        answer: Answer,
        (start, total): (u64, Option<u64>),
        progress: &mut dyn PullProgress,
    ) -> Result<Option<String>, Miss> {
        let path = self.folder.part(id);
        let io = |e| SourceError::io(&path, e);
        if path.symlink_metadata().is_ok_and(|meta| !meta.is_file()) {
            remove(&path)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        }
        let mut file = options.open(&path).map_err(io)?;
        file.set_len(start).map_err(io)?;
        let mut hasher = matches!(id, BlobId::Sha256(_)).then(Sha256::new);
        let mut buffer = vec![0u8; 1 << 18];
        // What is there already counts in the hash; reading it leaves the file at its end.
        loop {
            let count = file.read(&mut buffer).map_err(io)?;
            let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else {
                break;
            };
            if let Some(hasher) = &mut hasher {
                hasher.update(part);
            }
        }
        let limit = total.unwrap_or(match is_weights(&listed.name) {
            true => WEIGHTS_CAP,
            false => SMALL_CAP,
        });
        progress.advance(start);
        let mut done = start;
        let mut body = answer.body(self.network.stall);
        loop {
            let count = body
                .read(&mut buffer)
                .map_err(|error| broken_off(&error, self.network.stall, done, total))?;
            let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else {
                break;
            };
            done = done.saturating_add(part.len() as u64);
            if done > limit {
                drop(file);
                remove(&path)?;
                return Err(Failure::Refused(match total {
                    Some(_) => format!("it sends more than the {limit} bytes it announced"),
                    None => {
                        format!("it sends more than {limit} bytes without having said how many")
                    }
                })
                .into());
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(part);
            }
            file.write_all(part).map_err(io)?;
            progress.advance(done);
        }
        if let Some(total) = total
            && done != total
        {
            return Err(Failure::Broken(format!("it ended{}", after(done, Some(total)))).into());
        }
        file.sync_all().map_err(io)?;
        Ok(hasher.map(|hasher| hex(&hasher.finalize())))
    }

    /// Makes the part the blob if its hash, computed here unless given, is right; else throws it
    /// away.
    fn finish(&self, listed: &Listed, id: &BlobId, digest: Option<String>) -> Result<(), Miss> {
        let part = self.folder.part(id);
        let found = match digest {
            Some(digest) => digest,
            None => hash_of(&part, id)?,
        };
        if found != id.digits() {
            remove(&part)?;
            return Err(Miss::Wrong(SourceError::WrongHash {
                file: self.named(&listed.name),
                kind: match id {
                    BlobId::Git(_) => "Git hash",
                    BlobId::Sha256(_) => "SHA-256",
                },
                expected: id.digits().to_owned(),
                found,
            }));
        }
        let blob = self.folder.blob(id);
        std::fs::rename(&part, &blob).map_err(|e| SourceError::io(&blob, e))?;
        Ok(())
    }
}

fn after(done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) => format!(" after {done} of {total} bytes"),
        None => format!(" after {done} bytes"),
    }
}

fn broken_off(error: &std::io::Error, stall: Duration, done: u64, total: Option<u64>) -> Failure {
    let reason = cut(error, stall);
    Failure::Broken(format!("{reason}{}", after(done, total)))
}

/// Why a body ended early.
pub(super) fn cut(error: &std::io::Error, stall: Duration) -> String {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<ureq::Error>());
    match inner {
        Some(ureq::Error::Timeout(_)) => {
            format!("nothing arrived for {} seconds", stall.as_secs_f64())
        }
        Some(other) => super::client::explained(other, stall),
        None => crate::source::network::presentable(&error.to_string()),
    }
}

/// The hash of a file, of the kind that `id` is.
fn hash_of(path: &Path, id: &BlobId) -> Result<String, SourceError> {
    let hash = match id {
        BlobId::Sha256(_) => sha256_file(path),
        BlobId::Git(_) => git_hash(path),
    };
    hash.map_err(|e| SourceError::io(path, e))
}

/// The hash that Git names a file's contents by: SHA-1 of a line with the length, and the contents.
fn git_hash(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", file.metadata()?.len()));
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let count = file.read(&mut buffer)?;
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else {
            return Ok(hex(&hasher.finalize()));
        };
        hasher.update(part);
    }
}

/// Bytes that this user may still write on a folder's disk.
#[cfg(unix)]
pub(super) fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(not(unix))]
pub(super) fn free_bytes(_: &Path) -> Option<u64> {
    None
}

pub(super) fn no_room(bytes: u64, folder: &Path, free: u64) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    format!(
        "{:.1} MB more are needed, but {} has {:.1} MB free; make room, or set HF_HOME to a \
         directory on a larger disk",
        megabytes(bytes),
        folder.display(),
        megabytes(free)
    )
}

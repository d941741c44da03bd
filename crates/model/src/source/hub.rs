//! Models of the Hugging Face hub, through the `hf-hub` crate and in its cache layout
//! (`models--org--name/{blobs,refs,snapshots}`), which the Python clients share.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use super::{HubRef, PullOptions, PullProgress, SourceError};
use crate::checkpoint::sha256_file;

/// How long the hub may take to answer the first question, names and connections included.
const FIRST_ANSWER: Duration = Duration::from_secs(8);
/// How long a download may stand still.
const STALL: Duration = Duration::from_secs(60);
/// How often a file is tried; each try continues where the last one stopped.
const ATTEMPTS: usize = 4;
/// How often a file with wrong contents is fetched before its source is given up.
const WRONG_CONTENTS: usize = 2;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Everything but the weights that a model is made of here.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// The snapshot of a repository and its commit, if it is complete in one of the caches.
pub(super) fn locate(hub: &HubRef, options: &PullOptions) -> Option<(PathBuf, String)> {
    let caches = std::iter::once(&options.hub_cache).chain(&options.hub_fallback);
    caches
        .filter_map(|cache| snapshot(cache, hub))
        .find(|(path, _)| is_complete(path))
}

fn snapshot(cache: &Path, hub: &HubRef) -> Option<(PathBuf, String)> {
    let folder = cache.join(repo(hub, hub.revision()).folder_name());
    let commit = match std::fs::read_to_string(folder.join("refs").join(hub.revision())) {
        Ok(commit) => commit.trim().to_owned(),
        // A commit names its snapshot itself.
        Err(_) => hub.revision().to_owned(),
    };
    if commit.is_empty() || commit.contains(['/', '\\']) || commit.contains("..") {
        return None;
    }
    let path = folder.join("snapshots").join(&commit);
    path.is_dir().then_some((path, commit))
}

/// Whether a directory holds a configuration and all weights. Weights are fetched last, so then
/// the rest is there too.
fn is_complete(dir: &Path) -> bool {
    if !dir.join("config.json").is_file() {
        return false;
    }
    if dir.join(WEIGHTS).is_file() {
        return true;
    }
    let shards = std::fs::read(dir.join(INDEX))
        .ok()
        .and_then(|text| shards(&text));
    shards.is_some_and(|shards| shards.iter().all(|name| dir.join(name).is_file()))
}

/// The shard names of an index, each once.
fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let mut names: Vec<String> = index
        .get("weight_map")?
        .as_object()?
        .values()
        .map(|name| name.as_str().map(str::to_owned))
        .collect::<Option<_>>()?;
    names.sort();
    names.dedup();
    let plain = |name: &String| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
    (!names.is_empty() && names.iter().all(plain)).then_some(names)
}

fn repo(hub: &HubRef, revision: &str) -> Repo {
    Repo::with_revision(hub.repository.clone(), RepoType::Model, revision.to_owned())
}

/// Fetches what is missing of a repository; gives its snapshot and commit.
pub(super) fn pull(
    hub: &HubRef,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<(PathBuf, String), SourceError> {
    let what = || format!("the hub ({})", options.endpoint);
    if options.offline || options.hub_offline {
        return Err(SourceError::Offline {
            what: what(),
            why: match options.offline {
                true => "the network is not to be used".into(),
                false => "HF_HUB_OFFLINE is set".into(),
            },
        });
    }
    progress.note(&format!(
        "asking {} for {}",
        options.endpoint, hub.repository
    ));
    let api = api(options).map_err(|e| refused(hub, e.to_string()))?;
    let listing = first_answer(&api, hub, options)?;

    let has = |name: &str| listing.files.iter().any(|file| file == name);
    let single = has(WEIGHTS);
    if !has("config.json") || !(single || has(INDEX)) {
        return Err(refused(hub, missing_files(&listing.files)));
    }
    let folder = options
        .hub_cache
        .join(repo(hub, hub.revision()).folder_name());
    tidy_partial_blobs(&folder.join("blobs"))?;

    // All files come from one commit, however often the branch moves meanwhile.
    let fetch = Fetch {
        api: &api,
        hub,
        options,
        commit: &listing.commit,
        snapshot: folder.join("snapshots").join(&listing.commit),
    };
    for name in SMALL_FILES.into_iter().filter(|name| has(name)) {
        fetch.file(name, progress)?;
    }
    if single {
        fetch.file(WEIGHTS, progress)?;
    } else {
        let index = fetch.file(INDEX, progress)?;
        let text = std::fs::read(&index).map_err(|e| SourceError::io(&index, e))?;
        let names = shards(&text)
            .ok_or_else(|| refused(hub, format!("its {INDEX} is not a shard index")))?;
        for name in names {
            fetch.file(&name, progress)?;
        }
    }
    // Only now does the revision name the commit: a half-fetched one is never found.
    Cache::new(options.hub_cache.clone())
        .repo(repo(hub, hub.revision()))
        .create_ref(&listing.commit)
        .map_err(|e| SourceError::io(&folder, e))?;
    Ok((fetch.snapshot, listing.commit))
}

fn api(options: &PullOptions) -> Result<Api, ApiError> {
    // Retries of the crate itself stay off: it restarts a resumed file at its beginning when the
    // first retry fails before any byte arrived.
    ApiBuilder::from_cache(Cache::new(options.hub_cache.clone()))
        .with_endpoint(options.endpoint.clone())
        .with_token(options.token.clone())
        .with_progress(false)
        .with_retries(0)
        .with_user_agent("enamel", env!("CARGO_PKG_VERSION"))
        .build()
}

struct Listing {
    files: Vec<String>,
    commit: String,
}

/// Asks for the file list, in a thread of its own since neither name resolution nor connecting can
/// be given a deadline; a thread that hangs is left behind.
fn first_answer(api: &Api, hub: &HubRef, options: &PullOptions) -> Result<Listing, SourceError> {
    let (sender, receiver) = mpsc::channel();
    let repo = api.repo(repo(hub, hub.revision()));
    std::thread::spawn(move || {
        // The receiver is gone when the time was up.
        let _ = sender.send(repo.info());
    });
    let unreachable = |reason: String| SourceError::Unreachable {
        host: host(&options.endpoint),
        reason,
    };
    let info = match receiver.recv_timeout(FIRST_ANSWER) {
        Ok(Ok(info)) => info,
        Ok(Err(error)) => {
            return Err(match status(&error) {
                Some(status) => refused(hub, explain(status, hub)),
                None => unreachable(connection_failure(&error)),
            });
        }
        Err(_) => {
            return Err(unreachable(format!(
                "no answer within {} seconds",
                FIRST_ANSWER.as_secs()
            )));
        }
    };
    let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
    if !plain(&info.sha) {
        return Err(refused(hub, format!("its commit is '{}'", info.sha)));
    }
    Ok(Listing {
        files: info.siblings.into_iter().map(|s| s.rfilename).collect(),
        commit: info.sha,
    })
}

/// Why there was no connection, with the way out where a certificate is the cause.
fn connection_failure(error: &ApiError) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("request error: ").unwrap_or(&text);
    if text.contains("UnknownIssuer") {
        return format!(
            "{text}; certificates of a private authority are not accepted here: fetch the model \
             with the Python client into the same HF_HOME, or give its directory"
        );
    }
    text.to_owned()
}

/// The host of a URL, for messages.
fn host(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or(rest).to_owned()
}

/// The HTTP status behind an error, which the HTTP client's message ends with.
fn status(error: &ApiError) -> Option<u16> {
    let text = match error {
        ApiError::RequestError(error) => error.to_string(),
        ApiError::TooManyRetries(error) => return status(error),
        _ => return None,
    };
    text.rsplit_once("status: ")?.1.trim().parse().ok()
}

fn explain(status: u16, hub: &HubRef) -> String {
    match status {
        401 | 403 => "the hub denies access; accept the model's terms on its page if it has any, \
                      and set HF_TOKEN to a token that may read it"
            .into(),
        404 => format!(
            "the hub has no such repository at revision '{}' (for a private one set HF_TOKEN)",
            hub.revision()
        ),
        429 => "the hub limits the rate of requests; wait, or set HF_TOKEN".into(),
        other => format!("the hub answers with HTTP status {other}; try again later"),
    }
}

fn refused(hub: &HubRef, reason: String) -> SourceError {
    SourceError::Refused {
        source_name: format!("hub repository {}", hub.repository),
        reason,
    }
}

fn missing_files(files: &[String]) -> String {
    let gguf: Vec<&str> = files
        .iter()
        .filter(|name| name.ends_with(".gguf"))
        .map(String::as_str)
        .collect();
    if let Some(first) = gguf.first() {
        return format!(
            "it holds GGUF files ({first} …) and no {WEIGHTS}; download one and give its path"
        );
    }
    format!("it has no config.json with {WEIGHTS} or {INDEX}, so it is not a model to load here")
}

/// Makes what earlier pulls left behind fit to be continued.
///
/// The hub client asks for the bytes after those it has. A part that is already whole would make
/// it ask for none and fail, so its last byte is fetched again; parts of small files (whose name is
/// not a SHA-256) are not worth continuing.
fn tidy_partial_blobs(blobs: &Path) -> Result<(), SourceError> {
    for entry in std::fs::read_dir(blobs).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != "part") {
            continue;
        }
        let tidied = match sha256_name(&path) {
            None => std::fs::remove_file(&path),
            Some(name) => sha256_file(&path).and_then(|hash| {
                if hash != name {
                    return Ok(());
                }
                let file = std::fs::OpenOptions::new().write(true).open(&path)?;
                let length = file.metadata()?.len();
                file.set_len(length.saturating_sub(1))
            }),
        };
        tidied.map_err(|e| SourceError::io(&path, e))?;
    }
    Ok(())
}

/// A blob's name without extension, when it is a SHA-256: the hub's tag for large files.
fn sha256_name(path: &Path) -> Option<String> {
    let name = path.file_stem()?.to_str()?;
    (name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| name.to_ascii_lowercase())
}

struct Fetch<'a> {
    api: &'a Api,
    hub: &'a HubRef,
    options: &'a PullOptions,
    commit: &'a str,
    snapshot: PathBuf,
}

/// What a download thread reports.
enum Report {
    Start(u64),
    Received(u64),
    Done(Result<PathBuf, ApiError>),
}

struct Reporter(mpsc::Sender<Report>);

impl Progress for Reporter {
    fn init(&mut self, size: usize, _: &str) {
        let _ = self.0.send(Report::Start(size as u64));
    }
    fn update(&mut self, size: usize) {
        let _ = self.0.send(Report::Received(size as u64));
    }
    fn finish(&mut self) {}
}

impl Fetch<'_> {
    /// Fetches one file of the commit unless it is there, and checks its hash.
    fn file(&self, name: &str, progress: &mut dyn PullProgress) -> Result<PathBuf, SourceError> {
        let pointer = self.snapshot.join(name);
        if pointer.is_file() {
            match verify(&pointer, name) {
                Ok(()) => return Ok(pointer),
                Err(SourceError::WrongHash { .. }) => discard(&pointer)?,
                Err(other) => return Err(other),
            }
        }
        discard(&pointer)?;
        let (mut attempt, mut wrong) = (1, 0);
        loop {
            let failure = match self.download(name, progress) {
                Ok(size) => {
                    match check_size(&pointer, size).and_then(|()| verify(&pointer, name)) {
                        Ok(()) => {
                            progress.finish();
                            return Ok(pointer);
                        }
                        Err(error) => {
                            discard(&pointer)?;
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            wrong += usize::from(matches!(failure, SourceError::WrongHash { .. }));
            if attempt == ATTEMPTS || wrong == WRONG_CONTENTS || !worth_retrying(&failure) {
                return Err(failure);
            }
            progress.note(&format!("{failure}; trying {name} again"));
            // Whatever was wrong with a part that could not be continued, it goes.
            if attempt + 1 == ATTEMPTS {
                self.drop_part(name);
            }
            std::thread::sleep(Duration::from_millis(300 << attempt));
            attempt += 1;
        }
    }

    /// One try; gives the size that the hub announced.
    fn download(&self, name: &str, progress: &mut dyn PullProgress) -> Result<u64, SourceError> {
        let (sender, receiver) = mpsc::channel();
        let repo = self.api.repo(repo(self.hub, self.commit));
        let file = name.to_owned();
        std::thread::spawn(move || {
            let result = repo.download_with_progress(&file, Reporter(sender.clone()));
            let _ = sender.send(Report::Done(result));
        });
        let (mut size, mut done) = (0, 0);
        let mut announced = false;
        loop {
            match receiver.recv_timeout(STALL) {
                // The client announces a file twice: before and after opening the connection.
                Ok(Report::Start(total)) => {
                    (size, done) = (total, 0);
                    if !std::mem::replace(&mut announced, true) {
                        progress.start(name, Some(total));
                    }
                }
                Ok(Report::Received(count)) => {
                    done += count;
                    progress.advance(done);
                }
                Ok(Report::Done(Ok(_))) => return Ok(size),
                Ok(Report::Done(Err(error))) => {
                    return Err(match status(&error) {
                        Some(status @ 400..=499) if status != 416 && status != 429 => {
                            refused(self.hub, format!("{name}: {}", explain(status, self.hub)))
                        }
                        _ => self.broken(format!("{name}: {error}")),
                    });
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.broken(format!(
                        "{name}: nothing arrived for {} seconds",
                        STALL.as_secs()
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.broken(format!("{name}: the download ended without a result")));
                }
            }
        }
    }

    fn broken(&self, reason: String) -> SourceError {
        SourceError::Unreachable {
            host: host(&self.options.endpoint),
            reason,
        }
    }

    fn drop_part(&self, name: &str) {
        let repo = repo(self.hub, self.commit);
        let url = self.api.repo(repo.clone()).url(name);
        if let Ok(metadata) = self.api.metadata(&url) {
            let blob = Cache::new(self.options.hub_cache.clone())
                .repo(repo)
                .blob_path(metadata.etag());
            // If it cannot be removed, the last try fails and says why.
            let _ = std::fs::remove_file(blob.with_extension("part"));
        }
    }
}

/// Broken connections and wrong contents may be better the next time; refusals will not.
fn worth_retrying(error: &SourceError) -> bool {
    matches!(
        error,
        SourceError::Unreachable { .. } | SourceError::WrongHash { .. }
    )
}

fn check_size(pointer: &Path, announced: u64) -> Result<(), SourceError> {
    let found = std::fs::metadata(pointer)
        .map_err(|e| SourceError::io(pointer, e))?
        .len();
    if found == announced {
        return Ok(());
    }
    Err(SourceError::WrongHash {
        file: pointer.display().to_string(),
        expected: format!("of {announced} bytes"),
        found: format!("of {found} bytes"),
    })
}

/// Checks a large file against the SHA-256 that its blob is named by.
fn verify(pointer: &Path, name: &str) -> Result<(), SourceError> {
    let blob = std::fs::canonicalize(pointer).map_err(|e| SourceError::io(pointer, e))?;
    let Some(expected) = sha256_name(&blob) else {
        return Ok(());
    };
    let found = sha256_file(&blob).map_err(|e| SourceError::io(&blob, e))?;
    if found == expected {
        return Ok(());
    }
    Err(SourceError::WrongHash {
        file: name.to_owned(),
        expected,
        found,
    })
}

/// Removes a file of a snapshot and the blob behind it, and a link that leads nowhere.
fn discard(pointer: &Path) -> Result<(), SourceError> {
    if let Ok(blob) = std::fs::canonicalize(pointer) {
        std::fs::remove_file(&blob).map_err(|e| SourceError::io(&blob, e))?;
    }
    if pointer.symlink_metadata().is_ok() {
        std::fs::remove_file(pointer).map_err(|e| SourceError::io(pointer, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

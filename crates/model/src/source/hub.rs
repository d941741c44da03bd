//! Models of the Hugging Face hub, in the cache layout that the Python clients share.
//!
//! The hub, and whatever it redirects to, is believed nothing: what an answer says is judged in
//! [`answer`] before it is used, and a file counts once its hash is right.

#[doc(hidden)]
pub mod answer;
mod client;
mod download;
mod layout;
mod watched;

use std::io::Read;
use std::path::PathBuf;

use self::answer::{LISTING_BYTES, Listed, Listing};
use self::client::{Client, Failure};
use self::download::{Fetch, free_bytes};
pub use self::layout::shards;
use self::layout::{RepoFolder, read_index};
use super::network::address;
use super::{HubRef, PullOptions, PullProgress, SourceError};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Everything but the weights that a model is made of here.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];
const TOKENIZER: &str = "tokenizer.json";
/// What is read where there is no `tokenizer.json`.
const PIECES: &str = "tokenizer.model";

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// The snapshot of a repository and its commit, if it is complete in one of the caches; else what
/// each lacks, in words.
pub(super) fn locate(
    hub: &HubRef,
    options: &PullOptions,
) -> Result<(PathBuf, String), Vec<String>> {
    let caches = std::iter::once(&options.hub_cache).chain(&options.hub_fallback);
    let mut lacks = Vec::new();
    for cache in caches {
        match RepoFolder::new(cache, hub).find(hub) {
            Ok(found) => return Ok(found),
            Err(lack) => lacks.push(lack),
        }
    }
    lacks.dedup();
    Err(lacks)
}

/// Fetches what is missing of a repository; gives its snapshot and commit.
pub(super) fn pull(
    hub: &HubRef,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<(PathBuf, String), SourceError> {
    let shown = address(&options.endpoint);
    if options.offline || options.hub_offline {
        return Err(SourceError::Offline {
            wanted: format!("{} at revision '{}'", hub.repository, hub.revision()),
            what: format!("the hub ({shown})"),
            why: match options.offline {
                true => "the network is not to be used".into(),
                false => "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set".into(),
            },
            missing: locate(hub, options).err().unwrap_or_default(),
        });
    }
    progress.note(&format!("asking {shown} for {}", hub.repository));
    let host = host(&shown);
    let client = Client::new(
        &options.endpoint,
        options.token.as_deref(),
        &options.network,
    )
    .map_err(|failure| hub_error(hub, host, failure))?;
    let listing = list(&client, hub, options).map_err(|failure| hub_error(hub, host, failure))?;

    let listed = |name: &str| listing.files.iter().find(|file| file.name == name);
    let single = listed(WEIGHTS);
    if listed("config.json").is_none() || (single.is_none() && listed(INDEX).is_none()) {
        return Err(refused(hub, missing_files(&listing)));
    }
    let folder = RepoFolder::new(&options.hub_cache, hub);
    let snapshot = folder.prepare(&listing.commit)?;

    // All files come from one commit, however often the branch moves meanwhile.
    let fetch = Fetch {
        client: &client,
        hub,
        network: &options.network,
        host,
        commit: &listing.commit,
        folder,
        snapshot,
    };
    for file in SMALL_FILES.into_iter().filter_map(listed) {
        fetch.file(file, progress)?;
    }
    if let (None, Some(pieces)) = (listed(TOKENIZER), listed(PIECES)) {
        fetch.file(pieces, progress)?;
    }
    match (single, listed(INDEX)) {
        (Some(file), _) => {
            fetch.file(file, progress)?;
        }
        (None, Some(index)) => {
            let index = fetch.file(index, progress)?;
            let names = read_index(&index)
                .ok_or_else(|| refused(hub, format!("its {INDEX} is not a shard index")))?;
            let shards = names
                .iter()
                .map(|name| {
                    listed(name).ok_or_else(|| {
                        refused(hub, format!("its {INDEX} names {name}, which it lacks"))
                    })
                })
                .collect::<Result<Vec<&Listed>, _>>()?;
            room_for_all(&fetch, &shards)?;
            for file in shards {
                fetch.file(file, progress)?;
            }
        }
        (None, None) => {}
    }
    // Only now does the revision name the commit: a half-fetched one is never found.
    fetch
        .folder
        .set_reference(hub.revision(), &listing.commit)?;
    Ok((fetch.snapshot, listing.commit))
}

/// Asks for the repository's files.
fn list(client: &Client, hub: &HubRef, options: &PullOptions) -> Result<Listing, Failure> {
    let network = &options.network;
    let parts = ["api", "models"]
        .into_iter()
        .chain(hub.repository.split('/'));
    // With sizes and hashes.
    let url = client
        .url(parts.chain(["revision", hub.revision()]))
        .with_query("blobs=true");
    let answer = client.get(url, None, network.answer, &mut |_, _| Ok(()))?;
    let carried = answer::carried(&answer.head, 0).map_err(Failure::Refused)?;
    let endless = || Failure::Refused(format!("its file list exceeds {LISTING_BYTES} bytes"));
    if carried.total.is_some_and(|total| total > LISTING_BYTES) {
        return Err(endless());
    }
    let mut body = Vec::new();
    let read = answer
        .body(network.stall)
        .take(LISTING_BYTES.saturating_add(1))
        .read_to_end(&mut body);
    read.map_err(|error| Failure::Broken(download::cut(&error, network.stall)))?;
    if body.len() as u64 > LISTING_BYTES {
        return Err(endless());
    }
    answer::listing(&body).map_err(Failure::Refused)
}

/// Whether there is room for the shards that are not here yet, before the first of them.
fn room_for_all(fetch: &Fetch, shards: &[&Listed]) -> Result<(), SourceError> {
    let missing = shards
        .iter()
        .filter(|file| !fetch.snapshot.join(&file.name).is_file());
    let bytes = missing
        .filter_map(|file| file.size)
        .fold(0u64, u64::saturating_add);
    let blobs = fetch.folder.blobs();
    match free_bytes(&blobs) {
        Some(free) if bytes > free => {
            Err(refused(fetch.hub, download::no_room(bytes, &blobs, free)))
        }
        _ => Ok(()),
    }
}

fn hub_error(hub: &HubRef, host: &str, failure: Failure) -> SourceError {
    match failure {
        Failure::Broken(reason) => {
            unreachable(host, format!("the files of {}: {reason}", hub.repository))
        }
        Failure::Refused(reason) => refused(hub, reason),
        Failure::Later(Some(wait), reason) => refused(
            hub,
            format!("{reason} (it asks to wait {} seconds)", wait.as_secs()),
        ),
        Failure::Later(None, reason) => refused(hub, reason),
        Failure::NoSuchRange => refused(hub, "the hub answers another question".into()),
    }
}

/// The host of a shown address.
fn host(shown: &str) -> &str {
    let rest = shown.split_once("://").map_or(shown, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

fn unreachable(host: &str, reason: String) -> SourceError {
    SourceError::Unreachable {
        host: host.to_owned(),
        reason,
    }
}

fn refused(hub: &HubRef, reason: String) -> SourceError {
    SourceError::Refused {
        source_name: format!("hub repository {}", hub.repository),
        reason,
    }
}

fn missing_files(listing: &Listing) -> String {
    let gguf = listing
        .files
        .iter()
        .find(|file| file.name.ends_with(".gguf"));
    if let Some(first) = gguf {
        return format!(
            "it holds GGUF files ({} …) and no {WEIGHTS}; download one and give its path",
            first.name
        );
    }
    format!("it has no config.json with {WEIGHTS} or {INDEX}, so it is not a model to load here")
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

//! What a hub's answers may say. Pure functions of their bytes: nothing here opens a socket or a
//! file, and nothing an answer says is used before it went through here.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

pub use crate::source::url::{Fault, Url};

/// Bytes of a file list that are read at most.
pub const LISTING_BYTES: u64 = 10 << 20;
/// Files that a repository may have.
const LISTING_FILES: usize = 100_000;
/// The largest size that is believed of a file: 16 TiB.
const FILE_BYTES: u64 = 16 << 40;
/// The longest name of a file, and the longest address that a redirect may name.
const NAME_BYTES: usize = 1024;
const ADDRESS_BYTES: usize = 8192;

/// A judgement; the error is the reason, in words for the user, without text of the server's.
pub type Judged<T> = Result<T, String>;

/// What the hub calls a file's contents by: its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobId {
    /// The SHA-1 of a Git blob, 40 digits: files that Git itself keeps.
    Git(String),
    /// The SHA-256 of the file, 64 digits: files of large file storage.
    Sha256(String),
}

impl BlobId {
    /// Reads 40 or 64 hexadecimal digits, in quotes and with `W/` before them or without.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix("W/").unwrap_or(text);
        let text = text
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
            .unwrap_or(text);
        if !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        match text.len() {
            40 => Some(Self::Git(text.to_ascii_lowercase())),
            64 => Some(Self::Sha256(text.to_ascii_lowercase())),
            _ => None,
        }
    }

    /// The digits, in lower case: the name of the blob in the cache.
    pub fn digits(&self) -> &str {
        match self {
            Self::Git(digits) | Self::Sha256(digits) => digits,
        }
    }
}

/// A commit's name, which becomes a folder's: 40 digits, or 64 of a repository with SHA-256.
pub fn commit(text: &str) -> Option<String> {
    BlobId::parse(text)
        .filter(|id| id.digits().len() == text.len())
        .map(|id| id.digits().to_owned())
}

/// The files of a repository at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The commit, in lower-case digits.
    pub commit: String,
    /// The files whose names are fit to be used and shown.
    pub files: Vec<Listed>,
}

/// A file of a [`Listing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its path in the repository, with `/`.
    pub name: String,
    /// Its size in bytes, where the hub says it.
    pub size: Option<u64>,
    /// The hash of its contents, where the hub says it.
    pub id: Option<BlobId>,
}

#[derive(Deserialize)]
struct RawListing {
    sha: String,
    #[serde(deserialize_with = "capped")]
    siblings: Vec<RawFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawFile {
    rfilename: String,
    size: Option<serde_json::Number>,
    blob_id: Option<String>,
    lfs: Option<RawLarge>,
}

#[derive(Deserialize)]
struct RawLarge {
    sha256: Option<String>,
    size: Option<serde_json::Number>,
}

/// Reads the array up to its largest length; what follows is skipped without being kept.
fn capped<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<RawFile>, D::Error> {
    struct Capped;
    impl<'de> Visitor<'de> for Capped {
        type Value = Vec<RawFile>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of files")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut files = Vec::new();
            while files.len() <= LISTING_FILES {
                match list.next_element()? {
                    Some(file) => files.push(file),
                    None => return Ok(files),
                }
            }
            while list.next_element::<IgnoredAny>()?.is_some() {}
            Ok(files)
        }
    }
    from.deserialize_seq(Capped)
}

/// Reads the hub's answer to the question for a repository's files.
pub fn listing(body: &[u8]) -> Judged<Listing> {
    let raw: RawListing = serde_json::from_slice(body).map_err(|e| {
        // The parser's own words would quote the server.
        if is_page(body) {
            return "its file list is a web page: does this network ask to log in first?"
                .to_owned();
        }
        format!(
            "its file list is not what a hub answers (line {}, column {})",
            e.line(),
            e.column()
        )
    })?;
    let commit = commit(&raw.sha).ok_or("the commit of its file list is not a hash")?;
    if raw.siblings.len() > LISTING_FILES {
        return Err(format!("its file list has more than {LISTING_FILES} files"));
    }
    let mut files = Vec::with_capacity(raw.siblings.len());
    let mut seen = HashSet::new();
    for file in raw.siblings {
        match judge_name(&file.rfilename) {
            Name::Usable => {}
            Name::Unusable => continue,
            Name::Hostile => {
                return Err(
                    "its file list has a name that leads out of the repository; do not trust it"
                        .into(),
                );
            }
        }
        if !seen.insert(file.rfilename.clone()) {
            return Err(format!("its file list has {} twice", file.rfilename));
        }
        let (size, id) = match &file.lfs {
            Some(large) => (
                large.size.as_ref().or(file.size.as_ref()),
                large.sha256.as_deref(),
            ),
            None => (file.size.as_ref(), file.blob_id.as_deref()),
        };
        let size = size
            .map(|size| size.as_u64().filter(|size| *size <= FILE_BYTES))
            .map(|size| size.ok_or_else(|| format!("the size of {} is impossible", file.rfilename)))
            .transpose()?;
        let id = id
            .map(|id| {
                BlobId::parse(id).ok_or_else(|| {
                    format!("the hash of {} in its file list is none", file.rfilename)
                })
            })
            .transpose()?;
        files.push(Listed {
            name: file.rfilename,
            size,
            id,
        });
    }
    Ok(Listing { commit, files })
}

/// Whether a body looks like a page for people, as a network's login gives in place of anything.
pub fn is_page(body: &[u8]) -> bool {
    let start = body.trim_ascii_start();
    start.first() == Some(&b'<')
}

enum Name {
    Usable,
    /// Possible in Git, but not fit for every file system or a terminal: left out.
    Unusable,
    /// Impossible in Git.
    Hostile,
}

fn judge_name(name: &str) -> Name {
    let parts = || name.split(['/', '\\']);
    let drive = name.as_bytes().get(1) == Some(&b':');
    if name.is_empty()
        || name.starts_with(['/', '\\'])
        || name.contains('\0')
        || drive
        || parts().any(|part| matches!(part, "" | "." | ".."))
    {
        return Name::Hostile;
    }
    if name.len() > NAME_BYTES
        || name.contains('\\')
        || name.chars().any(is_unprintable)
        || parts().any(is_reserved)
    {
        return Name::Unusable;
    }
    Name::Usable
}

/// Control characters and those that turn the direction of text.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Names that Windows keeps for devices or cannot hold.
fn is_reserved(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or(part).to_ascii_uppercase();
    let device = matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (stem.len() == 4
            && (stem.starts_with("COM") || stem.starts_with("LPT"))
            && stem.ends_with(|c: char| c.is_ascii_digit()));
    device || part.ends_with(['.', ' ']) || part.contains([':', '*', '?', '"', '<', '>', '|'])
}

/// The status and headers of an answer.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// The HTTP status.
    pub status: u16,
    /// Names in lower case, and values, in the order received.
    pub fields: Vec<(String, Vec<u8>)>,
}

impl Head {
    /// A header's value. Two that differ are an error, since each reader could take another.
    pub fn one(&self, name: &str) -> Judged<Option<&str>> {
        let mut found: Option<&[u8]> = None;
        for (_, value) in self.fields.iter().filter(|(key, _)| key == name) {
            if found.is_some_and(|other| other != value) {
                return Err(format!("its answer has two different {name} headers"));
            }
            found = Some(value);
        }
        found
            .map(|value| {
                std::str::from_utf8(value)
                    .ok()
                    .map(str::trim)
                    .filter(|text| text.bytes().all(|b| (b' '..=b'~').contains(&b)))
                    .ok_or_else(|| format!("the {name} of its answer is not text"))
            })
            .transpose()
    }

    fn number(&self, name: &str) -> Judged<Option<u64>> {
        self.one(name)?
            .map(|text| size(text).ok_or_else(|| format!("the {name} of its answer is no size")))
            .transpose()
    }

    /// Whether the answer sends on to another address.
    pub fn is_redirect(&self) -> bool {
        matches!(self.status, 301 | 302 | 303 | 307 | 308)
    }

    /// How long the server asks to wait, if it says so in seconds.
    pub fn retry_after(&self) -> Option<u64> {
        self.number("retry-after").ok().flatten()
    }
}

/// Digits alone, and a believable number of bytes.
fn size(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())?
        .filter(|size| *size <= FILE_BYTES)
}

/// Where a redirect leads.
///
/// # Errors
///
/// A missing or unreadable address, one that is not of the web, one without encryption after one
/// with it, and one with a password.
pub fn redirect(from: &Url, head: &Head) -> Judged<Url> {
    let location = head.one("location")?.ok_or_else(|| {
        format!(
            "it redirects (HTTP {}) without saying where to",
            head.status
        )
    })?;
    if location.len() > ADDRESS_BYTES {
        return Err("it redirects to an address without end".into());
    }
    let to = from.join(location).map_err(|fault| match fault {
        Fault::Address => "it redirects to something that is no address",
        Fault::Scheme => "it redirects to something that is neither http nor https",
    })?;
    if (from.scheme(), to.scheme()) == ("https", "http") {
        return Err("it redirects from https to http, which is not followed".into());
    }
    if to.user().is_some() {
        return Err("it redirects to an address with a password in it".into());
    }
    Ok(to)
}

/// What the answers on the way to a file have said of it.
#[derive(Clone, Debug, Default)]
pub struct Announced {
    commit: bool,
    linked: Option<BlobId>,
    tag: Option<BlobId>,
    size: Option<u64>,
}

impl Announced {
    /// Takes in the answer of one hop: the endpoint's, or a host's that it redirects to.
    ///
    /// Of foreign hosts only those that name the right commit are heard: a storage's own ETag is
    /// no hash of the file.
    pub fn hop(&mut self, head: &Head, of_endpoint: bool, commit: &str) -> Judged<()> {
        let named = head.one("x-repo-commit")?;
        match named {
            Some(named) if named.eq_ignore_ascii_case(commit) => self.commit = true,
            Some(_) if of_endpoint => {
                return Err("its answer is of another commit than its file list".into());
            }
            _ if of_endpoint => {}
            _ => return Ok(()),
        }
        if let Some(text) = head.one("x-linked-etag")? {
            let id = BlobId::parse(text)
                .ok_or("its X-Linked-Etag is not a hash (40 or 64 hexadecimal digits)")?;
            agree(&mut self.linked, id, "hashes")?;
            if let Some(size) = head.number("x-linked-size")? {
                agree(&mut self.size, size, "sizes")?;
            }
        }
        if let Some(text) = head.one("etag")? {
            match BlobId::parse(text) {
                Some(id) => self.tag = Some(id),
                // A redirect's own tag is of its own body.
                None if head.is_redirect() || self.linked.is_some() || self.tag.is_some() => {}
                None => {
                    return Err("its ETag is not a hash (40 or 64 hexadecimal digits)".into());
                }
            }
        }
        Ok(())
    }

    /// The hash of the file, and its size where a redirect told it.
    pub fn file(&self) -> Judged<(BlobId, Option<u64>)> {
        if !self.commit {
            return Err("its answer names no commit (X-Repo-Commit), as a hub's does".into());
        }
        let id = self.linked.as_ref().or(self.tag.as_ref());
        let id = id.ok_or("its answer has no hash of the file (ETag)")?;
        Ok((id.clone(), self.size))
    }
}

fn agree<T: PartialEq>(known: &mut Option<T>, new: T, what: &str) -> Judged<()> {
    if known.as_ref().is_some_and(|known| *known != new) {
        return Err(format!("its answers name two different {what} of the file"));
    }
    *known = Some(new);
    Ok(())
}

/// The part of a file that an answer carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Where it begins: what was asked for, or 0.
    pub start: u64,
    /// The size of the whole file, where the answer says it.
    pub total: Option<u64>,
}

/// What the answer to a question for the bytes from `asked` on carries.
///
/// # Errors
///
/// A compressed body, other bytes than those asked for, and sizes that do not agree.
pub fn carried(head: &Head, asked: u64) -> Judged<Carried> {
    if let Some(encoding) = head.one("content-encoding")?
        && !encoding.eq_ignore_ascii_case("identity")
        && !encoding.is_empty()
    {
        return Err("it sends the file compressed, which was not asked for".into());
    }
    let length = head.number("content-length")?;
    if head.status == 200 {
        return Ok(Carried {
            start: 0,
            total: length,
        });
    }
    let range = head
        .one("content-range")?
        .and_then(content_range)
        .ok_or("it sends a part of the file without saying which (Content-Range)")?;
    let (first, last, total) = range;
    if first != asked && first != 0 {
        return Err(format!(
            "it sends the bytes from {first} on, where those from {asked} on were asked for"
        ));
    }
    let end = last.saturating_add(1);
    if total.is_some_and(|total| total != end) {
        return Err("it sends less than the rest of the file that was asked for".into());
    }
    if length.is_some_and(|length| first.saturating_add(length) != end) {
        return Err("the Content-Length and Content-Range of its answer do not agree".into());
    }
    Ok(Carried {
        start: first,
        total: Some(end),
    })
}

/// First and last byte, and the whole size where it is known, of `bytes 3-9/10`.
pub fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (size(first)?, size(last)?);
    let total = match total {
        "*" => None,
        digits => Some(size(digits)?),
    };
    let sound = unit.eq_ignore_ascii_case("bytes")
        && first <= last
        && total.is_none_or(|total| last < total);
    sound.then_some((first, last, total))
}

#[cfg(test)]
mod tests;

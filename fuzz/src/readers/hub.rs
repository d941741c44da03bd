//! A hub's answers: the list of a repository's files, the heads of the answers on the way to a file, and the
//! index of its shards.

use anyhow::{Context, Result};
use enamel_model::source::hub_answer::{self, Announced, Head};
use enamel_model::source::{HubUrl, hub_shards};
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::mutate;
use crate::random::Random;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SHA256: &str = "6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e";

/// Keys, names and values of a list of files.
const WORDS: [&str; 44] = [
    "sha",
    "siblings",
    "rfilename",
    "size",
    "blobId",
    "lfs",
    "sha256",
    "pointerSize",
    "oid",
    "config.json",
    "model.safetensors",
    "sub/model.safetensors",
    "..",
    "../config.json",
    "/etc/passwd",
    "a/../../b",
    "a//b",
    "a\\..\\b",
    "C:\\a",
    "c:a",
    "con",
    "aux.json",
    "COM1.txt",
    "a.",
    "a ",
    ".git/config",
    "\u{1b}]0;x\u{7}.json",
    "\u{202e}nosj.gifnoc",
    "é.json",
    "W/\"0123456789abcdef0123456789abcdef01234567\"",
    "0123456789abcdef0123456789abcdef01234567",
    "0123456789ABCDEF0123456789ABCDEF01234567",
    "0123456789abcdef0123456789abcdef0123456é",
    "main",
    "refs/pr/1",
    "weight_map",
    "metadata",
    "model-00001-of-00002.safetensors",
    "../model.safetensors",
    "17592186044416",
    "17592186044417",
    "-1",
    "1e3",
    "<html>",
];

/// Headers and their values.
const HEADERS: [&str; 52] = [
    "x-repo-commit",
    "x-linked-etag",
    "x-linked-size",
    "etag",
    "location",
    "content-length",
    "content-range",
    "content-encoding",
    "retry-after",
    "x-error-code",
    ": ",
    "\n",
    "\n\n",
    "\"",
    "W/",
    "bytes ",
    "bytes 0-9/10",
    "bytes 5-9/10",
    "bytes 5-9/*",
    "bytes 9-5/10",
    "bytes */10",
    "bytes 18446744073709551615-18446744073709551616/2",
    "-",
    "/",
    "*",
    "200",
    "206",
    "302",
    "307",
    "416",
    "0",
    "10",
    "+10",
    "17592186044416",
    "17592186044417",
    "18446744073709551615",
    "gzip",
    "identity",
    "https://hub.example/a",
    "https://other.example/b?c=d#e",
    "http://hub.example/a",
    "ftp://hub.example/a",
    "file:///etc/passwd",
    "https://user:secret@hub.example/",
    "https://hub.example:99999/",
    "//other.example/x",
    "/relative",
    "../up",
    "https://[::1]:1/",
    "https://xn--/",
    "javascript:x",
    "é",
];

struct Hub {
    listing: Value,
    index: Value,
    heads: Vec<String>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let listing = json!({"id": "a/b", "sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": 100, "blobId": COMMIT},
        {"rfilename": "sub/tokenizer.json", "size": 10, "blobId": COMMIT},
        {"rfilename": "model.safetensors", "size": 1_000_000, "blobId": COMMIT,
            "lfs": {"sha256": SHA256, "size": 1_000_000, "pointerSize": 130}},
        {"rfilename": "README.md"},
    ]});
    let index = json!({"metadata": {"total_size": 8}, "weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    let heads = vec![
        format!("200\nx-repo-commit: {COMMIT}\netag: \"{COMMIT}\"\ncontent-length: 10\n"),
        format!(
            "302\nx-repo-commit: {COMMIT}\nx-linked-etag: \"{SHA256}\"\nx-linked-size: 10\netag: \"a\"\n\
             location: https://other.example/b?c=d\n\n200\netag: \"storage\"\ncontent-length: 10\n"
        ),
        format!(
            "307\nx-repo-commit: {COMMIT}\nlocation: /moved/a\n\n302\nx-repo-commit: {COMMIT}\n\
             x-linked-etag: W/\"{SHA256}\"\nlocation: https://other.example/b\n\n206\n\
             content-range: bytes 5-9/10\ncontent-length: 5\n"
        ),
        "429\nretry-after: 3\nx-error-code: GatedRepo\n".to_owned(),
    ];
    Ok(Box::new(Hub {
        listing,
        index,
        heads,
    }))
}

/// The heads of a text: a status and header lines each, an empty line between them.
fn heads(text: &[u8]) -> Vec<Head> {
    let mut heads = Vec::new();
    let mut head: Option<Head> = None;
    for line in text.split(|byte| *byte == b'\n') {
        match (&mut head, line) {
            (_, []) => heads.extend(head.take()),
            (None, line) => {
                let status = String::from_utf8_lossy(line).parse().unwrap_or(200);
                head = Some(Head {
                    status,
                    fields: Vec::new(),
                });
            }
            (Some(head), line) => {
                let colon = line.iter().position(|byte| *byte == b':');
                let (name, value) = line.split_at(colon.unwrap_or(line.len()));
                let name = String::from_utf8_lossy(name).to_ascii_lowercase();
                let value = value.strip_prefix(b":").unwrap_or(value);
                head.fields.push((name, value.trim_ascii().to_vec()));
            }
        }
    }
    heads.extend(head);
    heads
}

impl Reader for Hub {
    fn input(&self, random: &mut Random) -> Input {
        let mut listing = self.listing.clone();
        let mut index = self.index.clone();
        let mut answers = random.pick(&self.heads).clone().into_bytes();
        let kind = random.below(4);
        if kind == 0 {
            for _ in 0..random.few() {
                mutate::json(random, &mut listing, &WORDS);
            }
        }
        if kind == 1 {
            for _ in 0..random.few() {
                mutate::json(random, &mut index, &WORDS);
            }
        }
        if kind >= 2 {
            mutate::text(random, &mut answers, &HEADERS);
        }
        let mut listing = listing.to_string().into_bytes();
        if kind == 0 && random.once_in(6) {
            mutate::text(random, &mut listing, &WORDS);
        }
        Input(vec![
            Part::new("@listing.json", listing),
            Part::new("@answers.txt", answers),
            Part::new("@index.json", index.to_string()),
        ])
    }

    fn read(&mut self, input: &Input, _: &mut Folder) -> Result<bool> {
        let listing = hub_answer::listing(input.part("@listing.json"));
        if let Ok(listing) = &listing {
            assert!(listing.commit.bytes().all(|b| b.is_ascii_hexdigit()));
            for file in &listing.files {
                let inside = |part: &str| !matches!(part, "" | "." | "..");
                assert!(file.name.split(['/', '\\']).all(inside), "{}", file.name);
            }
        }
        let shards = hub_shards(input.part("@index.json"));
        assert!(shards.iter().flatten().all(|name| !name.contains('/')));
        let mut url = HubUrl::parse("https://hub.example/a/b/resolve/main/model.safetensors")
            .ok()
            .context("the first address")?;
        let mut announced = Announced::default();
        let heads = heads(input.part("@answers.txt"));
        let mut last = None;
        for head in &heads {
            let _ = head.retry_after();
            if announced
                .hop(head, url.host() == "hub.example", COMMIT)
                .is_err()
            {
                return Ok(false);
            }
            if !head.is_redirect() {
                last = Some(head);
                break;
            }
            match hub_answer::redirect(&url, head) {
                Ok(to) => url = to,
                Err(_) => return Ok(false),
            }
            assert_eq!(url.scheme(), "https");
        }
        let Some(last) = last else {
            return Ok(false);
        };
        let carried = [0, 5].map(|asked| hub_answer::carried(last, asked));
        let file = announced.file();
        Ok(
            listing.is_ok()
                && shards.is_some()
                && file.is_ok()
                && carried.iter().any(Result::is_ok),
        )
    }
}

//! Hubs that lie, break off, never end, and send elsewhere: each is an error that names the
//! repository and the file, and nothing outside the cache is written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod announced;
mod bodies;
mod garbled;
mod server;
mod stalls;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::server::*;
use super::*;
use crate::source::{ModelRef, locate, pull};

fn tiny() -> ModelRef {
    ModelRef::Hub(HubRef {
        repository: "org/tiny".into(),
        revision: None,
    })
}

fn options(root: &Path, endpoint: &str) -> PullOptions {
    let mut options = PullOptions::at(root);
    options.endpoint = endpoint.replace("http://", "http://me:hunter2@");
    options.network.answer = Duration::from_secs(5);
    options.network.stall = Duration::from_secs(2);
    options
}

/// Every file, folder and link below `folder` with its contents, but for those below `cache`.
fn tree(folder: &Path, cache: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let kind = entry.file_type().unwrap();
            if path == cache {
                continue;
            }
            if kind.is_dir() {
                folders.push(path.clone());
            }
            let contents = match kind.is_file() {
                true => std::fs::read(&path).unwrap(),
                false => Vec::new(),
            };
            found.push((path, contents));
        }
    }
    found.sort();
    found
}

/// Links of the cache that lead out of it.
fn links_out(cache: &Path) -> Vec<PathBuf> {
    let root = std::fs::canonicalize(cache).unwrap();
    tree(cache, Path::new("/"))
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.is_symlink())
        .filter(|path| !std::fs::canonicalize(path).is_ok_and(|to| to.starts_with(&root)))
        .collect()
}

/// A pull from a hub with this trick; gives what was said, the error last.
fn refused_by(trick: Arc<Trick>) -> String {
    #[derive(Default)]
    struct Notes(String);
    impl PullProgress for Notes {
        fn note(&mut self, text: &str) {
            self.0.push_str(text);
            self.0.push('\n');
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("a/b/cache");
    std::fs::create_dir_all(&cache).unwrap();
    std::fs::write(dir.path().join("victim"), "precious").unwrap();
    let before = tree(dir.path(), &cache);
    let (endpoint, _) = serve(trick);
    let options = options(&cache, &endpoint);
    let mut notes = Notes::default();
    let start = Instant::now();
    let error = pull(&tiny(), &options, &mut notes).unwrap_err();
    assert!(
        start.elapsed() < Duration::from_secs(90),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(tree(dir.path(), &cache), before);
    assert_eq!(links_out(&cache), Vec::<PathBuf>::new());
    assert!(locate(&tiny(), &options).is_err());
    let said = format!("{}{error}", notes.0);
    assert!(error.to_string().contains("org/tiny"), "{error}");
    for secret in ["hunter2", "Signature", TOKEN, "me:"] {
        assert!(!said.contains(secret), "{said}");
    }
    let unprintable = |c: char| c != '\n' && answer::is_unprintable(c);
    assert!(!said.contains(unprintable), "{said:?}");
    error.to_string()
}

type Case = (&'static str, &'static [&'static str], Box<Trick>);

/// Tries all cases at once: some wait for a hub that stands still.
fn all_refused(cases: Vec<Case>) {
    std::thread::scope(|scope| {
        for (name, wanted, trick) in cases {
            scope.spawn(move || {
                let error = refused_by(Arc::from(trick));
                for text in wanted {
                    assert!(error.contains(text), "{name}: {error}");
                }
            });
        }
    });
}

/// A case whose hub answers to one file, and lists names alone.
fn file(
    case: &'static str,
    name: &'static str,
    wanted: &'static [&'static str],
    trick: impl Fn(&Asked, &mut TcpStream) -> std::io::Result<bool> + Send + Sync + 'static,
) -> Case {
    let trick = move |asked: &Asked, stream: &mut TcpStream| {
        if asked.is_list() {
            return ok(stream, "", bare_list().to_string().as_bytes());
        }
        match asked.is(name) {
            true => trick(asked, stream),
            false => Ok(false),
        }
    };
    (case, wanted, Box::new(trick))
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    let (storage, stored) = serve(Arc::new(|_: &Asked, stream: &mut TcpStream| {
        ok(stream, "ETag: \"a storage's own\"\r\n", &weights())
    }));
    let (endpoint, asked) = serve(Arc::new(move |asked: &Asked, stream: &mut TcpStream| {
        if !asked.is(WEIGHTS) {
            return Ok(false);
        }
        let head = format!(
            "HTTP/1.1 302 Found\r\n{}X-Linked-Etag: \"{}\"\r\nX-Linked-Size: 300000\r\n\
             Location: {storage}/x?Signature=1\r\nContent-Length: 0",
            tags(&weights()),
            sha256(&weights())
        );
        send(stream, &head, b"")
    }));
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), &endpoint);
    options.endpoint = endpoint;
    options.token = Some(TOKEN.into());
    let pulled = pull(&tiny(), &options, &mut ()).unwrap();
    assert!(std::fs::read(pulled.path.join(WEIGHTS)).unwrap() == weights());
    let sent = |log: &Log| -> Vec<String> {
        let log = log.lock().unwrap();
        log.iter()
            .map(|asked| asked.authorization.clone())
            .collect()
    };
    assert_eq!(sent(&stored), [""]);
    assert_eq!(sent(&asked), vec![format!("Bearer {TOKEN}"); 4]);
}

/// What another user of a shared cache, or an unpacked archive, may have left there.
#[cfg(unix)]
#[test]
fn links_in_the_cache_are_not_written_through() {
    use std::os::unix::fs::symlink;
    let weights_id = sha256(&weights());
    let places = [
        ("blobs", true),
        ("snapshots", true),
        ("refs", true),
        (&*format!("snapshots/{COMMIT}"), true),
        (&*format!("blobs/{weights_id}.part"), false),
        (&*format!("blobs/{weights_id}"), false),
        (&*format!("snapshots/{COMMIT}/config.json"), false),
        (
            &*format!("../.locks/models--org--tiny/{weights_id}.lock"),
            false,
        ),
    ];
    for (place, folder) in places {
        let dir = tempfile::tempdir().unwrap();
        let (cache, outside) = (dir.path().join("cache"), dir.path().join("outside"));
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("victim"), "precious").unwrap();
        let path = cache.join("hub/models--org--tiny").join(place);
        std::fs::create_dir_all(cache.join("hub/models--org--tiny")).unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let target = match folder {
            true => outside.clone(),
            false => outside.join("victim"),
        };
        symlink(target, &path).unwrap();
        let before = tree(dir.path(), &cache);
        let (endpoint, _) = serve(Arc::new(|_: &Asked, _: &mut TcpStream| Ok(false)));
        let outcome = pull(&tiny(), &options(&cache, &endpoint), &mut ());
        assert_eq!(tree(dir.path(), &cache), before, "{place}");
        match outcome {
            Ok(pulled) => assert!(
                std::fs::read(pulled.path.join(WEIGHTS)).unwrap() == weights(),
                "{place}"
            ),
            Err(error) => assert!(error.to_string().contains("link"), "{place}: {error}"),
        }
    }
}

/// Its size is that of the list, so nothing is left to ask for; only its hash tells.
#[test]
fn a_whole_but_damaged_part_is_fetched_anew() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("hub/models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!("{}.part", sha256(&weights())));
    for length in [300_000, 300_001] {
        std::fs::write(&part, vec![9; length]).unwrap();
        let (endpoint, log) = serve(Arc::new(|_: &Asked, _: &mut TcpStream| Ok(false)));
        let pulled = pull(&tiny(), &options(dir.path(), &endpoint), &mut ()).unwrap();
        assert!(std::fs::read(pulled.path.join(WEIGHTS)).unwrap() == weights());
        assert!(
            log.lock()
                .unwrap()
                .iter()
                .all(|asked| asked.range.is_none())
        );
        std::fs::remove_dir_all(pulled.path).unwrap();
        std::fs::remove_file(blobs.join(sha256(&weights()))).unwrap();
    }
}

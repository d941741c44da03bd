//! The hub client against a server on loopback that speaks the part of the hub's API it uses.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::digest::hex;
use crate::source::{ModelRef, locate, pull};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Served {
    name: &'static str,
    bytes: Vec<u8>,
    etag: String,
    /// Close the connection after this many bytes, once for every entry.
    cuts: Vec<usize>,
}

impl Served {
    fn small(name: &'static str, text: &str) -> Self {
        Self {
            name,
            bytes: text.as_bytes().to_vec(),
            etag: git_id(text.as_bytes()),
            cuts: Vec::new(),
        }
    }

    fn large(name: &'static str, bytes: Vec<u8>) -> Self {
        Self {
            name,
            etag: hex(&Sha256::digest(&bytes)),
            bytes,
            cuts: Vec::new(),
        }
    }
}

fn git_id(bytes: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

#[derive(Default)]
struct Hub {
    files: Vec<Served>,
    /// Request lines with their Range and Authorization, in order.
    log: Vec<String>,
    status: Option<u16>,
}

/// Serves until the process ends; gives the endpoint.
fn serve(hub: Hub) -> (String, Arc<Mutex<Hub>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let hub = Arc::new(Mutex::new(hub));
    let shared = hub.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let hub = shared.clone();
            // A client that hangs up early is part of what is tested.
            std::thread::spawn(move || answer(stream, &hub));
        }
    });
    (endpoint, hub)
}

fn answer(mut stream: TcpStream, hub: &Mutex<Hub>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut authorization) = (None, String::new());
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (key, value) = line.trim().split_once(": ").unwrap_or_default();
        match key.to_ascii_lowercase().as_str() {
            "range" => range = value.strip_prefix("bytes=").map(str::to_owned),
            "authorization" => authorization = value.to_owned(),
            _ => {}
        }
    }
    let mut hub = hub.lock().unwrap();
    hub.log.push(format!(
        "{path} {} {authorization}",
        range.clone().unwrap_or_default()
    ));
    if let Some(status) = hub.status {
        return write!(
            stream,
            "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    if path.starts_with("/api/models/org/tiny/revision/") {
        let siblings: Vec<_> = hub
            .files
            .iter()
            .map(|file| json!({"rfilename": file.name}))
            .collect();
        let body = json!({"siblings": siblings, "sha": COMMIT}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let prefix = format!("/org/tiny/resolve/{COMMIT}/");
    let name = path.strip_prefix(&prefix);
    let file = hub.files.iter_mut().find(|file| Some(file.name) == name);
    let Some(file) = file else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let total = file.bytes.len();
    let range = range.unwrap_or_else(|| "0-".into());
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(total, |last: usize| last + 1);
    if start >= end || end > total {
        return write!(
            stream,
            "HTTP/1.1 416 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{total}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        end - start,
        end - 1,
        file.etag
    )?;
    let mut body = &file.bytes[start..end];
    // The question for size and tag asks for one byte; only real downloads are cut.
    if end - start > 1 && !file.cuts.is_empty() {
        body = &body[..file.cuts.remove(0).min(body.len())];
    }
    stream.write_all(body)
}

fn model() -> Vec<Served> {
    let weights: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    vec![
        Served::small("config.json", "{\"model_type\": \"llama\"}"),
        Served::small("tokenizer.json", "{}"),
        Served::small("README.md", "not needed"),
        Served::small("onnx/model.onnx", "not needed"),
        Served::large("model.safetensors", weights),
    ]
}

fn tiny(revision: Option<&str>) -> ModelRef {
    ModelRef::Hub(HubRef {
        repository: "org/tiny".into(),
        revision: revision.map(str::to_owned),
    })
}

fn options(root: &Path, endpoint: String) -> PullOptions {
    let mut options = PullOptions::at(root);
    options.endpoint = endpoint;
    options
}

fn ranges(hub: &Mutex<Hub>, name: &str) -> Vec<String> {
    let log = &hub.lock().unwrap().log;
    let lines = log.iter().map(|line| line.split(' ').collect::<Vec<_>>());
    lines
        .filter(|parts| parts[0].ends_with(name) && parts[1] != "0-0")
        .map(|parts| parts[1].to_owned())
        .collect()
}

#[test]
fn a_model_is_fetched_once_and_found_offline() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, hub) = serve(Hub {
        files: model(),
        ..Hub::default()
    });
    let mut options = options(dir.path(), endpoint);
    options.token = Some("secret".into());
    assert!(locate(&tiny(None), &options).is_err());
    let pulled = pull(&tiny(None), &options, &mut ()).unwrap();
    assert_eq!(pulled.revision.as_deref(), Some(COMMIT));
    let names: Vec<_> = {
        let mut names: Vec<_> = std::fs::read_dir(&pulled.path)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    let requests = {
        let hub = hub.lock().unwrap();
        assert!(hub.log.iter().all(|line| line.ends_with("Bearer secret")));
        hub.log.len()
    };
    // The second time nothing is asked, whether or not the hub may be.
    options.hub_offline = true;
    assert_eq!(pull(&tiny(None), &options, &mut ()).unwrap(), pulled);
    assert_eq!(
        locate(&tiny(Some(COMMIT)), &options).unwrap().path,
        pulled.path
    );
    assert_eq!(hub.lock().unwrap().log.len(), requests);
}

#[test]
fn a_cut_download_continues_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = model();
    files[4].cuts = vec![100_000];
    let bytes = files[4].bytes.clone();
    let (endpoint, hub) = serve(Hub {
        files,
        ..Hub::default()
    });
    let options = options(dir.path(), endpoint);
    let pulled = pull(&tiny(None), &options, &mut ()).unwrap();
    assert!(std::fs::read(pulled.path.join("model.safetensors")).unwrap() == bytes);
    assert_eq!(ranges(&hub, "model.safetensors"), ["", "100000-"]);
}

#[test]
fn a_part_left_by_a_killed_pull_is_continued_and_a_whole_one_kept() {
    for left in [200_000, 300_000] {
        let dir = tempfile::tempdir().unwrap();
        let files = model();
        let (bytes, etag) = (files[4].bytes.clone(), files[4].etag.clone());
        let (endpoint, hub) = serve(Hub {
            files,
            ..Hub::default()
        });
        let options = options(dir.path(), endpoint);
        let blobs = dir.path().join("hub/models--org--tiny/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{etag}.part")), &bytes[..left]).unwrap();
        let pulled = pull(&tiny(None), &options, &mut ()).unwrap();
        assert!(std::fs::read(pulled.path.join("model.safetensors")).unwrap() == bytes);
        // The first question is for the hash, which names the part.
        let wanted = ["".to_owned(), format!("{left}-")];
        assert_eq!(ranges(&hub, "model.safetensors"), wanted);
    }
}

#[test]
fn wrong_contents_are_thrown_away_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = model();
    files[4].bytes[7] ^= 1;
    let (endpoint, _hub) = serve(Hub {
        files,
        ..Hub::default()
    });
    let options = options(dir.path(), endpoint);
    let error = pull(&tiny(None), &options, &mut ()).unwrap_err();
    assert!(matches!(error, SourceError::WrongHash { .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors"));
    assert!(locate(&tiny(None), &options).is_err());
}

#[test]
fn a_damaged_part_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let files = model();
    let (bytes, etag) = (files[4].bytes.clone(), files[4].etag.clone());
    let (endpoint, _hub) = serve(Hub {
        files,
        ..Hub::default()
    });
    let options = options(dir.path(), endpoint);
    let blobs = dir.path().join("hub/models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{etag}.part")), vec![9; 1000]).unwrap();
    let pulled = pull(&tiny(None), &options, &mut ()).unwrap();
    assert!(std::fs::read(pulled.path.join("model.safetensors")).unwrap() == bytes);
}

#[test]
fn shards_follow_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let index = json!({"weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
    }});
    let mut files = model();
    files.pop();
    files.push(Served::small(INDEX, &index.to_string()));
    files.push(Served::large(
        "model-00001-of-00002.safetensors",
        vec![1; 5000],
    ));
    files.push(Served::large(
        "model-00002-of-00002.safetensors",
        vec![2; 6000],
    ));
    let (endpoint, _hub) = serve(Hub {
        files,
        ..Hub::default()
    });
    let options = options(dir.path(), endpoint);
    let pulled = pull(&tiny(None), &options, &mut ()).unwrap();
    for (name, length) in [("1", 5000), ("2", 6000)] {
        let path = pulled
            .path
            .join(format!("model-0000{name}-of-00002.safetensors"));
        assert_eq!(std::fs::metadata(path).unwrap().len(), length);
    }
    std::fs::remove_file(pulled.path.join("model-00002-of-00002.safetensors")).unwrap();
    assert!(locate(&tiny(None), &options).is_err(), "a shard is missing");
}

#[test]
fn refusals_say_what_to_do() {
    for (status, wanted) in [(401, "HF_TOKEN"), (404, "no such repository"), (503, "503")] {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _hub) = serve(Hub {
            status: Some(status),
            ..Hub::default()
        });
        let error = pull(&tiny(None), &options(dir.path(), endpoint), &mut ())
            .unwrap_err()
            .to_string();
        assert!(error.contains(wanted), "{status}: {error}");
    }
}

#[test]
fn a_repository_of_gguf_files_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, _hub) = serve(Hub {
        files: vec![Served::small("tiny.Q4_0.gguf", "x")],
        ..Hub::default()
    });
    let error = pull(&tiny(None), &options(dir.path(), endpoint), &mut ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("tiny.Q4_0.gguf"), "{error}");
}

#[test]
fn a_silent_or_absent_hub_is_known_within_ten_seconds() {
    // Accepts connections (the system does, for a listener) and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let error = pull(&tiny(None), &options(dir.path(), endpoint), &mut ()).unwrap_err();
    assert!(start.elapsed().as_secs_f64() < 10.0);
    assert!(
        matches!(&error, SourceError::Unreachable { host, .. } if host.starts_with("127.0.0.1"))
    );

    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let error = pull(&tiny(None), &options(dir.path(), closed), &mut ()).unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
}

#[test]
fn an_offline_hub_is_not_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, hub) = serve(Hub {
        files: model(),
        ..Hub::default()
    });
    let mut options = options(dir.path(), endpoint);
    options.hub_offline = true;
    let error = pull(&tiny(None), &options, &mut ()).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    assert!(hub.lock().unwrap().log.is_empty());
}

/// What an offline error says of a cache in one state or another.
#[test]
fn an_offline_error_names_repository_revision_folder_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, _) = serve(Hub {
        files: model(),
        ..Hub::default()
    });
    let mut options = options(dir.path(), endpoint);
    let snapshot = pull(&tiny(None), &options, &mut ()).unwrap().path;
    options.hub_offline = true;
    let folder = dir.path().join("hub/models--org--tiny");
    let said = |revision: Option<&str>| {
        let error = pull(&tiny(revision), &options, &mut ()).unwrap_err();
        let error = error.to_string();
        let revision = revision.unwrap_or("main");
        for part in [
            &format!("org/tiny at revision '{revision}'"),
            "HF_HUB_CACHE",
        ] {
            assert!(error.contains(part), "{error}");
        }
        error
    };
    let other = said(Some("v2"));
    let wanted = format!(
        "{} has no snapshot of revision 'v2' (it has main)",
        folder.display()
    );
    assert!(other.contains(&wanted), "{other}");

    std::fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let incomplete = said(None);
    let wanted = format!(
        "{} is incomplete: neither model.safetensors",
        snapshot.display()
    );
    assert!(incomplete.contains(&wanted), "{incomplete}");

    let blob = std::fs::canonicalize(snapshot.join("config.json")).unwrap();
    std::fs::remove_file(&blob).unwrap();
    let dangling = said(None);
    let name = blob.file_name().unwrap().to_str().unwrap();
    let wanted = format!("config.json is a link to the blob {name}, which is gone");
    assert!(dangling.contains(&wanted), "{dangling}");

    std::fs::remove_dir_all(&folder).unwrap();
    let absent = said(None);
    let wanted = format!("{} is not there", folder.display());
    assert!(absent.contains(&wanted), "{absent}");
}

#[test]
fn two_pulls_at_once_fetch_one_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, hub) = serve(Hub {
        files: model(),
        ..Hub::default()
    });
    let options = options(dir.path(), endpoint);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| pull(&tiny(None), &options, &mut ()).unwrap()))
            .collect();
        for pulled in pulls {
            assert!(pulled.join().unwrap().path.join(WEIGHTS).is_file());
        }
    });
    assert_eq!(ranges(&hub, "model.safetensors"), [""]);
}

/// Reads the request before it is dropped, so that clients see an answer and not a reset.
#[test]
fn the_test_server_itself_answers_ranges() {
    let (endpoint, _hub) = serve(Hub {
        files: model(),
        ..Hub::default()
    });
    let mut stream = TcpStream::connect(endpoint.trim_start_matches("http://")).unwrap();
    write!(
        stream,
        "GET /org/tiny/resolve/{COMMIT}/config.json HTTP/1.1\r\nRange: bytes=2-5\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.ends_with("mode"), "{text}");
}

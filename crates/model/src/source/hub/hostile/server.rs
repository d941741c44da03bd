//! A hub that answers as a test wishes, and honestly to all else.

use std::io::{BufRead, BufReader, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::WEIGHTS;
use crate::digest::hex;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const CONFIG: &str = "{\"model_type\": \"llama\"}";
pub const TOKEN: &str = "hf_SECRETTOKEN";

/// What a client asks.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub range: Option<u64>,
    pub authorization: String,
}

impl Asked {
    pub fn is(&self, name: &str) -> bool {
        let path = self.path.split('?').next();
        path == Some(&*format!("/org/tiny/resolve/{COMMIT}/{name}"))
    }

    pub fn is_list(&self) -> bool {
        self.path.starts_with("/api/models/org/tiny/revision/")
    }
}

/// Answers, and says so, or leaves the question to the honest hub.
pub type Trick = dyn Fn(&Asked, &mut TcpStream) -> Result<bool> + Send + Sync;
pub type Log = Arc<Mutex<Vec<Asked>>>;

pub fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i % 251) as u8).collect()
}

pub fn git_id(bytes: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The honest hub's files.
pub fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("config.json", CONFIG.into()),
        ("tokenizer.json", b"{}".to_vec()),
        (WEIGHTS, weights()),
    ]
}

/// The honest hub's list, as the public one writes it.
pub fn full_list() -> Value {
    let siblings: Vec<Value> = files()
        .iter()
        .map(|(name, bytes)| match *name {
            WEIGHTS => json!({
                "rfilename": name, "size": bytes.len(), "blobId": "1".repeat(40),
                "lfs": {"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134},
            }),
            _ => json!({"rfilename": name, "size": bytes.len(), "blobId": git_id(bytes)}),
        })
        .collect();
    json!({"sha": COMMIT, "siblings": siblings, "id": "org/tiny"})
}

/// The names alone, as hubs answer that do not know of sizes and hashes.
pub fn bare_list() -> Value {
    let siblings: Vec<Value> = files()
        .iter()
        .map(|(name, _)| json!({"rfilename": name}))
        .collect();
    json!({"sha": COMMIT, "siblings": siblings})
}

pub fn send(stream: &mut TcpStream, head: &str, body: &[u8]) -> Result<bool> {
    write!(stream, "{head}\r\nConnection: close\r\n\r\n")?;
    stream.write_all(body)?;
    Ok(true)
}

/// Status 200 with these headers, each with its line end, and the length of the body.
pub fn ok(stream: &mut TcpStream, headers: &str, body: &[u8]) -> Result<bool> {
    let length = body.len();
    send(
        stream,
        &format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {length}"),
        body,
    )
}

/// What an honest answer says of a file besides its length.
pub fn tags(bytes: &[u8]) -> String {
    let etag = match bytes.len() > 1000 {
        true => sha256(bytes),
        false => git_id(bytes),
    };
    format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n")
}

/// Sends without end, until the client has enough.
pub fn forever(stream: &mut TcpStream, piece: &[u8], pause_ms: u64) -> Result<bool> {
    loop {
        stream.write_all(piece)?;
        stream.flush()?;
        std::thread::sleep(std::time::Duration::from_millis(pause_ms));
    }
}

fn honest(asked: &Asked, stream: &mut TcpStream) -> Result<bool> {
    if asked.is_list() {
        return ok(stream, "", full_list().to_string().as_bytes());
    }
    let Some((_, bytes)) = files().into_iter().find(|(name, _)| asked.is(name)) else {
        return send(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0", b"");
    };
    let Some(from) = asked.range else {
        return ok(stream, &tags(&bytes), &bytes);
    };
    let rest = &bytes[usize::try_from(from).unwrap()..];
    let (last, length) = (bytes.len() - 1, bytes.len());
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\n{}Content-Range: bytes {from}-{last}/{length}\r\n\
         Content-Length: {}",
        tags(&bytes),
        rest.len()
    );
    send(stream, &head, rest)
}

/// Serves until the process ends; gives the endpoint and what was asked.
pub fn serve(trick: Arc<Trick>) -> (String, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let log = Log::default();
    let asked = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (trick, log) = (trick.clone(), asked.clone());
            // A client that hangs up early is part of what is tested.
            std::thread::spawn(move || answer(stream, &*trick, &log));
        }
    });
    (endpoint, log)
}

fn answer(mut stream: TcpStream, trick: &Trick, log: &Log) -> Result<bool> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let path = first.split(' ').nth(1).unwrap_or_default();
    let path = match path.starts_with("/api/") {
        true => path.split('?').next().unwrap_or_default().to_owned(),
        false => path.to_owned(),
    };
    let (mut range, mut authorization) = (None, String::new());
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (key, value) = line.trim().split_once(": ").unwrap_or_default();
        match key.to_ascii_lowercase().as_str() {
            "range" => {
                let from = value.trim_start_matches("bytes=").trim_end_matches('-');
                range = from.parse().ok();
            }
            "authorization" => authorization = value.to_owned(),
            _ => {}
        }
    }
    let asked = {
        let mut log = log.lock().unwrap();
        let asked = Asked {
            path,
            range,
            authorization,
        };
        log.push(asked.clone());
        asked
    };
    match trick(&asked, &mut stream)? {
        true => Ok(true),
        false => honest(&asked, &mut stream),
    }
}

//! Honest answers with bytes changed, dropped, doubled and cut off on the way.

use std::sync::atomic::{AtomicU64, Ordering};

use super::server::*;
use super::*;

/// How many hubs are asked; a run of 20,000 is the same with other numbers.
const HUBS: u64 = 64;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end.max(1) as u64).unwrap()
    }

    /// Changes `bytes` in one to four places, mostly in the head.
    fn garble(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let head = bytes.len().min(400);
            let at = match self.below(4) {
                0 => self.below(bytes.len()),
                _ => self.below(head),
            };
            let odd = [
                b'\r', b'\n', b':', b'0', b'9', b'-', b'"', b' ', 0, 0xff, b';', b'/',
            ];
            match self.below(6) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = odd[self.below(odd.len())],
                2 => bytes.insert(at, odd[self.below(odd.len())]),
                3 => bytes.truncate(at.max(1)),
                4 => {
                    let end = (at + self.below(40)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let end = (at + 1 + self.below(20)).min(bytes.len() - 1);
                    bytes.drain(at.min(end)..end);
                }
            }
            if bytes.len() < 2 {
                break;
            }
        }
    }
}

/// The honest hub's whole answer.
fn whole(asked: &Asked) -> Vec<u8> {
    if asked.is_list() {
        let list = full_list().to_string();
        return format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{list}",
            list.len()
        )
        .into();
    }
    let Some((_, bytes)) = files().into_iter().find(|(name, _)| asked.is(name)) else {
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec();
    };
    let from = usize::try_from(asked.range.unwrap_or(0)).unwrap();
    let Some(rest) = bytes.get(from..).filter(|rest| !rest.is_empty()) else {
        return b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n".to_vec();
    };
    let range = match asked.range {
        None => "HTTP/1.1 200 OK\r\n".into(),
        Some(_) => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{}\r\n",
            bytes.len() - 1,
            bytes.len()
        ),
    };
    let mut answer = format!(
        "{range}{}Content-Length: {}\r\n\r\n",
        tags(&bytes),
        rest.len()
    );
    // The first answer to the weights is chunked, and sent on within the hub.
    if asked.path.ends_with(WEIGHTS) && asked.range.is_none() {
        answer = format!(
            "HTTP/1.1 307 X\r\n{}Location: {}?again\r\nContent-Length: 0\r\n\r\n",
            tags(&bytes),
            asked.path
        );
        return answer.into();
    }
    if asked.path.ends_with("again") && asked.range.is_none() {
        answer = format!("{range}{}Transfer-Encoding: chunked\r\n\r\n", tags(&bytes));
        let mut answer = answer.into_bytes();
        for piece in bytes.chunks(70_000) {
            answer.extend(format!("{:x}\r\n", piece.len()).bytes());
            answer.extend(piece);
            answer.extend(b"\r\n");
        }
        answer.extend(b"0\r\n\r\n");
        return answer;
    }
    let mut answer = answer.into_bytes();
    answer.extend(rest);
    answer
}

#[test]
fn garbled_answers_are_errors_or_the_right_files() {
    let next = AtomicU64::new(0);
    let right = AtomicU64::new(0);
    let hub = |seed: u64| {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("a/b/cache");
        std::fs::create_dir_all(&cache).unwrap();
        let random = std::sync::Mutex::new(Random(seed));
        let (endpoint, _) = serve(Arc::new(move |asked: &Asked, stream: &mut TcpStream| {
            let mut answer = whole(asked);
            let mut random = random.lock().unwrap();
            if random.below(3) == 0 {
                random.garble(&mut answer);
            }
            drop(random);
            stream.write_all(&answer)?;
            Ok(true)
        }));
        let mut options = options(&cache, &endpoint);
        options.network.answer = Duration::from_millis(400);
        options.network.stall = Duration::from_millis(300);
        let outcome = pull(&tiny(), &options, &mut ());
        assert_eq!(
            std::fs::read_dir(dir.path().join("a/b")).unwrap().count(),
            1,
            "{seed}"
        );
        assert_eq!(links_out(&cache), Vec::<PathBuf>::new(), "{seed}");
        match outcome {
            Ok(pulled) => {
                right.fetch_add(1, Ordering::Relaxed);
                assert!(
                    std::fs::read(pulled.path.join(WEIGHTS)).unwrap() == weights(),
                    "{seed}"
                );
                let config = std::fs::read(pulled.path.join("config.json")).unwrap();
                assert_eq!(config, CONFIG.as_bytes(), "{seed}");
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("org/tiny"), "{seed}: {error}");
                assert!(!error.contains("hunter2"), "{seed}: {error}");
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= HUBS {
                        break;
                    }
                    hub(seed);
                }
            });
        }
    });
    let right = right.into_inner();
    assert!(right > 0 && right < HUBS, "{right} of {HUBS} came through");
}

//! A body that cannot keep its reader waiting, whatever arrives in its place.

use std::io::{Error, ErrorKind, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use ureq::Agent;

/// A download that brings fewer bytes in the time it may stand still counts as standing still.
const TRICKLE: u64 = 1024;
/// Bytes read at once.
const PIECE: usize = 1 << 17;

/// Reads a body in a thread of its own. Timeouts of single reads are not enough: headers of chunks
/// and compressed nothings can arrive for ever without a byte of the body in them.
pub(super) struct Watched {
    pieces: Receiver<std::io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    taken: usize,
    agent: Agent,
    window: Duration,
    since: Instant,
    bytes: u64,
    over: bool,
}

impl Watched {
    pub fn new(mut body: impl Read + Send + 'static, agent: Agent, window: Duration) -> Self {
        let (sender, pieces) = sync_channel(4);
        std::thread::spawn(move || {
            loop {
                let mut piece = vec![0; PIECE];
                let read = body.read(&mut piece).map(|count| {
                    piece.truncate(count);
                    piece
                });
                let more = read.as_ref().is_ok_and(|piece| !piece.is_empty());
                // A reader that is gone wants no more.
                if sender.send(read).is_err() || !more {
                    break;
                }
            }
        });
        Self {
            pieces,
            piece: Vec::new(),
            taken: 0,
            agent,
            window,
            since: Instant::now(),
            bytes: 0,
            over: false,
        }
    }

    fn next(&mut self) -> std::io::Result<()> {
        let seconds = self.window.as_secs_f64();
        let piece = match self.pieces.recv_timeout(self.window) {
            Ok(piece) => piece?,
            Err(RecvTimeoutError::Timeout) => {
                let reason = format!("nothing arrived for {seconds} seconds");
                return Err(Error::new(ErrorKind::TimedOut, reason));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::other("its answer could not be read"));
            }
        };
        self.over = piece.is_empty();
        self.bytes = self.bytes.saturating_add(piece.len() as u64);
        if !self.over && self.since.elapsed() >= self.window {
            if self.bytes < TRICKLE {
                let reason = format!("fewer than {TRICKLE} bytes arrived within {seconds} seconds");
                return Err(Error::new(ErrorKind::TimedOut, reason));
            }
            (self.since, self.bytes) = (Instant::now(), 0);
        }
        (self.piece, self.taken) = (piece, 0);
        Ok(())
    }
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.taken == self.piece.len() && !self.over {
            self.next()?;
        }
        let mut rest = self.piece.get(self.taken..).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.taken = self.taken.saturating_add(count);
        Ok(count)
    }
}

impl Drop for Watched {
    /// A thread that still reads must not go on for as long as a server likes.
    fn drop(&mut self) {
        if !self.over {
            self.agent.clone().shutdown();
        }
    }
}

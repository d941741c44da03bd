//! The way out for everything this program says: standard output and standard error with the control characters of
//! data, names and templates made visible ([`shown`]).
#![allow(
    clippy::disallowed_methods,
    reason = "the one place that may write to the streams themselves"
)]

use std::io::{self, IsTerminal, StderrLock, StdoutLock, Write};

use enamel_train::shown;

/// A stream on which nothing but text and line breaks goes out.
pub struct Shown<W> {
    to: W,
    /// The beginning of a character whose end is still to come.
    cut: Vec<u8>,
}

/// Standard output, shown.
pub fn out() -> Shown<StdoutLock<'static>> {
    Shown::new(io::stdout().lock())
}

/// Standard error, shown.
pub fn err() -> Shown<StderrLock<'static>> {
    Shown::new(io::stderr().lock())
}

/// Standard output as it is: for colours, around text that has been through [`shown`].
pub fn coloured_out() -> StdoutLock<'static> {
    io::stdout().lock()
}

/// Standard error as it is, for the same.
pub fn coloured_err() -> StderrLock<'static> {
    io::stderr().lock()
}

/// For text that a program may read, such as an answer: as it is, but on a terminal.
pub fn answer_out() -> Box<dyn Write> {
    match out_is_terminal() {
        true => Box::new(out()),
        false => Box::new(coloured_out()),
    }
}

/// Says something beside the result.
pub fn note(text: &str) {
    // Nobody left to read is no reason to stop.
    let _ = writeln!(err(), "note: {text}");
}

/// Whether standard output is a terminal.
pub fn out_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether standard error is a terminal.
pub fn err_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Whether colours may go to standard output.
pub fn colour_out() -> bool {
    out_is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Whether colours may go to standard error.
pub fn colour_err() -> bool {
    err_is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

impl<W: Write> Shown<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            cut: Vec::new(),
        }
    }
}

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.cut.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.cut) {
            Ok(_) => self.cut.len(),
            // An end that is missing may come with the next call; what is no UTF-8 at all goes out as U+FFFD.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => self.cut.len(),
        };
        let rest = self.cut.split_off(whole);
        let now = std::mem::replace(&mut self.cut, rest);
        self.to
            .write_all(shown(&String::from_utf8_lossy(&now)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(pieces: &[&[u8]]) -> String {
        let mut out = Shown::new(Vec::new());
        for piece in pieces {
            out.write_all(piece).ok();
        }
        String::from_utf8_lossy(&out.to).into_owned()
    }

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        let sent = through(&[b"a\x1b]52;c;aGk=\x07b\tc\n", "\u{9b}2J".as_bytes()]);
        assert_eq!(sent, "a\\u001b]52;c;aGk=\\u0007b\tc\n\\u009b2J");
    }

    #[test]
    fn characters_may_come_in_pieces() {
        let bytes = "ä\u{9b}😀".as_bytes();
        let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(through(&pieces), "ä\\u009b😀");
        assert_eq!(through(&[b"\xff\x9b1m", b"x"]), "\u{fffd}\u{fffd}1mx");
    }
}

//! Streaming detokenization: text as soon as it is whole, never half a character.

use crate::error::DataError;
use crate::tokenizer::Tokenizer;

/// Turns generated ids into text piece by piece.
///
/// A decoder's output for an id depends on its neighbours (a leading space dropped at the start of a
/// text, a character spread over several byte tokens), so each piece is what a window of ids decodes
/// to beyond what was already given out. The pieces together are the decoding of all ids.
#[derive(Debug, Clone)]
pub struct TokenStream {
    window: Vec<u32>,
    given: usize,
    skip_special: bool,
}

impl TokenStream {
    /// An empty stream; with `skip_special`, special tokens give no text.
    pub fn new(skip_special: bool) -> Self {
        Self {
            window: Vec::new(),
            given: 0,
            skip_special,
        }
    }

    /// Adds an id and returns the text that is now certain; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the decoder fails.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, DataError> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window, self.skip_special)?;
        // A trailing U+FFFD is a character whose other bytes may still come.
        if text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        self.emit(tokenizer, &text)
    }

    /// The text held back for an incomplete character, U+FFFD in its place.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the decoder fails.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, DataError> {
        let text = tokenizer.decode(&self.window, self.skip_special)?;
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        self.window.clear();
        self.given = 0;
        Ok(piece)
    }

    fn emit(&mut self, tokenizer: &Tokenizer, text: &str) -> Result<String, DataError> {
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        // The last ids stay as context for the next one; what they decode to is already given.
        const CONTEXT: usize = 6;
        const LONGEST: usize = 32;
        self.given = text.len();
        if self.window.len() > LONGEST {
            let start = self.window.len().saturating_sub(CONTEXT);
            let last = self.window.get(start..).unwrap_or_default();
            let context = tokenizer.decode(last, self.skip_special)?;
            // Cut only where the context decodes to the end of the text, so that nothing shifts.
            if !context.is_empty() && text.ends_with(&context) {
                self.window.drain(..start);
                self.given = context.len();
            }
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::tokenizer;

    #[test]
    fn pieces_join_to_the_whole_and_characters_stay_whole() {
        let t = tokenizer(None);
        let text = "naïve 日本語 🙂👍🏽 yes\n".repeat(9);
        let ids = t.encode(&text, false).unwrap();
        let mut stream = TokenStream::new(true);
        let mut pieces = Vec::new();
        for &id in &ids {
            pieces.push(stream.push(&t, id).unwrap());
        }
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
        assert!(pieces.iter().any(String::is_empty));
        pieces.push(stream.finish(&t).unwrap());
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn an_unfinished_character_shows_at_the_end() {
        let t = tokenizer(None);
        let ids = t.encode("aé", false).unwrap();
        let mut stream = TokenStream::new(true);
        assert_eq!(stream.push(&t, ids[0]).unwrap(), "a");
        assert_eq!(stream.push(&t, ids[1]).unwrap(), "");
        assert_eq!(stream.finish(&t).unwrap(), "\u{FFFD}");
        assert_eq!(stream.push(&t, ids[0]).unwrap(), "a");
    }

    #[test]
    fn special_tokens_are_shown_on_request() {
        let t = tokenizer(None);
        let eos = t.eos_id().unwrap();
        assert_eq!(TokenStream::new(true).push(&t, eos).unwrap(), "");
        assert_eq!(TokenStream::new(false).push(&t, eos).unwrap(), "</s>");
    }
}

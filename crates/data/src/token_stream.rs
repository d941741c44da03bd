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
            let start = self.window.len() - CONTEXT;
            let context = tokenizer.decode(&self.window[start..], self.skip_special)?;
            // Cut only where the context decodes to the end of the text, so that nothing shifts.
            if !context.is_empty() && text.ends_with(&context) {
                self.window.drain(..start);
                self.given = context.len();
            }
        }
        Ok(piece)
    }
}

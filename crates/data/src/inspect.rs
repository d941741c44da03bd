//! An example as text, cut where training starts and stops.

use crate::error::DataError;
use crate::examples::Example;
use crate::masks::IGNORED;
use crate::token_stream::TokenStream;
use crate::tokenizer::Tokenizer;

/// The example's text with special tokens visible, as runs of (text, whether it is trained).
///
/// The runs are of tokens, not of rendered text: what is shown as trained is what is trained. A
/// character spread over several tokens goes to the run in which it is complete.
///
/// # Errors
/// [`DataError::Tokenizer`] where the decoder fails.
pub fn spans(example: &Example, tokenizer: &Tokenizer) -> Result<Vec<(String, bool)>, DataError> {
    let mut stream = TokenStream::new(false);
    let mut runs: Vec<(String, bool)> = Vec::new();
    let mut add = |piece: String, trained: bool| match runs.last_mut() {
        Some((text, same)) if *same == trained => text.push_str(&piece),
        _ if piece.is_empty() => {}
        _ => runs.push((piece, trained)),
    };
    let mut trained = false;
    for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
        trained = label != IGNORED;
        add(stream.push(tokenizer, id)?, trained);
    }
    add(stream.finish(tokenizer)?, trained);
    Ok(runs)
}

//! `enamel inspect`: rows as the model will see them, cut where training starts and stops.

use enamel_data::{BadRow, Note, RowRef, load_examples, spans};

use crate::base::OpenBase;
use crate::error::TrainError;
use crate::recipe::Recipe;

/// Rows to look at, and what became of the others.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The rows asked for.
    pub rows: Vec<InspectedRow>,
    /// Rows that can be used.
    pub usable: usize,
    /// Tokens of all usable rows.
    pub tokens: usize,
    /// Tokens of them that are trained.
    pub trained_tokens: usize,
    /// Longest row, in tokens.
    pub longest: usize,
    /// Rows that were shortened.
    pub truncated: usize,
    /// Rows left out as too long.
    pub dropped: usize,
    /// Rows left out as unusable.
    pub skipped: Vec<BadRow>,
    /// What is worth saying.
    pub notes: Vec<Note>,
}

/// One row as text.
#[derive(Clone, Debug)]
pub struct InspectedRow {
    /// Where it came from.
    pub source: RowRef,
    /// Tokens.
    pub tokens: usize,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// Text with special tokens visible, and whether it is trained.
    pub spans: Vec<(String, bool)>,
}

/// Reads all training rows (or validation rows) of the recipe and shows `count` from number `first`.
pub fn inspect(
    recipe: &Recipe,
    base: &OpenBase,
    valid: bool,
    first: usize,
    count: usize,
) -> Result<Inspection, TrainError> {
    let spec = match valid {
        true => recipe.data.valid_spec().ok_or_else(|| {
            TrainError::Mismatch("the recipe has no validation files (data.valid)".to_owned())
        })?,
        false => recipe.data.train_spec(),
    };
    let tokenizer = &base.tokenizer;
    let mut examples = load_examples(&spec, tokenizer)?;
    examples.note_positions(base.config.context_length());
    let rows = examples.rows.iter().skip(first).take(count).map(|row| {
        Ok(InspectedRow {
            source: row.source.clone(),
            tokens: row.input_ids.len(),
            trained_tokens: row.trained_tokens(),
            spans: spans(row, tokenizer)?,
        })
    });
    Ok(Inspection {
        rows: rows.collect::<Result<_, TrainError>>()?,
        usable: examples.rows.len(),
        tokens: examples.tokens(),
        trained_tokens: examples.trained(),
        longest: examples
            .rows
            .iter()
            .map(|row| row.input_ids.len())
            .max()
            .unwrap_or(0),
        truncated: examples.truncated,
        dropped: examples.dropped,
        skipped: examples.skipped,
        notes: examples.notes,
    })
}

//! Rows of a language model: each token predicts the next, and a mask says which are trained.

use std::ops::Range;

use serde_json::{Map, Value};

use super::load::{Labels, Reading, load};
use super::{DataSpec, Example, Examples, trained_tokens};
use crate::error::{BadReason, DataError, RowRef};
use crate::records::{EncodedRow, RecordContext, RecordFormat, check_arguments};
use crate::tokenizer::Tokenizer;

/// Reads, encodes and checks all rows of `spec`. The result does not depend on the number of threads.
///
/// # Errors
/// [`DataError::BadRows`] names all bad rows at once (the first [`BAD_ROWS_SHOWN`](crate::BAD_ROWS_SHOWN) in
/// words); [`DataError::NoRows`] where nothing is left.
pub fn load_examples(spec: &DataSpec, tokenizer: &Tokenizer) -> Result<Examples, DataError> {
    check_arguments(&spec.template_arguments).map_err(|detail| DataError::Spec {
        field: "chat_template_kwargs",
        detail,
    })?;
    let context = RecordContext {
        tokenizer,
        train_on: spec.train_on,
        template_arguments: &spec.template_arguments,
    };
    let given = Some(spec.format).filter(|format| *format != RecordFormat::Auto);
    load(spec, &Language { context, given })
}

struct Language<'a> {
    context: RecordContext<'a>,
    given: Option<RecordFormat>,
}

impl Reading for Language<'_> {
    type Format = RecordFormat;
    type Labels = Vec<i64>;
    type Row = Example;

    fn given(&self) -> Option<RecordFormat> {
        self.given
    }

    fn detect(&self, row: &Map<String, Value>) -> Option<RecordFormat> {
        RecordFormat::detect(row)
    }

    fn unknown(&self) -> RecordFormat {
        RecordFormat::Auto
    }

    fn name(format: RecordFormat) -> &'static str {
        format.name()
    }

    fn unused<'r>(
        &self,
        format: RecordFormat,
        row: &'r Map<String, Value>,
    ) -> Result<Vec<&'r str>, BadReason> {
        format.unused(row)
    }

    fn encode(
        &self,
        format: RecordFormat,
        row: &Map<String, Value>,
    ) -> Result<EncodedRow, BadReason> {
        format.encode(row, &self.context)
    }

    fn row(input_ids: Vec<u32>, labels: Vec<i64>, source: RowRef, index: usize) -> Example {
        Example {
            input_ids,
            labels,
            source,
            index,
        }
    }
}

impl Labels for Vec<i64> {
    fn any(&self) -> bool {
        trained_tokens(self) > 0
    }

    fn keep(&mut self, tokens: Range<usize>) {
        self.truncate(tokens.end);
        self.drain(..tokens.start.min(self.len()));
    }
}

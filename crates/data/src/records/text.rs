//! `text`: plain text, all of it trained, EOS at the end.

use serde_json::{Map, Value};

use super::{EncodedRow, Record, RecordContext, text_field};
use crate::error::BadReason;

pub(super) struct Text;

impl Record for Text {
    fn name(&self) -> &'static str {
        "text"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["text"]
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let text = text_field(row, "text")?;
        if text.is_empty() {
            return Err(BadReason::Empty {
                field: "text".to_owned(),
            });
        }
        let encoded = context.encode_text(text, true)?;
        let labels = encoded.ids.iter().map(|&id| i64::from(id)).collect();
        let row = EncodedRow::new(encoded.ids, labels, false);
        Ok(row.with_trained_eos(context.tokenizer.eos_id()))
    }
}

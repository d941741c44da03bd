//! Loss masks: which bytes of a rendered conversation the assistant wrote, and which tokens those are.
//!
//! A turn's span runs from where generation would start (the end of the generation prompt) to the
//! end of its end-of-turn token. It is found in the rendered text:
//!
//! 1. A template with `{% generation %}` blocks says it itself; its blocks are the mask, as they are.
//! 2. Else turn `i` lies between the rendering of the messages before it with the generation prompt
//!    and the rendering of the messages up to and with it, where both begin the full rendering.
//! 3. Else (a template that rewrites earlier turns, moves the system prompt, …) the turn's content is
//!    replaced by a sentinel: what stands before and after the sentinel bounds the content, and what
//!    follows it at the end of a conversation is the turn's closing text.
//!
//! Text that fits none of these is an error of the row. White space after a closing special token is
//! not trained: generation has stopped before it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::chat_template::{ChatTemplate, RenderOptions, TemplateError};
use crate::error::BadReason;
use crate::message::Message;
use crate::tokenizer::{Encoded, Tokenizer};

/// The label of a token that is not trained.
pub const IGNORED: i64 = -100;

/// Which tokens of a row are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// Every assistant turn (or the completion), end-of-turn token included.
    #[default]
    Assistant,
    /// The last assistant turn of each conversation.
    LastAssistant,
    /// Every token.
    All,
}

/// A rendered conversation and the byte ranges the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MaskedText {
    pub(crate) text: String,
    /// In order, not overlapping.
    pub(crate) spans: Vec<Range<usize>>,
    /// Whether every span ends with a special token: the assistant learns to stop.
    pub(crate) closed: bool,
}

/// Renders `messages` and finds the assistant's turns at or after message `first`.
pub(crate) fn mask_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: RenderOptions<'_>,
    first: usize,
) -> Result<MaskedText, BadReason> {
    let options = RenderOptions {
        add_generation_prompt: false,
        ..options
    };
    let (text, blocks) = template.render_generation(messages, options)?;
    let turns: Vec<usize> = (0..messages.len())
        .filter(|&i| messages[i].role() == "assistant")
        .collect();
    // Blocks are taken turn by turn only where there is one for each; a template may also write
    // several blocks in a turn, and then all of them count.
    let spans = if blocks.is_empty() {
        let finder = TurnFinder {
            template,
            messages,
            options,
            text: &text,
        };
        let mut spans = Vec::new();
        for &i in turns.iter().filter(|&&i| i >= first) {
            let span = finder.find(i)?;
            let turn = text.get(span.clone()).unwrap_or_default();
            let end = match tokenizer.end_of_turn_length(turn) {
                Some(length) => span.start + length,
                None => span.end,
            };
            spans.push(span.start..end);
        }
        spans
    } else if first == 0 {
        blocks
    } else if blocks.len() == turns.len() {
        let skip = turns.iter().filter(|&&i| i < first).count();
        blocks.into_iter().skip(skip).collect()
    } else {
        return Err(BadReason::Boundary {
            index: first,
            detail: format!(
                "the template writes {} generation blocks for {} assistant messages",
                blocks.len(),
                turns.len()
            ),
        });
    };
    for pair in spans.windows(2) {
        if pair[1].start < pair[0].end {
            return Err(BadReason::Boundary {
                index: first,
                detail: "two turns overlap".to_owned(),
            });
        }
    }
    let closed = spans.iter().all(|span| {
        let turn = text.get(span.clone()).unwrap_or_default();
        tokenizer.end_of_turn_length(turn).is_some()
    });
    Ok(MaskedText {
        text,
        spans,
        closed,
    })
}

/// Labels for `encoded`: a token is trained where it has a byte in one of `spans` (in order).
///
/// A token that straddles a span's start (a space of the prompt merged with the answer's first
/// letter) is trained too: leaving it out would lose the start of the answer. Also returns how many
/// tokens straddle. A token that covers no text is never trained here.
pub(crate) fn labels_in(encoded: &Encoded, spans: &[Range<usize>]) -> (Vec<i64>, usize) {
    let mut labels = vec![IGNORED; encoded.ids.len()];
    let mut straddling = 0;
    let mut next = 0;
    for ((label, &id), offset) in labels.iter_mut().zip(&encoded.ids).zip(&encoded.offsets) {
        while spans.get(next).is_some_and(|span| span.end <= offset.start) {
            next += 1;
        }
        // A token longer than the gap between two spans can reach the one after `next`.
        let hit = spans
            .iter()
            .skip(next)
            .take_while(|span| span.start < offset.end)
            .find(|span| offset.start < span.end && !offset.is_empty());
        if let Some(span) = hit {
            *label = i64::from(id);
            straddling += usize::from(offset.start < span.start);
        }
    }
    (labels, straddling)
}

struct TurnFinder<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    options: RenderOptions<'a>,
    text: &'a str,
}

impl TurnFinder<'_> {
    fn find(&self, i: usize) -> Result<Range<usize>, BadReason> {
        let start = self
            .prefix(i, true)
            .ok()
            .filter(|prompt| self.text.starts_with(prompt.as_str()))
            .map(|prompt| prompt.len());
        let end = if i + 1 == self.messages.len() {
            Some(self.text.len())
        } else {
            self.prefix(i + 1, false)
                .ok()
                .filter(|turns| self.text.starts_with(turns.as_str()))
                .map(|turns| turns.len())
        };
        match (start, end) {
            (Some(start), Some(end)) if start < end => Ok(start..end),
            _ => self.find_by_sentinel(i, start, end),
        }
    }

    fn prefix(&self, count: usize, add_generation_prompt: bool) -> Result<String, TemplateError> {
        self.template.render_with(
            &self.messages[..count],
            RenderOptions {
                add_generation_prompt,
                ..self.options
            },
        )
    }

    fn find_by_sentinel(
        &self,
        i: usize,
        start: Option<usize>,
        end: Option<usize>,
    ) -> Result<Range<usize>, BadReason> {
        let boundary = |detail: String| BadReason::Boundary { index: i, detail };
        let (before, after) = self.around_sentinel(i, self.messages.len())?;
        let start = match start {
            Some(start) => start,
            None if self.text.starts_with(&before) => before.len(),
            None => {
                return Err(boundary(
                    "what precedes the turn depends on its content".to_owned(),
                ));
            }
        };
        let end = match end {
            Some(end) => end,
            None => {
                let content_end = self
                    .text
                    .strip_suffix(after.as_str())
                    .map(str::len)
                    .ok_or_else(|| {
                        boundary("what follows the turn depends on its content".to_owned())
                    })?;
                // What closes the turn when nothing follows it also closes it here.
                let (_, closing) = self.around_sentinel(i, i + 1)?;
                let closing = if after.starts_with(&closing) {
                    closing.as_str()
                } else {
                    closing.trim_end()
                };
                if !after.starts_with(closing) {
                    return Err(boundary(format!(
                        "the turn ends with {closing:?} when it is the last one, but not here"
                    )));
                }
                content_end + closing.len()
            }
        };
        if start >= end {
            return Err(boundary("the turn has no text of its own".to_owned()));
        }
        Ok(start..end)
    }

    /// The rendered text before and after message `i`'s content, of the first `count` messages.
    fn around_sentinel(&self, i: usize, count: usize) -> Result<(String, String), BadReason> {
        let mut sentinel = String::from("EnamelTurnSentinel");
        while self.text.contains(&sentinel) {
            sentinel.push('x');
        }
        let mut messages = self.messages[..count].to_vec();
        messages[i] = messages[i].with_content(&sentinel);
        let text = self.template.render_with(&messages, self.options)?;
        let boundary = |detail: &str| BadReason::Boundary {
            index: i,
            detail: detail.to_owned(),
        };
        let (before, after) = text
            .split_once(&sentinel)
            .ok_or_else(|| boundary("the template does not write the message's content"))?;
        if after.contains(&sentinel) {
            return Err(boundary("the template writes the content more than once"));
        }
        Ok((before.to_owned(), after.to_owned()))
    }
}

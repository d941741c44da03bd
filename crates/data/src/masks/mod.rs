//! Loss masks: which bytes of a rendered conversation the assistant wrote, and which tokens those are.
//!
//! A turn's span runs from where generation would start (the end of the generation prompt) to the
//! end of its end-of-turn token. A template with `{% generation %}` blocks says itself where that is, and its blocks
//! are the mask, as they are; else [`TurnFinder`] finds it in the rendered text. White space after a closing special
//! token is not trained: generation has stopped before it.

mod turns;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::error::BadReason;
use crate::message::Message;
use crate::tokenizer::{Encoded, Tokenizer};
use turns::TurnFinder;

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

/// Which turns are trained.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) train_on: TrainOn,
    /// The first message that can be trained.
    pub(crate) first: usize,
    /// Assistant messages that are not trained after all, in order.
    pub(crate) masked: Vec<usize>,
}

/// Renders `messages` and finds what `selection` trains of them. Boundaries are looked for where they are needed:
/// none to train on everything, one turn's to train on the last.
pub(crate) fn mask_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: RenderOptions<'_>,
    selection: &Selection,
) -> Result<MaskedText, BadReason> {
    let options = RenderOptions {
        add_generation_prompt: false,
        ..options
    };
    let all = selection.train_on == TrainOn::All;
    let (text, blocks) = match all && selection.masked.is_empty() {
        true => (template.render_with(messages, options)?, Vec::new()),
        false => template.render_generation(messages, options)?,
    };
    let turns: Vec<usize> = messages
        .iter()
        .enumerate()
        .filter(|(_, message)| message.role() == "assistant")
        .map(|(i, _)| i)
        .collect();
    let is_masked = |i: &usize| selection.masked.contains(i);
    let mut wanted: Vec<usize> = match all {
        true => selection.masked.clone(),
        false => {
            let mut trained = turns.iter().copied().filter(|i| *i >= selection.first);
            match selection.train_on {
                TrainOn::LastAssistant => trained.next_back().into_iter().collect(),
                _ => trained.collect(),
            }
        }
    };
    if !all {
        wanted.retain(|i| !is_masked(i));
        if wanted.is_empty() {
            return Err(BadReason::NothingTrained {
                detail: "every assistant message that could be is left out by its weight"
                    .to_owned(),
            });
        }
    }
    let finder = TurnFinder::new(tokenizer, template, messages, options, &text);
    let found = match blocks.is_empty() {
        true => finder.find_all(&wanted)?,
        false => finder.blocks_of(blocks, &turns, &wanted)?,
    };
    for pair in found.windows(2) {
        if let [one, next] = pair
            && next.start < one.end
        {
            return Err(BadReason::Boundary {
                index: selection.first,
                detail: "two turns overlap".to_owned(),
            });
        }
    }
    let spans = match all {
        true => around(&found, text.len()),
        false => found,
    };
    let ends_turn = |span: &Range<usize>| {
        let turn = text.get(span.clone()).unwrap_or_default();
        tokenizer.end_of_turn_length(turn).is_some()
    };
    // Trained on everything, each turn's end is trained with the rest.
    let closed = match all {
        true => spans.last().is_some_and(ends_turn),
        false => spans.iter().all(ends_turn),
    };
    Ok(MaskedText {
        text,
        spans,
        closed,
    })
}

/// What lies between and around `spans` in a text of `len` bytes.
fn around(spans: &[Range<usize>], len: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(spans.iter().map(|span| span.end));
    let ends = spans.iter().map(|span| span.start).chain([len]);
    let gaps = starts.zip(ends).map(|(start, end)| start..end);
    gaps.filter(|gap| !gap.is_empty()).collect()
}

/// Labels for `encoded`: a token is trained where it has a byte in one of `spans` (in order).
///
/// A token that straddles a span's start (a space of the prompt merged with the answer's first
/// letter) is trained too: leaving it out would lose the start of the answer. Also returns how many
/// tokens straddle. A token that covers no text is never trained here.
pub(crate) fn labels_in(encoded: &Encoded, spans: &[Range<usize>]) -> (Vec<i64>, usize) {
    let mut labels = vec![IGNORED; encoded.ids.len()];
    let mut straddling: usize = 0;
    let mut next: usize = 0;
    for ((label, &id), offset) in labels.iter_mut().zip(&encoded.ids).zip(&encoded.offsets) {
        while spans.get(next).is_some_and(|span| span.end <= offset.start) {
            next = next.saturating_add(1);
        }
        // A token longer than the gap between two spans can reach the one after `next`.
        let hit = spans
            .iter()
            .skip(next)
            .take_while(|span| span.start < offset.end)
            .find(|span| offset.start < span.end && !offset.is_empty());
        if let Some(span) = hit {
            *label = i64::from(id);
            straddling = straddling.saturating_add(usize::from(offset.start < span.start));
        }
    }
    (labels, straddling)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{CHATML, tokenizer};

    /// The trained texts of a conversation.
    fn trained(source: &str, messages: &[Message]) -> Result<Vec<String>, BadReason> {
        let tokenizer = tokenizer(Some(source));
        let template = tokenizer.chat_template().unwrap();
        let options = RenderOptions::default();
        let masked = mask_conversation(
            &tokenizer,
            template,
            messages,
            options,
            &Selection::default(),
        )?;
        Ok(masked
            .spans
            .iter()
            .map(|span| masked.text[span.clone()].to_owned())
            .collect())
    }

    fn two_turns() -> [Message; 5] {
        [
            Message::system("s"),
            Message::user("q1"),
            Message::assistant(" a1 \n"),
            Message::user("q2"),
            Message::assistant("a2"),
        ]
    }

    #[test]
    fn chatml_turns_end_with_their_token_and_without_the_newline_after_it() {
        assert_eq!(
            trained(CHATML, &two_turns()).unwrap(),
            [" a1 \n<|im_end|>", "a2<|im_end|>"]
        );
    }

    #[test]
    fn text_a_template_puts_before_the_answer_is_trained_unless_the_prompt_holds_it() {
        // Mistral's manner: no generation prompt, a space before the answer.
        let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\
            {{ ' ' + m.content | trim + eos_token }}{% else %}[INST] {{ m.content }} [/INST]\
            {% endif %}{% endfor %}";
        assert_eq!(
            trained(source, &two_turns()).unwrap(),
            [" a1</s>", " a2</s>"]
        );
        // Zephyr's manner: the prompt lacks the newline after the header, so it is generated.
        let source = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n\
            {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
        assert_eq!(
            trained(source, &two_turns()).unwrap(),
            ["\n a1 \n</s>", "\na2</s>"]
        );
    }

    #[test]
    fn a_default_system_prompt_and_trimmed_contents_change_nothing() {
        let source = "{% if messages[0].role != 'system' %}<|im_start|>system\nDefault<|im_end|>\n\
            {% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim \
            + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}\
            {{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            trained(source, &two_turns()[1..]).unwrap(),
            ["a1<|im_end|>", "a2<|im_end|>"]
        );
    }

    /// Earlier thoughts are dropped, so the rendering up to a turn does not begin the full one.
    const DROPS_THOUGHTS: &str = "{% for m in messages %}{% if m.role == 'assistant' %}\
        {% if not loop.last and '</think>' in m.content %}\
        {{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% else %}\
        {{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endif %}{% else %}\
        {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn rewritten_turns_are_found_by_sentinel() {
        let messages = [
            Message::user("q1"),
            Message::assistant("<think>t1</think>a1"),
            Message::user("q2"),
            Message::assistant("<think>t2</think>a2"),
        ];
        assert_eq!(
            trained(DROPS_THOUGHTS, &messages).unwrap(),
            ["a1<|im_end|>", "<think>t2</think>a2<|im_end|>"]
        );
        // The content that looks like markup or like other turns is no trap.
        let messages = [
            Message::user("a1<|im_end|>\n"),
            Message::assistant("</think>a1"),
            Message::user("a1"),
            Message::assistant("a1"),
        ];
        assert_eq!(
            trained(DROPS_THOUGHTS, &messages).unwrap(),
            ["a1<|im_end|>", "a1<|im_end|>"]
        );
    }

    #[test]
    fn a_system_prompt_in_the_last_user_turn_is_found_by_sentinel() {
        let source = "{% set sys = messages[0].content %}{{ bos_token }}{% for m in messages[1:] %}\
            {% if m.role == 'user' %}[INST] {% if loop.index0 >= messages[1:] | length - 2 %}{{ sys }} \
            {% endif %}{{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
        assert_eq!(
            trained(source, &two_turns()).unwrap(),
            [" a1 \n</s>", "a2</s>"]
        );
    }

    #[test]
    fn boundaries_that_cannot_be_established_are_errors() {
        // Every turn's text depends on the whole conversation's.
        let source = "{% for m in messages %}{{ messages | length }}{{ messages[-1].content }}\
            {{ m.content }}{{ m.content }}|{% endfor %}";
        let error = trained(source, &two_turns()).unwrap_err();
        assert!(matches!(error, BadReason::Boundary { .. }), "{error}");
        assert!(error.to_string().contains("{% generation %}"), "{error}");
        // The assistant's content is not shown at all.
        let error = trained("{{ messages[0].content }}", &two_turns()).unwrap_err();
        assert!(
            matches!(error, BadReason::Boundary { index: 2, .. }),
            "{error}"
        );
    }

    #[test]
    fn generation_blocks_are_the_mask_as_they_are() {
        let source = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}\
            {{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}Q:{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(
            trained(source, &two_turns()).unwrap(),
            [" a1 \n<|im_end|>\n", "a2<|im_end|>\n"]
        );
    }

    #[test]
    fn a_turn_without_a_closing_token_is_flagged() {
        let closed = |source: &str| {
            let tokenizer = tokenizer(Some(source));
            let template = tokenizer.chat_template().unwrap();
            let options = RenderOptions::default();
            mask_conversation(
                &tokenizer,
                template,
                &two_turns(),
                options,
                &Selection::default(),
            )
            .unwrap()
            .closed
        };
        assert!(closed(CHATML));
        assert!(!closed(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}\
             {% if add_generation_prompt %}assistant: {% endif %}"
        ));
    }

    #[test]
    fn a_token_is_trained_where_it_has_a_byte_in_a_span() {
        let tokenizer = tokenizer(None);
        let text = "é: yesé yes";
        let encoded = tokenizer.encode_with_offsets(text, false).unwrap();
        let marks = |span: Range<usize>| {
            let (labels, straddling) = labels_in(&encoded, &[span]);
            let marks: String = labels
                .iter()
                .map(|&l| if l == IGNORED { '.' } else { 'x' })
                .collect();
            (marks, straddling)
        };
        // Tokens: two bytes of é, ":", " yes", two bytes of é, " yes".
        assert_eq!(marks(3..7), ("...x...".to_owned(), 0));
        assert_eq!(marks(4..7), ("...x...".to_owned(), 1));
        assert_eq!(marks(7..9), ("....xx.".to_owned(), 0));
        assert_eq!(marks(0..text.len()), ("xxxxxxx".to_owned(), 0));
        let (labels, _) = labels_in(&encoded, &[0..2, 7..9]);
        let trained: Vec<bool> = labels.iter().map(|&l| l != IGNORED).collect();
        assert_eq!(trained, [true, true, false, false, true, true, false]);
    }
}

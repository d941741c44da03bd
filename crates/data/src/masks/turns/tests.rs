//! Tests of finding turns, against where transformers says they lie (tests/fixtures/make_mask_goldens.py).

#![allow(clippy::unwrap_used)]

use serde_json::Value;

use super::*;
use crate::masks::{Selection, TrainOn, mask_conversation};
use crate::testing::{CHATML, tokenizer};

/// A template with and without generation blocks, a conversation, its rendering and its turns.
struct Golden {
    name: String,
    blocks: String,
    plain: String,
    messages: Vec<Message>,
    text: String,
    spans: Vec<Range<usize>>,
}

fn goldens() -> Vec<Golden> {
    let all = include_str!("../../../../../tests/fixtures/data/mask_goldens.json");
    let all: Value = serde_json::from_str(all).unwrap();
    let read = |case: &Value| {
        let template = case["template"].as_str().unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let source = |kind: &str| {
            all["templates"][template][kind]
                .as_str()
                .unwrap()
                .to_owned()
        };
        let messages = all["conversations"][conversation].as_array().unwrap();
        let text = case["text"].as_str().unwrap().to_owned();
        let byte = |n: &Value| {
            let n = n.as_u64().unwrap() as usize;
            let mut starts = text.char_indices().map(|(at, _)| at);
            starts.nth(n).unwrap_or(text.len())
        };
        let spans = case["spans"].as_array().unwrap();
        let spans = spans.iter().map(|span| byte(&span[0])..byte(&span[1]));
        Golden {
            name: format!("{template}/{conversation}"),
            blocks: source("blocks"),
            plain: source("plain"),
            messages: messages
                .iter()
                .map(|m| Message::from_fields(m.as_object().unwrap().clone()))
                .collect(),
            spans: spans.collect(),
            text,
        }
    };
    let goldens: Vec<Golden> = all["cases"].as_array().unwrap().iter().map(read).collect();
    assert!(goldens.len() > 60, "the goldens shrank");
    goldens
}

fn turns_of(messages: &[Message]) -> Vec<usize> {
    let turn = |(i, m): (usize, &Message)| (m.role() == "assistant").then_some(i);
    messages.iter().enumerate().filter_map(turn).collect()
}

/// What `selection` trains of a conversation: the text and its spans, or the error.
fn masked(
    source: &str,
    messages: &[Message],
    selection: &Selection,
) -> (String, Result<Vec<Range<usize>>, String>) {
    let tokenizer = tokenizer(Some(source));
    let template = tokenizer.chat_template().unwrap();
    let options = RenderOptions::default();
    match mask_conversation(&tokenizer, template, messages, options, selection) {
        Ok(masked) => (masked.text, Ok(masked.spans)),
        Err(error) => (String::new(), Err(error.to_string())),
    }
}

fn on(train_on: TrainOn) -> Selection {
    Selection {
        train_on,
        ..Selection::default()
    }
}

#[test]
fn turns_lie_where_transformers_says() {
    let mut wrong = Vec::new();
    for golden in goldens() {
        for (kind, source) in [("plain", &golden.plain), ("blocks", &golden.blocks)] {
            let (text, spans) = masked(source, &golden.messages, &Selection::default());
            if spans != Ok(golden.spans.clone()) || text != golden.text {
                let show = |spans: &[Range<usize>]| -> Vec<String> {
                    let texts = spans
                        .iter()
                        .map(|span| golden.text[span.clone()].to_owned());
                    texts.collect()
                };
                wrong.push(format!(
                    "{} ({kind}):\n  ours   {:?}\n  theirs {:?}",
                    golden.name,
                    spans.map(|spans| show(&spans)),
                    show(&golden.spans)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn marks_find_the_same_turns() {
    let mut learned = 0;
    for golden in goldens() {
        let tokenizer = tokenizer(Some(&golden.plain));
        let template = tokenizer.chat_template().unwrap();
        let options = RenderOptions::default();
        let finder = TurnFinder::new(
            &tokenizer,
            template,
            &golden.messages,
            options,
            &golden.text,
        );
        let turns = turns_of(&golden.messages);
        assert_eq!(
            finder.find_by_marks(&turns).unwrap(),
            golden.spans,
            "{}",
            golden.name
        );
        learned += usize::from(finder.marks().unwrap().iter().flatten().count() > 3);
    }
    assert!(learned > 20, "marks are hardly ever used: {learned}");
}

#[test]
fn other_choices_train_those_of_the_turns() {
    for golden in goldens() {
        for source in [&golden.plain, &golden.blocks] {
            let trained = |selection: &Selection| masked(source, &golden.messages, selection).1;
            assert_eq!(
                trained(&on(TrainOn::LastAssistant)).unwrap(),
                [golden.spans.last().unwrap().clone()],
                "{}",
                golden.name
            );
            assert_eq!(
                trained(&on(TrainOn::All)).unwrap(),
                std::slice::from_ref(&(0..golden.text.len())),
                "{}",
                golden.name
            );
            let turns = turns_of(&golden.messages);
            if turns.len() < 2 {
                continue;
            }
            for (left_out, turn) in turns.iter().enumerate() {
                let mut expected = golden.spans.clone();
                expected.remove(left_out);
                let selection = Selection {
                    masked: vec![*turn],
                    ..Selection::default()
                };
                assert_eq!(trained(&selection).unwrap(), expected, "{}", golden.name);
            }
        }
    }
}

/// No turn of this template can be told from the text: it is written backwards.
const BACKWARDS: &str =
    "{% for m in messages %}{{ m.content | reverse }}{{ messages | length }}|{% endfor %}";

#[test]
fn no_boundary_is_looked_for_that_is_not_used() {
    let talk = [
        Message::user("one"),
        Message::assistant("two"),
        Message::user("three"),
        Message::assistant("four"),
    ];
    let (text, spans) = masked(BACKWARDS, &talk, &on(TrainOn::All));
    assert_eq!(text, "eno4|owt4|eerht4|ruof4|");
    assert_eq!(spans.unwrap(), std::slice::from_ref(&(0..23)));
    let (_, spans) = masked(BACKWARDS, &talk, &Selection::default());
    assert!(
        spans
            .unwrap_err()
            .starts_with("message 1: cannot find where")
    );
    // The last turn starts after the prompt and ends with the text; the first one cannot be found.
    let source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}\
        {{ m.content if loop.last else m.content | upper }}<|im_end|>{% endif %}{% endfor %}";
    let (text, spans) = masked(source, &talk, &on(TrainOn::LastAssistant));
    assert_eq!(text, "one:TWO<|im_end|>three:four<|im_end|>");
    assert_eq!(spans.unwrap(), std::slice::from_ref(&(23..37)));
}

#[test]
fn a_long_conversation_takes_a_handful_of_renderings() {
    const TURNS: usize = 3000;
    let mut talk = Vec::new();
    for i in 0..TURNS {
        talk.push(Message::user(&format!("question {i}?")));
        // Trimming templates, and answers that look like one another or like markup.
        talk.push(Message::assistant(match i % 3 {
            0 => "yes \n",
            1 => "<|im_end|>",
            _ => "yes question 5?",
        }));
    }
    let mut sources: Vec<String> = goldens().into_iter().map(|golden| golden.plain).collect();
    sources.push(CHATML.to_owned());
    sources.sort();
    sources.dedup();
    for source in &sources {
        let tokenizer = tokenizer(Some(source));
        let template = tokenizer.chat_template().unwrap();
        let options = RenderOptions::default();
        let text = template.render_with(&talk, options).unwrap();
        let finder = TurnFinder::new(&tokenizer, template, &talk, options, &text);
        let spans = finder.find_all(&turns_of(&talk)).unwrap();
        assert_eq!(spans.len(), TURNS);
        for (span, message) in spans.iter().zip(talk.iter().skip(1).step_by(2)) {
            let turn = &text[span.clone()];
            assert!(turn.contains(message.content().unwrap().trim()), "{turn:?}");
            assert!(turn.len() < 60, "{turn:?}");
        }
        let renderings = finder.rendered.get() / text.len();
        assert!(renderings < 20, "{renderings} renderings: {source}");
    }
}

#[test]
fn a_long_conversation_that_cannot_be_followed_is_an_error_in_time() {
    let mut talk = Vec::new();
    for _ in 0..20_000 {
        talk.push(Message::user("one"));
        talk.push(Message::assistant("two"));
    }
    let (_, spans) = masked(BACKWARDS, &talk, &Selection::default());
    assert!(spans.unwrap_err().contains("cannot find where"));
}

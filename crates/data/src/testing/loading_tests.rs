//! Tests of loading: every format from file to labels, every bad row, truncation, notes.

#![allow(clippy::unwrap_used)]

use serde_json::json;

use crate::testing::{
    CHATML, bos_post_processor, config, data_file, tokenizer, tokenizer_json, tokenizer_with,
};
use crate::*;

pub(crate) fn load(
    text: &str,
    tokenizer: &Tokenizer,
    spec: DataSpec,
) -> Result<Examples, DataError> {
    let (_dir, path) = data_file("rows.jsonl", text.as_bytes());
    let paths = vec![path];
    load_examples(&DataSpec { paths, ..spec }, tokenizer)
}

/// A row as its runs, the trained ones in brackets.
fn shown(example: &Example, tokenizer: &Tokenizer) -> String {
    let runs = spans(example, tokenizer).unwrap();
    runs.iter()
        .map(|(text, trained)| match trained {
            true => format!("[{text}]"),
            false => text.clone(),
        })
        .collect()
}

pub(crate) fn shown_rows(text: &str, tokenizer: &Tokenizer, spec: DataSpec) -> Vec<String> {
    let examples = load(text, tokenizer, spec).unwrap();
    examples
        .rows
        .iter()
        .map(|row| shown(row, tokenizer))
        .collect()
}

/// The reasons of all bad rows, by line.
pub(crate) fn bad(text: &str, tokenizer: &Tokenizer, spec: DataSpec) -> Vec<(usize, String)> {
    match load(text, tokenizer, spec) {
        Err(DataError::BadRows { rows, total }) => {
            assert_eq!(rows.len(), total.min(BAD_ROWS_SHOWN));
            rows.iter()
                .map(|row| (row.source.line, row.reason.to_string()))
                .collect()
        }
        other => panic!("expected bad rows, got {other:?}"),
    }
}

#[test]
fn conversations_are_trained_on_the_assistant() {
    let t = tokenizer(Some(CHATML));
    let row = json!({"messages": [
        {"role": "user", "content": "é?"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "日本"}]})
    .to_string();
    let user = |text: &str| format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(
        shown_rows(&row, &t, DataSpec::default()),
        [format!(
            "{}[one<|im_end|>]\n{}[日本<|im_end|>]\n",
            user("é?"),
            user("b")
        )]
    );
    let last = DataSpec {
        train_on: TrainOn::LastAssistant,
        ..DataSpec::default()
    };
    assert_eq!(
        shown_rows(&row, &t, last),
        [format!(
            "{}one<|im_end|>\n{}[日本<|im_end|>]\n",
            user("é?"),
            user("b")
        )]
    );
    let all = DataSpec {
        train_on: TrainOn::All,
        ..DataSpec::default()
    };
    assert_eq!(
        shown_rows(&row, &t, all.clone()),
        [format!(
            "[{}one<|im_end|>\n{}日本<|im_end|>\n]",
            user("é?"),
            user("b")
        )]
    );
    let question = r#"{"messages": [{"role": "user", "content": "b"}]}"#;
    assert_eq!(shown_rows(question, &t, all).len(), 1);
    assert!(
        bad(question, &t, DataSpec::default())[0]
            .1
            .contains("no assistant message")
    );
}

#[test]
fn completions_are_trained_with_eos() {
    let t = tokenizer(None);
    let text = concat!(
        r#"{"prompt": "Is it?", "completion": " yes"}"#,
        "\n",
        r#"{"prompt": "Is it? ", "completion": "yes"}"#,
        "\n",
        r#"{"prompt": "", "completion": "yes</s>"}"#,
        "\n",
    );
    let examples = load(text, &t, DataSpec::default()).unwrap();
    let rows: Vec<String> = examples.rows.iter().map(|row| shown(row, &t)).collect();
    // In the second row prompt and answer share the token " yes".
    assert_eq!(rows, ["Is it?[ yes</s>]", "Is it?[ yes</s>]", "[yes</s>]"]);
    assert!(matches!(
        &examples.notes[..],
        [Note::StraddlingToken { rows: 1, first }] if first.line == 2
    ));
    assert!(
        bad(
            r#"{"prompt": "a", "completion": ""}"#,
            &t,
            DataSpec::default()
        )[0]
        .1
        .contains("empty")
    );
}

#[test]
fn completions_may_be_conversations() {
    let t = tokenizer(Some(CHATML));
    let row = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}]})
    .to_string();
    let rows = shown_rows(&row, &t, DataSpec::default());
    assert!(rows[0].contains("assistant\nb<|im_end|>\n"), "{}", rows[0]);
    assert!(
        rows[0].ends_with("assistant\n[d<|im_end|>]\n"),
        "{}",
        rows[0]
    );
}

#[test]
fn text_is_trained_whole_and_gets_one_bos_and_one_eos() {
    let mut json = tokenizer_json();
    json["post_processor"] = bos_post_processor(&json);
    let t = tokenizer_with(json, config(), None);
    let text = "{\"text\": \"ab\"}\n{\"text\": \"<s>ab</s>\"}\n";
    assert_eq!(
        shown_rows(text, &t, DataSpec::default()),
        ["[<s>ab</s>]", "[<s>ab</s>]"]
    );
}

#[test]
fn token_rows_keep_their_labels() {
    let t = tokenizer(None);
    let text =
        "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 9]}\n";
    let examples = load(text, &t, DataSpec::default()).unwrap();
    assert_eq!(examples.rows[0].labels, [1, 2, 3]);
    assert_eq!(examples.rows[1].labels, [IGNORED, IGNORED, 9]);
    assert_eq!(examples.rows[1].trained_tokens(), 1);
    assert_eq!((examples.tokens(), examples.trained()), (6, 3));
    assert!(matches!(
        examples.notes[..],
        [Note::NoEndOfTurn { rows: 2, .. }]
    ));
    assert!(
        examples.notes[0]
            .to_string()
            .contains("does not learn to stop")
    );
}

#[test]
fn all_bad_rows_are_reported_with_line_and_reason() {
    let t = tokenizer(Some(CHATML));
    let text = concat!(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
        "{\"messages\": [\n",
        "\n",
        "[1]\n",
        "{\"message\": []}\n",
        "{\"messages\": \"hi\"}\n",
        "{\"messages\": []}\n",
        "{\"messages\": [3]}\n",
        "{\"messages\": [{\"content\": \"a\"}]}\n",
        "{\"messages\": [{\"role\": \"user\"}]}\n",
        "{\"messages\": [{\"role\": \"bot\", \"content\": \"a\"}]}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": 3}]}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]}\n",
    );
    let expected = [
        (2, "invalid JSON"),
        (4, "must be a JSON object, this is a list"),
        (
            5,
            "missing field `messages` (format messages); the row has `message`",
        ),
        (
            6,
            "field `messages` must be a list of messages, not a string",
        ),
        (7, "`messages` is empty"),
        (
            8,
            "field `messages[0]` must be an object with role and content, not a number",
        ),
        (9, "missing field `messages[0].role`"),
        (10, "missing field `messages[0].content`"),
        (
            11,
            "message 0: unknown role \"bot\"; known roles are system",
        ),
        (
            12,
            "field `messages[0].content` must be a string, not a number",
        ),
        (13, "field `messages[0].content[0]`"),
    ];
    let found = bad(text, &t, DataSpec::default());
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((line, reason), (expected_line, expected_reason)) in found.iter().zip(expected) {
        assert_eq!(*line, expected_line);
        assert!(reason.contains(expected_reason), "{line}: {reason}");
    }
    let skip = DataSpec {
        on_bad_row: OnBadRow::Skip,
        ..DataSpec::default()
    };
    let examples = load(text, &t, skip).unwrap();
    assert_eq!((examples.rows.len(), examples.skipped.len()), (1, 11));
    assert_eq!(examples.files[0].rows, 12);
    let error = load(text, &t, DataSpec::default()).unwrap_err().to_string();
    assert!(error.starts_with("11 bad rows:\n  "), "{error}");
    assert!(error.contains("rows.jsonl:2: invalid JSON"), "{error}");
    assert!(
        error.ends_with("set on_bad_row = \"skip\" to train without them."),
        "{error}"
    );
}

#[test]
fn bad_token_rows_are_reported() {
    let t = tokenizer(None);
    let size = t.vocab_size();
    let text = format!(
        "{{\"input_ids\": []}}\n{{\"input_ids\": [1, {size}]}}\n{{\"input_ids\": [-1, 2]}}\n\
         {{\"input_ids\": [1, 2], \"labels\": [1]}}\n{{\"input_ids\": [1, 2], \"labels\": [1, -7]}}\n\
         {{\"input_ids\": [1, 2], \"labels\": [1, -100]}}\n{{\"input_ids\": [1, 2.5]}}\n"
    );
    let reasons = [
        "`input_ids` is empty",
        "input_ids[1] = 270 is outside the vocabulary of 270 tokens",
        "input_ids[0] = -1 is outside",
        "`labels` has 1 entries, `input_ids` has 2",
        "labels[1] = -7 is outside",
        // Only the first token has a label, and nothing predicts the first token.
        "no trained token: every label is ignored",
        "field `input_ids[1]` must be an integer, not a number",
    ];
    assert_eq!(size, 270);
    for ((line, reason), expected) in bad(&text, &t, DataSpec::default()).iter().zip(reasons) {
        assert!(reason.contains(expected), "{line}: {reason}");
    }
}

#[test]
fn more_bad_rows_than_shown_are_counted() {
    let t = tokenizer(None);
    let error = load(&"{\n".repeat(25), &t, DataSpec::default()).unwrap_err();
    assert!(error.to_string().contains("… and 5 more"), "{error}");
    let error = load("{\"a\": 1}\n", &t, DataSpec::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("keys are `a`; expected messages, or prompt and completion"),
        "{error}"
    );
}

#[test]
fn invalid_utf8_is_a_bad_row_of_its_line() {
    let t = tokenizer(None);
    let (_dir, path) = data_file(
        "rows.jsonl",
        b"\xEF\xBB\xBF{\"text\": \"ok ok\"}\r\n{\"text\": \"\xFF\"}\r\n",
    );
    let spec = DataSpec {
        paths: vec![path],
        on_bad_row: OnBadRow::Skip,
        ..DataSpec::default()
    };
    let examples = load_examples(&spec, &t).unwrap();
    assert_eq!(examples.rows.len(), 1);
    assert_eq!(examples.skipped[0].source.line, 2);
    assert_eq!(examples.skipped[0].reason, BadReason::Utf8 { offset: 10 });
}

#[test]
fn long_rows_are_cut_dropped_or_refused() {
    let t = tokenizer(None);
    let text = "{\"prompt\": \"abcdef\", \"completion\": \"gh\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let spec = |truncation, max_length| DataSpec {
        truncation,
        max_length: Some(max_length),
        ..DataSpec::default()
    };
    let loaded = |s| load(text, &t, s).unwrap();
    let rows = |e: &Examples| e.rows.iter().map(|r| shown(r, &t)).collect::<Vec<_>>();

    let found = bad(text, &t, spec(Truncation::Error, 4));
    assert_eq!(found.len(), 1);
    assert!(
        found[0].1.contains("9 tokens, more than max_length = 4"),
        "{}",
        found[0].1
    );

    let kept = loaded(spec(Truncation::KeepStart, 7));
    assert_eq!(rows(&kept), ["abcdef[g]", "a[b</s>]"]);
    assert_eq!((kept.truncated, kept.dropped), (1, 0));
    assert_eq!(
        rows(&loaded(spec(Truncation::KeepEnd, 4))),
        ["f[gh</s>]", "a[b</s>]"]
    );
    let dropped = loaded(spec(Truncation::Drop, 4));
    assert_eq!((rows(&dropped).len(), dropped.dropped), (1, 1));

    // Nothing of the completion is left: never kept silently.
    let found = bad(text, &t, spec(Truncation::KeepStart, 6));
    assert!(
        found[0].1.contains("the first 6 of 9 tokens hold none"),
        "{}",
        found[0].1
    );

    let error = load(text, &t, spec(Truncation::Drop, 2))
        .unwrap_err()
        .to_string();
    assert!(error.contains("2 dropped as too long"), "{error}");
    let error = load(text, &t, spec(Truncation::Error, 1))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "data.max_length must be at least 2, is 1");
}

#[test]
fn a_conversation_needs_a_template() {
    let t = tokenizer(None);
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let error = load(row, &t, DataSpec::default()).unwrap_err();
    assert!(matches!(error, DataError::NoChatTemplate { row } if row.line == 1));
}

#[test]
fn formats_are_found_per_file_and_arrays_are_read() {
    let t = tokenizer(Some(CHATML));
    let dir = tempfile::tempdir().unwrap();
    let array = "[\n {\"text\": \"ab\"},\n {\"text\": 3}\n]\n";
    std::fs::write(dir.path().join("a.json"), array).unwrap();
    std::fs::write(dir.path().join("b.jsonl"), "{\"input_ids\": [1, 2]}\n").unwrap();
    let spec = DataSpec {
        paths: vec![dir.path().to_owned()],
        on_bad_row: OnBadRow::Skip,
        ..DataSpec::default()
    };
    let examples = load_examples(&spec, &t).unwrap();
    let formats: Vec<&str> = examples.files.iter().map(|f| f.format).collect();
    assert_eq!(formats, ["text", "tokens"]);
    assert_eq!(examples.skipped[0].source.line, 3);
    assert_eq!(examples.rows[1].index, 1);
    assert_eq!(examples.rows[1].source.line, 1);
    assert_eq!(examples.files[1].sha256.len(), 64);
    let forced = DataSpec {
        format: RecordFormat::Tokens,
        ..spec
    };
    assert_eq!(load_examples(&forced, &t).unwrap().skipped.len(), 2);
}

#[test]
fn threads_change_nothing() {
    let t = tokenizer(Some(CHATML));
    let rows: String = (0..500)
        .map(|i| format!("{{\"text\": \"row {i} {}\"}}\n", "yes ".repeat(i % 7)))
        .collect();
    let examples = load(&rows, &t, DataSpec::default()).unwrap();
    for (i, row) in examples.rows.iter().enumerate() {
        assert_eq!((row.index, row.source.line), (i, i + 1));
        assert!(shown(row, &t).starts_with(&format!("[row {i} ")));
    }
}

#[test]
fn every_format_has_a_name_that_recipes_use() {
    for format in RecordFormat::all() {
        assert_eq!(serde_json::to_value(format).unwrap(), json!(format.name()));
    }
    let spec: DataSpec = serde_json::from_value(json!({
        "format": "prompt_completion", "truncation": "keep_end", "on_bad_row": "skip",
        "train_on": "last_assistant"}))
    .unwrap();
    assert_eq!(spec.truncation, Truncation::KeepEnd);
    assert_eq!(spec.train_on, TrainOn::LastAssistant);
    assert_eq!(
        serde_json::to_value(RecordFormat::Auto).unwrap(),
        json!("auto")
    );
}

#[test]
fn template_arguments_and_tools_reach_the_template() {
    let source = format!("{{{{ tone }}}}{{{{ tools | length if tools else 0 }}}}{CHATML}");
    let t = tokenizer(Some(&source));
    let row = json!({"tools": [{"name": "a"}, {"name": "b"}],
                     "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    .to_string();
    let mut spec = DataSpec::default();
    spec.template_arguments
        .insert("tone".to_owned(), json!("dry"));
    let rows = shown_rows(&row, &t, spec);
    assert!(rows[0].starts_with("dry2<|im_start|>user"), "{}", rows[0]);
}

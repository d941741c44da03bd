//! Tokenizer, chat template and label masks against transformers.

use std::io::Write;
use std::path::Path;

use enamel_data::{
    DataSpec, IGNORED, Message, OnBadRow, RecordFormat, Tokenizer, TrainOn, Truncation,
    load_examples,
};
use serde_json::{Value, json};

use crate::support::goldens::{Generation, fixtures, json as read, stage};

fn tokenizer() -> Tokenizer {
    let staged = stage("untied", Generation::Five);
    let config = read(&staged.path().join("tokenizer_config.json"));
    let bytes = std::fs::read(staged.path().join("tokenizer.json")).expect("a fixture");
    Tokenizer::from_parts(&bytes, Some(&config), None).unwrap_or_else(|e| panic!("{e}"))
}

fn messages(chat: &Value) -> Vec<Message> {
    chat.as_array()
        .expect("a list of messages")
        .iter()
        .map(|m| Message::from_fields(m.as_object().expect("a message").clone()))
        .collect()
}

fn numbers(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .expect("ids")
        .iter()
        .map(|v| v.as_u64().expect("an id") as u32)
        .collect()
}

/// Ids, decoded text and rendered chats are those of the golden.
pub fn assert_as_transformers(tokenizer: &Tokenizer) {
    let golden = read(&fixtures().join("tokenizer.json"));
    for case in golden["texts"].as_array().expect("texts") {
        let text = case["text"].as_str().expect("a text");
        let ids = tokenizer
            .encode(text, false)
            .unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(ids, numbers(&case["ids"]), "{text:?}");
        let decoded = tokenizer
            .decode(&ids, false)
            .unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(Some(decoded.as_str()), case["decoded"].as_str());
    }
    let template = tokenizer.chat_template().expect("a chat template");
    for case in golden["chats"].as_array().expect("chats") {
        let messages = messages(&case["messages"]);
        let render = |prompt| {
            template
                .render(&messages, prompt)
                .unwrap_or_else(|e| panic!("{e}"))
        };
        assert_eq!(Some(render(false).as_str()), case["text"].as_str());
        assert_eq!(
            Some(render(true).as_str()),
            case["with_generation_prompt"].as_str()
        );
        let ids = tokenizer
            .encode(&render(false), false)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(ids, numbers(&case["ids"]));
    }
    assert_eq!(tokenizer.vocab_size(), 128);
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()),
        (Some(1), Some(2), Some(0))
    );
    assert!(tokenizer.end_of_turn_ids().contains(&2));
}

#[test]
fn tokenizer_and_template_agree() {
    assert_as_transformers(&tokenizer());
}

fn write_rows(path: &Path, rows: &[Value]) {
    let mut file = std::fs::File::create(path).expect("room on the disk");
    for row in rows {
        writeln!(file, "{row}").expect("room on the disk");
    }
}

fn spec(path: &Path) -> DataSpec {
    DataSpec {
        paths: vec![path.to_path_buf()],
        format: RecordFormat::default(),
        max_length: None,
        truncation: Truncation::Error,
        on_bad_row: OnBadRow::Error,
        train_on: TrainOn::default(),
        ..DataSpec::default()
    }
}

#[test]
fn labels_cover_the_assistants_turns_and_their_end_markers() {
    let golden = read(&fixtures().join("tokenizer.json"));
    let chats: Vec<&Value> = golden["chats"]
        .as_array()
        .expect("chats")
        .iter()
        .filter(|c| {
            c["trained"]
                .as_array()
                .expect("a mask")
                .contains(&Value::Bool(true))
        })
        .collect();
    assert_eq!(chats.len(), 2);
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    let path = dir.path().join("rows.jsonl");
    let rows: Vec<_> = chats
        .iter()
        .map(|c| json!({ "messages": c["messages"] }))
        .collect();
    write_rows(&path, &rows);
    let examples = load_examples(&spec(&path), &tokenizer())
        .unwrap_or_else(|e| panic!("{e}"))
        .rows;
    for (example, chat) in examples.iter().zip(chats) {
        let ids = numbers(&chat["ids"]);
        // The newline after the last end marker belongs to no turn and may be left off.
        assert!(
            ids.starts_with(&example.input_ids),
            "{:?}",
            example.input_ids
        );
        assert!(ids.len() - example.input_ids.len() <= 1);
        let trained = chat["trained"].as_array().expect("a mask");
        for (i, label) in example.labels.iter().enumerate() {
            let wanted = if trained[i] == Value::Bool(true) {
                i64::from(ids[i])
            } else {
                IGNORED
            };
            assert_eq!(*label, wanted, "token {i} of {}", chat["text"]);
        }
    }
}

#[test]
fn rows_become_the_ids_and_labels_of_trl() {
    let golden = read(&fixtures().join("data/text_row_goldens.json"));
    let staged = stage("untied", Generation::Five);
    let config = read(&staged.path().join("tokenizer_config.json"));
    let bytes = std::fs::read(staged.path().join("tokenizer.json")).expect("a fixture");
    let template = golden["chat_template"].as_str();
    let tokenizer =
        Tokenizer::from_parts(&bytes, Some(&config), template).unwrap_or_else(|e| panic!("{e}"));
    let path = staged.path().join("rows.jsonl");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() > 15, "the goldens shrank");
    for case in cases {
        write_rows(&path, &[case["row"].clone()]);
        let spec = DataSpec {
            train_on: match case["only"].as_bool() {
                Some(true) => TrainOn::Assistant,
                _ => TrainOn::All,
            },
            ..spec(&path)
        };
        let examples = load_examples(&spec, &tokenizer).unwrap_or_else(|e| panic!("{case}: {e}"));
        let example = &examples.rows[0];
        let found = json!({"input_ids": example.input_ids, "labels": example.labels});
        let theirs = json!({"input_ids": case["input_ids"], "labels": case["labels"]});
        assert_eq!(found, theirs, "{}", case["row"]);
    }
}

#[test]
fn bad_rows_are_all_named_by_file_and_line() {
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    let path = dir.path().join("rows.jsonl");
    std::fs::write(
        &path,
        concat!(
            r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}]}"#,
            "\n",
            r#"{"messages":[{"role":"user","content":"hi"},{"role":"wizard","content":"yes"}]}"#,
            "\n",
            "{\"messages\":[\n",
            r#"{"messages":[{"role":"user","content":"nobody answers"}]}"#,
            "\n",
            r#"{"massages":[]}"#,
            "\n",
        ),
    )
    .expect("room on the disk");
    let error = load_examples(&spec(&path), &tokenizer())
        .expect_err("four bad rows")
        .to_string();
    for line in 2..=5 {
        assert!(
            error.contains(&format!("rows.jsonl:{line}")),
            "line {line} is missing: {error}"
        );
    }
    assert!(!error.contains("rows.jsonl:1"), "{error}");

    let skipping = DataSpec {
        on_bad_row: OnBadRow::Skip,
        ..spec(&path)
    };
    let examples = load_examples(&skipping, &tokenizer()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((examples.rows.len(), examples.skipped.len()), (1, 4));
}

//! Tests of what rows say beside their text: tools, variables, weights, masks, columns of other trainers, and the
//! formats of other trainers.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::loading_tests::{bad, load, shown_rows};
use crate::testing::{CHATML, tokenizer};
use crate::*;

/// ChatML with the tools and a variable before it.
fn with_tools() -> Tokenizer {
    tokenizer(Some(&format!(
        "{{{{ tone }}}}{{% for t in tools or [] %}}{{{{ t | tojson }}}}{{% endfor %}}{CHATML}"
    )))
}

fn conversation() -> Value {
    json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
}

fn reason(row: Value, tokenizer: &Tokenizer) -> String {
    let found = bad(&row.to_string(), tokenizer, DataSpec::default());
    found[0].1.clone()
}

fn one(row: Value, tokenizer: &Tokenizer) -> String {
    shown_rows(&row.to_string(), tokenizer, DataSpec::default()).remove(0)
}

#[test]
fn tools_as_json_text_are_those_of_a_list() {
    let t = with_tools();
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let row = |tools: Value| json!({"tools": tools, "messages": conversation()});
    let of_list = one(row(tools.clone()), &t);
    assert!(of_list.starts_with("{\"type\": \"function\""), "{of_list}");
    assert_eq!(one(row(json!(tools.to_string())), &t), of_list);
    let without = one(json!({"messages": conversation()}), &t);
    for none in [Value::Null, json!([]), json!("null"), json!("[]")] {
        assert_eq!(one(row(none), &t), without);
    }
    for (tools, expected) in [
        (
            json!(""),
            "`tools`: must be a list of objects, or such a list as JSON text; this text is not JSON",
        ),
        (json!("f(x)"), "not JSON"),
        (
            json!({"name": "f"}),
            "`tools`: must be a list of objects, or such a list as JSON text, not an object",
        ),
        (json!("{\"name\": \"f\"}"), "not an object"),
        (
            json!([{"name": "f"}, "g"]),
            "field `tools[1]` must be an object that describes a tool, not a string",
        ),
        (json!("[\"g\"]"), "field `tools[0]` must be"),
        (json!(3), "not a number"),
    ] {
        let reason = reason(row(tools.clone()), &t);
        assert!(reason.contains(expected), "{tools}: {reason}");
    }
}

#[test]
fn tools_and_calls_that_the_template_does_not_write_are_said() {
    let t = tokenizer(Some(CHATML));
    let call = json!({"type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let row = json!({"tools": [{"name": "f"}], "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call.clone()]}]});
    let notes = |t: &Tokenizer| -> Vec<Remark> {
        let examples = load(&row.to_string(), t, DataSpec::default()).unwrap();
        let remark = |note: &Note| match note {
            Note::Remark {
                remark, rows: 1, ..
            } => Some(*remark),
            _ => None,
        };
        examples.notes.iter().filter_map(remark).collect()
    };
    assert_eq!(notes(&t), [Remark::ToolsUnread, Remark::CallsUnread]);
    // As in transformers, arguments that are JSON text are a string to the template.
    let t = tokenizer(Some(
        "{{ tools | length }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}\
         {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}",
    ));
    assert_eq!(notes(&t), [Remark::ArgumentsEncodedTwice]);
    assert_eq!(
        one(row.clone(), &t),
        "1a<|im_end|>[b\"{\\\"a\\\": 1}\"<|im_end|>]"
    );
}

#[test]
fn variables_of_the_row_come_before_those_of_the_recipe() {
    let t = with_tools();
    let mut spec = DataSpec::default();
    spec.template_arguments
        .insert("tone".to_owned(), json!("dry"));
    let rows = [
        json!({"messages": conversation()}),
        json!({"messages": conversation(), "chat_template_kwargs": {"tone": "wet"}}),
        json!({"messages": conversation(), "chat_template_kwargs": null}),
    ];
    let text = rows.map(|row| row.to_string()).join("\n");
    let rows = shown_rows(&text, &t, spec.clone());
    let starts: Vec<&str> = rows.iter().map(|row| &row[..3]).collect();
    assert_eq!(starts, ["dry", "wet", "dry"]);
    let row = |kwargs: Value| json!({"messages": conversation(), "chat_template_kwargs": kwargs});
    for (kwargs, expected) in [
        (
            json!("{}"),
            "field `chat_template_kwargs` must be an object",
        ),
        (
            json!({"tools": [], "x": 1}),
            "`chat_template_kwargs`: tools cannot be set",
        ),
        (
            json!({"add_generation_prompt": true}),
            "add_generation_prompt cannot be set",
        ),
    ] {
        let reason = reason(row(kwargs), &t);
        assert!(reason.contains(expected), "{reason}");
    }
    spec.template_arguments
        .insert("messages".to_owned(), json!([]));
    let error = load(&text, &t, spec).unwrap_err().to_string();
    assert!(
        error.starts_with("data.chat_template_kwargs messages cannot"),
        "{error}"
    );
}

#[test]
fn messages_with_weight_zero_are_context() {
    let t = tokenizer(Some(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    ));
    let row = |flag: &str, value: Value| {
        json!({"messages": [
            {"role": "user", "content": "a", flag: Value::Null},
            {"role": "assistant", "content": "b", flag: value},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"}]})
    };
    let both = "a<|im_end|>[b<|im_end|>]c<|im_end|>[d<|im_end|>]";
    let second = "a<|im_end|>b<|im_end|>c<|im_end|>[d<|im_end|>]";
    for (flag, value, expected) in [
        ("weight", json!(0), second),
        ("weight", json!(1), both),
        ("weight", json!(0.0), second),
        ("weight", Value::Null, both),
        ("train", json!(false), second),
        ("train", json!(true), both),
        ("training", json!(false), second),
        ("loss", json!(false), second),
        ("loss_mask", json!(0), second),
        ("masked", json!(true), second),
        ("masked", json!(false), both),
        ("train_detail", json!([]), both),
    ] {
        assert_eq!(
            one(row(flag, value.clone()), &t),
            expected,
            "{flag} {value}"
        );
    }
    // Trained on everything, all but those turns are.
    let all = DataSpec {
        train_on: TrainOn::All,
        ..DataSpec::default()
    };
    let text = row("weight", json!(0)).to_string();
    assert_eq!(
        shown_rows(&text, &t, all.clone()),
        ["[a<|im_end|>]b<|im_end|>[c<|im_end|>d<|im_end|>]"]
    );
    for (flag, value, expected) in [
        (
            "weight",
            json!(0.5),
            "`messages[1].weight`: is 0.5, and a message is trained",
        ),
        ("weight", json!("1"), "is \"1\", and a message"),
        (
            "train_detail",
            json!([{"begin_offset": 0, "end_offset": 1, "train": false}]),
            "weighs parts",
        ),
    ] {
        let reason = reason(row(flag, value), &t);
        assert!(reason.contains(expected), "{reason}");
    }
    let mut user = row("weight", json!(0));
    user["messages"][0]["weight"] = json!(1);
    assert!(reason(user.clone(), &t).contains("asks to train a message of role user"));
    user["messages"][0]["weight"] = json!(0);
    assert_eq!(one(user.clone(), &t), second);
    let reasons = bad(&user.to_string(), &t, all.clone());
    assert!(
        reasons[0]
            .1
            .contains("`messages[0].weight`: leaves out a message of role user")
    );
    let everything = user.to_string().replace("0", "1");
    assert_eq!(shown_rows(&everything, &t, all)[0].matches('[').count(), 1);
    user["messages"][3]["weight"] = json!(0);
    assert!(reason(user.clone(), &t).contains("left out by its weight"));
    user["messages"][3]["train"] = json!(true);
    assert!(reason(user, &t).contains("contradicts `weight`"));
}

#[test]
fn masks_beside_token_ids_decide_as_in_trl() {
    // TRL 1.16's labels for these rows are written out by tests/fixtures/make_row_goldens.py.
    let goldens = include_str!("../../../../tests/fixtures/data/token_row_goldens.json");
    let goldens: Value = serde_json::from_str(goldens).unwrap();
    let t = tokenizer(None);
    let cases = goldens["cases"].as_array().unwrap();
    for case in cases {
        let train_on = match case["completion_only_loss"].as_bool() {
            Some(true) => TrainOn::Assistant,
            _ => TrainOn::All,
        };
        let spec = DataSpec {
            train_on,
            ..DataSpec::default()
        };
        let examples = load(&case["row"].to_string(), &t, spec).unwrap();
        assert_eq!(json!(examples.rows[0].labels), case["labels"], "{case}");
    }
    assert!(cases.len() >= 8);
}

#[test]
fn padding_is_dropped_and_packed_rows_are_refused() {
    let t = tokenizer(None);
    let ids = json!([9, 8, 1, 2, 3, 9]);
    let row = |name: &str, value: Value| {
        let mut row = json!({"input_ids": ids});
        row[name] = value;
        row
    };
    let padded = row("attention_mask", json!([0, 0, 1, 1, true, 0])).to_string();
    let examples = load(&padded, &t, DataSpec::default()).unwrap();
    assert_eq!(examples.rows[0].input_ids, [1, 2, 3]);
    assert_eq!(examples.rows[0].labels, [1, 2, 3]);
    let mut labelled = row("attention_mask", json!([0, 0, 1, 1, 1, 0]));
    labelled["labels"] = json!([-100, -100, -100, 7, 8, -100]);
    labelled["position_ids"] = json!([1, 1, 0, 1, 2, 1]);
    let examples = load(&labelled.to_string(), &t, DataSpec::default()).unwrap();
    assert_eq!(examples.rows[0].labels, [-100, 7, 8]);
    for (name, fine) in [
        ("position_ids", json!([0, 1, 2, 3, 4, 5])),
        ("seq_lengths", json!([6])),
        ("token_type_ids", json!([0, 0, 0, 0, 0, 0])),
        ("assistant_masks", Value::Null),
    ] {
        let examples = load(&row(name, fine).to_string(), &t, DataSpec::default()).unwrap();
        assert_eq!(examples.rows[0].labels.len(), 6, "{name}");
        assert!(
            !examples
                .notes
                .iter()
                .any(|n| matches!(n, Note::UnusedColumns { .. }))
        );
    }
    for (name, value, expected) in [
        (
            "attention_mask",
            json!([1, 1, 0, 1, 1, 1]),
            "is 0 at token 2, between",
        ),
        (
            "attention_mask",
            json!([0, 0, 0, 0, 0, 0]),
            "is 0 everywhere",
        ),
        (
            "attention_mask",
            json!([1, 1]),
            "`attention_mask` has 2 entries, `input_ids` has 6",
        ),
        (
            "attention_mask",
            json!([1, 1, 1, 1, 1, 2]),
            "field `attention_mask[5]` must be 0 or 1",
        ),
        (
            "completion_mask",
            json!([1]),
            "`completion_mask` has 1 entries",
        ),
        (
            "position_ids",
            json!([0, 1, 2, 0, 1, 2]),
            "`position_ids`: packs several documents",
        ),
        (
            "position_ids",
            json!([5, 6, 7, 8, 9, 10]),
            "is 5 at token 0",
        ),
        (
            "position_ids",
            json!([0, 1]),
            "`position_ids` has 2 entries",
        ),
        (
            "seq_lengths",
            json!([2, 4]),
            "`seq_lengths`: packs several documents",
        ),
        ("seq_lengths", json!([5]), "is not the row's length, 6"),
        (
            "token_type_ids",
            json!([0, 0, 0, 1, 1, 1]),
            "column `token_type_ids`",
        ),
        (
            "loss_mask",
            json!([0, 0, 0, 1, 1, 1]),
            "column `loss_mask` says which tokens count",
        ),
    ] {
        let reason = reason(row(name, value), &t);
        assert!(reason.contains(expected), "{name}: {reason}");
    }
    let mut both = row("completion_mask", json!([0, 0, 0, 1, 1, 1]));
    both["labels"] = json!([1, 1, 1, 1, 1, 1]);
    assert!(reason(both, &t).contains("leaves out token 0, which `labels` train"));
}

#[test]
fn columns_that_other_trainers_act_on_are_refused_by_name() {
    let t = tokenizer(Some(CHATML));
    let row = |name: &str, value: &Value| {
        let mut row = json!({"messages": conversation()});
        row[name] = value.clone();
        row
    };
    for (name, value, expected) in [
        ("label", json!(true), "(KTO)"),
        ("chosen", json!("x"), "DPO"),
        ("rejected_score", json!(1), "DPO"),
        (
            "preferred_output",
            json!([{"role": "assistant", "content": "x"}]),
            "DPO",
        ),
        ("completions", json!(["x"]), "GRPO"),
        ("weight", json!(0.5), "weighs the row"),
        ("sample_weight", json!(0), "weighs the row"),
        ("images", json!(["x.png"]), "images, sound or video"),
        ("labels", json!([1]), "belongs to `input_ids`"),
        ("completion_mask", json!([1]), "belongs to `input_ids`"),
        ("position_ids", json!([0]), "belongs to `input_ids`"),
        (
            "functions",
            json!([{}]),
            "`tools` and `chat_template_kwargs` alone",
        ),
        (
            "system",
            json!("Be brief."),
            "takes it as the first message",
        ),
    ] {
        let row = row(name, &value);
        let reason = reason(row.clone(), &t);
        assert!(reason.contains(&format!("column `{name}`")), "{reason}");
        assert!(reason.contains(expected), "{reason}");
        assert!(
            reason.ends_with("name them in data.ignore_columns"),
            "{reason}"
        );
        let spec = DataSpec {
            ignore_columns: vec![name.to_owned()],
            ..DataSpec::default()
        };
        let examples = load(&row.to_string(), &t, spec).unwrap();
        assert!(examples.notes.is_empty(), "{:?}", examples.notes);
    }
    let mut shown = json!({"messages": conversation()});
    shown["messages"][0]["images"] = json!(["x.png"]);
    assert!(reason(shown, &t).starts_with("`messages[0].images`: holds images"));
    // What says nothing is no reason to stop.
    for (name, value) in [
        ("label", Value::Null),
        ("images", json!([])),
        ("weight", json!(1)),
        ("weight", json!(1.0)),
        ("system", json!("")),
    ] {
        let examples = load(&row(name, &value).to_string(), &t, DataSpec::default()).unwrap();
        assert!(examples.notes.is_empty(), "{:?}", examples.notes);
    }
    let both = json!({"text": "ab", "label": 1, "image": "x.png"});
    let reason = reason(both, &t);
    assert!(
        reason.contains("`label`") && reason.contains("`image`"),
        "{reason}"
    );
}

#[test]
fn columns_that_nothing_reads_are_said_once_a_file() {
    let t = tokenizer(Some(CHATML));
    let mut text = String::new();
    for i in 0..300 {
        let mut row = json!({"text": "ab", "id": i, "source\u{1b}[2J": "x"});
        if i % 2 == 0 {
            row["prompt"] = json!("a");
        }
        text.push_str(&format!("{row}\n"));
    }
    let examples = load(&text, &t, DataSpec::default()).unwrap();
    let [Note::UnusedColumns { columns, .. }] = &examples.notes[..] else {
        panic!("{:?}", examples.notes);
    };
    let expected = [("id", 300), ("source\u{1b}[2J", 300), ("prompt", 150)];
    assert_eq!(columns.len(), 3);
    for (column, expected) in columns.iter().zip(expected) {
        assert_eq!((column.0.as_str(), column.1), expected);
    }
    let said = examples.notes[0].to_string();
    assert!(
        said.ends_with(
            "rows.jsonl (format text): columns that are not used: id (300 rows), source\\u{1b}[2J (300 rows), \
             prompt (150 rows)"
        ),
        "{said}"
    );
}

#[test]
fn sharegpt_rows_are_conversations() {
    let t = with_tools();
    let plain = one(
        json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                            {"role": "assistant", "content": "b"}]}),
        &t,
    );
    let turns = json!([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]);
    let with_system = json!({"system": "s", "conversations": turns});
    assert_eq!(one(with_system.clone(), &t), plain);
    for role in ["model", "gpt", "assistant"] {
        let row = json!({"messages": [{"role": "system", "content": "s"}, {"role": "human", "content": "a"},
                                      {"role": role, "content": "b"}]});
        assert_eq!(one(row, &t), plain);
    }
    let examples = load(&with_system.to_string(), &t, DataSpec::default()).unwrap();
    assert_eq!(examples.files[0].format, RecordFormat::Sharegpt.name());
    assert!(examples.notes.is_empty(), "{:?}", examples.notes);
    let under_messages = json!({"messages": turns});
    let examples = load(&under_messages.to_string(), &t, DataSpec::default()).unwrap();
    assert!(
        examples.notes[0].to_string().contains("human, gpt, model"),
        "{:?}",
        examples.notes
    );
    let mut twice = with_system;
    twice["conversations"][0]["from"] = json!("system");
    assert!(reason(twice, &t).contains("keep one of them"));
    let text = json!({"messages": conversation().to_string()});
    assert_eq!(one(text, &t), one(json!({"messages": conversation()}), &t));
}

#[test]
fn sharegpt_calls_are_tool_calls() {
    let t = tokenizer(Some(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}\
         {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}",
    ));
    let row = |call: &str| {
        json!({"conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": call},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "b"}]})
    };
    assert_eq!(
        one(row("{\"name\": \"f\", \"arguments\": {\"x\": 1}}"), &t),
        "user:a<|im_end|>assistant:[f{\"x\": 1}<|im_end|>]tool:4<|im_end|>assistant:[b<|im_end|>]"
    );
    let reason = reason(row("f(x)"), &t);
    assert!(
        reason.contains("`conversations[1].value` must be a tool call as JSON"),
        "{reason}"
    );
}

#[test]
fn alpaca_and_dolly_rows_are_a_question_and_its_answer() {
    let t = tokenizer(Some(CHATML));
    let asked = |question: &str| {
        one(
            json!({"messages": [{"role": "user", "content": question},
                                {"role": "assistant", "content": "o"}]}),
            &t,
        )
    };
    for (row, question) in [
        (
            json!({"instruction": "i", "input": "x", "output": "o"}),
            "i\nx",
        ),
        (json!({"instruction": "i", "input": "", "output": "o"}), "i"),
        (
            json!({"instruction": "i", "input": null, "output": "o"}),
            "i",
        ),
        (json!({"instruction": "i", "output": "o"}), "i"),
        (
            json!({"instruction": "i", "context": "x", "response": "o", "category": "c"}),
            "i\nx",
        ),
    ] {
        assert_eq!(one(row, &t), asked(question));
    }
    let row = json!({"instruction": "i", "output": "o", "system": "s", "history": [["p", "q"]]});
    assert_eq!(
        one(row, &t),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n[q<|im_end|>]\n\
         <|im_start|>user\ni<|im_end|>\n<|im_start|>assistant\n[o<|im_end|>]\n"
    );
    assert!(reason(json!({"instruction": "i", "output": ""}), &t).contains("`output` is empty"));
    assert!(reason(json!({"instruction": "i", "output": ["o"]}), &t).contains("must be a string"));
}

#[test]
fn files_of_other_kinds_are_named() {
    let t = tokenizer(None);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, b"PAR1\x15\x04").unwrap();
    let spec = DataSpec {
        paths: vec![path],
        ..DataSpec::default()
    };
    let error = load_examples(&spec, &t).unwrap_err().to_string();
    assert!(
        error.contains("rows.jsonl is a Parquet file, not a file of JSON rows"),
        "{error}"
    );
}

#[test]
fn rows_past_the_models_positions_are_said() {
    let t = tokenizer(None);
    let text = "{\"text\": \"abcdef\"}\n{\"text\": \"ab\"}\n";
    let mut examples = load(text, &t, DataSpec::default()).unwrap();
    examples.note_positions(7);
    assert!(examples.notes.is_empty());
    examples.note_positions(4);
    let said = examples.notes[0].to_string();
    assert!(said.contains("1 row (first "), "{said}");
    assert!(
        said.contains("longer than the model's 4 positions"),
        "{said}"
    );
}

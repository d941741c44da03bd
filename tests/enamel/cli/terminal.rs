//! What others wrote is shown on a terminal and in files, and never obeyed.

use std::fs;

use serde_json::json;

use crate::support::enamel_process::{Workshop, said};

/// A window's title, the clipboard, a cleared screen, a cursor at the start of the line, colours with C1, a line
/// turned around.
const HOSTILE: &str = "\u{1b}]0;owned\u{7}\u{1b}]52;c;b3duZWQ=\u{7}\u{1b}[2J\r\u{9b}31m\u{202e}";

/// Panics if `text` holds anything that a terminal acts upon.
fn assert_harmless(what: &str, text: &str) {
    let bad = text.chars().find(|c| {
        let allowed = matches!(c, '\n' | '\t');
        (c.is_control() && !allowed) || matches!(c, '\u{202a}'..='\u{202e}')
    });
    let near = bad.and_then(|bad| text.split(bad).next_back());
    let near: Option<String> = near.map(|text| text.chars().take(80).collect());
    assert_eq!(bad, None, "{what}: before {near:?}");
}

#[test]
fn rows_and_what_is_wrong_with_them() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let turn = |content: String| {
        json!({"messages": [
            {"role": "user", "content": content.clone()}, {"role": "assistant", "content": content}
        ]})
    };
    workshop.rows("train.jsonl", (0..3).map(|i| turn(format!("{i}{HOSTILE}"))));
    let output = workshop.output(&["inspect", "recipe.toml", "-n", "3"]);
    assert!(output.status.success(), "{}", said(&output));
    assert_harmless("inspect", &said(&output));

    let key = format!("messages{HOSTILE}");
    workshop.rows("train.jsonl", [json!({ key: [] })]);
    assert_harmless("a key", &workshop.fail(&["inspect", "recipe.toml"]));
    let role = json!({"messages": [{"role": format!("user{HOSTILE}"), "content": 3}]});
    workshop.rows("train.jsonl", [role]);
    assert_harmless("a role", &workshop.fail(&["train", "recipe.toml"]));
}

#[test]
fn templates_configurations_and_names() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let template = "{{ raise_exception('no\u{1b}[2J\u{7}') }}";
    let set = format!("model.chat_template={}", json!(template));
    let error = workshop.fail(&["inspect", "recipe.toml", "--set", &set]);
    assert!(error.contains("\\u001b[2J"), "{error}");
    assert_harmless("raise_exception", &error);

    let config = workshop.path("model/config.json");
    let text = fs::read_to_string(&config).expect("a file of the fixture");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["model_type"] = format!("llama{HOSTILE}").into();
    fs::write(&config, value.to_string()).expect("room on the disk");
    assert_harmless("config.json", &workshop.fail(&["plan", "recipe.toml"]));
}

#[test]
fn adapters_and_the_report() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let turn = json!({"messages": [
        {"role": "user", "content": format!("1{HOSTILE}<script>")}, {"role": "assistant", "content": HOSTILE}
    ]});
    workshop.rows("valid.jsonl", [turn]);
    let told = workshop.told(&["train", "recipe.toml", "--set", "train.samples=1"]);
    assert_harmless("train", &told);
    for name in [
        "report.html",
        "samples.json",
        "summary.json",
        "adapter/README.md",
    ] {
        let text = fs::read_to_string(workshop.path("run").join(name)).expect("a file of the run");
        assert_harmless(name, &text);
    }

    let config = workshop.path("run/adapter/adapter_config.json");
    let text = fs::read_to_string(&config).expect("the adapter");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["base_model_name_or_path"] = format!("base{HOSTILE}").into();
    value[format!("key{HOSTILE}")] = HOSTILE.into();
    fs::write(&config, value.to_string()).expect("room on the disk");
    for arguments in [
        &["adapter", "list", "run"] as &[&str],
        &["adapter", "inspect", "run/adapter"],
        &["adapter", "inspect", "run/adapter", "--json"],
        &["adapter", "diff", "run/adapter", "run/adapter"],
        &[
            "generate",
            "--model",
            "./model",
            "--adapter",
            "run/adapter",
            "--prompt",
            HOSTILE,
        ],
    ] {
        let output = workshop.output(arguments);
        assert_harmless(&format!("{arguments:?}"), &said(&output));
    }
    let _ = fs::remove_dir_all(workshop.path("run"));
}

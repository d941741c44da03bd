//! What rows say beside their text reaches the run, or is named.

use std::fs;

use serde_json::{Value, json};

use crate::support::enamel_process::Workshop;

fn talk() -> Value {
    json!([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2."}])
}

/// A recipe with the data settings `data`, and a template that writes the variable `tone`.
fn recipe(workshop: &Workshop, data: &str) {
    let data = format!("train = \"rows.jsonl\"\nmax_length = 400\n{data}");
    let train = "max_steps = 2\nbatch_size = 1\nlearning_rate = 1e-3";
    workshop.recipe("recipe.toml", "r = 2", &data, train);
    let path = workshop.path("recipe.toml");
    let text = fs::read_to_string(&path).expect("a recipe");
    let template = "chat_template = \"tone.jinja\"\n[adapter]";
    fs::write(&path, text.replace("[adapter]", template)).expect("room on the disk");
    let template = "<|im_start|>system\n{{ tone or 'none' }}<|im_end|>\n{% for m in messages %}\
        <|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs::write(workshop.path("tone.jinja"), template).expect("room on the disk");
}

#[test]
fn variables_for_the_template_come_from_the_recipe_and_before_it_from_the_row() {
    let workshop = Workshop::new();
    workshop.rows(
        "rows.jsonl",
        [
            json!({"messages": talk()}),
            json!({"messages": talk(), "chat_template_kwargs": {"tone": "wet"}}),
        ],
    );
    recipe(
        &workshop,
        "chat_template_kwargs = { tone = \"dry\", other = [1, { a = true }] }",
    );
    let said = workshop.run(&["inspect", "recipe.toml", "-n", "2"]);
    let of = |row: &str| said.split(row).nth(1).map(|rest| rest[..120].to_owned());
    assert!(
        of("rows.jsonl:1").is_some_and(|text| text.contains("dry")),
        "{said}"
    );
    assert!(
        of("rows.jsonl:2").is_some_and(|text| text.contains("wet")),
        "{said}"
    );
    assert!(
        said.contains("never reads some of the variables in chat_template_kwargs"),
        "{said}"
    );
    let set = "data.chat_template_kwargs.tone=\"loud\"";
    let said = workshop.run(&["inspect", "recipe.toml", "--set", set]);
    assert!(said.contains("loud") && !said.contains("dry"), "{said}");

    // The lock trains the same again, variables included.
    let said = workshop.run(&["train", "recipe.toml"]);
    assert!(
        said.contains(" --chat-template-kwargs '{\"tone\":\"dry\",\"other\":[1,{\"a\":true}]}'"),
        "{said}"
    );
    let card = fs::read_to_string(workshop.path("run/adapter/README.md")).expect("a model card");
    assert!(
        card.contains("| chat template variables | `{\"tone\":\"dry\""),
        "{card}"
    );
    let lock = workshop.path("run/recipe.lock.toml");
    let lock = lock.to_str().expect("a plain path");
    let said = workshop.run(&["inspect", lock, "-n", "1"]);
    assert!(said.contains("dry"), "{said}");

    for (set, expected) in [
        (
            "data.chat_template_kwargs={ messages = [] }",
            "messages cannot be set: the conversation and its rendering decide it",
        ),
        (
            "data.chat_template_kwargs={ day = 2024-02-29 }",
            "a date is no JSON",
        ),
        ("data.chat_template_kwargs=\"tone\"", "chat_template_kwargs"),
    ] {
        let error = workshop.fail(&["inspect", "recipe.toml", "--set", set]);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn variables_for_the_template_reach_text_that_is_written() {
    let workshop = Workshop::new();
    let template = "{{ raise_exception('tone is ' ~ tone) }}";
    fs::write(workshop.path("model/chat_template.jinja"), template).expect("room on the disk");
    let generate = [
        "generate",
        "--model",
        "./model",
        "--prompt",
        "1+1?",
        "--max-new-tokens",
        "1",
    ];
    let mut with = generate.to_vec();
    with.extend(["--chat-template-kwargs", "{\"tone\": \"wet\"}"]);
    let error = workshop.fail(&with);
    assert!(error.contains("tone is wet"), "{error}");
    let mut with = generate.to_vec();
    with.extend(["--chat-template-kwargs", "{\"tools\": []}"]);
    let output = workshop.output(&with);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("tools cannot be set"), "{error}");
}

#[test]
fn columns_of_other_trainers_are_named_and_can_be_ignored() {
    let workshop = Workshop::new();
    workshop.rows(
        "rows.jsonl",
        (0..3).map(|i| json!({"messages": talk(), "label": true, "weight": 0.5, "id": i})),
    );
    recipe(&workshop, "");
    for verb in ["inspect", "plan", "train"] {
        let error = workshop.fail(&[verb, "recipe.toml"]);
        assert!(error.contains("3 bad rows:"), "{error}");
        assert!(
            error.contains("column `label` says whether an answer is wanted (KTO)"),
            "{error}"
        );
        assert!(error.contains("column `weight` weighs the row"), "{error}");
    }
    recipe(&workshop, "ignore_columns = [\"label\", \"weight\"]");
    for verb in ["inspect", "plan", "train"] {
        let told = workshop.told(&[verb, "recipe.toml"]);
        assert!(
            told.contains("(format messages): columns that are not used: id (3 rows)"),
            "{verb}: {told}"
        );
    }
}

#[test]
fn rows_past_the_models_positions_are_said_before_they_are_trained() {
    let workshop = Workshop::new();
    let config = workshop.path("model/config.json");
    let text = fs::read_to_string(&config).expect("a file of the fixture");
    let mut value: Value = serde_json::from_str(&text).expect("JSON");
    value["max_position_embeddings"] = json!(64);
    fs::write(&config, value.to_string()).expect("room on the disk");
    workshop.rows(
        "rows.jsonl",
        [
            json!({"text": "0123456789".repeat(10)}),
            json!({"text": "0123456789"}),
        ],
    );
    recipe(&workshop, "");
    for verb in ["inspect", "plan", "train"] {
        let told = workshop.told(&[verb, "recipe.toml"]);
        assert!(
            told.contains("1 row (first ") && told.contains("the model's 64 positions"),
            "{verb}: {told}"
        );
    }
    let told = workshop.told(&["plan", "recipe.toml", "--set", "data.max_length=64"]);
    assert!(!told.contains("positions"), "{told}");
}

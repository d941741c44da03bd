//! Sequence classification through the program: a head of its own, metrics, predictions, refusals.

use std::fs;

use serde_json::{Value, json};

use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Tensors, json as read};

/// Texts whose class is a matter of one word, which a small model learns in some steps.
fn workshop() -> Workshop {
    let workshop = Workshop::new();
    let row = |i: usize| {
        let (word, label) = [("yes", "good"), ("no", "bad")][i % 2];
        json!({ "text": format!("{} {word} {}", i % 7, i % 5), "label": label })
    };
    workshop.rows("train.jsonl", (0..32).map(row));
    workshop.rows("valid.jsonl", (32..48).map(row));
    workshop
}

fn recipe(workshop: &Workshop, adapter: &str, data: &str, train: &str) {
    let path = workshop.recipe(
        "recipe.toml",
        adapter,
        &format!("train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\n{data}"),
        &format!("max_steps = 30\nbatch_size = 4\nlearning_rate = 2e-2\nsamples = 2\n{train}"),
    );
    let text = fs::read_to_string(&path).expect("the recipe");
    fs::write(path, format!("task = \"seq_cls\"\n{text}")).expect("room on the disk");
}

const ALL_LINEAR: &str = "r = 4\ntarget_modules = \"all-linear\"";

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_new_head_learns_and_the_best_by_accuracy_is_kept() {
    let workshop = workshop();
    let best = "load_best_model_at_end = true\nmetric_for_best_model = \"accuracy\"\neval_steps = 5\nsave_steps = 5\n\
                eval_strategy = \"steps\"\nsave_strategy = \"steps\"";
    recipe(&workshop, ALL_LINEAR, "", best);
    let words = workshop.told(&["train", "recipe.toml"]);
    assert!(
        words.contains("the head (score) is new, with random weights: bad, good"),
        "{words}"
    );
    let valid = workshop.metrics("run", "valid");
    let best = valid[1..]
        .iter()
        .max_by(|a, b| number(&a["accuracy"]).total_cmp(&number(&b["accuracy"])));
    let best = number(&best.expect("validations")["accuracy"]);
    let summary = read(&workshop.path("run/summary.json"));
    assert_eq!(summary["metrics"]["accuracy"], best);
    assert_eq!(best, 1.0, "{valid:?}");
    // The first of equals.
    let first = valid[1..].iter().find(|v| v["accuracy"] == best);
    assert_eq!(summary["best"]["step"], first.expect("it is there")["step"]);
    let report = fs::read_to_string(workshop.path("run/report.html")).expect("a report");
    assert!(report.contains("validation accuracy after"), "{report}");

    // PEFT's file: the task, and the head saved whole.
    let config = read(&workshop.path("run/adapter/adapter_config.json"));
    assert_eq!(config["task_type"], "SEQ_CLS");
    assert_eq!(config["modules_to_save"], json!(["score"]));
    let tensors = Tensors::open(workshop.path("run/adapter/adapter_model.safetensors"));
    let head = tensors.floats("base_model.model.score.weight");
    assert_eq!(head.shape[0], 2);
    let card = fs::read_to_string(workshop.path("run/adapter/README.md")).expect("a card");
    for words in [
        "pipeline_tag: text-classification",
        "AutoModelForSequenceClassification",
        "id2label={0: \"bad\", 1: \"good\"}",
        "enamel predict",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }

    // `eval` measures the same, class by class.
    let report = workshop.run(&["eval", "recipe.toml", "--adapter", "run/adapter", "--json"]);
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["accuracy"], best);
    assert_eq!(report["classes"][0]["label"], "bad");
    assert_eq!(report["classes"][0]["predicted"], json!([8, 0]));
    let table = workshop.run(&["eval", "recipe.toml", "--adapter", "run/adapter"]);
    assert!(table.contains("accuracy    1.0000"), "{table}");

    // `predict` gives each row its class.
    let model = ["--model", "model", "--adapter", "run/adapter"];
    let text = [&["predict", "--text", "3 yes 1"][..], &model].concat();
    let line: Value = serde_json::from_str(&workshop.run(&text)).expect("JSON");
    assert_eq!(line["label"], "good");
    let rows = ["predict", "valid.jsonl", "--output", "classes.jsonl"];
    let said = workshop.success(&[&rows[..], &model].concat());
    let said = crate::support::enamel_process::said(&said);
    assert!(
        said.contains("16 of 16 rows have a class: accuracy 1.0000"),
        "{said}"
    );
    let refused = workshop.fail(&[&rows[..], &model].concat());
    assert!(refused.contains("--overwrite"), "{refused}");
}

#[test]
fn a_merged_classifier_is_a_model_of_transformers() {
    let workshop = workshop();
    recipe(&workshop, ALL_LINEAR, "", "");
    workshop.success(&["train", "recipe.toml"]);
    let merge = ["merge", "--model", "model", "--adapter", "run/adapter"];
    workshop.success(&[&merge[..], &["--output", "merged"]].concat());
    let config = read(&workshop.path("merged/config.json"));
    assert_eq!(
        config["architectures"],
        json!(["LlamaForSequenceClassification"])
    );
    assert_eq!(config["id2label"], json!({ "0": "bad", "1": "good" }));
    assert!(config["pad_token_id"].is_u64(), "{config}");
    let names = Tensors::open(workshop.path("merged/model.safetensors")).names();
    assert!(names.contains(&"score.weight".to_owned()), "{names:?}");
    assert!(!names.contains(&"lm_head.weight".to_owned()), "{names:?}");
    let ask = |more: &[&str]| {
        let text = workshop.run(&[&["predict", "valid.jsonl"][..], more].concat());
        let lines = text.lines();
        lines
            .map(|line| {
                let line: Value = serde_json::from_str(line).expect("JSON");
                (line["label"].clone(), number(&line["score"]))
            })
            .collect::<Vec<_>>()
    };
    let merged = ask(&["--model", "merged"]);
    let beside = ask(&["--model", "model", "--adapter", "run/adapter"]);
    for (a, b) in merged.iter().zip(&beside) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() < 1e-5, "{a:?} {b:?}");
    }
    // Trained on from there, its own head is taken.
    recipe(&workshop, ALL_LINEAR, "", "");
    let words = workshop.told(&[
        "train",
        "recipe.toml",
        "--set",
        "model.base='merged'",
        "--set",
        "output.dir='again'",
    ]);
    assert!(
        words.contains("the base's own head is trained on: bad, good"),
        "{words}"
    );
    let first = number(&workshop.metrics("again", "valid")[0]["accuracy"]);
    assert_eq!(first, 1.0);
}

#[test]
fn every_method_trains_a_head_along() {
    for adapter in [
        "r = 2\nuse_dora = true",
        "method = \"loha\"\nr = 2",
        "method = \"lokr\"\nr = 2",
        "method = \"adalora\"\ninit_r = 4\ntarget_r = 2",
        "method = \"vera\"\nr = 4",
        "method = \"ia3\"",
        "method = \"head\"",
        "method = \"full\"",
    ] {
        let workshop = workshop();
        recipe(&workshop, adapter, "", "");
        workshop.success(&["train", "recipe.toml"]);
        let valid = workshop.metrics("run", "valid");
        let loss = |at: usize| number(&valid[at]["loss"]);
        assert!(loss(valid.len() - 1) < loss(0), "{adapter}: {valid:?}");
        let ask: &[&str] = match adapter.contains("full") {
            true => &["--model", "run/model"],
            false => &["--model", "model", "--adapter", "run/adapter"],
        };
        let classes = workshop.run(&[&["predict", "valid.jsonl"][..], ask].concat());
        assert_eq!(classes.lines().count(), 16, "{adapter}");
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_bits() {
    let whole = workshop();
    recipe(
        &whole,
        ALL_LINEAR,
        "",
        "save_steps = 10\nsave_strategy = \"steps\"",
    );
    whole.success(&["train", "recipe.toml"]);
    let stopped = workshop();
    recipe(
        &stopped,
        ALL_LINEAR,
        "",
        "save_steps = 10\nsave_strategy = \"steps\"",
    );
    stopped.success(&["train", "recipe.toml"]);
    for name in ["adapter", "summary.json", "report.html"] {
        let path = stopped.path("run").join(name);
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    }
    fs::remove_dir_all(stopped.path("run/checkpoints/step-000030")).expect("it is there");
    stopped.success(&["train", "recipe.toml", "--resume"]);
    assert!(whole.adapter("run").0 == stopped.adapter("run").0);
    let metrics = |w: &Workshop| read(&w.path("run/summary.json"))["metrics"].clone();
    assert_eq!(metrics(&whole), metrics(&stopped));
}

#[test]
fn classes_are_named_numbered_and_checked() {
    let workshop = workshop();
    let numbered =
        |i: usize| json!({ "sentence1": format!("{i}"), "sentence2": "b", "label": i % 3 });
    workshop.rows("numbered.jsonl", (0..12).map(numbered));
    recipe(&workshop, ALL_LINEAR, "", "");
    let set = |more: &[&str]| {
        let sets = more.iter().flat_map(|s| ["--set", *s]);
        [
            &["train", "recipe.toml", "--overwrite"][..],
            &sets.collect::<Vec<_>>(),
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<_>>()
    };
    let told = |more: &[&str]| {
        let arguments = set(more);
        workshop.told(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let fail = |more: &[&str]| {
        let arguments = set(more);
        workshop.fail(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let numbers = [
        "data.train='numbered.jsonl'",
        "data.valid=[]",
        "train.max_steps=1",
    ];
    let words = told(&numbers);
    assert!(words.contains("LABEL_0, LABEL_1, LABEL_2"), "{words}");
    let words = told(&[&numbers[..], &["data.labels=['a','b','c','d']"]].concat());
    assert!(words.contains("a, b, c, d"), "{words}");
    assert!(words.contains("no row to train on is of d"), "{words}");

    workshop.rows("other.jsonl", [json!({ "text": "x", "label": "ugly" })]);
    let refused = fail(&["data.valid='other.jsonl'"]);
    for words in [
        "other.jsonl:1",
        "ugly is none of the 2 classes bad, good",
        "data.labels",
    ] {
        assert!(refused.contains(words), "{words}: {refused}");
    }
    workshop.rows(
        "mixed.jsonl",
        [
            json!({ "text": "x", "label": "a" }),
            json!({ "text": "y", "label": 1 }),
        ],
    );
    let refused = fail(&["data.train='mixed.jsonl'"]);
    assert!(
        refused.contains("by name (a, ") && refused.contains("by number"),
        "{refused}"
    );
    workshop.rows(
        "one.jsonl",
        (0..4).map(|_| json!({ "text": "x", "label": "a" })),
    );
    let refused = fail(&["data.train='one.jsonl'"]);
    assert!(refused.contains("only the class a"), "{refused}");
    workshop.rows(
        "bad.jsonl",
        [
            json!({ "text": "x", "label": 0.5 }),
            json!({ "text": "x", "label": -1 }),
            json!({ "text": "x", "label": ["a"] }),
            json!({ "text": 3, "label": "a" }),
            json!({ "text": "x" }),
            json!({ "words": "x", "label": "a" }),
        ],
    );
    let refused = fail(&["data.train='bad.jsonl'"]);
    for words in [
        "bad.jsonl:1: `label`: 0.5 is no class",
        "bad.jsonl:2: `label`: -1 is no class",
        "bad.jsonl:3: `label`: is a list",
        "bad.jsonl:4: field `text` must be a string",
        "bad.jsonl:5: missing field `label`",
        "bad.jsonl:6: missing field `text`",
    ] {
        assert!(refused.contains(words), "{words}: {refused}");
    }
    let refused = fail(&["train.metric_for_best_model='bleu'"]);
    assert!(refused.contains("loss or accuracy or f1"), "{refused}");
}

#[test]
fn what_is_for_another_task_is_refused_by_name() {
    let workshop = workshop();
    recipe(&workshop, ALL_LINEAR, "train_on = \"all\"", "");
    let refused = workshop.fail(&["train", "recipe.toml"]);
    assert!(
        refused.contains("data.train_on means nothing to task = \"seq_cls\""),
        "{refused}"
    );
    recipe(&workshop, ALL_LINEAR, "labels = [\"a\", \"b\"]", "");
    let refused = workshop.fail(&["train", "recipe.toml", "--set", "task='causal_lm'"]);
    assert!(
        refused.contains("data.labels means nothing to task = \"causal_lm\""),
        "{refused}"
    );

    recipe(&workshop, ALL_LINEAR, "", "");
    workshop.success(&["train", "recipe.toml"]);
    let adapter = ["--model", "model", "--adapter", "run/adapter"];
    for verb in [&["chat"][..], &["generate", "--prompt", "x"]] {
        let refused = workshop.fail(&[verb, &adapter].concat());
        assert!(refused.contains("enamel predict"), "{refused}");
    }
    let refused = workshop.fail(&["export", "run", "--output", "out.gguf"]);
    assert!(refused.contains("SEQ_CLS"), "{refused}");
    let refused = workshop.fail(&["predict", "--model", "model", "--text", "x"]);
    assert!(refused.contains("no head for classes"), "{refused}");
    let refused = workshop.fail(&[
        "train",
        "recipe.toml",
        "--set",
        "task='causal_lm'",
        "--set",
        "adapter.init_from='run/adapter'",
        "--set",
        "output.dir='other'",
    ]);
    assert!(refused.contains("is for task_type = SEQ_CLS"), "{refused}");
}

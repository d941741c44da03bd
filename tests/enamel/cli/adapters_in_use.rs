//! The other verbs on a tiny model: plan, inspect, score, generate, eval, merge, devices, pull.

use std::fs;

use serde_json::{Value, json};

use crate::parity::lora::folder;
use crate::support::enamel_process::{Workshop, said};
use crate::support::goldens::{Tensors, assert_close, fixtures};

#[test]
fn plan_counts() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let said = workshop.run(&["plan", "recipe.toml"]);
    for part in ["4,096", "30,880", "model.layers.*.self_attn.q_proj"] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    assert!(!workshop.path("run").exists());
}

#[test]
fn plan_counts_a_shape_without_weights() {
    let workshop = Workshop::new();
    let shapes = crate::support::goldens::json(&fixtures().join("counts.json"));
    fs::create_dir(workshop.path("llama-3-8b")).expect("room on the disk");
    let config = shapes["shapes"]["Llama-3-8B"].to_string();
    fs::write(workshop.path("llama-3-8b/config.json"), config).expect("room on the disk");
    for (r, count) in [("8", "3,407,872"), ("16", "6,815,744")] {
        let r = format!("adapter.r={r}");
        let targets = "adapter.target_modules=[\"q_proj\", \"v_proj\"]";
        let said = workshop.run(&[
            "plan",
            "--model",
            "./llama-3-8b",
            "--set",
            &r,
            "--set",
            targets,
        ]);
        assert!(said.contains(count), "{said}");
    }
}

#[test]
fn inspect_marks_what_is_trained() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let said = workshop.run(&["inspect", "recipe.toml", "-n", "2"]);
    assert!(
        said.contains("train.jsonl:1") && said.contains("train.jsonl:2"),
        "{said}"
    );
    assert!(
        said.contains("<|im_start|>assistant\n⟦0.<|im_end|>⟧"),
        "{said}"
    );
}

/// Rows of the golden batch, as they are before padding.
fn write_golden_rows(workshop: &Workshop, golden: &Tensors) {
    let ids = golden.rows("right.input_ids");
    let mask = golden.rows("right.attention_mask");
    let labels = golden.rows("right.labels");
    let rows = ids
        .iter()
        .zip(&mask)
        .zip(&labels)
        .map(|((ids, mask), labels)| {
            let n = mask.iter().filter(|m| **m == 1).count();
            json!({ "input_ids": ids[..n], "labels": labels[..n] })
        });
    workshop.rows("rows.jsonl", rows);
}

fn check_scores(golden: &Tensors, logits: &Tensors, scores: &str, loss: f64) {
    let theirs = golden.floats("right.logits");
    let [_, tokens, vocabulary] = theirs.shape[..] else {
        panic!("three axes")
    };
    let (mut sum, mut count) = (0.0, 0.0);
    for (i, line) in scores.lines().enumerate() {
        let score: Value = serde_json::from_str(line).expect("a line of JSON");
        let n = score["tokens"].as_u64().expect("a count") as usize;
        let ours = logits.floats(&format!("logits.{i}"));
        assert_eq!(ours.shape, [n, vocabulary]);
        let from = i * tokens * vocabulary;
        assert_close(
            &format!("row {i}"),
            &ours.values,
            &theirs.values[from..from + n * vocabulary],
            1e-5,
        );
        let trained = score["trained_tokens"].as_f64().expect("a count");
        sum += score["loss"].as_f64().expect("a loss") * trained;
        count += trained;
        let log_probs = score["log_probs"].as_array().expect("a list");
        assert_eq!(log_probs.len(), n);
        assert!(log_probs[0].is_null() && log_probs[1..].iter().all(|p| p.as_f64() < Some(0.0)));
    }
    assert!(
        (sum / count - loss).abs() < 1e-5,
        "loss {} for {loss}",
        sum / count
    );
}

#[test]
fn scores_are_transformers_and_padding_does_not_show() {
    let workshop = Workshop::new();
    let base = Tensors::open(fixtures().join("llama/untied/case.safetensors"));
    let base_loss =
        crate::support::goldens::json(&fixtures().join("llama/untied/meta.json"))["loss"]["right"]
            .clone();
    let adapted = Tensors::open(folder("all_linear").join("case.safetensors"));
    let adapted_loss = crate::parity::lora::meta("all_linear")["loss"].clone();
    let adapter = folder("all_linear").join("adapter");
    let adapter = adapter.to_str().expect("a plain path");
    for (golden, loss, more) in [
        (&base, base_loss, vec![]),
        (&adapted, adapted_loss, vec!["--adapter", adapter]),
    ] {
        write_golden_rows(&workshop, golden);
        for size in ["1", "2"] {
            let arguments = [
                vec![
                    "score",
                    "--model",
                    "./model",
                    "--input",
                    "rows.jsonl",
                    "--output",
                ],
                vec![
                    "scores.jsonl",
                    "--logits",
                    "logits.safetensors",
                    "--batch-size",
                    size,
                ],
                vec!["--device", "flex", "--overwrite"],
                more.clone(),
            ]
            .concat();
            workshop.run(&arguments);
            let scores = fs::read_to_string(workshop.path("scores.jsonl")).expect("scores");
            let logits = Tensors::open(workshop.path("logits.safetensors"));
            check_scores(golden, &logits, &scores, loss.as_f64().expect("a loss"));
        }
    }
}

#[test]
fn merged_and_adapted_agree() {
    let workshop = Workshop::new();
    let adapter = folder("all_linear").join("adapter");
    let adapter = adapter.to_str().expect("a plain path");
    let said = workshop.run(&[
        "merge",
        "--model",
        "./model",
        "--adapter",
        adapter,
        "--output",
        "merged",
        "--device",
        "flex",
    ]);
    assert!(said.contains("difference"), "{said}");
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(
            workshop.path("merged").join(file).is_file(),
            "{file} is missing"
        );
    }
    let ours = Tensors::open(workshop.path("merged/model.safetensors"));
    let theirs = Tensors::open(folder("all_linear").join("merged.safetensors"));
    for name in theirs.names() {
        assert_close(
            &name,
            &ours.floats(&name).values,
            &theirs.floats(&name).values,
            1e-6,
        );
    }
    let base = Tensors::open(workshop.path("model/model.safetensors"));
    assert_eq!(ours.names(), base.names());
    let config = crate::support::goldens::json(&workshop.path("merged/config.json"));
    assert_eq!(config["model_type"], "llama");

    let golden = Tensors::open(folder("all_linear").join("case.safetensors"));
    write_golden_rows(&workshop, &golden);
    workshop.run(&[
        "score",
        "--model",
        "./merged",
        "--input",
        "rows.jsonl",
        "--output",
        "scores.jsonl",
        "--logits",
        "logits.safetensors",
    ]);
    let logits = Tensors::open(workshop.path("logits.safetensors"));
    let theirs = golden.floats("right.logits").values;
    let first = logits.floats("logits.0").values;
    assert_close("merged", &first, &theirs[..first.len()], 2e-5);
}

#[test]
fn generate_continues_greedily_and_follows_the_seed() {
    let workshop = Workshop::new();
    let generate = |more: &[&str]| {
        let arguments = [
            &[
                "generate",
                "--model",
                "./model",
                "--prompt",
                "what is 2+2?",
                "--max-new-tokens",
                "12",
            ],
            more,
        ]
        .concat();
        workshop.run(&arguments)
    };
    let greedy = generate(&[]);
    assert_eq!(greedy, generate(&[]));
    let adapter = folder("all_linear").join("adapter");
    let adapter = adapter.to_str().expect("a plain path");
    assert_ne!(
        greedy,
        generate(&["--adapter", adapter]),
        "the adapter does not show"
    );
    let hot = ["--temperature", "1.5", "--seed", "1"];
    assert_eq!(generate(&hot), generate(&hot));
    assert_ne!(
        generate(&hot),
        generate(&["--temperature", "1.5", "--seed", "2"])
    );
}

#[test]
fn eval_measures_what_training_measured() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&["train", "recipe.toml"]);
    let valid = workshop.metrics("run", "valid");
    let eval = |more: &[&str]| {
        let said = workshop.run(&[&["eval", "recipe.toml", "--json"], more].concat());
        serde_json::from_str::<Value>(&said).expect("JSON")["loss"]
            .as_f64()
            .expect("a loss")
    };
    let last = valid.last().expect("a validation")["loss"]
        .as_f64()
        .expect("a loss");
    // The same batches on the same device, in f32.
    assert!((eval(&["--adapter", "run/adapter"]) - last).abs() < 1e-6);
    let first = valid[0]["loss"].as_f64().expect("a loss");
    assert!((eval(&[]) - first).abs() < 1e-6);
}

#[test]
fn a_gguf_file_trains_as_its_directory_does() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let gguf = fixtures().join("gguf/untied.gguf");
    let base = format!("model.base={gguf:?}");
    workshop.run(&["train", "recipe.toml"]);
    workshop.run(&["train", "recipe.toml", "--output", "gguf", "--set", &base]);
    // Same weights, same tokens: the file format leaves no trace in the adapter but the note of what its base was.
    let file =
        |run: &str| Tensors::open(workshop.path(run).join("adapter/adapter_model.safetensors"));
    let (run, gguf) = (file("run"), file("gguf"));
    assert_eq!(run.names(), gguf.names());
    for name in run.names() {
        assert!(run.floats(&name) == gguf.floats(&name), "{name}");
    }
}

#[test]
fn devices_lists_what_there_is() {
    let workshop = Workshop::new();
    let said = workshop.run(&["devices"]);
    for name in ["flex", "ndarray", "cuda", "wgpu"] {
        assert!(said.contains(name), "{name} is missing: {said}");
    }
    for part in ["CPU path", "available  reference, portable", "bf16"] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
}

#[test]
fn bench_gives_a_line_of_json_for_each_thing_measured() {
    let workshop = Workshop::new();
    let bench = ["bench", "--model", "model", "--r", "4", "--json"];
    let measured = |more: &[&str]| -> Vec<Value> {
        let said = workshop.run(&[&bench[..], more].concat());
        let lines = said.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().expect("lines of JSON")
    };
    let figures = measured(&[
        "--shapes",
        "1x8,2x4",
        "--steps",
        "1",
        "--decode",
        "2",
        "--profile",
    ]);
    let kinds: Vec<_> = figures.iter().filter_map(|f| f["kind"].as_str()).collect();
    assert_eq!(
        kinds,
        ["step", "profile", "step", "profile", "decode", "decode"]
    );
    let profile = &figures[1];
    let seconds = |name: &str| profile[name].as_f64().expect("seconds");
    assert!(seconds("other_seconds") <= seconds("seconds"), "{profile}");
    // The base has 26,784 parameters, of which the embedding's 4,096 are not read; the adapter 4,096.
    let read = |figure: &Value| (figure["variant"].clone(), figure["weight_bytes"].clone());
    assert_eq!(read(&figures[4]), (json!("base"), json!(4 * 22_688)));
    assert_eq!(read(&figures[5]), (json!("lora"), json!(4 * 26_784)));

    let first = measured(&["--first-step"]);
    assert_eq!(first.len(), 1);
    let at = |name: &str| first[0][name].as_f64().expect("seconds");
    let order = [at("opened"), at("loaded"), at("attached"), at("seconds")];
    assert!(order.is_sorted() && order[3] < 60.0, "{order:?}");
}

/// Runs with `ENAMEL_CPU` set.
fn on_path(workshop: &Workshop, path: &str, arguments: &[&str]) -> (bool, String) {
    let mut command = workshop.command(arguments);
    let output = command.env("ENAMEL_CPU", path).output();
    let output = output.expect("the binary runs");
    (output.status.success(), said(&output))
}

#[test]
fn devices_says_which_cpu_path_was_asked_for() {
    let workshop = Workshop::new();
    let (fine, said) = on_path(&workshop, "portable", &["devices"]);
    assert!(fine, "{said}");
    assert!(
        said.contains("CPU path   portable (ENAMEL_CPU asks for it)"),
        "{said}"
    );
    let (fine, said) = on_path(&workshop, "sparc", &["devices"]);
    assert!(fine, "devices computes nothing: {said}");
    assert!(said.contains("none: ENAMEL_CPU=sparc: this machine has reference, portable"));
}

#[test]
fn a_cpu_path_that_is_not_there_stops_what_computes_before_it_starts() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let score = ["score", "--model", "model", "--input", "train.jsonl"];
    let score = [&score[..], &["--output", "scores.jsonl"]].concat();
    for arguments in [
        &["train", "recipe.toml"][..],
        &["plan", "recipe.toml"],
        &["eval", "recipe.toml"],
        &score,
        &["generate", "--model", "model", "--prompt", "2+2?"],
        &["bench", "--model", "model", "--shapes", "1x8"],
    ] {
        let (fine, said) = on_path(&workshop, "sparc", arguments);
        assert!(!fine, "enamel {arguments:?} ran: {said}");
        assert!(
            said.contains("error: ENAMEL_CPU=sparc: this machine has reference, portable")
                && said.contains("unset it or name one of these"),
            "{said}"
        );
    }
    assert!(!workshop.path("run").exists(), "nothing was begun");
    // A path that is there is no error.
    let (fine, said) = on_path(&workshop, "portable", &["plan", "recipe.toml"]);
    assert!(fine, "{said}");
}

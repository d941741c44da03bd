//! `enamel adapter` on the adapters that PEFT wrote.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Tensors, assert_close, copy, fixtures};

pub fn fixture(case: &str) -> PathBuf {
    fixtures().join(case)
}

/// A fixture's adapter as a directory of the workshop's, to change.
pub fn bring(workshop: &Workshop, case: &str, name: &str) -> PathBuf {
    let to = workshop.path(name);
    fs::create_dir_all(&to).expect("room on the disk");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        copy(&fixture(case).join(file), &to.join(file));
    }
    to
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn json_of(workshop: &Workshop, arguments: &[&str]) -> Value {
    serde_json::from_str(&workshop.run(arguments)).expect("JSON")
}

fn config(dir: &Path) -> Value {
    crate::support::goldens::json(&dir.join("adapter_config.json"))
}

pub fn set(dir: &Path, key: &str, value: Value) {
    let mut all = config(dir);
    all[key] = value;
    fs::write(dir.join("adapter_config.json"), all.to_string()).expect("room on the disk");
}

/// Writes an adapter's tensors anew, changed.
pub fn rewrite(dir: &Path, change: impl Fn(&str, &mut Vec<f32>)) {
    let file = dir.join("adapter_model.safetensors");
    let old = Tensors::open(&file);
    let mut all = Vec::new();
    for name in old.names() {
        let tensor = old.floats(&name);
        let mut values = tensor.values;
        change(&name, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        all.push((name, tensor.shape, bytes));
    }
    let views = all.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a whole tensor");
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None).expect("a file");
    fs::write(file, bytes).expect("room on the disk");
}

#[test]
fn list_finds_adapters_beside_and_below_each_other() {
    let workshop = Workshop::new();
    bring(&workshop, "methods/loha/adapter", "run/adapter");
    bring(
        &workshop,
        "lora/all_linear/adapter",
        "run/checkpoints/step-000006/adapter",
    );
    bring(&workshop, "methods/ia3/adapter", "run/broken");
    fs::write(workshop.path("run/broken/adapter_model.safetensors"), b"").expect("room");
    let said = workshop.run(&["adapter", "list", "run"]);
    for part in [
        "LoHa",
        "checkpoints/step-000006/adapter",
        "problem: broken",
        "the file is empty",
    ] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    let found = json_of(&workshop, &["adapter", "list", "run/adapter", "--json"]);
    assert_eq!(found[0]["name"], "adapter");
    assert_eq!(found[0]["method"], "LoHa");
    assert!(found[0]["parameters"].as_u64().expect("a count") > 0);
    let said = workshop.fail(&["adapter", "list", "model"]);
    assert!(
        said.contains("no adapter in model") && said.contains("help:"),
        "{said}"
    );
    let said = workshop.fail(&["adapter", "list", "nowhere"]);
    assert!(
        said.contains("nowhere: there is no such directory"),
        "{said}"
    );
}

#[test]
fn every_adapter_that_peft_wrote_can_be_inspected_and_has_no_problem() {
    let workshop = Workshop::new();
    let mut seen = 0;
    for group in ["methods", "lora"] {
        let cases = fs::read_dir(fixture(group)).expect("fixtures");
        for case in cases.map(|entry| entry.expect("an entry").path()) {
            let dir = case.join("adapter");
            if !dir.join("adapter_config.json").is_file() {
                continue;
            }
            let report = json_of(&workshop, &["adapter", "inspect", path(&dir), "--json"]);
            assert_eq!(report["problems"], json!([]), "{}", dir.display());
            assert_eq!(report["unknown_keys"], json!([]), "{}", dir.display());
            let golden = crate::support::goldens::json(&case.join("meta.json"));
            if let Some(count) = golden["trainable"].as_u64() {
                assert_eq!(report["parameters"], count, "{}", dir.display());
            }
            let kinds = report["kinds"].as_array().expect("kinds");
            let norms = kinds.iter().any(|kind| kind["delta_norm"].is_f64());
            assert!(norms || report["no_norms"].is_string() || report["delta_norm"].is_null());
            seen += 1;
        }
    }
    assert!(seen > 25, "{seen}");
}

#[test]
fn inspect_names_norms_settings_and_what_is_wrong() {
    let workshop = Workshop::new();
    let said = workshop.run(&[
        "adapter",
        "inspect",
        path(&fixture("lora/all_linear/adapter")),
    ]);
    for part in [
        "LoRA",
        "norm of what is added",
        "q_proj",
        "r  4  (default 8)",
        "F32",
    ] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    let said = workshop.run(&[
        "adapter",
        "inspect",
        path(&fixture("methods/lora_dora/adapter")),
    ]);
    assert!(said.contains("no norms: DoRA"), "{said}");

    let dir = bring(&workshop, "lora/all_linear/adapter", "untrained");
    rewrite(&dir, |name, values| {
        if name.contains("lora_B") {
            values.fill(0.0);
        }
    });
    assert!(
        workshop
            .run(&["adapter", "inspect", "untrained"])
            .contains("untrained:")
    );
    rewrite(&dir, |name, values| {
        if name.contains("layers.0.self_attn.q_proj.lora_A") {
            values[3] = f32::NAN;
        }
    });
    let said = workshop.run(&["adapter", "inspect", "untrained"]);
    assert!(
        said.contains("q_proj.lora_A.weight holds 1 values that are NaN"),
        "{said}"
    );
    set(&dir, "r", json!(3));
    set(&dir, "target_modules", json!(["q_proj"]));
    let said = workshop.run(&["adapter", "inspect", "untrained"]);
    for part in [
        "where the configuration asks for [3,",
        "v_proj.lora_A.weight is not called for",
    ] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
}

#[test]
fn combine_agrees_with_what_peft_makes_of_the_same_adapters() {
    let workshop = Workshop::new();
    let home = fixture("methods/combine");
    let cases = crate::support::goldens::json(&home.join("cases.json"));
    let mut compared = 0;
    for (case, wanted) in cases["cases"].as_object().expect("cases") {
        let kind = wanted["combination_type"].as_str().expect("a type");
        // Random pruning cannot be repeated; the signs of singular vectors are not unique.
        if kind.contains("dare") || wanted["svd_clamp"].is_number() {
            continue;
        }
        let dirs: Vec<PathBuf> = wanted["adapters"]
            .as_array()
            .expect("names")
            .iter()
            .map(|name| home.join(name.as_str().expect("a name")))
            .collect();
        let weights: Vec<String> = wanted["weights"]
            .as_array()
            .expect("weights")
            .iter()
            .map(Value::to_string)
            .collect();
        let output = format!("out-{case}");
        let mut arguments: Vec<String> = vec!["adapter".into(), "combine".into()];
        for dir in &dirs {
            arguments.extend(["--adapter".into(), path(dir).into()]);
        }
        arguments.extend([
            "--weights".into(),
            weights.join(","),
            "--type".into(),
            kind.into(),
        ]);
        arguments.extend(["--output".into(), output.clone()]);
        for (key, option) in [
            ("density", "--density"),
            ("majority_sign_method", "--majority-sign"),
            ("svd_rank", "--svd-rank"),
        ] {
            if let Some(value) = wanted.get(key).filter(|value| !value.is_null()) {
                let value = value.as_str().map_or(value.to_string(), str::to_owned);
                arguments.extend([option.into(), value]);
            }
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        workshop.run(&arguments);
        let ours = config(&workshop.path(&output));
        assert_eq!(ours["r"], wanted["r"], "{case}");
        assert_eq!(ours["lora_alpha"], wanted["lora_alpha"], "{case}");
        let file = workshop.path(&output).join("adapter_model.safetensors");
        let ours = Tensors::open(file);
        let theirs = Tensors::open(home.join(format!("{case}.safetensors")));
        for name in theirs.names() {
            let Some(module) = name.strip_suffix(".delta") else {
                continue;
            };
            let part = |own: &str| ours.floats(&format!("base_model.model.{module}.{own}.weight"));
            let (a, b) = (part("lora_A"), part("lora_B"));
            let product = multiply(&b.values, &a.values, b.shape[1]);
            assert_close(
                &format!("{case} {module}"),
                &product,
                &theirs.floats(&name).values,
                2e-5,
            );
            compared += 1;
        }
    }
    assert!(compared > 20, "{compared}");
}

/// `b · a` of row-major `[out, r]` and `[r, in]`.
fn multiply(b: &[f32], a: &[f32], r: usize) -> Vec<f32> {
    let width = a.len() / r;
    let mut product = vec![0.0; b.len() / r * width];
    for (row, line) in b.chunks(r).zip(product.chunks_mut(width)) {
        for (k, factor) in row.iter().enumerate() {
            for (to, from) in line.iter_mut().zip(&a[k * width..]) {
                *to += factor * from;
            }
        }
    }
    product
}

#[test]
fn every_combination_type_writes_an_adapter_that_merges() {
    let workshop = Workshop::new();
    let (a, b) = (fixture("methods/combine/a"), fixture("methods/combine/b"));
    for kind in enamel_adapter::combine::CombinationType::ALL {
        let name = kind.name();
        let mut arguments = vec![
            "adapter",
            "combine",
            "--adapter",
            path(&a),
            "--adapter",
            path(&b),
        ];
        arguments.extend([
            "--weights",
            "0.7,-0.3",
            "--type",
            name,
            "--output",
            name,
            "--seed",
            "5",
        ]);
        if kind.prunes() {
            arguments.extend(["--density", "0.5"]);
        }
        let said = workshop.run(&arguments);
        assert!(
            said.contains("combined") && said.contains("difference"),
            "{said}"
        );
        let merged = format!("merged-{name}");
        workshop.run(&[
            "merge",
            "--model",
            "model",
            "--adapter",
            name,
            "--output",
            &merged,
        ]);
    }
    let exact = Tensors::open(workshop.path("merged-cat/model.safetensors"));
    workshop.run(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        path(&a),
        "--adapter",
        path(&b),
        "--weights",
        "0.7,-0.3",
        "--output",
        "sum",
    ]);
    let sum = Tensors::open(workshop.path("sum/model.safetensors"));
    for name in exact.names() {
        assert_close(
            &name,
            &exact.floats(&name).values,
            &sum.floats(&name).values,
            1e-6,
        );
    }
}

#[test]
fn conversion_errs_less_with_every_rank_and_not_at_all_at_full_rank() {
    let workshop = Workshop::new();
    for method in [
        "loha",
        "lokr",
        "adalora",
        "vera",
        "lora_dora",
        "ia3",
        "miss",
        "miss_mini",
        "miss_bat",
    ] {
        let from = fixture("methods").join(method).join("adapter");
        let mut last = f64::INFINITY;
        for r in ["1", "2", "8", "200"] {
            let output = format!("{method}-{r}");
            let mut arguments = vec!["adapter", "convert", path(&from), "--to", "lora", "--r", r];
            arguments.extend(["--output", &output, "--model", "model"]);
            let said = workshop.run(&arguments);
            let lost = said
                .split("lost ")
                .nth(1)
                .and_then(|rest| rest.split('%').next());
            let lost: f64 = lost.expect("a share").trim().parse().expect("a share");
            assert!(lost <= last, "{method} {r}: {said}");
            last = lost;
            let card =
                fs::read_to_string(workshop.path(&output).join("README.md")).expect("a card");
            assert!(
                card.contains("enamel adapter convert") && card.contains("relative error"),
                "{card}"
            );
        }
        assert!(last < 1e-3, "{method}: {last} %");
        let full = format!("{method}-200");
        let merged = |adapter: &str, output: &str| {
            workshop.run(&[
                "merge",
                "--model",
                "model",
                "--adapter",
                adapter,
                "--output",
                output,
            ]);
            Tensors::open(workshop.path(output).join("model.safetensors"))
        };
        let ours = merged(&full, &format!("{method}-merged"));
        let theirs = merged(path(&from), &format!("{method}-direct"));
        for name in theirs.names() {
            assert_close(
                &name,
                &ours.floats(&name).values,
                &theirs.floats(&name).values,
                1e-5,
            );
        }
        let diff = json_of(&workshop, &["adapter", "diff", &full, &full, "--json"]);
        assert_eq!(diff["same"], true);
    }
    let from = fixture("methods/loha/adapter");
    let arguments = [
        "adapter",
        "convert",
        path(&from),
        "--max-error",
        "0.3",
        "--output",
        "near",
        "--model",
        "model",
    ];
    workshop.run(&arguments);
    let diff = json_of(
        &workshop,
        &["adapter", "diff", path(&from), "near", "--json"],
    );
    let number = |key: &str| diff["total"][key].as_f64().expect("a number");
    let error = number("norm_difference") / number("norm_first");
    assert!(error > 0.0 && error <= 0.3, "{error}");
}

#[test]
fn pissa_becomes_plain_lora_exactly() {
    let workshop = Workshop::new();
    let from = fixture("methods/init_pissa/adapter");
    let arguments = ["adapter", "convert", path(&from), "--output", "plain"];
    let said = workshop.fail(&arguments);
    assert!(
        said.contains("initial_adapter") && said.contains("name the base with --model"),
        "{said}"
    );
    let mut arguments = arguments.to_vec();
    arguments.extend(["--r", "8", "--model", "model"]);
    workshop.run(&arguments);
    assert_eq!(config(&workshop.path("plain"))["init_lora_weights"], true);
}

#[test]
fn diff_names_settings_tensors_and_cosines() {
    let workshop = Workshop::new();
    let first = bring(&workshop, "lora/all_linear/adapter", "first");
    let second = bring(&workshop, "lora/all_linear/adapter", "second");
    assert!(
        workshop
            .run(&["adapter", "diff", "first", "second"])
            .contains("the same settings")
    );
    rewrite(&second, |name, values| {
        if name.contains("q_proj.lora_B") {
            values.iter_mut().for_each(|v| *v *= -1.0);
        }
    });
    set(&second, "lora_dropout", json!(0.3));
    let report = json_of(
        &workshop,
        &["adapter", "diff", path(&first), path(&second), "--json"],
    );
    assert_eq!(report["settings"][0]["key"], "lora_dropout");
    let kinds = report["kinds"].as_array().expect("kinds");
    for kind in kinds {
        let cosine = kind["cosine"].as_f64().expect("a cosine");
        let wanted = if kind["kind"] == "q_proj" { -1.0 } else { 1.0 };
        assert!((cosine - wanted).abs() < 1e-6, "{kind}");
    }
    let said = workshop.run(&["adapter", "diff", "first", "second"]);
    assert!(
        said.contains("cosine") && said.contains("lora_dropout"),
        "{said}"
    );
    let few = fixture("methods/combine/a");
    let said = workshop.run(&["adapter", "diff", "first", path(&few)]);
    assert!(said.contains("only in the first"), "{said}");
}

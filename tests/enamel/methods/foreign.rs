//! Adapters as other programs leave them (`fixtures/generate/foreign.py`), and what is said of an adapter before it
//! is used: settings that are not known, and another base than it was trained on.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use enamel_adapter::load_pretrained;
use serde_json::json;

use crate::cli::adapter::{bring, path, rewrite, set};
use crate::parity::llama::{assert_logits, load_case, logits};
use crate::support::adapted::input;
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Generation, Tensors, copy, fixtures};

const CASES: [(&str, &str); 3] = [
    (
        "named_keys",
        "its keys hold the adapter's name (\"default\")",
    ),
    ("mlx", "it is an mlx-lm adapter"),
    ("mlx_dora", "it is an mlx-lm adapter"),
];

#[test]
fn named_keys_and_mlx_adapters_have_the_numbers_of_pefts() {
    let device = Device::flex();
    for (case, _) in CASES {
        let folder = fixtures().join("foreign").join(case);
        let mut model = load_case("untied", Generation::Five, &device);
        load_pretrained(&mut model, &folder, false).unwrap_or_else(|e| panic!("{case}: {e}"));
        let golden = Tensors::open(folder.join("case.safetensors"));
        let (input, mask) = input(&golden, "right.", &device);
        let theirs = golden.floats("right.logits").values;
        assert_logits(case, &logits(&model, &input), &theirs, &mask, 1e-5);
    }
}

#[test]
fn what_is_read_otherwise_than_it_lies_there_is_said() {
    let workshop = Workshop::new();
    for (case, note) in CASES {
        let folder = fixtures().join("foreign").join(case);
        let output = workshop.path(case);
        let said = workshop.told(&[
            "merge",
            "--model",
            "model",
            "--adapter",
            path(&folder),
            "--output",
            path(&output),
        ]);
        assert!(said.contains(note), "{case}: {said}");
        let said = workshop.told(&["adapter", "inspect", path(&folder)]);
        assert!(said.contains(note), "{case}: {said}");
    }
}

/// Every verb that takes an adapter, with what it needs. Each gets an output of its own.
fn verbs(adapter: &str) -> Vec<Vec<String>> {
    let all = [
        format!("generate --model model --adapter {adapter} --prompt 2+2? --max-new-tokens 1"),
        format!(
            "score --model model --adapter {adapter} --input train.jsonl --output scores.jsonl"
        ),
        format!("eval recipe.toml --adapter {adapter}"),
        format!("merge --model model --adapter {adapter} --output merged"),
        format!("export {adapter} --model model --output model.gguf"),
        format!("export {adapter} --model model --adapter-only --output lora.gguf"),
        format!("adapter inspect {adapter}"),
        format!("adapter diff {adapter} {adapter}"),
        format!(
            "adapter combine --adapter {adapter} --adapter {adapter} --weights 1,1 --output combined"
        ),
        format!("adapter convert {adapter} --r 2 --output converted"),
        format!("train recipe.toml --set adapter.init_from={adapter:?} --set train.max_steps=4"),
    ];
    all.iter()
        .map(|line| line.split(' ').map(str::to_owned).collect())
        .collect()
}

fn check_every_verb(workshop: &Workshop, adapter: &str, note: &str) {
    for verb in verbs(adapter) {
        let arguments: Vec<&str> = verb.iter().map(String::as_str).collect();
        let said = workshop.told(&arguments);
        assert!(said.contains(note), "{arguments:?}: {said}");
    }
}

#[test]
fn a_setting_that_is_on_and_not_known_is_said_by_every_verb() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let dir = bring(&workshop, "lora/all_linear/adapter", "a");
    set(&dir, "use_hyper_scaling", json!(true));
    set(&dir, "new_option", json!(null));
    check_every_verb(&workshop, "a", "use_hyper_scaling = true is not known here");
    let said = workshop.told(&["adapter", "inspect", "a"]);
    assert!(!said.contains("new_option"), "{said}");
    // Names and values come from elsewhere.
    set(&dir, "x\u{1b}[2J", json!("y\u{9b}31m"));
    let said = workshop.told(&["adapter", "inspect", "a"]);
    assert!(
        !said.contains('\u{1b}') && !said.contains('\u{9b}'),
        "{said:?}"
    );
}

#[test]
fn a_setting_that_changes_the_numbers_and_is_not_supported_is_refused_by_every_verb() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let dir = bring(&workshop, "lora/all_linear/adapter", "a");
    set(&dir, "use_qalora", json!(true));
    for verb in verbs("a") {
        let arguments: Vec<&str> = verb.iter().map(String::as_str).collect();
        let output = workshop.output(&arguments);
        let said = crate::support::enamel_process::said(&output);
        assert!(
            !output.status.success() && said.contains("use_qalora"),
            "{arguments:?}: {said}"
        );
    }
}

/// Another model of the same shape.
fn other_model(workshop: &Workshop) {
    fs::create_dir(workshop.path("other")).expect("room on the disk");
    for entry in fs::read_dir(workshop.path("model"))
        .expect("a model")
        .flatten()
    {
        copy(
            &entry.path(),
            &workshop.path("other").join(entry.file_name()),
        );
    }
    let file = workshop.path("other/model.safetensors");
    let mut bytes = fs::read(&file).expect("weights");
    // One half of the values are other ones, all of them finite.
    let half = bytes.len() / 2;
    for byte in bytes[half..].iter_mut().step_by(4) {
        *byte ^= 1;
    }
    fs::write(&file, bytes).expect("room on the disk");
}

#[test]
fn another_base_than_an_adapter_was_trained_on_is_said() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    workshop.run(&["train", path(&recipe), "--set", "train.max_steps=2"]);
    other_model(&workshop);
    let other = "trained on other weights";
    let merge = |model: &str, adapter: &str, output: &str| {
        workshop.told(&[
            "merge",
            "--model",
            model,
            "--adapter",
            adapter,
            "--output",
            output,
        ])
    };
    assert!(!merge("model", "run/adapter", "own").contains(other));
    assert!(merge("other", "run/adapter", "mixed").contains(other));
    // Wherever the same model lies, it is the same.
    fs::rename(workshop.path("model"), workshop.path("moved")).expect("a folder");
    assert!(!merge("moved", "run/adapter", "same").contains(other));
    // What was made of it knows its base as well.
    workshop.run(&[
        "adapter",
        "convert",
        "run/adapter",
        "--r",
        "2",
        "--output",
        "smaller",
    ]);
    assert!(merge("other", "smaller", "mixed-smaller").contains(other));
    assert!(!merge("moved", "smaller", "same-smaller").contains(other));
    let said = workshop.told(&[
        "generate",
        "--model",
        "other",
        "--adapter",
        "run/adapter",
        "--prompt",
        "a",
    ]);
    assert!(said.contains(other), "{said}");
    let on_other = ["--set", "model.base=\"./other\""];
    let said = workshop.told(
        &[
            &["eval", path(&recipe), "--adapter", "run/adapter"][..],
            &on_other,
        ]
        .concat(),
    );
    assert!(said.contains(other), "{said}");

    // PEFT's adapters have a name alone; a path says nothing of what lies there.
    let dir = bring(&workshop, "lora/all_linear/adapter", "a");
    set(&dir, "base_model_name_or_path", json!("/somewhere/model"));
    assert!(!merge("moved", "a", "by-path").contains("made for"));
}

fn broken(workshop: &Workshop, name: &str, change: impl Fn(&Path)) -> String {
    let dir = bring(workshop, "lora/all_linear/adapter", name);
    change(&dir);
    workshop.fail(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        name,
        "--output",
        "never",
    ])
}

#[test]
fn weights_that_are_no_numbers_missing_or_of_other_types_are_named() {
    let workshop = Workshop::new();
    let error = broken(&workshop, "nan", |dir| {
        rewrite(dir, |name, values| {
            if name.ends_with("layers.1.mlp.up_proj.lora_B.weight") {
                values[2] = f32::NAN;
            }
        });
    });
    assert!(
        error.contains("layers.1.mlp.up_proj.lora_B.weight holds a value that is not finite"),
        "{error}"
    );

    // Of the same size, so that the header alone is another.
    let typed = |from: &str, to: &str| {
        broken(&workshop, to, |dir| {
            let file = dir.join("adapter_model.safetensors");
            let bytes = fs::read(&file).expect("weights");
            let at = bytes
                .windows(from.len())
                .position(|part| part == from.as_bytes());
            let at = at.expect("the text is in the header");
            let changed = [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat();
            fs::write(&file, changed).expect("room on the disk");
        })
    };
    let error = typed("\"F32\"", "\"I32\"");
    assert!(
        error.contains("is I32; only F32, F16 and BF16 are read"),
        "{error}"
    );
    let error = typed("q_proj.lora_A.weight", "q_proj.lora_X.weight");
    assert!(
        error.contains("q_proj.lora_A.weight [") && error.contains("] is missing"),
        "{error}"
    );
    assert!(
        error.contains("q_proj.lora_X.weight does not belong"),
        "{error}"
    );
}

#[test]
fn other_programs_adapters_are_refused_by_name() {
    let workshop = Workshop::new();
    for (file, name) in [
        ("adapter_0.pt", "torchtune"),
        ("adapters.npz", "mlx-lm"),
        ("lit_model.pth.lora", "LitGPT"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("config.json", "a model's directory"),
    ] {
        let dir = workshop.path(&format!("of-{file}"));
        fs::create_dir_all(&dir).expect("room on the disk");
        fs::write(dir.join(file), "{}").expect("room on the disk");
        let error = workshop.fail(&[
            "merge",
            "--model",
            "model",
            "--adapter",
            path(&dir),
            "--output",
            "never",
        ]);
        assert!(
            error.contains(name) && error.contains(file),
            "{file}: {error}"
        );
    }
}

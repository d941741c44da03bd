//! Adapters on the embedding and the head of a model whose head shares the embedding's weights: the numbers
//! that PEFT has with them (`fixtures/generate/tied.py`), and a merged model that has them too.

use std::fs;
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use enamel_adapter::{LoadedAdapter, export_gradients, load_pretrained, save_pretrained};
use enamel_model::Loading;
use enamel_model::Model;
use enamel_train::base::OpenBase;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::adapter::{path, rewrite, set};
use crate::methods::peft_files::save_meta;
use crate::parity::llama::{assert_logits, floats, load, logits};
use crate::support::adapted::{input, task_loss};
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{
    Generation, Tensors, assert_close, assert_close_to_largest, copy, fixtures, stage_into,
};

/// Whether the head follows the embedding, and whether the embedding is in the adapter.
const CASES: [(&str, bool); 8] = [
    ("saved_both", false),
    ("saved_head", false),
    ("target_head", false),
    ("target_both", false),
    ("ensured_saved", true),
    ("ensured_head_saved", true),
    ("ensured_target", true),
    ("ensured_regex", true),
];
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn folder(case: &str) -> PathBuf {
    fixtures().join("tied").join(case)
}

fn golden(case: &str) -> Tensors {
    Tensors::open(folder(case).join("case.safetensors"))
}

/// The tied model with the case's adapter, as every verb puts them together.
fn adapted(case: &str, trainable: bool, device: &Device) -> (Model, LoadedAdapter) {
    let dir = TempDir::new().expect("a temporary directory");
    stage_into("tied", Generation::Five, dir.path());
    let mut base =
        OpenBase::open(path(dir.path()), None, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    let adapter = folder(case).join("adapter");
    base.for_adapter_dirs(std::slice::from_ref(&adapter))
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    let mut model = base
        .weights(device, &Loading::default())
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    let loaded =
        load_pretrained(&mut model, &adapter, trainable).unwrap_or_else(|e| panic!("{case}: {e}"));
    (model, loaded)
}

#[test]
fn logits_are_pefts() {
    for (case, _) in CASES {
        let device = Device::flex();
        let (model, _) = adapted(case, false, &device);
        let golden = golden(case);
        let (input, mask) = input(&golden, "right.", &device);
        let theirs = golden.floats("right.logits").values;
        assert_logits(case, &logits(&model, &input), &theirs, &mask, 1e-5);
    }
}

#[test]
fn gradients_are_pefts_and_what_is_tied_is_one_parameter() {
    for (case, _) in CASES {
        let device = Device::flex().autodiff();
        let (model, _) = adapted(case, true, &device);
        let model = model.train();
        let golden = golden(case);
        let (input, _) = input(&golden, "right.", &device);
        let loss = task_loss(&model, &input, &golden.rows("right.labels"));
        let meta = crate::support::goldens::json(&folder(case).join("meta.json"));
        let wanted = meta["loss"].as_f64().expect("a loss") as f32;
        assert_close(case, &floats(loss.clone().inner()), &[wanted], 1e-5);
        let grads = loss.backward();
        let ours = export_gradients(&model, &grads).unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut names: Vec<_> = ours
            .iter()
            .map(|(name, ..)| format!("grad.{name}"))
            .collect();
        names.sort();
        let theirs = golden.names().into_iter();
        let theirs: Vec<_> = theirs.filter(|name| name.starts_with("grad.")).collect();
        assert_eq!(names, theirs, "{case}");
        for (name, _, values) in ours {
            let theirs = golden.floats(&format!("grad.{name}")).values;
            assert_close_to_largest(&format!("{case}: {name}"), &values, &theirs, 1e-4);
        }
    }
}

/// PEFT does not load a file of a tied copy without the head's tensor (`KeyError`), so it has to be there.
#[test]
fn what_is_saved_is_what_peft_saved_but_for_copies_of_the_base() {
    for (case, _) in CASES {
        let (model, loaded) = adapted(case, false, &Device::flex());
        let out = TempDir::new().expect("a temporary directory");
        save_pretrained(&model, &loaded.config, &save_meta(), out.path())
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let file = |dir: PathBuf| Tensors::open(dir.join("adapter_model.safetensors"));
        let (ours, theirs) = (
            file(out.path().to_owned()),
            file(folder(case).join("adapter")),
        );
        let mut names = theirs.names();
        names.retain(|name| !name.ends_with(".base_layer.weight"));
        assert_eq!(ours.names(), names, "{case}");
        for name in names {
            assert_eq!(ours.floats(&name), theirs.floats(&name), "{case}: {name}");
        }
        let own = crate::support::goldens::json(&out.path().join("adapter_config.json"));
        let tied = case.starts_with("ensured");
        assert_eq!(own["ensure_weight_tying"], json!(tied), "{case}");
    }
}

fn workshop() -> Workshop {
    let workshop = Workshop::new();
    fs::create_dir(workshop.path("tied")).expect("room on the disk");
    stage_into("tied", Generation::Five, &workshop.path("tied"));
    workshop
}

#[test]
fn a_merged_model_answers_as_the_adapter_does_and_is_untied_only_where_the_two_differ() {
    let workshop = workshop();
    for (case, tied) in CASES {
        let adapter = folder(case).join("adapter");
        let given = [
            "--model",
            "tied",
            "--adapter",
            path(&adapter),
            "--device",
            "flex",
        ];
        let said = workshop.told(&[&["merge", "--output", case], &given[..]].concat());
        let about_head = "lm_head has a matrix of its own";
        assert_eq!(said.contains(about_head), !tied, "{case}: {said}");
        let files = Tensors::open(workshop.path(case).join("model.safetensors"));
        assert_eq!(files.has(HEAD), !tied, "{case}: {said}");
        let config = crate::support::goldens::json(&workshop.path(case).join("config.json"));
        assert_eq!(config["tie_word_embeddings"], json!(tied), "{case}");

        let device = Device::flex();
        let golden = golden(case);
        let (input, mask) = input(&golden, "right.", &device);
        let ours = logits(&load(&workshop.path(case), &device), &input);
        let theirs = golden.floats("right.logits").values;
        assert_logits(case, &ours, &theirs, &mask, 2e-5);

        let file = format!("{case}.gguf");
        let export = [
            "export",
            path(&adapter),
            "--model",
            "tied",
            "--outtype",
            "f32",
            "--output",
            &file,
        ];
        workshop.run(&export);
        let ours = logits(&load(&workshop.path(&file), &device), &input);
        assert_logits(&file, &ours, &theirs, &mask, 2e-5);
    }
}

#[test]
fn an_embedding_that_is_trained_takes_its_head_along_only_where_it_is_to() {
    let workshop = workshop();
    let row = |i: usize| {
        let ids: Vec<usize> = (0..8).map(|j| 3 + (7 * i + 5 * j) % 100).collect();
        json!({ "input_ids": ids, "labels": ids })
    };
    workshop.rows("ids.jsonl", (0..8).map(row));
    let train = |output: &str, adapter: &str| {
        workshop.recipe(
            "tied.toml",
            adapter,
            "train = \"ids.jsonl\"\nvalid = \"ids.jsonl\"",
            "max_steps = 4\nbatch_size = 4\nlearning_rate = 1e-2",
        );
        let dir = workshop.path(output);
        let set = format!("output.dir={:?}", path(&dir));
        let said = workshop.told(&[
            "train",
            "tied.toml",
            "--set",
            "model.base=\"./tied\"",
            "--set",
            &set,
        ]);
        let file = Tensors::open(dir.join("adapter/adapter_model.safetensors"));
        (file, said)
    };
    let of = |file: &Tensors, name: &str| file.floats(&format!("base_model.model.{name}")).values;
    let both =
        "r = 2\ntarget_modules = [\"q_proj\"]\nmodules_to_save = [\"embed_tokens\", \"lm_head\"]";
    let (file, said) = train("apart", both);
    assert!(said.contains("lm_head has a matrix of its own"), "{said}");
    assert_ne!(of(&file, TABLE), of(&file, HEAD));

    let (file, said) = train("together", &format!("{both}\nensure_weight_tying = true"));
    assert!(!said.contains("lm_head has a matrix of its own"), "{said}");
    assert_eq!(of(&file, TABLE), of(&file, HEAD));
    let base = Tensors::open(workshop.path("tied/model.safetensors"));
    assert_ne!(of(&file, TABLE), base.floats(TABLE).values);

    // What was trained is what is evaluated, resumed from and gone on from.
    for (run, about) in [("apart", true), ("together", false)] {
        let adapter = format!("{run}/adapter");
        let evaluated = workshop.run(&[
            "eval",
            "tied.toml",
            "--adapter",
            &adapter,
            "--set",
            "model.base=\"./tied\"",
            "--json",
        ]);
        let evaluated: Value = serde_json::from_str(&evaluated).expect("JSON");
        let summary = crate::support::goldens::json(&workshop.path(run).join("summary.json"));
        let (ours, theirs) = (&evaluated["loss"], &summary["valid_loss"]);
        let near = (ours.as_f64().expect("a loss") - theirs.as_f64().expect("a loss")).abs() < 1e-6;
        assert!(near, "{run}: {evaluated} {summary}");
        assert_eq!(
            evaluated.to_string().contains("lm_head has"),
            about,
            "{run}: {evaluated}"
        );
    }
}

#[test]
fn an_adapter_that_cannot_be_put_on_a_tied_model_is_refused_with_what_to_do() {
    let workshop = workshop();
    let bring = |case: &str, name: &str| {
        let to = workshop.path(name);
        fs::create_dir_all(&to).expect("room on the disk");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            copy(&folder(case).join("adapter").join(file), &to.join(file));
        }
        to
    };
    let refused = |dir: &PathBuf| {
        workshop.fail(&[
            "merge",
            "--model",
            "tied",
            "--adapter",
            path(dir),
            "--output",
            "never",
        ])
    };
    let rows = bring("target_head", "rows");
    set(&rows, "trainable_token_indices", json!([1, 5]));
    let error = refused(&rows);
    assert!(
        error.contains("trainable_token_indices") && error.contains("choose one"),
        "{error}"
    );

    let dora = bring("ensured_target", "dora");
    set(&dora, "use_dora", json!(true));
    let error = refused(&dora);
    assert!(
        error.contains("ensure_weight_tying") && error.contains("use_dora"),
        "{error}"
    );

    let differs = bring("ensured_saved", "differs");
    rewrite(&differs, |name, values| {
        if name.ends_with(HEAD) {
            values[3] += 1.0;
        }
    });
    let error = refused(&differs);
    assert!(
        error.contains("lm_head.weight is not what") && error.contains("embed_tokens.weight"),
        "{error}"
    );

    // A GGUF LoRA has no tensor for a head that the base's file does not have.
    let head = folder("target_head").join("adapter");
    let error = workshop.fail(&["export", path(&head), "--model", "tied", "--adapter-only"]);
    assert!(error.contains("it is on lm_head"), "{error}");
}

#[test]
fn a_head_of_its_own_is_not_tied_and_that_is_said() {
    let workshop = workshop();
    let dir = workshop.path("saved");
    fs::create_dir_all(&dir).expect("room on the disk");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        copy(
            &fixtures().join("lora/modules_to_save/adapter").join(file),
            &dir.join(file),
        );
    }
    set(&dir, "ensure_weight_tying", json!(true));
    let said = workshop.told(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        "saved",
        "--output",
        "merged",
    ]);
    assert!(said.contains("ensure_weight_tying has no effect"), "{said}");
    let merged = Tensors::open(workshop.path("merged/model.safetensors"));
    assert_ne!(merged.floats(TABLE).values, merged.floats(HEAD).values);
}

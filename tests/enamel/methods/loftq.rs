//! LoftQ's start: against PEFT's `replace_lora_weights_loftq` on models that bitsandbytes quantised, and through
//! the program.

use std::fs;

use burn::tensor::Device;
use enamel_adapter::init::loftq::start;
use enamel_adapter::{InitLora, LoraConfig, Targets, attach_given, export_trainable};
use enamel_kernels::quantized::formats::{FloatKind, FourBit};
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::{ArchConfig, Format, Loading, Quantization};
use enamel_model::{Model, ModelInput};

use crate::cli::adapter::path;
use crate::on_every_device;
use crate::parity::inits::{compare_deltas, deltas, host};
use crate::parity::llama::{ids, logits};
use crate::support::enamel_process::{Workshop, signal, text, wait_for};
use crate::support::goldens::{Tensors, assert_close, copy, fixtures, json};

on_every_device!(factors_errors_and_logits_are_those_of_peft,);

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn factors_errors_and_logits_are_those_of_peft(device: &Device) {
    let folder = fixtures().join("bnb");
    let golden = Tensors::open(folder.join("loftq/case.safetensors"));
    let meta = json(&folder.join("loftq/meta.json"));
    let files = Checkpoint::open(&folder.join("dense")).expect("a sound checkpoint");
    let config = ArchConfig::from_json(files.config_json()).expect("a Llama");
    let input = ModelInput::new(ids(&golden.rows("none.input_ids"), device));
    let dense = golden.floats("none.logits.dense").values;
    let loaded = |format: Option<Format>| {
        let quantization = Quantization {
            format,
            ..Quantization::default()
        };
        let loading = Loading {
            quantization,
            ..Loading::default()
        };
        Model::load_for(&config, &files, device, &loading).expect("a model")
    };
    assert_close("dense", &logits(&loaded(None), &input), &dense, 1e-5);
    for (case, kind, double) in [("nf4", FourBit::Nf4, true), ("fp4", FourBit::Fp4, false)] {
        let mut model = loaded(Some(Format::FourBit {
            kind,
            block: 64,
            double,
            compute: FloatKind::F32,
        }));
        // As for every model that bitsandbytes quantised.
        let base = golden.floats(&format!("{case}.logits.base")).values;
        assert_close(case, &logits(&model, &input), &base, 1e-4);
        let r = meta["r"].as_u64().expect("a rank") as usize;
        let lora = LoraConfig {
            r,
            lora_alpha: meta["lora_alpha"].as_f64().expect("an alpha"),
            target_modules: Some(Targets::AllLinear),
            init_lora_weights: InitLora::Loftq,
            ..LoraConfig::default()
        };
        let read = |module: &str| {
            let values = files.read_f32(&format!("{module}.weight"));
            Ok(values.expect("the weight as it was"))
        };
        let start = start(&model, &lora, &read).unwrap_or_else(|e| panic!("{case}: {e}"));
        attach_given(&mut model, "default", &lora, 1, Some(&start.given()))
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        // PEFT decomposes in f32.
        let ours = export_trainable(&model).expect("factors");
        let theirs = host(&golden, &format!("{case}.base_model"));
        let theirs: Vec<_> = theirs
            .into_iter()
            .map(|(key, shape, values)| (format!("base_model{key}"), shape, values))
            .collect();
        compare_deltas(case, &deltas(&ours, 1.0), &deltas(&theirs, 1.0));
        let errors = meta["cases"][case]["errors"].as_object().expect("errors");
        assert_eq!(errors.len(), start.errors.len());
        for (module, wanted) in errors {
            for (got, wanted) in start.errors[module]
                .iter()
                .zip(wanted.as_array().expect("two"))
            {
                let (got, wanted) = (got.sqrt(), wanted.as_f64().expect("a number"));
                assert!(
                    (got - wanted).abs() < 1e-5 * wanted,
                    "{module}: {got} {wanted}"
                );
            }
            let [lost, left] = start.errors[module];
            assert!(left < lost, "{module}");
        }
        let started = logits(&model, &input);
        let theirs = golden.floats(&format!("{case}.logits")).values;
        assert_close(case, &started, &theirs, 1e-4);
        let (plain, with) = (distance(&base, &dense), distance(&started, &dense));
        assert!(with < 0.9 * plain, "{case}: {with} of {plain}");
    }
}

const LOFTQ: [&str; 4] = [
    "--set",
    "model.quantization.load_in_4bit=true",
    "--set",
    "adapter.init_lora_weights=loftq",
];

#[test]
fn a_run_from_loftq_stopped_and_resumed_ends_at_the_same_bits() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    let arguments = |output: &'static str, more: &[&'static str]| -> Vec<&str> {
        let run = ["--set", "train.epochs=12", "--output", output];
        [&["train", path(&recipe)][..], &run, &LOFTQ, more].concat()
    };
    let train = |output, more: &[&'static str]| workshop.told(&arguments(output, more));
    let words = train("whole", &[]);
    assert!(
        words.contains("loftq    14 quantised layers are off by"),
        "{words}"
    );
    let mut parts = workshop.command(&arguments("parts", &[]));
    let mut child = parts.spawn().expect("the binary runs");
    let seen = workshop.path("parts/checkpoints/step-000012");
    assert!(wait_for(&seen, &mut child), "it ended before");
    signal(&child, "KILL");
    child.wait().expect("a child of ours");
    let words = train("parts", &["--resume"]);
    assert!(
        !words.contains("loftq    "),
        "the checkpoint has the factors: {words}"
    );
    assert!(workshop.adapter("whole") == workshop.adapter("parts"));
    workshop.run(&["train", "whole/recipe.lock.toml", "--output", "locked"]);
    assert!(workshop.adapter("whole") == workshop.adapter("locked"));
    // Plain LoRA to whoever loads it on the quantised base, and marked for those who would take another.
    let config = json(&workshop.path("whole/adapter/adapter_config.json"));
    assert_eq!(config["init_lora_weights"], true);
    let settings = serde_json::json!({ "loftq_bits": 4, "loftq_iter": 1 });
    assert_eq!(config["loftq_config"], settings);
    let card = fs::read_to_string(workshop.path("whole/adapter/README.md")).expect("a card");
    assert!(card.contains("It began as LoftQ"), "{card}");
    assert!(
        card.contains("base held as | nf4 in blocks of 64"),
        "{card}"
    );
    let lock = fs::read_to_string(workshop.path("whole/recipe.lock.toml")).expect("a lock");
    assert!(lock.contains("loftq_iter = 1"), "{lock}");
}

#[test]
fn what_began_as_loftq_is_merged_and_used_on_the_quantised_base() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    let train = ["train", path(&recipe), "--set", "train.max_steps=6"];
    workshop.run(&[&train[..], &LOFTQ].concat());
    let merge = |output: &'static str, more: &[&'static str]| {
        let common = [
            "merge", "--device", "flex", "--rows", "3", "--output", output,
        ];
        [&common[..], more].concat()
    };
    let (kept, run) = (["--adapter", "run/adapter"], "trained on  nf4");
    let words = workshop.run(&merge("merged", &kept));
    assert!(
        words.contains("into        dequantized\n") && words.contains(run),
        "{words}"
    );
    assert!(!words.contains("note  "), "{words}");
    let report = json(&workshop.path("merged/merge_report.json"));
    let drift = report["logit_drift"]["choices"]
        .as_array()
        .expect("choices");
    let mean = |base: &str| {
        let choice = drift
            .iter()
            .find(|c| c["base"] == base && c["requantized"] == false);
        choice.expect("it")["mean_abs_logit_diff"]
            .as_f64()
            .expect("a number")
    };
    // What was trained, but for sums being rounded once.
    assert!(mean("dequantized") < 1e-5, "{}", mean("dequantized"));
    assert!(mean("dense") > 1e-3, "{}", mean("dense"));
    let dense = [&kept[..], &["--into", "dense"]].concat();
    let words = workshop.run(&merge("dense", &dense));
    assert!(
        words.contains("makes up for what its quantised base lost"),
        "{words}"
    );
    // Both of two of them make up for the same.
    let twice = [
        "--adapter",
        "run/adapter",
        "--adapter",
        "run/adapter",
        "--no-check",
    ];
    let words = workshop.run(&merge("twice", &twice));
    assert!(words.contains("here 2 times"), "{words}");

    // Away from its run it is known for what it is, and the format has to be given.
    fs::create_dir(workshop.path("alone")).expect("room on the disk");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = workshop.path("run/adapter").join(file);
        copy(&from, &workshop.path("alone").join(file));
    }
    let alone = ["--model", "model", "--adapter", "alone"];
    let words = workshop.fail(&merge("out", &alone));
    assert!(words.contains("began as LoftQ needs the format"), "{words}");
    assert!(!workshop.path("out").exists());
    let given = [&alone[..], &["--load-in-4bit"]].concat();
    workshop.run(&merge("out", &given));
    let bytes = |output: &str| fs::read(workshop.path(output).join("model.safetensors")).ok();
    assert!(bytes("out").is_some() && bytes("out") == bytes("merged"));

    let words = workshop.run(&["export", "run", "--output", "merged.gguf"]);
    assert!(
        words.contains("into the base as it was quantised"),
        "{words}"
    );
    let words = workshop.fail(&["export", "alone", "--model", "model", "--output", "x.gguf"]);
    assert!(words.contains("began as LoftQ needs the format"), "{words}");

    let generate = |more: &[&'static str]| {
        let common = [
            "generate",
            "--prompt",
            "2+2?",
            "--max-new-tokens",
            "4",
            "--device",
            "flex",
        ];
        text(
            &workshop
                .success(&[&common[..], &alone, more].concat())
                .stderr,
        )
    };
    assert!(generate(&[]).contains("note: the adapter began as LoftQ"));
    assert!(!generate(&["--load-in-4bit"]).contains("note:"));
    let eval = |more: &[&str]| {
        let arguments = ["eval", path(&recipe), "--adapter", "alone"];
        workshop.run(&[&arguments[..], more].concat())
    };
    assert!(eval(&[]).contains("note        the adapter began as LoftQ"));
    assert!(!eval(&LOFTQ[..2]).contains("note  "));

    // A base that is quantised in its files is the one that it is for.
    workshop.run(&["quantize", "model", "--output", "nf4"]);
    let stored = ["--model", "nf4", "--adapter", "alone"];
    let words = workshop.run(&merge("of-stored", &stored));
    assert!(!words.contains("began as LoftQ"), "{words}");
    assert!(words.contains("or the same in another form"), "{words}");
    let values = |output: &str, name: &str| {
        let written = Tensors::open(workshop.path(output).join("model.safetensors"));
        written.floats(name).values
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    assert_close(
        name,
        &values("of-stored", name),
        &values("merged", name),
        1e-6,
    );
    let common = ["generate", "--prompt", "2+2?", "--max-new-tokens", "2"];
    let output = workshop.success(&[&common[..], &stored].concat());
    assert!(!text(&output.stderr).contains("began as LoftQ"));
}

#[test]
fn a_base_that_loftq_cannot_start_from_is_refused_before_anything_is_written() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    let start = "adapter.init_lora_weights=loftq";
    let fails = |sets: &[&'static str]| {
        let mut arguments = vec!["train", path(&recipe)];
        arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
        let words = workshop.fail(&arguments);
        assert!(!workshop.path("run").exists(), "{words}");
        words
    };
    let words = fails(&[start]);
    assert!(
        words.contains("nothing is quantised") && words.contains("load_in_8bit"),
        "{words}"
    );
    let four = "model.quantization.load_in_4bit=true";
    let words = fails(&[start, four, "adapter.loftq_config.loftq_iter=3"]);
    assert!(words.contains("loftq_iter = 3"), "{words}");
    let bias = fails(&[start, four, "adapter.lora_bias=true"]);
    assert!(bias.contains("lora_bias"), "{bias}");
    // All that is adapted left dense.
    let target = "adapter.target_modules=['q_proj']";
    let skip = "model.quantization.skip_modules=['q_proj']";
    let words = fails(&[start, four, target, skip]);
    assert!(
        words.contains("no layer that is adapted is quantised"),
        "{words}"
    );

    // A model of which bitsandbytes has kept no weight as it was.
    for file in ["config.json", "model.safetensors"] {
        copy(
            &fixtures().join("bnb/nf4").join(file),
            &workshop.path("model").join(file),
        );
    }
    fs::remove_file(workshop.path("model/tokenizer.json")).expect("it was there");
    let row = serde_json::json!({ "input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6] });
    workshop.rows("train.jsonl", [row.clone(), row.clone()]);
    workshop.rows("valid.jsonl", [row]);
    let words = fails(&[start, four]);
    for part in [
        "model.layers.0.self_attn.q_proj",
        "and 6 more",
        "has quantised",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

#[test]
fn the_plan_names_the_start_and_dora_and_eight_bits_take_it_too() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    let with = |verb, more: &[&'static str]| {
        let start = ["--set", "adapter.init_lora_weights=loftq"];
        workshop.told(&[&[verb, path(&recipe)][..], &start, more].concat())
    };
    let eight = ["--set", "model.quantization.load_in_8bit=true"];
    let words = with("plan", &eight);
    assert!(words.contains("LoftQ's start"), "{words}");
    let dora = ["--set", "adapter.method=dora", "--set", "train.max_steps=6"];
    let words = with("train", &[&eight[..], &dora].concat());
    assert!(words.contains("loftq    14 quantised layers"), "{words}");
    let config = json(&workshop.path("run/adapter/adapter_config.json"));
    assert_eq!(config["use_dora"], true);
    assert_eq!(config["loftq_config"]["loftq_bits"], 8);
    let answer = [
        "generate",
        "--model",
        "model",
        "--adapter",
        "run/adapter",
        "--prompt",
        "1+1?",
    ];
    workshop.run(&[&answer[..], &["--max-new-tokens", "2", "--load-in-8bit"]].concat());
}

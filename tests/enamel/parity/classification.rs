//! Sequence classifiers on decoders against transformers and PEFT: logits, loss, every gradient, and twenty steps
//! through `enamel train` with what they leave.

use std::fs;
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use burn::train::InferenceStep;
use enamel_adapter::{export_gradients, load_pretrained};
use enamel_data::{Classes, ClassifiedText};
use enamel_model::checkpoint::Checkpoint;
use enamel_model::{ArchConfig, HeadConfig, Model};
use enamel_train::task::{SequenceClassification, Task};
use enamel_train::training::train_step::TrainModel;
use serde_json::Value;

use crate::on_every_device;
use crate::parity::llama::floats;
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{
    Tensors, assert_close, assert_close_to_largest, copy, fixtures, json,
};

on_every_device!(a_batch_agrees);

const BASES: [&str; 2] = ["llama", "gpt2"];
const LABELS: [&str; 3] = ["bad", "fair", "good"];
/// That of `fixtures/generate/llama.py`, in every base's config.json.
const PAD: u32 = 0;

fn folder(name: &str) -> PathBuf {
    fixtures().join("classification").join(name)
}

fn labels() -> Vec<String> {
    LABELS.map(str::to_owned).to_vec()
}

fn model(base: &str, device: &Device) -> Model {
    let checkpoint = Checkpoint::open(&folder(base)).unwrap();
    let config = ArchConfig::from_json(checkpoint.config_json()).unwrap();
    assert_eq!(config.labels(), Some(labels()));
    assert_eq!(config.pad_token_id, Some(PAD));
    let head = HeadConfig::SequenceClassification {
        labels: labels(),
        stored: true,
    };
    let config = config.with_head(head, None);
    Model::load(&config, &checkpoint, device).unwrap()
}

/// Logits of order one and their gradients: the tolerances of the language models.
fn a_batch_agrees(device: &Device) {
    for base in BASES {
        let case = folder(&format!("{base}_lora"));
        let golden = Tensors::open(case.join("case.safetensors"));
        let device = device.clone().autodiff();
        let mut model = model(base, &device);
        load_pretrained(&mut model, &case.join("adapter"), true).unwrap();
        let task = SequenceClassification::new(Classes::new(labels()), PAD);
        let rows = golden.rows("input_ids").into_iter().zip(lengths(&golden));
        let classes = golden.ids("labels");
        let rows: Vec<ClassifiedText> = rows
            .zip(classes)
            .map(|((ids, length), class)| {
                let ids = ids[..length].iter().map(|id| *id as u32);
                ClassifiedText {
                    label: Some(class as usize),
                    ..ClassifiedText::unlabelled(ids.collect())
                }
            })
            .collect();
        let batch = task.collate(&rows.iter().collect::<Vec<_>>());
        let model = TrainModel {
            model,
            task: task.clone(),
        };
        let model = model.train();
        let (loss, confusion) = task.loss(&model.model, &batch, Default::default());
        let count = rows.len() as f32;
        let wanted = json(&case.join("meta.json"))["loss"].as_f64().unwrap() as f32;
        let loss = loss.div_scalar(count);
        assert_close(base, &floats(loss.clone().inner()), &[wanted], 1e-5);
        let ours = export_gradients(&model.model, &loss.backward()).unwrap();
        assert_eq!(
            ours.len(),
            golden
                .names()
                .iter()
                .filter(|n| n.starts_with("grad."))
                .count(),
            "{base}"
        );
        for (name, shape, values) in ours {
            let theirs = golden.floats(&format!("grad.{name}"));
            assert_eq!(shape, theirs.shape, "{base}: {name}");
            let what = format!("{base}: gradient of {name}");
            assert_close_to_largest(&what, &values, &theirs.values, 1e-4);
        }
        let theirs = golden.floats("logits").values;
        let right = theirs.chunks(3).zip(&rows).filter(|(logits, row)| {
            let best = (0..3).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            best == row.label
        });
        let accuracy = right.count() as f64 / rows.len() as f64;
        assert!((confusion.accuracy() - accuracy).abs() < 1e-12, "{base}");
        // Two micro-batches come to the same.
        let half = |rows: &[ClassifiedText]| {
            let batch = task.collate(&rows.iter().collect::<Vec<_>>());
            InferenceStep::step(&model.valid(), batch)
        };
        let mut parts = half(&rows[..2]);
        parts.add(&half(&rows[2..]));
        assert!((parts.loss() - f64::from(wanted)).abs() < 1e-5, "{base}");
        assert_eq!(parts.tally, confusion, "{base}");
    }
}

/// Real tokens of each row; one that pads at a row's end is a token of the text.
fn lengths(golden: &Tensors) -> Vec<usize> {
    let mask = golden.rows("attention_mask");
    let real = mask.iter().map(|row| row.iter().sum::<i64>() as usize);
    real.collect()
}

fn workshop(base: &str) -> Workshop {
    let workshop = Workshop::new();
    for file in ["config.json", "model.safetensors"] {
        copy(&folder(base).join(file), &workshop.path("model").join(file));
    }
    for file in ["train.jsonl", "valid.jsonl"] {
        copy(
            &folder(&format!("{base}_lora")).join(file),
            &workshop.path(file),
        );
    }
    workshop
}

/// A recipe that repeats the golden curve.
fn recipe(workshop: &Workshop, base: &str) {
    let case = folder(&format!("{base}_lora"));
    let settings = &json(&case.join("curve.json"))["settings"];
    let path = workshop.recipe(
        "recipe.toml",
        &format!("init_from = {:?}", case.join("adapter")),
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nshuffle = false",
        &format!(
            "max_steps = 20\nbatch_size = {}\ngradient_accumulation_steps = {}\nlearning_rate = {}\n\
             lr_scheduler_type = {}\nwarmup_steps = {}\nmax_grad_norm = {}\nweight_decay = {}\n\
             adam_beta1 = {}\nadam_beta2 = {}\nadam_epsilon = {}\nlogging_steps = 1\nsamples = 2",
            settings["rows_per_batch"],
            settings["accumulate"],
            settings["lr"],
            settings["schedule"],
            settings["warmup"],
            settings["clip"],
            settings["weight_decay"],
            settings["betas"][0],
            settings["betas"][1],
            settings["eps"],
        ),
    );
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, format!("task = \"seq_cls\"\n{text}")).unwrap();
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

#[test]
fn twenty_steps_of_a_run_agree_and_so_does_what_it_leaves() {
    for base in BASES {
        let case = folder(&format!("{base}_lora"));
        let workshop = workshop(base);
        recipe(&workshop, base);
        workshop.success(&["train", "recipe.toml"]);
        let golden = json(&case.join("curve.json"));
        let steps = workshop.metrics("run", "train");
        assert_eq!(steps.len(), 20);
        for (step, entry) in steps.iter().enumerate() {
            let at = |key: &str| number(&golden[key][step]);
            let close = |key: &str, theirs: f64, tolerance: f64| {
                let ours = number(&entry[key]);
                assert!(
                    (ours - theirs).abs() <= tolerance,
                    "{base}: {key} of step {}: {ours} for {theirs}",
                    step + 1
                );
            };
            close("loss", at("loss"), 1e-4);
            close("accuracy", at("accuracy"), 0.0);
            close("grad_norm", at("grad_norm"), 1e-4 * at("grad_norm"));
            close("learning_rate", at("lr"), 1e-9);
            assert_eq!(entry["rows"], 4);
        }

        let meta = json(&case.join("meta.json"));
        let valid = workshop.metrics("run", "valid");
        for (entry, theirs) in [
            (&valid[0], &meta["before"]),
            (valid.last().unwrap(), &meta["after"]),
        ] {
            for (key, tolerance) in [("loss", 1e-4), ("accuracy", 1e-12), ("f1", 1e-12)] {
                let (ours, theirs) = (number(&entry[key]), number(&theirs[key]));
                assert!(
                    (ours - theirs).abs() <= tolerance,
                    "{base}: {key}: {ours} for {theirs}"
                );
            }
        }

        let ours = Tensors::open(workshop.path("run/adapter/adapter_model.safetensors"));
        let theirs = Tensors::open(case.join("after.safetensors"));
        assert_eq!(ours.names(), theirs.names(), "{base}");
        for tensor in theirs.names() {
            let what = format!("{base}: {tensor} after 20 steps");
            let (a, b) = (ours.floats(&tensor).values, theirs.floats(&tensor).values);
            assert_close_to_largest(&what, &a, &b, 1e-2);
        }

        // And what is made of it: classes for rows, a model of its own.
        let rows = [
            "predict",
            "valid.jsonl",
            "--batch-size",
            "5",
            "--device",
            "flex",
        ];
        let lines = |more: &[&str]| -> Vec<Value> {
            let text = workshop.run(&[&rows[..], more].concat());
            text.lines()
                .map(|line| serde_json::from_str(line).expect("a line of JSON"))
                .collect()
        };
        let ours = lines(&["--model", "model", "--adapter", "run/adapter"]);
        assert_eq!(ours.len(), 12);
        for (row, line) in ours.iter().enumerate() {
            let class = meta["after"]["predicted"][row].as_u64().unwrap() as usize;
            assert_eq!(line["label"], LABELS[class], "{base}: row {row}");
            for (class, name) in LABELS.iter().enumerate() {
                let theirs = number(&meta["after"]["probabilities"][row][class]);
                let ours = number(&line["scores"][name]);
                assert!((ours - theirs).abs() < 1e-3, "{base}: {ours} for {theirs}");
            }
        }
        let merge = ["merge", "--model", "model", "--adapter", "run/adapter"];
        workshop.success(&[&merge[..], &["--output", "merged"]].concat());
        let merged = Tensors::open(workshop.path("merged/model.safetensors"));
        let theirs = Tensors::open(case.join("merged.safetensors"));
        for tensor in theirs.names() {
            let what = format!("{base}: {tensor}, merged");
            let (a, b) = (merged.floats(&tensor).values, theirs.floats(&tensor).values);
            assert_close_to_largest(&what, &a, &b, 1e-2);
        }
        for (a, b) in ours.iter().zip(lines(&["--model", "merged"])) {
            assert_eq!(a["label"], b["label"], "{base}");
            let (a, b) = (number(&a["score"]), number(&b["score"]));
            assert!((a - b).abs() < 1e-5, "{base}: {a} and {b} merged");
        }
    }
}

//! What an adapter's directory does, for every method.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Case, apart, cases};
use crate::testing::Tiny;
use crate::{
    AdapterConfig, AdapterFile, DEFAULT, SaveForm, SaveMeta, export_trainable, load_pretrained,
    save_pretrained, save_pretrained_as, trainable,
};

fn exchange(model: &Tiny, config: &AdapterConfig) -> TempDir {
    let dir = TempDir::new().unwrap();
    save_pretrained(model, config, &SaveMeta::default(), dir.path()).unwrap();
    dir
}

fn resume(model: &Tiny, config: &AdapterConfig) -> TempDir {
    let dir = TempDir::new().unwrap();
    let form = SaveForm::Resume;
    save_pretrained_as(
        model,
        DEFAULT,
        config,
        &SaveMeta::default(),
        dir.path(),
        form,
    )
    .unwrap();
    dir
}

/// That two directories hold the same bytes, but for files that end in `except`.
fn assert_same(a: &Path, b: &Path, except: Option<&str>, name: &str) {
    let (a, b) = (bytes(a), bytes(b));
    assert_eq!(a.len(), b.len(), "{name}");
    for ((file, a), (other, b)) in a.iter().zip(&b) {
        let skip = except.is_some_and(|end| file.ends_with(end));
        assert!(file == other && (a == b || skip), "{name}: {file}");
    }
}

fn loaded(dir: &Path, case: &Case) -> (Tiny, AdapterConfig) {
    let mut model = Tiny::new(&Device::flex());
    let loaded = load_pretrained(&mut model, dir, true);
    let config = loaded
        .unwrap_or_else(|e| panic!("{}: {e}", case.name))
        .config;
    (model, config)
}

/// Every file of a directory, by its path in it.
fn bytes(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut waiting = vec![dir.to_path_buf()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                all.push((name, fs::read(path).unwrap()));
            }
        }
    }
    all.sort();
    all
}

#[test]
fn what_is_written_for_others_computes_the_same_on_a_fresh_base() {
    for case in cases() {
        let model = case.adapted(&Device::flex());
        let dir = exchange(&model, &case.config);
        let (other, config) = loaded(dir.path(), &case);
        if case.is_converted() {
            let gap = apart(&model.logits(), &other.logits());
            assert!(gap <= 1e-5, "{}: {gap}", case.name);
            // Plain LoRA, which needs nothing but these files.
            assert_eq!(config.to_json()["init_lora_weights"], json!(true));
            assert!(!dir.path().join("initial_adapter").exists());
        } else {
            assert_eq!(other.logits(), model.logits(), "{}", case.name);
            assert_eq!(
                export_trainable(&other).unwrap(),
                export_trainable(&model).unwrap()
            );
            assert_eq!(trainable(&other), trainable(&model), "{}", case.name);
        }
        // Written once more from what was read, it is the same to the byte.
        // The card counts what was trained, which is half of a converted one.
        let card = case.is_converted().then_some("README.md");
        assert_same(
            exchange(&other, &config).path(),
            dir.path(),
            card,
            case.name,
        );
    }
}

#[test]
fn the_same_adapter_gives_the_same_bytes() {
    for case in cases() {
        let model = case.adapted(&Device::flex());
        for write in [exchange, resume] {
            let [first, second] = [write(&model, &case.config), write(&model, &case.config)];
            assert_same(first.path(), second.path(), None, case.name);
        }
    }
}

#[test]
fn what_is_written_to_go_on_from_is_the_same_to_the_bit() {
    for case in cases() {
        let model = case.adapted(&Device::flex());
        let dir = resume(&model, &case.config);
        let (other, config) = loaded(dir.path(), &case);
        assert_eq!(other.logits(), model.logits(), "{}", case.name);
        assert_eq!(
            export_trainable(&other).unwrap(),
            export_trainable(&model).unwrap()
        );
        assert_eq!(trainable(&other), trainable(&model), "{}", case.name);
        assert_eq!(
            dir.path().join("initial_adapter").exists(),
            case.is_converted()
        );
        // With where it started, so both forms come out as they would have.
        for write in [exchange, resume] {
            let [again, before] = [write(&other, &config), write(&model, &case.config)];
            assert_same(again.path(), before.path(), None, case.name);
        }
    }
}

#[test]
fn a_start_that_can_be_computed_again_need_not_be_there() {
    for case in cases().iter().filter(|case| case.is_converted()) {
        let model = case.adapted(&Device::flex());
        let dir = resume(&model, &case.config);
        fs::remove_dir_all(dir.path().join("initial_adapter")).unwrap();
        if case.name == "PiSSA, fast" {
            let found = load_pretrained(&mut Tiny::new(&Device::flex()), dir.path(), true);
            let message = found.unwrap_err().to_string();
            assert!(
                message.contains("randomised") && message.contains("initial_adapter"),
                "{message}"
            );
            continue;
        }
        assert_eq!(
            loaded(dir.path(), case).0.logits(),
            model.logits(),
            "{}",
            case.name
        );
    }
}

#[test]
fn a_configuration_survives_reading_and_writing() {
    for case in cases() {
        let mut value = case.config.to_json();
        for task in [
            "CAUSAL_LM",
            "SEQ_2_SEQ_LM",
            "TOKEN_CLS",
            "SEQ_CLS",
            "QUESTION_ANS",
            "FEATURE_EXTRACTION",
        ] {
            value["task_type"] = json!(task);
            value["inference_mode"] = json!(false);
            value["of_a_later_version"] = json!({"nested": [1, 2.5, null]});
            value["base_model_name_or_path"] = json!("org/model \"quoted\"");
            let read = AdapterConfig::from_json(&value, "here").unwrap();
            assert_eq!(read.to_json(), value, "{}", case.name);
            assert_eq!(read.unknown_keys(), ["of_a_later_version"], "{}", case.name);
            assert_eq!(read.task_type(), Some(task));
            assert_eq!(
                AdapterConfig::from_json(&read.to_json(), "here").unwrap(),
                read
            );
            let keys: Vec<_> = read
                .to_json()
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect();
            assert!(keys.is_sorted(), "{}", case.name);
        }
        value["task_type"] = json!("POETRY");
        let message = AdapterConfig::from_json(&value, "here")
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("POETRY") && message.contains("TOKEN_CLS"),
            "{message}"
        );
    }
}

#[test]
fn a_directory_says_which_modules_and_is_for_inference() {
    for case in cases() {
        let model = case.adapted(&Device::flex());
        let meta = SaveMeta {
            base_model_name_or_path: Some("org/tiny".into()),
            revision: Some("v2".into()),
            task_type: Some("CAUSAL_LM".into()),
            ..SaveMeta::default()
        };
        let dir = TempDir::new().unwrap();
        save_pretrained(&model, &case.config, &meta, dir.path()).unwrap();
        let file = AdapterFile::read(dir.path()).unwrap();
        let json = file.config.to_json();
        for (key, wanted) in [
            ("base_model_name_or_path", "org/tiny"),
            ("revision", "v2"),
            ("task_type", "CAUSAL_LM"),
            ("peft_type", case.config.peft_type()),
        ] {
            assert_eq!(json[key], wanted, "{}", case.name);
        }
        assert_eq!(json["inference_mode"], json!(true));
        assert_ne!(json["target_modules"], json!("all-linear"), "{}", case.name);
        assert_ne!(json["target_modules"], Value::Null, "{}", case.name);
        let card = fs::read_to_string(dir.path().join("README.md")).unwrap();
        let tag = case.config.peft_type().to_lowercase();
        assert!(
            card.contains(&format!("- {tag}\n")) && card.contains("org/tiny"),
            "{card}"
        );
    }
}

#[test]
fn shared_matrices_are_stored_unless_their_seed_stands_for_them() {
    for case in cases() {
        let AdapterConfig::Vera(config) = &case.config else {
            continue;
        };
        let dir = exchange(&case.adapted(&Device::flex()), &case.config);
        let file = AdapterFile::read(dir.path()).unwrap();
        let shape = |key: &str| {
            let found = file.tensors.iter().find(|(k, ..)| k == key);
            found.map(|(_, shape, _)| shape.clone())
        };
        // As wide as the widest layer on either side.
        let [a, b] = match config.save_projection {
            true => [Some(vec![8, 96]), Some(vec![96, 8])],
            false => [None, None],
        };
        assert_eq!(shape("base_model.vera_A"), a);
        assert_eq!(shape("base_model.vera_B"), b);
    }
}

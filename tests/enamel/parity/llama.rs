//! The Llama against transformers: logits, losses and greedy text of tiny models of every kind.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_kernels::{KeyMask, linear_cross_entropy};
use enamel_model::ArchConfig;
use enamel_model::Cache;
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::{Model, ModelInput};

use crate::on_every_device;
use crate::support::goldens::{Generation, LLAMAS, Tensors, assert_close, fixtures, json, stage};

on_every_device!(
    logits_agree_in_every_padding,
    losses_agree,
    both_spellings_of_a_config_are_one_model,
    a_cache_changes_nothing,
    greedy_text_agrees,
);

/// The model in a directory or `.gguf` file.
pub fn load(path: &std::path::Path, device: &Device) -> Model {
    let checkpoint = Checkpoint::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let config = ArchConfig::from_json(checkpoint.config_json()).unwrap_or_else(|e| panic!("{e}"));
    Model::load(&config, &checkpoint, device).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn load_case(case: &str, generation: Generation, device: &Device) -> Model {
    load(stage(case, generation).path(), device)
}

pub fn ids(rows: &[Vec<i64>], device: &Device) -> Tensor<2, Int> {
    let flat: Vec<i64> = rows.concat();
    Tensor::from_data(TensorData::new(flat, [rows.len(), rows[0].len()]), device)
}

pub fn mask(rows: &[Vec<i64>]) -> KeyMask {
    let valid = rows.iter().flatten().map(|m| *m == 1).collect();
    KeyMask {
        valid: Arc::new(valid),
        batch: rows.len(),
        keys: rows[0].len(),
    }
}

/// Logits `[batch · tokens, vocabulary]`, row-major.
pub fn logits(model: &Model, input: &ModelInput) -> Vec<f32> {
    let hidden = model.forward_hidden(input, None);
    let [b, t, h] = hidden.dims();
    floats(model.logits(hidden.reshape([b * t, h])))
}

pub fn floats<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec().expect("f32 values")
}

/// Compares logits where the mask is 1: a padded position's logits mean nothing.
pub fn assert_logits(what: &str, ours: &[f32], theirs: &[f32], mask: &[Vec<i64>], tolerance: f32) {
    let flat = mask.concat();
    let vocabulary = theirs.len() / flat.len();
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (position, valid) in flat.iter().enumerate() {
        if *valid == 1 {
            let at = position * vocabulary..(position + 1) * vocabulary;
            let what = format!("{what}, position {position}");
            assert_close(&what, &ours[at.clone()], &theirs[at], tolerance);
        }
    }
}

fn sides(case: &Tensors) -> Vec<&'static str> {
    let found: Vec<_> = ["none", "right", "left"]
        .into_iter()
        .filter(|side| case.has(&format!("{side}.logits")))
        .collect();
    assert!(found.contains(&"none"));
    found
}

fn case(name: &str) -> Tensors {
    Tensors::open(fixtures().join("llama").join(name).join("case.safetensors"))
}

/// 1e-5: twenty units in the last place of logits of order one; see `fixtures/README.md`.
const TOLERANCE: f32 = 1e-5;

fn logits_agree_in_every_padding(device: &Device) {
    for name in LLAMAS {
        let (model, case) = (load_case(name, Generation::Five, device), case(name));
        for side in sides(&case) {
            let rows = case.rows(&format!("{side}.attention_mask"));
            let input = ModelInput {
                seed: None,
                input_ids: ids(&case.rows(&format!("{side}.input_ids")), device),
                attention_mask: Some(mask(&rows)),
            };
            let theirs = case.floats(&format!("{side}.logits")).values;
            assert_logits(
                &format!("{name}, {side}"),
                &logits(&model, &input),
                &theirs,
                &rows,
                TOLERANCE,
            );
        }
    }
}

fn losses_agree(device: &Device) {
    for name in LLAMAS {
        let (model, case) = (load_case(name, Generation::Five, device), case(name));
        let meta = json(&fixtures().join("llama").join(name).join("meta.json"));
        for side in sides(&case) {
            let input = ModelInput {
                seed: None,
                input_ids: ids(&case.rows(&format!("{side}.input_ids")), device),
                attention_mask: Some(mask(&case.rows(&format!("{side}.attention_mask")))),
            };
            let hidden = model.forward_hidden(&input, None);
            let [b, t, h] = hidden.dims();
            let labels = shifted(&case.rows(&format!("{side}.labels")));
            let count = labels.iter().filter(|l| **l >= 0).count();
            let sum = linear_cross_entropy(
                hidden.reshape([b * t, h]),
                model.head_weight().dense(),
                &labels,
            );
            let ours = floats(sum)[0] / count as f32;
            let theirs = meta["loss"][side].as_f64().expect("a loss") as f32;
            assert_close(
                &format!("{name}, {side}: loss"),
                &[ours],
                &[theirs],
                TOLERANCE,
            );
        }
    }
}

/// The label of position t is the token at t + 1.
pub fn shifted(labels: &[Vec<i64>]) -> Vec<i64> {
    labels
        .iter()
        .flat_map(|row| row[1..].iter().copied().chain([-100]))
        .collect()
}

fn both_spellings_of_a_config_are_one_model(device: &Device) {
    for name in LLAMAS {
        let case = case(name);
        let input = ModelInput {
            seed: None,
            input_ids: ids(&case.rows("none.input_ids"), device),
            attention_mask: None,
        };
        let new = logits(&load_case(name, Generation::Five, device), &input);
        let old = logits(&load_case(name, Generation::Four, device), &input);
        assert_eq!(new, old, "{name}");
    }
}

fn a_cache_changes_nothing(device: &Device) {
    for name in LLAMAS {
        // Dynamic scaling gives cached keys other frequencies than a pass over the whole row.
        if name == "rope_dynamic" {
            continue;
        }
        let (model, case) = (load_case(name, Generation::Five, device), case(name));
        let row = case.rows("none.input_ids").remove(0);
        let whole = ModelInput {
            seed: None,
            input_ids: ids(std::slice::from_ref(&row), device),
            attention_mask: None,
        };
        let whole = logits(&model, &whole);
        let mut cache = Cache::new();
        let mut stepped = Vec::new();
        for part in [&row[..5], &row[5..6], &row[6..9], &row[9..]] {
            let input = ModelInput {
                seed: None,
                input_ids: ids(&[part.to_vec()], device),
                attention_mask: None,
            };
            let hidden = model.forward_hidden(&input, Some(&mut cache));
            let [_, t, h] = hidden.dims();
            stepped.extend(floats(model.logits(hidden.reshape([t, h]))));
        }
        assert_eq!(cache.len(), row.len());
        assert_close(
            &format!("{name}, in four parts"),
            &stepped,
            &whole,
            TOLERANCE,
        );
    }
}

fn greedy_text_agrees(device: &Device) {
    for name in LLAMAS {
        let (model, case) = (load_case(name, Generation::Five, device), case(name));
        let theirs = case.ids("greedy.ids");
        let ours =
            crate::parity::generate::greedy(&model, &case.ids("greedy.prompt"), &[], theirs.len());
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn every_case_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("llama"))
        .expect("fixtures/llama")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut listed = LLAMAS.map(str::to_owned).to_vec();
    listed.sort();
    assert_eq!(folders, listed);
}

#[test]
fn stored_values_are_read_exactly() {
    for name in ["untied", "bf16", "f16", "sharded"] {
        let staged = stage(name, Generation::Five);
        let checkpoint = Checkpoint::open(staged.path()).unwrap_or_else(|e| panic!("{e}"));
        let reference = Tensors::open(fixtures().join("llama/untied/model.safetensors"));
        let names = reference.names();
        assert_eq!(checkpoint.tensors().len(), names.len(), "{name}");
        for tensor in names {
            let exact = reference.floats(&tensor).values;
            let rounded: Vec<f32> = match name {
                "bf16" => exact.iter().map(|v| round_bf16(*v)).collect(),
                "f16" => continue,
                _ => exact,
            };
            let ours = checkpoint
                .read_f32(&tensor)
                .unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(ours, rounded, "{name}: {tensor}");
        }
    }
}

/// To nearest, ties to even, as torch rounds.
fn round_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

//! Every architecture against transformers and PEFT: logits in every padding, with a cache, greedy text, a LoRA on all
//! linear layers with its gradients, its merge and twenty steps of training.

use burn::module::Module;
use burn::tensor::Device;
use enamel_adapter::export_params_of;
use enamel_model::Cache;
use enamel_model::{ArchConfig, ModelInput};

use crate::on_every_device;
use crate::parity::generate::greedy;
use crate::parity::llama::{assert_logits, floats, ids, load, logits};
use crate::support::adapted::{
    check_gradients, check_logits, check_merge, check_switch, folder, input, load_adapted,
};
use crate::support::curves::Curve;
use crate::support::goldens::{FAMILIES, Tensors, assert_close, fixtures, json};

on_every_device!(
    logits_agree_in_every_padding,
    a_cache_changes_nothing,
    greedy_text_agrees,
    a_lora_on_all_linear_layers_agrees,
    twenty_steps_agree,
);

/// As for Llama: 1e-5 on logits of order one.
const TOLERANCE: f32 = 1e-5;

fn golden(name: &str) -> Tensors {
    Tensors::open(folder(name).join("case.safetensors"))
}

fn logits_agree_in_every_padding(device: &Device) {
    for name in FAMILIES {
        let (model, golden) = (load(&folder(name), device), golden(name));
        for side in ["none", "right", "left"] {
            let (input, mask) = input(&golden, &format!("{side}."), device);
            let theirs = golden.floats(&format!("{side}.logits")).values;
            let what = format!("{name}, {side}");
            assert_logits(&what, &logits(&model, &input), &theirs, &mask, TOLERANCE);
        }
    }
}

fn a_cache_changes_nothing(device: &Device) {
    for name in FAMILIES {
        let (model, golden) = (load(&folder(name), device), golden(name));
        let row = golden.rows("none.input_ids").remove(0);
        let whole = logits(
            &model,
            &ModelInput::new(ids(std::slice::from_ref(&row), device)),
        );
        let mut cache = Cache::new();
        let mut stepped = Vec::new();
        for part in [&row[..5], &row[5..6], &row[6..9], &row[9..]] {
            let input = ModelInput::new(ids(&[part.to_vec()], device));
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
    for name in FAMILIES {
        let (model, golden) = (load(&folder(name), device), golden(name));
        let theirs = golden.ids("greedy.ids");
        let ours = greedy(&model, &golden.ids("greedy.prompt"), &[], theirs.len());
        assert_eq!(ours, theirs, "{name}");
    }
}

fn a_lora_on_all_linear_layers_agrees(device: &Device) {
    for name in FAMILIES {
        let case = format!("{name}_lora");
        check_logits(&case, device);
        check_gradients(&case, device);
        check_merge(&case, device);
        check_switch(&case, device);
    }
}

fn twenty_steps_agree(device: &Device) {
    for name in FAMILIES {
        let case = format!("{name}_lora");
        let curve = Curve::open(&case, "plain");
        let (model, _) = load_adapted(&case, true, &device.clone().autodiff());
        let model = curve.follow(model.train());
        Curve::check_end(&case, "plain", export_params_of(&model, "default"));
    }
}

#[test]
fn both_spellings_of_a_config_are_one_model() {
    for name in FAMILIES {
        let read = |file: &str| {
            let json = json(&folder(name).join(file));
            ArchConfig::from_json(&json).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        // Where nothing was spelt otherwise there is one file.
        if !folder(name).join("config.v4.json").exists() {
            continue;
        }
        let (new, old) = (read("config.json"), read("config.v4.json"));
        assert_eq!(new.decoder().rope, old.decoder().rope, "{name}");
        assert_eq!(new.modules(), old.modules(), "{name}");
    }
}

#[test]
fn every_family_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("families"))
        .expect("fixtures/families")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut listed: Vec<String> = FAMILIES
        .iter()
        .flat_map(|name| [(*name).to_owned(), format!("{name}_lora")])
        .collect();
    listed.sort();
    assert_eq!(folders, listed);
}

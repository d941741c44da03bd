//! X-LoRA against PEFT 0.18.1: logits, shares, gradients, training, and its directory.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use enamel_adapter::{
    AdapterConfig, HostTensor, LoadedAdapter, SaveMeta, XLoraConfig, adapters, attach, detach,
    export_gradients, export_trainable, load_config, load_pretrained, merge, merge_adapters, plan,
    save_pretrained, set_active, set_enabled, shapes, trainable,
};
use enamel_model::Cache;
use enamel_model::generation::{Sampling, generate};
use enamel_model::{Model, ModelInput};
use serde_json::json;
use tempfile::TempDir;

use crate::on_every_device;
use crate::parity::llama::{assert_logits, floats, ids, logits};
use crate::support::adapted::{base, batch, folder, meta, task_loss};
use crate::support::curves::Curve;
use crate::support::goldens::{
    Tensors, assert_close, assert_close_to_largest, copy, fixtures, json,
};

/// Every case, as in `fixtures/generate/xlora.py`.
const CASES: [&str; 10] = [
    "depth1",
    "depth1_layerwise",
    "depth2",
    "depth2_layerwise",
    "depth3_dropout",
    "topk",
    "topk2_of_3",
    "topk_after_softmax",
    "pass_value",
    "trainable_adapters",
];

const CURVES: [&str; 3] = ["depth1_layerwise", "depth2", "trainable_adapters"];

on_every_device!(
    logits_agree,
    shares_of_every_expert_agree,
    every_gradient_agrees,
    twenty_steps_agree,
    what_is_saved_loads_to_the_bit,
    switched_off_or_taken_off_it_leaves_the_base,
    an_expert_can_be_chosen_alone,
    a_cache_changes_nothing,
    text_is_that_of_whole_passes,
);

fn case(name: &str) -> String {
    format!("xlora/{name}")
}

/// A copy of a case's directory that names its experts by where they lie here.
fn staged(name: &str) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    let from = folder(&case(name)).join("adapter");
    let file = "adapter_model.safetensors";
    copy(&from.join(file), &dir.path().join(file));
    let mut config = json(&from.join("adapter_config.json"));
    for path in config["adapters"]
        .as_object_mut()
        .expect("experts")
        .values_mut()
    {
        let here = fixtures().join(path.as_str().expect("a path"));
        *path = json!(here);
    }
    write_config(dir.path(), &config);
    dir
}

fn write_config(dir: &Path, config: &serde_json::Value) {
    fs::write(dir.join("adapter_config.json"), config.to_string()).expect("a file");
}

fn loaded(name: &str, trainable: bool, device: &Device) -> (Model, LoadedAdapter) {
    let mut model = base(&case(name), device);
    let dir = staged(name);
    let loaded = load_pretrained(&mut model, dir.path(), trainable)
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    (model, loaded)
}

fn logits_agree(device: &Device) {
    for name in CASES {
        let (model, _) = loaded(name, false, device);
        let batch = batch(&case(name), device);
        let theirs = batch.golden.floats("right.logits").values;
        let ours = logits(&model, &batch.input);
        assert_logits(name, &ours, &theirs, &batch.mask, 1e-5);
    }
}

fn shares_of_every_expert_agree(device: &Device) {
    for name in CASES {
        let (model, loaded) = loaded(name, false, device);
        let batch = batch(&case(name), device);
        let theirs = batch.golden.floats("scalings");
        let ours = model.xlora_scalings(&batch.input).expect("an X-LoRA");
        let [rows, tokens, layers, experts] = ours.dims();
        let of_all = theirs.shape[2];
        assert_eq!(theirs.shape, [rows, tokens, of_all, experts], "{name}");
        let AdapterConfig::XLora(config) = &loaded.config else {
            panic!("{name}: {:?}", loaded.config)
        };
        assert_eq!(
            layers,
            if config.layerwise_scalings { of_all } else { 1 },
            "{name}"
        );
        let ours = floats(ours.expand([rows, tokens, of_all, experts]));
        // Padded positions mean nothing.
        let each = of_all * experts;
        for (at, real) in batch.mask.concat().iter().enumerate() {
            if *real == 1 {
                let range = at * each..(at + 1) * each;
                let what = format!("{name}, position {at}");
                assert_close(&what, &ours[range.clone()], &theirs.values[range], 1e-5);
            }
        }
    }
}

/// PEFT's name in the live model of a parameter that is trained.
fn live(key: &str) -> String {
    match key.split_once('/') {
        Some((expert, key)) => key
            .replace("base_model.model.", "lora_model.model.")
            .replace("lora_A.weight", &format!("lora_A.{expert}.weight"))
            .replace("lora_B.weight", &format!("lora_B.{expert}.weight")),
        None => key.replace("base_model.", ""),
    }
}

fn renamed(tensors: Vec<HostTensor>) -> Vec<HostTensor> {
    tensors
        .into_iter()
        .map(|(key, shape, values)| (live(&key), shape, values))
        .collect()
}

fn every_gradient_agrees(device: &Device) {
    let device = &device.clone().autodiff();
    for name in CASES {
        let (model, _) = loaded(name, true, device);
        let mut model = model.train();
        // The golden is of a model that drops nothing.
        if let Some(gate) = &mut model.mixture {
            gate.dropout.prob = 0.0;
        }
        let batch = batch(&case(name), device);
        let loss = task_loss(&model, &batch.input, &batch.golden.rows("right.labels"));
        let golden = meta(&case(name))["loss"].as_f64().expect("a loss") as f32;
        assert_close(
            &format!("{name}: loss"),
            &floats(loss.clone().inner()),
            &[golden],
            1e-5,
        );
        let ours =
            export_gradients(&model, &loss.backward()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let ours = renamed(ours);
        let mut names: Vec<_> = ours.iter().map(|(key, ..)| format!("grad.{key}")).collect();
        names.sort();
        let mut wanted = batch.golden.names();
        wanted.retain(|n| n.starts_with("grad."));
        assert_eq!(names, wanted, "{name}: parameters with a gradient");
        for (key, shape, values) in ours {
            let theirs = batch.golden.floats(&format!("grad.{key}"));
            assert_eq!(shape, theirs.shape, "{name}: {key}");
            let what = format!("{name}: {key}");
            if name == "topk" {
                // One expert's softmax is 1 whatever the classifier says.
                assert_close(&what, &values, &theirs.values, 0.0);
            } else {
                assert_close_to_largest(&what, &values, &theirs.values, 1e-4);
            }
        }
    }
}

fn twenty_steps_agree(device: &Device) {
    let device = &device.clone().autodiff();
    for name in CURVES {
        let (model, _) = loaded(name, true, device);
        let curve = Curve::open(&case(name), "plain");
        assert_eq!(curve.steps(), 20);
        let model = curve.follow(model.train());
        Curve::check_end(&case(name), "plain", export_trainable(&model).map(renamed));
    }
}

fn what_is_saved_loads_to_the_bit(device: &Device) {
    for name in CASES {
        let (mut model, loaded) = loaded(name, true, device);
        let batch = batch(&case(name), device);
        if name == "trainable_adapters" {
            // Experts that are trained along are no longer those that the file named.
            enamel_adapter::for_each_trainable_mut(&mut model, &mut |_, param| {
                if let enamel_adapter::ParamMut::Matrix(param) = param {
                    *param = param.clone().map(|value| value.mul_scalar(1.25));
                }
            });
        }
        let before = logits(&model, &batch.input);
        let dir = TempDir::new().expect("a temporary directory");
        save_pretrained(&model, &loaded.config, &SaveMeta::default(), dir.path())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let theirs = Tensors::open(folder(&case(name)).join("adapter/adapter_model.safetensors"));
        let ours = Tensors::open(dir.path().join("adapter_model.safetensors"));
        assert_eq!(ours.names(), theirs.names(), "{name}: keys of the file");
        if name == "trainable_adapters" {
            // The whole directory can be moved: its experts are inside.
            let moved = TempDir::new().expect("a temporary directory");
            let to = moved.path().join("elsewhere");
            fs::rename(dir.path(), &to).expect("moved");
            check_again(name, &to, &model, &before, device);
            let again = load_config(&to).expect("a configuration");
            let AdapterConfig::XLora(again) = again else {
                panic!("{again:?}")
            };
            assert!(
                again
                    .adapters
                    .iter()
                    .all(|(_, path)| Path::new(path).starts_with(&to))
            );
        } else {
            for key in theirs.names() {
                assert_eq!(ours.floats(&key), theirs.floats(&key), "{name}: {key}");
            }
            check_again(name, dir.path(), &model, &before, device);
        }
    }
}

fn check_again(name: &str, dir: &Path, model: &Model, before: &[f32], device: &Device) {
    let batch = batch(&case(name), device);
    let mut again = base(&case(name), device);
    load_pretrained(&mut again, dir, true).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(
        export_trainable(&again).expect("values"),
        export_trainable(model).expect("values"),
        "{name}"
    );
    assert_eq!(trainable(&again), trainable(model), "{name}");
    assert_eq!(logits(&again, &batch.input), before, "{name}");
}

fn switched_off_or_taken_off_it_leaves_the_base(device: &Device) {
    for name in ["depth1_layerwise", "pass_value"] {
        let plain = base(&case(name), device);
        let (mut model, _) = loaded(name, false, device);
        let batch = batch(&case(name), device);
        let bare = logits(&plain, &batch.input);
        let mixed = logits(&model, &batch.input);
        assert_ne!(mixed, bare, "{name}");
        set_enabled(&mut model, false);
        assert_eq!(logits(&model, &batch.input), bare, "{name}: switched off");
        assert!(model.xlora_scalings(&batch.input).is_none());
        set_enabled(&mut model, true);
        assert_eq!(
            logits(&model, &batch.input),
            mixed,
            "{name}: switched on again"
        );
        detach(&mut model);
        assert_eq!(logits(&model, &batch.input), bare, "{name}: taken off");
        assert_eq!(model.num_params(), plain.num_params(), "{name}");
    }
}

fn an_expert_can_be_chosen_alone(device: &Device) {
    let (mut model, _) = loaded("depth1", false, device);
    let batch = batch(&case("depth1"), device);
    let mixed = logits(&model, &batch.input);
    assert_eq!(adapters(&model), ["0", "1", "default"]);
    let mut alone = base(&case("depth1"), device);
    load_pretrained(&mut alone, &fixtures().join("methods/xlora/1"), false).expect("an expert");
    set_active(&mut model, &["1"]).expect("an expert");
    assert_eq!(logits(&model, &batch.input), logits(&alone, &batch.input));
    set_active(&mut model, &["default"]).expect("the mixture");
    assert_eq!(logits(&model, &batch.input), mixed);
    let error = set_active(&mut model, &["default", "0"]).expect_err("two ways at once");
    assert!(error.to_string().contains("alone"), "{error}");
}

fn a_cache_changes_nothing(device: &Device) {
    for name in ["depth2_layerwise", "pass_value", "topk2_of_3"] {
        let (model, _) = loaded(name, false, device);
        let rows = vec![
            (0..9).map(|i| (i * 7 + 3) % 128).collect::<Vec<i64>>(),
            vec![5; 9],
        ];
        let whole = model.forward_hidden(&ModelInput::new(ids(&rows, device)), None);
        let mut cache = Cache::new();
        let mut pieces = Vec::new();
        for range in [0..4, 4..7, 7..8, 8..9] {
            let part: Vec<Vec<i64>> = rows.iter().map(|row| row[range.clone()].to_vec()).collect();
            let input = ModelInput::new(ids(&part, device));
            pieces.push(model.forward_hidden(&input, Some(&mut cache)));
        }
        assert_eq!(cache.len(), 9);
        let joined = burn::tensor::Tensor::cat(pieces, 1);
        // Sums of another length are taken in another order: rounding only, up to 1.05e-5 with AVX2, less on
        // the other paths.
        assert_close(name, &floats(joined), &floats(whole), 2e-5);
    }
}

fn text_is_that_of_whole_passes(device: &Device) {
    let (model, _) = loaded("depth1_layerwise", false, device);
    let mut text = vec![1_i64, 17, 99];
    let new = generate(
        &model,
        &[1, 17, 99],
        &[],
        &Sampling::greedy(12),
        &mut |_| ControlFlow::Continue(()),
    );
    for id in new.expect("text") {
        let all = logits(&model, &ModelInput::new(ids(&[text.clone()], device)));
        let last = &all[all.len() - 128..];
        assert!(last.iter().all(|x| *x <= last[id as usize]));
        text.push(i64::from(id));
    }
    assert_eq!(text.len(), 15);
}

#[test]
fn counts_are_those_of_peft() {
    for name in CASES {
        let (model, loaded) = loaded(name, true, &Device::flex());
        let meta = meta(&case(name));
        let count = |key: &str| meta[key].as_u64().expect("a count") as usize;
        assert_eq!(loaded.plan.trainable, count("trainable"), "{name}");
        assert_eq!(loaded.plan.total, count("total"), "{name}");
        assert_eq!(model.num_params(), count("total"), "{name}");
        let elements = trainable(&model)
            .iter()
            .map(|(.., s)| s.iter().product::<usize>())
            .sum::<usize>();
        assert_eq!(elements, count("trainable"), "{name}");
        let layers: Vec<_> = loaded.plan.targets.iter().map(|t| json!(t.name)).collect();
        assert_eq!(json!(layers), meta["layers"], "{name}");
        let bare = base(&case(name), &Device::flex());
        let planned = plan(&shapes(&bare), &loaded.config).expect("a plan");
        assert_eq!(planned, loaded.plan, "{name}");
    }
}

fn config(options: serde_json::Value) -> XLoraConfig {
    let mut all = json!({
        "peft_type": "XLORA",
        "adapters": {
            "0": fixtures().join("methods/xlora/0"),
            "1": fixtures().join("methods/xlora/1"),
        },
    });
    let options = options.as_object().expect("options").clone();
    all.as_object_mut().expect("an object").extend(options);
    XLoraConfig::from_json(&all, "test").unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_new_classifier_depends_on_the_seed_and_is_all_that_is_trained() {
    let options = config(json!({"xlora_depth": 3, "xlora_size": 24, "layerwise_scalings": true}));
    let start = |seed| {
        let mut model = base(&case("depth1"), &Device::flex());
        attach(&mut model, &options, seed).unwrap_or_else(|e| panic!("{e}"));
        export_trainable(&model).expect("values")
    };
    let one = start(1);
    assert_eq!(one, start(1));
    assert_ne!(one, start(2));
    let prefix = "base_model.internal_xlora_classifier.layers.";
    let wanted: [(&str, &[usize]); 6] = [
        ("0.weight", &[24, 32]),
        ("0.bias", &[24]),
        ("3.weight", &[24, 24]),
        ("3.bias", &[24]),
        ("6.weight", &[8, 24]),
        ("6.bias", &[8]),
    ];
    assert_eq!(one.len(), wanted.len());
    for ((key, shape, values), (own, wanted)) in one.iter().zip(wanted) {
        assert_eq!(
            (key.as_str(), shape.as_slice()),
            (format!("{prefix}{own}").as_str(), wanted)
        );
        let inputs = if own.starts_with('0') { 32.0_f32 } else { 24.0 };
        let bound = 1.0 / inputs.sqrt();
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(
            largest <= bound && largest > 0.6 * bound,
            "{key}: {largest} of {bound}"
        );
    }
}

#[test]
fn training_moves_the_classifier_and_leaves_the_experts() {
    let device = Device::flex().autodiff();
    for (experts, along) in [(false, 0), (true, 16)] {
        let options = config(json!({
            "xlora_depth": 2, "xlora_size": 8, "use_trainable_adapters": experts,
        }));
        let mut model = base(&case("depth1"), &device);
        attach(&mut model, &options, 3).unwrap_or_else(|e| panic!("{e}"));
        let model = model.train();
        let batch = batch(&case("depth1"), &device);
        let loss = task_loss(&model, &batch.input, &batch.golden.rows("right.labels"));
        let grads = loss.backward();
        let reached = export_gradients(&model, &grads).expect("gradients");
        assert_eq!(reached.len(), 4 + along);
        for expert in ["0", "1"] {
            let mut with = 0;
            enamel_adapter::for_each_param_of(&model, expert, &mut |key, param| {
                with += usize::from(param.gradient(key, &grads).expect("readable").is_some());
            });
            assert_eq!(with, along / 2, "expert {expert}");
        }
    }
}

#[test]
fn dropout_in_the_classifier_is_for_training_alone() {
    let device = Device::flex().autodiff();
    let (model, _) = loaded("depth3_dropout", true, &device);
    let input = batch(&case("depth3_dropout"), &device).input;
    let plain = loaded("depth3_dropout", false, &Device::flex()).0;
    let still = batch(&case("depth3_dropout"), &Device::flex()).input;
    let model = model.train();
    assert_ne!(logits(&model, &input), logits(&model, &input), "drops");
    assert_eq!(
        logits(&model.valid(), &still),
        logits(&plain, &still),
        "does not drop"
    );
}

#[test]
fn nothing_is_merged() {
    let (mut model, _) = loaded("depth1", false, &Device::flex());
    let before = logits(&model, &batch(&case("depth1"), &Device::flex()).input);
    for error in [
        merge(&mut model).expect_err("a mixture"),
        merge_adapters(&mut model, &["0"]).expect_err("an expert"),
        merge_adapters(&mut model, &["default"]).expect_err("a mixture"),
    ] {
        assert!(error.to_string().contains("anew for each token"), "{error}");
    }
    enamel_adapter::unmerge(&mut model);
    assert_eq!(
        logits(&model, &batch(&case("depth1"), &Device::flex()).input),
        before
    );
}

#[test]
fn an_expert_beside_the_adapter_comes_before_one_in_the_working_directory() {
    let dir = TempDir::new().expect("a temporary directory");
    let staged = staged("depth1");
    let classifier = "adapter_model.safetensors";
    copy(
        &staged.path().join(classifier),
        &dir.path().join(classifier),
    );
    for expert in ["0", "1"] {
        let to = dir.path().join("experts").join(expert);
        fs::create_dir_all(&to).expect("a folder");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            copy(
                &fixtures().join("methods/xlora").join(expert).join(name),
                &to.join(name),
            );
        }
    }
    let mut config = json(&staged.path().join("adapter_config.json"));
    // The second one from the working directory, which is this package's.
    config["adapters"] = json!({"0": "experts/0", "1": "fixtures/methods/xlora/1"});
    write_config(dir.path(), &config);
    let mut model = base(&case("depth1"), &Device::flex());
    load_pretrained(&mut model, dir.path(), false).unwrap_or_else(|e| panic!("{e}"));
    let batch = batch(&case("depth1"), &Device::flex());
    let theirs = batch.golden.floats("right.logits").values;
    assert_logits(
        "depth1",
        &logits(&model, &batch.input),
        &theirs,
        &batch.mask,
        1e-5,
    );
}

#[test]
fn every_case_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = fs::read_dir(fixtures().join("methods/xlora"))
        .expect("fixtures/methods/xlora")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.parse::<usize>().is_err())
        .collect();
    folders.sort();
    let mut listed = CASES.map(str::to_owned).to_vec();
    listed.sort();
    assert_eq!(folders, listed);
    let with_curve = CASES
        .iter()
        .filter(|c| folder(&case(c)).join("curve_plain.json").is_file());
    assert!(with_curve.eq(CURVES.iter()));
}

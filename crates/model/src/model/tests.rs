//! What loading a model and running it must do.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::*;
use crate::testing::{MemorySource, devices, distance, ids, llama, tiny_config, values};
use enamel_adapter::{DEFAULT, LoraConfig, Targets, attach};
use enamel_kernels::{CpuPath, KeyMask, holds_bf16};
use serde_json::json;

fn random(changes: serde_json::Value) -> Model {
    Model::random(&tiny_config(changes), 7, &Device::flex()).unwrap()
}

fn run(model: &Model, rows: &[&[i64]], mask: Option<&[&[bool]]>) -> Vec<f32> {
    let attention_mask = mask.map(|rows| KeyMask {
        valid: Arc::new(rows.concat()),
        batch: rows.len(),
        keys: rows[0].len(),
    });
    let input = ModelInput {
        input_ids: ids(rows, &model.device()),
        attention_mask,
        seed: None,
    };
    values(model.forward_hidden(&input, None))
}

#[test]
fn slots_are_the_modules_that_the_configuration_lists() {
    for changes in [
        json!({}),
        json!({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}),
        json!({"model_type": "qwen2", "head_dim": 6}),
    ] {
        let mut model = random(changes);
        let mut shapes = Vec::new();
        model.for_each_slot_ref(&mut |name, slot| {
            let (shape, bias) = match slot {
                SlotRef::Linear(l) => (l.weight.dims().to_vec(), l.bias.is_some()),
                SlotRef::Embedding(e) => (e.weight.dims().to_vec(), false),
                SlotRef::Norm(n) => (n.weight.dims().to_vec(), n.bias.is_some()),
                SlotRef::Conv(n) => (n.weight.dims().to_vec(), n.bias.is_some()),
                SlotRef::Param(n) => (n.weight.dims().to_vec(), false),
            };
            shapes.push((name.to_owned(), shape, bias));
        });
        let listed: Vec<_> = model
            .config()
            .modules()
            .into_iter()
            .map(|module| (module.name, module.shape, module.bias))
            .collect();
        assert_eq!(shapes, listed);
        let mut names = Vec::new();
        model.for_each_slot(&mut |name, _| names.push(name.to_owned()));
        assert!(names.iter().eq(listed.iter().map(|(name, ..)| name)));
    }
}

#[test]
fn a_loaded_model_computes_the_same() {
    let model = random(json!({"attention_bias": true, "mlp_bias": true}));
    let source = MemorySource::of(&model);
    for device in devices() {
        let loaded = Model::load(model.config(), &source, &device).unwrap();
        let rows: &[&[i64]] = &[&[1, 5, 9, 3], &[2, 2, 39, 0]];
        let (a, b) = (run(&model, rows, None), run(&loaded, rows, None));
        // Two backends order their sums differently: a few units in the last place.
        assert!(distance(&a, &b) < 1e-5, "{device:?}");
    }
}

#[test]
fn all_mismatches_are_in_one_error_and_no_value_is_read() {
    let model = random(json!({}));
    let mut source = MemorySource::of(&model);
    source.remove("model.norm.weight");
    source.remove("model.layers.1.mlp.up_proj.weight");
    source.put("score.weight", &[2, 16], Vec::new());
    source.put(
        "model.layers.0.self_attn.k_proj.weight",
        &[16, 16],
        Vec::new(),
    );
    source.put(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        &[2],
        Vec::new(),
    );
    let source = source.without_values();
    let error = Model::load(model.config(), &source, &Device::flex()).unwrap_err();
    let LoadError::Mismatch {
        missing,
        unexpected,
        misshapen,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        *missing,
        ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    );
    assert_eq!(*unexpected, ["score.weight"]);
    let name = "model.layers.0.self_attn.k_proj.weight".to_owned();
    let expected = Misshapen {
        name,
        expected: vec![8, 16],
        found: vec![16, 16],
    };
    assert_eq!(*misshapen, [expected]);
    let text = error.to_string();
    assert!(
        text.contains("[16, 16] in the checkpoint, [8, 16] needed"),
        "{text}"
    );
}

#[test]
fn a_source_that_lies_about_a_shape_is_an_error() {
    let model = random(json!({}));
    let source = MemorySource::of(&model).without_values();
    let error = Model::load(model.config(), &source, &Device::flex()).unwrap_err();
    assert!(matches!(error, LoadError::WrongLength { .. }), "{error}");
}

#[test]
fn a_tied_head_follows_the_file() {
    let model = random(json!({"tie_word_embeddings": true}));
    let config = model.config();
    let load = |source: &MemorySource| Model::load(config, source, &Device::flex()).unwrap();
    let is_tied = |model: &Model| {
        let mut tied = true;
        model.for_each_slot_ref(&mut |name, _| tied &= name != "lm_head");
        assert_eq!(model.config().tie_word_embeddings, tied);
        tied
    };
    let mut source = MemorySource::of(&model);
    assert!(is_tied(&load(&source)));
    let embedding = values(model.head_weight().dense());
    source.put("lm_head.weight", &[40, 16], embedding.clone());
    assert!(
        is_tied(&load(&source)),
        "an identical head is the embedding"
    );
    source.remove("model.embed_tokens.weight");
    let swapped = load(&source);
    assert!(
        is_tied(&swapped),
        "the head's name will do for the embedding"
    );
    assert_eq!(values(swapped.head_weight().dense()), embedding);
    source.put("lm_head.weight", &[40, 16], vec![0.5; 640]);
    source.put("model.embed_tokens.weight", &[40, 16], embedding);
    let untied = load(&source);
    assert!(!is_tied(&untied), "a differing head stays its own");
    assert_eq!(values(untied.head_weight().dense()), [0.5; 640]);
    assert_eq!(
        untied.config().to_json()["tie_word_embeddings"],
        json!(false)
    );
}

#[test]
fn random_weights_depend_on_seed_and_name_only() {
    let weights = |seed, changes| {
        let model = Model::random(&tiny_config(changes), seed, &Device::flex()).unwrap();
        values(llama(&model).layers[0].mlp.up_proj.weight.dense())
    };
    assert_eq!(
        weights(1, json!({})),
        weights(1, json!({"num_hidden_layers": 5}))
    );
    assert_ne!(weights(1, json!({})), weights(2, json!({})));
    let all = weights(3, json!({"intermediate_size": 4000}));
    let deviation = (all.iter().map(|x| x * x).sum::<f32>() / all.len() as f32).sqrt();
    // 64,000 samples: the estimate's own deviation is 0.3 / sqrt(128,000), about 0.0008.
    assert!((deviation - 0.3).abs() < 0.005, "{deviation}");
}

#[test]
fn padding_changes_nothing_for_the_real_tokens() {
    for changes in [
        json!({}),
        json!({"model_type": "mistral", "sliding_window": 3}),
        json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ] {
        let model = random(changes);
        let alone = run(&model, &[&[4, 8, 15, 16]], None);
        let full = [true; 6];
        let right = [true, true, true, true, false, false];
        let left = [false, false, true, true, true, true];
        let both = run(
            &model,
            &[
                &[4, 8, 15, 16, 0, 0],
                &[0, 0, 4, 8, 15, 16],
                &[9, 9, 9, 9, 9, 9],
            ],
            Some(&[&right, &left, &full]),
        );
        // Left padding turns queries and keys by larger angles, which cancel up to rounding.
        assert!(distance(&alone, &both[..64]) < 1e-5);
        assert!(distance(&alone, &both[96 + 32..192]) < 1e-5);
    }
}

#[test]
fn logits_are_the_head_product() {
    for tied in [true, false] {
        let model = random(json!({"tie_word_embeddings": tied}));
        let hidden = Tensor::<2>::ones([3, 16], &Device::flex());
        let product = hidden
            .clone()
            .matmul(model.head_weight().dense().transpose());
        assert!(distance(&values(model.logits(hidden)), &values(product)) < 1e-6);
    }
}

#[test]
fn gradients_reach_what_is_trained_and_nothing_else() {
    for device in devices() {
        let device = device.autodiff();
        let config = tiny_config(json!({"tie_word_embeddings": true}));
        let mut model = Model::random(&config, 3, &device).unwrap();
        let whole = LoraConfig {
            target_modules: Some(Targets::Nothing),
            modules_to_save: Some(vec!["layers.0.input_layernorm".into()]),
            ..LoraConfig::default()
        };
        attach(&mut model, &whole, 1).unwrap();
        let input = ModelInput::new(ids(&[&[1, 2, 3]], &device));
        let hidden = model.forward_hidden(&input, None).reshape([3, 16]);
        let gradients = model.logits(hidden).powf_scalar(2.0).sum().backward();
        let llama = llama(&model);
        let norm = &llama.layers[0].input_layernorm;
        let trained = norm
            .part(DEFAULT)
            .unwrap()
            .saved
            .as_ref()
            .unwrap()
            .val()
            .grad(&gradients)
            .unwrap();
        let largest = values(trained)
            .into_iter()
            .fold(0.0, |a: f32, b| a.max(b.abs()));
        assert!(largest.is_finite() && largest > 1e-6, "{largest}");
        assert!(norm.weight.val().grad(&gradients).is_none());
        assert!(llama.embed_tokens.weight.dense().grad(&gradients).is_none());
        let evaluated = model.valid();
        assert!(!evaluated.device().is_autodiff());
        let rows: &[&[i64]] = &[&[1, 2, 3]];
        assert!(distance(&run(&evaluated, rows, None), &run(&model, rows, None)) < 1e-6);
    }
}

/// Every parameter rounded to bf16, as a checkpoint in f32.
fn rounded_source(model: &Model) -> MemorySource {
    let mut source = MemorySource::of(model);
    let tensors = source.tensors().to_vec();
    for info in tensors {
        let values = HostValues::F32(source.read_f32(&info.name).unwrap());
        source.put(&info.name, &info.shape, values.rounded().into_f32());
    }
    source
}

#[test]
fn a_bf16_model_computes_what_an_f32_model_of_the_rounded_weights_does() {
    for changes in [
        json!({"attention_bias": true, "mlp_bias": true}),
        json!({"tie_word_embeddings": true}),
    ] {
        let config = tiny_config(changes.clone());
        let (model, rows) = (random(changes), [[1, 2, 3, 4, 5, 6, 7, 8].as_slice()]);
        let source = MemorySource::of(&model);
        for device in devices() {
            let wide = Model::load(&config, &rounded_source(&model), &device).unwrap();
            let narrow = Model::load_for(&config, &source, &device, &Compute::Bf16.into()).unwrap();
            let logits = |model: &Model| {
                let input = ModelInput::new(ids(&rows, &device));
                let hidden = model.forward_hidden(&input, None);
                values(model.logits(hidden.reshape([8, 16])))
            };
            // On a processor that multiplies bf16, x is rounded too.
            let exact = !matches!(CpuPath::chosen(), CpuPath::Amx | CpuPath::Avx512Bf16);
            let gap = distance(&logits(&narrow), &logits(&wide));
            assert!(gap < if exact { 1e-5 } else { 0.1 }, "{gap}");
            let head = narrow.head_weight();
            assert_eq!(head.compute(), Compute::Bf16);
            let held = head.values().dtype() == burn::tensor::DType::BF16;
            assert_eq!(held, holds_bf16(&device));
            // A decoding step reads the same weights without rounding x.
            let mut cache = Cache::new();
            let step = |model: &Model, cache: &mut Cache| {
                let input = ModelInput::new(ids(&[&[3]], &device));
                values(model.forward_hidden(&input, Some(cache)))
            };
            let narrow_step = step(&narrow, &mut cache);
            let wide_step = step(&wide, &mut Cache::new());
            assert!(distance(&narrow_step, &wide_step) < 1e-5);
        }
    }
}

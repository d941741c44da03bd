use std::num::NonZeroUsize;

use enamel_kernels::quantized::formats::{FloatKind, FourBit};
use enamel_model::checkpoint::StoredPacked;
use enamel_model::{ArchConfig, Format, Quantization};
use serde_json::json;

use super::*;
use crate::optimizer::Optim;
use crate::recipe::Recipe;

fn config(changes: serde_json::Value) -> ArchConfig {
    let mut json = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "vocab_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "tie_word_embeddings": true
    });
    let map = json.as_object_mut().unwrap();
    map.extend(changes.as_object().unwrap().clone());
    ArchConfig::from_json(&json).unwrap()
}

fn model(config: &ArchConfig, set: &[&str]) -> ModelSizes {
    let adapter = Recipe::for_model("none", set).unwrap().adapter.config(1000);
    let plan = enamel_adapter::plan(&config.modules(), &adapter).unwrap();
    ModelSizes::new(config, &adapter, &plan)
}

fn settings(batch: usize, length: usize) -> Settings {
    Settings {
        batch,
        accumulation: 1,
        length,
        every: None,
        optim: Optim::AdamwTorch,
        weights: Weights::F32,
        quantization: Quantization::default(),
        threads: 2,
        kind: Kind::Kernels,
    }
}

const ALL: &str = "adapter.target_modules=all-linear";

/// A short run on a wide model needs most while LoftQ decomposes two of its widest layers.
#[test]
fn loftqs_start_is_counted_where_it_is_the_most() {
    let wide = config(json!({"hidden_size": 512, "intermediate_size": 1024}));
    let four = "model.quantization.load_in_4bit=true";
    let start = "adapter.init_lora_weights=loftq";
    let plain = estimate(&model(&wide, &[ALL, four]), &settings(1, 4));
    let f = estimate(&model(&wide, &[ALL, four, start]), &settings(1, 4));
    assert_eq!(f.workspace, 2 * (12 * 512 * 1024 + 72 * 512 * 512));
    assert_eq!(f.tensors() - f.base - f.adapter - f.optimizer, f.workspace);
    assert!(plain.peak() < f.peak());
    let long = |set: &[&str]| estimate(&model(&wide, set), &settings(64, 512)).peak();
    assert_eq!(
        long(&[ALL, four]),
        long(&[ALL, four, start]),
        "a step is more"
    );
}

#[test]
fn every_part_of_a_small_lora_is_counted_by_hand() {
    let model = model(&config(json!({})), &["adapter.r=2", ALL]);
    let f = estimate(&model, &settings(3, 5));
    // Embedding 40·8; a block: q and o 8·8, k and v 4·8, three of the MLP 12·8, two norms; the last norm.
    assert_eq!(f.base, 4 * (320 + 2 * (2 * 64 + 2 * 32 + 3 * 96 + 16) + 8));
    // A and B of rank 2: in + out of each layer.
    let trained = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 20);
    assert_eq!(
        (f.adapter, f.gradients, f.optimizer),
        (4 * trained, 4 * trained, 8 * trained)
    );
    // A token: two norms' inputs and numbers, q k v, output, a number a head, gate and up, seven times r.
    let row = 2 * (8 + 1) + (8 + 4 + 4) + 8 + 2 + 2 * 12 + 7 * 2;
    assert_eq!(f.activations, 4 * 15 * (2 * row + 8 + 1));
    // The norm's output, a tile of all rows and tokens, two copies of the rows, and the gradient.
    assert_eq!(f.logits, 4 * 15 * (8 + 40 + 2 * 8 + 8));
    let sum = f.base + f.adapter + f.gradients + f.optimizer + f.activations + f.logits;
    assert_eq!(f.peak(), sum + f.workspace + f.runtime - f.overlap);
}

#[test]
fn checkpointing_keeps_inputs_and_one_segment() {
    let model = model(
        &config(json!({"num_hidden_layers": 5})),
        &["adapter.r=2", ALL],
    );
    let kept = |every: Option<usize>| {
        let every = every.and_then(NonZeroUsize::new);
        estimate(
            &model,
            &Settings {
                every,
                ..settings(3, 5)
            },
        )
        .activations
    };
    let tail = 4 * 15 * 9;
    let block = (kept(None) - tail) / 5;
    let input = 4 * 15 * 8;
    // The input of the segment at hand is what its first block keeps.
    assert_eq!(kept(Some(1)), 4 * input + block);
    // Segments of 2, 2 and 1 blocks.
    assert_eq!(kept(Some(2)), 2 * input + 2 * block);
}

/// A mask is made again in the backward pass; without the kernels it is kept, with what it left of the input.
#[test]
fn dropout_costs_nothing_where_the_kernels_run() {
    let of = |set: &[&str], kind| {
        let model = model(&config(json!({})), set);
        let settings = Settings {
            kind,
            ..settings(3, 5)
        };
        estimate(&model, &settings).activations
    };
    let plain = ["adapter.r=2", ALL];
    let drops = ["adapter.r=2", ALL, "adapter.lora_dropout=0.1"];
    assert_eq!(of(&plain, Kind::Kernels), of(&drops, Kind::Kernels));
    assert!(of(&plain, Kind::Reference) < of(&drops, Kind::Reference));
}

/// LLM.int8() is not fused: the adapters keep the normalised rows and the gated ones.
#[test]
fn int8_keeps_the_inputs_of_its_adapters() {
    let model = model(&config(json!({})), &["adapter.r=2", ALL]);
    let of = |format| {
        let quantization = Quantization {
            format,
            ..Quantization::default()
        };
        let settings = Settings {
            quantization,
            ..settings(3, 5)
        };
        estimate(&model, &settings).activations
    };
    let int8 = of(Some(Format::Int8 { threshold: 6.0 }));
    // Two blocks of two norms and a gated product, for 15 tokens.
    assert_eq!(int8 - of(None), 4 * 15 * 2 * (2 * 8 + 12));
}

#[test]
fn head_embedding_and_skipped_modules_stay_dense() {
    let model = model(
        &config(json!({"tie_word_embeddings": false})),
        &["adapter.r=2", ALL],
    );
    let int8 = |skip: &[&str]| Settings {
        quantization: Quantization {
            format: Some(Format::Int8 { threshold: 6.0 }),
            skip_modules: skip.iter().map(|s| (*s).to_owned()).collect(),
            dequantize: false,
        },
        ..settings(1, 4)
    };
    let dense = 4 * (2 * 320 + 2 * 16 + 8);
    let linear = 2 * (2 * 64 + 2 * 32 + 3 * 96);
    let rows = 2 * (8 + 4 + 4 + 8 + 12 + 12 + 8);
    let base = |skip: &[&str]| estimate(&model, &int8(skip)).base;
    assert_eq!(base(&[]), dense + linear + 4 * rows);
    let down = 2 * 96;
    assert_eq!(base(&["down_proj"]), base(&[]) + 3 * down - 4 * 2 * 8);
}

#[test]
fn accumulation_keeps_the_sum_beside_a_pass_s_gradients() {
    let model = model(&config(json!({})), &["adapter.r=2", ALL]);
    let summed = Settings {
        accumulation: 2,
        ..settings(1, 4)
    };
    let (one, two) = (estimate(&model, &settings(1, 4)), estimate(&model, &summed));
    assert_eq!(two.gradients, 2 * one.gradients);
    assert!(two.peak() > one.peak());
}

#[test]
fn bf16_halves_matrices_and_leaves_norms() {
    let model = model(&config(json!({})), &["adapter.r=2", ALL]);
    let bf16 = Settings {
        weights: Weights::Bf16,
        ..settings(1, 4)
    };
    let norms = 4 * (2 * 16 + 8);
    let base = estimate(&model, &settings(1, 4)).base;
    assert_eq!(estimate(&model, &bf16).base, (base - norms) / 2 + norms);
}

/// NF4 with double quantisation.
fn nf4() -> Quantization {
    Quantization {
        format: Some(Format::FourBit {
            kind: FourBit::Nf4,
            block: 64,
            double: true,
            compute: FloatKind::F32,
        }),
        ..Quantization::default()
    }
}

#[test]
fn weights_that_the_file_has_quantised_stay_so_unless_the_recipe_says_otherwise() {
    let mut model = model(&config(json!({})), &["adapter.r=2", ALL]);
    let name = "model.layers.0.self_attn.q_proj.weight".to_owned();
    let dense = estimate(&model, &settings(1, 4)).base;
    let of = |model: &ModelSizes, quantization: Quantization| {
        let settings = Settings {
            quantization,
            ..settings(1, 4)
        };
        estimate(model, &settings).base
    };
    let int8 = || Quantization {
        format: Some(Format::Int8 { threshold: 6.0 }),
        ..Quantization::default()
    };
    let quantised = of(&model, int8());
    for bitsandbytes in [false, true] {
        let stored = StoredPacked {
            bytes: 41,
            bitsandbytes,
        };
        model.packed.insert(name.clone(), stored);
        assert_eq!(of(&model, Quantization::default()), dense - 4 * 64 + 41);
        assert_eq!(of(&model, Quantization::dense()), dense);
        // GGUF's blocks are quantised anew, codes of bitsandbytes are not.
        let kept = if bitsandbytes { 41 } else { 64 + 4 * 8 };
        assert_eq!(of(&model, int8()), quantised - (64 + 4 * 8) + kept);
    }
}

fn llama_3_8b() -> ArchConfig {
    let text = include_str!("../../../../tests/fixtures/plan/llama-3-8b/config.json");
    ArchConfig::from_json(&serde_json::from_str(text).unwrap()).unwrap()
}

/// The literature's figures for QLoRA on Llama-3-8B at rank 64 on all seven, 4 × 2048 with gradient
/// checkpointing: about 4 GB for the base (without embedding and head, which stay dense), 0.1 for the
/// adapter and 0.1 for its gradients in bf16, 0.4 for the optimizer, 3 to 4 for activations. Adapter,
/// gradients and moments are f32 here.
#[test]
fn llama_3_8b_in_nf4_is_what_the_literature_says() {
    let model = model(&llama_3_8b(), &["adapter.r=64", ALL]);
    let f = estimate(
        &model,
        &Settings {
            quantization: nf4(),
            weights: Weights::Bf16,
            every: NonZeroUsize::new(1),
            ..settings(4, 2048)
        },
    );
    let gb = |bytes: usize| bytes as f64 / 1e9;
    let dense = 2 * 2 * 128_256 * 4096 + 65 * 4096 * 4;
    assert!((3.5..4.1).contains(&gb(f.base - dense)), "{f}");
    assert!((0.6..0.7).contains(&gb(f.adapter)), "{f}");
    assert_eq!(f.optimizer, 2 * f.gradients);
    // The inputs of 32 blocks are 4.3 GB in f32, which is 2.1 in the literature's bf16.
    assert!((4.0..8.0).contains(&gb(f.activations)), "{f}");
}

#[test]
fn proposals_go_from_the_cheap_to_the_dear() {
    let model = model(&llama_3_8b(), &["adapter.r=64", ALL]);
    let start = settings(4, 2048);
    let take = |gigabytes: f64| fit(&model, &start, (gigabytes * 1e9) as usize);
    let lines = |p: &Proposal| p.changes.iter().map(|c| c.line.clone()).collect::<Vec<_>>();

    let enough = take(500.0);
    assert!(enough.fits() && enough.changes.is_empty());
    let checkpointing = take(0.95 * estimate(&model, &start).peak() as f64 / 1e9);
    assert_eq!(lines(&checkpointing), ["gradient_checkpointing = true"]);
    let small = take(12.0);
    assert!(small.fits(), "{small}\n{}", small.footprint);
    assert!(
        lines(&small).contains(&"load_in_4bit = true".to_owned()),
        "{small}"
    );
    assert_eq!(small.settings.batch * small.settings.accumulation, 4);
    assert_eq!(
        small.settings.length, 2048,
        "rows are shortened last:\n{small}"
    );
    // So little that nothing helps.
    let none = take(0.5);
    assert!(!none.fits());
    assert!(
        lines(&none)
            .iter()
            .any(|line| line.starts_with("max_length"))
    );
}

#[test]
fn amounts_of_memory_are_read_as_people_write_them() {
    for (text, bytes) in [
        ("12GB", 12_000_000_000),
        ("8GiB", 8 << 30),
        ("1.5 gb", 1_500_000_000),
        ("600M", 600_000_000),
        ("77", 77),
    ] {
        assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
    }
    for wrong in [
        "",
        "GB",
        "12 parsecs",
        "-3GB",
        "0",
        "1e99GB",
        "99999999999TB",
    ] {
        assert!(parse_bytes(wrong).unwrap_err().contains("12GB"), "{wrong}");
    }
}

#[test]
fn the_table_names_every_part_and_adds_up() {
    let f = Footprint {
        base: 1 << 30,
        logits: 1 << 20,
        overlap: 1 << 19,
        ..Footprint::default()
    };
    let text = f.to_string();
    for part in [
        "base",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "runtime",
        "not at once",
        "peak             1.0 GiB",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
}

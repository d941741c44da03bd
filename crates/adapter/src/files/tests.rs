//! What an adapter directory must do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use super::*;
use crate::methods::lora::config::LoraConfig;
use crate::model::attach::{attach, detach};
use crate::model::trainable::{export_trainable, trainable};
use crate::testing::{Tiny, perturb};
use burn::tensor::Device;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use std::fs;
use tempfile::TempDir;

fn config() -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 16.0,
        target_modules: Some(Targets::AllLinear),
        modules_to_save: Some(vec!["lm_head".into(), "model.norm".into()]),
        rank_pattern: vec![("v_proj".into(), 2), ("up_proj".into(), 3)],
        ..LoraConfig::default()
    }
}

fn meta() -> SaveMeta {
    SaveMeta {
        base_model_name_or_path: Some("org/tiny \"quoted\"".into()),
        revision: None,
        task_type: Some("CAUSAL_LM".into()),
        made: Made {
            base: Some("sha256:0123".into()),
            ..Made::default()
        },
        extra_readme: Some("## Training".into()),
    }
}

/// A model with an adapter, and the directory it was saved to.
fn saved() -> (Tiny, TempDir) {
    let mut model = Tiny::new(&Device::flex());
    attach(&mut model, &config(), 1).unwrap();
    perturb(&mut model);
    let dir = TempDir::new().unwrap();
    save_pretrained(&model, &config(), &meta(), dir.path()).unwrap();
    (model, dir)
}

/// The file's tensors as (name, dtype, shape, bytes).
type Raw = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites the tensors of the directory.
fn edit(dir: &Path, change: impl FnOnce(&mut Raw)) {
    let bytes = fs::read(dir.join(WEIGHTS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut raw: Raw = file
        .tensors()
        .into_iter()
        .map(|(n, v)| (n, v.dtype(), v.shape().to_vec(), v.data().to_vec()))
        .collect();
    raw.sort_by(|a, b| a.0.cmp(&b.0));
    change(&mut raw);
    let views = raw
        .iter()
        .map(|(n, d, s, b)| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(
        dir.join(WEIGHTS),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
}

fn load(dir: &Path) -> Result<LoadedAdapter> {
    load_pretrained(&mut Tiny::new(&Device::flex()), dir, false)
}

fn problems(dir: &Path) -> Vec<String> {
    match load(dir) {
        Err(AdapterError::Mismatch { problems, .. } | AdapterError::Plan { problems }) => problems,
        other => panic!("expected problems, got {other:?}"),
    }
}

#[test]
fn what_is_saved_loads_to_the_bit() {
    let (model, dir) = saved();
    let mut other = Tiny::new(&Device::flex());
    let loaded = load_pretrained(&mut other, dir.path(), true).unwrap();
    assert_eq!(
        export_trainable(&other).unwrap(),
        export_trainable(&model).unwrap()
    );
    assert_eq!(trainable(&other), trainable(&model));
    assert_eq!(other.logits(), model.logits());
    let AdapterConfig::Lora(lora) = &loaded.config else {
        panic!()
    };
    assert_eq!(lora.r, 4);
    assert_eq!(loaded.plan.saved.len(), 2);
    // Written again it is the same bytes, so nothing of it depends on time or hash order.
    let again = TempDir::new().unwrap();
    save_pretrained(&other, &loaded.config, &meta(), again.path()).unwrap();
    for name in [CONFIG, WEIGHTS, "README.md"] {
        assert_eq!(
            fs::read(dir.path().join(name)).unwrap(),
            fs::read(again.path().join(name)).unwrap(),
            "{name}"
        );
    }
    assert_eq!(fs::read_dir(again.path()).unwrap().count(), 3);
}

#[test]
fn the_directory_is_pefts() {
    let (_, dir) = saved();
    let json: Value = serde_json::from_slice(&fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(json["base_model_name_or_path"], "org/tiny \"quoted\"");
    assert_eq!(json["inference_mode"], true);
    assert_eq!(json["target_modules"].as_array().unwrap().len(), 14);
    let bytes = fs::read(dir.path().join(WEIGHTS)).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let names = header.offset_keys();
    assert!(names.is_sorted());
    for name in [
        "base_model.model.lm_head.bias",
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.norm.weight",
    ] {
        assert!(names.iter().any(|n| n == name), "{name}");
    }
    assert_eq!(names.len(), 14 * 2 + 3);
    let card = fs::read_to_string(dir.path().join("README.md")).unwrap();
    assert!(
        card.starts_with("---\nbase_model: \"org/tiny \\\"quoted\\\"\"\nlibrary_name: peft\n"),
        "{card}"
    );
    assert!(card.ends_with("## Training\n"));
}

#[test]
fn trainability_is_as_asked() {
    let (_, dir) = saved();
    for wanted in [true, false] {
        let mut model = Tiny::new(&Device::flex().autodiff());
        load_pretrained(&mut model, dir.path(), wanted).unwrap();
        let tracked = model
            .forward(crate::testing::ids(&Device::flex().autodiff()))
            .is_tracked();
        assert_eq!(tracked, wanted);
    }
}

#[test]
fn every_difference_is_in_one_error_and_the_model_is_left_alone() {
    let (_, dir) = saved();
    edit(dir.path(), |raw| {
        raw.retain(|(name, ..)| !name.ends_with("0.self_attn.q_proj.lora_B.weight"));
        let name = |end: &str| raw.iter().position(|(n, ..)| n.ends_with(end)).unwrap();
        let (shape, ints, nan) = (
            name("0.mlp.up_proj.lora_A.weight"),
            name("model.norm.weight"),
            name("1.mlp.up_proj.lora_A.weight"),
        );
        raw[shape].2 = vec![64, 3];
        raw[ints].1 = Dtype::I32;
        raw[nan].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        raw.push((
            "base_model.model.../../etc/passwd".into(),
            Dtype::F32,
            vec![1],
            vec![0; 4],
        ));
    });
    let mut model = Tiny::new(&Device::flex());
    let before = model.logits();
    let message = load_pretrained(&mut model, dir.path(), false)
        .unwrap_err()
        .to_string();
    for part in [
        "q_proj.lora_B.weight [64, 4] is missing",
        "up_proj.lora_A.weight is [64, 3] where the model and the configuration need [3, 64]",
        "norm.weight is I32",
        "1.mlp.up_proj.lora_A.weight holds a value that is not finite",
        "../../etc/passwd does not belong",
        "made for org/tiny",
    ] {
        assert!(message.contains(part), "{part} not in {message}");
    }
    assert_eq!(model.logits(), before);
    assert!(trainable(&model).is_empty());
}

#[test]
fn another_base_is_told_by_names_and_shapes() {
    let (_, dir) = saved();
    // The same names with one module gone: a tied model has no head.
    let mut tied = Tiny::with(&Device::flex(), false);
    let message = load_pretrained(&mut tied, dir.path(), false)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("lm_head.weight does not belong"),
        "{message}"
    );
    // No target matches at all.
    let text = fs::read_to_string(dir.path().join(CONFIG))
        .unwrap()
        .replace("model.layers", "transformer.h");
    fs::write(
        dir.path().join(CONFIG),
        text.replace("\"lm_head\",", "")
            .replace("model.norm", "ln_f"),
    )
    .unwrap();
    assert!(problems(dir.path())[0].contains("nothing to adapt"));
}

#[test]
fn half_precision_files_load_as_their_values() {
    let (model, dir) = saved();
    for (dtype, round) in [
        (
            Dtype::F16,
            (|v| f16::from_f32(v).to_f32()) as fn(f32) -> f32,
        ),
        (Dtype::BF16, |v| bf16::from_f32(v).to_f32()),
    ] {
        save_pretrained(&model, &config(), &meta(), dir.path()).unwrap();
        edit(dir.path(), |raw| {
            for (_, d, _, bytes) in raw {
                *d = dtype;
                let values = bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                *bytes = values
                    .flat_map(|v| match dtype {
                        Dtype::F16 => f16::from_f32(v).to_le_bytes(),
                        _ => bf16::from_f32(v).to_le_bytes(),
                    })
                    .collect();
            }
        });
        let mut other = Tiny::new(&Device::flex());
        load_pretrained(&mut other, dir.path(), false).unwrap();
        let read = export_trainable(&other).unwrap();
        for ((_, _, a), (_, _, b)) in read.iter().zip(export_trainable(&model).unwrap()) {
            assert_eq!(*a, b.iter().map(|v| round(*v)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn base_weights_beside_the_adapter_must_be_this_bases() {
    let (_, dir) = saved();
    let mut base = Vec::new();
    Tiny::new(&Device::flex()).for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Embedding(table) = slot {
            base = crate::base::to_host("embed", table.weight.dense()).unwrap();
        }
    });
    let mut bytes: Vec<u8> = base.iter().flat_map(|v| v.to_le_bytes()).collect();
    let name = "base_model.model.model.embed_tokens.weight".to_string();
    edit(dir.path(), |raw| {
        raw.push((name.clone(), Dtype::F32, vec![256, 64], bytes.clone()))
    });
    load(dir.path()).unwrap();
    bytes[3] ^= 1;
    edit(dir.path(), |raw| {
        raw.iter_mut()
            .filter(|(n, ..)| *n == name)
            .for_each(|t| t.3 = bytes.clone())
    });
    assert!(problems(dir.path())[0].contains("embed_tokens.weight does not belong"));
}

#[test]
fn broken_files_are_errors() {
    let (_, dir) = saved();
    let path = dir.path().join(WEIGHTS);
    let whole = fs::read(&path).unwrap();
    let check = |bytes: &[u8], part: &str| {
        fs::write(&path, bytes).unwrap();
        let message = load(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(part) && message.contains(WEIGHTS),
            "{message}"
        );
    };
    check(&[], "empty");
    check(&whole[..7], "not a whole safetensors file");
    check(&whole[..100], "not a whole safetensors file");
    check(&whole[..whole.len() - 1], "not a whole safetensors file");
    // A header that claims more than the file, and more than memory.
    for claim in [whole.len() as u64, u64::MAX, 1 << 40] {
        let mut lying = whole.clone();
        lying[..8].copy_from_slice(&claim.to_le_bytes());
        check(&lying, "not a whole safetensors file");
    }
    // Offsets that lie: a tensor far outside the file.
    let header =
        br#"{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#;
    let mut lying = (header.len() as u64).to_le_bytes().to_vec();
    lying.extend(header);
    check(&lying, "not a whole safetensors file");
    fs::write(dir.path().join(CONFIG), "{").unwrap();
    assert!(
        load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("not JSON")
    );
    fs::remove_file(dir.path().join(CONFIG)).unwrap();
    assert!(
        load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("there is no such file")
    );
}

#[test]
fn a_pickle_is_not_opened() {
    let (_, dir) = saved();
    fs::rename(
        dir.path().join(WEIGHTS),
        dir.path().join("adapter_model.bin"),
    )
    .unwrap();
    let message = load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("safe_serialization=True"), "{message}");
}

#[test]
fn saving_refuses_what_would_not_load() {
    let (mut model, _) = saved();
    let dir = TempDir::new().unwrap();
    let target = dir.path().join("adapter");
    let other = LoraConfig { r: 8, ..config() };
    let message = save_pretrained(&model, &other, &meta(), &target)
        .unwrap_err()
        .to_string();
    assert!(message.contains("is not what is attached"), "{message}");
    let other = LoraConfig {
        lora_alpha: 8.0,
        ..config()
    };
    let message = save_pretrained(&model, &other, &meta(), &target)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("q_proj is scaled by 4, not by 2"),
        "{message}"
    );
    let mut state = export_trainable(&model).unwrap();
    state[0].2[0] = f32::NAN;
    crate::import_trainable(&mut model, state).unwrap();
    assert!(matches!(
        save_pretrained(&model, &config(), &meta(), &target),
        Err(AdapterError::NonFinite(_))
    ));
    detach(&mut model);
    assert!(matches!(
        save_pretrained(&model, &config(), &meta(), &target),
        Err(AdapterError::NoAdapter)
    ));
    assert!(!target.exists());
}

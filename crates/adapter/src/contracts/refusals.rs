//! Configurations and files that do not fit: everything that is wrong in one error, and nothing attached.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Case, adalora, cases, list, loha, lokr, lora, vera};
use crate::files::store::{CONFIG, WEIGHTS};
use crate::testing::Tiny;
use crate::{
    AdaLoraConfig, AdapterConfig, AdapterError, Ia3Config, LohaConfig, LokrConfig, LoraConfig,
    SaveMeta, VeraConfig, adapters, attach, load_pretrained, save_pretrained,
};

fn saved(case: &Case) -> TempDir {
    let dir = TempDir::new().unwrap();
    let model = case.adapted(&Device::flex());
    save_pretrained(&model, &case.config, &SaveMeta::default(), dir.path()).unwrap();
    dir
}

/// A tensor of a file: name, shape, bytes.
type Raw = (String, Vec<usize>, Vec<u8>);

fn edit(dir: &Path, change: impl FnOnce(&mut Vec<Raw>)) {
    let path = dir.join(WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut raw: Vec<Raw> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
        .collect();
    raw.sort();
    change(&mut raw);
    let views = raw.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The message of loading a directory that must not load, and that the model is left as it was.
fn refused(dir: &Path, name: &str) -> String {
    let mut model = Tiny::new(&Device::flex());
    let before = model.logits();
    let error = load_pretrained(&mut model, dir, true).expect_err(name);
    assert!(adapters(&model).is_empty(), "{name}");
    assert_eq!(model.logits(), before, "{name}");
    error.to_string()
}

#[test]
fn every_tensor_that_differs_is_in_one_error() {
    for case in cases() {
        let dir = saved(&case);
        let mut parts = Vec::new();
        edit(dir.path(), |raw| {
            // The ones that a spent budget emptied have nothing to spoil.
            let mut full = (0..raw.len()).filter(|i| !raw[*i].2.is_empty());
            let [shape, nan, gone] = [(); 3].map(|()| full.next().unwrap());
            let (name, dims, _) = &mut raw[shape];
            dims.push(1);
            parts.push(format!("{name} is {dims:?} where"));
            raw[nan].2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            parts.push(format!("{} holds a value that is not finite", raw[nan].0));
            let (name, dims, _) = raw.remove(gone);
            parts.push(format!("{name} {dims:?} is missing"));
            let stranger = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight";
            raw.push((stranger.into(), vec![1, 2], vec![0; 8]));
            parts.push(format!("{stranger} does not belong"));
        });
        let message = refused(dir.path(), case.name);
        for part in parts {
            assert!(
                message.contains(&part),
                "{}: {part} not in {message}",
                case.name
            );
        }
        assert!(message.contains("4 problems"), "{}: {message}", case.name);
    }
}

#[test]
fn a_rank_that_is_not_the_files_is_told_by_shapes() {
    for case in cases() {
        let key = match &case.config {
            AdapterConfig::Lora(_)
            | AdapterConfig::Loha(_)
            | AdapterConfig::Vera(_)
            | AdapterConfig::Miss(_) => "r",
            AdapterConfig::AdaLora(c) if c.rank_pattern.is_none() => "init_r",
            // A LoKr whose factors are whole has no rank in its shapes.
            AdapterConfig::Lokr(c) if c.r == 2 => "r",
            _ => continue,
        };
        let dir = saved(&case);
        let path = dir.path().join(CONFIG);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let rank = value[key].as_u64().unwrap();
        // One that does not divide the sides would be told before.
        let in_blocks = value["init_weights"] == "bat";
        value[key] = json!(if in_blocks { 2 * rank } else { rank + 1 });
        fs::write(&path, value.to_string()).unwrap();
        let message = refused(dir.path(), case.name);
        assert!(
            message.contains("the configuration need ["),
            "{}: {message}",
            case.name
        );
    }
}

#[test]
fn files_that_are_damaged_missing_or_pickles_are_refused() {
    for case in cases() {
        let dir = saved(&case);
        let path = dir.path().join(WEIGHTS);
        let whole = fs::read(&path).unwrap();
        for (bytes, part) in [
            (&whole[..0], "empty"),
            (&whole[..9], "not a whole safetensors file"),
            (&whole[..whole.len() - 4], "not a whole safetensors file"),
        ] {
            fs::write(&path, bytes).unwrap();
            let message = refused(dir.path(), case.name);
            assert!(message.contains(part), "{}: {message}", case.name);
        }
        fs::rename(&path, dir.path().join("adapter_model.bin")).unwrap();
        let message = refused(dir.path(), case.name);
        assert!(message.contains("not opened"), "{}: {message}", case.name);
        fs::remove_file(dir.path().join("adapter_model.bin")).unwrap();
        let message = refused(dir.path(), case.name);
        assert!(
            message.contains("there is no such file"),
            "{}: {message}",
            case.name
        );
        fs::write(dir.path().join(CONFIG), "[]").unwrap();
        let message = refused(dir.path(), case.name);
        assert!(
            message.contains("not a JSON object"),
            "{}: {message}",
            case.name
        );
    }
}

#[test]
fn a_method_that_is_not_here_is_named_with_those_that_are() {
    let dir = TempDir::new().unwrap();
    for kind in ["PREFIX_TUNING", "OFT", "lora"] {
        fs::write(
            dir.path().join(CONFIG),
            json!({"peft_type": kind}).to_string(),
        )
        .unwrap();
        let message = refused(dir.path(), kind);
        assert!(message.contains(&format!("{kind:?}")), "{message}");
        for known in ["LORA", "LOHA", "LOKR", "ADALORA", "VERA", "IA3"] {
            assert!(message.contains(known), "{message}");
        }
    }
    fs::write(dir.path().join(CONFIG), json!({"r": 8}).to_string()).unwrap();
    assert!(refused(dir.path(), "none").contains("peft_type is missing"));
}

#[test]
fn ranks_past_the_size_of_a_matrix_are_refused_where_they_mean_nothing() {
    let targets = || list(&["k_proj"]);
    let too_large: [AdapterConfig; 4] = [
        LoraConfig {
            r: 33,
            target_modules: targets(),
            ..lora()
        }
        .into(),
        LoraConfig {
            r: 33,
            use_dora: true,
            target_modules: targets(),
            ..lora()
        }
        .into(),
        LohaConfig {
            target_modules: targets(),
            ..loha(33)
        }
        .into(),
        AdaLoraConfig {
            init_r: 33,
            target_modules: targets(),
            ..adalora()
        }
        .into(),
    ];
    for config in too_large {
        let mut model = Tiny::new(&Device::flex());
        let Err(AdapterError::Plan { problems }) = attach(&mut model, &config, 1) else {
            panic!()
        };
        assert_eq!(problems.len(), 2, "one for each block");
        assert!(
            problems[0].contains("k_proj is [32, 64]: rank 33"),
            "{problems:?}"
        );
        assert!(adapters(&model).is_empty());
    }
    let fine: [AdapterConfig; 2] = [
        LokrConfig {
            target_modules: targets(),
            ..lokr(100)
        }
        .into(),
        VeraConfig { r: 300, ..vera() }.into(),
    ];
    for config in fine {
        attach(&mut Tiny::new(&Device::flex()), &config, 1).unwrap();
    }
}

#[test]
fn all_options_that_are_wrong_are_told_at_once_for_every_method() {
    let cases: Vec<(AdapterConfig, Vec<&str>)> = vec![
        (
            LohaConfig {
                alpha: f64::NAN,
                rank_dropout: 1.0,
                module_dropout: -0.1,
                ..loha(0)
            }
            .into(),
            vec![
                "r = 0",
                "alpha = NaN",
                "rank_dropout = 1",
                "module_dropout = -0.1",
            ],
        ),
        (
            LokrConfig {
                decompose_factor: 0,
                rank_dropout: 2.0,
                rank_pattern: vec![("q_proj".into(), 0)],
                ..lokr(0)
            }
            .into(),
            vec![
                "r = 0",
                "decompose_factor = 0",
                "rank_dropout = 2",
                "rank_pattern",
            ],
        ),
        (
            AdaLoraConfig {
                target_r: 7,
                delta_t: 0,
                beta1: 1.0,
                total_step: None,
                bias: "all".into(),
                rank_pattern: Some(vec![("x".into(), vec![true])]),
                ..adalora()
            }
            .into(),
            vec![
                "target_r = 7",
                "deltaT = 0",
                "beta1 = 1",
                "total_step",
                "bias = \"all\"",
                "rank_pattern",
            ],
        ),
        (
            AdaLoraConfig {
                tinit: 5,
                tfinal: 5,
                lora_alpha: 0.0,
                ..adalora()
            }
            .into(),
            vec!["tinit = 5 and tfinal = 5", "lora_alpha = 0"],
        ),
        (
            VeraConfig {
                r: 0,
                vera_dropout: 1.5,
                bias: "all".into(),
                ..vera()
            }
            .into(),
            vec!["r = 0", "vera_dropout = 1.5", "bias"],
        ),
        (
            Ia3Config {
                target_modules: list(&["q_proj"]),
                feedforward_modules: list(&["up_proj", "down_proj"]),
                ..Ia3Config::default()
            }
            .into(),
            vec!["\"up_proj\" is not among", "\"down_proj\" is not among"],
        ),
    ];
    for (config, parts) in cases {
        let mut model = Tiny::new(&Device::flex());
        let Err(AdapterError::Config { problems, .. }) = attach(&mut model, &config, 1) else {
            panic!("{config:?}")
        };
        assert_eq!(problems.len(), parts.len(), "{problems:#?}");
        for part in parts {
            assert!(
                problems.iter().any(|p| p.contains(part)),
                "{part} not in {problems:#?}"
            );
        }
        assert!(adapters(&model).is_empty());
    }
}

#[test]
fn a_start_without_its_data_is_refused_and_nothing_is_attached() {
    let eva = LoraConfig {
        init_lora_weights: crate::InitLora::Eva,
        ..lora()
    };
    let mut model = Tiny::new(&Device::flex());
    let error = attach(&mut model, &eva, 1).unwrap_err();
    assert!(error.to_string().contains("EVA"), "{error}");
    assert!(adapters(&model).is_empty());
    let given = |_: &str| {
        let a = vec![0.5; 4 * 96];
        Some(crate::InitFactors { a, b: None })
    };
    let only_wide = LoraConfig {
        target_modules: list(&["down_proj"]),
        ..eva
    };
    let bare = model.logits();
    crate::attach_given(&mut model, crate::DEFAULT, &only_wide, 1, Some(&given)).unwrap();
    assert_eq!(model.logits(), bare);
    let values = crate::export_trainable(&model).unwrap();
    assert!(values[0].0.ends_with("lora_A.weight") && values[0].2.iter().all(|v| *v == 0.5));
}

//! What is written is read back as the same model, and what cannot be written says why.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::checkpoint::TensorSource;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

/// Names and shapes as a merge lists them.
fn tensors(source: &Checkpoint) -> Vec<(String, Vec<usize>)> {
    let config = ArchConfig::from_json(source.config_json()).unwrap();
    let modules = config.modules();
    modules.iter().flat_map(|m| m.tensors()).collect()
}

fn options(outtype: OutType) -> GgufOptions {
    GgufOptions {
        outtype,
        overwrite: false,
        name: Some("tiny".to_owned()),
        tokens: None,
    }
}

fn write(source: &Checkpoint, path: &Path, options: &GgufOptions) -> Result<SavedGguf, SaveError> {
    let mut read = |name: &str| source.read_f32(name).map_err(Into::into);
    write_gguf(path, &tensors(source), &mut read, source, options)
}

const EVERY: [OutType; 5] = [
    OutType::F32,
    OutType::F16,
    OutType::BF16,
    OutType::Q8_0,
    OutType::Q4_0,
];

/// The values that a type makes of some, row by row.
fn through(block: BlockType, values: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    block.quantise(values, &mut bytes).unwrap();
    block.dequantise(&bytes)
}

#[test]
fn every_type_reads_back_as_the_same_model_with_its_own_values() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "untied",
        "tied",
        "bias",
        "head_dim",
        "rope_linear",
        "rope_theta",
        "qwen3",
        "gpt2",
    ] {
        let source = Checkpoint::open(&with_weights(name, dir.path())).unwrap();
        for outtype in EVERY {
            let path = dir.path().join(format!("{name}-{}.gguf", outtype.name()));
            write(&source, &path, &options(outtype)).unwrap();
            let saved = Checkpoint::open(&path).unwrap();
            let read = |c: &Checkpoint| ArchConfig::from_json(c.config_json()).unwrap();
            let (ours, theirs) = (read(&saved), read(&source));
            assert_eq!(ours.modules(), theirs.modules(), "{name}");
            assert_eq!(ours.decoder().rope, theirs.decoder().rope, "{name}");
            assert_eq!(
                ours.decoder().rms_norm_eps,
                theirs.decoder().rms_norm_eps,
                "{name}"
            );
            assert_eq!(ours.eos_token_ids, theirs.eos_token_ids, "{name}");
            let config = theirs;
            let head = if config.tie_word_embeddings {
                config.embedding()
            } else {
                "lm_head"
            };
            for (tensor, shape) in tensors(&source) {
                let info = saved.tensors().iter().find(|t| t.name == tensor).unwrap();
                assert_eq!(info.shape, shape);
                // Rows keep their blocks when they change places, so the order does not matter here.
                let block = outtype.of(&shape, tensor.contains(head));
                let stored = source.read_f32(&tensor).unwrap();
                // Blocks lie along the rows of a product, which Conv1D has as columns.
                let module = config
                    .modules()
                    .into_iter()
                    .find(|m| tensor == format!("{}.weight", m.name));
                let expected = match module {
                    Some(module) => module.to_stored(through(
                        outtype.of(&module.shape, tensor.contains(head)),
                        &module.from_stored(stored),
                    )),
                    None => through(block, &stored),
                };
                let read = saved.read_f32(&tensor).unwrap();
                assert!(read == expected, "{name} {tensor} {}", outtype.name());
            }
        }
    }
}

/// The rope cases have no weights of their own.
fn with_weights(name: &str, scratch: &Path) -> PathBuf {
    for kind in ["families", "llama"] {
        let from = fixture(kind).join(name);
        if from.join("model.safetensors").exists() {
            return from;
        }
    }
    let from = fixture("llama").join(name);
    let to = scratch.join(name);
    fs::create_dir_all(&to).unwrap();
    for (dir, file) in [
        (from, "config.json"),
        (fixture("llama/untied"), "model.safetensors"),
    ] {
        fs::copy(dir.join(file), to.join(file)).unwrap();
    }
    to
}

#[test]
fn the_scalings_of_rotary_embedding_come_back() {
    let dir = tempfile::tempdir().unwrap();
    for (name, parameters) in [
        (
            "yarn",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e3}),
        ),
        (
            "yarn_mscale",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5,
                "beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 1e4}),
        ),
        (
            "llama3",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512, "rope_theta": 2e3}),
        ),
    ] {
        let from = edited(&dir.path().join(name), |config| {
            config["rope_parameters"] = parameters;
        });
        let source = Checkpoint::open(&from).unwrap();
        let path = dir.path().join(format!("{name}.gguf"));
        let saved = write(&source, &path, &options(OutType::F16)).unwrap();
        assert_eq!(
            saved.types.get("F32"),
            Some(&if name == "llama3" { 6 } else { 5 })
        );
        let read = |c: &Checkpoint| {
            let config = ArchConfig::from_json(c.config_json()).unwrap();
            config.decoder().rope.clone()
        };
        let (ours, theirs) = (read(&Checkpoint::open(&path).unwrap()), read(&source));
        let (ours, theirs) = (ours.frequencies(8, 100), theirs.frequencies(8, 100));
        for (a, b) in ours.0.iter().zip(&theirs.0) {
            assert!((a - b).abs() <= 1e-6 * b, "{name}: {a} {b}");
        }
        assert!((ours.1 - theirs.1).abs() < 1e-6, "{name}");
    }
}

/// A copy of `llama/untied` with another `config.json`.
fn edited(to: &Path, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let from = fixture("llama/untied");
    fs::create_dir_all(to).unwrap();
    for file in [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let text = fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    edit(&mut config);
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    to.to_owned()
}

#[test]
fn the_metadata_and_tokenizer_of_a_gguf_base_are_carried_over_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["untied", "llama3", "bias", "quants"] {
        let source = Checkpoint::open(&fixture("gguf").join(format!("{name}.gguf"))).unwrap();
        let path = dir.path().join(format!("{name}.gguf"));
        write(&source, &path, &options(OutType::F32)).unwrap();
        let saved = Checkpoint::open(&path).unwrap();
        let entries = |c: &Checkpoint| c.gguf().unwrap().entries();
        let about_the_file = |key: &String| {
            key.starts_with("general.file_type")
                || key.starts_with("general.quantization")
                || key.starts_with("general.alignment")
        };
        let kept = |mut all: std::collections::BTreeMap<String, Vec<u8>>| {
            all.retain(|key, _| !about_the_file(key));
            all
        };
        assert_eq!(kept(entries(&saved)), kept(entries(&source)), "{name}");
        assert_eq!(
            saved.gguf().unwrap().derived(),
            source.gguf().unwrap().derived()
        );
        for info in source.tensors() {
            let (ours, theirs) = (saved.read_f32(&info.name), source.read_f32(&info.name));
            assert_eq!(ours.unwrap(), theirs.unwrap(), "{name} {}", info.name);
        }
    }
}

#[test]
fn what_architecture_llama_cannot_have_is_refused_all_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |name: &str, edit: fn(&mut Value)| {
        let from = edited(&dir.path().join(name), edit);
        let source = Checkpoint::open(&from).unwrap();
        let path = dir.path().join(format!("{name}.gguf"));
        let error = write(&source, &path, &options(OutType::F16)).unwrap_err();
        assert!(!path.exists());
        error.to_string()
    };
    let said = refusal("mistral", |config| {
        config["model_type"] = json!("mistral");
        config["sliding_window"] = json!(16);
        config["rope_parameters"] = json!({"rope_type": "dynamic", "factor": 2.0});
    });
    assert!(
        said.contains("window of 16") && said.contains("'dynamic'"),
        "{said}"
    );
    let said = refusal("truncate", |config| {
        config["rope_parameters"] = json!({"rope_type": "yarn", "factor": 2.0, "truncate": false,
            "original_max_position_embeddings": 32});
    });
    assert!(said.contains("truncate"), "{said}");
}

#[test]
fn a_file_that_is_there_stays_unless_it_may_be_replaced_and_failures_leave_none() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("llama/untied")).unwrap();
    let path = dir.path().join("out.gguf");
    fs::write(&path, "mine").unwrap();
    let mut options = options(OutType::F16);
    let error = write(&source, &path, &options).unwrap_err();
    assert!(matches!(error, SaveError::FileExists(_)), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    options.overwrite = true;
    let saved = write(&source, &path, &options).unwrap();
    assert_eq!(saved.bytes, fs::metadata(&path).unwrap().len());

    fs::remove_file(&path).unwrap();
    let shapes = tensors(&source);
    let mut huge = |name: &str| {
        let (_, shape) = shapes.iter().find(|(n, _)| n == name).unwrap();
        Ok(vec![1e30; shape.iter().product()])
    };
    let error = write_gguf(&path, &shapes, &mut huge, &source, &options).unwrap_err();
    assert!(matches!(error, SaveError::OutOfRange { .. }), "{error}");
    let mut short = |_: &str| Ok(vec![0.0]);
    let error = write_gguf(&path, &shapes, &mut short, &source, &options).unwrap_err();
    assert!(matches!(error, SaveError::WrongLength { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn matrices_get_llama_cpps_types_and_narrow_rows_are_reported() {
    let head = |outtype: OutType, width| outtype.of(&[64, width], true);
    let inner = |outtype: OutType, width| outtype.of(&[64, width], false);
    assert_eq!(head(OutType::Q4_0, 512), BlockType::Q6K);
    assert_eq!(head(OutType::Q4_0, 576), BlockType::Q8_0);
    assert_eq!(head(OutType::Q4_0, 40), BlockType::F16);
    assert_eq!(head(OutType::Q8_0, 512), BlockType::Q8_0);
    assert_eq!(inner(OutType::Q4_0, 512), BlockType::Q4_0);
    assert_eq!(inner(OutType::Q8_0, 33), BlockType::F16);
    assert!(EVERY.iter().all(|t| t.of(&[64], false) == BlockType::F32));

    let dir = tempfile::tempdir().unwrap();
    let lora = GgufLora {
        module: "model.layers.0.mlp.up_proj".to_owned(),
        embedding: false,
        r: 4,
        a: vec![0.5; 4 * 32],
        b: vec![0.25; 64 * 4],
    };
    let config = ArchConfig::from_json(
        Checkpoint::open(&fixture("llama/untied"))
            .unwrap()
            .config_json(),
    );
    let path = dir.path().join("lora.gguf");
    let options = options(OutType::Q8_0);
    let saved = write_gguf_lora(&path, &[lora], 8.0, &config.unwrap(), &options).unwrap();
    assert_eq!(saved.types, BTreeMap::from([("F16", 1), ("Q8_0", 1)]));
    assert!(
        saved.notes[0].contains("blk.0.ffn_up.weight.lora_b"),
        "{:?}",
        saved.notes
    );
}

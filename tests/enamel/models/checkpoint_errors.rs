//! Damaged and mismatched checkpoints: an error that says what and where, never a panic.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use enamel_model::ArchConfig;
use enamel_model::Model;
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::support::devices::device;
use crate::support::goldens::{Generation, copy, fixtures, json, stage};

/// Opens, reads every tensor, builds the model; the first error as text.
fn read_all(path: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    for info in checkpoint.tensors() {
        checkpoint.read_f32(&info.name).map_err(|e| e.to_string())?;
    }
    let config = ArchConfig::from_json(checkpoint.config_json()).map_err(|e| e.to_string())?;
    Model::load(&config, &checkpoint, &device("flex")).map_err(|e| e.to_string())?;
    Ok(())
}

fn refusal(path: &Path) -> String {
    read_all(path).expect_err("a damaged checkpoint must not load")
}

fn safetensors_parts(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    (
        serde_json::from_slice(&bytes[8..8 + length]).expect("a header"),
        bytes[8 + length..].to_vec(),
    )
}

fn safetensors_file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string().into_bytes();
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_slice(),
        data,
    ]
    .concat()
}

#[test]
fn missing_unexpected_and_misshapen_tensors_are_in_one_error() {
    let staged = stage("untied", Generation::Five);
    let path = staged.path().join("model.safetensors");
    let (mut header, data) = safetensors_parts(&fs::read(&path).expect("a fixture"));
    let names = header.as_object_mut().expect("a header");
    let moved = names
        .remove("model.layers.0.mlp.up_proj.weight")
        .expect("a tensor");
    names.insert("model.layers.0.mlp.upp_proj.weight".into(), moved);
    names["model.layers.1.self_attn.q_proj.weight"]["shape"] = serde_json::json!([16, 64]);
    fs::write(&path, safetensors_file(&header, &data)).expect("room on the disk");
    let error = refusal(staged.path());
    for part in [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.upp_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "[16, 64]",
        "[32, 32]",
    ] {
        assert!(error.contains(part), "{part} is missing: {error}");
    }
}

/// Damage done to a file's bytes.
type Lie = fn(&mut Vec<u8>);

#[test]
fn lies_in_a_safetensors_file_are_errors() {
    let lies: [(&str, Lie); 8] = [
        ("empty", |b| b.clear()),
        ("seven bytes", |b| b.truncate(7)),
        ("a header longer than the file", |b| {
            b[..8].copy_from_slice(&u64::MAX.to_le_bytes())
        }),
        ("a header of 2^40 bytes", |b| {
            b[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes())
        }),
        ("cut off in the header", |b| b.truncate(100)),
        ("cut off in the data", |b| b.truncate(b.len() - 1)),
        ("offsets past the end", |b| {
            replace(b, "\"data_offsets\":[0,", "\"data_offsets\":[9,")
        }),
        ("an unknown dtype", |b| {
            replace(b, "\"dtype\":\"F32\"", "\"dtype\":\"F99\"")
        }),
    ];
    for (what, lie) in lies {
        let staged = stage("untied", Generation::Five);
        let path = staged.path().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("a fixture");
        lie(&mut bytes);
        fs::write(&path, bytes).expect("room on the disk");
        let error = refusal(staged.path());
        assert!(
            error.contains("model.safetensors"),
            "{what}: which file? {error}"
        );
    }
}

/// Puts text of the same length in another's place.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes
        .windows(from.len())
        .position(|w| w == from.as_bytes())
        .expect("the text");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn a_shard_that_is_gone_is_named() {
    let staged = stage("sharded", Generation::Five);
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(staged.path().join(shard)).expect("it was there");
    let error = refusal(staged.path());
    assert!(error.contains(shard), "{error}");
}

#[test]
fn an_index_cannot_reach_out_of_its_directory() {
    let staged = stage("sharded", Generation::Five);
    let path = staged.path().join("model.safetensors.index.json");
    let mut index = json(&path);
    let outside = fixtures().join("llama/untied/model.safetensors");
    for file in [
        outside.to_string_lossy().into_owned(),
        "../../model.safetensors".to_owned(),
    ] {
        index["weight_map"]["model.norm.weight"] = file.into();
        fs::write(&path, index.to_string()).expect("room on the disk");
        refusal(staged.path());
    }
}

#[test]
fn a_directory_without_a_model_says_what_is_missing() {
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    assert!(refusal(dir.path()).contains("config.json"));
    copy(
        &fixtures().join("llama/untied/config.json"),
        &dir.path().join("config.json"),
    );
    assert!(refusal(dir.path()).contains("model.safetensors"));
    let gone = dir.path().join("nowhere");
    assert!(refusal(&gone).contains("nowhere"));
}

#[test]
fn an_unknown_architecture_is_refused_by_name() {
    let staged = stage("untied", Generation::Five);
    let path = staged.path().join("config.json");
    let mut config = json(&path);
    config["model_type"] = "gpt9".into();
    fs::write(&path, config.to_string()).expect("room on the disk");
    let error = refusal(staged.path());
    assert!(error.contains("gpt9") && error.contains("llama"), "{error}");
}

#[test]
fn a_truncated_gguf_is_an_error_at_any_length() {
    let bytes = fs::read(fixtures().join("gguf/quants.gguf")).expect("a fixture");
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    let path = dir.path().join("cut.gguf");
    // Every length up to the tensors' data, and some within it.
    let lengths = (0..2000)
        .step_by(7)
        .chain((2000..bytes.len()).step_by(9973))
        .chain([bytes.len() - 1]);
    for length in lengths {
        fs::write(&path, &bytes[..length]).expect("room on the disk");
        let error = refusal(&path);
        assert!(
            error.contains("cut.gguf"),
            "{length} bytes: which file? {error}"
        );
    }
}

/// Seeded damage: whatever comes of it, it is a result and not a panic, and no allocation fails.
#[test]
fn damaged_headers_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    let gguf = fs::read(fixtures().join("gguf/quants.gguf")).expect("a fixture");
    let staged = stage("untied", Generation::Five);
    let weights = staged.path().join("model.safetensors");
    let original = fs::read(&weights).expect("a fixture");
    let path = dir.path().join("damaged.gguf");
    for round in 0..300 {
        for (bytes, target, header, open) in [
            (&gguf, &path, 2500, path.as_path()),
            (&original, &weights, 2200, staged.path()),
        ] {
            let mut damaged = bytes.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..header);
                damaged[at] = rng.random();
                if rng.random_bool(0.2) {
                    damaged[at..at + 8].fill(0xff);
                }
            }
            fs::write(target, &damaged).expect("room on the disk");
            let outcome = catch_unwind(AssertUnwindSafe(|| read_all(open)));
            assert!(
                outcome.is_ok(),
                "round {round}: {} made it panic",
                target.display()
            );
        }
    }
}

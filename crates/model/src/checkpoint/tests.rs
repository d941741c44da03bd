//! Directories and safetensors files, sound and damaged.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{Seek, SeekFrom, Write};

use serde_json::json;

use super::*;

/// A safetensors file with this header and so many zero bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn entry(dtype: &str, shape: &[u64], start: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

fn directory(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open_single(bytes: Vec<u8>) -> Result<Checkpoint, CheckpointError> {
    let dir = directory(&[("model.safetensors", bytes)]);
    Checkpoint::open(dir.path())
}

#[test]
fn faults_of_a_header_are_named() {
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "too short"),
        (vec![0; 7], "too short"),
        (u64::MAX.to_le_bytes().to_vec(), "limit"),
        (99_999_999u64.to_le_bytes().to_vec(), "incomplete"),
        (file("[]", 0), "not valid"),
        (file("{\"a\": 1}", 0), "not valid"),
        (file("\u{0}", 0), "not valid"),
        (
            file(&json!({"a": entry("F8_E4M3", &[1], 0, 1)}).to_string(), 1),
            "F8_E4M3",
        ),
        (
            file(&json!({"a": entry("F32", &[2], 0, 4)}).to_string(), 4),
            "needs 8 bytes",
        ),
        (
            file(&json!({"a": entry("F32", &[2], 8, 0)}).to_string(), 8),
            "before it starts",
        ),
        (
            file(&json!({"a": entry("F32", &[2], 0, 8)}).to_string(), 7),
            "incomplete",
        ),
        (
            file(
                &json!({"a": entry("F32", &[u64::MAX, 2], 0, 8)}).to_string(),
                8,
            ),
            "impossible shape",
        ),
        (
            file(
                &json!({"a": entry("F32", &[2], 0, 8), "b": entry("F32", &[1], 4, 8)}).to_string(),
                8,
            ),
            "'b' overlaps",
        ),
        (
            file(&json!({"a": entry("F32", &[1], 4, 8)}).to_string(), 8),
            "4 bytes before tensor 'a'",
        ),
        (
            file(&json!({"a": entry("F32", &[1], 0, 4)}).to_string(), 9),
            "5 bytes after",
        ),
        (
            file(
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\
                 \"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
                4,
            ),
            "'a' is listed twice",
        ),
    ];
    for (bytes, wanted) in cases {
        let error = open_single(bytes).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn all_faults_come_at_once() {
    let header = json!({
        "a": entry("F32", &[2], 0, 4),
        "b": entry("I64", &[1], 4, 12),
        "c": entry("F16", &[1], 12, 400),
    });
    let error = open_single(file(&header.to_string(), 100))
        .unwrap_err()
        .to_string();
    for name in ["'a'", "'b'", "'c'"] {
        assert!(error.contains(name), "{error}");
    }
}

/// Every byte of length and header, to every value that differs in one bit or is an extreme: the
/// file opens or is refused, and what opens can be read.
#[test]
fn no_change_or_cut_of_a_header_panics() {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a": entry("F32", &[2, 3], 0, 24),
        "b": entry("BF16", &[4], 24, 32),
        "c": entry("F16", &[], 32, 34),
    });
    let sound = file(&header.to_string(), 34);
    assert_eq!(open_single(sound.clone()).unwrap().tensors().len(), 3);
    let dir = directory(&[]);
    let path = dir.path().join("model.safetensors");
    fs::write(&path, &sound).unwrap();
    // Changed in place: writing thousands of files anew takes a minute on some disks.
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let check = || {
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else {
            return false;
        };
        for info in checkpoint.tensors() {
            let values = checkpoint.read_f32(&info.name).unwrap();
            assert_eq!(values.len(), info.shape.iter().product::<usize>());
        }
        true
    };
    let mut put = |at: usize, value: u8| {
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[value]).unwrap();
    };
    for (at, &original) in sound[..sound.len() - 34].iter().enumerate() {
        let bits = (0..8).map(|bit| original ^ 1 << bit);
        for value in bits.chain([0, 0xFF, b'"', b'9', b'}', b',']) {
            put(at, value);
            check();
        }
        put(at, original);
    }
    assert!(check());
    for length in (0..sound.len()).rev() {
        file.set_len(length as u64).unwrap();
        assert!(!check(), "cut at {length}");
    }
}

#[test]
fn an_index_is_checked_against_its_shards() {
    let shard = |name: &str| file(&json!({name: entry("F32", &[1], 0, 4)}).to_string(), 4);
    let index = |map: Value| json!({"weight_map": map}).to_string().into_bytes();
    let open = |map: Value| {
        let dir = directory(&[
            ("model.safetensors.index.json", index(map)),
            ("1.safetensors", shard("a")),
            ("2.safetensors", shard("b")),
        ]);
        Checkpoint::open(dir.path()).map(|c| c.files().len())
    };
    // Two shards, the index, config.json.
    assert_eq!(
        open(json!({"a": "1.safetensors", "b": "2.safetensors"})).unwrap(),
        4
    );
    let cases = [
        (
            json!({"a": "1.safetensors", "b": "3.safetensors"}),
            "'3.safetensors' is missing",
        ),
        (
            json!({"a": "2.safetensors", "b": "1.safetensors"}),
            "lies in",
        ),
        (
            json!({"a": "1.safetensors", "x": "2.safetensors"}),
            "is not there",
        ),
        (json!({"a": "../1.safetensors"}), "not a plain"),
        (json!({}), "no tensors"),
        (json!([1]), "not a shard index"),
    ];
    for (map, wanted) in cases {
        let error = open(map).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    let twice = directory(&[
        (
            "model.safetensors.index.json",
            index(json!({"a": "1.safetensors", "b": "2.safetensors"})),
        ),
        ("1.safetensors", shard("a")),
        ("2.safetensors", shard("a")),
    ]);
    let error = Checkpoint::open(twice.path()).unwrap_err().to_string();
    assert!(error.contains("'a' is also in"), "{error}");
}

#[test]
fn what_is_not_a_model_says_so() {
    let error = |dir: &tempfile::TempDir| Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error(&tempfile::tempdir().unwrap()).contains("config.json"));
    assert!(error(&directory(&[])).contains("neither model.safetensors"));
    let pickled = directory(&[("pytorch_model.bin", Vec::new())]);
    assert!(error(&pickled).contains("never unpickled"));
    let gguf = directory(&[("m.gguf", Vec::new())]);
    assert!(error(&gguf).contains("m.gguf"));
    let other = directory(&[("x.bin", Vec::new())]);
    let file = Checkpoint::open(&other.path().join("x.bin")).unwrap_err();
    assert!(file.to_string().contains(".gguf file"));
}

#[test]
fn reading_widens_names_the_nearest_and_hashes() {
    let mut bytes = file(
        &json!({"model.norm.weight": entry("BF16", &[2], 0, 4)}).to_string(),
        0,
    );
    bytes.extend([0x80, 0x3F, 0x00, 0xC0]);
    let dir = directory(&[("model.safetensors", bytes)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.read_f32("model.norm.weight").unwrap(),
        [1.0, -2.0]
    );
    let error = checkpoint
        .read_f32("model.norm.wieght")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("did you mean 'model.norm.weight'"),
        "{error}"
    );
    let hashes = checkpoint.hashes().unwrap();
    assert_eq!(hashes.len(), 2);
    // SHA-256 of "{}", as any tool gives it.
    assert_eq!(
        hashes[1].1,
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    );
}

#[test]
fn the_template_is_found_in_each_of_its_places() {
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "d"},
    ]});
    let weights = file(&json!({"a": entry("F32", &[1], 0, 4)}).to_string(), 4);
    let with = |files: &[(&str, &str)]| {
        let mut all = vec![("model.safetensors", weights.clone())];
        all.extend(files.iter().map(|(n, text)| (*n, text.as_bytes().to_vec())));
        let dir = directory(&all);
        Checkpoint::open(dir.path()).unwrap().chat_template()
    };
    assert_eq!(with(&[]), None);
    let config = ("tokenizer_config.json", "{\"chat_template\": \"c\"}");
    assert_eq!(with(&[config]).as_deref(), Some("c"));
    assert_eq!(
        with(&[("tokenizer_config.json", &named.to_string())]).as_deref(),
        Some("d")
    );
    assert_eq!(
        with(&[config, ("chat_template.jinja", "j")]).as_deref(),
        Some("j")
    );
}

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
        "b": entry("F64", &[1], 4, 12),
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

/// A shard with one number under each name.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries = names.iter().enumerate().map(|(i, name)| {
        let at = 4 * i as u64;
        ((*name).to_owned(), entry("F32", &[1], at, at + 4))
    });
    let header: serde_json::Map<String, Value> = entries.collect();
    file(&Value::Object(header).to_string(), 4 * names.len())
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    let mut names: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|t| t.name.as_str())
        .collect();
    names.sort_unstable();
    names
}

fn notes(checkpoint: &Checkpoint) -> String {
    checkpoint.notes().collect::<Vec<_>>().join("\n")
}

#[test]
fn a_broken_file_beside_the_weights_is_never_taken_for_absent() {
    let sound = |bytes: &[u8], name: &str| {
        let dir = directory(&[("model.safetensors", shard(&["a"])), (name, bytes.to_vec())]);
        Checkpoint::open(dir.path())
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
    ] {
        assert_eq!(sound(b"\xEF\xBB\xBF{\"x\": NaN}", name), Ok(()), "{name}");
        for (bytes, wanted) in [
            (b"{\n  \"a\": 1\n  \"b\"}".as_slice(), "line 3 column 3"),
            (b"[]", "not a JSON object"),
            (b"", "empty"),
            (
                b"version https://git-lfs.github.com/spec/v1\n",
                "Git LFS pointer",
            ),
        ] {
            let error = sound(bytes, name).unwrap_err();
            assert!(
                error.contains(name) && error.contains(wanted),
                "{name}: {error}"
            );
        }
    }
    let error = sound(b"a\n\xFF", "chat_template.jinja").unwrap_err();
    assert!(
        error.contains("chat_template.jinja") && error.contains("line 2"),
        "{error}"
    );
    let dir = directory(&[
        ("model.safetensors", shard(&["a"])),
        ("added_tokens.json", b"{".to_vec()),
        ("generation_config.json", b"{\"a\" 1}".to_vec()),
        ("chat_template.jinja", "\u{FEFF}x".into()),
    ]);
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    for part in [
        "2 problems",
        "added_tokens.json: not",
        "generation_config.json: not",
        "line 1 column 6",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    for name in ["added_tokens.json", "generation_config.json"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.chat_template().as_deref(), Some("x"));
    assert!(notes(&checkpoint).contains("byte order mark"));
}

#[cfg(unix)]
#[test]
fn a_link_to_nowhere_is_named() {
    for name in ["added_tokens.json", "model.safetensors", "tokenizer.json"] {
        let dir = directory(&[]);
        if name != "model.safetensors" {
            fs::write(dir.path().join("model.safetensors"), shard(&["a"])).unwrap();
        }
        std::os::unix::fs::symlink("../blobs/0", dir.path().join(name)).unwrap();
        let opened = Checkpoint::open(dir.path());
        let error = opened
            .and_then(|checkpoint| checkpoint.tokenizer_json())
            .unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn whole_numbers_and_masks_are_left_out_with_a_note() {
    let header = json!({
        "model.norm.weight": entry("F32", &[1], 0, 4),
        "model.embeddings.position_ids": entry("I64", &[1, 2], 4, 20),
        "model.layers.0.self_attn.bias": entry("BOOL", &[3], 20, 23),
        "model.layers.0.self_attn.masked_bias": entry("F32", &[], 23, 27),
        "model.layers.0.self_attn.rotary_emb.inv_freq": entry("F64", &[1], 27, 35),
        "model.steps": entry("I32", &[1], 35, 39),
    });
    let dir = directory(&[("model.safetensors", file(&header.to_string(), 39))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(names(&checkpoint), ["model.norm.weight"]);
    let notes = notes(&checkpoint);
    assert!(
        notes.contains("5 tensors are left out") && notes.contains("position_ids"),
        "{notes}"
    );
    for (name, dtype) in [
        ("model.layers.0.mlp.up_proj.weight", "I8"),
        ("a.qweight", "I32"),
        ("a.bias", "F64"),
    ] {
        let width = if dtype == "I8" {
            1
        } else if dtype == "I32" {
            4
        } else {
            8
        };
        let header = json!({name: entry(dtype, &[1], 0, width)});
        let error = open_single(file(&header.to_string(), width as usize))
            .unwrap_err()
            .to_string();
        assert!(error.contains(name) && error.contains(dtype), "{error}");
    }
}

#[test]
fn names_of_wrapped_and_headless_models_are_read_with_a_note() {
    let usual = [
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ];
    for stored in [
        [
            "_orig_mod.lm_head.weight",
            "_orig_mod.model.layers.0.mlp.up_proj.weight",
            "_orig_mod.model.norm.weight",
        ],
        [
            "lm_head.weight",
            "layers.0.mlp.up_proj.weight",
            "norm.weight",
        ],
    ] {
        let dir = directory(&[("model.safetensors", shard(&stored))]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(names(&checkpoint), usual);
        assert_eq!(checkpoint.read_f32(usual[1]).unwrap(), [0.0]);
        assert!(notes(&checkpoint).contains(stored[1]));
    }
    let both = directory(&[(
        "model.safetensors",
        shard(&["module.norm.weight", "norm.weight"]),
    )]);
    let error = Checkpoint::open(both.path()).unwrap_err().to_string();
    assert!(
        error.contains("'module.norm.weight' and 'norm.weight'"),
        "{error}"
    );
}

/// As in transformers 5, the tensors of the shards count, wherever the index says that they lie.
#[test]
fn an_index_that_is_wrong_about_places_is_read_with_a_note() {
    let index = json!({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "position_ids": "1.safetensors"}});
    let dir = directory(&[
        (
            "model.safetensors.index.json",
            index.to_string().into_bytes(),
        ),
        ("1.safetensors", shard(&["a", "c"])),
        ("2.safetensors", shard(&["b"])),
        ("model-00003-of-00003.safetensors", shard(&["d"])),
        ("._1.safetensors", vec![0; 3]),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b", "c"]);
    let notes = notes(&checkpoint);
    for part in [
        "2 tensors lie elsewhere",
        "1 tensors that it does not list",
        "model-00003-of-00003",
    ] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
}

#[test]
fn shards_without_an_index_are_read_if_they_are_a_whole_set() {
    let shards: Vec<_> = (1..=3)
        .map(|i| format!("model-0000{i}-of-00003.safetensors"))
        .collect();
    let with = |which: &[usize]| {
        let dir = directory(&[("._model-00001-of-00003.safetensors", vec![0; 3])]);
        for i in which {
            fs::write(dir.path().join(&shards[*i]), shard(&[["a", "b", "c"][*i]])).unwrap();
        }
        Checkpoint::open(dir.path())
    };
    let checkpoint = with(&[0, 1, 2]).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b", "c"]);
    assert!(notes(&checkpoint).contains("no model.safetensors.index.json"));
    let error = with(&[0, 2]).unwrap_err().to_string();
    assert!(
        error.contains("not a whole set") && error.contains(&shards[2]),
        "{error}"
    );
    let other = directory(&[("weights.safetensors", shard(&["a"]))]);
    let error = Checkpoint::open(other.path()).unwrap_err().to_string();
    assert!(
        error.contains("weights.safetensors") && error.contains("rename"),
        "{error}"
    );
}

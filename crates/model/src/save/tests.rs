//! What is written is read back, and nothing is ever half there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::checkpoint::TensorSource;

/// A base directory with a configuration and one small tensor.
fn base(dir: &Path, config: Value) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{\"kept\": true}").unwrap();
    fs::write(dir.join("chat_template.jinja"), "{{ x }}").unwrap();
    let group = Group::dense("w", &[1], PartType::F32);
    let mut shard = Shard::create(&dir.join("model.safetensors"), &[group]).unwrap();
    write_values(&mut shard, "w", &[1.0], SaveDtype::F32).unwrap();
    shard.finish().unwrap();
    Checkpoint::open(dir).unwrap()
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    vec![
        ("model.embed_tokens.weight".to_owned(), vec![4, 3]),
        ("model.norm.weight".to_owned(), vec![3]),
        ("scalar".to_owned(), vec![]),
    ]
}

fn values(name: &str) -> Vec<f32> {
    let shape = tensors().into_iter().find(|(n, _)| n == name).unwrap().1;
    (0..shape.iter().product::<usize>())
        .map(|i| i as f32 * 0.5 - 1.0)
        .collect()
}

type Values = Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;

fn read(name: &str) -> Values {
    Ok(values(name))
}

#[test]
fn a_saved_model_reads_back_in_every_type_and_sharding() {
    let dir = tempfile::tempdir().unwrap();
    let source = base(
        &dir.path().join("base"),
        json!({"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": {}}),
    );
    assert_eq!(SaveDtype::of_config(source.config_json()), SaveDtype::BF16);
    for dtype in [SaveDtype::F32, SaveDtype::F16, SaveDtype::BF16] {
        for shard_bytes in [1, 40, 1 << 30] {
            let target = dir.path().join(format!("{dtype:?}-{shard_bytes}"));
            let options = SaveOptions {
                shard_bytes,
                ..SaveOptions::new(dtype)
            };
            write_hf(&target, &tensors(), &mut read, &source, &options).unwrap();
            let saved = Checkpoint::open(&target).unwrap();
            for (name, shape) in tensors() {
                let info = saved.tensors().iter().find(|t| t.name == name).unwrap();
                assert_eq!(info.shape, shape);
                // Halves of small integers are exact in all three types.
                assert_eq!(saved.read_f32(&name).unwrap(), values(&name));
            }
            let config = saved.config_json();
            assert_eq!(config["dtype"], dtype.torch_name());
            assert_eq!(config["torch_dtype"], dtype.torch_name());
            assert_eq!(config["tie_word_embeddings"], true);
            assert!(config.get("quantization_config").is_none());
            assert_eq!(saved.tokenizer_json().unwrap(), b"{\"kept\": true}");
            assert_eq!(saved.chat_template().as_deref(), Some("{{ x }}"));
        }
    }
}

#[test]
fn an_existing_directory_is_kept_unless_asked() {
    let dir = tempfile::tempdir().unwrap();
    let source = base(&dir.path().join("base"), json!({}));
    let target = dir.path().join("out");
    fs::create_dir(&target).unwrap();
    let mut options = SaveOptions::new(SaveDtype::F32);
    // An empty directory is as good as none.
    write_hf(&target, &tensors(), &mut read, &source, &options).unwrap();
    fs::write(target.join("mine.txt"), "x").unwrap();
    let again = write_hf(&target, &tensors(), &mut read, &source, &options);
    assert!(matches!(again, Err(SaveError::Exists(_))));
    assert!(target.join("mine.txt").is_file());
    options.overwrite = true;
    write_hf(&target, &tensors(), &mut read, &source, &options).unwrap();
    assert!(!target.join("mine.txt").exists());
    assert!(Checkpoint::open(&target).is_ok());
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let source = base(&dir.path().join("base"), json!({}));
    let target = dir.path().join("out");
    let mut failing = |name: &str| -> Values {
        match name {
            "scalar" => Err("broken".into()),
            other => read(other),
        }
    };
    let options = SaveOptions::new(SaveDtype::F32);
    let error = write_hf(&target, &tensors(), &mut failing, &source, &options).unwrap_err();
    assert!(error.to_string().contains("'scalar': broken"), "{error}");

    let mut short = |_: &str| -> Values { Ok(vec![0.0]) };
    let error = write_hf(&target, &tensors(), &mut short, &source, &options).unwrap_err();
    assert!(matches!(error, SaveError::WrongLength { .. }));

    let mut huge = |name: &str| -> Values { Ok(vec![1e30; values(name).len()]) };
    let half = SaveOptions::new(SaveDtype::F16);
    let error = write_hf(&target, &tensors(), &mut huge, &source, &half).unwrap_err();
    assert!(matches!(error, SaveError::OutOfRange { .. }));

    let mut no_file = SaveOptions::new(SaveDtype::F32);
    no_file.extra = vec![("no/folder.json".to_owned(), Vec::new())];
    let error = write_hf(&target, &tensors(), &mut read, &source, &no_file).unwrap_err();
    assert!(error.to_string().contains("folder.json"), "{error}");

    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["base"]);
}

#[test]
fn further_files_come_with_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let source = base(&dir.path().join("base"), json!({}));
    let target = dir.path().join("out");
    let options = SaveOptions {
        extra: vec![("report.json".to_owned(), b"{}".to_vec())],
        ..SaveOptions::new(SaveDtype::F32)
    };
    let saved = write_hf(&target, &tensors(), &mut read, &source, &options).unwrap();
    assert_eq!(fs::read(target.join("report.json")).unwrap(), b"{}");
    assert_eq!(saved.files.last().unwrap(), "report.json");
}

#[test]
fn a_head_of_its_own_is_not_tied() {
    let dir = tempfile::tempdir().unwrap();
    let source = base(
        &dir.path().join("base"),
        json!({"tie_word_embeddings": true}),
    );
    let tensors = [("lm_head.weight".to_owned(), vec![2])];
    let target = dir.path().join("out");
    let mut read = |_: &str| Ok(vec![0.0; 2]);
    let options = SaveOptions::new(SaveDtype::F32);
    write_hf(&target, &tensors, &mut read, &source, &options).unwrap();
    let saved = Checkpoint::open(&target).unwrap();
    assert_eq!(saved.config_json()["tie_word_embeddings"], false);
}

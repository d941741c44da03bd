//! GGUF files as llama.cpp's converter writes them, against what transformers and gguf make of them.

use burn::tensor::Device;
use enamel_data::{Message, Tokenizer};
use enamel_model::ArchConfig;
use enamel_model::ModelInput;
use enamel_model::checkpoint::{Checkpoint, SourceDtype, TensorSource};
use serde_json::Value;

use crate::on_every_device;
use crate::parity::llama::{ids, load, logits};
use crate::support::goldens::{Tensors, assert_close, fixtures, json};

on_every_device!(logits_agree);

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&fixtures().join("gguf").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn logits_agree(device: &Device) {
    // Permuted q and k, biases and linear scaling, `rope_freqs`, quantised blocks.
    for (file, golden) in [
        ("bias", "bias"),
        ("llama3", "llama3"),
        ("quants", "quants.logits"),
    ] {
        let model = load(
            &fixtures().join("gguf").join(format!("{file}.gguf")),
            device,
        );
        let golden = Tensors::open(
            fixtures()
                .join("gguf")
                .join(format!("{golden}.safetensors")),
        );
        let input = ModelInput::new(ids(&golden.rows("input_ids"), device));
        // Logits of order one, as in `parity_llama`; hidden size 256 in `quants` adds longer sums.
        let tolerance = if file == "quants" { 2e-5 } else { 1e-5 };
        assert_close(
            file,
            &logits(&model, &input),
            &golden.floats("logits").values,
            tolerance,
        );
    }
}

#[test]
fn a_file_holds_the_same_model_as_its_directory() {
    let gguf = open("untied.gguf");
    let directory = Tensors::open(fixtures().join("llama/untied/model.safetensors"));
    let mut names: Vec<_> = gguf.tensors().iter().map(|t| t.name.clone()).collect();
    names.sort();
    assert_eq!(names, directory.names());
    for info in gguf.tensors() {
        let theirs = directory.floats(&info.name);
        assert_eq!(info.shape, theirs.shape, "{}", info.name);
        let ours = gguf.read_f32(&info.name).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(ours, theirs.values, "{}", info.name);
    }
    let read = |json: &Value| ArchConfig::from_json(json).unwrap_or_else(|e| panic!("{e}"));
    let ours = read(gguf.config_json());
    let theirs = read(&json(&fixtures().join("llama/untied/config.json")));
    assert_eq!(ours.modules(), theirs.modules());
    assert_eq!(ours.decoder().rope, theirs.decoder().rope);
    // The file holds it as f32.
    assert!((ours.decoder().rms_norm_eps - theirs.decoder().rms_norm_eps).abs() < 1e-12);
    assert_eq!(ours.max_position_embeddings, theirs.max_position_embeddings);
    assert_eq!(
        (ours.bos_token_id, &ours.eos_token_ids, ours.pad_token_id),
        (
            theirs.bos_token_id,
            &theirs.eos_token_ids,
            theirs.pad_token_id
        )
    );
}

#[test]
fn every_quantised_type_is_read_as_gguf_reads_it() {
    let file = open("quants.gguf");
    let golden = Tensors::open(fixtures().join("gguf/quants.values.safetensors"));
    let names = golden.names();
    assert_eq!(names.len(), 13);
    for name in names {
        let theirs = golden.floats(&name);
        let info = file
            .tensors()
            .iter()
            .find(|t| t.name == name)
            .expect("a tensor of the model");
        assert_eq!(info.shape, theirs.shape, "{name}");
        let ours = file.read_f32(&name).unwrap_or_else(|e| panic!("{e}"));
        match info.dtype {
            // One multiply and one add or subtract, which a CPU may fuse: values below 1.
            SourceDtype::Quantised => assert_close(&name, &ours, &theirs.values, 1e-6),
            _ => assert_eq!(ours, theirs.values, "{name}"),
        }
    }
}

#[test]
fn version_2_reads_as_version_3() {
    let dir = tempfile::TempDir::new().expect("a temporary directory");
    let mut bytes = std::fs::read(fixtures().join("gguf/untied.gguf")).expect("a fixture");
    assert_eq!(bytes[4..8], [3, 0, 0, 0]);
    // The two differ only in that 3 may be big-endian.
    bytes[4] = 2;
    let path = dir.path().join("two.gguf");
    std::fs::write(&path, bytes).expect("room on the disk");
    let two = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let three = open("untied.gguf");
    assert_eq!(two.tensors(), three.tensors());
    let name = "model.layers.1.self_attn.k_proj.weight";
    assert_eq!(two.read_f32(name).ok(), three.read_f32(name).ok());
}

#[test]
fn tokenizer_and_template_come_out_of_the_metadata() {
    let gguf = open("untied.gguf");
    let tokenizer = Tokenizer::from_parts(
        &gguf.tokenizer_json().unwrap_or_else(|e| panic!("{e}")),
        gguf.tokenizer_config().as_ref(),
        gguf.chat_template().as_deref(),
    )
    .unwrap_or_else(|e| panic!("{e}"));
    crate::parity::text::assert_as_transformers(&tokenizer);
    let template = tokenizer.chat_template().expect("the file has a template");
    let text = template
        .render(&[Message::user("hi")], true)
        .unwrap_or_else(|e| panic!("{e}"));
    assert!(
        text.ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        "{text}"
    );
}

//! Models that bitsandbytes quantised: logits with and without a PEFT adapter, and what is refused.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use enamel_adapter::load_pretrained;
use enamel_model::ModelInput;
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use tempfile::TempDir;

use crate::on_every_device;
use crate::parity::llama::{ids, load, logits};
use crate::support::goldens::{Tensors, assert_close, copy, fixtures};

on_every_device!(logits_of_a_quantised_llama_with_a_peft_adapter_agree,);

fn logits_of_a_quantised_llama_with_a_peft_adapter_agree(device: &Device) {
    let folder = fixtures().join("bnb");
    for case in ["nf4", "fp4"] {
        let golden = Tensors::open(folder.join(format!("{case}.safetensors")));
        let input = ModelInput::new(ids(&golden.rows("none.input_ids"), device));
        let mut model = load(&folder.join(case), device);
        let base = golden.floats("none.logits.base").values;
        assert_close(case, &logits(&model, &input), &base, 1e-4);
        load_pretrained(&mut model, &folder.join("adapter"), false)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let adapted = golden.floats("none.logits").values;
        assert_close(case, &logits(&model, &input), &adapted, 1e-4);
    }
}

/// Opens the NF4 model with every `from` in its weight file made `to`, which is as long.
fn refusal(from: &str, to: &str) -> String {
    assert_eq!(from.len(), to.len());
    let dir = TempDir::new().expect("a temporary directory");
    let folder = fixtures().join("bnb/nf4");
    copy(&folder.join("config.json"), &dir.path().join("config.json"));
    let mut bytes = fs::read(folder.join("model.safetensors")).expect("the weights");
    for at in 0..bytes.len() - from.len() {
        if bytes[at..].starts_with(from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    }
    fs::write(dir.path().join("model.safetensors"), bytes).expect("room on the disk");
    error(dir.path())
}

fn error(dir: &Path) -> String {
    Checkpoint::open(dir)
        .expect_err("a broken checkpoint")
        .to_string()
}

#[test]
fn broken_parts_of_quantised_weights_are_named_with_their_tensor_and_file() {
    let text = refusal("q_proj.weight.absmax", "q_proj.weight.absmaz");
    assert!(
        text.contains("q_proj.weight' in model.safetensors"),
        "{text}"
    );
    assert!(text.contains("`absmax`"), "{text}");
    let text = refusal("\"quant_type\"", "\"quant_typo\"");
    assert!(
        text.contains("quant_state") && text.contains("down_proj"),
        "{text}"
    );
    let text = refusal("\"quant_type\": \"nf4\"", "\"quant_type\": \"nf5\"");
    assert!(text.contains("nf5"), "{text}");
    assert!(text.contains("7 problems"), "{text}");
}

#[test]
fn a_quantised_weight_is_listed_with_the_shape_it_stands_for() {
    let model = Checkpoint::open(&fixtures().join("bnb/nf4")).expect("a sound checkpoint");
    let name = "model.layers.0.self_attn.k_proj.weight";
    let info = model.tensors().iter().find(|t| t.name == name).expect(name);
    assert_eq!(info.shape, [32, 64]);
    assert!(model.tensors().iter().all(|t| !t.name.contains("absmax")));
    let packed = model.read_packed(name).expect("sound").expect("quantised");
    assert_eq!(packed.name(), "nf4");
}

//! LoRA against PEFT: logits, every gradient, merged weights, from the adapter files PEFT wrote.

use burn::tensor::Device;

use crate::on_every_device;
use crate::support::adapted::{check_gradients, check_logits, check_merge, check_switch};
pub use crate::support::adapted::{folder, meta};
use crate::support::goldens::{LORAS, fixtures};

on_every_device!(
    logits_with_a_peft_adapter_agree,
    every_gradient_agrees,
    merged_weights_and_logits_agree,
    an_adapter_switched_off_or_taken_off_leaves_the_base,
);

fn logits_with_a_peft_adapter_agree(device: &Device) {
    for case in LORAS {
        check_logits(case, device);
    }
}

fn every_gradient_agrees(device: &Device) {
    for case in LORAS {
        check_gradients(case, device);
    }
}

fn merged_weights_and_logits_agree(device: &Device) {
    for case in ["all_linear", "bias", "patterns"] {
        check_merge(case, device);
    }
}

fn an_adapter_switched_off_or_taken_off_leaves_the_base(device: &Device) {
    for case in LORAS {
        check_switch(case, device);
    }
}

#[test]
fn every_lora_case_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("lora"))
        .expect("fixtures/lora")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut listed = LORAS.map(str::to_owned).to_vec();
    listed.sort();
    assert_eq!(folders, listed);
}

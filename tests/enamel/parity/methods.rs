//! PEFT's other methods and LoRA's options against PEFT: logits, every gradient, merged weights, curves.

use burn::tensor::Device;
use enamel_adapter::{
    AdapterConfig, FullConfig, attach, export_trainable, load_pretrained, trainable,
};

use crate::on_every_device;
use crate::parity::llama::{assert_logits, logits};
use crate::support::adapted::{
    base, batch, check_gradients, check_logits, check_merge, check_switch, folder, load_adapted,
    meta,
};
use crate::support::curves::Curve;
use crate::support::devices::device;
use crate::support::goldens::{METHODS, OTHER_METHODS, Tensors, fixtures};

on_every_device!(
    logits_with_a_peft_adapter_agree,
    every_gradient_agrees,
    merged_weights_and_logits_agree,
    an_adapter_switched_off_or_taken_off_leaves_the_base,
    twenty_steps_agree,
    full_fine_tuning_agrees,
);

fn logits_with_a_peft_adapter_agree(device: &Device) {
    for case in METHODS {
        check_logits(case, device);
    }
}

fn every_gradient_agrees(device: &Device) {
    for case in METHODS {
        check_gradients(case, device);
    }
}

fn merged_weights_and_logits_agree(device: &Device) {
    let mut seen = 0;
    for case in METHODS {
        if folder(case).join("merged.safetensors").is_file() {
            check_merge(case, device);
            seen += 1;
        }
    }
    assert_eq!(seen, 25, "cases with merged weights");
}

fn an_adapter_switched_off_or_taken_off_leaves_the_base(device: &Device) {
    for case in METHODS {
        check_switch(case, device);
    }
}

fn twenty_steps_agree(device: &Device) {
    let mut seen = 0;
    for case in METHODS {
        if !folder(case).join("curve_plain.json").is_file() {
            continue;
        }
        seen += 1;
        let (model, _) = load_adapted(case, true, &device.clone().autodiff());
        let model = Curve::open(case, "plain").follow(model);
        Curve::check_end(case, "plain", export_trainable(&model));
    }
    assert_eq!(seen, 18, "cases with a curve");
}

fn full_fine_tuning_agrees(device: &Device) {
    let case = "full";
    let mut model = base(case, &device.clone().autodiff());
    let config = AdapterConfig::Full(FullConfig::default());
    let plan = attach(&mut model, &config, 1).unwrap_or_else(|e| panic!("{e}"));
    let meta = meta(case);
    assert_eq!(Some(plan.trainable as u64), meta["trainable"].as_u64());
    assert_eq!(Some(plan.total as u64), meta["total"].as_u64());
    let elements: usize = trainable(&model)
        .iter()
        .map(|(.., shape)| shape.iter().product::<usize>())
        .sum();
    assert_eq!(elements, plan.trainable);
    let model = Curve::open(case, "plain").follow(model);
    // The golden has the first layer and the norms.
    let golden = Tensors::open(folder(case).join("after_plain.safetensors"));
    let all = export_trainable(&model).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(all.len(), 21, "tensors of the whole model");
    let some = all
        .into_iter()
        .filter(|(name, ..)| golden.has(name))
        .collect();
    Curve::check_end(case, "plain", Ok(some));
}

#[test]
fn an_adapter_with_a_copy_of_the_embedding_is_taken() {
    // What PEFT writes by itself when the embedding is a target.
    let device = device("flex");
    let case = "lora_embed";
    let mut model = base(case, &device);
    let dir = folder(case).join("adapter_auto");
    assert!(
        Tensors::open(dir.join("adapter_model.safetensors"))
            .has("base_model.model.model.embed_tokens.base_layer.weight")
    );
    load_pretrained(&mut model, &dir, false).unwrap_or_else(|e| panic!("{e}"));
    let batch = batch(case, &device);
    let theirs = batch.golden.floats("right.logits").values;
    let ours = logits(&model, &batch.input);
    assert_logits(case, &ours, &theirs, &batch.mask, 1e-5);
}

#[test]
fn every_case_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("methods"))
        .expect("fixtures/methods")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut listed: Vec<_> = METHODS
        .iter()
        .chain(&OTHER_METHODS)
        .map(|s| (*s).to_owned())
        .collect();
    listed.sort();
    assert_eq!(folders, listed);
}

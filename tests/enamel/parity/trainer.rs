//! Twenty steps through `enamel train` against PEFT and torch's AdamW, loss by loss.

use std::path::Path;

use serde_json::Value;

use crate::parity::lora::folder;
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Tensors, assert_close_to_largest, copy, fixtures, json};

/// Runs the golden curve `name` of a LoRA case on `device` and compares it step by step.
fn check(case: &str, name: &str, device: &str) {
    check_in(&folder(case), case, name, device);
}

/// The same for a case of any method.
fn check_method(case: &str, name: &str) {
    check_in(&fixtures().join("methods").join(case), case, name, "flex");
}

fn check_in(folder: &Path, case: &str, name: &str, device: &str) {
    let golden = json(&folder.join(format!("curve_{name}.json")));
    let settings = &golden["settings"];
    let workshop = Workshop::new();
    copy(
        &folder.join(format!("curve_{name}.jsonl")),
        &workshop.path("rows.jsonl"),
    );
    workshop.recipe(
        "curve.toml",
        &format!("init_from = {:?}", folder.join("adapter")),
        "train = \"rows.jsonl\"\nformat = \"tokens\"\nmax_length = 64\nshuffle = false",
        &format!(
            "max_steps = 20\nbatch_size = {}\ngradient_accumulation_steps = {}\nlearning_rate = {}\n\
             lr_scheduler_type = {}\nwarmup_steps = {}\nmax_grad_norm = {}\nweight_decay = {}\n\
             adam_beta1 = {}\nadam_beta2 = {}\nadam_epsilon = {}\nlogging_steps = 1\nsamples = 0{}",
            settings["rows_per_batch"],
            settings["accumulate"],
            settings["lr"],
            settings["schedule"],
            settings["warmup"],
            settings["clip"].as_f64().unwrap_or(0.0),
            settings["weight_decay"],
            settings["betas"][0],
            settings["betas"][1],
            settings["eps"],
            match &settings["loraplus_lr_ratio"] {
                Value::Null => String::new(),
                ratio => format!("\nloraplus_lr_ratio = {ratio}"),
            },
        ),
    );
    workshop.run(&["train", "curve.toml", "--device", device]);

    let steps = workshop.metrics("run", "train");
    assert_eq!(steps.len(), 20);
    // Relative for the norm, whose size is not one; see `fixtures/README.md` for the 1e-4.
    for (key, ours, relative) in [
        ("loss", "loss", false),
        ("lr", "learning_rate", true),
        ("grad_norm", "grad_norm", true),
    ] {
        for (step, (ours, theirs)) in steps
            .iter()
            .map(|s| number(&s[ours]))
            .zip(list(&golden[key]))
            .enumerate()
        {
            let tolerance = 1e-4 * if relative { theirs.abs() } else { 1.0 };
            assert!(
                (ours - theirs).abs() <= tolerance,
                "{case}, {name}, {device}: {key} of step {}: {ours} for {theirs}",
                step + 1
            );
        }
    }

    let ours = Tensors::open(workshop.path("run/adapter/adapter_model.safetensors"));
    let theirs = Tensors::open(folder.join(format!("after_{name}.safetensors")));
    assert_eq!(ours.names(), theirs.names());
    for tensor in theirs.names() {
        // An entry whose gradient is near nothing may step either way in its first steps, by the
        // learning rate: 5e-3 of values of order 0.1. A wrong rule is off by more everywhere.
        let what = format!("{case}, {name}, {device}: {tensor} after 20 steps");
        let (a, b) = (ours.floats(&tensor).values, theirs.floats(&tensor).values);
        assert_close_to_largest(&what, &a, &b, 1e-2);
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn list(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(number)
        .collect()
}

#[test]
fn constant_rate_without_clipping() {
    check("all_linear", "plain", "flex");
}

#[test]
fn clipped_with_a_linear_schedule() {
    check("all_linear", "clip", "flex");
}

#[test]
fn accumulated_by_trained_tokens_with_a_cosine_schedule() {
    check("all_linear", "accumulate", "flex");
}

#[test]
fn embedding_and_head_trained_whole() {
    check("modules_to_save", "plain", "flex");
}

#[test]
fn on_ndarray() {
    check("all_linear", "plain", "ndarray");
    check("all_linear", "accumulate", "ndarray");
}

#[test]
fn lora_plus_gives_b_and_embeddings_rates_of_their_own() {
    check_method("lora_plus", "plus");
    check_method("lora_plus_embed", "plus");
}

#[test]
fn every_other_method_on_the_untied_model() {
    for case in [
        "lora_dora",
        "lora_embed",
        "lora_trainable_tokens",
        "loha",
        "lokr",
        "lokr_full",
        "vera",
        "ia3",
        "head",
        "miss_mini",
    ] {
        check_method(case, "plain");
    }
}

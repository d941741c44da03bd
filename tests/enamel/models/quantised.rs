//! Training on quantised bases through `enamel train`: reproducible, resumable, refused where it cannot be.

use crate::cli::adapter::path;
use crate::support::enamel_process::{Workshop, signal, wait_for};

const FOUR: &str = "model.quantization.load_in_4bit=true";
/// Long enough to be stopped on the way.
const LONG: &str = "train.epochs=12";
const DOUBLE: &str = "model.quantization.bnb_4bit_use_double_quant=true";

#[test]
fn a_run_on_nf4_stopped_and_resumed_ends_at_the_same_bits() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    let train = |output: &str, more: &[&str]| {
        let arguments = ["train", path(&recipe), "--output", output];
        let quantised = ["--set", FOUR, "--set", DOUBLE, "--set", LONG];
        workshop.run(&[&arguments[..], &quantised, more].concat())
    };
    train("whole", &[]);
    let arguments = ["train", path(&recipe), "--output", "parts"];
    let quantised = ["--set", FOUR, "--set", DOUBLE, "--set", LONG];
    let mut command = workshop.command(&[&arguments[..], &quantised].concat());
    let mut child = command.spawn().expect("the binary runs");
    let seen = workshop.path("parts/checkpoints/step-000012");
    assert!(wait_for(&seen, &mut child), "it ended before");
    signal(&child, "KILL");
    child.wait().expect("a child of ours");
    train("parts", &["--resume"]);
    assert!(workshop.adapter("whole") == workshop.adapter("parts"));
    let lock = std::fs::read_to_string(workshop.path("whole/recipe.lock.toml")).expect("a lock");
    assert!(lock.contains("load_in_4bit = true"), "{lock}");
    // The lock file alone says all of it.
    workshop.run(&["train", "whole/recipe.lock.toml", "--output", "locked"]);
    assert!(workshop.adapter("whole") == workshop.adapter("locked"));
    // Another base gives another adapter.
    workshop.run(&["train", path(&recipe), "--output", "dense", "--set", LONG]);
    assert!(workshop.adapter("whole") != workshop.adapter("dense"));
    let answer = ["generate", "--model", "model", "--adapter", "whole/adapter"];
    let prompt = [
        "--prompt",
        "2+2?",
        "--max-new-tokens",
        "4",
        "--load-in-4bit",
    ];
    workshop.run(&[&answer[..], &prompt[..]].concat());
}

#[test]
fn what_changes_the_base_is_refused_on_a_quantised_one() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    for set in [
        "adapter.init_lora_weights=pissa",
        "adapter.modules_to_save=['model.layers.0.mlp.up_proj']",
    ] {
        let error = workshop.fail(&["train", path(&recipe), "--set", FOUR, "--set", set]);
        assert!(
            error.contains("int4") || error.contains("nf4"),
            "{set}: {error}"
        );
        assert!(!workshop.path("run").exists(), "{set}");
    }
    let size = "model.quantization.bnb_4bit_blocksize=48";
    let kind = "model.quantization.bnb_4bit_quant_type=int4";
    let error = workshop.fail(&[
        "train",
        path(&recipe),
        "--set",
        FOUR,
        "--set",
        size,
        "--set",
        kind,
    ]);
    assert!(error.contains("one of 32, 64"), "{error}");
    assert!(error.contains("int4"), "{error}");
}

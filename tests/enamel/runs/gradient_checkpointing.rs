//! `train.gradient_checkpointing`: another amount of memory, and the same numbers.

use std::fs;

use crate::cli::methods::{DATA, TRAIN, methods, weights};
use crate::support::enamel_process::Workshop;

const ON: &str = "train.gradient_checkpointing=true";

#[test]
fn every_method_ends_at_the_same_bits_with_and_without_it() {
    let workshop = Workshop::new();
    for (name, adapter, train) in methods() {
        let train = format!("{TRAIN}{train}\ngradient_accumulation_steps = 2");
        workshop.recipe("m.toml", &adapter, DATA, &train);
        let run = |output: &str, set: &str| {
            workshop.run(&[
                "train",
                "m.toml",
                "--output",
                output,
                "--overwrite",
                "--set",
                set,
            ]);
            (weights(&workshop, output, name), losses(&workshop, output))
        };
        let plain = run("plain", "train.gradient_checkpointing=false");
        for (output, set) in [
            ("each", ON),
            ("both", "train.gradient_checkpointing=every:2"),
        ] {
            assert!(run(output, set) == plain, "{name}, {set}");
        }
    }
}

/// Loss and gradient norm of every step.
fn losses(workshop: &Workshop, run: &str) -> Vec<String> {
    let steps = workshop.metrics(run, "train");
    let figures = steps
        .iter()
        .map(|e| format!("{} {}", e["loss"], e["grad_norm"]));
    figures.collect()
}

#[test]
fn a_run_may_change_it_when_it_is_resumed() {
    let workshop = Workshop::new();
    let adapter = "r = 4\nlora_dropout = 0.1\ntarget_modules = \"all-linear\"";
    workshop.recipe("m.toml", adapter, DATA, TRAIN);
    workshop.run(&["train", "m.toml", "--output", "plain"]);
    workshop.run(&["train", "m.toml", "--output", "again", "--set", ON]);
    for (from, set) in [
        ("plain", ON),
        ("again", ON),
        ("again", "train.gradient_checkpointing=false"),
    ] {
        let _ = fs::remove_dir_all(workshop.path("parts"));
        let checkpoint = workshop.path(&format!("{from}/checkpoints/step-000004"));
        let checkpoint = checkpoint.display().to_string();
        workshop.run(&[
            "train",
            "m.toml",
            "--output",
            "parts",
            "--resume",
            &checkpoint,
            "--set",
            set,
        ]);
        assert!(
            workshop.adapter("parts") == workshop.adapter("plain"),
            "from {from}, {set}"
        );
    }
}

#[test]
fn it_is_frozen_in_the_lock_file_and_shown_by_plan_and_the_report() {
    let workshop = Workshop::new();
    workshop.recipe("m.toml", "r = 4", DATA, TRAIN);
    let two = "train.gradient_checkpointing=every:2";
    let read = |file: &str| fs::read_to_string(workshop.path(file)).expect("a file of the run");
    workshop.run(&["train", "m.toml", "--output", "plain"]);
    assert!(read("plain/recipe.lock.toml").contains("gradient_checkpointing = false"));
    workshop.run(&["train", "m.toml", "--output", "two", "--set", two]);
    assert!(read("two/recipe.lock.toml").contains("gradient_checkpointing = \"every:2\""));
    assert!(read("two/report.html").contains("gradient_checkpointing"));
    workshop.run(&["train", "two/recipe.lock.toml", "--output", "again"]);
    assert!(workshop.adapter("again") == workshop.adapter("plain"));

    let said = workshop.run(&["plan", "m.toml"]);
    assert!(said.contains("kept       all activations"), "{said}");
    let said = workshop.run(&["plan", "m.toml", "--set", two]);
    assert!(said.contains("activations of 2 blocks at a time"), "{said}");
    let error = workshop.fail(&[
        "plan",
        "m.toml",
        "--set",
        "train.gradient_checkpointing=every:0",
    ]);
    assert!(error.contains("train.gradient_checkpointing"), "{error}");
    assert!(error.contains("\"every:N\""), "{error}");
}

//! Knowing the memory before a run, and ending well where it is not enough.

use std::process::Output;

use serde_json::json;

use crate::support::enamel_process::{Workshop, said};

/// A workshop whose rows are long: a step of all 48 takes a few hundred megabytes.
fn long_rows() -> Workshop {
    let workshop = Workshop::new();
    let row = |i: usize| {
        let text = format!("{}+{}? ", i % 7, i / 7).repeat(200);
        json!({ "messages": [
            { "role": "user", "content": text },
            { "role": "assistant", "content": text },
        ]})
    };
    workshop.rows("train.jsonl", (0..48).map(row));
    workshop.recipe(
        "m.toml",
        "r = 4\ntarget_modules = \"all-linear\"",
        "train = \"train.jsonl\"\nmax_length = 4096",
        "max_steps = 3\nbatch_size = 48\nsave_strategy = \"steps\"\nsave_steps = 1\nsamples = 0",
    );
    workshop
}

#[test]
fn the_plan_adds_up_and_fit_names_the_settings_to_change() {
    let workshop = long_rows();
    let said = workshop.run(&["plan", "m.toml"]);
    for part in [
        "base",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "peak",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(
        said.contains("at most 48 × ") && said.contains("fits flex"),
        "{said}"
    );
    let said = workshop.run(&["plan", "m.toml", "--fit", "150MB"]);
    assert!(said.contains("gradient_checkpointing = true"), "{said}");
    let output = workshop.output(&["plan", "m.toml", "--fit", "a lot"]);
    assert!(!output.status.success());
    assert!(crate::support::enamel_process::said(&output).contains("a lot"));
}

/// `enamel` where the address space ends at so many megabytes.
#[cfg(target_os = "linux")]
fn within(workshop: &Workshop, megabytes: usize, arguments: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_enamel-under-test");
    let script = format!("ulimit -v {} && exec \"$0\" \"$@\"", megabytes * 1000);
    let command = workshop.command(&[]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &script, binary]).args(arguments);
    // Stacks count too.
    shell.env("RAYON_NUM_THREADS", "2");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        shell.current_dir(dir);
    }
    shell.output().expect("a shell")
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_that_would_not_fit_does_not_start_and_says_what_would() {
    let workshop = long_rows();
    let train = ["train", "m.toml", "--output", "out"];
    let output = within(&workshop, 260, &train);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("would not fit into memory"), "{said}");
    assert!(said.contains("ulimit -v"), "{said}");
    assert!(said.contains("gradient_checkpointing = true"), "{said}");
    assert!(!workshop.path("out").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn out_of_memory_ends_with_the_plan_and_leaves_checkpoints_that_resume() {
    let workshop = long_rows();
    let train = ["train", "m.toml", "--output", "out"];
    workshop.run(&train);
    let whole = workshop.adapter("out");
    // As it was after one of three steps.
    std::fs::remove_dir_all(workshop.path("out/adapter")).expect("an adapter");
    std::fs::remove_file(workshop.path("out/summary.json")).expect("a summary");
    for step in ["000002", "000003"] {
        let step = workshop.path(&format!("out/checkpoints/step-{step}"));
        std::fs::remove_dir_all(step).expect("a checkpoint");
    }
    let more = ["--resume", "--set", "train.check_memory=warn"];
    let output = within(&workshop, 260, &[&train[..], &more].concat());
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("out of memory") && said.contains("activations"),
        "{said}"
    );
    assert!(said.contains("--resume"), "{said}");
    workshop.run(&[&train[..], &["--resume"]].concat());
    assert!(workshop.adapter("out") == whole);
}

//! `enamel train` on a tiny model: what it leaves, and that a run is the same however it got there.

use std::fs;

use serde_json::Value;

use crate::support::enamel_process::{Workshop, said, signal, text, wait_for};
use crate::support::goldens::{Tensors, assert_close, json};

fn losses(workshop: &Workshop, run: &str) -> Vec<f64> {
    workshop
        .metrics(run, "train")
        .iter()
        .map(|e| e["loss"].as_f64().expect("a loss"))
        .collect()
}

#[test]
fn a_run_leaves_what_it_promises_and_learns() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let said = workshop.run(&["train", "recipe.toml"]);
    assert!(said.contains("run/adapter"), "{said}");
    for file in [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "recipe.lock.toml",
        "metrics.jsonl",
        "summary.json",
        "samples.json",
        "report.html",
        "checkpoints/step-000024/state.json",
        "checkpoints/step-000024/adapter/adapter_model.safetensors",
    ] {
        assert!(
            workshop.path("run").join(file).is_file(),
            "{file} is missing"
        );
    }
    let train = workshop.metrics("run", "train");
    assert_eq!(train.len(), 24);
    let steps: Vec<_> = train.iter().map(|e| e["step"].as_u64()).collect();
    assert_eq!(steps, (1..=24).map(Some).collect::<Vec<_>>());
    let valid = workshop.metrics("run", "valid");
    let valid: Vec<_> = valid
        .iter()
        .map(|e| e["loss"].as_f64().expect("a loss"))
        .collect();
    assert!(
        valid.len() >= 5,
        "before the first step and after each six: {valid:?}"
    );
    // Answers are one or two digits of a fixed form: even 4096 parameters learn that form.
    assert!(
        valid.last() < valid.first().map(|v| v * 0.8).as_ref(),
        "{valid:?}"
    );
    // No half-written file is left behind.
    let left: Vec<_> = fs::read_dir(workshop.path("run"))
        .expect("the run")
        .chain(fs::read_dir(workshop.path("run/checkpoints")).expect("checkpoints"))
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_lock_file_gives_the_same_adapter() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&["train", "recipe.toml"]);
    workshop.run(&["train", "run/recipe.lock.toml", "--output", "again"]);
    assert!(workshop.adapter("run") == workshop.adapter("again"));
    assert_eq!(losses(&workshop, "run"), losses(&workshop, "again"));

    // A lock file holds the hashes of what it was made from.
    workshop.rows(
        "train.jsonl",
        [serde_json::json!({ "text": "another text" })],
    );
    let error = workshop.fail(&["train", "run/recipe.lock.toml", "--output", "third"]);
    assert!(error.contains("train.jsonl"), "{error}");
}

#[test]
fn threads_and_the_seed() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let run = |output: &str, threads: &str, more: &[&str]| {
        let arguments = [&["train", "recipe.toml", "--output", output], more].concat();
        let output = workshop
            .command(&arguments)
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .expect("the binary runs");
        assert!(output.status.success(), "{}", said(&output));
    };
    run("one", "1", &[]);
    run("two", "2", &[]);
    run("seed", "2", &["--set", "seed=4"]);
    assert!(
        workshop.adapter("one") == workshop.adapter("two"),
        "the thread count shows"
    );
    assert!(
        workshop.adapter("one") != workshop.adapter("seed"),
        "the seed does not show"
    );
}

/// A long run with frequent checkpoints, to interrupt.
fn long_recipe(workshop: &Workshop) {
    workshop.recipe(
        "long.toml",
        "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1",
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 150\nbatch_size = 3\ngradient_accumulation_steps = 2\nlearning_rate = 2e-3\n\
         lr_scheduler_type = \"cosine\"\nwarmup_ratio = 0.1\nlogging_steps = 1\n\
         eval_strategy = \"steps\"\neval_steps = 25\nsave_steps = 10\nsave_total_limit = 2\nsamples = 0",
    );
}

#[test]
fn killed_stopped_and_resumed_equals_uninterrupted() {
    let workshop = Workshop::new();
    long_recipe(&workshop);
    workshop.run(&["train", "long.toml", "--output", "whole"]);
    let whole = losses(&workshop, "whole");
    assert_eq!(whole.len(), 150);

    let mut at = 0;
    for (how, code) in [
        ("KILL", None),
        ("TERM", Some(143)),
        ("INT", Some(130)),
        ("HUP", Some(129)),
    ] {
        // Each interruption comes after a checkpoint that the last one had not reached.
        at += 20;
        let mut arguments = vec!["train", "long.toml", "--output", "parts"];
        if how != "KILL" {
            arguments.push("--resume");
        }
        let mut child = workshop
            .command(&arguments)
            .spawn()
            .expect("the binary runs");
        let seen = workshop.path(&format!("parts/checkpoints/step-{at:06}"));
        assert!(
            wait_for(&seen, &mut child),
            "{how}: it ended before step {at}"
        );
        signal(&child, how);
        let output = child.wait_with_output().expect("a child of ours");
        assert_eq!(output.status.code(), code, "{how}: {}", said(&output));
        assert!(
            !workshop.path("parts/adapter").exists(),
            "{how}: it was too late"
        );
    }
    let said = workshop.run(&["train", "long.toml", "--output", "parts", "--resume"]);
    assert!(
        workshop.adapter("whole") == workshop.adapter("parts"),
        "{said}"
    );
    assert_eq!(whole, losses(&workshop, "parts"));
    let steps = |run| -> Vec<Value> {
        workshop
            .metrics(run, "valid")
            .into_iter()
            .map(|e| e["loss"].clone())
            .collect()
    };
    assert_eq!(steps("whole"), steps("parts"));
}

#[test]
fn the_best_adapter_is_kept_wherever_it_fell() {
    let workshop = Workshop::new();
    // What is validated is nothing like what is trained, so the loss does not fall to the end;
    // checkpoints are rarer than validations, so that the best one falls between two of them.
    let unlike = serde_json::json!({ "messages": [
        { "role": "user", "content": "Say a word" },
        { "role": "assistant", "content": "marmalade" },
    ]});
    workshop.rows("valid.jsonl", [unlike]);
    workshop.recipe(
        "wild.toml",
        "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"",
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 20\nbatch_size = 4\nlearning_rate = 2e-2\nlr_scheduler_type = \"constant\"\n\
         eval_strategy = \"steps\"\neval_steps = 1\nsave_steps = 20\nsave_total_limit = 1\n\
         load_best_model_at_end = true\nsamples = 0",
    );
    workshop.run(&["train", "wild.toml"]);
    let losses = workshop.metrics("run", "valid").into_iter().map(|e| {
        let step = e["step"].as_u64().expect("a number");
        (step, e["loss"].as_f64().expect("a number"))
    });
    // Step 0 is the model before training, of which there is no checkpoint.
    let losses: Vec<(u64, f64)> = losses.filter(|(step, _)| *step > 0).collect();
    let (best, loss) = losses
        .iter()
        .copied()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .expect("validations");
    assert!(
        best < 20,
        "the last is the best, which shows nothing: {losses:?}"
    );
    let summary = crate::support::goldens::json(&workshop.path("run/summary.json"));
    assert_eq!(summary["best"]["step"], best);
    assert_eq!(summary["valid_loss"], loss);
    let kept = workshop.path(&format!("run/checkpoints/step-{best:06}"));
    let kept = fs::read(kept.join("adapter/adapter_model.safetensors")).expect("the best one");
    assert!(workshop.adapter("run").0 == kept);
}

#[test]
fn training_stops_early_when_the_loss_gains_nothing() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&[
        "train",
        "recipe.toml",
        "--set",
        "train.eval_steps=2",
        "--set",
        "train.early_stopping_patience=2",
        // No gain is large enough: the first validation sets the mark, the next two miss it.
        "--set",
        "train.early_stopping_threshold=100",
    ]);
    let summary = crate::support::goldens::json(&workshop.path("run/summary.json"));
    assert_eq!(summary["step"], 6);
    assert_eq!(summary["stopped_early"], true);
    assert!(workshop.path("run/adapter").exists());
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&["train", "recipe.toml"]);
    let before = workshop.adapter("run");
    let losses_before = losses(&workshop, "run");
    workshop.run(&["train", "recipe.toml", "--resume"]);
    assert!(workshop.adapter("run") == before);
    assert_eq!(losses(&workshop, "run"), losses_before);
}

#[test]
fn a_finished_run_is_not_replaced_without_asking() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&["train", "recipe.toml"]);
    let before = workshop.adapter("run");
    let error = workshop.fail(&["train", "recipe.toml", "--set", "seed=9"]);
    assert!(
        error.contains("--resume") && error.contains("overwrite"),
        "{error}"
    );
    assert!(before == workshop.adapter("run"));
    // Resuming under another recipe is not the same run.
    let error = workshop.fail(&["train", "recipe.toml", "--set", "seed=9", "--resume"]);
    assert!(error.contains("another recipe"), "{error}");
    workshop.run(&["train", "recipe.toml", "--set", "seed=9", "--overwrite"]);
    assert!(before != workshop.adapter("run"));
}

#[test]
fn eight_times_one_is_one_times_eight() {
    let workshop = Workshop::new();
    for (name, size, accumulate) in [("wide", 8, 1), ("deep", 1, 8)] {
        workshop.recipe(
            &format!("{name}.toml"),
            "r = 4\nlora_alpha = 8",
            "train = \"train.jsonl\"\nmax_length = 128",
            &format!(
                "max_steps = 8\nbatch_size = {size}\ngradient_accumulation_steps = {accumulate}\n\
                 learning_rate = 5e-3\nlogging_steps = 1\nsamples = 0"
            ),
        );
        workshop.run(&["train", &format!("{name}.toml"), "--output", name]);
    }
    for (a, b) in losses(&workshop, "wide")
        .iter()
        .zip(losses(&workshop, "deep"))
    {
        // Sums in another order, eight AdamW steps long.
        assert!((a - b).abs() < 1e-5, "{a} and {b}");
    }
}

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_with_its_step() {
    let workshop = Workshop::new();
    workshop.recipe(
        "wild.toml",
        "r = 4\nlora_alpha = 8",
        "train = \"train.jsonl\"\nmax_length = 128",
        "max_steps = 40\nbatch_size = 4\nlearning_rate = 3e38\nmax_grad_norm = 0.0\n\
         lr_scheduler_type = \"linear\"\nwarmup_steps = 0\nsave_strategy = \"steps\"\nsave_steps = 1\n\
         logging_steps = 1\nsamples = 0",
    );
    let error = workshop.fail(&["train", "wild.toml"]);
    assert!(
        error.contains("step") && error.contains("train.jsonl"),
        "{error}"
    );
    // Whatever was saved before is whole and finite.
    for entry in fs::read_dir(workshop.path("run/checkpoints"))
        .expect("checkpoints")
        .flatten()
    {
        let adapter = Tensors::open(entry.path().join("adapter/adapter_model.safetensors"));
        for name in adapter.names() {
            assert!(
                adapter.floats(&name).values.iter().all(|v| v.is_finite()),
                "{name}"
            );
        }
    }
    assert!(!workshop.path("run/adapter").exists());
}

#[test]
fn training_can_start_from_pefts_adapter() {
    let workshop = Workshop::new();
    let peft = crate::parity::lora::folder("all_linear").join("adapter");
    workshop.recipe(
        "more.toml",
        &format!("init_from = {peft:?}"),
        "train = \"train.jsonl\"\nmax_length = 128",
        "max_steps = 1\nbatch_size = 4\nlearning_rate = 1e-12\nweight_decay = 0.0\nsamples = 0",
    );
    workshop.run(&["train", "more.toml"]);
    let theirs = Tensors::open(peft.join("adapter_model.safetensors"));
    let ours = Tensors::open(workshop.path("run/adapter/adapter_model.safetensors"));
    assert_eq!(ours.names(), theirs.names());
    for name in theirs.names() {
        // A step of 1e-12 leaves every value where it was.
        assert_close(
            &name,
            &ours.floats(&name).values,
            &theirs.floats(&name).values,
            1e-7,
        );
    }
    let config = json(&workshop.path("run/adapter/adapter_config.json"));
    assert_eq!(
        (config["r"].as_u64(), config["lora_alpha"].as_f64()),
        (Some(4), Some(8.0))
    );
}

#[test]
fn mistakes_are_named() {
    let workshop = Workshop::new();
    let check = |change: &str, expected: &[&str]| {
        let error = workshop.fail(&["train", "recipe.toml", "--set", change]);
        for part in expected {
            assert!(
                error.contains(part),
                "--set {change}: {part} is missing: {error}"
            );
        }
    };
    workshop.usual_recipe();
    check("train.learning_rat=1", &["learning_rat", "learning_rate"]);
    check("train.learning_rate=-1", &["learning_rate"]);
    check("adapter.target_modules=[\"q_prog\"]", &["q_prog", "q_proj"]);
    check("data.train=\"nowhere.jsonl\"", &["nowhere.jsonl"]);
    check("device=\"cuda:7\"", &["cuda", "flex"]);
    check("device=\"abacus\"", &["abacus", "flex"]);
    check("model.base=\"./nothing\"", &["nothing"]);
    check(
        "model.base=\"smollm2-135m-instrukt\"",
        &["smollm2-135m-instruct"],
    );
    check("adapter.method=\"lora2\"", &["lora2"]);
    check("data.max_length=3", &["train.jsonl"]);
    assert!(
        !workshop.path("run").exists(),
        "a run that cannot start leaves nothing"
    );

    let help = text(&workshop.output(&["train", "nowhere.toml"]).stderr);
    assert!(help.contains("nowhere.toml"), "{help}");
}

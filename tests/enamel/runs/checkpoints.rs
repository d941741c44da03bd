//! A run goes on from what was written and from nothing else: damaged checkpoints, other recipes, other
//! processors; and what it comes to is an uninterrupted run's.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::enamel_process::{Workshop, said, signal, wait_for};

/// A run killed after step 40 of 150, with the checkpoints of steps 30 and 40 at least.
fn killed(workshop: &Workshop, path: Option<&str>) {
    workshop.recipe(
        "long.toml",
        "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1",
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 150\nbatch_size = 3\ngradient_accumulation_steps = 2\nlearning_rate = 2e-3\n\
         lr_scheduler_type = \"cosine\"\nwarmup_ratio = 0.1\nlogging_steps = 7\n\
         eval_strategy = \"steps\"\neval_steps = 20\nsave_steps = 10\nsave_total_limit = 2\nsamples = 1\n\
         max_new_tokens = 4",
    );
    let mut command = workshop.command(&["train", "long.toml", "--output", "killed"]);
    if let Some(path) = path {
        command.env("ENAMEL_CPU", path);
    }
    let mut child = command.spawn().expect("the binary runs");
    let seen = workshop.path("killed/checkpoints/step-000040");
    assert!(wait_for(&seen, &mut child), "it ended before step 40");
    signal(&child, "KILL");
    child.wait().expect("a child of ours");
    assert!(!workshop.path("killed/adapter").exists(), "it was too late");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("room on the disk");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).expect("room on the disk")),
        }
    }
}

/// Checkpoints of a run by step, oldest first.
fn checkpoints(run: &Path) -> Vec<(usize, std::path::PathBuf)> {
    let entries = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            Some((name.strip_prefix("step-")?.parse().ok()?, e.path()))
        })
        .collect();
    found.sort();
    found
}

/// `summary.json` without paths, times, speeds and memory.
fn figures(workshop: &Workshop, run: &str) -> Value {
    let mut summary = crate::support::goldens::json(&workshop.path(run).join("summary.json"));
    let map = summary.as_object_mut().expect("a table");
    for varying in [
        "dir",
        "adapter",
        "checkpoint",
        "seconds",
        "tokens_per_second",
        "peak_memory",
    ] {
        assert!(
            map.shift_remove(varying).is_some_and(|v| !v.is_null()),
            "{varying}"
        );
    }
    summary
}

/// Lines of `metrics.jsonl` without times, speeds and memory.
fn metrics(workshop: &Workshop, run: &str) -> Vec<Value> {
    let mut all: Vec<Value> = ["train", "valid"]
        .iter()
        .flat_map(|kind| workshop.metrics(run, kind))
        .collect();
    for entry in &mut all {
        let map = entry.as_object_mut().expect("a table");
        map.retain(|name, _| {
            !["tokens_per_second", "memory_bytes", "seconds"].contains(&name.as_str())
        });
    }
    all
}

fn assert_same_run(workshop: &Workshop, run: &str, whole: &str) {
    assert!(
        workshop.adapter(run) == workshop.adapter(whole),
        "{run}: another adapter"
    );
    assert_eq!(figures(workshop, run), figures(workshop, whole), "{run}");
    assert_eq!(metrics(workshop, run), metrics(workshop, whole), "{run}");
    let card = |run: &str| fs::read_to_string(workshop.path(run).join("adapter/README.md"));
    assert_eq!(card(run).expect("a card"), card(whole).expect("a card"));
    let report = |run: &str| {
        let text = fs::read_to_string(workshop.path(run).join("report.html")).expect("a report");
        let varying = ["time", "tokens a second", "peak memory", run];
        let lines = text
            .lines()
            .filter(|line| !varying.iter().any(|word| line.contains(word)));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(report(run), report(whole));
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_sound_one_before_it_goes_on() {
    let workshop = Workshop::new();
    killed(&workshop, None);
    workshop.run(&["train", "long.toml", "--output", "whole"]);
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).expect("a file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).expect("room on the disk");
    };
    let files = [
        "state.json",
        "optimizer.bpk",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/README.md",
    ];
    for (i, file) in files.into_iter().enumerate() {
        let run = format!("damaged {i}");
        copy(&workshop.path("killed"), &workshop.path(&run));
        let all = checkpoints(&workshop.path(&run));
        let [.., (_, before), (step, newest)] = all.as_slice() else {
            panic!("two checkpoints: {all:?}");
        };
        flip(&newest.join(file));
        let error = workshop.fail(&["train", "long.toml", "--output", &run, "--resume"]);
        let name =
            format!("step-{step:06}: this checkpoint is damaged: {file} is not as it was written");
        assert!(error.contains(&name), "{error}");
        assert!(!workshop.path(&run).join("adapter").exists());
        // The command in the message, as a shell reads it.
        let offered = error
            .lines()
            .map(str::trim)
            .find(|line| line.starts_with("enamel train"));
        let offered = offered.unwrap_or_else(|| panic!("no command: {error}"));
        let before = before
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        assert!(offered.contains(before), "{offered}");
        let words = offered
            .split('\'')
            .enumerate()
            .flat_map(|(i, part)| match i % 2 {
                0 => part.split_whitespace().collect(),
                _ => vec![part],
            });
        let words: Vec<_> = words.collect();
        workshop.run(&words[1..]);
        assert_same_run(&workshop, &run, "whole");
    }
    // Both are damaged: both are named.
    for (_, checkpoint) in checkpoints(&workshop.path("killed")) {
        flip(&checkpoint.join("optimizer.bpk"));
    }
    let error = workshop.fail(&["train", "long.toml", "--output", "killed", "--resume"]);
    assert!(error.contains("damaged too: optimizer.bpk"), "{error}");
    assert!(
        error.contains("no other checkpoint of this run is sound"),
        "{error}"
    );
}

/// Makes a state as older versions wrote it.
fn age(checkpoint: &Path, change: impl Fn(&mut serde_json::Map<String, Value>)) {
    let path = checkpoint.join("state.json");
    let mut state = crate::support::goldens::json(&path);
    let map = state.as_object_mut().expect("a table");
    let known = [
        "step",
        "total_steps",
        "seed",
        "best",
        "evals_without_gain",
        "patience_loss",
        "trained_tokens",
        "tokens",
        "seconds",
        "first_valid_loss",
        "fingerprint",
        // Of the run that the directory's marker names.
        "run",
        "line",
    ];
    map.retain(|name, _| known.contains(&name.as_str()));
    change(map);
    fs::write(path, state.to_string()).expect("room on the disk");
}

#[test]
fn a_checkpoint_without_hashes_goes_on_with_a_word_unless_it_says_what_cannot_be() {
    let workshop = Workshop::new();
    killed(&workshop, None);
    let (step, newest) = checkpoints(&workshop.path("killed"))
        .pop()
        .expect("checkpoints");
    let sealed = fs::read(newest.join("state.json")).expect("a state");
    for (name, value, part) in [
        (
            "step",
            json!(1_000_000_000_000_u64),
            "step 1000000000000 of 150",
        ),
        ("step", json!(149), "step 149 in a folder of step"),
        ("step", json!(0), "step 0 of 150"),
        (
            "total_steps",
            json!(151),
            "it is of a run of 151 steps, and this one has 150",
        ),
        (
            "best",
            json!({ "step": 149, "loss": 1.0 }),
            "the best step is 149",
        ),
        ("seconds", json!(-1.0), "-1 seconds"),
        ("stepp", json!(3), "unknown field `stepp`"),
    ] {
        fs::write(newest.join("state.json"), &sealed).expect("room on the disk");
        age(&newest, |map| {
            drop(map.insert(name.to_owned(), value.clone()))
        });
        let error = workshop.fail(&["train", "long.toml", "--output", "killed", "--resume"]);
        assert!(error.contains(part), "{name} {value}: {error}");
    }
    fs::write(newest.join("state.json"), &sealed).expect("room on the disk");
    age(&newest, |_| {});
    let said = workshop.run(&["train", "long.toml", "--output", "killed", "--resume"]);
    assert!(
        said.contains("the checkpoint is of an older version"),
        "{said}"
    );
    assert!(
        said.contains(&format!("resuming after step {step}")),
        "{said}"
    );
    workshop.run(&["train", "long.toml", "--output", "whole"]);
    assert!(workshop.adapter("killed") == workshop.adapter("whole"));
}

#[test]
fn another_cpu_path_is_refused_by_name_or_gone_on_with_on_request() {
    let workshop = Workshop::new();
    killed(&workshop, Some("portable"));
    let on = |path: &str, arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        let output = command.env("ENAMEL_CPU", path).output();
        let output = output.expect("the binary runs");
        (output.status.code(), said(&output))
    };
    let resume = ["train", "long.toml", "--output", "killed", "--resume"];
    let (code, error) = on("reference", &resume);
    assert_eq!(code, Some(1), "{error}");
    for part in [
        "CPU path portable then",
        "ENAMEL_CPU=portable computes as then",
        "reference now",
        "--other-bits",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    copy(&workshop.path("killed"), &workshop.path("moved"));
    let moved = [
        "train",
        "long.toml",
        "--output",
        "moved",
        "--resume",
        "--other-bits",
    ];
    let (code, said) = on("reference", &moved);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("other bits than an uninterrupted run's: CPU path portable"),
        "{said}"
    );

    let (code, said) = on("portable", &resume);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = on("portable", &["train", "long.toml", "--output", "whole"]);
    assert_eq!(code, Some(0), "{said}");
    assert_same_run(&workshop, "killed", "whole");
    // What was refused would have ended elsewhere.
    assert!(workshop.adapter("moved") != workshop.adapter("whole"));

    // A lock file's promise is taken back where it cannot be kept.
    let lock = ["train", "whole/recipe.lock.toml", "--output", "again"];
    let (code, said) = on("reference", &lock);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("will not have the bits"), "{said}");
}

#[test]
fn what_changed_since_the_run_began_is_named() {
    let workshop = Workshop::new();
    killed(&workshop, None);
    let rows = fs::read_to_string(workshop.path("train.jsonl")).expect("rows");
    fs::write(workshop.path("train.jsonl"), rows.to_string() + &rows).expect("room on the disk");
    let error = workshop.fail(&[
        "train",
        "long.toml",
        "--output",
        "killed",
        "--resume",
        "--set",
        "train.learning_rate=0.5",
        "--set",
        "adapter.r=8",
        "--set",
        "train.logging_steps=1",
    ]);
    for part in [
        "train.learning_rate is 0.5, and was 0.002",
        "adapter.r is 8, and was 4",
        "train.jsonl has SHA-256",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(
        !error.contains("logging_steps"),
        "it changes no number: {error}"
    );
}

#[test]
fn a_damaged_line_of_metrics_is_named_and_the_run_goes_on() {
    let workshop = Workshop::new();
    killed(&workshop, None);
    let path = workshop.path("killed/metrics.jsonl");
    let mut bytes = fs::read(&path).expect("metrics");
    let third = bytes
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'\n')
        .nth(1);
    let third = third.expect("lines").0 + 12;
    bytes[third] = 0xff;
    fs::write(&path, &bytes).expect("room on the disk");
    let said = workshop.run(&["train", "long.toml", "--output", "killed", "--resume"]);
    assert!(
        said.contains("metrics.jsonl:3 is no line of metrics"),
        "{said}"
    );
    let aside = fs::read(workshop.path("killed/metrics.damaged.jsonl"));
    assert!(aside.expect("the damaged file") == bytes);
    // 150 steps and 8 validations, without the one that was damaged.
    assert_eq!(metrics(&workshop, "killed").len(), 150 + 9 - 1);
}

/// As a kill between the last checkpoint and the end leaves it.
fn cut_off(workshop: &Workshop, run: &str, whole: &str) {
    copy(&workshop.path(whole), &workshop.path(run));
    fs::remove_dir_all(workshop.path(run).join("adapter")).expect("an adapter");
    for file in ["summary.json", "report.html"] {
        fs::remove_file(workshop.path(run).join(file)).expect("a file");
    }
}

#[test]
fn killed_after_its_last_step_a_run_has_the_figures_of_an_uninterrupted_one() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let early = [
        "--set",
        "train.eval_steps=2",
        "--set",
        "train.early_stopping_patience=2",
        "--set",
        "train.early_stopping_threshold=100",
    ];
    for (whole, more, steps) in [
        ("of-full-length", &[][..], 24),
        ("stopped-short", &early, 6),
    ] {
        let train = |run: &str, last: &[&str]| {
            workshop.run(&[&["train", "recipe.toml", "--output", run], more, last].concat())
        };
        train(whole, &[]);
        let cut = format!("cut-{whole}");
        cut_off(&workshop, &cut, whole);
        train(&cut, &["--resume"]);
        let figures = figures(&workshop, &cut);
        assert_eq!(figures["step"], steps, "no step more");
        for name in ["train_loss", "valid_loss", "first_valid_loss"] {
            assert!(figures[name].is_f64(), "{name}: {figures}");
        }
        assert_same_run(&workshop, &cut, whole);
    }
}

#[test]
fn killed_between_its_last_checkpoint_and_its_result_a_run_keeps_no_checkpoint_too_many() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    workshop.run(&["train", "recipe.toml", "--output", "whole"]);
    let steps = |run: &str| {
        let all = checkpoints(&workshop.path(run));
        all.into_iter().map(|(step, _)| step).collect::<Vec<_>>()
    };
    assert_eq!(steps("whole"), [6, 12, 18, 24]);
    // Two more than the limit: as if the kill had come before they were removed.
    cut_off(&workshop, "cut", "whole");
    let limit = ["--set", "train.save_total_limit=2"];
    workshop.run(
        &[
            &["train", "recipe.toml", "--output", "cut", "--resume"],
            &limit[..],
        ]
        .concat(),
    );
    assert_eq!(steps("cut"), [18, 24]);
    assert!(workshop.adapter("cut") == workshop.adapter("whole"));
}

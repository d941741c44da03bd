//! No command replaces what is there unless it is asked to, and none writes onto, into or around what it reads.

use std::fs;
use std::path::Path;

use crate::runs::directory::everything;
use crate::support::enamel_process::Workshop;

/// A workshop with a run of a few steps in `run/`.
fn trained() -> Workshop {
    let workshop = Workshop::new();
    workshop.recipe(
        "r.toml",
        "r = 2\ntarget_modules = [\"q_proj\"]",
        "train = \"train.jsonl\"",
        "max_steps = 2\nbatch_size = 2\nsamples = 0",
    );
    workshop.run(&["train", "r.toml"]);
    workshop
}

/// Every command that writes, but for its `--output`, and whether it writes a folder.
const COMMANDS: [(&[&str], bool); 7] = [
    (
        &[
            "score",
            "--model",
            "model",
            "--adapter",
            "run/adapter",
            "--input",
            "train.jsonl",
        ],
        false,
    ),
    (&["export", "run"], false),
    (&["export", "run", "--adapter-only"], false),
    (&["quantize", "model"], true),
    (&["merge", "--adapter", "run/adapter", "--no-check"], true),
    (
        &[
            "adapter",
            "combine",
            "--adapter",
            "run/adapter",
            "--weights",
            "1",
        ],
        true,
    ),
    (&["adapter", "convert", "run/adapter", "--r", "1"], true),
];

/// Fails with an error that names `output`, and changes nothing.
fn refused(workshop: &Workshop, command: &[&str], output: &str, more: &[&str]) -> String {
    let before = everything(&workshop.path("."));
    let arguments = [command, &["--output", output], more].concat();
    let error = workshop.fail(&arguments);
    let last = output.rsplit('/').next().unwrap_or(output);
    assert!(error.contains(last), "{arguments:?}: {error}");
    assert_eq!(everything(&workshop.path(".")), before, "{arguments:?}");
    error
}

#[test]
fn no_command_replaces_what_it_was_not_asked_to_replace() {
    let workshop = trained();
    fs::write(workshop.path("mine"), "mine").expect("room");
    fs::create_dir(workshop.path("folder")).expect("room");
    fs::write(workshop.path("folder/mine"), "mine").expect("room");
    for (command, folder) in COMMANDS {
        for output in ["mine", "folder"] {
            let error = refused(&workshop, command, output, &[]);
            let said = ["there is something", "no directory", "is a directory"];
            assert!(said.iter().any(|part| error.contains(part)), "{error}");
        }
        let replaces = ["score", "export", "quantize"].contains(&command[0]);
        if replaces {
            // A folder with anything but a model in it is never replaced.
            refused(&workshop, command, "folder", &["--overwrite"]);
        }
        let output = format!("made by {}", command.join(" ").replace('/', " "));
        let write = [command, &["--output", &output]].concat();
        workshop.run(&write);
        assert_eq!(workshop.path(&output).is_dir(), folder, "{output}");
        workshop.fail(&write);
        if replaces {
            workshop.run(&[&write[..], &["--overwrite"]].concat());
        }
    }
}

#[test]
fn no_command_writes_where_it_reads() {
    let workshop = trained();
    #[cfg(unix)]
    for (target, link) in [
        ("model", "to-model"),
        ("run/adapter", "to-adapter"),
        ("train.jsonl", "to-rows"),
    ] {
        std::os::unix::fs::symlink(workshop.path(target), workshop.path(link)).expect("a link");
    }
    for (command, folder) in COMMANDS {
        let replace: &[&str] = match command[0] {
            "score" | "export" | "quantize" => &["--overwrite"],
            _ => &[],
        };
        let mut outputs = vec!["model", "model/new", "."];
        if command[0] == "adapter" {
            // The base is not needed for these.
            outputs = vec!["run/adapter/new", "run/adapter", "run"];
        }
        if command[0] == "score" {
            outputs.extend(["train.jsonl", "run/adapter/new", "model/model.safetensors"]);
        }
        if cfg!(unix) {
            outputs.push(match command[0] {
                "adapter" => "to-adapter/new",
                _ => "to-model/new",
            });
            if command[0] == "score" {
                outputs.extend(["to-rows"]);
            }
        }
        for output in outputs {
            refused(&workshop, command, output, replace);
            if folder {
                refused(&workshop, command, output, &[]);
            }
        }
    }
    // Scores and logits in one file.
    let error = workshop.fail(&[
        "score",
        "--model",
        "model",
        "--input",
        "train.jsonl",
        "--output",
        "x",
        "--logits",
        "./x",
    ]);
    assert!(error.contains("same file"), "{error}");
    assert!(!Path::new(&workshop.path("x")).exists());
}

#[test]
fn quantising_over_a_model_replaces_a_model_and_nothing_else() {
    let workshop = trained();
    let quantize = ["quantize", "model", "--output", "q"];
    workshop.run(&quantize);
    let again = [&quantize[..], &["--overwrite", "--load-in-8bit"]].concat();
    fs::write(workshop.path("q/notes.txt"), "mine").expect("room");
    let before = everything(&workshop.path("q"));
    let error = workshop.fail(&again);
    assert!(error.contains("holds more"), "{error}");
    assert_eq!(everything(&workshop.path("q")), before);
    fs::remove_file(workshop.path("q/notes.txt")).expect("it was there");
    workshop.run(&again);
    assert_ne!(everything(&workshop.path("q")), before);
}

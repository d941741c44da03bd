//! Base models by name: the hub's cache where its Python client keeps it, and pip without the code of the current folder.

use std::fs;
use std::process::Command;

use crate::support::enamel_process::{Workshop, said};
use crate::support::goldens::{Generation, stage_into};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The model as the Python client caches it below `hub`, but with files in place of links.
fn cached(workshop: &Workshop, hub: &str) {
    let folder = workshop.path(hub).join("models--acme--tide");
    let snapshot = folder.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).expect("room on the disk");
    stage_into("untied", Generation::Five, &snapshot);
    fs::create_dir_all(folder.join("refs")).expect("room on the disk");
    fs::write(folder.join("refs/main"), COMMIT).expect("room on the disk");
}

fn run(mut command: Command) -> (bool, String) {
    let output = command.output().expect("the program starts");
    (output.status.success(), said(&output))
}

#[test]
fn the_python_clients_variables_name_the_cache() {
    let workshop = Workshop::new();
    cached(&workshop, "home/a/hub");
    let home = workshop.path("home");
    for (name, value) in [
        ("HF_HUB_CACHE", "home/a/hub"),
        ("HUGGINGFACE_HUB_CACHE", "~/a/hub"),
        ("HF_HOME", "~/a"),
        ("HF_HOME", "$HOME/a"),
    ] {
        let mut command = workshop.command(&["pull", "hf:acme/tide"]);
        command.env("HOME", &home).env(name, value);
        let (found, text) = run(command);
        assert!(found && text.contains(COMMIT), "{name}={value}: {text}");
    }
}

#[test]
fn offline_it_is_said_what_is_missing_where() {
    let workshop = Workshop::new();
    cached(&workshop, "hub");
    let snapshot = workshop
        .path("hub/models--acme--tide/snapshots")
        .join(COMMIT);
    fs::remove_file(snapshot.join("model.safetensors")).expect("it is there");
    let mut command = workshop.command(&["generate", "--model", "hf:acme/tide", "--prompt", "hi"]);
    command.env("HF_HUB_CACHE", workshop.path("hub"));
    let (found, text) = run(command);
    assert!(!found, "{text}");
    for part in [
        "acme/tide at revision 'main'",
        "HF_HUB_OFFLINE",
        "model.safetensors",
        &snapshot.display().to_string(),
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
}

/// Python puts the current folder first among those it loads modules from.
#[test]
fn a_pip_of_the_current_folder_is_not_run() {
    let workshop = Workshop::new();
    let trap = "open(__file__ + '.ran', 'w').close()\n";
    fs::create_dir(workshop.path("own")).expect("room on the disk");
    for place in [
        "pip.py",
        "sitecustomize.py",
        "own/pip.py",
        "own/sitecustomize.py",
    ] {
        fs::write(workshop.path(place), trap).expect("room on the disk");
    }
    let mut command = workshop.command(&["pull", "smollm2-135m-instruct"]);
    command
        .env("HOME", workshop.path("home"))
        .env("PYTHONPATH", workshop.path("own"))
        .env("PYTHONSTARTUP", workshop.path("own/pip.py"))
        .env("PIP_NO_INDEX", "1");
    let (found, text) = run(command);
    assert!(!found, "{text}");
    let ran = [
        "pip.py.ran",
        "sitecustomize.py.ran",
        "own/pip.py.ran",
        "own/sitecustomize.py.ran",
    ];
    for place in ran {
        assert!(!workshop.path(place).exists(), "{place}: {text}");
    }
}

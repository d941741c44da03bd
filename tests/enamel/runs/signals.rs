//! What signals do to a run and to the terminal it draws on.

use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::support::enamel_process::{Workshop, said, signal, text, wait_for};
use crate::support::pseudo_terminal::InTerminal;

const ADAPTER: &str = "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"";
const DATA: &str = "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128";

/// A run that would take minutes.
fn long_recipe(workshop: &Workshop, more: &str) {
    workshop.recipe(
        "long.toml",
        ADAPTER,
        DATA,
        &format!(
            "max_steps = 2000000\nbatch_size = 1\nlearning_rate = 1e-4\nsave_steps = 20\n\
             eval_strategy = \"no\"\nlogging_steps = 1000\n{more}"
        ),
    );
}

/// Runs in a terminal until the dashboard shows steps.
fn on_the_dashboard(workshop: &Workshop) -> InTerminal {
    long_recipe(workshop, "samples = 0");
    let terminal = InTerminal::start(workshop.command(&["train", "long.toml"]));
    terminal.wait_for("\x1b[?1049h", 0);
    let first = workshop.path("run/checkpoints/step-000020");
    let started = Instant::now();
    while !first.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    terminal.wait_for("Loss", 0);
    assert!(!terminal.is_cooked(), "raw mode");
    terminal
}

#[test]
fn before_the_first_step_one_signal_is_enough() {
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let workshop = Workshop::new();
        // Questions for a minute, asked of the base before the first step.
        let questions = vec!["\"1+1?\""; 20_000].join(",");
        long_recipe(
            &workshop,
            &format!("max_new_tokens = 64\nsample_prompts = [{questions}]"),
        );
        let mut child = workshop
            .command(&["train", "long.toml"])
            .spawn()
            .expect("the binary runs");
        let lock = workshop.path("run/recipe.lock.toml");
        assert!(wait_for(&lock, &mut child), "it ended before its questions");
        let sent = Instant::now();
        signal(&child, name);
        let output = child.wait_with_output().expect("a child of ours");
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(
            sent.elapsed() < Duration::from_secs(5),
            "{name}: it went on"
        );
        let error = text(&output.stderr);
        assert!(error.contains("before its first step"), "{error}");
    }
}

#[test]
fn a_terminal_is_given_back_however_the_run_ends() {
    for (signal, code, killed) in [
        (libc::SIGQUIT, None, Some(libc::SIGQUIT)),
        (libc::SIGHUP, Some(129), None),
        (libc::SIGTERM, Some(143), None),
    ] {
        let workshop = Workshop::new();
        let mut terminal = on_the_dashboard(&workshop);
        terminal.signal(signal);
        let status = terminal.wait();
        assert_eq!((status.code(), status.signal()), (code, killed), "{status}");
        terminal.wait_for("\x1b[?1049l", 0);
        assert!(terminal.is_cooked(), "{status}: raw mode is left on");
        assert!(terminal.is_left(), "{status}: {:?}", terminal.drawn());
        // A closed terminal saves: the newest checkpoint is of the last step, not of a multiple of 20.
        if signal == libc::SIGHUP {
            let saved = fs::read_dir(workshop.path("run/checkpoints")).expect("checkpoints");
            let steps = saved.flatten().filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                name.strip_prefix("step-")?.parse::<u64>().ok()
            });
            let newest = steps.max();
            let metrics = workshop.metrics("run", "train");
            assert_eq!(newest, metrics.last().and_then(|m| m["step"].as_u64()));
        }
    }
}

#[test]
fn ctrl_z_gives_the_shell_its_terminal_and_fg_draws_the_dashboard_again() {
    let workshop = Workshop::new();
    let mut terminal = on_the_dashboard(&workshop);
    terminal.signal(libc::SIGTSTP);
    terminal.wait_until_stopped();
    terminal.wait_for("\x1b[?1049l", 0);
    assert!(terminal.is_cooked() && terminal.is_left());
    let before = terminal.drawn().len();

    terminal.signal(libc::SIGCONT);
    terminal.wait_for("\x1b[?1049h", before);
    // What does not change from step to step is drawn as well.
    terminal.wait_for("Perplexity", before);
    assert!(!terminal.is_cooked(), "raw mode");
    terminal.signal(libc::SIGINT);
    assert_eq!(terminal.wait().code(), Some(130));
    terminal.wait_for("checkpoint", before);
    assert!(terminal.is_cooked() && terminal.is_left());
}

#[test]
fn a_file_that_may_not_grow_is_an_error_with_its_name() {
    let workshop = Workshop::new();
    long_recipe(&workshop, "samples = 0");
    let mut command = workshop.command(&["train", "long.toml"]);
    // SAFETY: a system call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: 2048,
                rlim_max: 2048,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
            Ok(())
        });
    }
    let output = command.output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let error = text(&output.stderr);
    assert!(
        error.contains("File too large") && error.contains("run/"),
        "{error}"
    );
}

/// The tiny model with a vocabulary that makes its file half a gigabyte, none of which takes room on the disk.
fn a_large_sparse_model(workshop: &Workshop) -> fs::File {
    const VOCABULARY: u64 = 2_000_000;
    let model = workshop.path("model");
    let config = model.join("config.json");
    let read = |path| fs::read(path).expect("a file of the fixture");
    let mut value: Value = serde_json::from_slice(&read(&config)).expect("JSON");
    value["vocab_size"] = VOCABULARY.into();
    fs::write(&config, value.to_string()).expect("room on the disk");

    let file = model.join("model.safetensors");
    let bytes = read(&file);
    let length = bytes.first_chunk().map(|b| u64::from_le_bytes(*b));
    let body = 8 + length
        .and_then(|n| usize::try_from(n).ok())
        .expect("a header");
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..body]).expect("JSON");
    let mut end = 0;
    let tensors = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__");
    let grown: Map<String, Value> = tensors
        .map(|(name, mut tensor)| {
            if tensor["shape"][0] == 128 && tensor["shape"][1] == 32 {
                tensor["shape"][0] = VOCABULARY.into();
            }
            let shape = tensor["shape"].as_array().expect("a shape");
            let elements: u64 = shape.iter().filter_map(Value::as_u64).product();
            tensor["data_offsets"] = json!([end, end + 4 * elements]);
            end += 4 * elements;
            (name, tensor)
        })
        .collect();
    let mut header = Value::from(grown).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut out = fs::File::create(&file).expect("room on the disk");
    let written = out
        .write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(header.as_bytes()))
        .and_then(|()| out.set_len(8 + header.len() as u64 + end));
    written.expect("room on the disk");
    out
}

#[cfg(target_os = "linux")]
#[test]
fn a_model_file_that_is_cut_short_while_it_is_read_is_an_error_with_its_name() {
    let workshop = Workshop::new();
    let file = a_large_sparse_model(&workshop);
    let mut command = workshop.command(&[
        "generate", "--model", "./model", "--prompt", "1+1?", "--raw",
    ]);
    // SAFETY: a system call between fork and exec. Ours is the first turn wherever both want to run.
    unsafe {
        command.pre_exec(|| {
            libc::nice(19);
            Ok(())
        });
    }
    let mut child = command.spawn().expect("the binary runs");
    let maps = format!("/proc/{}/maps", child.id());
    let mapped = || fs::read_to_string(&maps).is_ok_and(|m| m.contains("model.safetensors"));
    while !mapped() {
        let ended = child.try_wait().expect("a child of ours");
        assert!(ended.is_none(), "the file was never mapped: {ended:?}");
    }
    file.set_len(4096).expect("a file of ours");
    let output = child.wait_with_output().expect("a child of ours");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let error = text(&output.stderr);
    assert!(
        error.contains("model.safetensors") && error.contains("cut this file short"),
        "{error}"
    );
}

/// What is in the workshop's folder and is not finished.
fn unfinished(workshop: &Workshop) -> Vec<String> {
    let entries = fs::read_dir(workshop.path("")).expect("the workshop's folder");
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".enamel-unfinished-"))
        .collect()
}

#[test]
fn what_a_signal_interrupts_is_removed_and_what_a_kill_leaves_is_swept() {
    let workshop = Workshop::new();
    // Rows for minutes.
    let row = |i: usize| json!({ "text": format!("{i} {}", "one and one ".repeat(8)) });
    workshop.rows("many.jsonl", (0..20_000).map(row));
    let score = |input| {
        [
            "score",
            "--model",
            "./model",
            "--input",
            input,
            "--output",
            "scores.jsonl",
        ]
    };
    let interrupted = |name: &str| {
        let mut child = workshop
            .command(&score("many.jsonl"))
            .spawn()
            .expect("the binary runs");
        let before = unfinished(&workshop);
        let started = Instant::now();
        // A file more than before, or another one where the former was swept.
        while unfinished(&workshop) == before {
            let ended = child.try_wait().expect("a child of ours");
            assert!(ended.is_none(), "it ended before it wrote: {ended:?}");
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "nothing was written"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(50));
        signal(&child, name);
        child.wait_with_output().expect("a child of ours")
    };

    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let output = interrupted(name);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(unfinished(&workshop), [""; 0], "{name}");
    }
    interrupted("KILL");
    assert_eq!(unfinished(&workshop).len(), 1, "nobody can remove it then");
    workshop.rows("one.jsonl", [row(1)]);
    workshop.success(&score("one.jsonl"));
    assert_eq!(unfinished(&workshop), [""; 0], "the next one has swept it");
    assert!(workshop.path("scores.jsonl").exists());
}

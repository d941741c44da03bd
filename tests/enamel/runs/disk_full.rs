//! Every write of a run fails once, as on a full disk: nothing that was there is lost, and the run goes on later.
//!
//! The stand-in for a full disk is a limit on the size of files, which cuts the first write that passes it short.
//! One limit below the size of each file of a run lets each of its writes fail in turn.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Output;

use crate::runs::directory::{Content, copy_folder, debris, everything};
use crate::support::enamel_process::{Workshop, said, text};

fn recipe(workshop: &Workshop) {
    workshop.recipe(
        "r.toml",
        "r = 2\nlora_alpha = 8\ntarget_modules = [\"q_proj\"]\nlora_dropout = 0.1",
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 12\nbatch_size = 2\nlearning_rate = 5e-3\nlogging_steps = 1\n\
         eval_strategy = \"steps\"\neval_steps = 4\nsave_steps = 4\nsave_total_limit = 2\nsamples = 1\n\
         max_new_tokens = 2",
    );
}

/// Runs the binary where no file may have more bytes than `limit`.
fn limited(workshop: &Workshop, arguments: &[&str], limit: u64) -> Output {
    let mut command = workshop.command(arguments);
    // SAFETY: a system call between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit {
                rlim_cur: limit,
                rlim_max: limit,
            };
            match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    command.output().expect("the binary runs")
}

/// Half the size of each file of a run, and one less than the size of those that are the same in every run.
fn limits(workshop: &Workshop, run: &str) -> BTreeSet<u64> {
    let varying = ["metrics.jsonl", "report.html", "summary.json", "state.json"];
    let mut limits = BTreeSet::new();
    for (name, bytes) in everything(&workshop.path(run)) {
        let size = bytes.0.len() as u64;
        if size == 0 {
            continue;
        }
        limits.insert(size / 2);
        if !varying.iter().any(|varying| name.ends_with(varying)) {
            limits.insert(size - 1);
        }
    }
    limits
}

#[test]
fn wherever_the_disk_is_full_nothing_is_lost_and_the_run_goes_on() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&["train", "r.toml", "--output", "whole"]);
    workshop.run(&["train", "r.toml", "--output", "old", "--set", "seed=9"]);
    fs::write(workshop.path("old/notes.txt"), "mine").expect("room");
    let old = everything(&workshop.path("old"));
    for limit in limits(&workshop, "whole") {
        // A new run in a directory that is not there yet.
        let new = ["train", "r.toml", "--output", "new"];
        let output = limited(&workshop, &new, limit);
        check(&output, "new", limit);
        workshop.run(&[&new[..], &["--resume"]].concat());
        assert!(
            workshop.adapter("new") == workshop.adapter("whole"),
            "limit {limit}"
        );
        assert_eq!(debris(&workshop, "new"), [""; 0].map(PathBuf::from));
        fs::remove_dir_all(workshop.path("new")).expect("it was there");

        // One in the place of another.
        copy_folder(&workshop.path("old"), &workshop.path("over"));
        let over = ["train", "r.toml", "--output", "over"];
        let output = limited(&workshop, &[&over[..], &["--overwrite"]].concat(), limit);
        check(&output, "over", limit);
        let now = everything(&workshop.path("over"));
        assert_eq!(
            now.get(&PathBuf::from("notes.txt")),
            Some(&Content(b"mine".to_vec()))
        );
        if old
            .iter()
            .all(|(name, content)| now.get(name) == Some(content))
        {
            assert_eq!(now.len(), old.len(), "limit {limit}");
            let said = workshop.run(&[&over[..], &["--set", "seed=9", "--resume"]].concat());
            assert!(said.contains("is finished"), "limit {limit}: {said}");
            workshop.run(&[&over[..], &["--overwrite"]].concat());
        } else {
            // The new one has come to a checkpoint.
            let said = workshop.run(&[&over[..], &["--resume"]].concat());
            assert!(
                said.contains("resuming after step"),
                "limit {limit}: {said}"
            );
        }
        assert!(
            workshop.adapter("over") == workshop.adapter("whole"),
            "limit {limit}"
        );
        assert_eq!(debris(&workshop, "over"), [""; 0].map(PathBuf::from));
        fs::remove_dir_all(workshop.path("over")).expect("it was there");
    }
}

/// It failed with an error that names a file of the run.
fn check(output: &Output, run: &str, limit: u64) {
    assert_eq!(
        output.status.code(),
        Some(1),
        "limit {limit}: {}",
        said(output)
    );
    let error = text(&output.stderr);
    assert!(
        error.contains("too large") && error.contains(run),
        "limit {limit}: {error}"
    );
}

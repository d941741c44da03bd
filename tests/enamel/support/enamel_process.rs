//! Runs the `enamel` binary as a person would, in a directory of its own and with an empty cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::goldens::{Generation, stage_into};

/// A directory with a tiny model, data and a recipe.
pub struct Workshop {
    dir: TempDir,
}

impl Workshop {
    /// A model with a tokenizer under `model/` and 32 + 8 short conversations.
    pub fn new() -> Self {
        let workshop = Self {
            dir: TempDir::new().expect("a temporary directory"),
        };
        fs::create_dir(workshop.path("model")).expect("room on the disk");
        stage_into("untied", Generation::Five, &workshop.path("model"));
        let row = |i: usize| {
            let (a, b) = (i % 7, i / 7);
            json!({ "messages": [
                { "role": "user", "content": format!("{a}+{b}?") },
                { "role": "assistant", "content": format!("{}.", a + b) },
            ]})
        };
        workshop.rows("train.jsonl", (0..32).map(row));
        workshop.rows("valid.jsonl", (32..40).map(row));
        workshop
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn rows(&self, name: &str, rows: impl IntoIterator<Item = Value>) {
        let text: String = rows.into_iter().map(|row| format!("{row}\n")).collect();
        fs::write(self.path(name), text).expect("room on the disk");
    }

    /// Writes a recipe: the usual settings with `extra` behind them, a `[table]` or more.
    pub fn recipe(&self, name: &str, adapter: &str, data: &str, train: &str) -> PathBuf {
        let text = format!(
            "seed = 3\ndevice = \"flex\"\n[model]\nbase = \"./model\"\n[adapter]\n{adapter}\n\
             [data]\n{data}\n[train]\n{train}\n[output]\ndir = {:?}\n",
            self.path("run")
        );
        let path = self.path(name);
        fs::write(&path, text).expect("room on the disk");
        path
    }

    /// The recipe that most tests train: 24 steps of 4 rows, saved and validated every 6.
    pub fn usual_recipe(&self) -> PathBuf {
        self.recipe(
            "recipe.toml",
            "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1",
            "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
            "epochs = 3\nbatch_size = 4\nlearning_rate = 5e-3\nwarmup_steps = 2\nlogging_steps = 1\n\
             eval_strategy = \"steps\"\neval_steps = 6\nsave_steps = 6\nsave_total_limit = 10\n\
             samples = 2\nmax_new_tokens = 4",
        )
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_enamel-under-test"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env("ENAMEL_HOME", self.path("cache"))
            .env_remove("HF_HOME")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env("HF_HUB_OFFLINE", "1")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs to the end; panics with all that was said unless it succeeds. What it said on standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        text(&self.success(arguments).stdout)
    }

    /// The same, with what it said on standard error.
    pub fn told(&self, arguments: &[&str]) -> String {
        said(&self.success(arguments))
    }

    /// Runs to the end; panics with all that was said unless it succeeds.
    pub fn success(&self, arguments: &[&str]) -> Output {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "enamel {arguments:?}: {}",
            said(&output)
        );
        output
    }

    /// Runs to the end; panics unless it fails with exit code 1. What it said on standard error.
    pub fn fail(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert_eq!(
            output.status.code(),
            Some(1),
            "enamel {arguments:?}: {}",
            said(&output)
        );
        let error = text(&output.stderr);
        assert!(!error.contains("panicked"), "{error}");
        error
    }

    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// Files of a finished adapter, byte for byte.
    pub fn adapter(&self, run: &str) -> (Vec<u8>, Vec<u8>) {
        let file = |name: &str| {
            let path = self.path(run).join("adapter").join(name);
            fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        (
            file("adapter_model.safetensors"),
            file("adapter_config.json"),
        )
    }

    /// Lines of `metrics.jsonl` of one kind.
    pub fn metrics(&self, run: &str, kind: &str) -> Vec<Value> {
        let path = self.path(run).join("metrics.jsonl");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"))
            .filter(|entry| entry["kind"] == kind)
            .collect()
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn said(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

/// Waits until `path` exists while the process runs; false if the process ended first.
pub fn wait_for(path: &Path, child: &mut Child) -> bool {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(120) {
        if path.exists() {
            return true;
        }
        if child.try_wait().expect("a child of ours").is_some() {
            return path.exists();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{} did not appear in two minutes", path.display());
}

/// Sends a signal by name (`TERM`, `INT`, `KILL`).
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status();
    assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
}

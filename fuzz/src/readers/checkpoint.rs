//! A run's checkpoint: its state, the optimizer's moments, AdaLoRA's budget, and the journal beside it.

use anyhow::{Context, Result};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor as BurnTensor};
use enamel_adapter::{AdapterConfig, RankAllocator, attach};
use enamel_kernels::AdamW;
use enamel_model::{ArchConfig, Model, ModelInput};
use enamel_train::optimizer::{Optim, Optimizer};
use enamel_train::run_dir::checkpoints;
use enamel_train::run_dir::checkpoints::{Checkpoints, RunState};
use enamel_train::training::metrics_log;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Tensor, changed, parse, write};
use crate::mutate;
use crate::random::Random;

const WORDS: [&str; 44] = [
    "step",
    "total_steps",
    "seed",
    "best",
    "loss",
    "evals_without_gain",
    "patience_loss",
    "trained_tokens",
    "tokens",
    "seconds",
    "first_valid_loss",
    "fingerprint",
    "files",
    "sha256",
    "line",
    "kind",
    "train",
    "valid",
    "budget",
    "ranks",
    "epoch",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_bytes",
    "perplexity",
    "null",
    "1e999",
    "NaN",
    "-1",
    "18446744073709551615",
    "{",
    "}",
    "\n",
    "\"",
    ",",
    ":",
    "0.1",
    "[",
    "]",
    "optimizer.bpk",
    "adapter",
    "version",
    "0",
];

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.0,
};

const JOURNAL: &str = "metrics.jsonl";
const OPTIMIZER: &str = "optimizer.bpk";
const BUDGET: &str = "budget.safetensors";

struct Reading {
    model: Model,
    allocator: RankAllocator,
    state: Value,
    optimizer: Vec<u8>,
    budget: Vec<Tensor>,
    journal: Vec<Value>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let device = Device::flex().autodiff();
    let config = ArchConfig::from_json(&llama::config(8))?;
    let mut model = Model::random(&config, 1, &device)?;
    let method = json!({"peft_type": "ADALORA", "init_r": 2, "target_r": 1, "target_modules": ["q_proj"],
        "total_step": 10, "tinit": 1, "tfinal": 2});
    let method = AdapterConfig::from_json(&method, "a seed")?;
    attach(&mut model, &method, 1)?;
    let mut optimizer = Optimizer::new(SETTINGS);
    let ids = BurnTensor::<2, Int>::from_data([[1, 2, 3]], &device);
    let hidden = model.forward_hidden(&ModelInput::new(ids), None);
    let loss = model.logits(hidden.squeeze_dim(0)).powf_scalar(2.0).sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    optimizer.step(&mut model, grads, 1.0, &1e-3.into());
    let allocator = RankAllocator::of(&method, &model).context("no budget")?;
    let dir = tempfile::tempdir()?;
    let kept = Checkpoints::new(dir.path(), 1);
    let state = RunState {
        step: 5,
        total_steps: 10,
        seed: 1,
        fingerprint: "00".into(),
        ..RunState::default()
    };
    let path = kept.save(&state, &optimizer, Some(&allocator), |dir| {
        // A stand-in: the adapter's own files have a reader of their own.
        let _ = std::fs::create_dir_all(dir);
        Ok(())
    })?;
    let file =
        |name: &str| std::fs::read(path.join(name)).with_context(|| format!("reading {name}"));
    let journal = vec![
        json!({"kind": "valid", "step": 0, "epoch": 0.0, "loss": 2.5, "perplexity": 12.2, "trained_tokens": 9, "seconds": 0.1}),
        json!({"kind": "train", "step": 1, "epoch": 0.1, "loss": 2.25, "learning_rate": 1e-4, "grad_norm": 0.5,
            "tokens": 64, "trained_tokens": 32, "tokens_per_second": 100.5, "memory_bytes": 1000}),
        json!({"kind": "budget", "step": 2, "budget": 4, "ranks": [2, 2]}),
        json!({"kind": "train", "step": 6, "epoch": 0.2, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5,
            "tokens": 64, "trained_tokens": 32, "tokens_per_second": 100.5, "memory_bytes": 1000}),
    ];
    let mut state: Value = serde_json::from_slice(&file("state.json")?)?;
    if let Some(map) = state.as_object_mut() {
        map.shift_remove("sha256");
    }
    Ok(Box::new(Reading {
        model,
        allocator,
        state,
        optimizer: file(OPTIMIZER)?,
        budget: parse(&file(BUDGET)?)?,
        journal,
    }))
}

fn sha256(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The state with the hash of its own that it ends in.
fn sealed(state: &Value) -> String {
    let mut text = state.to_string();
    // The last brace.
    text.pop();
    let hash = sha256(text.as_bytes());
    format!("{text},\n  \"sha256\": \"{hash}\"\n}}\n")
}

impl Reader for Reading {
    fn input(&self, random: &mut Random) -> Input {
        let mut state = self.state.clone();
        let mut optimizer = self.optimizer.clone();
        let mut budget = write(&self.budget, &Default::default());
        let mut lines = self.journal.clone();
        let kind = random.below(4);
        match kind {
            0 => {}
            1 => {
                // Mostly the head, which says where everything is.
                match random.once_in(4) {
                    true => mutate::bytes(random, &mut optimizer),
                    false => {
                        let rest = optimizer.split_off(optimizer.len().min(1024));
                        match random.once_in(3) {
                            true => mutate::text(random, &mut optimizer, &WORDS),
                            false => mutate::bytes(random, &mut optimizer),
                        }
                        optimizer.extend(rest);
                    }
                }
            }
            2 => budget = changed(random, &self.budget, &["a", "layers"]),
            _ => {
                for line in &mut lines {
                    if random.once_in(2) {
                        mutate::json(random, line, &WORDS);
                    }
                }
            }
        }
        // What a file holds is noted in the state: mostly of the file as it is now.
        if !random.once_in(4) {
            for (name, bytes) in [(OPTIMIZER, &optimizer), (BUDGET, &budget)] {
                state["files"][name] = json!({"bytes": bytes.len(), "sha256": sha256(bytes)});
            }
        }
        if kind == 0 {
            for _ in 0..random.few() {
                mutate::json(random, &mut state, &WORDS);
            }
        }
        let mut state_bytes = match random.once_in(8) {
            true => state.to_string(),
            false => sealed(&state),
        }
        .into_bytes();
        if kind == 0 && random.once_in(5) {
            mutate::text(random, &mut state_bytes, &WORDS);
        }
        let mut journal: Vec<u8> = lines
            .iter()
            .flat_map(|l| format!("{l}\n").into_bytes())
            .collect();
        if random.once_in(8) {
            mutate::text(random, &mut journal, &WORDS);
        }
        Input(vec![
            Part::new("state.json", state_bytes),
            Part::new(OPTIMIZER, optimizer),
            Part::new(BUDGET, budget),
            Part::new(JOURNAL, journal),
        ])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let dir = folder.path().to_owned();
        let state = checkpoints::check(&dir);
        let checked = checkpoints::check_optimizer(&dir, Optim::AdamwTorch);
        let mut optimizer = Optimizer::new(SETTINGS);
        let loaded = checkpoints::load_optimizer(&dir, &mut optimizer, &self.model);
        let budget = checkpoints::load_budget(&dir, &mut self.allocator);
        let path = dir.join(JOURNAL);
        let journal = metrics_log::read(&path);
        if input.bytes().is_multiple_of(16) {
            // What resuming does to it, which replaces the file.
            let _ = metrics_log::MetricsLog::open(&path, "", 3, &|_| {});
            folder.forget(JOURNAL);
        }
        Ok(state.is_ok() && checked.is_ok() && loaded.is_ok() && budget.is_ok() && journal.is_ok())
    }
}

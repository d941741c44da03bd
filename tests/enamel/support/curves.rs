//! Training step by step as the goldens' curves were made: their rows in order, AdamW, one batch a step.

use std::fs;

use burn::optim::GradientsParams;
use enamel_adapter::{AdapterError, HostTensor};
use enamel_kernels::AdamW;
use enamel_model::{Model, ModelInput};
use enamel_train::optimizer::Optimizer;
use enamel_train::training::grad_clipping::Clipping;
use serde_json::Value;

use crate::parity::llama::{floats, ids};
use crate::support::adapted::{folder, task_loss};
use crate::support::goldens::{Tensors, assert_close_to_largest, json};

/// One golden curve.
pub struct Curve {
    pub what: String,
    pub golden: Value,
    rows: Vec<Value>,
}

impl Curve {
    pub fn open(case: &str, name: &str) -> Self {
        let golden = json(&folder(case).join(format!("curve_{name}.json")));
        let rows = folder(case).join(format!("curve_{name}.jsonl"));
        let rows = fs::read_to_string(rows).expect("the curve's rows");
        let settings = &golden["settings"];
        assert_eq!(
            settings["schedule"], "constant",
            "{case}: others go through the recipe"
        );
        assert_eq!(
            settings["accumulate"], 1,
            "{case}: others go through the recipe"
        );
        Self {
            what: format!("{case}, {name}"),
            rows: rows
                .lines()
                .map(|row| serde_json::from_str(row).expect("a row of JSON"))
                .collect(),
            golden,
        }
    }

    pub fn steps(&self) -> usize {
        self.golden["loss"].as_array().expect("losses").len()
    }

    pub fn setting(&self, key: &str) -> f64 {
        self.golden["settings"][key]
            .as_f64()
            .unwrap_or_else(|| panic!("{}: {key}", self.what))
    }

    pub fn optimizer(&self) -> Optimizer {
        let betas = &self.golden["settings"]["betas"];
        let beta = |i: usize| betas[i].as_f64().expect("a beta");
        Optimizer::new(AdamW {
            beta1: beta(0),
            beta2: beta(1),
            epsilon: self.setting("eps"),
            weight_decay: self.setting("weight_decay"),
        })
    }

    /// Ids and labels of a step, padded on the right; causal attention needs no mask for that.
    pub fn batch(&self, step: usize) -> (Vec<Vec<i64>>, Vec<Vec<i64>>) {
        let count = self.setting("rows_per_batch") as usize;
        let rows = &self.rows[step * count..(step + 1) * count];
        let list = |row: &Value, key: &str| -> Vec<i64> {
            let list = row[key].as_array().expect("a list").iter();
            list.map(|v| v.as_i64().expect("an integer")).collect()
        };
        let longest = rows
            .iter()
            .map(|r| list(r, "input_ids").len())
            .max()
            .expect("rows");
        let padded = |key: &str, fill: i64| {
            let rows = rows.iter().map(|row| {
                let mut row = list(row, key);
                row.resize(longest, fill);
                row
            });
            rows.collect()
        };
        (padded("input_ids", 0), padded("labels", -100))
    }

    /// What the golden has under `key` at a step.
    pub fn at(&self, key: &str, step: usize) -> f64 {
        self.golden[key][step]
            .as_f64()
            .unwrap_or_else(|| panic!("{}: {key} {step}", self.what))
    }

    /// Trains the model and compares loss and gradient norm of every step.
    pub fn follow(&self, mut model: Model) -> Model {
        let mut optimizer = self.optimizer();
        let device = model.device();
        for step in 0..self.steps() {
            let (rows, labels) = self.batch(step);
            let input = ModelInput::new(ids(&rows, &device));
            let loss = task_loss(&model, &input, &labels);
            self.compare(
                "loss",
                step,
                f64::from(floats(loss.clone().inner())[0]),
                1e-4,
            );
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            let clip = self.golden["settings"]["clip"].as_f64().unwrap_or(0.0);
            let Clipping { norm, factor } = Clipping::of(&model, &grads, clip);
            // Relative, as its size is not one.
            self.compare("grad_norm", step, norm, 1e-4 * self.at("grad_norm", step));
            optimizer.step(&mut model, grads, factor, &self.at("lr", step).into());
        }
        model
    }

    pub fn compare(&self, key: &str, step: usize, ours: f64, tolerance: f64) {
        let theirs = self.at(key, step);
        assert!(
            (ours - theirs).abs() <= tolerance,
            "{}: {key} of step {}: {ours} for {theirs}",
            self.what,
            step + 1
        );
    }

    /// Compares what was trained with `after_<name>.safetensors`, whose frozen tensors do not count.
    pub fn check_end(case: &str, name: &str, trained: Result<Vec<HostTensor>, AdapterError>) {
        let mut trained = trained.unwrap_or_else(|e| panic!("{case}: {e}"));
        trained.sort_by(|a, b| a.0.cmp(&b.0));
        let golden = Tensors::open(folder(case).join(format!("after_{name}.safetensors")));
        let mut wanted = golden.names();
        wanted.retain(|key| !key.starts_with("base_model.vera_"));
        let names: Vec<_> = trained.iter().map(|(key, ..)| key.clone()).collect();
        assert_eq!(names, wanted, "{case}, {name}");
        for (key, shape, values) in trained {
            let theirs = golden.floats(&key);
            assert_eq!(shape, theirs.shape, "{case}, {name}: {key}");
            // As in `parity_trainer`: an entry whose gradient is near nothing may step either way.
            let what = format!("{case}, {name}: {key} after the last step");
            assert_close_to_largest(&what, &values, &theirs.values, 1e-2);
        }
    }
}

//! EVA: first values of LoRA's A from what its layers are given to read.
//!
//! Paischer et al. 2024 (arXiv:2410.07170), as in PEFT's `tuners/lora/eva.py`: A's rows are the leading
//! principal directions of a layer's inputs over the training data, and ranks move from layers whose inputs
//! vary in many directions a little to layers whose inputs vary in few directions a lot. The caller runs
//! the frozen model; an [`Observer`] looks on.

mod pca;
mod ranks;
mod record;
mod settings;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::tensor::Tensor;

use crate::config::Targets;
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, Slot};
use crate::layers::linear::Probe;
use crate::methods::InitFactors;
use crate::methods::lora::config::LoraConfig;
use crate::plan::AdapterPlan;
use crate::plan::TargetPlan;
use pca::Pca;
use record::{Input, Layer, Record, Stage, failed, open, see};
pub use settings::Settings;

/// Looks on as a model runs, and finds the directions of its layers' inputs.
#[derive(Debug)]
pub struct Observer {
    config: LoraConfig,
    settings: Settings,
    /// Every target, embeddings included.
    targets: Vec<TargetPlan>,
    record: Arc<Mutex<Record>>,
    compared: bool,
    batches: usize,
    rows: usize,
}

/// What an [`Observer`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaStart {
    /// A's rows `[rank, in]`, row-major, by module; modules whose rank became 0 are not there.
    pub factors: BTreeMap<String, Vec<f32>>,
    /// The rank of every linear target, in the model's order; it may be 0.
    pub ranks: Vec<(String, usize)>,
    /// Share of its input's variance along each direction that was looked at, by module.
    pub shares: BTreeMap<String, Vec<f64>>,
    /// Tokens that were learned from, by module: until its input had settled.
    pub learned: BTreeMap<String, usize>,
    /// Batches that were looked at.
    pub batches: usize,
    /// Tokens in them that counted.
    pub tokens: usize,
    /// Distinct inputs, and how many of them had settled.
    pub inputs: usize,
    /// See [`Self::inputs`].
    pub settled: usize,
}

impl EvaStart {
    /// A's first values for [`attach_given`](crate::attach_given).
    pub fn given(&self) -> impl Fn(&str) -> Option<InitFactors> + '_ {
        |module| {
            let a = self.factors.get(module)?.clone();
            Some(InitFactors { a, b: None })
        }
    }
}

impl fmt::Display for EvaStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks = self.ranks.iter().map(|(_, r)| *r);
        write!(
            f,
            "{} tokens in {} batches seen, {} of {} inputs settled; ranks {} to {}",
            self.tokens,
            self.batches,
            self.settled,
            self.inputs,
            ranks.clone().min().unwrap_or(0),
            ranks.clone().max().unwrap_or(0),
        )?;
        match ranks.filter(|r| *r == 0).count() {
            0 => Ok(()),
            1 => write!(f, ", one module left out"),
            n => write!(f, ", {n} modules left out"),
        }
    }
}

impl Observer {
    /// Puts a probe on every linear target of `plan`, which is `config`'s plan for this model. The model
    /// should be a clone that goes when the observer does, with no adapter in use: the probes stay on it.
    ///
    /// # Errors
    /// Settings that are wrong; a plan without linear layers.
    pub fn watch<M: Adaptable>(
        model: &mut M,
        config: &LoraConfig,
        plan: &AdapterPlan,
    ) -> Result<Self> {
        let settings = Settings::of(config)?;
        let linear = plan.targets.iter().filter(|target| !target.embedding);
        let layers: Vec<Layer> = linear
            .map(|target| Layer {
                name: target.name.clone(),
                r: target.r,
                width: target.in_features,
                limit: target.in_features.min(target.out_features),
                hash: None,
                input: 0,
                leads: false,
            })
            .collect();
        if layers.is_empty() {
            return Err(AdapterError::Config {
                origin: "adapter configuration".into(),
                problems: vec![
                    "init_lora_weights = \"eva\": no linear layer is adapted; name some in target_modules"
                        .into(),
                ],
            });
        }
        let places: BTreeMap<String, usize> = layers
            .iter()
            .enumerate()
            .map(|(i, layer)| (layer.name.clone(), i))
            .collect();
        let record = Arc::new(Mutex::new(Record {
            stage: Stage::Comparing,
            tau: settings.tau,
            places: Vec::new(),
            count: 0,
            layers,
            inputs: Vec::new(),
            pending: Vec::new(),
            failed: None,
        }));
        model.for_each_slot(&mut |name, slot| {
            if let (Slot::Linear(linear), Some(layer)) = (slot, places.get(name)) {
                let (layer, record) = (*layer, record.clone());
                linear.probe = Some(Probe(Arc::new(move |x| see(&record, layer, x))));
            }
        });
        Ok(Self {
            config: config.clone(),
            settings,
            targets: plan.targets.clone(),
            record,
            compared: false,
            batches: 0,
            rows: 0,
        })
    }

    /// The settings at work.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The largest number of directions that are looked for in one input: a batch in which fewer rows
    /// count teaches nothing.
    pub fn directions(&self) -> usize {
        self.most_wanted(&open(&self.record).layers)
    }

    /// Looks on while `run` puts one batch through the model. Of the batch's rows (tokens, flattened)
    /// those count that are `allowed`. The first batch is run twice: first to see which layers have equal
    /// inputs, which are then analysed once.
    ///
    /// # Errors
    /// Inputs that are not finite, have another number of rows than `allowed`, or did not come.
    pub fn see(&mut self, allowed: &[bool], run: &mut dyn FnMut(&Self)) -> Result<()> {
        let places: Vec<i64> = allowed
            .iter()
            .enumerate()
            .filter(|(_, allowed)| **allowed)
            .map(|(i, _)| i as i64)
            .collect();
        if places.is_empty() {
            return Ok(());
        }
        self.batches += 1;
        self.rows += places.len();
        {
            let mut record = open(&self.record);
            record.places = places;
            record.count = allowed.len();
        }
        if !self.compared {
            run(self);
            self.group(&mut *self.opened()?)?;
            self.compared = true;
        }
        for input in &mut self.opened()?.inputs {
            input.active = !input.has_settled();
        }
        run(self);
        let mut record = self.opened()?;
        record.learn()?;
        self.share_out(&mut record);
        Ok(())
    }

    /// Shows the input `[rows, in]` of a module that `run` leaves out (a head, whose product would be
    /// for nothing). Nothing happens unless the module is a target.
    pub fn show(&self, module: &str, x: Tensor<2>) {
        let layer = open(&self.record)
            .layers
            .iter()
            .position(|layer| layer.name == module);
        if let Some(layer) = layer {
            see(&self.record, layer, &x);
        }
    }

    /// Whether every direction that is needed has settled, so that further batches would be for nothing.
    pub fn settled(&self) -> bool {
        self.compared && open(&self.record).inputs.iter().all(Input::has_settled)
    }

    /// The first values, and the configuration with the ranks and alphas that go with them. A module
    /// whose rank became 0 is no target any more; `target_modules` then lists those that are left.
    ///
    /// # Errors
    /// Inputs of which nothing is known, as no batch had enough rows.
    pub fn finish(self) -> Result<(LoraConfig, EvaStart)> {
        let record = self.opened()?;
        let ranks = self.ranks(&record);
        let (mut factors, mut shares) = (BTreeMap::new(), BTreeMap::new());
        let mut learned = BTreeMap::new();
        for (layer, rank) in record.layers.iter().zip(&ranks) {
            let input = record.inputs.get(layer.input).map(|input| &input.pca);
            let Some((directions, singular)) = input.and_then(Pca::directions) else {
                let reason = format!(
                    "EVA needs a batch with at least {} tokens that count (with a label); lower r or \
                     eva_rho, or raise train.batch_size",
                    self.most_wanted(&record.layers)
                );
                return Err(failed(layer, reason));
            };
            shares.insert(
                layer.name.clone(),
                input.map(Pca::shares).unwrap_or_default(),
            );
            learned.insert(layer.name.clone(), input.map_or(0, Pca::seen));
            if *rank == 0 {
                continue;
            }
            let rows = directions
                .data()
                .chunks(layer.width)
                .zip(singular)
                .take(*rank);
            let mut a = Vec::with_capacity(rank * layer.width);
            for (row, s) in rows {
                let length = if self.settings.whiten { s.sqrt() } else { 1.0 };
                a.extend(row.iter().map(|v| (f64::from(*v) / length) as f32));
            }
            if a.iter().any(|v| !v.is_finite()) {
                let reason = "its inputs vary in fewer directions than its rank, so they cannot be \
                              whitened; lower r or switch eva_config.whiten off";
                return Err(failed(layer, reason.into()));
            }
            factors.insert(layer.name.clone(), a);
        }
        let names = record.layers.iter().map(|layer| layer.name.clone());
        let start = EvaStart {
            factors,
            ranks: names.zip(ranks).collect(),
            shares,
            learned,
            batches: self.batches,
            tokens: self.rows,
            inputs: record.inputs.len(),
            settled: record
                .inputs
                .iter()
                .filter(|input| input.has_settled())
                .count(),
        };
        Ok((self.adjusted(&start), start))
    }

    /// The record, unless something went wrong while it was written.
    fn opened(&self) -> Result<MutexGuard<'_, Record>> {
        let mut record = open(&self.record);
        match record.failed.take() {
            Some(error) => Err(error),
            None => Ok(record),
        }
    }

    /// How many directions are looked for on behalf of a layer.
    fn wanted(&self, layer: &Layer) -> usize {
        // Python rounds halves to even.
        let most = (layer.r as f64 * self.settings.rho).round_ties_even();
        (most as usize).min(layer.width)
    }

    fn most_wanted(&self, layers: &[Layer]) -> usize {
        layers
            .iter()
            .map(|layer| self.wanted(layer))
            .max()
            .unwrap_or(0)
    }

    /// Puts layers with equal inputs together; the first of them shows the input.
    fn group(&self, record: &mut Record) -> Result<()> {
        record.stage = Stage::Learning;
        let mut known: Vec<(u64, usize)> = Vec::new();
        for layer in &mut record.layers {
            let Some(hash) = layer.hash else {
                let reason = "EVA starts from the inputs of the layer, and it was not run".into();
                return Err(failed(layer, reason));
            };
            let wanted = self.wanted(layer);
            match known
                .iter_mut()
                .zip(0..)
                .find(|((other, _), _)| *other == hash)
            {
                Some(((_, most), place)) => {
                    layer.input = place;
                    *most = wanted.max(*most);
                }
                None => {
                    (layer.input, layer.leads) = (known.len(), true);
                    known.push((hash, wanted));
                }
            }
        }
        let input = |(_, most)| Input {
            pca: Pca::new(most),
            settled: vec![false; most],
            needed: most,
            active: true,
        };
        record.inputs = known.into_iter().map(input).collect();
        Ok(())
    }

    /// The rank of every layer, as shares of variance are now.
    fn ranks(&self, record: &Record) -> Vec<usize> {
        let shares: Vec<Vec<f64>> = record
            .inputs
            .iter()
            .map(|input| input.pca.shares())
            .collect();
        let claims: Vec<ranks::Claim> = record
            .layers
            .iter()
            .map(|layer| ranks::Claim {
                input: layer.input,
                leads: layer.leads,
                limit: layer.limit,
            })
            .collect();
        let budget = record.layers.iter().map(|layer| layer.r).sum();
        ranks::share_out(&claims, &shares, budget)
    }

    fn share_out(&self, record: &mut Record) {
        if record
            .inputs
            .iter()
            .any(|input| input.pca.directions().is_none())
        {
            return;
        }
        let ranks = self.ranks(record);
        let needed = record
            .layers
            .iter()
            .zip(ranks)
            .filter(|(layer, _)| layer.leads);
        let needed: Vec<(usize, usize)> = needed.map(|(layer, rank)| (layer.input, rank)).collect();
        for (input, rank) in needed {
            if let Some(input) = record.inputs.get_mut(input) {
                input.needed = rank;
            }
        }
    }

    /// The configuration with the ranks that were found, as PEFT writes it.
    fn adjusted(&self, start: &EvaStart) -> LoraConfig {
        let mut config = self.config.clone();
        (config.rank_pattern, config.alpha_pattern) = (Vec::new(), Vec::new());
        let mut left = Vec::new();
        for target in &self.targets {
            let found = start.ranks.iter().find(|(name, _)| *name == target.name);
            let rank = found.map_or(target.r, |(_, rank)| *rank);
            if rank == 0 {
                continue;
            }
            left.push(target.name.clone());
            let mut alpha = target.alpha;
            if self.settings.adjust_scaling_factors && rank != target.r {
                alpha *= rank as f64 / target.r as f64;
            }
            if rank != config.r {
                config.rank_pattern.push((target.name.clone(), rank));
            }
            if alpha != config.lora_alpha {
                config.alpha_pattern.push((target.name.clone(), alpha));
            }
        }
        if left.len() < self.targets.len() {
            config.target_modules = Some(Targets::List(left));
            // The list says which layers; options that match nothing in it would be refused.
            (config.layers_to_transform, config.layers_pattern) = (None, None);
        }
        config
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

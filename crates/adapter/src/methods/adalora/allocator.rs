//! AdaLoRA's budget: how important each rank of each module has been, and which ones it pays for.
//!
//! The importance of a parameter is `|p·∂L/∂p|`, smoothed, times the smoothed uncertainty of it; that of a
//! rank is E's plus the means over its row of A and column of B (Zhang et al. 2023, arXiv:2303.10512,
//! section 3.2). As in PEFT's `tuners/adalora/layer.py`, parameters count as they are after the
//! optimizer's step and gradients as they were clipped.

use std::collections::HashMap;

use burn::module::ParamId;
use burn::tensor::Tensor;

use crate::base::routing::DEFAULT;
use crate::base::to_host;
use crate::error::Result;
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::methods::adalora::{A, AdaLoraConfig, B, E};
use crate::methods::{Adapter, AdapterConfig, ParamRef};
use crate::model::attach::{Values, detach, install, shapes};
use crate::model::plan::plan_for_load;
use crate::model::trainable::{
    HostTensor, export_trainable, for_each_trainable, for_each_trainable_mut,
};
use crate::plan::PREFIX;

/// What one optimizer step did to the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Ranks that the budget pays for.
    pub budget: usize,
    /// Which of each module's ranks are in use, in the model's order, where a new choice was made.
    pub kept: Option<Vec<(String, Vec<bool>)>>,
}

/// The state of the budget between two steps.
#[derive(Clone, Debug, PartialEq)]
pub struct RankAllocator {
    config: AdaLoraConfig,
    total_step: usize,
    modules: Vec<String>,
    /// Smoothed importance and its smoothed uncertainty, by key.
    importance: HashMap<String, (Vec<f32>, Vec<f32>)>,
    /// Gradients of the step under way, by key.
    gradients: HashMap<String, Vec<f32>>,
    /// The last choice: module and ranks.
    kept: Vec<(String, Vec<bool>)>,
}

impl RankAllocator {
    /// The allocator of the adapter that the model carries, before its first step; none for a method
    /// without a budget.
    pub fn of<M: Adaptable>(config: &AdapterConfig, model: &M) -> Option<Self> {
        match config {
            AdapterConfig::AdaLora(config) => Some(Self::new(config, model)),
            _ => None,
        }
    }

    /// The allocator of the adapter that the model carries, before its first step.
    pub fn new<M: Adaptable>(config: &AdaLoraConfig, model: &M) -> Self {
        let mut modules = Vec::new();
        each_module(model, &mut |name, _| modules.push(name.to_string()));
        Self {
            config: config.clone(),
            total_step: config.total_step.unwrap_or(1),
            modules,
            importance: HashMap::new(),
            gradients: HashMap::new(),
            kept: Vec::new(),
        }
    }

    /// Ranks at the start: `init_r` a module.
    pub fn initial_budget(&self) -> usize {
        self.config.init_r * self.modules.len()
    }

    /// Ranks at the end: `target_r` a module.
    pub fn target_budget(&self) -> usize {
        self.config.target_r * self.modules.len()
    }

    /// The budget after optimizer step `step` (from 0), and whether a choice is due. It falls with the
    /// cube of what is left of the way from `tinit` to `total_step - tfinal`.
    pub fn schedule(&self, step: usize) -> (usize, bool) {
        let (initial, target) = (self.initial_budget(), self.target_budget());
        let end = self.total_step.saturating_sub(self.config.tfinal);
        if step <= self.config.tinit {
            return (initial, false);
        }
        if step > end {
            return (target, true);
        }
        let done = (step - self.config.tinit) as f64 / (end - self.config.tinit) as f64;
        let budget = (initial - target) as f64 * (1.0 - done).powi(3) + target as f64;
        (budget as usize, step.is_multiple_of(self.config.delta_t))
    }

    /// Cuts the model's adapter down to the ranks of the last choice, and returns its configuration then.
    ///
    /// # Errors
    /// As [`trim`].
    pub fn trimmed<M: Adaptable>(&self, model: &mut M) -> Result<AdapterConfig> {
        Ok(trim(model, &self.config, &self.kept)?.into())
    }

    fn last_choice(&self) -> usize {
        self.total_step.saturating_sub(self.config.tfinal)
    }

    /// Keeps the gradients of the step about to be taken, as they are after clipping: times `factor`.
    /// `gradient_of` gives that of a parameter (for `burn::optim::GradientsParams`, `|id| grads.get(id)`), or
    /// none where the step has none.
    ///
    /// # Errors
    /// A gradient that cannot be read from its device.
    pub fn note_gradients<M: Adaptable>(
        &mut self,
        model: &M,
        gradient_of: &dyn Fn(ParamId) -> Option<Tensor<2>>,
        factor: f64,
    ) -> Result<()> {
        self.gradients.clear();
        let mut failed = None;
        for_each_trainable(model, &mut |key, param| {
            let ParamRef::Matrix(param) = param else {
                return;
            };
            if !is_factor(key) {
                return;
            }
            match gradient_of(param.id).map(|grad| to_host(key, grad)) {
                Some(Ok(mut values)) => {
                    values.iter_mut().for_each(|value| *value *= factor as f32);
                    self.gradients.insert(key.to_string(), values);
                }
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// What is to be done after optimizer step `step` (from 0): importance noted, and ranks that are not
    /// worth their place set to zero.
    ///
    /// # Errors
    /// A value that cannot be read from its device.
    pub fn update<M: Adaptable>(&mut self, model: &mut M, step: usize) -> Result<Allocation> {
        let (budget, due) = self.schedule(step);
        let last = self.last_choice();
        if step > last {
            self.mask(model);
            return Ok(Allocation { budget, kept: None });
        }
        if step < last {
            self.note_importance(model)?;
        }
        if !due && step != last {
            return Ok(Allocation { budget, kept: None });
        }
        self.choose(budget)?;
        self.mask(model);
        if step == last {
            self.importance.clear();
        }
        Ok(Allocation {
            budget,
            kept: Some(self.kept.clone()),
        })
    }

    fn note_importance<M: Adaptable>(&mut self, model: &M) -> Result<()> {
        let (beta1, beta2) = (self.config.beta1 as f32, self.config.beta2 as f32);
        // PyTorch takes the complements in double precision.
        let (rest1, rest2) = (
            (1.0 - self.config.beta1) as f32,
            (1.0 - self.config.beta2) as f32,
        );
        for (key, _, values) in export_trainable(model)? {
            let Some(gradient) = self.gradients.get(&key) else {
                continue;
            };
            let zeros = || (vec![0.0; values.len()], vec![0.0; values.len()]);
            let (mean, spread) = self.importance.entry(key.clone()).or_insert_with(zeros);
            let state = mean.iter_mut().zip(spread.iter_mut());
            for ((mean, spread), (p, g)) in state.zip(values.iter().zip(gradient)) {
                let now = (p * g).abs();
                *mean = beta1 * *mean + rest1 * now;
                *spread = beta2 * *spread + rest2 * (now - *mean).abs();
            }
        }
        Ok(())
    }

    /// The importance of each rank of a module.
    fn scores(&self, module: &str) -> Vec<f32> {
        let element = |parameter: &str| -> Vec<f32> {
            let key = format!("{PREFIX}{module}.{parameter}");
            let state = self.importance.get(&key);
            state.map_or(Vec::new(), |(mean, spread)| {
                mean.iter().zip(spread).map(|(m, s)| m * s).collect()
            })
        };
        let (a, b, e) = (element(A), element(B), element(E));
        let r = e.len();
        let mean = |sum: f64, count: usize| (sum / count.max(1) as f64) as f32;
        let (width, out) = (a.len() / r.max(1), b.len() / r.max(1));
        (0..r)
            .map(|k| {
                let row = a[k * width..(k + 1) * width].iter();
                let column = (0..out).map(|i| f64::from(b[i * r + k]));
                let of_a = mean(row.map(|v| f64::from(*v)).sum(), width);
                let of_b = mean(column.sum(), out);
                e[k] + (of_a + of_b)
            })
            .collect()
    }

    fn choose(&mut self, budget: usize) -> Result<()> {
        let scores: Vec<(String, Vec<f32>)> = self
            .modules
            .iter()
            .map(|module| (module.clone(), self.scores(module)))
            .collect();
        let mut all: Vec<f32> = scores.iter().flat_map(|(_, s)| s.clone()).collect();
        all.sort_by(f32::total_cmp);
        // As in PEFT: what is not above the last score to go goes with it.
        let gone = self.initial_budget().saturating_sub(budget);
        let threshold = gone.checked_sub(1).and_then(|last| all.get(last)).copied();
        let kept = scores.into_iter().map(|(module, scores)| {
            let above = |score: &f32| threshold.is_none_or(|threshold| *score > threshold);
            let kept = match scores.as_slice() {
                // Nothing has been noted of it, so nothing speaks against it.
                [] => vec![true; self.config.init_r],
                scores => scores.iter().map(above).collect(),
            };
            (module, kept)
        });
        self.kept = kept.collect();
        Ok(())
    }

    /// Sets E to zero where a rank is not in use; after the last step, so that what is validated is what
    /// is stored.
    pub fn mask<M: Adaptable>(&self, model: &mut M) {
        let by_key: HashMap<String, &Vec<bool>> = self
            .kept
            .iter()
            .map(|(module, kept)| (format!("{PREFIX}{module}.{E}"), kept))
            .collect();
        for_each_trainable_mut(model, &mut |key, mut param| {
            let Some(kept) = by_key.get(key) else { return };
            if let Ok(mut values) = param.as_ref().read(key) {
                for (value, _) in values.iter_mut().zip(kept.iter()).filter(|(_, k)| !**k) {
                    *value = 0.0;
                }
                param.write(values);
            }
        });
    }

    /// The last choice of ranks: module and which of them are in use.
    pub fn kept(&self) -> &[(String, Vec<bool>)] {
        &self.kept
    }

    /// Everything to go on from, beside the adapter itself.
    pub fn state(&self) -> Vec<HostTensor> {
        let mut all = Vec::new();
        for (key, (mean, spread)) in &self.importance {
            all.push((format!("importance.{key}"), vec![mean.len()], mean.clone()));
            all.push((
                format!("uncertainty.{key}"),
                vec![spread.len()],
                spread.clone(),
            ));
        }
        for (module, kept) in &self.kept {
            let values = kept.iter().map(|k| f32::from(u8::from(*k))).collect();
            all.push((format!("kept.{module}"), vec![kept.len()], values));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Puts back what [`RankAllocator::state`] gave.
    pub fn restore(&mut self, state: Vec<HostTensor>) {
        self.importance.clear();
        let mut kept = HashMap::new();
        for (key, _, values) in state {
            if let Some(key) = key.strip_prefix("importance.") {
                self.importance.entry(key.into()).or_default().0 = values;
            } else if let Some(key) = key.strip_prefix("uncertainty.") {
                self.importance.entry(key.into()).or_default().1 = values;
            } else if let Some(module) = key.strip_prefix("kept.") {
                kept.insert(
                    module.to_string(),
                    values.iter().map(|v| *v > 0.5).collect(),
                );
            }
        }
        let names = self.modules.iter();
        self.kept = names
            .filter_map(|module| kept.remove(module).map(|k| (module.clone(), k)))
            .collect();
    }
}

/// What keeps A's rows and B's columns orthogonal: `weight · mean over all A, B of ‖P·Pᵀ − I‖` (of
/// Frobenius, not squared), `[1]`; `None` where the model carries no AdaLoRA.
pub fn orthogonality<M: Adaptable>(model: &M, weight: f64) -> Option<Tensor<1>> {
    let mut sum: Option<Tensor<1>> = None;
    let mut count = 0;
    each_module(model, &mut |_, adapter| {
        // A node of their own, where what both sides of a product ask of A or B is added up first: the
        // gradient is then this and the blocks' share, and a sum of two has no order.
        let (a, b) = (adapter.lora_a.val() * 1.0, adapter.lora_b.val() * 1.0);
        let [r, _] = a.dims();
        if r == 0 {
            return;
        }
        let grams = [
            a.clone().matmul(a.transpose()),
            b.clone().transpose().matmul(b),
        ];
        for gram in grams {
            let off = gram.clone() - Tensor::eye(r, &gram.device());
            // The square root has no slope at zero; this much below any rounding gives it one.
            let norm = ((off.clone() * off).sum() + 1e-30).sqrt();
            count += 1;
            sum = Some(match sum.take() {
                Some(sum) => sum + norm,
                None => norm,
            });
        }
    });
    sum.map(|sum| sum.mul_scalar(weight / f64::from(count)))
}

/// What the method adds to the loss, if anything: AdaLoRA's [`orthogonality`] under its own weight.
pub fn regularization<M: Adaptable>(model: &M) -> Option<Tensor<1>> {
    let mut weight = None;
    each_module(model, &mut |_, adapter| {
        weight.get_or_insert(adapter.orth_reg_weight);
    });
    orthogonality(model, weight?)
}

/// Cuts the adapter down to the ranks in use, as it is stored: A, B and E lose the others, and
/// `rank_pattern` says which they were.
///
/// # Errors
/// A value that cannot be read from its device.
pub fn trim<M: Adaptable>(
    model: &mut M,
    config: &AdaLoraConfig,
    kept: &[(String, Vec<bool>)],
) -> Result<AdaLoraConfig> {
    if kept.is_empty() {
        return Ok(config.clone());
    }
    let mut state: HashMap<String, (Vec<usize>, Vec<f32>)> = export_trainable(model)?
        .into_iter()
        .map(|(key, shape, values)| (key, (shape, values)))
        .collect();
    let mut config = config.clone();
    config.rank_pattern = Some(
        kept.iter()
            .map(|(module, kept)| (AdaLoraConfig::pattern_key(module), kept.clone()))
            .collect(),
    );
    for (module, kept) in kept {
        for parameter in [A, B, E] {
            let key = format!("{PREFIX}{module}.{parameter}");
            if let Some((shape, values)) = state.get_mut(&key) {
                let columns = shape[1];
                let by_column = parameter == B;
                let keep = |i: usize| kept[if by_column { i % columns } else { i / columns }];
                let left = values.iter().enumerate().filter(|(i, _)| keep(*i));
                *values = left.map(|(_, v)| *v).collect();
            }
        }
    }
    let plan = plan_for_load(&shapes(model), &config)?;
    detach(model);
    install(
        model,
        DEFAULT,
        &config,
        &plan,
        true,
        Vec::new(),
        &mut |target, _| {
            let mut take = |parameter| state.remove(&target.key(parameter)).unwrap_or_default().1;
            Ok(Values {
                values: vec![take(A), take(B), take(E)],
                origin: None,
            })
        },
    )?;
    for_each_trainable_mut(model, &mut |key, mut param| {
        if let Some((_, values)) = state.remove(key) {
            param.write(values);
        }
    });
    Ok(config)
}

fn is_factor(key: &str) -> bool {
    [A, B, E]
        .iter()
        .any(|p| key.strip_suffix(p).is_some_and(|head| head.ends_with('.')))
}

fn each_module<M: Adaptable>(
    model: &M,
    f: &mut dyn FnMut(&str, &crate::methods::adalora::AdaLora),
) {
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot
            && let Some(part) = linear.part(DEFAULT)
            && let Some(Adapter::AdaLora(adapter)) = &part.adapter
        {
            f(name, adapter);
        }
    });
}

//! What one adapter is, without its base.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::files::infer_modules::kind_of;
use enamel_adapter::methods::facts::InputWidth;
use enamel_adapter::offline::AdapterOnDisk;
use enamel_adapter::offline::inspect;
use enamel_adapter::offline::inspect::AdapterFacts;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::{ByKind, parameters, rank_alpha};
use crate::base::provenance;
use crate::error::TrainError;

/// All that two files say.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// The directory.
    pub dir: PathBuf,
    /// `LoRA`, `DoRA`, …
    pub method: String,
    /// PEFT's name of it.
    pub peft_type: String,
    /// Rank, where the method has one.
    pub r: Option<usize>,
    /// Alpha, where the method has one.
    pub alpha: Option<f64>,
    /// The base it was made for.
    pub base: Option<String>,
    /// The base's revision.
    pub revision: Option<String>,
    /// `target_modules` as in the file.
    pub targets: Value,
    /// Settings that differ from PEFT's defaults.
    pub settings: Vec<Setting>,
    /// Keys of the configuration that neither PEFT nor this program knows.
    pub unknown_keys: Vec<String>,
    /// A line for each kind of module.
    pub kinds: Vec<KindReport>,
    /// Why there are no norms, where there are none.
    pub no_norms: Option<String>,
    /// The norm of all deltas together.
    pub delta_norm: Option<f64>,
    /// Trained parameters.
    pub parameters: usize,
    /// Tensors in the file.
    pub tensors: usize,
    /// Types of the tensors.
    pub dtypes: Vec<String>,
    /// Bytes of both files.
    pub bytes: u64,
    /// Tensors of zeros, but for those of adapters that were never trained.
    pub zero: Vec<String>,
    /// Whether the adapter changes nothing, as at the start of training.
    pub untrained: bool,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// What is to be known of its files.
    pub notes: Vec<String>,
}

/// A setting that is not PEFT's default.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// PEFT's default.
    pub default: Value,
}

/// The modules of one kind (`q_proj`).
#[derive(Clone, Debug, Default, Serialize)]
pub struct KindReport {
    /// The last part of their names.
    pub kind: String,
    /// How many there are.
    pub modules: usize,
    /// How the adapter takes hold of them: `adapted`, `whole`, `rows`, `bias`.
    pub how: String,
    /// Shapes of the base's weights, as far as the adapter's tensors tell.
    pub shapes: Vec<String>,
    /// Ranks.
    pub ranks: Vec<usize>,
    /// Trained parameters.
    pub parameters: usize,
    /// The Frobenius norm of what is added to the weights of all modules of the kind.
    pub delta_norm: Option<f64>,
}

/// Reads an adapter and describes it.
///
/// # Errors
/// A directory that holds none, or one of a method that is not supported.
pub fn inspect(dir: &Path) -> Result<AdapterReport, TrainError> {
    let facts = AdapterFacts::read(dir)?;
    let (r, alpha) = rank_alpha(&facts.config);
    let mut report = AdapterReport {
        dir: dir.to_path_buf(),
        method: facts.config.label().to_owned(),
        peft_type: facts.config.peft_type().to_owned(),
        r,
        alpha,
        base: facts.config.base_model_name_or_path().map(str::to_owned),
        revision: facts.config.revision().map(str::to_owned),
        targets: facts.config.to_json()["target_modules"].clone(),
        settings: facts
            .settings()
            .into_iter()
            .map(|(key, value, default)| Setting {
                key,
                value,
                default,
            })
            .collect(),
        unknown_keys: facts
            .config
            .unknown_keys()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        kinds: kinds(&facts),
        no_norms: None,
        delta_norm: None,
        parameters: parameters(&facts),
        tensors: facts.tensors.len(),
        dtypes: Vec::new(),
        bytes: facts.bytes,
        zero: facts
            .tensors
            .iter()
            .filter(|t| t.zero)
            .map(|t| t.key.clone())
            .collect(),
        untrained: false,
        problems: facts.problems.clone(),
        notes: provenance::notes(dir, None),
    };
    report.dtypes = facts.tensors.iter().map(|t| t.dtype.clone()).collect();
    report.dtypes.sort();
    report.dtypes.dedup();
    add_norms(&mut report, &facts, dir)?;
    Ok(report)
}

fn kinds(facts: &AdapterFacts) -> Vec<KindReport> {
    let mut kinds: Vec<KindReport> = Vec::new();
    let mut add =
        |name: &str, how: &str, shape: Option<[usize; 2]>, rank: Option<usize>, count: usize| {
            let kind = kind_of(name);
            let place = kinds.iter().position(|k| k.kind == kind && k.how == how);
            let place = place.unwrap_or_else(|| {
                kinds.push(KindReport {
                    kind: kind.to_owned(),
                    how: how.to_owned(),
                    ..KindReport::default()
                });
                kinds.len() - 1
            });
            let entry = &mut kinds[place];
            entry.modules += 1;
            entry.parameters += count;
            if let Some([rows, cols]) = shape {
                let text = format!("{rows} × {cols}");
                if !entry.shapes.contains(&text) {
                    entry.shapes.push(text);
                }
            }
            if let Some(rank) = rank.filter(|r| !entry.ranks.contains(r)) {
                entry.ranks.push(rank);
                entry.ranks.sort_unstable();
            }
        };
    let Some(plan) = &facts.plan else {
        return Vec::new();
    };
    let ranked = rank_alpha(&facts.config).0.is_some();
    let wide = facts.config.input_width() != InputWidth::Untold;
    for t in &plan.targets {
        let shape = match t.embedding {
            true => [t.in_features, t.out_features],
            false => [t.out_features, t.in_features],
        };
        add(
            &t.name,
            "adapted",
            // A side that nothing tells stands at 1.
            (wide && !shape.contains(&1)).then_some(shape),
            ranked.then_some(t.r),
            t.params,
        );
    }
    for s in &plan.saved {
        let shape = [s.shape[0], s.shape.get(1).copied().unwrap_or(1)];
        add(&s.name, "whole", Some(shape), None, s.params);
    }
    for t in &plan.tokens {
        add(
            &t.name,
            "rows",
            Some([t.indices.len(), t.width]),
            None,
            t.indices.len() * t.width,
        );
    }
    for b in &plan.biases {
        add(&b.name, "bias", None, None, b.len);
    }
    kinds
}

/// Norms of what the adapter adds, where they can be had without the base.
fn add_norms(
    report: &mut AdapterReport,
    facts: &AdapterFacts,
    dir: &Path,
) -> Result<(), TrainError> {
    if !facts.problems.is_empty() {
        report.no_norms = Some("the adapter has problems".to_owned());
        return Ok(());
    }
    let adapter = match inspect::open(dir, None, None) {
        Ok(adapter) => adapter,
        Err(error) => {
            report.no_norms = Some(error.to_string());
            return Ok(());
        }
    };
    if let Some(reason) = adapter.needs_base() {
        report.no_norms = Some(reason.to_owned());
        return Ok(());
    }
    if adapter.plan().targets.is_empty() {
        return Ok(());
    }
    let mut squares = ByKind::<f64>::default();
    for (name, norm) in norms(&adapter)? {
        *squares.of(&name) += norm * norm;
    }
    for kind in report.kinds.iter_mut().filter(|k| k.how == "adapted") {
        kind.delta_norm = squares.0.get(&kind.kind).map(|s| s.sqrt());
    }
    let all: f64 = squares.0.values().sum();
    report.delta_norm = Some(all.sqrt());
    let plan = adapter.plan();
    let only = plan.saved.is_empty() && plan.tokens.is_empty() && plan.biases.is_empty();
    report.untrained = all == 0.0 && only && adapter.own_biases().is_empty();
    Ok(())
}

fn norms(adapter: &AdapterOnDisk) -> Result<Vec<(String, f64)>, TrainError> {
    let device = Device::flex();
    let targets = adapter.plan().targets.par_iter();
    targets
        .map(|target| {
            let delta = adapter.delta(&target.name, &device)?;
            let norm = delta.norm().map_err(|e| linalg(&target.name, &e))?;
            Ok((target.name.clone(), norm))
        })
        .collect()
}

/// An error of the arithmetic, with the module it happened in.
pub(super) fn linalg(module: &str, error: &enamel_adapter::linalg::LinalgError) -> TrainError {
    TrainError::Mismatch(format!("{module}: {error}"))
}

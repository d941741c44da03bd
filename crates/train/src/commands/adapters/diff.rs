//! How two adapters differ, without their base.

use std::path::Path;

use burn::tensor::Device;
use enamel_adapter::combine::{self, DeltaDiff};
use enamel_adapter::offline::inspect;
use enamel_adapter::offline::inspect::AdapterFacts;
use enamel_adapter::offline::{AdapterOnDisk, Delta};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::ByKind;
use super::inspect::linalg;
use crate::base::provenance;
use crate::error::TrainError;

/// All differences of two adapters.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterDiff {
    /// Settings that differ.
    pub settings: Vec<SettingDiff>,
    /// Tensors that only the first has.
    pub only_first: Vec<String>,
    /// Tensors that only the second has.
    pub only_second: Vec<String>,
    /// Tensors of different shapes, with both.
    pub shapes: Vec<String>,
    /// A line for each kind of module that both adapt.
    pub kinds: Vec<KindDiff>,
    /// All modules that both adapt, together.
    pub total: Option<KindDiff>,
    /// Why deltas were not compared, where they were not.
    pub not_compared: Option<String>,
    /// Whether the files say the same, tensor by tensor and setting by setting.
    pub same: bool,
    /// What is to be known of the adapters' files.
    pub notes: Vec<String>,
}

/// A setting that differs.
#[derive(Clone, Debug, Serialize)]
pub struct SettingDiff {
    /// Its name.
    pub key: String,
    /// The first adapter's.
    pub first: Value,
    /// The second adapter's.
    pub second: Value,
}

/// The deltas of the modules of one kind, taken as one vector.
#[derive(Clone, Debug, Serialize)]
pub struct KindDiff {
    /// The last part of their names.
    pub kind: String,
    /// Modules that both adapt.
    pub modules: usize,
    /// The norm of the first adapter's deltas.
    pub norm_first: f64,
    /// The norm of the second's.
    pub norm_second: f64,
    /// The norm of their difference.
    pub norm_difference: f64,
    /// The cosine between them; none where one is zero.
    pub cosine: Option<f64>,
    /// The largest difference of an entry.
    pub max_difference: f64,
}

/// Compares two adapters' settings, tensors and deltas.
///
/// # Errors
/// A directory that holds no adapter.
pub fn diff(first: &Path, second: &Path) -> Result<AdapterDiff, TrainError> {
    let facts = [AdapterFacts::read(first)?, AdapterFacts::read(second)?];
    let settings = settings(&facts);
    let [only_first, only_second] =
        [[0, 1], [1, 0]].map(|[this, other]| only(&facts[this], &facts[other]));
    let shapes = shapes(&facts);
    let mut report = AdapterDiff {
        settings,
        only_first,
        only_second,
        shapes,
        kinds: Vec::new(),
        total: None,
        not_compared: None,
        same: false,
        notes: provenance::notes_of_all(&[first.to_owned(), second.to_owned()], None),
    };
    let wrong = [first, second]
        .into_iter()
        .zip(&facts)
        .find(|(_, facts)| !facts.problems.is_empty());
    if let Some((dir, facts)) = wrong {
        report.not_compared = Some(format!("{}: {}", dir.display(), facts.problems.join("; ")));
        return Ok(report);
    }
    let adapters = [
        inspect::open(first, None, None),
        inspect::open(second, None, None),
    ];
    let [Ok(a), Ok(b)] = adapters else {
        let why = adapters.into_iter().filter_map(Result::err).next();
        report.not_compared = why.map(|error| error.to_string());
        return Ok(report);
    };
    let needs = [(first, &a), (second, &b)];
    if let Some((dir, reason)) = needs
        .into_iter()
        .find_map(|(d, a)| a.needs_base().map(|r| (d, r)))
    {
        report.not_compared = Some(format!("{}: {reason}", dir.display()));
        return Ok(report);
    }
    deltas(&mut report, &a, &b)?;
    let empty =
        report.settings.is_empty() && report.only_first.is_empty() && report.only_second.is_empty();
    let still = report
        .total
        .as_ref()
        .is_none_or(|total| total.norm_difference == 0.0);
    report.same = empty && report.shapes.is_empty() && still && same_rest(&a, &b);
    Ok(report)
}

/// Whether what is trained beside deltas is the same, value by value.
fn same_rest(a: &AdapterOnDisk, b: &AdapterOnDisk) -> bool {
    a.rest() == b.rest()
}

fn settings(facts: &[AdapterFacts; 2]) -> Vec<SettingDiff> {
    // Which program wrote a file and when makes no difference to what it does.
    const ABOUT: [&str; 3] = ["peft_version", "inference_mode", "auto_mapping"];
    let [a, b] = [&facts[0], &facts[1]].map(|f| f.config.to_json());
    let keys = |v: &Value| -> Vec<String> {
        v.as_object()
            .into_iter()
            .flatten()
            .map(|(k, _)| k.clone())
            .collect()
    };
    let mut all = keys(&a);
    all.extend(keys(&b));
    all.sort();
    all.dedup();
    let off = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let differs = all.into_iter().filter(|key| {
        let (x, y) = (sorted(&a[key]), sorted(&b[key]));
        x != y && !(off(&x) && off(&y)) && !ABOUT.contains(&key.as_str())
    });
    let lines = differs.map(|key| SettingDiff {
        first: a[&key].clone(),
        second: b[&key].clone(),
        key,
    });
    lines.collect()
}

/// Lists of names are sets in PEFT, and come in any order.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(list) => {
            let mut list = list.clone();
            list.sort_by_key(Value::to_string);
            Value::Array(list)
        }
        other => other.clone(),
    }
}

fn only(this: &AdapterFacts, other: &AdapterFacts) -> Vec<String> {
    let missing = this
        .tensors
        .iter()
        .filter(|t| !other.tensors.iter().any(|o| o.key == t.key));
    missing.map(|t| t.key.clone()).collect()
}

fn shapes(facts: &[AdapterFacts; 2]) -> Vec<String> {
    let pairs = facts[0].tensors.iter().filter_map(|t| {
        let other = facts[1].tensors.iter().find(|o| o.key == t.key)?;
        (other.shape != t.shape).then(|| format!("{}: {:?} and {:?}", t.key, t.shape, other.shape))
    });
    pairs.collect()
}

#[derive(Default)]
struct Sums {
    modules: usize,
    squares: [f64; 3],
    product: f64,
    largest: f64,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.modules += other.modules;
        for (sum, more) in self.squares.iter_mut().zip(other.squares) {
            *sum += more;
        }
        self.product += other.product;
        self.largest = self.largest.max(other.largest);
    }

    fn of(diff: &DeltaDiff) -> Self {
        let product = diff.cosine.unwrap_or(0.0) * diff.norm_first * diff.norm_second;
        Self {
            modules: 1,
            squares: [diff.norm_first, diff.norm_second, diff.norm_difference].map(|n| n * n),
            product,
            largest: diff.max_difference,
        }
    }

    fn report(&self, kind: &str) -> KindDiff {
        let [first, second, difference] = self.squares.map(f64::sqrt);
        let cosine = self.product / first / second;
        KindDiff {
            kind: kind.to_owned(),
            modules: self.modules,
            norm_first: first,
            norm_second: second,
            norm_difference: difference,
            cosine: (first > 0.0 && second > 0.0).then(|| cosine.clamp(-1.0, 1.0)),
            max_difference: self.largest,
        }
    }
}

fn deltas(
    report: &mut AdapterDiff,
    a: &AdapterOnDisk,
    b: &AdapterOnDisk,
) -> Result<(), TrainError> {
    let device = Device::flex();
    let shared = |name: &str| b.plan().targets.iter().any(|t| t.name == name);
    let names: Vec<&str> = a
        .plan()
        .targets
        .iter()
        .map(|t| t.name.as_str())
        .filter(|name| shared(name))
        .collect();
    let compared: Vec<(&str, DeltaDiff)> = names
        .into_par_iter()
        .map(|name| {
            let (x, y) = (a.delta(name, &device)?, b.delta(name, &device)?);
            let found = match (&x, &y) {
                (Delta::Factors(x), Delta::Factors(y)) => combine::diff(x, y),
                _ => x.dense().and_then(|x| combine::diff_dense(&x, &y.dense()?)),
            };
            Ok((name, found.map_err(|e| linalg(name, &e))?))
        })
        .collect::<Result<_, TrainError>>()?;
    let mut kinds = ByKind::<Sums>::default();
    let mut total = Sums::default();
    for (name, diff) in &compared {
        let sums = Sums::of(diff);
        kinds.of(name).add(&sums);
        total.add(&sums);
    }
    report.kinds = kinds
        .0
        .iter()
        .map(|(kind, sums)| sums.report(kind))
        .collect();
    report.total = (total.modules > 0).then(|| total.report("all"));
    Ok(())
}

//! `enamel adapter`: what lies in adapter directories, and adapters made of adapters.

mod combine;
mod convert;
mod diff;
mod inspect;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use enamel_adapter::offline::inspect::AdapterFacts;
use enamel_adapter::{AdapterConfig, load_config};
use serde::Serialize;

use crate::error::TrainError;

pub use combine::{CombineRequest, Combined, combine};
pub use convert::{ConvertRequest, Converted, convert};
pub use diff::{AdapterDiff, KindDiff, SettingDiff, diff};
pub use inspect::{AdapterReport, KindReport, Setting, inspect};

/// One adapter of a list.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its directory.
    pub dir: PathBuf,
    /// What it is called, as a part of the path.
    pub name: String,
    /// `LoRA`, `DoRA`, …
    pub method: String,
    /// Rank, where the method has one.
    pub r: Option<usize>,
    /// Alpha, where the method has one.
    pub alpha: Option<f64>,
    /// Trained parameters.
    pub parameters: usize,
    /// Bytes on disk.
    pub bytes: u64,
    /// The base it was made for.
    pub base: Option<String>,
    /// Why it cannot be used; or the number of things that are wrong with it.
    pub problem: Option<String>,
}

/// How deep a run directory nests: `checkpoints/step-000120/adapter/name`.
const DEPTH: usize = 4;

/// Adapters in a directory: itself, named ones in it, and those of runs and their checkpoints.
///
/// # Errors
/// No such directory; none in any of them.
pub fn list(dirs: &[PathBuf]) -> Result<Vec<Listed>, TrainError> {
    let mut found = Vec::new();
    for dir in dirs {
        if !dir.is_dir() {
            return Err(TrainError::Run {
                path: dir.clone(),
                reason: "there is no such directory".to_owned(),
                help: "give an adapter's directory, or one that adapters lie in".to_owned(),
            });
        }
        let mut here = Vec::new();
        walk(dir, DEPTH, &mut here);
        here.sort();
        found.extend(here.iter().map(|adapter| listed(dir, adapter)));
    }
    if found.is_empty() {
        let names: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        return Err(TrainError::Mismatch(format!(
            "no adapter in {}\n  help: an adapter is a directory with adapter_config.json",
            names.join(", ")
        )));
    }
    Ok(found)
}

fn walk(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if dir.join("adapter_config.json").is_file() {
        found.push(dir.to_path_buf());
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|_| depth > 0) {
        let name = entry.file_name();
        // What an adapter began with is a part of it, and links may lead back up.
        let hidden = name.to_string_lossy().starts_with('.') || name == "initial_adapter";
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && !hidden {
            walk(&entry.path(), depth - 1, found);
        }
    }
}

fn listed(root: &Path, dir: &Path) -> Listed {
    let inside = dir.strip_prefix(root).unwrap_or(dir);
    let name = match inside.as_os_str().is_empty() {
        true => dir.file_name().map_or_else(
            || dir.display().to_string(),
            |n| n.to_string_lossy().into_owned(),
        ),
        false => inside.display().to_string(),
    };
    let mut listed = Listed {
        dir: dir.to_path_buf(),
        name,
        method: "?".to_owned(),
        r: None,
        alpha: None,
        parameters: 0,
        bytes: 0,
        base: None,
        problem: None,
    };
    match AdapterFacts::read(dir) {
        Ok(facts) => {
            describe(&mut listed, &facts.config);
            listed.parameters = parameters(&facts);
            listed.bytes = facts.bytes;
            listed.problem = match facts.problems.as_slice() {
                [] => None,
                [one] => Some(one.clone()),
                all => Some(format!(
                    "{} problems; see `enamel adapter inspect`",
                    all.len()
                )),
            };
        }
        Err(error) => {
            if let Ok(config) = load_config(dir) {
                describe(&mut listed, &config);
            }
            let text = error.to_string();
            listed.problem = Some(text.lines().next().unwrap_or_default().to_owned());
        }
    }
    listed
}

fn describe(listed: &mut Listed, config: &AdapterConfig) {
    listed.method = config.label().to_owned();
    (listed.r, listed.alpha) = rank_alpha(config);
    listed.base = config.base_model_name_or_path().map(str::to_owned);
}

/// Elements of all tensors that are trained.
fn parameters(facts: &AdapterFacts) -> usize {
    let shared = |key: &str| facts.config.shared_keys().contains(&key);
    match &facts.plan {
        Some(plan) => plan.trainable,
        None => {
            let own = facts.tensors.iter().filter(|t| !shared(&t.key));
            own.map(|t| t.shape.iter().product::<usize>()).sum()
        }
    }
}

/// Rank and alpha as the configuration gives them.
fn rank_alpha(config: &AdapterConfig) -> (Option<usize>, Option<f64>) {
    let json = config.to_json();
    let alpha = json["lora_alpha"]
        .as_f64()
        .or_else(|| json["alpha"].as_f64());
    (config.rank(), alpha)
}

/// Sums of squares over the modules of each kind, in order of the kinds' names.
#[derive(Default)]
struct ByKind<T>(BTreeMap<String, T>);

impl<T: Default> ByKind<T> {
    fn of(&mut self, module: &str) -> &mut T {
        self.0
            .entry(enamel_adapter::files::infer_modules::kind_of(module).to_owned())
            .or_default()
    }
}

/// An error relative to a norm, both in squares; 0 of nothing.
fn relative(error: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        (error / whole).sqrt()
    } else {
        0.0
    }
}

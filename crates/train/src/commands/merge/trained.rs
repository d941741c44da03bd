//! How training held the base: from the run's lock file beside the adapter, or as the caller says.

use std::path::{Path, PathBuf};

use enamel_model::{Loading, Quantization};

use super::folding::Merging;
use crate::error::TrainError;
use crate::inputs;
use crate::recipe::Recipe;
use crate::run_dir::LOCK;

/// What an adapter's run left beside it.
pub(super) struct Run {
    /// The lock file.
    pub lock: PathBuf,
    /// What is in it.
    pub recipe: Recipe,
}

/// The lock files of the adapters' runs, and what is wrong with those that cannot be read.
pub(super) fn runs(adapters: &[PathBuf]) -> (Vec<Option<Run>>, Vec<String>) {
    let mut problems = Vec::new();
    let runs = adapters.iter().map(|dir| {
        let lock = lock_of(dir)?;
        match Recipe::load::<&str>(&lock, &[]) {
            Ok(recipe) => Some(Run { lock, recipe }),
            Err(error) => {
                problems.push(error.to_string());
                None
            }
        }
    });
    (runs.collect(), problems)
}

/// `RUN/recipe.lock.toml` for `RUN/adapter` and `RUN/checkpoints/step-…`.
fn lock_of(adapter: &Path) -> Option<PathBuf> {
    let adapter = adapter.canonicalize().ok()?;
    let parent = adapter.parent()?;
    let in_checkpoints = parent.file_name().is_some_and(|name| name == "checkpoints");
    let above = parent.parent().filter(|_| in_checkpoints);
    [Some(adapter.as_path()), Some(parent), above]
        .into_iter()
        .flatten()
        .map(|dir| dir.join(LOCK))
        .find(|lock| lock.is_file())
}

/// How training held the base, and how that is known.
pub(super) struct Trained {
    pub loading: Loading,
    pub known_from: String,
}

/// How the base was held, if a format is known that its linear layers were quantised to: as `given`, or as in
/// the runs. `wants` names what cannot do without.
///
/// # Errors
/// Everything that speaks against what is asked for: a choice that needs the format where none is known, runs
/// that had the base differently, lock files that cannot be read where one is needed.
pub(super) fn trained(
    wants: Vec<&str>,
    given: Option<&Quantization>,
    merging: &Merging<'_>,
    runs: &[Option<Run>],
    unreadable: &[String],
) -> Result<Option<Trained>, TrainError> {
    let mut problems = Vec::new();
    let found = match given {
        Some(quantization) => {
            let compute = runs.iter().flatten().next();
            let loading = Loading {
                compute: compute
                    .map(|run| run.recipe.model.compute_dtype.into())
                    .unwrap_or_default(),
                quantization: quantization.clone(),
                seed: 0,
            };
            Some((loading, "the command line".to_owned()))
        }
        None => {
            let mut known: Vec<(Loading, String)> = Vec::new();
            for run in runs.iter().flatten() {
                let loading = Loading {
                    compute: run.recipe.model.compute_dtype.into(),
                    quantization: Quantization::from(&run.recipe.model.quantization),
                    seed: 0,
                };
                if known.iter().all(|(other, _)| *other != loading) {
                    known.push((loading, run.lock.display().to_string()));
                }
            }
            if known.len() > 1 {
                let lines = known.iter().map(|(loading, lock)| {
                    let format = loading.quantization.format;
                    let format = format.map_or("dense".to_owned(), |format| format.to_string());
                    format!("{lock}: {format}, compute dtype {}", loading.compute.name())
                });
                let lines: Vec<String> = lines.collect();
                problems.push(format!(
                    "the adapters were trained on bases that were held differently ({})",
                    lines.join("; ")
                ));
                None
            } else {
                known.pop()
            }
        }
    };
    let found = match found {
        Some((mut loading, known_from)) if loading.quantization.format.is_some() => {
            for (adapter, _) in &merging.adapters {
                (loading.quantization, _) = inputs::quantization(
                    loading.quantization,
                    &merging.base,
                    adapter.config(),
                    adapter.plan(),
                )?;
            }
            Some(Trained {
                loading,
                known_from,
            })
        }
        _ => None,
    };
    if wants.is_empty() || found.is_some() {
        return Ok(found);
    }
    problems.extend(unreadable.iter().cloned());
    if given.is_some() {
        problems.push("--dequantize says that it was not quantised".to_owned());
    } else if problems.is_empty() {
        problems.push(match runs.iter().flatten().next() {
            Some(run) => format!("{} has no [model.quantization]", run.lock.display()),
            None => format!("there is no {LOCK} beside the adapter"),
        });
    }
    let verb = if wants.len() == 1 { "needs" } else { "need" };
    Err(TrainError::Mismatch(format!(
        "{} {verb} the format that the base was quantised to while the adapter was trained, and it is not known: \
         {}\n  help: give it to `enamel merge` with --load-in-4bit (--bnb-4bit-quant-type, --bnb-4bit-use-double-quant) or \
         --load-in-8bit, or merge into the dense base",
        wants.join(" and "),
        problems.join("; ")
    )))
}

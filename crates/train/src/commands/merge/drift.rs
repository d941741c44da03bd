//! How far merged weights are from what was trained: logits of each choice of merging beside those of the
//! quantised base with the adapter on top.

use burn::tensor::{Int, Tensor, TensorData};
use enamel_model::{Model, ModelInput};
use rayon::prelude::*;
use serde::Serialize;

use super::check::probe;
use super::folding::Merging;
use super::source::Values;
use super::trained::{Run, Trained};
use super::{Choice, MergeBase};
use crate::error::TrainError;
use crate::inputs::validation_rows;

/// Positions whose logits exist at once.
const CHUNK: usize = 256;

/// What each choice of merging does to the logits.
#[derive(Clone, Debug, Serialize)]
pub struct DriftReport {
    /// How the base was held while the adapter was trained.
    pub trained_on: String,
    /// How that is known: a lock file, or the command line.
    pub known_from: String,
    /// Which rows the logits are of.
    pub rows_from: String,
    /// How many rows.
    pub rows: usize,
    /// How many positions, which are all tokens of the rows.
    pub positions: usize,
    /// Element type of the merged weights.
    pub dtype: &'static str,
    /// The choices.
    pub choices: Vec<ChoiceDrift>,
}

/// One choice beside the quantised base with the adapter on top.
#[derive(Clone, Debug, Serialize)]
pub struct ChoiceDrift {
    /// The choice.
    #[serde(flatten)]
    pub choice: Choice,
    /// Its logits' distance.
    #[serde(flatten)]
    pub drift: Drift,
}

/// The distance of logits from those of a reference, over all positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Drift {
    /// Largest difference of a logit.
    pub max_abs_logit_diff: f64,
    /// Mean difference of a logit, its sign left out.
    pub mean_abs_logit_diff: f64,
    /// Mean Kullback-Leibler divergence of the next token's distribution from the reference's,
    /// KL(reference ‖ merged), in nats.
    pub mean_kl: f64,
    /// Share of positions at which both have the same most likely token.
    pub same_argmax: f64,
}

/// Sums over positions.
#[derive(Clone, Copy, Default)]
struct Sums {
    positions: usize,
    logits: usize,
    max: f64,
    abs: f64,
    kl: f64,
    same: usize,
}

impl Sums {
    /// What one position adds: logits over the vocabulary, the reference's first.
    fn of(reference: &[f32], merged: &[f32]) -> Self {
        let (log_p, log_q) = (log_sum_exp(reference), log_sum_exp(merged));
        let mut sums = Self {
            positions: 1,
            logits: reference.len(),
            same: usize::from(argmax(reference) == argmax(merged)),
            ..Self::default()
        };
        for (p, q) in reference.iter().zip(merged) {
            let (p, q) = (f64::from(*p), f64::from(*q));
            let difference = (p - q).abs();
            sums.max = larger(sums.max, difference);
            sums.abs += difference;
            let (p, q) = (p - log_p, q - log_q);
            sums.kl += p.exp() * (p - q);
        }
        sums
    }

    fn plus(self, other: Self) -> Self {
        Self {
            positions: self.positions + other.positions,
            logits: self.logits + other.logits,
            max: larger(self.max, other.max),
            abs: self.abs + other.abs,
            kl: self.kl + other.kl,
            same: self.same + other.same,
        }
    }

    fn mean(self) -> Drift {
        let positions = self.positions.max(1) as f64;
        Drift {
            max_abs_logit_diff: self.max,
            mean_abs_logit_diff: self.abs / self.logits.max(1) as f64,
            // Rounding can leave a sum of zeros a little below zero.
            mean_kl: if self.kl < 0.0 {
                0.0
            } else {
                self.kl / positions
            },
            same_argmax: self.same as f64 / positions,
        }
    }
}

/// `f64::max` would swallow a NaN.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        return f64::NAN;
    }
    a.max(b)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    max + sum.ln()
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best
}

/// The rows to compare on, and where they come from: the first validation rows of the runs' recipes, or one
/// row that needs no data.
pub(super) fn rows(
    merging: &Merging<'_>,
    runs: &[Option<Run>],
    most: usize,
) -> (Vec<Vec<u32>>, String) {
    let built_in = |why: String| {
        let row = probe(merging.base.config.vocab_size);
        (vec![row], format!("the built-in check row ({why})"))
    };
    let Some(run) = runs.iter().flatten().next() else {
        return built_in("there is no run beside the adapter to take validation rows from".into());
    };
    match validation_rows(&run.recipe, &merging.base) {
        Ok(rows) => {
            let rows = rows.into_iter().map(|row| row.input_ids);
            let rows: Vec<_> = rows.filter(|ids| !ids.is_empty()).take(most).collect();
            if rows.is_empty() {
                return built_in(format!("{} has no validation rows", run.lock.display()));
            }
            let count = rows.len();
            let from = format!("{count} validation rows of {}", run.lock.display());
            (rows, from)
        }
        // What was trained can be merged though its data have gone.
        Err(error) => built_in(format!(
            "the validation rows of {} cannot be read: {}",
            run.lock.display(),
            error.to_string().lines().next().unwrap_or_default()
        )),
    }
}

/// Compares every choice, or `None` where the adapters cannot be in use beside the base with their weights.
/// The quantised model and one dense model at a time are in memory.
pub(super) fn drift(
    merging: &Merging<'_>,
    trained: &Trained,
    (rows, rows_from): (Vec<Vec<u32>>, String),
) -> Result<Option<DriftReport>, TrainError> {
    let mut reference = merging.base.weights(merging.device, &trained.loading)?;
    if !merging.attach(&mut reference)? {
        return Ok(None);
    }
    let beside: Vec<Tensor<2>> = rows.iter().map(|row| hidden(&reference, row)).collect();
    let mut choices = Vec::new();
    for base in [MergeBase::Dense, MergeBase::Dequantized] {
        for requantized in [false, true] {
            let choice = Choice { base, requantized };
            let merged = merging.load(Values::Written(choice))?;
            let mut sums = Sums::default();
            for (row, beside) in rows.iter().zip(&beside) {
                sums = sums.plus(compare(&reference, beside, &merged, &hidden(&merged, row))?);
            }
            choices.push(ChoiceDrift {
                choice,
                drift: sums.mean(),
            });
        }
    }
    let format = trained.loading.quantization.format;
    Ok(Some(DriftReport {
        trained_on: format.map_or_else(String::new, |format| format.to_string()),
        known_from: trained.known_from.clone(),
        rows_from,
        rows: rows.len(),
        positions: rows.iter().map(Vec::len).sum(),
        dtype: merging.dtype.kind().name(),
        choices,
    }))
}

/// Hidden states `[tokens, hidden]` of one row.
fn hidden(model: &Model, row: &[u32]) -> Tensor<2> {
    let ids: Vec<i64> = row.iter().map(|id| i64::from(*id)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, row.len()]), &model.device());
    let hidden = model.forward_hidden(&ModelInput::new(ids), None);
    let [_, tokens, width] = hidden.dims();
    hidden.reshape([tokens, width])
}

fn compare(
    reference: &Model,
    beside: &Tensor<2>,
    merged: &Model,
    hidden: &Tensor<2>,
) -> Result<Sums, TrainError> {
    let vocabulary = merged.config().vocab_size;
    let [tokens, _] = hidden.dims();
    let mut all = Sums::default();
    for start in (0..tokens).step_by(CHUNK) {
        let count = CHUNK.min(tokens - start);
        let logits = |model: &Model, hidden: &Tensor<2>| {
            model
                .logits(hidden.clone().narrow(0, start, count))
                .try_into_vec_as::<f32>()
                .map_err(|error| TrainError::Framework(format!("reading logits: {error}")))
        };
        let (p, q) = (logits(reference, beside)?, logits(merged, hidden)?);
        // Positions are summed in their order, whatever threads there are.
        let sums: Vec<Sums> = p
            .par_chunks(vocabulary)
            .zip(q.par_chunks(vocabulary))
            .map(|(p, q)| Sums::of(p, q))
            .collect();
        all = sums.into_iter().fold(all, Sums::plus);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_of_two_positions_is_what_a_person_works_out() {
        // Probabilities (1/2, 1/2) beside (3/4, 1/4), then twice the same.
        let quarter = 3.0_f32.ln();
        let sums = Sums::of(&[0.0, 0.0], &[quarter, 0.0]).plus(Sums::of(&[1.0, 4.0], &[1.0, 4.0]));
        let drift = sums.mean();
        let ln3 = 3.0_f64.ln();
        // KL = ½·ln(½ / ¾) + ½·ln(½ / ¼) = ½·ln(4/3).
        let kl = 0.5 * (4.0_f64 / 3.0).ln();
        // The logarithm was rounded to f32.
        let close = |a: f64, b: f64| (a - b).abs() < 1e-7;
        assert!(close(drift.max_abs_logit_diff, ln3), "{drift:?}");
        assert!(close(drift.mean_abs_logit_diff, ln3 / 4.0), "{drift:?}");
        assert!(close(drift.mean_kl, kl / 2.0), "{drift:?}");
        assert_eq!(drift.same_argmax, 1.0, "equal logits: the first is taken");
        let other = Sums::of(&[0.0, 1.0], &[1.0, 0.0]).plus(sums).mean();
        assert!(close(other.same_argmax, 2.0 / 3.0), "{other:?}");
    }

    #[test]
    fn drift_does_not_hide_a_logit_that_is_no_number() {
        let drift = Sums::of(&[0.0, f32::NAN], &[0.0, 1.0]).mean();
        assert!(drift.max_abs_logit_diff.is_nan(), "{drift:?}");
        let after = Sums::of(&[0.0, f32::NAN], &[0.0, 1.0])
            .plus(Sums::of(&[0.0, 1.0], &[0.0, 1.0]))
            .mean();
        assert!(after.max_abs_logit_diff.is_nan(), "{after:?}");
    }
}

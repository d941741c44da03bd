//! `report.html`: what a run was, how it went and what changed, in one file without scripts.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};

use crate::error::TrainError;
use crate::files::write_atomic;
use crate::inputs::Inputs;
use crate::recipe::Recipe;
use crate::run_dir::results::RunOutcome;
use crate::task::Task;
use crate::text::duration_text;
use crate::text::shown;
use crate::text::thousands;
use crate::training::metrics_log;
use crate::training::metrics_log::Entry;

const TEMPLATE: &str = include_str!("report.html.j2");
/// Points of the loss curve: more than a screen has pixels for would only make the file large.
const MAX_POINTS: usize = 600;

/// Writes the report of a finished run with this id.
///
/// # Errors
/// When the metrics cannot be read or the disk refuses.
pub fn write<T: Task>(
    dir: &Path,
    run: &str,
    recipe: &Recipe,
    inputs: &Inputs<T>,
    outcome: &RunOutcome,
) -> Result<(), TrainError> {
    let entries = metrics_log::read(&dir.join("metrics.jsonl"))?;
    let chart = Chart::of(&entries);
    let settings = toml::to_string(recipe)
        .map_err(|e| TrainError::Framework(format!("writing the report: {e}")))?;
    let figure = |v: Option<f64>| v.map_or_else(|| "–".to_string(), |v| format!("{v:.4}"));
    let mut facts = vec![
        (
            "base model".to_owned(),
            format!(
                "{} ({})",
                inputs.base.local.reference, inputs.base.local.source_note
            ),
        ),
        (
            "device".to_owned(),
            format!("{}, {} threads", inputs.device_name, inputs.lock.threads),
        ),
        ("compute".to_owned(), inputs.computing()),
        (
            "trained parameters".to_owned(),
            format!(
                "{} of {} ({:.3} %)",
                thousands(inputs.plan.trainable as u64),
                thousands(inputs.plan.total as u64),
                inputs.plan.percent()
            ),
        ),
        (
            "optimizer steps".to_owned(),
            format!("{} of {}", outcome.step, outcome.total_steps),
        ),
        ("tokens".to_owned(), thousands(outcome.tokens)),
        ("training time".to_owned(), duration_text(outcome.seconds)),
        (
            "tokens a second".to_owned(),
            format!("{:.0}", outcome.tokens_per_second),
        ),
        (
            "peak memory, measured".to_owned(),
            format!("{} MiB", outcome.peak_memory >> 20),
        ),
        ("peak memory, estimated".to_owned(), estimated(outcome)),
        (
            "validation loss before".to_owned(),
            figure(outcome.first_valid_loss),
        ),
        (
            "validation loss after".to_owned(),
            figure(outcome.valid_loss),
        ),
    ];
    for metric in T::METRICS.iter().filter(|metric| metric.key != "loss") {
        let (before, after) = (&outcome.first_metrics, &outcome.metrics);
        for (when, all) in [("before", before), ("after", after)] {
            if let Some(value) = all.get(metric.key).and_then(serde_json::Value::as_f64) {
                let name = format!("validation {} {when}", metric.key);
                facts.push((name, metric.text(value)));
            }
        }
    }
    let mut env = Environment::new();
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    let html = env
        .template_from_named_str("report.html", TEMPLATE)
        .and_then(|t| {
            t.render(context! {
                title => dir.file_name().map(|n| n.to_string_lossy().into_owned()),
                facts => Value::from(Serde(&facts)),
                chart => Value::from(Serde(&chart)),
                samples => Value::from(Serde(&outcome.samples)),
                settings => settings,
                version => inputs.lock.enamel.as_str(),
            })
        })
        .map_err(|e| TrainError::Framework(format!("writing the report: {e}")))?;
    write_atomic(&dir.join("report.html"), run, shown(&html).as_bytes())
}

/// The estimate, how far the measured peak was from it, and its parts.
fn estimated(outcome: &RunOutcome) -> String {
    let Some(footprint) = &outcome.estimated_memory else {
        return "–".to_owned();
    };
    let peak = footprint.peak();
    let off = 100.0 * (peak as f64 / outcome.peak_memory.max(1) as f64 - 1.0);
    let parts = footprint
        .parts()
        .map(|(name, bytes)| format!("{name} {}", bytes >> 20));
    format!(
        "{} MiB ({off:+.0} %): {}; {} not at once",
        peak >> 20,
        parts.join(", "),
        footprint.overlap >> 20
    )
}

/// The loss curves in the coordinates of a 720 × 260 drawing.
#[derive(serde::Serialize)]
struct Chart {
    train: String,
    valid: String,
    valid_points: Vec<(f64, f64)>,
    y_ticks: Vec<(f64, String)>,
    x_ticks: Vec<(f64, String)>,
}

const LEFT: f64 = 56.0;
const RIGHT: f64 = 704.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 228.0;

impl Chart {
    fn of(entries: &[Entry]) -> Option<Self> {
        let pick = |train: bool| -> Vec<(f64, f64)> {
            entries
                .iter()
                .filter_map(|e| match e {
                    Entry::Train { step, loss, .. } if train => Some((*step as f64, *loss)),
                    Entry::Valid { step, loss, .. } if !train => Some((*step as f64, *loss)),
                    _ => None,
                })
                .filter(|(_, loss)| loss.is_finite())
                .collect()
        };
        let (train, valid) = (thin(pick(true)), pick(false));
        let all = || train.iter().chain(&valid);
        let last = all().map(|p| p.0).fold(1.0, f64::max);
        let high = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let low = all()
            .map(|p| p.1)
            .fold(f64::INFINITY, f64::min)
            .min(high - 1e-3);
        if !high.is_finite() {
            return None;
        }
        let place = |(step, loss): (f64, f64)| {
            let x = LEFT + step / last * (RIGHT - LEFT);
            let y = BOTTOM - (loss - low) / (high - low) * (BOTTOM - TOP);
            ((x * 10.0).round() / 10.0, (y * 10.0).round() / 10.0)
        };
        let line = |points: &[(f64, f64)]| {
            let placed = points.iter().map(|p| place(*p));
            placed
                .map(|(x, y)| format!("{x},{y}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let fractions = (0..=4).map(|i| f64::from(i) / 4.0);
        let y_ticks = fractions.clone().map(|f| {
            let loss = low + f * (high - low);
            (place((0.0, loss)).1, format!("{loss:.2}"))
        });
        let x_ticks = fractions.map(|f| (place((f * last, low)).0, format!("{:.0}", f * last)));
        Some(Self {
            train: line(&train),
            valid: line(&valid),
            valid_points: valid.iter().map(|p| place(*p)).collect(),
            y_ticks: y_ticks.collect(),
            x_ticks: x_ticks.collect(),
        })
    }
}

/// Means over equal stretches when there are too many points.
fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(MAX_POINTS).max(1);
    let mean = |c: &[(f64, f64)]| {
        let n = c.len() as f64;
        (
            c.iter().map(|p| p.0).sum::<f64>() / n,
            c.iter().map(|p| p.1).sum::<f64>() / n,
        )
    };
    points.chunks(stretch).map(mean).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_spans_the_drawing() {
        let valid = |step, loss| Entry::Valid {
            step,
            epoch: 0.0,
            loss,
            metrics: Default::default(),
            seconds: 0.0,
        };
        let chart = Chart::of(&[valid(0, 3.0), valid(10, 1.0)]).unwrap();
        assert_eq!(chart.valid_points, [(LEFT, TOP), (RIGHT, BOTTOM)]);
        assert!(Chart::of(&[]).is_none());
    }

    #[test]
    fn thinning_keeps_the_mean() {
        let points: Vec<_> = (0..6000).map(|i| (f64::from(i), f64::from(i))).collect();
        let thinned = thin(points);
        assert_eq!(thinned.len(), MAX_POINTS);
        assert_eq!(thinned[0], (4.5, 4.5));
    }
}

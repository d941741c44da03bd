//! `enamel compare`: several runs of one recipe beside each other, and what they came to.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoints::write_atomic;
use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::run::RunOutcome;
use crate::run_dir::LOCK;
use crate::run_notes::thousands;

/// What one run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What the table calls it.
    pub name: String,
    /// Trained parameters.
    pub trainable: usize,
    /// Validation loss before the first step.
    pub first_valid_loss: Option<f64>,
    /// Validation loss of what was kept.
    pub valid_loss: Option<f64>,
    /// Tokens a second, validation left out.
    pub tokens_per_second: f64,
    /// Most resident memory, in bytes.
    pub peak_memory: u64,
    /// Bytes of the adapter's (or the model's) weights.
    pub size: u64,
    /// Optimizer steps.
    pub steps: usize,
    /// The run's directory.
    pub dir: PathBuf,
}

/// The folder of a variant: its name in small letters, digits and hyphens.
pub fn folder(name: &str) -> String {
    let plain = name.to_lowercase().replace('+', "-plus");
    let mapped = plain
        .chars()
        .map(|c: char| if c.is_ascii_alphanumeric() { c } else { '-' });
    let parts: String = mapped.collect();
    let parts: Vec<&str> = parts.split('-').filter(|p| !p.is_empty()).collect();
    parts.join("-")
}

/// The finished run in `dir`, if there is one and it was made by just this recipe.
///
/// # Errors
/// A summary that cannot be read.
pub fn finished(dir: &Path, name: &str, recipe: &Recipe) -> Result<Option<Row>, TrainError> {
    let path = dir.join("summary.json");
    if !path.is_file() {
        return Ok(None);
    }
    // Where a run went does not change what it is.
    let same = |then: Recipe| {
        Recipe {
            output: recipe.output.clone(),
            device: recipe.device.clone(),
            ..then
        } == *recipe
    };
    if !Recipe::load::<&str>(&dir.join(LOCK), &[]).is_ok_and(same) {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).map_err(TrainError::io(&path, "reading"))?;
    let outcome: RunOutcome = serde_json::from_slice(&bytes).map_err(|e| TrainError::Run {
        path,
        reason: format!("not a run's summary: {e}"),
        help: "remove the directory and compare again".into(),
    })?;
    let weights = outcome.adapter.as_ref().or(outcome.model.as_ref());
    Ok(Some(Row {
        name: name.to_owned(),
        trainable: outcome.trainable,
        first_valid_loss: outcome.first_valid_loss,
        valid_loss: outcome.valid_loss,
        tokens_per_second: outcome.tokens_per_second,
        peak_memory: outcome.peak_memory,
        size: weights.map_or(0, |dir| weight_bytes(dir)),
        steps: outcome.step,
        dir: dir.to_owned(),
    }))
}

/// Bytes of the safetensors files in a directory.
fn weight_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter(|e| e.path().extension().is_some_and(|e| e == "safetensors"));
    files
        .filter_map(|e| e.metadata().ok())
        .map(|m| m.len())
        .sum()
}

/// The rows as a Markdown table.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| method | trained parameters | validation loss | tokens/s | peak memory | on disk |\n\
         |---|---:|---:|---:|---:|---:|\n",
    );
    if let Some(loss) = rows.iter().find_map(|row| row.first_valid_loss) {
        let _ = writeln!(out, "| (base) | 0 | {loss:.4} | | | |");
    }
    for row in rows {
        let loss = row
            .valid_loss
            .map_or_else(|| "–".to_owned(), |loss| format!("{loss:.4}"));
        let _ = writeln!(
            out,
            "| {} | {} | {loss} | {:.0} | {:.2} GiB | {:.2} MB |",
            row.name,
            thousands(row.trainable as u64),
            row.tokens_per_second,
            row.peak_memory as f64 / f64::from(1 << 30),
            row.size as f64 / 1e6,
        );
    }
    out
}

/// Writes `compare.md` and `compare.json` into `dir`.
///
/// # Errors
/// When the disk refuses.
pub fn write(dir: &Path, rows: &[Row]) -> Result<(), TrainError> {
    let json = serde_json::to_vec_pretty(rows)
        .map_err(|e| TrainError::Framework(format!("writing the comparison: {e}")))?;
    write_atomic(&dir.join("compare.json"), &json)?;
    write_atomic(&dir.join("compare.md"), table(rows).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_plain() {
        for (name, wanted) in [
            ("LoRA", "lora"),
            ("LoRA+", "lora-plus"),
            ("(IA)³", "ia"),
            ("LoHa r = 8", "loha-r-8"),
        ] {
            assert_eq!(folder(name), wanted);
        }
    }
}

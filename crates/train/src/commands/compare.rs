//! `enamel compare`: several runs of one recipe beside each other, and what they came to.

use std::fmt::Write;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use enamel_adapter::as_markdown_text;
use enamel_adapter::staging::StagedFile;
use serde::Serialize;

use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::run_dir::LOCK;
use crate::run_dir::fingerprint::same_settings;
use crate::run_dir::results::RunOutcome;
use crate::text::thousands;

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
    let then = Recipe::load::<&str>(&dir.join(LOCK), &[]);
    if !then.is_ok_and(|then| same_settings(&then, recipe)) {
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

const HEAD: &str =
    "| method | trained parameters | validation loss | tokens/s | peak memory | on disk |\n";

/// The rows as a Markdown table.
pub fn table(rows: &[Row]) -> String {
    let mut out = format!("{HEAD}|---|---:|---:|---:|---:|---:|\n");
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
            as_markdown_text(&row.name),
            thousands(row.trainable as u64),
            row.tokens_per_second,
            row.peak_memory as f64 / f64::from(1 << 30),
            row.size as f64 / 1e6,
        );
    }
    out
}

const JSON: &str = "compare.json";
const TABLE: &str = "compare.md";

/// Refuses a place where something else than a former comparison has the names of its two files. Called before
/// the work.
///
/// # Errors
/// That.
pub fn check_place(dir: &Path) -> Result<(), TrainError> {
    #[derive(serde::Deserialize)]
    #[allow(dead_code, reason = "what has to be there")]
    struct Former {
        name: String,
        trainable: usize,
        dir: PathBuf,
    }
    let is_there = |name| std::fs::symlink_metadata(dir.join(name)).is_ok();
    let former = std::fs::read(dir.join(JSON))
        .is_ok_and(|bytes| serde_json::from_slice::<Vec<Former>>(&bytes).is_ok());
    let table =
        std::fs::read_to_string(dir.join(TABLE)).is_ok_and(|text| former && text.starts_with(HEAD));
    let foreign = [(JSON, former), (TABLE, table)];
    let foreign = foreign.iter().find(|(name, ours)| is_there(name) && !ours);
    match foreign {
        None => Ok(()),
        Some((name, _)) => Err(TrainError::Run {
            path: dir.join(name),
            reason: "no comparison wrote this file, which a comparison would write".into(),
            help: "choose another directory (--output DIR), or move the file away".into(),
        }),
    }
}

/// Writes `compare.md` and `compare.json` into `dir`, which [`check_place`] has looked at.
///
/// # Errors
/// When the disk refuses.
pub fn write(dir: &Path, rows: &[Row]) -> Result<(), TrainError> {
    let json = serde_json::to_vec_pretty(rows)
        .map_err(|e| TrainError::Framework(format!("writing the comparison: {e}")))?;
    std::fs::create_dir_all(dir).map_err(TrainError::io(dir, "creating the folder"))?;
    for (name, bytes) in [(JSON, json), (TABLE, table(rows).into_bytes())] {
        let path = dir.join(name);
        StagedFile::beside(&path)
            .and_then(|mut file| {
                file.write_all(&bytes)?;
                file.finish(&path, true)
            })
            .map_err(TrainError::io(&path, "writing"))?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_comparisons_own_files_are_written_over() {
        let dir = tempfile::tempdir().unwrap();
        check_place(dir.path()).unwrap();
        let row = Row {
            name: "a".into(),
            trainable: 1,
            first_valid_loss: None,
            valid_loss: None,
            tokens_per_second: 1.0,
            peak_memory: 1,
            size: 1,
            steps: 1,
            dir: "a".into(),
        };
        write(dir.path(), &[row]).unwrap();
        check_place(dir.path()).unwrap();
        for (name, text) in [(JSON, "[{\"name\": \"mine\"}]"), (TABLE, "# Mine\n")] {
            let path = dir.path().join(name);
            let kept = std::fs::read(&path).unwrap();
            std::fs::write(&path, text).unwrap();
            let error = check_place(dir.path()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            std::fs::write(&path, kept).unwrap();
        }
        std::fs::remove_file(dir.path().join(JSON)).unwrap();
        check_place(dir.path()).unwrap_err();
    }

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

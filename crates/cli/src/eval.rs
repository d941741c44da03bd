//! `enamel eval`: a task's metrics on a recipe's validation rows.

use std::io::Write;
use std::path::PathBuf;

use enamel_train::commands::eval;
use enamel_train::shown;
use enamel_train::task::ClassScores;

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;
use crate::recipe_args::RecipeArgs;

/// Arguments of `enamel eval`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Adapter directory in PEFT's format; without it, the base alone
    #[arg(long, value_name = "DIR", value_parser = path())]
    adapter: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let recipe = self.recipe.load()?;
        let report = eval::evaluate(&recipe, self.adapter.as_deref(), &mut Bars::default())?;
        let mut out = terminal::out();
        if self.json {
            writeln!(out, "{}", serde_json::to_string(&report)?)?;
            return Ok(Outcome::Done);
        }
        let mut counted = String::new();
        for (name, value) in &report.metrics {
            match (value.as_u64(), value.as_f64()) {
                (Some(count), _) => counted = format!(", {count} {}", name.replace('_', " ")),
                (None, Some(value)) if name == "loss" => writeln!(out, "{name:<12}{value:.6}")?,
                (None, Some(value)) => writeln!(out, "{name:<12}{value:.4}")?,
                // What JSON has no number for.
                (None, None) => writeln!(out, "{name:<12}not finite")?,
            }
        }
        writeln!(
            out,
            "on          {} rows{counted}, {:.1} s on {} in {}",
            report.rows, report.seconds, report.device, report.compute_dtype
        )?;
        if !report.classes.is_empty() {
            writeln!(out, "\n{}", class_table(&report.classes))?;
        }
        for note in &report.notes {
            writeln!(out, "note        {note}")?;
        }
        for note in &report.adapter_notes {
            writeln!(out, "note        {note}")?;
        }
        Ok(Outcome::Done)
    }
}

/// Precision, recall and F1 of each class, and what rows of each were taken for.
fn class_table(classes: &[ClassScores]) -> String {
    /// Columns of a table that a terminal still shows.
    const MOST: usize = 12;
    let names: Vec<String> = classes.iter().map(|class| shown(&class.label).into_owned()).collect();
    let width = names.iter().map(|name| name.chars().count()).max();
    let width = width.unwrap_or(0).max("class".len());
    let columns = if classes.len() > MOST { &[] } else { &names[..] };
    let mut table = format!("{:<width$}  rows    precision  recall  f1    ", "class");
    for name in columns {
        table.push_str(&format!("  as {name}"));
    }
    for (class, name) in classes.iter().zip(&names) {
        table.push_str(&format!(
            "\n{name:<width$}  {:<6}  {:<9.4}  {:.4}  {:.4}",
            class.rows, class.precision, class.recall, class.f1
        ));
        for (column, count) in columns.iter().zip(&class.predicted) {
            let width = "as ".len() + column.chars().count();
            table.push_str(&format!("  {count:>width$}"));
        }
    }
    table
}

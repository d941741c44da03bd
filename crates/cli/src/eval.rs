//! `enamel eval`: loss and perplexity on a recipe's validation rows.

use std::io::Write;
use std::path::PathBuf;

use enamel_train::commands::eval;

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
        writeln!(out, "loss        {:.6}", report.loss)?;
        writeln!(out, "perplexity  {:.4}", report.perplexity)?;
        writeln!(
            out,
            "on          {} rows, {} trained tokens, {:.1} s on {} in {}",
            report.rows,
            report.trained_tokens,
            report.seconds,
            report.device,
            report.compute_dtype
        )?;
        for note in &report.notes {
            writeln!(out, "note        {note}")?;
        }
        for note in &report.adapter_notes {
            writeln!(out, "note        {note}")?;
        }
        Ok(Outcome::Done)
    }
}

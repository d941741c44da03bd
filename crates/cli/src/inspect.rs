//! `enamel inspect`: rows as the model will see them.

use std::io::Write;

use enamel_train::commands::inspect::{Inspection, inspect};
use enamel_train::base::OpenBase;
use enamel_train::shown;
use owo_colors::OwoColorize;

use crate::{Outcome, terminal};
use crate::pull_progress::Bars;
use crate::recipe_args::RecipeArgs;

/// Arguments of `enamel inspect`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Rows to show
    #[arg(short = 'n', long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// Start at this row, counted from 0
    #[arg(long, value_name = "K", default_value_t = 0)]
    from: usize,
    /// Show validation rows instead of training rows
    #[arg(long)]
    valid: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let recipe = self.recipe.load()?;
        let template = recipe.model.chat_template_text()?;
        let base = OpenBase::open(
            &recipe.model.base,
            template.as_deref(),
            &mut Bars::default(),
        )?;
        let seen = inspect(&recipe, &base, self.valid, self.from, self.rows)?;
        let mut out = terminal::coloured_out();
        let colour = terminal::colour_out();
        show(&mut out, &seen, colour)?;
        Ok(Outcome::Done)
    }
}

fn show(out: &mut impl Write, seen: &Inspection, colour: bool) -> std::io::Result<()> {
    match colour {
        true => writeln!(
            out,
            "{} tokens count in the loss, the rest is context",
            "trained".green()
        )?,
        false => writeln!(
            out,
            "⟦trained⟧ tokens count in the loss, the rest is context"
        )?,
    }
    for row in &seen.rows {
        writeln!(
            out,
            "\n── {}: {} tokens, {} trained",
            shown(&row.source.to_string()),
            row.tokens,
            row.trained_tokens
        )?;
        for (text, trained) in &row.spans {
            let text = shown(text);
            match (trained, colour) {
                (true, true) => write!(out, "{}", text.green())?,
                (true, false) => write!(out, "⟦{text}⟧")?,
                (false, true) => write!(out, "{}", text.dimmed())?,
                (false, false) => write!(out, "{text}")?,
            }
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "\n{} usable rows, {} tokens, {} of them trained; longest row {} tokens",
        seen.usable, seen.tokens, seen.trained_tokens, seen.longest
    )?;
    if seen.truncated + seen.dropped > 0 {
        writeln!(
            out,
            "{} rows shortened, {} dropped as too long",
            seen.truncated, seen.dropped
        )?;
    }
    for bad in &seen.skipped {
        writeln!(out, "skipped: {}", shown(&bad.to_string()))?;
    }
    for note in &seen.notes {
        writeln!(out, "note: {}", shown(&note.to_string()))?;
    }
    Ok(())
}

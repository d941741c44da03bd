//! `enamel plan`: what a recipe, or an adapter on a model, would come to.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use enamel_train::memory;
use enamel_train::memory::Proposal;
use enamel_train::commands::plan;
use enamel_train::recipe::Recipe;

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;
use crate::recipe_args::{Changes, RecipeArgs};

/// Arguments of `enamel plan`.
#[derive(clap::Args)]
pub struct Args {
    /// The recipe, or the recipe.lock.toml of an earlier run
    #[arg(
        value_name = "RECIPE",
        required_unless_present = "model",
        conflicts_with = "model",
        value_parser = path()
    )]
    recipe: Option<PathBuf>,
    /// Count for this model alone, with --set adapter.… as the adapter; a directory with nothing but
    /// config.json will do
    #[arg(long, value_name = "REF")]
    model: Option<String>,
    /// Propose settings under which training takes at most so much memory
    #[arg(long, value_name = "SIZE", value_parser = memory::parse_bytes)]
    fit: Option<usize>,
    #[command(flatten)]
    changes: Changes,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut progress = Bars::default();
        let report = match (self.recipe, self.model) {
            (Some(recipe), _) => {
                let recipe = RecipeArgs {
                    recipe,
                    changes: self.changes,
                }
                .load()?;
                plan::plan(&recipe, &mut progress)?
            }
            (None, model) => {
                let model = model.unwrap_or_default();
                let recipe = Recipe::for_model(&model, &self.changes.overrides())?;
                plan::plan_model(&recipe, &mut progress)?
            }
        };
        let mut out = terminal::out();
        writeln!(out, "{report}")?;
        if let Some(bytes) = self.fit {
            let memory = report.memory.as_ref();
            let memory = memory.context("the memory of this architecture cannot be estimated")?;
            proposal(&mut out, &memory.fit(bytes))?;
        }
        Ok(Outcome::Done)
    }
}

/// The lines to change, and what the run takes then.
fn proposal(out: &mut impl Write, proposal: &Proposal) -> std::io::Result<()> {
    let room = enamel_train::bytes_text(proposal.room);
    let changes = !proposal.changes.is_empty();
    match (changes, proposal.fits()) {
        (false, true) => return writeln!(out, "\nfits {room} as it is"),
        (false, false) => {
            return writeln!(out, "\ndoes not fit {room}, and no setting takes less: choose a smaller model");
        }
        (true, true) => writeln!(out, "\nto fit {room}, change in the recipe:\n")?,
        (true, false) => writeln!(
            out,
            "\ndoes not fit {room}; the least that settings come to is this:\n"
        )?,
    }
    writeln!(out, "{proposal}\n\n{}", proposal.footprint)
}

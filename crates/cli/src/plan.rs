//! `enamel plan`: what a recipe, or an adapter on a model, would come to.

use std::io::Write;
use std::path::PathBuf;

use enamel_train::plan;
use enamel_train::recipe::Recipe;

use crate::Outcome;
use crate::pull_progress::Bars;
use crate::recipe_args::{Changes, RecipeArgs};

/// Arguments of `enamel plan`.
#[derive(clap::Args)]
pub struct Args {
    /// The recipe, or the recipe.lock.toml of an earlier run
    #[arg(
        value_name = "RECIPE",
        required_unless_present = "model",
        conflicts_with = "model"
    )]
    recipe: Option<PathBuf>,
    /// Count for this model alone, with --set adapter.… as the adapter; a directory with nothing but
    /// config.json will do
    #[arg(long, value_name = "REF")]
    model: Option<String>,
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
        writeln!(std::io::stdout().lock(), "{report}")?;
        Ok(Outcome::Done)
    }
}

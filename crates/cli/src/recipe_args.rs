//! The arguments that every verb with a recipe shares.

use std::path::PathBuf;

use enamel_train::recipe::{LockInfo, Recipe, RecipeFile};

use crate::paths::path;

/// A recipe and what the command line changes in it.
#[derive(clap::Args)]
pub struct RecipeArgs {
    /// The recipe, or the recipe.lock.toml of an earlier run
    #[arg(value_name = "RECIPE", value_parser = path())]
    pub recipe: PathBuf,
    #[command(flatten)]
    pub changes: Changes,
}

/// What the command line changes in a recipe.
#[derive(clap::Args)]
pub struct Changes {
    /// Change a setting, as in --set train.learning_rate=1e-4 (repeatable)
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Compute here instead: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Multiply with the base in f32 or bf16 instead, as --set model.compute_dtype=bf16
    #[arg(long, value_name = "DTYPE")]
    pub compute_dtype: Option<String>,
}

impl Changes {
    /// What changes, as after --set; the device aside.
    pub fn overrides(&self) -> Vec<String> {
        let dtype = self.compute_dtype.iter();
        let dtype = dtype.map(|dtype| format!("model.compute_dtype={dtype}"));
        self.set.iter().cloned().chain(dtype).collect()
    }
}

impl RecipeArgs {
    /// The recipe with the changes in it.
    pub fn load(&self) -> anyhow::Result<Recipe> {
        Ok(self.load_with_lock()?.0)
    }

    /// The same, with what a lock file says of the run that wrote it.
    pub fn load_with_lock(&self) -> anyhow::Result<(Recipe, Option<LockInfo>)> {
        let file = RecipeFile::read(&self.recipe)?.with_overrides(&self.changes.overrides());
        let mut recipe = file.resolve()?;
        if let Some(device) = &self.changes.device {
            recipe.device.clone_from(device);
        }
        Ok((recipe, file.lock_info()?))
    }
}

//! `enamel compare`: the runs of a recipe's `[[compare]]` tables, one after the other, and their table.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, anyhow, bail};
use enamel_train::commands::compare::{Row, check_place, finished, folder, table, write};
use enamel_train::recipe::RecipeFile;

use crate::paths::path;
use crate::{Outcome, terminal};

/// Arguments of `enamel compare`.
#[derive(clap::Args)]
pub struct Args {
    /// A recipe with [[compare]] tables, each with a name and a list `set` of overrides
    #[arg(value_name = "RECIPE", value_parser = path())]
    recipe: PathBuf,
    /// Train only the variants of these names; the table has all that are done
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Where the runs go [default: the recipe's output directory]
    #[arg(long, value_name = "DIR", value_parser = path())]
    output: Option<PathBuf>,
    /// Replace runs that are there and were made with other settings
    #[arg(long)]
    overwrite: bool,
    /// Overrides for all of them, as section.name=value
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let file = RecipeFile::read(&self.recipe)?.with_overrides(&self.set);
        let variants = file.variants()?;
        if variants.is_empty() {
            bail!(
                "{} has no [[compare]] tables; each needs a name and set = [\"adapter.method=...\"]",
                self.recipe.display()
            );
        }
        let names: Vec<&str> = variants.iter().map(|(v, _)| v.name.as_str()).collect();
        if let Some(stranger) = self.only.iter().find(|n| !names.contains(&n.as_str())) {
            bail!(
                "there is no variant {stranger:?}; there are {}",
                names.join(", ")
            );
        }
        let mut out = terminal::out();
        let root = match &self.output {
            Some(dir) => dir.clone(),
            None => file.resolve()?.output_dir(),
        };
        check_place(&root)?;
        let mut rows = Vec::new();
        for (variant, recipe) in &variants {
            let dir = root.join(folder(&variant.name));
            // A comparison that was interrupted goes on where it was.
            if let Some(row) = finished(&dir, &variant.name, recipe)? {
                writeln!(out, "== {}: done before", variant.name)?;
                rows.push(row);
                continue;
            }
            if !self.only.is_empty() && !self.only.contains(&variant.name) {
                continue;
            }
            writeln!(out, "== {}", variant.name)?;
            out.flush()?;
            let set = self.set.iter().chain(&variant.set);
            self.train(&dir, set, &variant.name)?;
            let row = finished(&dir, &variant.name, recipe)?;
            rows.push(row.ok_or_else(|| anyhow!("{} left no summary", dir.display()))?);
        }
        write(&root, &rows)?;
        summary(&mut out, &rows, &root)?;
        Ok(Outcome::Done)
    }

    /// Each run has a process of its own: one's memory would count as the other's.
    fn train<'a>(
        &self,
        dir: &Path,
        set: impl Iterator<Item = &'a String>,
        name: &str,
    ) -> anyhow::Result<()> {
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = Command::new(own);
        command.arg("train").arg(&self.recipe).arg("--no-tui");
        command.arg("--output").arg(dir);
        command.arg(match self.overwrite {
            true => "--overwrite",
            false => "--resume",
        });
        for set in set {
            command.arg("--set").arg(set);
        }
        let status = command.status().context("starting the run")?;
        if status.success() {
            return Ok(());
        }
        bail!(
            "{name} did not finish ({status}); what it printed says why. Call the same command again to go on, or \
             with --overwrite where another run is in its place"
        )
    }
}

fn summary(out: &mut impl Write, rows: &[Row], root: &Path) -> std::io::Result<()> {
    writeln!(out, "\n{}", table(rows))?;
    writeln!(out, "the same in {}", root.join("compare.md").display())
}

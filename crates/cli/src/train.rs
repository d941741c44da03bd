//! `enamel train`: from a recipe to an adapter.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use enamel_train::recipe::{Recipe, TaskName};
use enamel_train::signals::{Listener, StopFlag};
use enamel_train::{Resume, RunOutcome, TrainOptions, quoted, thousands};
use serde_json::Value;

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;
use crate::recipe_args::RecipeArgs;

/// Arguments of `enamel train`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Run directory, instead of the recipe's output.dir
    #[arg(long, value_name = "DIR", value_parser = path())]
    output: Option<PathBuf>,
    /// Replace a run that is already there
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Go on from the newest checkpoint of the run directory, or from the checkpoint DIR
    #[arg(long, value_name = "DIR", num_args = 0..=1, value_parser = path())]
    resume: Option<Option<PathBuf>>,
    /// With --resume: go on although the run began on another device, CPU path or version, and end at other bits
    #[arg(long, requires = "resume")]
    other_bits: bool,
    /// Print lines instead of drawing the dashboard
    #[arg(long)]
    no_tui: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let (mut recipe, locked) = self.recipe.load_with_lock()?;
        if let Some(dir) = self.output {
            recipe.output.dir = Some(dir);
        }
        recipe.output.overwrite |= self.overwrite;
        let dashboard =
            !self.no_tui && terminal::out_is_terminal() && std::io::stdin().is_terminal();
        let stop = StopFlag::default();
        let _listener = Listener::start(stop.clone()).context("cannot listen for signals")?;
        let options = TrainOptions {
            resume: match self.resume {
                None => Resume::No,
                Some(None) => Resume::Latest,
                Some(Some(dir)) => Resume::From(dir),
            },
            other_bits: self.other_bits,
            dashboard,
            say: Arc::new(say),
            stop,
            progress: &mut Bars::default(),
            locked,
        };
        let outcome = enamel_train::train(&recipe, options)?;
        summary(&outcome, &recipe)?;
        match outcome.interrupted {
            Some(signal) => Ok(Outcome::Interrupted(signal)),
            None => Ok(Outcome::Done),
        }
    }
}

fn say(line: &str) {
    // Nobody left to read is no reason to stop training.
    let _ = writeln!(terminal::out(), "{line}");
}

fn summary(run: &RunOutcome, recipe: &Recipe) -> std::io::Result<()> {
    let mut out = terminal::out();
    let Some(result) = run.adapter.as_ref().or(run.model.as_ref()) else {
        writeln!(
            out,
            "\nstopped after step {} of {}",
            run.step, run.total_steps
        )?;
        match &run.checkpoint {
            Some(path) => writeln!(out, "checkpoint  {}\ngo on with  --resume", path.display())?,
            None => writeln!(out, "nothing was saved yet")?,
        }
        return Ok(());
    };
    for sample in &run.samples {
        writeln!(out, "\nquestion  {}", sample.prompt)?;
        writeln!(out, "before    {}", indented(&sample.before))?;
        writeln!(out, "after     {}", indented(&sample.after))?;
    }
    writeln!(out)?;
    let early = if run.stopped_early {
        " (stopped early)"
    } else {
        ""
    };
    writeln!(out, "steps     {} of {}{early}", run.step, run.total_steps)?;
    if let (Some(before), Some(after)) = (run.first_valid_loss, run.valid_loss) {
        writeln!(out, "valid     loss {before:.4} before, {after:.4} after")?;
    }
    for (name, after) in &run.metrics {
        let before = run.first_metrics.get(name).and_then(Value::as_f64);
        if let (Some(before), Some(after)) = (before, after.as_f64()) {
            writeln!(out, "valid     {name} {before:.4} before, {after:.4} after")?;
        }
    }
    if let Some(best) = &run.best {
        writeln!(out, "best      loss {:.4} at step {}", best.loss, best.step)?;
    }
    writeln!(
        out,
        "speed     {:.0} tokens/s; {} tokens in {:.0} s; peak memory {:.2} GiB",
        run.tokens_per_second,
        thousands(run.tokens),
        run.seconds,
        run.peak_memory as f64 / f64::from(1 << 30)
    )?;
    let (kind, option) = match run.adapter {
        Some(_) => ("adapter", "--adapter"),
        None => ("model  ", "--model"),
    };
    writeln!(out, "{kind}   {}", result.display())?;
    writeln!(out, "report    {}", run.dir.join("report.html").display())?;
    let result = quoted(&result.display().to_string());
    if recipe.task == TaskName::SeqCls {
        writeln!(out, "try it    enamel predict {option} {result} --text TEXT")?;
        return Ok(());
    }
    write!(out, "try it    enamel chat {option} {result}")?;
    let arguments = &recipe.data.chat_template_kwargs;
    match arguments.0.is_empty() {
        true => writeln!(out),
        false => writeln!(out, " --chat-template-kwargs {}", quoted(&arguments.to_string())),
    }
}

/// Later lines under the first one.
fn indented(text: &str) -> String {
    text.trim().lines().collect::<Vec<_>>().join("\n          ")
}

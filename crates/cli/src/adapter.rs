//! `enamel adapter`: what lies in adapter directories, and adapters made of adapters.

use std::io::Write;
use std::path::PathBuf;

use enamel_adapter::combine::{CombinationType, CombineOptions, MajoritySign, RankChoice};
use enamel_train::commands::adapters;
use enamel_train::commands::adapters::{CombineRequest, ConvertRequest};
use serde_json::json;

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::adapter_text as text;
use crate::pull_progress::Bars;

/// Arguments of `enamel adapter`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// List the adapters in directories: named ones, those of runs and of their checkpoints
    List(List),
    /// Show all that an adapter's files say, without its base
    Inspect(Inspect),
    /// Make one LoRA of several (PEFT's add_weighted_adapter)
    Combine(Combine),
    /// Compare two adapters: settings, tensors, and what they add
    Diff(Diff),
    /// Make a LoRA of an adapter of another method
    Convert(Convert),
}

#[derive(clap::Args)]
struct List {
    /// Directories to look in
    #[arg(value_name = "DIR", required = true, value_parser = path())]
    dirs: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Inspect {
    /// Adapter directory
    #[arg(value_name = "DIR", value_parser = path())]
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Combine {
    /// LoRA directory; give it once for each adapter
    #[arg(long, value_name = "DIR", required = true, value_parser = path())]
    adapter: Vec<PathBuf>,
    /// A weight for each adapter
    #[arg(
        long,
        value_name = "W,…",
        value_delimiter = ',',
        allow_hyphen_values = true,
        required = true
    )]
    weights: Vec<f64>,
    /// cat (exact, ranks add up), svd (exact up to its rank), linear, ties, dare_linear, dare_ties,
    /// magnitude_prune, and these four with _svd
    #[arg(long = "type", value_name = "TYPE", default_value = "cat")]
    kind: String,
    /// Part of the entries that pruning keeps
    #[arg(long, value_name = "0…1")]
    density: Option<f64>,
    /// What decides an entry's sign: total (the sum) or frequency (the count)
    #[arg(long, value_name = "RULE", default_value = "total")]
    majority_sign: String,
    /// Rank of an SVD's result; without it, the largest of the adapters'
    #[arg(long, value_name = "N")]
    svd_rank: Option<usize>,
    /// Quantile at which the values of an SVD's factors are cut off
    #[arg(long, value_name = "0…1")]
    svd_clamp: Option<f64>,
    /// Seed of random pruning (dare)
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Directory to write
    #[arg(long, value_name = "DIR", value_parser = path())]
    output: PathBuf,
}

#[derive(clap::Args)]
struct Diff {
    /// Adapter directory
    #[arg(value_name = "A", value_parser = path())]
    first: PathBuf,
    /// Adapter directory
    #[arg(value_name = "B", value_parser = path())]
    second: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Convert {
    /// Adapter directory
    #[arg(value_name = "DIR", value_parser = path())]
    dir: PathBuf,
    /// What to make of it
    #[arg(long, value_name = "METHOD", default_value = "lora")]
    to: Target,
    /// Rank of every module
    #[arg(long, value_name = "N", conflicts_with = "max_error")]
    r: Option<usize>,
    /// Largest relative error of a module, from which its rank follows; 0.05 without --r
    #[arg(long, value_name = "E")]
    max_error: Option<f64>,
    /// Base model, which DoRA and (IA)³ need, and VeRA on modules of several widths
    #[arg(long, value_name = "REF")]
    model: Option<String>,
    /// Directory to write
    #[arg(long, value_name = "DIR", value_parser = path())]
    output: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Target {
    Lora,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut out = terminal::out();
        match self.verb {
            Verb::List(args) => {
                let found = adapters::list(&args.dirs)?;
                match args.json {
                    true => writeln!(out, "{:#}", json!(found))?,
                    false => text::list(&mut out, &found)?,
                }
            }
            Verb::Inspect(args) => {
                let report = adapters::inspect(&args.dir)?;
                match args.json {
                    true => writeln!(out, "{:#}", json!(report))?,
                    false => text::inspect(&mut out, &report)?,
                }
            }
            Verb::Diff(args) => {
                let report = adapters::diff(&args.first, &args.second)?;
                match args.json {
                    true => writeln!(out, "{:#}", json!(report))?,
                    false => text::diff(&mut out, &report)?,
                }
            }
            Verb::Combine(args) => text::combined(&mut out, &adapters::combine(&args.request()?)?)?,
            Verb::Convert(args) => {
                let Target::Lora = args.to;
                let choice = match (args.r, args.max_error) {
                    (Some(rank), _) => RankChoice::Fixed(rank),
                    (None, error) => RankChoice::MaxError(error.unwrap_or(0.05)),
                };
                let request = ConvertRequest {
                    adapter: args.dir,
                    model: args.model,
                    choice,
                    output: args.output,
                };
                text::converted(
                    &mut out,
                    &adapters::convert(&request, &mut Bars::default())?,
                )?;
            }
        }
        Ok(Outcome::Done)
    }
}

impl Combine {
    fn request(self) -> anyhow::Result<CombineRequest> {
        let kind: CombinationType = self.kind.parse().map_err(anyhow::Error::msg)?;
        let majority_sign: MajoritySign = self.majority_sign.parse().map_err(anyhow::Error::msg)?;
        Ok(CombineRequest {
            adapters: self.adapter,
            options: CombineOptions {
                density: self.density,
                majority_sign,
                svd_rank: self.svd_rank,
                svd_clamp: self.svd_clamp,
                ..CombineOptions::new(kind, self.weights)
            },
            seed: self.seed,
            output: self.output,
        })
    }
}

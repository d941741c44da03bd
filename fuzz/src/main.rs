//! Structure-aware fuzzing of everything that reads foreign bytes:
//!
//! ```text
//! cargo run --release -p enamel-fuzz -- safetensors --seed 1 --count 100000
//! cargo run --release -p enamel-fuzz -- all --seconds 10 --jobs 2
//! cargo run --release -p enamel-fuzz -- gguf --seed 1 --only 4711
//! cargo run --release -p enamel-fuzz -- gguf --replay fuzz-failures/gguf-1-4711
//! ```
//!
//! Each reader changes valid inputs at the level of their format and of their bytes, and hands them to what
//! the program reads them with. Counted are panics that reach the caller, deaths of the process, inputs that
//! take more than five seconds of the processor, and inputs that take more memory than twice their size and
//! 500 MB. An input follows from its reader, seed and number.

mod allocator;
mod folder;
mod formats;
mod mutate;
mod random;
mod readers;
mod state;
mod supervisor;
mod table;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use folder::{Folder, Input};
use random::Random;
use supervisor::Task;

#[global_allocator]
static ALLOCATOR: allocator::Counting = allocator::Counting;

#[derive(Parser)]
#[command(name = "enamel-fuzz", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    inner: Option<Inner>,
    #[command(flatten)]
    args: Args,
}

#[derive(Subcommand)]
enum Inner {
    /// What the program starts itself as
    #[command(hide = true)]
    Worker(worker::Work),
}

#[derive(clap::Args)]
struct Args {
    /// A reader's name, or all
    #[arg(default_value = "all")]
    reader: String,
    /// What the inputs follow from, with their numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The first input's number; where the table ends, if there is one, else 0
    #[arg(long)]
    from: Option<u64>,
    /// How many inputs
    #[arg(long)]
    count: Option<u64>,
    /// How long for each reader; 10 if no count is given
    #[arg(long)]
    seconds: Option<f64>,
    /// Processes at once
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Adds to a Markdown table
    #[arg(long)]
    table: Option<PathBuf>,
    /// What the table says was fuzzed
    #[arg(long, default_value = "")]
    commit: String,
    /// Where inputs that failed are kept
    #[arg(long, default_value = "fuzz-failures")]
    failures: PathBuf,
    /// Reads one input by its number, in this process
    #[arg(long, conflicts_with = "replay")]
    only: Option<u64>,
    /// Reads a kept input, in this process
    #[arg(long)]
    replay: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.inner {
        Some(Inner::Worker(work)) => match in_the_pool(|| worker::run(&work)) {
            Ok(false) => return ExitCode::from(worker::HANDS_OVER),
            other => other,
        },
        None => run(&cli.args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `f` on the one thread of rayon's pool, with the stack that the program gives its verbs.
fn in_the_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    const STACK: usize = 16 << 20;
    let pool = rayon::ThreadPoolBuilder::new();
    // Fails only where the pool is there already, which is as well.
    let _ = pool.num_threads(1).stack_size(STACK).build_global();
    rayon::scope(|_| f())
}

/// Whether nothing failed.
fn run(args: &Args) -> Result<bool> {
    let names: Vec<&str> = match args.reader.as_str() {
        "all" => readers::READERS.iter().map(|(name, _)| *name).collect(),
        name => vec![name],
    };
    if let Some(number) = args.only {
        return in_the_pool(|| {
            for name in &names {
                let dir = tempfile::tempdir()?;
                let reader = readers::find(name)?(&mut Folder::new(dir.path()))?;
                let input = reader.input(&mut Random::of_input(args.seed, number));
                let kept = args.failures.join(format!("{name}-{}-{number}", args.seed));
                input.keep(&kept)?;
                println!("{name}: input {number} is in {}", kept.display());
                supervisor::replay(name, &input)?;
            }
            Ok(true)
        });
    }
    if let Some(dir) = &args.replay {
        let [name] = names.as_slice() else {
            bail!("--replay needs the reader's name");
        };
        let input = Input::kept(dir)?;
        return in_the_pool(|| supervisor::replay(name, &input).map(|()| true));
    }
    let mut clean = true;
    for name in names {
        readers::find(name)?;
        let from = match (args.from, &args.table) {
            (Some(from), _) => from,
            (None, Some(table)) => table::reached(table, name, args.seed)?,
            (None, None) => 0,
        };
        let task = Task {
            reader: name.to_owned(),
            seed: args.seed,
            from,
            count: args.count.unwrap_or(u64::MAX),
            seconds: args.seconds.unwrap_or(match args.count {
                None => 10.0,
                Some(_) => f64::MAX,
            }),
            jobs: args.jobs,
            failures: args.failures.clone(),
        };
        let outcome = supervisor::run(&task)?;
        println!(
            "{name}: {} inputs from number {from} of seed {}, {} accepted, {} refused, {} panics, {} aborts, {} hangs, {} \
             over memory; at most {:.1} MB beyond twice the input, {:.2} s the slowest, {:.0} inputs/s of one core",
            outcome.inputs,
            args.seed,
            outcome.accepted,
            outcome.refused(),
            outcome.panics,
            outcome.aborts,
            outcome.hangs,
            outcome.memory,
            outcome.peak as f64 / 1e6,
            outcome.slowest,
            outcome.inputs as f64 / outcome.seconds.max(0.01)
        );
        if let Some(path) = &args.table {
            table::add(path, name, &args.commit, args.seed, &outcome)?;
        }
        clean &= outcome.failures() == 0;
    }
    Ok(clean)
}

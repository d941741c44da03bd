//! The `enamel` binary: one file a subcommand, each of which reads its arguments, calls a library
//! and prints what came back.
#![allow(missing_docs, reason = "a binary has no readers of its API")]
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are what --help prints, brackets and all"
)]
mod adapter_text;
mod allocator;
mod bench_text;
mod failure;
mod paths;
mod pull_progress;
mod quantization_args;
mod recipe_args;
mod sampling_args;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use enamel_train::signals::{Listener, Phase, StopFlag};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

/// Fires a thin, trainable layer onto a finished, frozen model.
#[derive(Parser)]
#[command(
    name = "enamel",
    version,
    propagate_version = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// How a verb ended when nothing went wrong.
enum Outcome {
    Done,
    /// A signal asked to stop; its number.
    Interrupted(i32),
}

macro_rules! verbs {
    ($( $(#[doc = $doc:literal])+ $module:ident => $variant:ident; )*) => {
        $( mod $module; )*

        #[derive(Subcommand)]
        enum Verb { $( $(#[doc = $doc])+ $variant($module::Args), )* }

        impl Verb {
            /// Whether a CPU path that is not there would make it useless.
            fn computes(&self) -> bool {
                !matches!(self, Self::Pull(_) | Self::Devices(_) | Self::Inspect(_))
            }

            fn run(self) -> anyhow::Result<Outcome> {
                match self { $( Self::$variant(args) => args.run(), )* }
            }
        }
    };
}

verbs! {
    /// Fine-tune a model as a recipe says
    train => Train;
    /// Check a recipe and count what it trains, without training
    plan => Plan;
    /// Show rows as the model will see them, and which tokens are trained
    inspect => Inspect;
    /// Fetch a base model into the cache
    pull => Pull;
    /// List what can compute, and how much memory it has
    devices => Devices;
    /// Answer a prompt
    generate => Generate;
    /// Hold a conversation
    chat => Chat;
    /// Measure loss, perplexity or accuracy on a recipe's validation rows
    eval => Eval;
    /// Tell the classes of texts
    predict => Predict;
    /// Give loss and log-probability of each token of given rows
    score => Score;
    /// Fold an adapter into its base and write a model of its own
    merge => Merge;
    /// Write a model, an adapter merged into its base, or an adapter alone as GGUF for llama.cpp
    export => Export;
    /// Write a model in 4 or 8 bits, as bitsandbytes does
    quantize => Quantize;
    /// Train the variants of a recipe one after the other and put their figures side by side
    compare => Compare;
    /// List, inspect, combine, compare and convert adapters
    adapter => Adapter;
    /// Measure the speed and memory of training and decoding on this machine
    bench => Bench;
}

fn main() -> ExitCode {
    enamel_train::commands::bench::note_start();
    enamel_train::signals::faults::guard();
    keep_freed_memory();
    let verb = Cli::parse().verb;
    let checked = match verb.computes() {
        true => enamel_train::device::check_cpu().map_err(anyhow::Error::from),
        false => Ok(()),
    };
    // A run has a listener of its own: it saves before it leaves.
    let stop = StopFlag::default();
    stop.enter(Phase::Outside);
    let _listener = match verb {
        Verb::Train(_) => None,
        // Without one, a signal ends the program as it ends any other.
        _ => Listener::start(stop).ok(),
    };
    match checked.and_then(|()| in_the_pool(|| verb.run())) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted(signal)) => ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)),
        Err(error) => failure::report(&error),
    }
}

/// Runs `f` on a thread of rayon's pool. Called from outside, each of the thousand parallel loops of a step
/// would put the caller to sleep and wake it again.
fn in_the_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    /// Room for the main thread's work, as the system gives it.
    const STACK: usize = 16 << 20;
    // Fails only where the pool is there already, which is as well.
    let _ = rayon::ThreadPoolBuilder::new()
        .stack_size(STACK)
        .build_global();
    rayon::scope(|_| f())
}

/// A training step frees and allocates the same gigabyte again. mimalloc would hand freed pages back
/// after 10 ms, and the kernel would clear them anew: about a fifth of a step's processor time.
fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc 2 and 3, which the bindings do not name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: sets a number in the allocator; any thread may do so at any time.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        super::Cli::command().debug_assert();
    }
}

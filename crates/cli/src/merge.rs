//! `enamel merge`: folds adapters into their base and writes a model of its own.

use std::io::Write;
use std::path::PathBuf;

use enamel_model::save::SaveDtype;
use enamel_train::device;
use enamel_train::commands::merge::{MergeBase, MergeOptions, MergeReport, merge};

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;
use crate::quantization_args::QuantizationArgs;

/// Arguments of `enamel merge`.
#[derive(clap::Args)]
pub struct Args {
    /// Base model; without it, the one that the (first) adapter names
    #[arg(long, value_name = "REF")]
    model: Option<String>,
    /// Adapter directory in PEFT's format; several are added up
    #[arg(long, value_name = "DIR", required = true, value_parser = path())]
    adapter: Vec<PathBuf>,
    /// A weight for each adapter; without it, 1 each
    #[arg(
        long,
        value_name = "W,…",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    weights: Vec<f64>,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "compare_bases", value_parser = path())]
    output: Option<PathBuf>,
    /// For an adapter trained on a quantised base: the weights to merge into, those in the base's files or the
    /// quantised and dequantised ones that it was trained on [default: dense; dequantized after LoftQ's start]
    #[arg(long, value_name = "BASE")]
    into: Option<Onto>,
    /// Quantise the merged weights again, as the base was for training; written are the dequantised values
    #[arg(long)]
    requantize: bool,
    /// Write nothing: compare the logits of all choices with those of the quantised base and the adapter
    #[arg(long, conflicts_with_all = ["output", "no_check"])]
    compare_bases: bool,
    /// The most validation rows to compare logits on
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    rows: usize,
    /// How the base was held in training, if no recipe.lock.toml beside the adapter says so
    #[command(flatten)]
    quantization: QuantizationArgs,
    /// Element type of the weights; auto is the base's (f32 for a quantised one)
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dtype: Choice,
    /// Do not compare logits afterwards, which loads whole models: memory for one tensor will do
    #[arg(long)]
    no_check: bool,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Onto {
    Dense,
    Dequantized,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Choice {
    Auto,
    F32,
    F16,
    Bf16,
}

fn name(dtype: SaveDtype) -> &'static str {
    match dtype {
        SaveDtype::F32 => "f32",
        SaveDtype::F16 => "f16",
        SaveDtype::BF16 => "bf16",
    }
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let (device, _) = device::open(self.device.parse()?)?;
        let adapters = self.adapter.len();
        let options = MergeOptions {
            model: self.model,
            adapters: self.adapter,
            weights: self.weights,
            output: self.output,
            into: self.into.map(|into| match into {
                Onto::Dense => MergeBase::Dense,
                Onto::Dequantized => MergeBase::Dequantized,
            }),
            requantize: self.requantize,
            quantization: self
                .quantization
                .is_given()
                .then(|| self.quantization.quantization()),
            rows: self.rows,
            dtype: match self.dtype {
                Choice::Auto => None,
                Choice::F32 => Some(SaveDtype::F32),
                Choice::F16 => Some(SaveDtype::F16),
                Choice::Bf16 => Some(SaveDtype::BF16),
            },
            check: !self.no_check,
        };
        let report = merge(&options, &device, &mut Bars::default())?;
        let mut out = terminal::out();
        let Some(output) = &report.output else {
            say_drift(&mut out, &report)?;
            return Ok(Outcome::Done);
        };
        let of = match adapters {
            1 => String::new(),
            many => format!(" of {many} adapters"),
        };
        writeln!(out, "merged      {} modules{of}", report.modules)?;
        if report.trained_on.is_some() {
            writeln!(out, "into        {}", report.choice)?;
        }
        writeln!(
            out,
            "written     {} ({})",
            output.display(),
            name(report.dtype)
        )?;
        if report.untied {
            writeln!(
                out,
                "head        lm_head has weights of its own now (tie_word_embeddings = false)"
            )?;
        }
        say_drift(&mut out, &report)?;
        let Some(check) = report.check else {
            writeln!(out, "difference  not checked (--no-check)")?;
            return Ok(Outcome::Done);
        };
        match check.max_abs_logit_diff {
            Some(merged) => writeln!(
                out,
                "difference  logits of adapted and merged weights: at most {merged:.3e}; as written: {:.3e}",
                check.max_abs_logit_diff_written
            )?,
            None => writeln!(
                out,
                "difference  logits of weights merged in f32 and as written: at most {:.3e}\n            (these \
                 adapters cannot run beside their base with these weights, so that is not compared)",
                check.max_abs_logit_diff_written
            )?,
        }
        writeln!(
            out,
            "            (over {} positions, logits up to {:.1})",
            check.positions, check.max_abs_logit
        )?;
        Ok(Outcome::Done)
    }
}

/// What the quantised base was, and how far each choice is from it with the adapter on top.
fn say_drift(out: &mut impl Write, report: &MergeReport) -> std::io::Result<()> {
    for note in &report.notes {
        writeln!(out, "note        {note}")?;
    }
    let Some((format, known_from)) = &report.trained_on else {
        return Ok(());
    };
    writeln!(out, "trained on  {format} (from {known_from})")?;
    let Some(drift) = &report.drift else {
        return writeln!(
            out,
            "drift       logits of the choices of --into and --requantize are not compared"
        );
    };
    writeln!(
        out,
        "drift       logits beside those of the quantised base with the adapter, over {} positions of {}:\n{}",
        drift.positions,
        drift.rows_from,
        drift.table(report.output.as_ref().map(|_| report.choice))
    )
}

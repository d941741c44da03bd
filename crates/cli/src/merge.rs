//! `enamel merge`: folds an adapter into its base and writes a model of its own.

use std::io::Write;
use std::path::PathBuf;

use enamel_model::save::SaveDtype;
use enamel_train::device;
use enamel_train::merge::{MergeOptions, merge};

use crate::Outcome;
use crate::pull_progress::Bars;

/// Arguments of `enamel merge`.
#[derive(clap::Args)]
pub struct Args {
    /// Base model; without it, the one that the adapter names
    #[arg(long, value_name = "REF")]
    model: Option<String>,
    /// Adapter directory in PEFT's format
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Element type of the weights; auto is the base's (f32 for a quantised one)
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dtype: Choice,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
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
        let options = MergeOptions {
            model: self.model,
            adapter: self.adapter,
            output: self.output,
            dtype: match self.dtype {
                Choice::Auto => None,
                Choice::F32 => Some(SaveDtype::F32),
                Choice::F16 => Some(SaveDtype::F16),
                Choice::Bf16 => Some(SaveDtype::BF16),
            },
        };
        let report = merge(&options, &device, &mut Bars::default())?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "merged      {} modules", report.modules)?;
        writeln!(
            out,
            "written     {} ({})",
            report.output.display(),
            name(report.dtype)
        )?;
        writeln!(
            out,
            "difference  logits of adapted and merged weights: at most {:.3e}; as written: {:.3e}",
            report.max_abs_logit_diff, report.max_abs_logit_diff_written
        )?;
        writeln!(
            out,
            "            (over {} positions, logits up to {:.1})",
            report.positions, report.max_abs_logit
        )?;
        Ok(Outcome::Done)
    }
}

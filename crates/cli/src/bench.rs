//! `enamel bench`: speed and memory on this machine.

use std::io::Write;

use anyhow::anyhow;
use enamel_train::commands::bench::{BenchOptions, Figure, bench, first_step};
use enamel_train::base::OpenBase;
use enamel_train::optimizer::Optim;
use enamel_train::recipe::GradientCheckpointing;
use enamel_train::{Compute, device};

use crate::{Outcome, terminal};
use crate::bench_text as text;
use crate::pull_progress::Bars;
use crate::quantization_args::QuantizationArgs;

/// Arguments of `enamel bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Base model
    #[arg(long, value_name = "REF", default_value = "smollm2-135m-instruct")]
    model: String,
    /// Training steps to time, as rows×tokens
    #[arg(long, value_name = "RxT", value_delimiter = ',', value_parser = shape,
          default_value = "1x128,1x512,4x256")]
    shapes: Vec<(usize, usize)>,
    /// Timed steps a shape; the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Rank of the adapter on all linear layers
    #[arg(long, default_value_t = 16)]
    r: usize,
    /// Methods to time, the first of which the others are compared with
    #[arg(long, value_name = "METHOD", value_delimiter = ',', default_value = "lora")]
    methods: Vec<String>,
    /// How AdamW holds its moments, as train.optim in a recipe: adamw_torch, adamw_8bit, paged_adamw_32bit,
    /// paged_adamw_8bit
    #[arg(long, value_name = "NAME", default_value = "adamw_torch")]
    optim: Optim,
    /// Keep only the input of each block, or of N blocks at a time (every:N), and compute them again in
    /// the backward pass
    #[arg(long, value_name = "every:N", num_args = 0..=1, default_value = "false",
          default_missing_value = "true", hide_default_value = true)]
    gradient_checkpointing: GradientCheckpointing,
    /// Tokens to decode, with the base alone and with the first method's adapter; 0 leaves decoding out
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode: usize,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// What products with the base multiply: f32, or bf16 with sums in f32, the base rounded to bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    compute_dtype: Compute,
    #[command(flatten)]
    quantization: QuantizationArgs,
    /// Profile one more step a shape: time, bytes and operations of each fused operation
    #[arg(long)]
    profile: bool,
    /// Only time the way from the start of the process to the end of its first step, 1x128
    #[arg(long, conflicts_with_all = ["profile", "shapes", "steps", "decode"])]
    first_step: bool,
    /// Print lines of JSON instead of tables; the "kind" of each says what it is
    #[arg(long)]
    json: bool,
}

fn shape(text: &str) -> anyhow::Result<(usize, usize)> {
    let wrong = || anyhow!("write rows and tokens as in 4x256");
    let (rows, tokens) = text.split_once(['x', '×']).ok_or_else(wrong)?;
    match (rows.parse(), tokens.parse()) {
        (Ok(rows @ 1..), Ok(tokens @ 2..)) => Ok((rows, tokens)),
        _ => Err(wrong()),
    }
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let (device, choice) = device::open(self.device.parse()?)?;
        self.gradient_checkpointing.check(&device, &choice)?;
        let base = OpenBase::open(&self.model, None, &mut Bars::default())?;
        let quantization = self.quantization.quantization();
        let mut out = terminal::out();
        if !self.json {
            let model = &self.model;
            writeln!(out, "{model} on {choice}, r = {} on all linear layers", self.r)?;
            if self.gradient_checkpointing.0.is_some() {
                writeln!(out, "keeping {}", self.gradient_checkpointing)?;
            }
            let (compute, words) = (
                self.compute_dtype,
                base.computing(self.compute_dtype, &device),
            );
            writeln!(out, "{}: {words}", compute.name())?;
            if self.optim != Optim::default() {
                writeln!(out, "{}", self.optim)?;
            }
            if let Some(format) = quantization.format {
                writeln!(out, "base: {format}")?;
            }
        }
        let options = BenchOptions {
            shapes: self.shapes,
            steps: self.steps.max(1),
            r: self.r,
            methods: self.methods,
            optim: self.optim,
            checkpointing: self.gradient_checkpointing,
            decode: self.decode,
            profile: self.profile,
            compute: self.compute_dtype,
            quantization,
        };
        if self.first_step {
            let first = first_step(base, &device, &options)?;
            show(&mut out, self.json, &Figure::FirstStep(first))?;
            return Ok(Outcome::Done);
        }
        if !self.json {
            text::header(&mut out)?;
        }
        let mut failure = None;
        bench(base, &device, &options, &mut |figure| {
            if let Err(error) = show(&mut out, self.json, &figure) {
                failure = Some(error);
            }
        })?;
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(Outcome::Done),
        }
    }
}

fn show(out: &mut impl Write, json: bool, figure: &Figure) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, figure)?;
        writeln!(out)?;
    } else {
        match figure {
            Figure::Step(step) => text::step(out, step)?,
            Figure::Profile(profile) => text::profile(out, profile)?,
            Figure::Decode(decode) => text::decode(out, decode)?,
            Figure::FirstStep(first) => text::first_step(out, first)?,
        }
    }
    out.flush()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Bench {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        use clap::Parser;
        Bench::try_parse_from([&["bench"], arguments].concat()).map(|bench| bench.args)
    }

    #[test]
    fn shapes_are_rows_and_tokens() {
        let shapes = |text| parse(&["--shapes", text]).map(|args| args.shapes);
        assert_eq!(shapes("1x128,4×256").unwrap(), [(1, 128), (4, 256)]);
        for wrong in ["4", "4x", "0x8", "4x1", "x8", "4x8x2"] {
            assert!(shapes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_step_is_measured_alone() {
        assert!(parse(&["--first-step", "--json"]).unwrap().first_step);
        assert!(parse(&["--profile"]).unwrap().profile);
        for other in [&["--profile"][..], &["--decode", "8"], &["--shapes", "1x8"]] {
            assert!(parse(&[&["--first-step"], other].concat()).is_err(), "{other:?}");
        }
    }
}

//! `enamel bench`: speed and memory on this machine.

use std::io::Write;

use anyhow::anyhow;
use enamel_train::bench::{BenchOptions, bench};
use enamel_train::loaded::OpenBase;
use enamel_train::{Compute, device, thousands};

use crate::Outcome;
use crate::pull_progress::Bars;

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
    /// Tokens to decode; 0 leaves decoding out
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode: usize,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// What products with the base multiply: f32, or bf16 with sums in f32, the base rounded to bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    compute_dtype: Compute,
    /// Print a line of JSON a shape instead of a table
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
        let base = OpenBase::open(&self.model, None, &mut Bars::default())?;
        let mut out = std::io::stdout().lock();
        if !self.json {
            let model = &self.model;
            writeln!(out, "{model} on {choice}, r = {} on all linear layers", self.r)?;
            let (compute, words) = (
                self.compute_dtype,
                base.computing(self.compute_dtype, &device),
            );
            writeln!(out, "{}: {words}", compute.name())?;
            writeln!(
                out,
                "{:<8} {:<8} {:>10} {:>10} {:>9} {:>12} {:>12}",
                "method", "step", "seconds", "tokens/s", "relative", "trained", "peak memory"
            )?;
        }
        let options = BenchOptions {
            shapes: self.shapes,
            steps: self.steps.max(1),
            r: self.r,
            methods: self.methods,
            decode: self.decode,
            compute: self.compute_dtype,
        };
        let mut failure = None;
        let decode = bench(base, &device, &options, &mut |step| {
            let line = if self.json {
                serde_json::to_writer(&mut out, &step)
                    .map_err(std::io::Error::from)
                    .and_then(|()| writeln!(out))
            } else {
                writeln!(
                    out,
                    "{:<8} {:<8} {:>10.3} {:>10.1} {:>9.2} {:>12} {:>12}",
                    step.method,
                    format!("{}×{}", step.rows, step.tokens),
                    step.seconds,
                    step.tokens_per_second,
                    step.relative,
                    thousands(step.trainable as u64),
                    gibibytes(step.peak_memory)
                )
            };
            if let Err(error) = line.and_then(|()| out.flush()) {
                failure = Some(error);
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        if let Some(decode) = decode {
            if self.json {
                writeln!(out, "{}", serde_json::to_string(&decode)?)?;
                return Ok(Outcome::Done);
            }
            writeln!(
                out,
                "decoding     first token of a prompt of {} after {:.2} s, then {:.1} tokens/s, {}",
                decode.prompt,
                decode.first_token_seconds,
                decode.tokens_per_second,
                gibibytes(decode.peak_memory)
            )?;
        }
        Ok(Outcome::Done)
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

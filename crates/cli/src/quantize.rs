//! `enamel quantize`: writes a model with its linear layers quantised, as bitsandbytes writes one.

use std::io::Write;
use std::path::PathBuf;

use enamel_model::Format;
use enamel_model::save::{SaveDtype, SaveOptions, write_bitsandbytes};
use enamel_train::loaded::OpenBase;

use crate::Outcome;
use crate::pull_progress::Bars;
use crate::quantization_args::QuantizationArgs;

/// Arguments of `enamel quantize`.
#[derive(clap::Args)]
pub struct Args {
    /// Model: a directory, a .gguf file, hf:org/name or a catalogue name
    #[arg(value_name = "MODEL")]
    model: String,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    quantization: QuantizationArgs,
    /// Weights that share a scale in 4 bits: a power of two from 32 to 4096
    #[arg(long, value_name = "N", default_value_t = 64)]
    bnb_4bit_blocksize: usize,
    /// Linear layers to leave as they are: names, their beginnings or their ends
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    skip_modules: Vec<String>,
    /// Replace a directory that holds something
    #[arg(long)]
    overwrite: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut quantization = self.quantization.quantization_or_nf4();
        if !enamel_train::BLOCK_SIZES.contains(&self.bnb_4bit_blocksize) {
            anyhow::bail!(
                "--bnb-4bit-blocksize {}: choose one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
                self.bnb_4bit_blocksize
            );
        }
        if let Some(Format::FourBit { block, .. }) = &mut quantization.format {
            *block = self.bnb_4bit_blocksize;
        }
        quantization.skip_modules = self.skip_modules;
        let base = OpenBase::open(&self.model, None, &mut Bars::default())?;
        let options = SaveOptions {
            overwrite: self.overwrite,
            ..SaveOptions::new(SaveDtype::of_config(base.checkpoint.config_json()))
        };
        let saved = write_bitsandbytes(&self.output, &base.checkpoint, &quantization, &options)?;
        let mut out = std::io::stdout().lock();
        let name = quantization.format.map_or("", Format::name);
        writeln!(
            out,
            "quantised  {} matrices as {name}: {:.1} MB; {} tensors as they were",
            saved.quantised,
            saved.quantised_bytes as f64 / 1e6,
            saved.dense
        )?;
        writeln!(
            out,
            "written    {} ({:.1} MB in all)",
            self.output.display(),
            saved.saved.tensor_bytes as f64 / 1e6
        )?;
        Ok(Outcome::Done)
    }
}

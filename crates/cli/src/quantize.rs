//! `enamel quantize`: writes a model whose linear layers are quantised, as bitsandbytes would.

use std::io::Write;
use std::path::PathBuf;

use enamel_model::Quantization;
use enamel_model::save::SaveDtype;
use enamel_train::commands::quantize::{QuantizeOptions, quantize};
use enamel_train::recipe::{FourBitCompute, FourBitType, QuantizationSettings};

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;

/// Arguments of `enamel quantize`.
#[derive(clap::Args)]
pub struct Args {
    /// Model to quantise: a directory, a .gguf file or a name
    #[arg(value_name = "MODEL")]
    model: String,
    /// Directory to write
    #[arg(long, value_name = "DIR", value_parser = path())]
    output: PathBuf,
    /// Linear layers in 4 bits (the default)
    #[arg(long, conflicts_with = "load_in_8bit")]
    load_in_4bit: bool,
    /// Linear layers in 8 bits, a scale for each row
    #[arg(long)]
    load_in_8bit: bool,
    /// What the 4-bit codes stand for: nf4 or fp4
    #[arg(long, value_name = "TYPE", default_value = "nf4", value_parser = ["nf4", "fp4"],
          conflicts_with = "load_in_8bit")]
    bnb_4bit_quant_type: String,
    /// Quantise the blocks' scales too
    #[arg(long, conflicts_with = "load_in_8bit")]
    bnb_4bit_use_double_quant: bool,
    /// Weights that share a scale: a power of two from 32 to 4096
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        conflicts_with = "load_in_8bit"
    )]
    bnb_4bit_blocksize: usize,
    /// What transformers is to compute in: float32, bfloat16 or float16
    #[arg(long, value_name = "TYPE", default_value = "float32",
          value_parser = ["float32", "bfloat16", "float16"], conflicts_with = "load_in_8bit")]
    bnb_4bit_compute_dtype: String,
    /// Linear layers to leave as they are: names, their beginnings (model.layers.0) or ends (down_proj)
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', num_args = 1..)]
    skip_modules: Vec<String>,
    /// Element type of what stays dense: f32, f16 or bf16; auto is the model's (f32 for a quantised GGUF file)
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "f32", "f16", "bf16"])]
    dtype: String,
    /// Replace the output directory if it is there
    #[arg(long)]
    overwrite: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let quantization = Quantization::from(&QuantizationSettings {
            load_in_4bit: !self.load_in_8bit,
            load_in_8bit: self.load_in_8bit,
            bnb_4bit_quant_type: match self.bnb_4bit_quant_type.as_str() {
                "fp4" => FourBitType::Fp4,
                _ => FourBitType::Nf4,
            },
            bnb_4bit_use_double_quant: self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype: match self.bnb_4bit_compute_dtype.as_str() {
                "bfloat16" => FourBitCompute::Bfloat16,
                "float16" => FourBitCompute::Float16,
                _ => FourBitCompute::Float32,
            },
            bnb_4bit_blocksize: self.bnb_4bit_blocksize,
            ..QuantizationSettings::default()
        });
        let format = quantization
            .format
            .ok_or_else(|| anyhow::anyhow!("neither 4 nor 8 bits are asked for"))?;
        let options = QuantizeOptions {
            model: self.model,
            output: self.output,
            format,
            skip_modules: self.skip_modules,
            dtype: SaveDtype::parse(&self.dtype),
            overwrite: self.overwrite,
        };
        let written = quantize(&options, &mut Bars::default())?;
        let mut out = terminal::out();
        let left = match written.skipped {
            0 => String::new(),
            some => format!(", {some} left as they are"),
        };
        writeln!(
            out,
            "quantised   {} linear layers to {}{left}",
            written.layers,
            format.name()
        )?;
        writeln!(
            out,
            "written     {} ({:.1} MB of tensors in {} files)",
            options.output.display(),
            written.saved.tensor_bytes as f64 / 1e6,
            written.saved.files.len()
        )?;
        Ok(Outcome::Done)
    }
}

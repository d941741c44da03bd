//! `enamel export`: a model or an adapter as one file for another program.

use std::io::Write;
use std::path::PathBuf;

use enamel_model::save::OutType;
use enamel_train::device;
use enamel_train::commands::export::{ExportOptions, Exported, export};

use crate::paths::path;
use crate::{Outcome, terminal};
use crate::pull_progress::Bars;

/// Arguments of `enamel export`.
#[derive(clap::Args)]
pub struct Args {
    /// Run or adapter directory, which is merged into its base; or a model: a directory, a .gguf file, a name
    #[arg(value_name = "RUN|ADAPTER|MODEL")]
    source: String,
    /// File format
    #[arg(long, value_name = "FORMAT", default_value = "gguf")]
    format: Format,
    /// Base model; without it, the one that the adapter names
    #[arg(long, visible_alias = "base", value_name = "REF")]
    model: Option<String>,
    /// Type of the matrices, as in llama.cpp's converter; without it f16, and f32 with --adapter-only
    #[arg(long, value_name = "TYPE")]
    outtype: Option<Type>,
    /// Write the adapter alone, as a GGUF LoRA that llama.cpp adds to the base (--lora there)
    #[arg(long)]
    adapter_only: bool,
    /// File to write; without it NAME-TYPE.gguf here
    #[arg(long, visible_aliases = ["out", "outfile"], value_name = "FILE", value_parser = path())]
    output: Option<PathBuf>,
    /// Replace the file if it is there
    #[arg(long)]
    overwrite: bool,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Gguf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let Format::Gguf = self.format;
        let (device, _) = device::open(self.device.parse()?)?;
        let options = ExportOptions {
            source: self.source,
            model: self.model,
            outtype: self.outtype.map(|outtype| match outtype {
                Type::F32 => OutType::F32,
                Type::F16 => OutType::F16,
                Type::Bf16 => OutType::BF16,
                Type::Q8_0 => OutType::Q8_0,
                Type::Q4_0 => OutType::Q4_0,
            }),
            output: self.output,
            adapter_only: self.adapter_only,
            overwrite: self.overwrite,
        };
        let report = export(&options, &device, &mut Bars::default())?;
        let mut out = terminal::out();
        match report.exported {
            Exported::Model => writeln!(out, "exported    the model")?,
            Exported::Merged { modules, untied } => {
                writeln!(out, "exported    the model, {modules} modules merged")?;
                if untied {
                    writeln!(out, "head        output.weight is a matrix of its own now")?;
                }
            }
            Exported::Lora {
                modules,
                alpha,
                folded,
            } => {
                writeln!(out, "exported    the adapter on {modules} modules, alpha {alpha}")?;
                if folded > 0 {
                    writeln!(
                        out,
                        "scales      {folded} modules have another alpha, which is multiplied into their B"
                    )?;
                }
            }
        }
        let types: Vec<String> = report
            .file
            .types
            .iter()
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        writeln!(
            out,
            "written     {} ({}, {:.1} MB; tensors: {})",
            report.output.display(),
            report.outtype.name(),
            report.file.bytes as f64 / 1e6,
            types.join(", ")
        )?;
        if let Some(tokenizer) = &report.file.tokenizer {
            writeln!(out, "tokenizer   {tokenizer}")?;
        }
        for note in &report.file.notes {
            writeln!(out, "note        {note}")?;
        }
        Ok(Outcome::Done)
    }
}

//! Directories that bitsandbytes quantised: NF4, FP4, their scales quantised too, and int8.

use anyhow::{Context, Result};
use enamel_kernels::quantized::formats::{FloatKind, FourBit, OUTLIER_THRESHOLD};
use enamel_model::checkpoint::Checkpoint;
use enamel_model::save::bitsandbytes::write_bitsandbytes;
use enamel_model::save::{SaveDtype, SaveOptions};
use enamel_model::{ArchConfig, Format, Loading};
use serde_json::Value;

use super::Reader;
use super::safetensors::{config_part, open_and_load};
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Faults, Tensor, changed, parse, write};
use crate::mutate;
use crate::random::Random;

const NAMES: [&str; 12] = [
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.down_proj.weight.absmax",
    "model.layers.0.mlp.down_proj.weight.quant_map",
    "model.layers.0.mlp.down_proj.weight.nested_absmax",
    "model.layers.0.mlp.down_proj.weight.nested_quant_map",
    "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4",
    "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__fp4",
    "model.layers.0.mlp.down_proj.weight.quant_state.",
    "model.layers.0.mlp.down_proj.SCB",
    "model.layers.0.mlp.down_proj.weight_format",
    "model.layers.7.mlp.down_proj.weight.absmax",
    ".weight.absmax",
];

/// What a quant_state says.
const STATE: [&str; 14] = [
    "quant_type",
    "nf4",
    "fp4",
    "blocksize",
    "dtype",
    "float32",
    "float16",
    "bfloat16",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
    "[8, 8]",
    "NaN",
];

struct Bitsandbytes {
    seeds: Vec<(Value, Vec<Tensor>)>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let four = |kind, double| Format::FourBit {
        kind,
        block: 64,
        double,
        compute: FloatKind::F32,
    };
    let int8 = Format::Int8 {
        threshold: OUTLIER_THRESHOLD,
    };
    let formats = [
        four(FourBit::Nf4, false),
        four(FourBit::Nf4, true),
        four(FourBit::Fp4, false),
        int8,
    ];
    let dir = tempfile::tempdir()?;
    let dense = dir.path().join("dense");
    std::fs::create_dir_all(&dense)?;
    // Wide enough for a block of 64 in every matrix.
    std::fs::write(dense.join("config.json"), llama::config(16).to_string())?;
    let tensors = llama::tensors(16, "F32", false, false);
    std::fs::write(
        dense.join("model.safetensors"),
        write(&tensors, &Faults::default()),
    )?;
    let checkpoint = Checkpoint::open(&dense)?;
    let config = ArchConfig::from_json(checkpoint.config_json())?;
    let mut seeds = Vec::new();
    for (number, format) in formats.into_iter().enumerate() {
        let out = dir.path().join(number.to_string());
        let options = SaveOptions::new(SaveDtype::F32);
        write_bitsandbytes(&out, &checkpoint, &config, format, &[], &options)
            .context("quantising a seed")?;
        let config = serde_json::from_slice(&std::fs::read(out.join("config.json"))?)?;
        seeds.push((
            config,
            parse(&std::fs::read(out.join("model.safetensors"))?)?,
        ));
    }
    Ok(Box::new(Bitsandbytes { seeds }))
}

impl Reader for Bitsandbytes {
    fn input(&self, random: &mut Random) -> Input {
        let (config, tensors) = random.pick(&self.seeds);
        let config = config_part(random, config);
        let mut tensors = tensors.clone();
        let states = tensors
            .iter_mut()
            .filter(|t| t.name.contains("quant_state"));
        let mut states: Vec<&mut Tensor> = states.collect();
        if !states.is_empty() && random.once_in(3) {
            let at = random.below(states.len());
            let tensor = &mut states[at];
            if random.once_in(3) {
                mutate::text(random, &mut tensor.data, &STATE);
            } else if let Ok(mut json) = serde_json::from_slice(&tensor.data) {
                mutate::json(random, &mut json, &STATE);
                tensor.data = json.to_string().into_bytes();
            }
            tensor.shape = vec![tensor.data.len() as u64];
        }
        let weights = match random.once_in(3) {
            true => write(&tensors, &Faults::default()),
            false => changed(random, &tensors, &NAMES),
        };
        Input(vec![config, Part::new("model.safetensors", weights)])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        Ok(open_and_load(folder.path(), &Loading::default()))
    }
}

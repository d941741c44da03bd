//! `model.safetensors.index.json` and its shards.

use anyhow::Result;
use enamel_model::Loading;
use serde_json::{Map, Value, json};

use super::Reader;
use super::safetensors::{config_part, open_and_load, seeds};
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Faults, Tensor, changed, write};
use crate::mutate;
use crate::random::Random;

const SHARDS: [&str; 3] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

const WORDS: [&str; 12] = [
    "weight_map",
    "metadata",
    "total_size",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00004-of-00003.safetensors",
    "../model-00001-of-00003.safetensors",
    "sub/model.safetensors",
    "config.json",
    "lm_head.weight",
    "model.norm.weight",
    "model.safetensors",
];

struct Seed {
    config: Value,
    index: Value,
    shards: Vec<(Vec<Tensor>, Vec<u8>)>,
}

struct Index {
    seeds: Vec<Seed>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let seeds = seeds().into_iter().map(|(config, tensors)| {
        let mut map = Map::new();
        let mut shards = vec![Vec::new(); SHARDS.len()];
        let mut total = 0;
        for (index, tensor) in tensors.into_iter().enumerate() {
            let shard = index * SHARDS.len() / 14 % SHARDS.len();
            map.insert(tensor.name.clone(), SHARDS[shard].into());
            total += tensor.data.len();
            shards[shard].push(tensor);
        }
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let shards = shards.into_iter().map(|tensors: Vec<Tensor>| {
            let bytes = write(&tensors, &Faults::default());
            (tensors, bytes)
        });
        Seed {
            config,
            index,
            shards: shards.collect(),
        }
    });
    Ok(Box::new(Index {
        seeds: seeds.collect(),
    }))
}

impl Reader for Index {
    fn input(&self, random: &mut Random) -> Input {
        let seed = random.pick(&self.seeds);
        let config = match random.once_in(4) {
            true => config_part(random, &seed.config),
            false => Part::new("config.json", seed.config.to_string()),
        };
        let mut index = seed.index.clone();
        if !random.once_in(3) {
            for _ in 0..random.few() {
                mutate::json(random, &mut index, &WORDS);
            }
        }
        let mut index = index.to_string().into_bytes();
        if random.once_in(8) {
            mutate::text(random, &mut index, &WORDS);
        }
        let mut parts = vec![config, Part::new("model.safetensors.index.json", index)];
        let hit = random.below(2 * seed.shards.len());
        for (at, (tensors, bytes)) in seed.shards.iter().enumerate() {
            let bytes = match at == hit {
                // Another shard's tensors, or none at all.
                true if random.once_in(8) => random.pick(&seed.shards).1.clone(),
                true if random.once_in(8) => continue,
                true => changed(random, tensors, &llama::NAMES),
                false => bytes.clone(),
            };
            parts.push(Part::new(SHARDS[at], bytes));
        }
        Input(parts)
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        Ok(open_and_load(folder.path(), &Loading::default()))
    }
}

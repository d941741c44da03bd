//! A `tokenizer.model` without a `tokenizer.json`: converted, then used as any tokenizer.

use anyhow::Result;
use enamel_train::base::OpenBase;
use serde_json::{Value, json};

use super::Reader;
use super::tokenizer::try_out;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Faults, write};
use crate::mutate;
use crate::random::Random;

/// A byte-pair encoding and a unigram model, small ones that SentencePiece trained.
const SEEDS: [&[u8]; 2] = [
    include_bytes!("../../../tests/fixtures/data/pieces_bpe.model"),
    include_bytes!("../../../tests/fixtures/data/pieces_unigram.model"),
];

const WORDS: [&str; 10] = [
    "tokenizer_class",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "GemmaTokenizer",
    "legacy",
    "add_prefix_space",
    "added_tokens_decoder",
    "content",
    "eos_token",
    "<tool>",
];

struct Pieces {
    config: Value,
    weights: Vec<u8>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let mut config = llama::config(8);
    config["vocab_size"] = 320.into();
    let mut tensors = llama::tensors(8, "F32", true, false);
    tensors.truncate(1);
    let weights = write(&tensors, &Faults::default());
    Ok(Box::new(Pieces { config, weights }))
}

impl Reader for Pieces {
    fn input(&self, random: &mut Random) -> Input {
        let mut model = random.pick(&SEEDS).to_vec();
        if !random.once_in(6) {
            for _ in 0..random.few() {
                mutate::bytes(random, &mut model);
            }
        }
        let mut config = self.config.clone();
        if random.once_in(3) {
            config["model_type"] = "mistral".into();
        }
        let mut parts = vec![
            Part::new("tokenizer.model", model),
            Part::new("config.json", config.to_string()),
            Part::new("model.safetensors", self.weights.as_slice()),
        ];
        if !random.once_in(4) {
            let class = random.word(&[
                "LlamaTokenizer",
                "LlamaTokenizerFast",
                "PreTrainedTokenizerFast",
                "",
            ]);
            let mut settings = json!({
                "tokenizer_class": class, "legacy": random.once_in(2), "add_bos_token": random.once_in(2),
                "added_tokens_decoder": {"10": {"content": "<y>", "special": true}},
            });
            for _ in 0..random.few() {
                mutate::json(random, &mut settings, &WORDS);
            }
            parts.push(Part::new("tokenizer_config.json", settings.to_string()));
        }
        Input(parts)
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let path = folder.path().display().to_string();
        let Ok(base) = OpenBase::open(&path, None, &mut ()) else {
            return Ok(false);
        };
        try_out(&base.tokenizer);
        Ok(base.has_tokenizer)
    }
}

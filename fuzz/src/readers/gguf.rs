//! GGUF files: header, hyperparameters, tensors, tokenizer, and the model they make.

use std::sync::Arc;

use anyhow::Result;
use enamel_model::Loading;
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_train::base::OpenBase;

use super::Reader;
use super::safetensors::load;
use super::tokenizer::try_out;
use crate::folder::{Folder, Input, Part};
use crate::formats::gguf::{BLOCKS, Entry, Gguf, Tensor, changed};
use crate::random::Random;

struct Reading {
    seeds: Arc<Vec<Gguf>>,
}

const FILE: &str = "model.gguf";

/// A model of `hidden` columns whose matrices are of `kind`.
fn model(hidden: u64, kind: u32, tokenizer: Vec<Entry>, more: Vec<Entry>) -> Gguf {
    let mut entries = vec![
        Entry::text("general.architecture", "llama"),
        Entry::u32("llama.embedding_length", hidden as u32),
        Entry::u32("llama.feed_forward_length", 4),
        Entry::u32("llama.block_count", 1),
        Entry::u32("llama.attention.head_count", 2),
        Entry::u32("llama.attention.head_count_kv", 1),
        Entry::u32("llama.attention.key_length", 2),
        Entry::u32("llama.rope.dimension_count", 2),
        Entry::f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        Entry::f32("llama.rope.freq_base", 10000.0),
        Entry::u32("llama.context_length", 16),
    ];
    entries.extend(more);
    entries.extend(tokenizer);
    let shapes = [
        ("token_embd.weight", vec![hidden, 24]),
        ("blk.0.attn_norm.weight", vec![hidden]),
        ("blk.0.attn_q.weight", vec![hidden, 4]),
        ("blk.0.attn_k.weight", vec![hidden, 2]),
        ("blk.0.attn_v.weight", vec![hidden, 2]),
        ("blk.0.attn_output.weight", vec![4, hidden]),
        ("blk.0.ffn_norm.weight", vec![hidden]),
        ("blk.0.ffn_gate.weight", vec![hidden, 4]),
        ("blk.0.ffn_up.weight", vec![hidden, 4]),
        ("blk.0.ffn_down.weight", vec![4, hidden]),
        ("output_norm.weight", vec![hidden]),
    ];
    let tensors = shapes.iter().map(|(name, dims)| {
        let kind = if name.ends_with("_norm.weight") {
            0
        } else {
            kind
        };
        Tensor::new(name, dims, kind)
    });
    Gguf {
        entries,
        tensors: tensors.collect(),
    }
}

/// A byte-level vocabulary of 24 tokens with merges.
fn byte_level() -> Vec<Entry> {
    let letters = [
        "a", "b", "c", "d", "e", "Ġ", "Ċ", "1", "2", ".", "!", "'", "s", "t",
    ];
    let merges = [
        ("a", "b"),
        ("ab", "c"),
        ("Ġ", "a"),
        ("Ġ", "b"),
        ("Ġa", "b"),
        ("1", "2"),
    ];
    let joined = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let tokens = letters.iter().map(|l| (*l).to_owned()).chain(joined);
    let more = ["<s>", "</s>", "<pad>", "<u>"].map(str::to_owned);
    let tokens: Vec<String> = tokens.chain(more).collect();
    let kinds: Vec<i32> = tokens
        .iter()
        .map(|t| if t.starts_with('<') { 3 } else { 1 })
        .collect();
    let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    vec![
        Entry::text("tokenizer.ggml.model", "gpt2"),
        Entry::text("tokenizer.ggml.pre", "gpt-2"),
        Entry::texts("tokenizer.ggml.tokens", &tokens),
        Entry::i32s("tokenizer.ggml.token_type", &kinds),
        Entry::texts("tokenizer.ggml.merges", &merges),
        Entry::u32("tokenizer.ggml.bos_token_id", 20),
        Entry::u32("tokenizer.ggml.eos_token_id", 21),
        Entry::u32("tokenizer.ggml.padding_token_id", 22),
        Entry::bool("tokenizer.ggml.add_bos_token", true),
        Entry::text(
            "tokenizer.chat_template",
            "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}",
        ),
    ]
}

/// A SentencePiece vocabulary of 24 tokens with scores.
fn sentence_piece() -> Vec<Entry> {
    let tokens = [
        "<unk>", "<s>", "</s>", "<0x0A>", "<0x20>", "<0x41>", "▁", "a", "b", "c", "d", "e", "ab",
        "▁a", "▁ab", "abc", "▁b", "bc", "1", "2", "12", ".", "!", "é",
    ];
    let tokens = tokens.map(str::to_owned);
    let kind = |at: usize| match at {
        0 => 2,
        1 | 2 => 3,
        3..=5 => 6,
        _ => 1,
    };
    let kinds: Vec<i32> = (0..tokens.len()).map(kind).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|at| -(at as f32)).collect();
    vec![
        Entry::text("tokenizer.ggml.model", "llama"),
        Entry::texts("tokenizer.ggml.tokens", &tokens),
        Entry::f32s("tokenizer.ggml.scores", &scores),
        Entry::i32s("tokenizer.ggml.token_type", &kinds),
        Entry::u32("tokenizer.ggml.bos_token_id", 1),
        Entry::u32("tokenizer.ggml.eos_token_id", 2),
        Entry::u32("tokenizer.ggml.unknown_token_id", 0),
        Entry::bool("tokenizer.ggml.add_space_prefix", true),
    ]
}

/// The same file as of another architecture.
fn of_architecture(mut file: Gguf, name: &str) -> Gguf {
    for entry in &mut file.entries {
        if let Some(rest) = entry.key.strip_prefix("llama.") {
            entry.key = format!("{name}.{rest}");
        }
        if entry.key == "general.architecture" {
            *entry = Entry::text("general.architecture", name);
        }
    }
    file
}

/// A GPT-2 of one block, quantised.
fn gpt2() -> Gguf {
    let mut file = of_architecture(model(32, 8, byte_level(), Vec::new()), "gpt2");
    file.entries
        .push(Entry::f32("gpt2.attention.layer_norm_epsilon", 1e-5));
    let shapes: [(&str, &[u64]); 16] = [
        ("token_embd.weight", &[32, 24]),
        ("position_embd.weight", &[32, 16]),
        ("blk.0.attn_norm.weight", &[32]),
        ("blk.0.attn_norm.bias", &[32]),
        ("blk.0.attn_qkv.weight", &[32, 96]),
        ("blk.0.attn_qkv.bias", &[96]),
        ("blk.0.attn_output.weight", &[32, 32]),
        ("blk.0.attn_output.bias", &[32]),
        ("blk.0.ffn_norm.weight", &[32]),
        ("blk.0.ffn_norm.bias", &[32]),
        ("blk.0.ffn_up.weight", &[32, 4]),
        ("blk.0.ffn_up.bias", &[4]),
        ("blk.0.ffn_down.weight", &[4, 32]),
        ("blk.0.ffn_down.bias", &[32]),
        ("output_norm.weight", &[32]),
        ("output_norm.bias", &[32]),
    ];
    // Four columns are no block of a quantised type.
    let kind = |dims: &[u64]| {
        if dims.len() == 2 && dims[0] >= 32 {
            8
        } else {
            0
        }
    };
    let tensors = shapes
        .iter()
        .map(|(name, dims)| Tensor::new(name, dims, kind(dims)));
    file.tensors = tensors.collect();
    file
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let mut seeds = Vec::new();
    for (kind, elements, _) in BLOCKS {
        let hidden = elements.max(32);
        let tokenizer = match seeds.len() % 3 {
            0 => byte_level(),
            1 => sentence_piece(),
            _ => Vec::new(),
        };
        seeds.push(model(hidden, kind, tokenizer, Vec::new()));
    }
    let yarn = vec![
        Entry::text("llama.rope.scaling.type", "yarn"),
        Entry::f32("llama.rope.scaling.factor", 4.0),
        Entry::u32("llama.rope.scaling.original_context_length", 4),
    ];
    seeds.push(model(32, 0, byte_level(), yarn));
    let mut llama3 = model(32, 8, sentence_piece(), Vec::new());
    llama3
        .tensors
        .push(Tensor::new("rope_freqs.weight", &[1], 0));
    llama3
        .tensors
        .push(Tensor::new("output.weight", &[32, 24], 8));
    llama3
        .tensors
        .push(Tensor::new("blk.0.attn_q.bias", &[4], 0));
    seeds.push(llama3);
    let mut qwen3 = of_architecture(model(32, 1, byte_level(), Vec::new()), "qwen3");
    for name in ["blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"] {
        qwen3.tensors.push(Tensor::new(name, &[2], 0));
    }
    seeds.push(qwen3);
    seeds.push(gpt2());
    // Types that are not read come first in no list of seeds: one file of them is enough.
    seeds.retain(|seed| seed.tensors.iter().all(|t| t.kind != 10));
    let seeds = Arc::new(seeds);
    Ok(Box::new(Reading { seeds }))
}

impl Reader for Reading {
    fn input(&self, random: &mut Random) -> Input {
        let seed = random.pick(&self.seeds);
        Input(vec![Part::new(FILE, changed(random, seed))])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let path = folder.path().join(FILE);
        let Ok(checkpoint) = Checkpoint::open(&path) else {
            return Ok(false);
        };
        let _ = checkpoint.tokenizer_config();
        let _ = checkpoint.chat_template();
        let _ = checkpoint.generation_config();
        for info in checkpoint.tensors() {
            let _ = checkpoint.read(&info.name);
        }
        let accepted = load(&checkpoint, &Loading::default());
        // Without a tokenizer there is a stand-in, which is the same for every file.
        let tokenizer = checkpoint.has_tokenizer();
        drop(checkpoint);
        if tokenizer && let Ok(base) = OpenBase::open(&path.display().to_string(), None, &mut ()) {
            try_out(&base.tokenizer);
        }
        Ok(accepted)
    }
}

//! GGUF files: metadata, a list of tensors, and data.

use crate::mutate;
use crate::random::Random;

/// A metadata entry: its key, ggml's number of its type, and the bytes of its value.
#[derive(Clone)]
pub struct Entry {
    pub key: String,
    pub kind: u32,
    pub value: Vec<u8>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Innermost axis first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

#[derive(Clone)]
pub struct Gguf {
    pub entries: Vec<Entry>,
    pub tensors: Vec<Tensor>,
}

/// ggml's types: number, elements and bytes of a block.
pub const BLOCKS: [(u32, u64, u64); 12] = [
    (0, 1, 4),
    (1, 1, 2),
    (30, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (12, 256, 144),
    (13, 256, 176),
    (14, 256, 210),
    (10, 256, 84),
];

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

impl Entry {
    fn new(key: &str, kind: u32, value: Vec<u8>) -> Self {
        let key = key.to_owned();
        Self { key, kind, value }
    }

    pub fn u32(key: &str, value: u32) -> Self {
        Self::new(key, 4, value.to_le_bytes().to_vec())
    }

    pub fn f32(key: &str, value: f32) -> Self {
        Self::new(key, 6, value.to_le_bytes().to_vec())
    }

    pub fn bool(key: &str, value: bool) -> Self {
        Self::new(key, 7, vec![value.into()])
    }

    pub fn text(key: &str, value: &str) -> Self {
        Self::new(key, 8, string(value))
    }

    fn array(key: &str, kind: u32, count: usize, items: Vec<u8>) -> Self {
        let mut value = kind.to_le_bytes().to_vec();
        value.extend((count as u64).to_le_bytes());
        value.extend(items);
        Self::new(key, 9, value)
    }

    pub fn texts(key: &str, items: &[String]) -> Self {
        let bytes = items.iter().flat_map(|item| string(item)).collect();
        Self::array(key, 8, items.len(), bytes)
    }

    pub fn i32s(key: &str, items: &[i32]) -> Self {
        let bytes = items.iter().flat_map(|item| item.to_le_bytes()).collect();
        Self::array(key, 5, items.len(), bytes)
    }

    pub fn f32s(key: &str, items: &[f32]) -> Self {
        let bytes = items.iter().flat_map(|item| item.to_le_bytes()).collect();
        Self::array(key, 6, items.len(), bytes)
    }
}

impl Tensor {
    /// A tensor of `[rows, columns]` or `[columns]`, innermost first; `kind` where a row is whole blocks of
    /// it, else F32. The bytes are some pattern, with scales of one.
    pub fn new(name: &str, dims: &[u64], kind: u32) -> Self {
        let block = |kind: u32| BLOCKS.iter().find(|(own, ..)| *own == kind);
        let fits = |kind: u32| block(kind).is_some_and(|(_, n, _)| dims[0].is_multiple_of(*n));
        let kind = if fits(kind) { kind } else { 0 };
        let (_, elements, bytes) = block(kind).copied().unwrap_or((0, 1, 4));
        let count = dims.iter().product::<u64>() / elements * bytes;
        let data = match kind {
            0 => (0..count / 4)
                .flat_map(|at| ((at % 64) as f32 / 64.0 - 0.5).to_le_bytes())
                .collect(),
            // 1.0 or near in half floats where one may stand.
            _ => (0..count)
                .map(|at| if at % 2 == 0 { 0x11 } else { 0x2C })
                .collect(),
        };
        Self {
            name: name.to_owned(),
            dims: dims.to_vec(),
            kind,
            data,
        }
    }
}

/// Names and keys that mean something in a file.
pub const WORDS: [&str; 50] = [
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "split.count",
    "llama.expert_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.context_length",
    "llama.vocab_size",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.yarn_log_multiplier",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
    "llama",
    "gpt2",
    "llama-bpe",
    "qwen2",
    "smollm",
    "linear",
    "yarn",
    "token_embd.weight",
    "output.weight",
    "output_norm.weight",
    "rope_freqs.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_q.bias",
    "blk.0.ffn_down.weight",
    "blk.18446744073709551616.ffn_down.weight",
    "blk.1.attn_norm.weight",
];

/// What is wrong with a file as a whole.
#[derive(Default)]
struct Faults {
    version: Option<u32>,
    tensors: Option<u64>,
    entries: Option<u64>,
    offset: Option<(usize, u64)>,
    /// A key's length in place of its own.
    key: Option<(usize, u64)>,
    dims: Option<(usize, u32)>,
}

fn write(file: &Gguf, faults: &Faults) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let mut bytes = Vec::with_capacity(1 << 14);
    bytes.extend(b"GGUF");
    bytes.extend(faults.version.unwrap_or(3).to_le_bytes());
    let count = faults.tensors.unwrap_or(file.tensors.len() as u64);
    bytes.extend(count.to_le_bytes());
    let count = faults.entries.unwrap_or(file.entries.len() as u64);
    bytes.extend(count.to_le_bytes());
    for (index, entry) in file.entries.iter().enumerate() {
        let length = match faults.key {
            Some((at, length)) if at == index => length,
            _ => entry.key.len() as u64,
        };
        bytes.extend(length.to_le_bytes());
        bytes.extend(entry.key.as_bytes());
        bytes.extend(entry.kind.to_le_bytes());
        bytes.extend(&entry.value);
    }
    let mut offset = 0u64;
    for (index, tensor) in file.tensors.iter().enumerate() {
        bytes.extend(string(&tensor.name));
        let dims = match faults.dims {
            Some((at, dims)) if at == index => dims,
            _ => tensor.dims.len() as u32,
        };
        bytes.extend(dims.to_le_bytes());
        tensor
            .dims
            .iter()
            .for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(tensor.kind.to_le_bytes());
        let own = match faults.offset {
            Some((at, other)) if at == index => other,
            _ => offset,
        };
        bytes.extend(own.to_le_bytes());
        offset += (tensor.data.len() as u64).next_multiple_of(ALIGNMENT as u64);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let start = bytes.len();
    for tensor in &file.tensors {
        bytes.extend(&tensor.data);
        let length = bytes.len() - start;
        bytes.resize(start + length.next_multiple_of(ALIGNMENT), 0);
    }
    bytes
}

/// The file with some things changed.
pub fn changed(random: &mut Random, file: &Gguf) -> Vec<u8> {
    let mut file = file.clone();
    let mut faults = Faults::default();
    let tensor_values = random.once_in(10);
    if tensor_values {
        let at = random.below(file.tensors.len());
        mutate_values(random, &mut file.tensors[at].data);
        return write(&file, &faults);
    }
    if !random.once_in(5) {
        for _ in 0..random.few() {
            match random.below(3) {
                0 => tensor(random, &mut file.tensors),
                _ => entry(random, &mut file.entries),
            }
        }
    }
    let place = random.below(file.tensors.len());
    match random.below(20) {
        0 => faults.version = Some(mutate::number(random, 3) as u32),
        1 => faults.tensors = Some(mutate::number(random, file.tensors.len() as u64)),
        2 => faults.entries = Some(mutate::number(random, file.entries.len() as u64)),
        3 | 4 => faults.offset = Some((place, mutate::number(random, 32 * place as u64))),
        5 => {
            faults.key = Some((
                random.below(file.entries.len()),
                *random.pick(&mutate::EXTREMES),
            ))
        }
        6 => faults.dims = Some((place, mutate::number(random, 2) as u32)),
        _ => {}
    }
    let mut bytes = write(&file, &faults);
    if random.once_in(5) {
        let data: usize = file.tensors.iter().map(|t| t.data.len()).sum();
        let rest = bytes.split_off(bytes.len().saturating_sub(data));
        mutate::bytes(random, &mut bytes);
        if random.once_in(8) {
            return bytes;
        }
        bytes.extend(rest);
    }
    bytes
}

fn mutate_values(random: &mut Random, data: &mut [u8]) {
    for _ in 0..4 * random.few() {
        let at = random.below(data.len());
        if let Some(byte) = data.get_mut(at) {
            *byte = random.next() as u8;
        }
    }
}

fn entry(random: &mut Random, entries: &mut Vec<Entry>) {
    if entries.is_empty() {
        entries.push(Entry::u32("a", 1));
        return;
    }
    let at = random.below(entries.len());
    let other = random.below(entries.len());
    let word = *random.pick(&WORDS);
    let entry = &mut entries[at];
    match random.below(12) {
        0 => {
            entries.remove(at);
        }
        1 => entry.key = word.to_owned(),
        2 => entry.kind = *random.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, u32::MAX]),
        3 => {
            let copy = entry.clone();
            entries.push(copy);
        }
        4 => {
            let (kind, value) = (entries[other].kind, entries[other].value.clone());
            (entries[at].kind, entries[at].value) = (kind, value);
        }
        5 => *entry = Entry::text(&entry.key, word),
        6 => *entry = Entry::u32(&entry.key, *random.pick(&mutate::EXTREMES) as u32),
        7 => {
            let value = random.pick(&mutate::EXTREMES).to_le_bytes().to_vec();
            *entry = Entry::new(&entry.key, *random.pick(&[10, 11, 12]), value);
        }
        8 => {
            let floats = [
                0.0,
                -1.0,
                f32::NAN,
                f32::INFINITY,
                1e-45,
                f32::MAX,
                0.5,
                1e9,
            ];
            *entry = Entry::f32(&entry.key, *random.pick(&floats));
        }
        9 if entry.kind == 9 => {
            // The array's element type or count.
            let count = random.once_in(2);
            let (at, width) = if count { (4, 8) } else { (0, 4) };
            if let Some(place) = entry.value.get_mut(at..at + width) {
                let mut old = [0; 8];
                old[..width].copy_from_slice(place);
                let new = mutate::number(random, u64::from_le_bytes(old)).to_le_bytes();
                place.copy_from_slice(&new[..width]);
            }
        }
        10 => entries.push(Entry::u32(word, random.below(64) as u32)),
        _ => mutate::bytes(random, &mut entry.value),
    }
}

fn tensor(random: &mut Random, tensors: &mut Vec<Tensor>) {
    let at = random.below(tensors.len());
    let other = random.below(tensors.len());
    let tensor = &mut tensors[at];
    match random.below(12) {
        0 => {
            if tensors.len() > 1 {
                tensors.remove(at);
            }
        }
        1 => tensor.name = (*random.pick(&WORDS)).to_owned(),
        2 => {
            let copy = tensor.clone();
            tensors.push(copy);
        }
        3 | 4 => {
            let place = random.below(tensor.dims.len());
            if let Some(dim) = tensor.dims.get_mut(place) {
                *dim = mutate::number(random, *dim);
            }
        }
        5 => tensor.kind = random.below(40) as u32,
        6 => tensor.dims.push(*random.pick(&mutate::EXTREMES)),
        7 => {
            tensor.dims.pop();
        }
        8 => {
            // Another type, with data of its size.
            let (kind, elements, bytes) = *random.pick(&BLOCKS);
            let count = tensor.dims.iter().fold(1, |n: u64, d| n.saturating_mul(*d));
            tensor.kind = kind;
            let length = (count / elements).saturating_mul(bytes);
            tensor.data.resize(length.min(1 << 15) as usize, 0x2C);
        }
        9 => tensor.dims.reverse(),
        10 => tensors.swap(at, other),
        _ => {
            let length = mutate::number(random, tensor.data.len() as u64).min(1 << 14);
            tensor.data.resize(length as usize, 0);
        }
    }
}

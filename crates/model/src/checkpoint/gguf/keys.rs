//! The metadata keys that reading depends on: which must be there, and of which kind each is.

use super::header::{Header, Value};
use crate::arch::GgufArch;
use crate::error::Problems;

/// What a key's value must be.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A whole number from 1 to 2³²−1.
    Count,
    /// A whole number.
    Whole,
    /// The number of a token, or one that says that there is none.
    Token,
    Number,
    Text,
    Flag,
    List,
}

use Kind::{Count, Flag, List, Number, Text, Token, Whole};

/// Keys without which there is no model; llama.cpp asks for the same. A dot stands for the architecture's name.
const MODEL: [(&str, Kind); 5] = [
    (".embedding_length", Count),
    (".feed_forward_length", Count),
    (".block_count", Count),
    (".attention.head_count", Count),
    (".context_length", Count),
];

/// Keys that have a default or a meaning in their absence.
const OPTIONAL: [(&str, Kind); 22] = [
    (".attention.head_count_kv", Count),
    (".attention.key_length", Count),
    (".rope.dimension_count", Count),
    (".rope.freq_base", Number),
    (".rope.scale_linear", Number),
    (".rope.scaling.type", Text),
    (".rope.scaling.factor", Number),
    (".rope.scaling.attn_factor", Number),
    (".rope.scaling.yarn_beta_fast", Number),
    (".rope.scaling.yarn_beta_slow", Number),
    (".rope.scaling.original_context_length", Count),
    (".expert_count", Whole),
    ("split.count", Whole),
    ("tokenizer.ggml.model", Text),
    ("tokenizer.chat_template", Text),
    ("tokenizer.ggml.bos_token_id", Token),
    ("tokenizer.ggml.eos_token_id", Token),
    ("tokenizer.ggml.eot_token_id", Token),
    ("tokenizer.ggml.eom_token_id", Token),
    ("tokenizer.ggml.unknown_token_id", Token),
    ("tokenizer.ggml.padding_token_id", Token),
    ("general.architecture", Text),
];

/// Keys of a tokenizer of either kind.
const TOKENIZER: [(&str, Kind); 2] = [
    ("tokenizer.ggml.model", Text),
    ("tokenizer.ggml.tokens", List),
];
const BYTE_LEVEL: (&str, Kind) = ("tokenizer.ggml.merges", List);
const PIECES: (&str, Kind) = ("tokenizer.ggml.scores", List);
const TOKENIZER_OPTIONAL: [(&str, Kind); 5] = [
    ("tokenizer.ggml.pre", Text),
    ("tokenizer.ggml.token_type", List),
    ("tokenizer.ggml.add_bos_token", Flag),
    ("tokenizer.ggml.add_eos_token", Flag),
    ("tokenizer.ggml.add_space_prefix", Flag),
];

/// Keys that may differ from layer to layer; a list of equal numbers stands for one.
pub(super) const PER_LAYER: [&str; 3] = [
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
];

/// What is missing or of another kind among the keys of the model.
pub(super) fn check_model(header: &Header, arch: &GgufArch, problems: &mut Problems) {
    must(header, &MODEL, problems);
    must(header, &[(&header.key(arch.epsilon), Number)], problems);
    may(header, &OPTIONAL, problems);
}

/// The same among those of its tokenizer.
pub(super) fn check_tokenizer(header: &Header, problems: &mut Problems) {
    must(header, &TOKENIZER, problems);
    match header.str("tokenizer.ggml.model") {
        Some("gpt2") => must(header, &[BYTE_LEVEL], problems),
        Some("llama") => must(header, &[PIECES], problems),
        _ => {}
    }
    may(header, &TOKENIZER_OPTIONAL, problems);
}

/// A key whose architecture is that of the file.
fn full(header: &Header, key: &str) -> String {
    match key.strip_prefix('.') {
        Some(rest) => header.key(rest),
        None => key.to_owned(),
    }
}

fn must(header: &Header, keys: &[(&str, Kind)], problems: &mut Problems) {
    for (key, kind) in keys {
        let key = full(header, key);
        if header.get(&key).is_none() {
            problems.push(format!(
                "metadata key '{key}' is missing; it must be {}",
                kind.words()
            ));
        }
    }
    may(header, keys, problems);
}

fn may(header: &Header, keys: &[(&str, Kind)], problems: &mut Problems) {
    for (key, kind) in keys {
        let key = full(header, key);
        if let Some(value) = header.get(&key).filter(|value| !kind.fits(value)) {
            problems.push(format!(
                "metadata key '{key}' is {}; it must be {}",
                words(value),
                kind.words()
            ));
        }
    }
}

impl Kind {
    fn fits(self, value: &Value) -> bool {
        match (self, value) {
            (Count, value) => whole(value).is_some_and(|n| (1..=i128::from(u32::MAX)).contains(&n)),
            (Whole | Token, value) => whole(value).is_some(),
            (Number, Value::Float(x)) => x.is_finite(),
            (Number, value) => whole(value).is_some(),
            (Text, Value::String(_)) | (Flag, Value::Bool(_)) | (List, Value::Array(_)) => true,
            _ => false,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Count => "a whole number of at least 1",
            Whole => "a whole number",
            Token => "the number of a token",
            Number => "a number",
            Text => "a text",
            Flag => "true or false",
            List => "a list",
        }
    }
}

fn whole(value: &Value) -> Option<i128> {
    match value {
        Value::Unsigned(n) => Some((*n).into()),
        Value::Signed(n) => Some((*n).into()),
        _ => None,
    }
}

/// A value in words.
fn words(value: &Value) -> String {
    match value {
        Value::Unsigned(n) => n.to_string(),
        Value::Signed(n) => n.to_string(),
        Value::Float(x) => x.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::String(text) => format!("the text {:?}", text.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".to_owned(),
    }
}

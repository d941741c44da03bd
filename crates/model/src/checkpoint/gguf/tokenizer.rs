//! `tokenizer.json` and `tokenizer_config.json`, from GGUF metadata.
//!
//! Two kinds of vocabulary: "gpt2" (byte-level BPE with merges, and a pre-tokenizer by name) and
//! "llama" (SentencePiece BPE with byte fallback, whose merges follow from the scores).

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::token;
use super::header::Header;
use super::keys;
use crate::checkpoint::CheckpointError;
use crate::error::Problems;

/// GGUF's kinds of token.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// The vocabulary as the metadata lists it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(header: &Header, bytes: &'a [u8]) -> Result<Self, String> {
        let tokens = header
            .strings("tokenizer.ggml.tokens", bytes)
            .ok_or("metadata key 'tokenizer.ggml.tokens' is not a list of texts")?;
        let kinds = match header.get("tokenizer.ggml.token_type") {
            None => vec![NORMAL; tokens.len()],
            Some(_) => header
                .ints("tokenizer.ggml.token_type", bytes)
                .filter(|kinds| kinds.len() == tokens.len())
                .ok_or_else(|| {
                    format!(
                        "'tokenizer.ggml.token_type' is not a list of {} numbers",
                        tokens.len()
                    )
                })?,
        };
        Ok(Self { tokens, kinds })
    }

    fn special(&self, header: &Header, name: &str) -> Option<&'a str> {
        let id = token(header, name)?;
        self.tokens.get(usize::try_from(id).ok()?).copied()
    }

    /// Tokens that are matched in the text before any splitting, in order of id.
    fn added(&self) -> Vec<Value> {
        self.tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (token, kind))| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": *kind != USER_DEFINED,
                })
            })
            .collect()
    }

    /// The token-to-id map, and whether any token occurs twice.
    fn ids(&self, problems: &mut Problems) -> Map<String, Value> {
        let mut ids = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert((*token).to_owned(), id.into()) {
                problems.push(format!("token {token:?} has the ids {first} and {id}"));
            }
        }
        ids
    }
}

/// Whether a beginning- or end-of-text token is added to every text.
struct Ends<'a> {
    bos: Option<&'a str>,
    eos: Option<&'a str>,
}

impl<'a> Ends<'a> {
    fn read(header: &Header, vocabulary: &Vocabulary<'a>) -> Self {
        // llama.cpp's defaults where the key is absent: SentencePiece models and Llama 3 begin
        // with the token, other byte-level models do not; none adds an end.
        let begins = header.str("tokenizer.ggml.model") == Some("llama")
            || is_llama3(header.str("tokenizer.ggml.pre"));
        let wants = |key: &str, default: bool| header.bool(key).unwrap_or(default);
        Self {
            bos: vocabulary
                .special(header, "bos")
                .filter(|_| wants("tokenizer.ggml.add_bos_token", begins)),
            eos: vocabulary
                .special(header, "eos")
                .filter(|_| wants("tokenizer.ggml.add_eos_token", false)),
        }
    }

    /// The template post-processor that adds them, if there is anything to add.
    fn template(&self, vocabulary: &Vocabulary) -> Option<Value> {
        if self.bos.is_none() && self.eos.is_none() {
            return None;
        }
        let special = |token: &str, ty: u8| json!({"SpecialToken": {"id": token, "type_id": ty}});
        let wrapped = |sequence: &str, ty: u8| {
            let mut parts = Vec::new();
            parts.extend(self.bos.map(|bos| special(bos, ty)));
            parts.push(json!({"Sequence": {"id": sequence, "type_id": ty}}));
            parts.extend(self.eos.map(|eos| special(eos, ty)));
            parts
        };
        let mut special_tokens = Map::new();
        for token in [self.bos, self.eos].into_iter().flatten() {
            let id = vocabulary.tokens.iter().position(|t| *t == token);
            special_tokens.insert(
                token.to_owned(),
                json!({"id": token, "ids": [id], "tokens": [token]}),
            );
        }
        let single = wrapped("A", 0);
        let pair: Vec<Value> = single.iter().cloned().chain(wrapped("B", 1)).collect();
        Some(json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special_tokens,
        }))
    }
}

/// The bytes of a `tokenizer.json`.
pub(crate) fn tokenizer_json(
    path: &Path,
    header: &Header,
    bytes: &[u8],
) -> Result<Vec<u8>, CheckpointError> {
    let malformed = |problem: String| CheckpointError::malformed(path, problem);
    let mut problems = Problems::default();
    keys::check_tokenizer(header, &mut problems);
    problems.into_malformed(path)?;
    let vocabulary = Vocabulary::read(header, bytes).map_err(malformed)?;
    let mut problems = Problems::default();
    let ids = vocabulary.ids(&mut problems);
    problems.into_malformed(path)?;

    let ends = Ends::read(header, &vocabulary);
    let template = ends.template(&vocabulary);
    let parts = match header.str("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(header, bytes, ids, template),
        Some("llama") => sentence_piece(header, bytes, &vocabulary, ids, template),
        other => {
            return Err(CheckpointError::unsupported(
                path,
                format!(
                    "tokenizer.ggml.model is '{}'; 'gpt2' and 'llama' are read",
                    other.unwrap_or("(none)")
                ),
            ));
        }
    };
    let parts = parts.map_err(|fault| match fault {
        Fault::Malformed(problem) => malformed(problem),
        Fault::Unsupported(problem) => CheckpointError::unsupported(path, problem),
    })?;
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": parts.post_processor,
        "decoder": parts.decoder,
        "model": parts.model,
    });
    serde_json::to_vec(&json).map_err(|e| malformed(format!("tokenizer.json: {e}")))
}

/// A `tokenizer_config.json` with the special tokens and the chat template.
pub(crate) fn tokenizer_config(header: &Header, bytes: &[u8]) -> Option<Value> {
    let vocabulary = Vocabulary::read(header, bytes).ok()?;
    let ends = Ends::read(header, &vocabulary);
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("tokenizer_class", "PreTrainedTokenizerFast".into());
    set("clean_up_tokenization_spaces", false.into());
    set("add_bos_token", ends.bos.is_some().into());
    set("add_eos_token", ends.eos.is_some().into());
    let names = [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ];
    for (name, key) in names {
        if let Some(token) = vocabulary.special(header, key) {
            set(name, token.into());
        }
    }
    if let Some(length) = header.u64(&header.key("context_length")) {
        set("model_max_length", length.into());
    }
    if let Some(template) = header.str("tokenizer.chat_template") {
        set("chat_template", template.into());
    }
    Some(Value::Object(config))
}

/// The parts of a `tokenizer.json` that depend on the kind of vocabulary.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Value,
}

enum Fault {
    Malformed(String),
    Unsupported(String),
}

pub(super) fn is_llama3(pre: Option<&str>) -> bool {
    matches!(pre, Some("llama-bpe" | "llama3" | "llama-v3"))
}

fn byte_level(
    header: &Header,
    bytes: &[u8],
    ids: Map<String, Value>,
    template: Option<Value>,
) -> Result<Parts, Fault> {
    let merges = header
        .strings("tokenizer.ggml.merges", bytes)
        .ok_or_else(|| {
            Fault::Malformed("metadata key 'tokenizer.ggml.merges' is not a list of texts".into())
        })?;
    // Pairs rather than joined texts, since newer files hold merges of tokens with spaces.
    let mut pairs = Vec::with_capacity(merges.len());
    for (line, merge) in merges.iter().enumerate() {
        // As llama.cpp: the separator is the first space after the first character.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let rest = merge.get(first..).unwrap_or_default();
        let pair = rest.split_once(' ').and_then(|(head, right)| {
            let length = first.checked_add(head.len())?;
            Some((merge.get(..length)?, right))
        });
        let Some((left, right)) = pair else {
            return Err(Fault::Malformed(format!(
                "merge {line} of 'tokenizer.ggml.merges' is {merge:?}, not two tokens"
            )));
        };
        for part in [left, right, &format!("{left}{right}")] {
            if !ids.contains_key(part) {
                return Err(Fault::Malformed(format!(
                    "merge {line} of 'tokenizer.ggml.merges' needs the token {part:?}, which is \
                     not in the vocabulary"
                )));
            }
        }
        pairs.push(json!([left, right]));
    }
    let pre = header.str("tokenizer.ggml.pre");
    let pre_tokenizer = pre_tokenizer(pre).ok_or_else(|| {
        Fault::Unsupported(format!(
            "tokenizer.ggml.pre is '{}'; read are default, gpt-2, smollm, starcoder, refact, \
             command-r, llama-bpe and qwen2",
            pre.unwrap_or_default()
        ))
    })?;
    Ok(Parts {
        normalizer: normalizer(pre),
        pre_tokenizer,
        post_processor: template.unwrap_or(Value::Null),
        decoder: byte_level_step(true),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": is_llama3(pre),
            "vocab": ids,
            "merges": pairs,
        }),
    })
}

fn byte_level_step(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// The splitting that `tokenizer.ggml.pre` stands for; none for a name that is not known.
pub(super) fn pre_tokenizer(pre: Option<&str>) -> Option<Value> {
    let sequence =
        |first: Value, rest: Value| json!({"type": "Sequence", "pretokenizers": [first, rest]});
    let split = |regex: &str| {
        json!({
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": false,
        })
    };
    Some(match pre {
        None | Some("default" | "gpt-2" | "gpt2" | "olmo" | "jais" | "mpt") => {
            byte_level_step(true)
        }
        Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone") => sequence(
            json!({"type": "Digits", "individual_digits": true}),
            byte_level_step(true),
        ),
        pre if is_llama3(pre) => sequence(split(LLAMA3_SPLIT), byte_level_step(false)),
        Some("qwen2" | "stablelm2" | "megrez" | "deepseek-r1-qwen") => {
            sequence(split(QWEN2_SPLIT), byte_level_step(false))
        }
        Some(_) => return None,
    })
}

/// Qwen2 texts are normalised to composed characters; the others are taken as they are.
pub(super) fn normalizer(pre: Option<&str>) -> Value {
    match pre {
        Some("qwen2" | "megrez" | "deepseek-r1-qwen") => json!({"type": "NFC"}),
        _ => Value::Null,
    }
}

/// Contractions, words, up to three digits, other marks, line ends, spaces: Llama 3.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3, with digits one by one: Qwen 2.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn sentence_piece(
    header: &Header,
    bytes: &[u8],
    vocabulary: &Vocabulary,
    ids: Map<String, Value>,
    template: Option<Value>,
) -> Result<Parts, Fault> {
    let scores = header
        .floats("tokenizer.ggml.scores", bytes)
        .filter(|scores| scores.len() == vocabulary.tokens.len())
        .ok_or_else(|| {
            Fault::Malformed(format!(
                "'tokenizer.ggml.scores' is not a list of {} numbers",
                vocabulary.tokens.len()
            ))
        })?;
    let unknown = vocabulary.special(header, "unknown").or_else(|| {
        let at = vocabulary.kinds.iter().position(|&kind| kind == UNKNOWN)?;
        vocabulary.tokens.get(at).copied()
    });
    let prefix = header
        .bool("tokenizer.ggml.add_space_prefix")
        .unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![
        replace("▁", " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        post_processor: template.unwrap_or(Value::Null),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": ids,
            "merges": merges_by_score(vocabulary, &scores),
        }),
    })
}

/// The merges that make byte-pair encoding join pieces as SentencePiece does: every way to cut a
/// piece into two pieces, best score of the whole first; within a piece, by the ids of the parts.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<Value> {
    let merges = joins(&vocabulary.tokens, &vocabulary.kinds, scores);
    merges
        .into_iter()
        .filter_map(|(left, right)| {
            let token = |id: usize| vocabulary.tokens.get(id).copied();
            Some(json!([token(left)?, token(right)?]))
        })
        .collect()
}

/// The same as pairs of ids.
pub(super) fn joins<T: AsRef<str>>(
    tokens: &[T],
    kinds: &[i64],
    scores: &[f64],
) -> Vec<(usize, usize)> {
    let pieces: HashMap<&str, usize> = tokens
        .iter()
        .zip(kinds)
        .enumerate()
        .filter(|(_, (_, kind))| **kind == NORMAL)
        .map(|(id, (token, _))| (token.as_ref(), id))
        .collect();
    let mut merges: Vec<(f64, usize, usize, usize)> = Vec::new();
    for (id, token) in tokens.iter().map(T::as_ref).enumerate() {
        if pieces.get(token) != Some(&id) {
            continue;
        }
        let score = scores.get(id).copied().unwrap_or(f64::MIN);
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (pieces.get(left), pieces.get(right)) {
                merges.push((score, id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
    });
    let pairs = merges.into_iter().map(|(_, _, left, right)| (left, right));
    pairs.collect()
}

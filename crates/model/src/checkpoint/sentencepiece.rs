//! `tokenizer.json` of a SentencePiece model, as transformers 5 makes it of a folder with `tokenizer.model` alone.
//!
//! Two ways: a Llama whose `tokenizer_class` says so takes the pieces and forgets the model's own settings
//! (`LlamaTokenizer`); everything else follows those (`SpmConverter.build_tokenizer_from_spm_proto`).

mod proto;

use std::collections::{HashMap, HashSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use self::proto::{Kind, Model};

/// What stands for a space.
const SPACE: &str = "▁";
const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

/// A tokenizer in the form of the other files.
#[derive(Clone, Debug)]
pub(super) struct Converted {
    /// `tokenizer.json`.
    pub json: Value,
    /// `tokenizer_config.json` with what the model adds to it.
    pub config: Value,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Why a model cannot be converted.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// It is damaged.
    Malformed(String),
    /// It is of a kind that is converted in another way.
    Unsupported(String),
}

/// Converts the file `bytes` of a model with this `model_type` and `tokenizer_config.json`.
///
/// # Errors
/// A damaged file; a tokenizer class with ways of its own; words or characters as pieces.
pub(super) fn convert(
    bytes: &[u8],
    model_type: &str,
    config: Option<&Value>,
) -> Result<Converted, Fault> {
    if is_tiktoken(bytes) {
        let what = "it is a tiktoken vocabulary, not a SentencePiece model";
        return Err(Fault::Unsupported(what.to_owned()));
    }
    let model = Model::read(bytes)
        .map_err(|e| Fault::Malformed(format!("not a SentencePiece model: {e}")))?;
    let mut config = config.cloned().unwrap_or_else(|| json!({}));
    let class = config
        .get("tokenizer_class")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let class = class.strip_suffix("Fast").unwrap_or(class).to_owned();
    let plain = [
        "",
        "PreTrainedTokenizer",
        "TokenizersBackend",
        "LlamaTokenizer",
    ];
    if !plain.contains(&class.as_str()) {
        return Err(Fault::Unsupported(format!(
            "it is converted in ways of {class}'s own"
        )));
    }
    if !["llama", "mistral"].contains(&model_type) {
        return Err(Fault::Unsupported(format!(
            "it is read for llama and mistral, and this is a {model_type}"
        )));
    }
    if !matches!(model.kind, UNIGRAM | BPE) || model.space_behind {
        let what = "its pieces are words or characters, or have their space behind them";
        return Err(Fault::Unsupported(what.to_owned()));
    }
    let llama = class == "LlamaTokenizer" && model_type == "llama";
    let mut notes = Vec::new();
    let json = match llama && model.kind == BPE {
        true => as_llama(&model, &mut config),
        false => as_it_says(&model, &mut config),
    };
    if llama && model.kind == UNIGRAM {
        notes.push(
            "tokenizer.model: a unigram model, and read as one; transformers 5 reads it as byte-pair encoding when the \
             tokenizer_class is LlamaTokenizer"
                .to_owned(),
        );
    }
    Ok(Converted {
        json,
        config,
        notes,
    })
}

/// Lines of a token in base 64 and its number.
fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let Some((token, number)) = std::str::from_utf8(line)
        .ok()
        .and_then(|line| line.trim().split_once(' '))
    else {
        return false;
    };
    let base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/=".contains(&b);
    !token.is_empty() && token.bytes().all(base64) && number.parse::<u32>().is_ok()
}

/// The pieces as Llama's own class takes them.
fn as_llama(model: &Model, config: &mut Value) -> Value {
    let legacy = flag(config, "legacy").unwrap_or(false);
    let prefix = flag(config, "add_prefix_space").unwrap_or(true);
    for (name, token) in [
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("unk_token", "<unk>"),
    ] {
        default(config, name, token);
    }
    let texts: Vec<&str> = model
        .pieces
        .iter()
        .map(|piece| piece.text.as_str())
        .collect();
    let all = texts
        .iter()
        .enumerate()
        .map(|(id, text)| (*text, id))
        .collect();
    let scheme = match (prefix, legacy) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let bpe = Bpe {
        merges: joins(&texts, &all, |id| id as f64),
        vocab: texts.iter().map(|text| (*text).to_owned()).collect(),
        unk: Value::Null,
        byte_fallback: true,
        ignore_merges: false,
    };
    let user = model.pieces.iter().enumerate();
    let user = user.filter(|(_, piece)| matches!(piece.kind, Kind::Control | Kind::UserDefined));
    let added = user.map(|(id, piece)| added(id, &piece.text, piece.kind == Kind::Control));
    assemble(Parts {
        model: bpe.json(),
        added: added.collect(),
        normalizers: Vec::new(),
        pre_tokenizers: vec![metaspace(scheme)],
        byte_fallback: true,
        strip: prefix,
        fuse: true,
    })
}

/// The pieces with the settings that the model itself has, so that texts become what SentencePiece makes of them.
fn as_it_says(model: &Model, config: &mut Value) -> Value {
    let legacy = flag(config, "legacy").unwrap_or(true);
    for (name, (id, token)) in [
        ("bos_token", &model.bos),
        ("eos_token", &model.eos),
        ("unk_token", &model.unk),
    ] {
        if *id >= 0 {
            default(config, name, token);
        }
    }
    let texts = match model.kind {
        BPE => renamed(model, config),
        _ => model
            .pieces
            .iter()
            .map(|piece| piece.text.clone())
            .collect(),
    };
    if model.dummy_prefix {
        match_raw_text(config);
    }
    let of = |kind: Kind| {
        let pieces = model.pieces.iter().zip(&texts).enumerate();
        pieces
            .filter(move |(_, (piece, _))| piece.kind == kind)
            .map(|(id, (_, text))| (id, text.as_str()))
    };
    let user: Vec<&str> = of(Kind::UserDefined).map(|(_, text)| text).collect();
    let pieces = match model.kind {
        BPE => {
            let normal = of(Kind::Normal).map(|(id, text)| (text, id)).collect();
            let score = |id: usize| {
                -model
                    .pieces
                    .get(id)
                    .map_or(0.0, |piece| f64::from(piece.score))
            };
            let all: Vec<&str> = texts.iter().map(String::as_str).collect();
            let bpe = Bpe {
                merges: joins(&all, &normal, score),
                vocab: texts.clone(),
                unk: model.unk.1.as_str().into(),
                byte_fallback: model.byte_fallback,
                ignore_merges: !user.is_empty(),
            };
            bpe.json()
        }
        _ => json!({
            "type": "Unigram",
            "unk_id": model.unk.0,
            "vocab": texts.iter().zip(&model.pieces).map(|(text, piece)| json!([text, piece.score])).collect::<Vec<_>>(),
            "byte_fallback": model.byte_fallback,
        }),
    };
    let scheme = if legacy { "always" } else { "first" };
    let mut pre_tokenizers = Vec::new();
    if model.dummy_prefix {
        pre_tokenizers.push(metaspace(scheme));
    }
    if !user.is_empty() {
        // SentencePiece leaves such a piece whole, the longest first.
        let mut user = user;
        user.sort_by_key(|text| std::cmp::Reverse(text.chars().count()));
        let pattern: Vec<String> = user.into_iter().map(escape).collect();
        pre_tokenizers.push(json!({
            "type": "Split", "pattern": {"Regex": pattern.join("|")}, "behavior": "Isolated", "invert": false,
        }));
    }
    assemble(Parts {
        model: pieces,
        added: of(Kind::Control)
            .map(|(id, text)| added(id, text, true))
            .collect(),
        normalizers: normalizers(model, legacy),
        pre_tokenizers,
        byte_fallback: model.byte_fallback,
        strip: model.dummy_prefix,
        fuse: model.dummy_prefix || model.byte_fallback,
    })
}

fn normalizers(model: &Model, legacy: bool) -> Vec<Value> {
    let replace =
        |pattern: Value, to: &str| json!({"type": "Replace", "pattern": pattern, "content": to});
    let mut steps = Vec::new();
    if !model.charsmap.is_empty() {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&model.charsmap)}));
    }
    if model.remove_spaces {
        steps.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
        steps.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    if model.escape_spaces {
        steps.push(replace(json!({"String": " "}), SPACE));
    }
    if model.dummy_prefix && legacy {
        // The pre-tokenizer puts no space before a text that starts with one, SentencePiece does.
        steps.push(replace(
            json!({"Regex": format!(r"\A{SPACE}")}),
            &SPACE.repeat(2),
        ));
    }
    steps
}

/// The pieces' texts, with the names that `added_tokens_decoder` gives to some of them.
fn renamed(model: &Model, config: &Value) -> Vec<String> {
    let decoder = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    let names: HashMap<usize, &str> = decoder
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.trim().parse().ok()?, token.get("content")?.as_str()?)))
        .collect();
    let others = model
        .pieces
        .iter()
        .enumerate()
        .filter(|(id, _)| !names.contains_key(id));
    let kept: HashSet<&str> = others.map(|(_, piece)| piece.text.as_str()).collect();
    let texts = model.pieces.iter().enumerate().map(|(id, piece)| {
        let name = names.get(&id).filter(|name| !kept.contains(*name));
        name.map_or_else(|| piece.text.clone(), |name| (*name).to_owned())
    });
    texts.collect()
}

/// Added tokens are looked for in the text as it is, so that each part between them gets its own space.
fn match_raw_text(config: &mut Value) {
    let decoder = config
        .get_mut("added_tokens_decoder")
        .and_then(Value::as_object_mut);
    for (_, token) in decoder.into_iter().flatten() {
        if let Some(token) = token.as_object_mut() {
            token.insert("normalized".to_owned(), false.into());
        }
    }
}

fn flag(config: &Value, name: &str) -> Option<bool> {
    config.get(name).and_then(Value::as_bool)
}

fn default(config: &mut Value, name: &str, token: &str) {
    if let Some(map) = config.as_object_mut() {
        map.entry(name).or_insert_with(|| token.into());
    }
}

struct Bpe {
    vocab: Vec<String>,
    merges: Vec<Value>,
    unk: Value,
    byte_fallback: bool,
    ignore_merges: bool,
}

impl Bpe {
    fn json(self) -> Value {
        let vocab: Map<String, Value> = self
            .vocab
            .into_iter()
            .enumerate()
            .map(|(id, text)| (text, id.into()))
            .collect();
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": self.unk,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": self.byte_fallback,
            "ignore_merges": self.ignore_merges,
            "vocab": vocab,
            "merges": self.merges,
        })
    }
}

/// Every way to cut a piece into two pieces of `among`, in the order of `rank` of the whole, then of its number, then
/// the shortest first part first.
fn joins(texts: &[&str], among: &HashMap<&str, usize>, rank: impl Fn(usize) -> f64) -> Vec<Value> {
    let mut found: Vec<(f64, usize, usize)> = Vec::new();
    for (id, text) in texts
        .iter()
        .enumerate()
        .filter(|(id, text)| among.get(*text) == Some(id))
    {
        let cuts = text.char_indices().skip(1).map(|(at, _)| at);
        let both = cuts.filter(|at| {
            let (left, right) = text.split_at(*at);
            among.contains_key(left) && among.contains_key(right)
        });
        found.extend(both.map(|at| (rank(id), id, at)));
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let pairs = found
        .into_iter()
        .filter_map(|(_, id, at)| texts.get(id)?.split_at_checked(at));
    pairs.map(|(left, right)| json!([left, right])).collect()
}

struct Parts {
    model: Value,
    added: Vec<Value>,
    normalizers: Vec<Value>,
    pre_tokenizers: Vec<Value>,
    byte_fallback: bool,
    /// Whether decoding drops the space in front.
    strip: bool,
    fuse: bool,
}

fn assemble(parts: Parts) -> Value {
    let mut decoders =
        vec![json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})];
    if parts.byte_fallback {
        decoders.push(json!({"type": "ByteFallback"}));
    }
    if parts.fuse {
        decoders.push(json!({"type": "Fuse"}));
    }
    if parts.strip {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let sequence = |key: &str, steps: Vec<Value>| match steps.is_empty() {
        true => Value::Null,
        false => json!({"type": "Sequence", key: steps}),
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": parts.added,
        "normalizer": sequence("normalizers", parts.normalizers),
        "pre_tokenizer": sequence("pretokenizers", parts.pre_tokenizers),
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": parts.model,
    })
}

fn added(id: usize, text: &str, special: bool) -> Value {
    json!({
        "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    })
}

fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false})
}

/// A text as a pattern that matches it alone.
fn escape(text: &str) -> String {
    let mut pattern = String::new();
    for character in text.chars() {
        if r"\.+*?()|[]{}^$#&-~".contains(character) {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_sentence_piece_model_says_what_it_is() {
        let fault =
            |bytes: &[u8], kind: &str, config: Value| match convert(bytes, kind, Some(&config)) {
                Ok(_) => String::new(),
                Err(Fault::Malformed(text) | Fault::Unsupported(text)) => text,
            };
        assert!(fault(b"IQ== 0\nIg== 1\n", "llama", json!({})).contains("tiktoken"));
        assert!(fault(b"\x0A\x05ab", "llama", json!({})).contains("in the middle"));
        assert!(fault(b"", "llama", json!({})).contains("no pieces"));
        let small = b"\x0A\x05\x0A\x03abc";
        assert_eq!(fault(small, "llama", json!({})), "");
        assert!(fault(small, "qwen2", json!({})).contains("qwen2"));
        assert!(
            fault(
                small,
                "llama",
                json!({"tokenizer_class": "GemmaTokenizerFast"})
            )
            .contains("GemmaTokenizer")
        );
        for end in 0..small.len() {
            for byte in 0..=255 {
                let mut changed = small.get(..end).unwrap_or_default().to_vec();
                changed.push(byte);
                changed.extend(small.get(end + 1..).unwrap_or_default());
                fault(&changed, "llama", json!({}));
            }
        }
    }
}

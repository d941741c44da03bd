//! GGUF's tokenizer metadata, from `tokenizer.json` and its companions: the inverse of `tokenizer`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::tokenizer::{
    BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, is_llama3, joins, normalizer,
    pre_tokenizer,
};
use super::write::Metadata;

/// What a Hugging Face directory says of its tokenizer.
pub(crate) struct Described<'a> {
    /// `tokenizer.json`
    pub tokenizer: &'a Value,
    /// `tokenizer_config.json`
    pub config: Option<&'a Value>,
    /// Ids of `config.json`: at which texts begin, end (all of them), are filled up.
    pub bos: Option<u32>,
    pub eos: &'a [u32],
    pub pad: Option<u32>,
    /// The chat template.
    pub template: Option<&'a str>,
    /// Rows of the embedding.
    pub rows: usize,
}

/// The names under which pre-tokenizers are written, the most usual first where two are the same.
const WRITTEN: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

/// Appends `tokenizer.*`. What llama.cpp cannot do goes to `problems`, what it does otherwise to `notes`. Gives
/// the kind of tokenizer in words.
pub(crate) fn describe(
    from: &Described<'_>,
    to: &mut Metadata,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> String {
    let model = &from.tokenizer["model"];
    // Older files leave the type out.
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" {
        problems.push(format!(
            "tokenizer.json: a model of type {kind}; byte-pair encoding (BPE) is written"
        ));
        return kind.to_owned();
    }
    for (key, harmless) in [
        ("continuing_subword_prefix", ""),
        ("end_of_word_suffix", ""),
    ] {
        if model[key].as_str().is_some_and(|text| text != harmless) {
            problems.push(format!("tokenizer.json: model.{key} is {}", model[key]));
        }
    }
    let list = tokens(from, problems, notes);
    let sentence_piece = model["byte_fallback"] == Value::Bool(true);
    let said = if sentence_piece {
        pieces(from, &list, to, problems, notes)
    } else {
        byte_level(from, &list, to, problems, notes)
    };
    to.strings("tokenizer.ggml.tokens", &list.texts);
    let kinds: Vec<i32> = list.kinds.iter().map(|kind| *kind as i32).collect();
    to.i32s("tokenizer.ggml.token_type", &kinds);
    special(from, &list, to, problems, notes);
    if let Some(template) = from.template {
        to.string("tokenizer.chat_template", template);
    }
    said
}

/// Texts and kinds by id, and ids by text.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i64>,
    ids: HashMap<String, usize>,
}

fn tokens(from: &Described<'_>, problems: &mut Vec<String>, notes: &mut Vec<String>) -> Tokens {
    let mut texts: Vec<Option<String>> = vec![None; from.rows];
    let mut kinds = vec![NORMAL; from.rows];
    let mut ids = HashMap::new();
    let mut put = |text: &str, id: &Value, kind: i64| {
        let place = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let slots = place.and_then(|id| Some((id, texts.get_mut(id)?, kinds.get_mut(id)?)));
        let Some((id, slot, kind_slot)) = slots else {
            problems.push(format!(
                "tokenizer.json: token {text:?} has the id {id}, and the embedding has {} rows",
                from.rows
            ));
            return;
        };
        *slot = Some(text.to_owned());
        *kind_slot = kind;
        ids.insert(text.to_owned(), id);
    };
    let model = &from.tokenizer["model"];
    let unknown = model["unk_token"].as_str();
    let fallback = model["byte_fallback"] == Value::Bool(true);
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let kind = match text.as_str() {
            byte if fallback && is_byte(byte) => BYTE,
            text if fallback && Some(text) == unknown => UNKNOWN,
            _ => NORMAL,
        };
        put(text, id, kind);
    }
    let mut trimming: usize = 0;
    for added in from.tokenizer["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let text = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"] == Value::Bool(true) {
            _ if fallback && Some(text) == unknown => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        put(text, &added["id"], kind);
        let set = |key: &str| added[key] == Value::Bool(true);
        let trims = set("lstrip") || set("rstrip") || set("single_word");
        trimming = trimming.saturating_add(usize::from(trims));
    }
    if trimming > 0 {
        notes.push(format!(
            "{trimming} added tokens take spaces beside them along or want to stand alone (lstrip, rstrip, \
             single_word), which GGUF cannot say"
        ));
    }
    let spare = texts.iter().filter(|text| text.is_none()).count();
    if spare > 0 {
        notes.push(format!(
            "{spare} rows of the embedding have no token; they are written as unused"
        ));
    }
    let named = texts.into_iter().zip(&mut kinds).enumerate();
    let texts: Vec<String> = named
        .map(|(id, (text, kind))| match text {
            Some(text) => text,
            None => {
                *kind = UNUSED;
                format!("[PAD{id}]")
            }
        })
        .collect();
    Tokens { texts, kinds, ids }
}

/// `<0x0A>`
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}

/// The merges as pairs; they are texts or pairs in the file.
fn merges(model: &Value, problems: &mut Vec<String>) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for (line, merge) in model["merges"].as_array().into_iter().flatten().enumerate() {
        let pair = match merge {
            Value::String(text) => text
                .split_once(' ')
                .map(|(a, b)| (a.to_owned(), b.to_owned())),
            Value::Array(parts) => match parts.as_slice() {
                [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
                _ => None,
            },
            _ => None,
        };
        match pair {
            Some(pair) => pairs.push(pair),
            None => {
                problems.push(format!(
                    "tokenizer.json: merge {line} is {merge}, not two tokens"
                ));
                break;
            }
        }
    }
    pairs
}

/// A pre-tokenizer without what changes offsets alone.
fn plain(step: &Value) -> Value {
    match step {
        Value::Object(map) => {
            let kept = map.iter().filter(|(key, _)| *key != "trim_offsets");
            kept.map(|(key, value)| (key.clone(), plain(value)))
                .collect()
        }
        Value::Array(items) => items.iter().map(plain).collect(),
        other => other.clone(),
    }
}

fn byte_level(
    from: &Described<'_>,
    list: &Tokens,
    to: &mut Metadata,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> String {
    let (model, own) = (&from.tokenizer["model"], &from.tokenizer["pre_tokenizer"]);
    let same = |name: &&&str| pre_tokenizer(Some(name)).is_some_and(|p| plain(&p) == plain(own));
    let pre = match WRITTEN.iter().find(same) {
        Some(pre) => *pre,
        None => {
            problems.push(format!(
                "tokenizer.json: pre_tokenizer {own} is none of those written ({})",
                WRITTEN.join(", ")
            ));
            ""
        }
    };
    let stated = &from.tokenizer["normalizer"];
    if !stated.is_null() && *stated != normalizer(Some(pre)) {
        problems.push(format!(
            "tokenizer.json: normalizer {stated}; llama.cpp takes texts as they are"
        ));
    }
    let ignores = model["ignore_merges"] == Value::Bool(true);
    match (ignores, is_llama3(Some(pre))) {
        (true, false) => problems.push(format!(
            "tokenizer.json: ignore_merges, which llama.cpp does with llama-bpe alone, not with '{pre}'"
        )),
        (false, true) => notes.push(
            "llama.cpp takes a whole word that is a token as that token (ignore_merges), which this \
             tokenizer does not"
                .to_owned(),
        ),
        _ => {}
    }
    // A space within a token is spelled in bytes, as every other character that is not printed.
    let spelled = |part: &str| part.replace(' ', "\u{120}");
    let pairs = merges(model, problems);
    for (a, b) in &pairs {
        if !list.ids.contains_key(&format!("{a}{b}")) {
            problems.push(format!(
                "tokenizer.json: no token for the merge of {a:?} and {b:?}"
            ));
            break;
        }
    }
    let joined: Vec<String> = pairs
        .iter()
        .map(|(a, b)| format!("{} {}", spelled(a), spelled(b)))
        .collect();
    to.string("tokenizer.ggml.model", "gpt2");
    to.string("tokenizer.ggml.pre", pre);
    to.strings("tokenizer.ggml.merges", &joined);
    format!("gpt2 (byte-level), pre-tokenizer {pre}")
}

/// SentencePiece's pieces, with scores that give the file's merges.
fn pieces(
    from: &Described<'_>,
    list: &Tokens,
    to: &mut Metadata,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> String {
    let pairs = merges(&from.tokenizer["model"], problems);
    // The better a piece's score, the earlier its merges; pieces that come of no merge stand behind.
    let mut rank: HashMap<usize, usize> = HashMap::new();
    let (mut last, mut scattered) = (None, false);
    for (a, b) in &pairs {
        let Some(&whole) = list.ids.get(&format!("{a}{b}")) else {
            problems.push(format!(
                "tokenizer.json: no token for the merge of {a:?} and {b:?}"
            ));
            break;
        };
        let next = rank.len();
        scattered |= last != Some(whole) && rank.contains_key(&whole);
        rank.entry(whole).or_insert(next);
        last = Some(whole);
    }
    let mut behind = rank.len();
    let scores: Vec<f64> = (list.kinds.iter().enumerate())
        .map(|(id, kind)| match (rank.get(&id), *kind) {
            (Some(rank), _) => -(*rank as f64),
            (None, NORMAL) => {
                let score = -(behind as f64);
                behind = behind.saturating_add(1);
                score
            }
            (None, _) => 0.0,
        })
        .collect();
    let implied: HashSet<(usize, usize)> = joins(&list.texts, &list.kinds, &scores)
        .into_iter()
        .collect();
    let is_normal = |id: &&usize| list.kinds.get(**id) == Some(&NORMAL);
    let normal = |text: &String| list.ids.get(text).filter(is_normal);
    let stated: HashSet<(usize, usize)> = pairs
        .iter()
        .filter_map(|(a, b)| Some((*normal(a)?, *normal(b)?)))
        .collect();
    if scattered || implied != stated {
        problems.push(
            "tokenizer.json: its merges are not those of SentencePiece (every way to cut a piece, pieces in the \
             order of their scores), so no scores stand for them"
                .to_owned(),
        );
    }
    let scores: Vec<f32> = scores.iter().map(|score| *score as f32).collect();
    to.string("tokenizer.ggml.model", "llama");
    to.string("tokenizer.ggml.pre", "default");
    to.f32s("tokenizer.ggml.scores", &scores);
    to.bool(
        "tokenizer.ggml.add_space_prefix",
        space_prefix(from.tokenizer, problems, notes),
    );
    "llama (SentencePiece)".to_owned()
}

/// Whether a space is put before a text, from the normaliser's or the pre-tokenizer's words for it.
fn space_prefix(tokenizer: &Value, problems: &mut Vec<String>, notes: &mut Vec<String>) -> bool {
    let (normal, pre) = (&tokenizer["normalizer"], &tokenizer["pre_tokenizer"]);
    let steps = match normal["type"].as_str() {
        Some("Sequence") => normal["normalizers"]
            .as_array()
            .cloned()
            .unwrap_or_default(),
        Some(_) => vec![normal.clone()],
        None => Vec::new(),
    };
    let mut prefix = false;
    for step in &steps {
        match (step["type"].as_str(), &step["prepend"], &step["content"]) {
            (Some("Prepend"), prepend, _) if prepend == "▁" => prefix = true,
            (Some("Replace"), _, to)
                if to == "▁" && step.pointer("/pattern/String") == Some(&" ".into()) => {}
            _ => problems.push(format!(
                "tokenizer.json: normalizer {step}; llama.cpp prepends ▁ and writes it for spaces, no more"
            )),
        }
    }
    match (pre["type"].as_str(), pre["prepend_scheme"].as_str()) {
        (None, _) => {}
        (Some("Metaspace"), Some("never")) => {}
        (Some("Metaspace"), Some("first")) => {
            prefix = true;
            notes.push(
                "the tokenizer puts a space before a text alone, llama.cpp also behind a special token"
                    .to_owned(),
            );
        }
        (Some("Metaspace"), _) => prefix = true,
        (Some(other), _) => {
            problems.push(format!("tokenizer.json: a pre_tokenizer of type {other}"));
        }
    }
    prefix
}

/// Ids of the special tokens and whether they are added to every text.
fn special(
    from: &Described<'_>,
    list: &Tokens,
    to: &mut Metadata,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let named = |key: &str| {
        let entry = from.config?.get(key)?;
        let text = entry.as_str().or_else(|| entry["content"].as_str())?;
        u32::try_from(*list.ids.get(text)?).ok()
    };
    let bos = named("bos_token").or(from.bos);
    let eos = named("eos_token").or(from.eos.first().copied());
    // Generation stops at any of them; llama.cpp has three names for such tokens.
    let mut ends: Vec<u32> = from
        .eos
        .iter()
        .copied()
        .filter(|id| Some(*id) != eos)
        .collect();
    ends.dedup();
    if ends.len() > 2 {
        notes.push(format!(
            "of {} tokens that end an answer, three are written (eos, eot, eom)",
            ends.len().saturating_add(1)
        ));
    }
    let mut ends = ends.into_iter();
    for (key, id) in [
        ("bos", bos),
        ("eos", eos),
        ("eot", ends.next()),
        ("eom", ends.next()),
        ("unknown", named("unk_token")),
        ("padding", named("pad_token").or(from.pad)),
    ] {
        match id {
            Some(id) if id as usize >= from.rows => problems.push(format!(
                "the {key} token has the id {id}, and the embedding has {} rows",
                from.rows
            )),
            Some(id) => to.u32(&format!("tokenizer.ggml.{key}_token_id"), id),
            None => {}
        }
    }
    let [first, last] = template_ends(&from.tokenizer["post_processor"], list);
    let stated = |key: &str| from.config?.get(key)?.as_bool();
    let begins = stated("add_bos_token").unwrap_or(first.is_some() && first == bos);
    let ends = stated("add_eos_token").unwrap_or(last.is_some() && last == eos);
    for (what, token, own) in [("begins", first, bos), ("ends", last, eos)] {
        if token.is_some() && token != own {
            problems.push(format!(
                "tokenizer.json: post_processor {what} every text with a token that is not the {} token",
                if what == "begins" { "bos" } else { "eos" }
            ));
        }
    }
    to.bool("tokenizer.ggml.add_bos_token", begins);
    to.bool("tokenizer.ggml.add_eos_token", ends);
}

/// The tokens that a template puts before and behind a text.
fn template_ends(processor: &Value, list: &Tokens) -> [Option<u32>; 2] {
    if let Some(steps) = processor["processors"].as_array() {
        let template = |step: &&Value| step["type"] == "TemplateProcessing";
        let found = steps.iter().find(template);
        return found.map_or([None; 2], |step| template_ends(step, list));
    }
    let Some(single) = processor["single"].as_array() else {
        return [None; 2];
    };
    let id = |part: Option<&Value>| {
        let text = part?.pointer("/SpecialToken/id")?.as_str()?;
        u32::try_from(*list.ids.get(text)?).ok()
    };
    [id(single.first()), id(single.last())]
}

//! Added tokens: a repository may declare them in four files, of which `tokenizer.json` is one only.
//!
//! Which file counts and what a token is like follow transformers 5 (`_from_pretrained` and
//! `TokenizersBackend.__init__`). Two things differ: transformers gives tokens the next free ids whatever the
//! files say, which is an error here; and a special token that no file declares gets a row of its own only
//! where the embedding has one.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::guard::{damaged, guarded};
use crate::error::DataError;

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";
const TOKENIZER: &str = "tokenizer.json";

/// transformers 4's name for the further special tokens.
const OLDER: &str = "additional_special_tokens";

/// The named special tokens that every tokenizer may have, in the order in which they are added.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What the files beside `tokenizer.json` say of tokens.
#[derive(Clone, Copy, Default)]
pub(super) struct Files<'a> {
    /// `added_tokens` of `tokenizer.json`.
    pub own: Option<&'a Value>,
    /// `tokenizer_config.json`.
    pub config: Option<&'a Value>,
    /// `special_tokens_map.json`.
    pub map: Option<&'a Value>,
    /// `added_tokens.json`.
    pub added: Option<&'a Value>,
    /// Rows of the embedding.
    pub rows: Option<usize>,
}

/// What became of them.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// (`eos_token`, `</s>`), …
    pub named: Vec<(String, String)>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// A token with the id that a file gives it.
struct Declared {
    id: u32,
    token: AddedToken,
    file: &'static str,
}

/// A token that has a name, or is one of the further special tokens.
struct Named {
    name: String,
    content: String,
    /// `None` for a mere string.
    token: Option<AddedToken>,
    file: &'static str,
}

/// Adds what the other files declare to the tokenizer of `tokenizer.json`.
///
/// # Errors
/// A field of the wrong shape, a token with two ids, BOS or EOS that is no token and has no row.
pub(super) fn add(
    inner: &mut tokenizers::Tokenizer,
    files: Files<'_>,
) -> Result<Tokens, DataError> {
    let in_config = declared_in_config(files.config)?;
    let in_added = declared_in_added(files.added)?;
    let own = declared_in_tokenizer(files.own);
    let legacy = in_config.is_none();
    let (mut named, extra) = special(files, legacy)?;

    // Declarations, the strongest last: they are compared by id, and added in its order.
    // The older name in the map comes too late for transformers to make those of added_tokens.json special.
    let late = |special: &&Named| special.file == MAP && special.name.starts_with(OLDER);
    let contents = named
        .iter()
        .chain(extra.iter().filter(|special| !late(special)));
    let contents: HashSet<&str> = contents.map(|special| special.content.as_str()).collect();
    let counted: Vec<AddedToken> = match &in_config {
        Some(declared) => by_id(declared.iter()),
        None => {
            let added = in_added.iter().map(|declared| {
                let special = contents.contains(declared.token.content.as_str());
                Declared {
                    token: AddedToken::from(declared.token.content.as_str(), special),
                    ..*declared
                }
            });
            let added: Vec<_> = added.collect();
            by_id(added.iter().chain(&own))
        }
    };
    let by_content: HashMap<&str, &AddedToken> = counted
        .iter()
        .map(|token| (token.content.as_str(), token))
        .collect();
    for special in &mut named {
        if let Some(token) = by_content.get(special.content.as_str()) {
            special.token = Some((*token).clone());
        }
    }

    let own_tokens = inner.get_added_vocabulary().get_vocab().keys();
    let counted_tokens = counted.iter().map(|token| &token.content);
    let mut known: HashSet<String> = own_tokens.chain(counted_tokens).cloned().collect();
    let mut list = counted;
    let mut undeclared: Vec<&Named> = Vec::new();
    for special in named.iter().chain(&extra) {
        if special.content.is_empty() || !known.insert(special.content.clone()) {
            continue;
        }
        let plain = AddedToken::from(special.content.as_str(), true);
        list.push(special.token.clone().unwrap_or(plain));
        if inner.token_to_id(&special.content).is_none() {
            undeclared.push(special);
        }
    }
    let names: HashSet<&str> = named
        .iter()
        .map(|special| special.content.as_str())
        .collect();
    for token in &mut list {
        token.special |= names.contains(token.content.as_str());
    }

    let mut notes = Vec::new();
    let lost = without_rows(inner, &list, &undeclared, files.rows, &mut notes)?;
    list.retain(|token| !lost.contains(token.content.as_str()));
    guarded(|| inner.add_tokens(list).map(|_| ()))?;

    let declared = in_config.iter().flatten().chain(&in_added);
    same_ids(inner, declared.chain(&own), &mut notes)?;
    for special in undeclared {
        if let Some(id) = inner.token_to_id(&special.content) {
            notes.push(format!(
                "{}: {} names {:?}, which no file declares; it is token {id} now, as in transformers, with \
                 whatever the model has in that row",
                special.file, special.name, special.content
            ));
        }
    }
    let named = named
        .into_iter()
        .map(|special| (special.name, special.content));
    Ok(Tokens {
        named: named.collect(),
        notes,
    })
}

/// Tokens in the order of their ids, the last of those with one id.
fn by_id<'a>(declared: impl Iterator<Item = &'a Declared>) -> Vec<AddedToken> {
    let all: std::collections::BTreeMap<u32, &AddedToken> = declared
        .map(|declared| (declared.id, &declared.token))
        .collect();
    all.into_values().cloned().collect()
}

/// Of the special tokens that nothing declares, those that the embedding has no row for: they stay plain text.
///
/// # Errors
/// Where one of them is BOS or EOS: nothing could be trained to begin or end.
fn without_rows(
    inner: &tokenizers::Tokenizer,
    list: &[AddedToken],
    undeclared: &[&Named],
    rows: Option<usize>,
    notes: &mut Vec<String>,
) -> Result<HashSet<String>, DataError> {
    let Some(rows) = rows else {
        return Ok(HashSet::new());
    };
    let new = |token: &&AddedToken| inner.token_to_id(&token.content).is_none();
    let declared = list
        .iter()
        .filter(new)
        .count()
        .saturating_sub(undeclared.len());
    let next = next_id(inner).saturating_add(declared);
    let mut lost = HashSet::new();
    for (i, special) in undeclared.iter().enumerate() {
        if next.saturating_add(i) < rows {
            continue;
        }
        if ["bos_token", "eos_token"].contains(&special.name.as_str()) {
            return Err(DataError::SpecialToken {
                file: special.file,
                field: special.name.clone(),
                token: special.content.clone(),
                rows,
            });
        }
        notes.push(format!(
            "{}: {} names {:?}, which is no token, and the embedding's {rows} rows have none for it: it is \
             plain text",
            special.file, special.name, special.content
        ));
        lost.insert(special.content.clone());
    }
    Ok(lost)
}

/// The id that the next new token gets.
fn next_id(inner: &tokenizers::Tokenizer) -> usize {
    let base = inner.get_vocab_size(false);
    let added = inner.get_added_vocabulary().get_added_tokens_decoder();
    let largest = added.keys().max().map(|id| *id as usize);
    largest.map_or(base, |largest| base.max(largest.saturating_add(1)))
}

/// Compares what files say with what tokens have become.
///
/// # Errors
/// Every token for which a file names another id.
fn same_ids<'a>(
    inner: &tokenizers::Tokenizer,
    declared: impl Iterator<Item = &'a Declared>,
    notes: &mut Vec<String>,
) -> Result<(), DataError> {
    let mut wrong = BTreeSet::new();
    let mut moved = Vec::new();
    for declared in declared {
        let (content, id) = (&declared.token.content, declared.id);
        let found = inner.token_to_id(content);
        if found == Some(id) || content.is_empty() {
            continue;
        }
        let found = match found {
            Some(found) => format!("{found} by {TOKENIZER}"),
            None => "none".to_owned(),
        };
        // The library and transformers let the vocabulary decide over tokenizer.json's own list.
        if declared.file == TOKENIZER {
            moved.push(format!("{content:?} {id} is {found}"));
        } else {
            wrong.insert(format!(
                "{content:?} has id {id} by {}, {found}",
                declared.file
            ));
        }
    }
    if let Some(first) = moved.first() {
        let more = moved.len().saturating_sub(1);
        notes.push(format!(
            "{TOKENIZER}: tokens have other ids by its vocabulary than by its added_tokens, which give way: \
             {first}{}",
            if more > 0 { format!(", and {more} more") } else { String::new() }
        ));
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(DataError::TokenIds {
            wrong: wrong.into_iter().collect(),
        }),
    }
}

/// `added_tokens_decoder`, where the file has it.
fn declared_in_config(config: Option<&Value>) -> Result<Option<Vec<Declared>>, DataError> {
    const FIELD: &str = "added_tokens_decoder";
    let map = match config.and_then(|config| config.get(FIELD)) {
        None => return Ok(None),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(wrong(CONFIG, FIELD, "must be an object of tokens by id")),
    };
    let declared = map.iter().map(|(id, token)| {
        let at = format!("{FIELD}.{id}");
        let id = id
            .trim()
            .parse()
            .map_err(|_| wrong(CONFIG, &at, "is no token id"))?;
        let Value::Object(fields) = token else {
            return Err(wrong(CONFIG, &at, "must be an object with `content`"));
        };
        Ok(Declared {
            id,
            token: added_token(fields, None, CONFIG, &at)?,
            file: CONFIG,
        })
    });
    declared.collect::<Result<_, _>>().map(Some)
}

/// `{token: id}`.
fn declared_in_added(added: Option<&Value>) -> Result<Vec<Declared>, DataError> {
    let map = match added {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(_) => {
            return Err(wrong(
                ADDED,
                "the file",
                "must be an object of ids by token",
            ));
        }
    };
    let declared = map.iter().map(|(content, id)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = number
            .ok_or_else(|| wrong(ADDED, content, &format!("must be a token id, not {id}")))?;
        Ok(Declared {
            id,
            token: AddedToken::from(content.as_str(), false),
            file: ADDED,
        })
    });
    declared.collect()
}

/// The list in `tokenizer.json`, which the library has read already.
fn declared_in_tokenizer(list: Option<&Value>) -> Vec<Declared> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    let declared = list.filter_map(|token| {
        let fields = token.as_object()?;
        let id = fields.get("id")?.as_u64()?;
        Some(Declared {
            id: u32::try_from(id).ok()?,
            token: added_token(fields, None, TOKENIZER, "added_tokens").ok()?,
            file: TOKENIZER,
        })
    });
    declared.collect()
}

/// The named special tokens, and those without a name of their own. `special_tokens_map.json` counts, and wins,
/// where the configuration does not declare its tokens (`legacy`).
fn special(files: Files<'_>, legacy: bool) -> Result<(Vec<Named>, Vec<Named>), DataError> {
    let empty = Map::new();
    let object = |value: Option<&'_ Value>, file| match value {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map.clone())),
        Some(_) => Err(wrong(file, "the file", "must be an object")),
    };
    let config = object(files.config, CONFIG)?.unwrap_or_else(|| empty.clone());
    let map = object(files.map, MAP)?.filter(|_| legacy).unwrap_or(empty);
    let further = |name: &&String| name.ends_with("_token") && !NAMES.contains(&name.as_str());
    let other = config
        .iter()
        .chain(&map)
        .filter(|(_, value)| value.is_string());
    let mut names: Vec<&str> = NAMES.to_vec();
    for name in other.map(|(name, _)| name).filter(further) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut named = Vec::new();
    for name in names {
        let (file, value) = match map.get(name) {
            Some(value) => (MAP, Some(value)),
            None => (CONFIG, config.get(name)),
        };
        match value {
            None | Some(Value::Null) => {}
            Some(value) => named.push(one(value, name, file)?),
        }
    }
    let mut extra = Vec::new();
    // transformers 5's name, and 4's.
    for (file, from) in [(CONFIG, &config), (MAP, &map)] {
        let fields = ["extra_special_tokens", OLDER];
        // The older name in the map gives way to either in the configuration.
        let hidden = |name: &str| file == MAP && name == fields[1] && !extra.is_empty();
        let given =
            |name: &&str| !hidden(name) && from.get(*name).is_some_and(|value| !is_nothing(value));
        let Some(field) = fields.into_iter().find(given) else {
            continue;
        };
        match from.get(field) {
            Some(Value::Array(list)) => {
                for (i, value) in list.iter().enumerate() {
                    extra.push(one(value, &format!("{field}[{i}]"), file)?);
                }
            }
            // Tokens with names of the model's own.
            Some(Value::Object(tokens)) => {
                for (name, value) in tokens {
                    named.push(one(value, name, file)?);
                }
            }
            _ => return Err(wrong(file, field, "must be a list of tokens")),
        }
    }
    Ok((named, extra))
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// A token as a string, or as transformers serialises an `AddedToken`.
fn one(value: &Value, name: &str, file: &'static str) -> Result<Named, DataError> {
    let (content, token) = match value {
        Value::String(content) => (content.clone(), None),
        Value::Object(fields) => {
            let token = added_token(fields, (file == MAP).then_some(true), file, name)?;
            (token.content.clone(), Some(token))
        }
        _ => {
            return Err(wrong(
                file,
                name,
                "must be a string or an AddedToken object",
            ));
        }
    };
    Ok(Named {
        name: name.to_owned(),
        content,
        token,
        file,
    })
}

/// The fields of an `AddedToken`; what is left out is as Python's constructor has it.
fn added_token(
    fields: &Map<String, Value>,
    special: Option<bool>,
    file: &'static str,
    at: &str,
) -> Result<AddedToken, DataError> {
    let Some(Value::String(content)) = fields.get("content") else {
        return Err(wrong(file, at, "has no text in `content`"));
    };
    let flag = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(wrong(
            file,
            &format!("{at}.{name}"),
            "must be true or false",
        )),
    };
    let special = special.or(flag("special")?).unwrap_or(false);
    Ok(AddedToken {
        content: content.clone(),
        single_word: flag("single_word")?.unwrap_or(false),
        lstrip: flag("lstrip")?.unwrap_or(false),
        rstrip: flag("rstrip")?.unwrap_or(false),
        normalized: flag("normalized")?.unwrap_or(!special),
        special,
    })
}

fn wrong(file: &'static str, field: &str, detail: &str) -> DataError {
    match file {
        TOKENIZER => damaged(&format!("`{field}` {detail}")),
        file => DataError::TokenizerConfig {
            file,
            field: field.to_owned(),
            detail: detail.to_owned(),
        },
    }
}

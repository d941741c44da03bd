//! The tokenizer: text to ids with offsets, ids to text, special tokens and the chat template.

mod added;
#[cfg(test)]
mod added_tests;
mod guard;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::error::DataError;
use crate::files::sha256_hex;
use crate::message::Message;

use self::guard::{damaged, guarded};

/// End-of-turn tokens of published chat templates, for models whose `eos_token` is another one.
const END_OF_TURN_TOKENS: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
];

/// A tokenizer with its special tokens and chat template.
///
/// Truncation and padding configured in `tokenizer.json` are switched off: a row's length is decided
/// by the data specification alone.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special_tokens: Vec<(String, String)>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    pad_id: Option<u32>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    special_ids: Vec<u32>,
    end_of_turn_ids: Vec<u32>,
    vocab_size: usize,
    /// Ids from here on have no row in the embedding.
    rows: Option<usize>,
    chat_template: Option<ChatTemplate>,
    template_arguments: Map<String, Value>,
    notes: Vec<String>,
    sha256: String,
    /// Why there is no other, for one that stands in.
    missing: Option<String>,
}

/// The files of a repository that make up its tokenizer, parsed but for the first.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// The bytes of `tokenizer.json`.
    pub tokenizer_json: &'a [u8],
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a Value>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a Value>,
    /// `added_tokens.json`.
    pub added_tokens: Option<&'a Value>,
    /// A chat template that takes precedence over the configuration's.
    pub chat_template: Option<&'a str>,
    /// Rows of the model's embedding, where they are known: no text gives an id beyond them.
    pub embedding_rows: Option<usize>,
}

/// Token ids with the byte range of the text each of them covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte ranges into the text, one per id; empty for a token that is not in the text.
    pub offsets: Vec<Range<usize>>,
}

impl From<&tokenizers::Encoding> for Encoded {
    fn from(encoding: &tokenizers::Encoding) -> Self {
        let offsets = encoding.get_offsets().iter();
        Self {
            ids: encoding.get_ids().to_vec(),
            offsets: offsets.map(|&(start, end)| start..end).collect(),
        }
    }
}

impl Tokenizer {
    /// A tokenizer from the bytes of `tokenizer.json`, the parsed `tokenizer_config.json`, and a chat
    /// template that takes precedence over the one in the configuration.
    ///
    /// # Errors
    /// Where one of them is malformed; a template error names the template's line.
    pub fn from_parts(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&Value>,
        chat_template: Option<&str>,
    ) -> Result<Self, DataError> {
        Self::from_files(&TokenizerFiles {
            tokenizer_json,
            tokenizer_config,
            chat_template,
            ..TokenizerFiles::default()
        })
    }

    /// A tokenizer from all the files that say something of it. Tokens may be declared in any of them;
    /// `added_tokens_decoder` in the configuration makes the two older files count for nothing, but for
    /// contradictions.
    ///
    /// # Errors
    /// Where one of them is malformed or they contradict each other; a template error names the template's line.
    pub fn from_files(files: &TokenizerFiles<'_>) -> Result<Self, DataError> {
        let bytes = files.tokenizer_json;
        let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let mut json: Value = serde_json::from_slice(bytes)
            .map_err(|error| damaged(&format!("it is not valid JSON: {error}")))?;
        guard::check(&json)?;
        prepare(&mut json);
        let own = json.get("added_tokens").cloned();
        let mut inner: tokenizers::Tokenizer = guarded(|| serde_json::from_value(json))?;
        let tokens = added::add(
            &mut inner,
            added::Files {
                own: own.as_ref(),
                config: files.tokenizer_config,
                map: files.special_tokens_map,
                added: files.added_tokens,
                rows: files.embedding_rows,
            },
        )?;
        let special_tokens = tokens.named;
        let id_of = |name: &str| {
            special_tokens
                .iter()
                .find(|(n, _)| n == name)
                .and_then(|(_, token)| inner.token_to_id(token))
        };
        let (bos_id, eos_id, pad_id) = (id_of("bos_token"), id_of("eos_token"), id_of("pad_token"));

        let added = inner.get_added_tokens_decoder();
        let mut special_ids: Vec<u32> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .chain([bos_id, eos_id, pad_id].into_iter().flatten())
            .collect();
        special_ids.sort_unstable();
        special_ids.dedup();
        // Ids may have gaps, so the size is the largest id + 1: what an embedding must hold.
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab
            .values()
            .max()
            .map_or(0, |id| (*id as usize).saturating_add(1));

        let template_source = match files.chat_template {
            Some(source) => Some(source.to_owned()),
            None => default_template(files.tokenizer_config)?,
        };
        let chat_template = template_source
            .map(|source| ChatTemplate::new(&source, &special_tokens))
            .transpose()?;

        let mut tokenizer = Self {
            inner,
            special_tokens,
            bos_id,
            eos_id,
            pad_id,
            add_bos: flag(files.tokenizer_config, "add_bos_token")?,
            add_eos: flag(files.tokenizer_config, "add_eos_token")?,
            special_ids,
            end_of_turn_ids: Vec::new(),
            vocab_size,
            rows: files.embedding_rows,
            chat_template,
            template_arguments: Map::new(),
            notes: tokens.notes,
            sha256: sha256_hex(files.tokenizer_json),
            missing: None,
        };
        tokenizer.end_of_turn_ids = tokenizer.find_end_of_turn_ids();
        Ok(tokenizer)
    }

    /// A tokenizer in place of one that is not there: it refuses every text with `reason`, and shows token 7 as
    /// `<7>`.
    ///
    /// # Errors
    /// None in practice.
    pub fn stand_in(vocabulary: usize, reason: &str) -> Result<Self, DataError> {
        let vocab: serde_json::Map<String, Value> = (0..vocabulary)
            .map(|id| (format!("<{id}>"), id.into()))
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unknown>"},
        });
        let mut tokenizer = Self::from_parts(json.to_string().as_bytes(), None, None)?;
        tokenizer.missing = Some(reason.to_owned());
        Ok(tokenizer)
    }

    /// Why there is no other, if it is one that stands in ([`Self::stand_in`]).
    pub fn stands_in(&self) -> Option<&str> {
        self.missing.as_deref()
    }

    /// Token ids of `text`. With `add_special`, the tokenizer's own BOS and EOS are added as its
    /// post-processor and `add_bos_token`/`add_eos_token` say, never twice.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, DataError> {
        Ok(self.encode_with_offsets(text, add_special)?.ids)
    }

    /// Like [`Tokenizer::encode`], with the bytes of the text each token covers. A byte-level token
    /// that is part of a character covers the whole character; white space belongs to the token that
    /// carries it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the tokenizer refuses the text.
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Encoded, DataError> {
        if let Some(reason) = self.stands_in() {
            let reason = reason.to_owned();
            return Err(DataError::NoTokenizer { row: None, reason });
        }
        let encoding = guarded(|| self.inner.encode(text, add_special))?;
        self.check_encoding(&encoding, text)?;
        let mut encoded = Encoded::from(&encoding);
        if add_special {
            self.apply_special_flags(&mut encoded, text.len());
        }
        Ok(encoded)
    }

    /// Token ids of a text, or of two as the tokenizer's post-processor joins a pair, with BOS and EOS.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, text: &str, pair: Option<&str>) -> Result<Vec<u32>, DataError> {
        let Some(pair) = pair else {
            return self.encode(text, true);
        };
        if let Some(reason) = self.stands_in() {
            let reason = reason.to_owned();
            return Err(DataError::NoTokenizer { row: None, reason });
        }
        let encoding = guarded(|| self.inner.encode((text, pair), true))?;
        self.check_ids(&encoding)?;
        let mut encoded = Encoded::from(&encoding);
        self.apply_special_flags(&mut encoded, pair.len());
        Ok(encoded.ids)
    }

    /// The text of `ids`; with `skip_special`, without special tokens.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        guarded(|| self.inner.decode(ids, skip_special))
    }

    /// The conversation rendered by the chat template and tokenized. The template alone writes
    /// special tokens, so there is no second BOS.
    ///
    /// # Errors
    /// Where the template refuses the conversation or there is none.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, DataError> {
        let template = self
            .chat_template
            .as_ref()
            .ok_or_else(|| DataError::TokenizerConfig {
                file: "tokenizer_config.json",
                field: "chat_template".to_owned(),
                detail: "is missing: this tokenizer has no chat template".to_owned(),
            })?;
        let options = RenderOptions {
            add_generation_prompt,
            arguments: Some(&self.template_arguments),
            ..RenderOptions::default()
        };
        self.encode(&template.render_with(messages, options)?, false)
    }

    /// The largest token id + 1, added tokens included: the rows an embedding must have.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The padding token, where the configuration names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad_id
    }

    /// The id to pad batches with: the padding token, else EOS, else 0. Padding is masked, so the
    /// choice changes nothing that is computed for real tokens.
    pub fn padding_id(&self) -> u32 {
        let has_row = |id: &u32| self.rows.is_none_or(|rows| (*id as usize) < rows);
        self.pad_id.filter(has_row).or(self.eos_id).unwrap_or(0)
    }

    /// What a person should know of the files it was read from.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The added tokens of all files by id, as `tokenizer.json` lists its own.
    pub fn added_tokens(&self) -> Value {
        let mut tokens: Vec<_> = self.inner.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_unstable_by_key(|(id, _)| *id);
        let tokens = tokens.into_iter().map(|(id, token)| {
            serde_json::json!({
                "id": id, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
                "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special,
            })
        });
        tokens.collect()
    }

    /// Tokens that the embedding has no row for, by id.
    pub fn without_row(&self) -> Vec<(u32, String)> {
        let Some(rows) = self.rows else {
            return Vec::new();
        };
        let beyond = |id: &u32| *id as usize >= rows;
        let vocab = self.inner.get_vocab(true).into_iter();
        let mut tokens: Vec<_> = vocab
            .map(|(token, id)| (id, token))
            .filter(|(id, _)| beyond(id))
            .collect();
        tokens.sort_unstable();
        tokens
    }

    /// The tokens generation stops at: EOS, the token the chat template ends an assistant's turn
    /// with, and the vocabulary's well-known end-of-turn tokens. In order, without repeats.
    pub fn end_of_turn_ids(&self) -> &[u32] {
        &self.end_of_turn_ids
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.binary_search(&id).is_ok()
    }

    /// The id of a token, by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token as it stands in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The special tokens the configuration names: (`eos_token`, `</s>`), ….
    pub fn special_tokens(&self) -> &[(String, String)] {
        &self.special_tokens
    }

    /// The chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Sets further variables for the chat template, which [`Tokenizer::encode_chat`] renders with.
    pub fn set_template_arguments(&mut self, arguments: Map<String, Value>) {
        self.template_arguments = arguments;
    }

    /// Further variables for the chat template.
    pub fn template_arguments(&self) -> &Map<String, Value> {
        &self.template_arguments
    }

    /// Fixes the time the chat template's `strftime_now` shows (Unix seconds, UTC).
    ///
    /// # Errors
    /// None in practice: the template has compiled before.
    pub fn set_template_time(&mut self, now: i64) -> Result<(), DataError> {
        if let Some(template) = &self.chat_template {
            let fixed = ChatTemplate::with_now(template.source(), &self.special_tokens, now)?;
            self.chat_template = Some(fixed);
        }
        Ok(())
    }

    /// SHA-256 of the `tokenizer.json` bytes, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The length of `text` up to and including a closing special token that only white space
    /// follows; `None` where it does not end with a special token.
    pub(crate) fn end_of_turn_length(&self, text: &str) -> Option<usize> {
        let trimmed = text.trim_end();
        self.special_ids
            .iter()
            .filter_map(|id| self.inner.id_to_token(*id))
            .any(|token| !token.is_empty() && trimmed.ends_with(token.as_str()))
            .then_some(trimmed.len())
    }

    /// What models rely on: ids that have a row.
    fn check_ids(&self, encoding: &tokenizers::Encoding) -> Result<(), DataError> {
        let limit = self
            .rows
            .map_or(self.vocab_size, |rows| rows.min(self.vocab_size));
        if let Some(id) = encoding.get_ids().iter().find(|id| **id as usize >= limit) {
            let token = self.inner.id_to_token(*id).unwrap_or_default();
            return Err(damaged(&format!(
                "it makes token {id} ({token:?}) of the text, and there are {limit}"
            )));
        }
        Ok(())
    }

    /// The same, and what masks rely on: places that are in the text.
    fn check_encoding(&self, encoding: &tokenizers::Encoding, text: &str) -> Result<(), DataError> {
        self.check_ids(encoding)?;
        let in_text = |&(start, end): &(usize, usize)| {
            start <= end && text.is_char_boundary(start) && text.is_char_boundary(end)
        };
        match encoding.get_offsets().iter().all(in_text) {
            true => Ok(()),
            false => Err(damaged("it places a token outside the text")),
        }
    }

    /// `add_bos_token` and `add_eos_token`, where given, decide over the post-processor; and a text
    /// that already starts with BOS, or ends with EOS, keeps one.
    fn apply_special_flags(&self, encoded: &mut Encoded, text_len: usize) {
        if let Some(bos) = self.bos_id {
            let in_text = |e: &Encoded, i: usize| {
                e.ids.get(i) == Some(&bos) && e.offsets.get(i).is_some_and(|o| !o.is_empty())
            };
            let added = encoded.ids.first() == Some(&bos) && !in_text(encoded, 0);
            let wanted = self.add_bos.unwrap_or(added) && !in_text(encoded, usize::from(added));
            if added && !wanted {
                encoded.ids.remove(0);
                encoded.offsets.remove(0);
            } else if wanted && !added {
                encoded.ids.insert(0, bos);
                encoded.offsets.insert(0, 0..0);
            }
        }
        if let Some(eos) = self.eos_id {
            let in_text = |e: &Encoded, i: Option<usize>| {
                i.is_some_and(|i| {
                    e.ids.get(i) == Some(&eos) && e.offsets.get(i).is_some_and(|o| !o.is_empty())
                })
            };
            let last = encoded.ids.len().checked_sub(1);
            let added = encoded.ids.last() == Some(&eos) && !in_text(encoded, last);
            let before = if added {
                last.and_then(|l| l.checked_sub(1))
            } else {
                last
            };
            let wanted = self.add_eos.unwrap_or(added) && !in_text(encoded, before);
            if added && !wanted {
                encoded.ids.pop();
                encoded.offsets.pop();
            } else if wanted && !added {
                encoded.ids.push(eos);
                encoded.offsets.push(text_len..text_len);
            }
        }
    }

    fn find_end_of_turn_ids(&self) -> Vec<u32> {
        let template_end = self.chat_template.as_ref().and_then(|template| {
            let probe = [Message::user("question"), Message::assistant("answer")];
            let text = template.render(&probe, false).ok()?;
            let tail = text.rsplit_once("answer")?.1;
            let ids = self.encode(tail, false).ok()?;
            ids.into_iter().find(|id| self.is_special(*id))
        });
        let known = END_OF_TURN_TOKENS
            .iter()
            .filter_map(|token| self.inner.token_to_id(token))
            .filter(|id| self.is_special(*id));
        let mut ids = Vec::new();
        for id in self.eos_id.into_iter().chain(template_end).chain(known) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }
}

/// Takes out what is not the tokenizer's to decide, truncation and padding, and sets `trim_offsets` to false
/// everywhere: trimmed offsets would move a token made of white space to the text after it, and with it across a
/// mask's boundary. Ids do not depend on it.
fn prepare(json: &mut Value) {
    fn visit(value: &mut Value) {
        match value {
            Value::Object(map) => {
                for (key, value) in map.iter_mut() {
                    if key == "trim_offsets" {
                        *value = Value::Bool(false);
                    } else {
                        visit(value);
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(visit),
            _ => {}
        }
    }
    for part in ["truncation", "padding"] {
        if let Some(value) = json.get_mut(part) {
            *value = Value::Null;
        }
    }
    for part in ["pre_tokenizer", "post_processor"] {
        if let Some(value) = json.get_mut(part) {
            visit(value);
        }
    }
}

/// The template of `tokenizer_config.json`: a string, or the one called "default" of a list or map.
fn default_template(config: Option<&Value>) -> Result<Option<String>, DataError> {
    match config.and_then(|c| c.get("chat_template")) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Object(map)) => named_template(
            map.iter()
                .map(|(name, value)| (name.as_str(), value.as_str())),
        ),
        Some(Value::Array(items)) => named_template(items.iter().map(|item| {
            (
                item.get("name").and_then(Value::as_str).unwrap_or_default(),
                item.get("template").and_then(Value::as_str),
            )
        })),
        Some(_) => Err(bad_config(
            "chat_template",
            "must be a string or named templates",
        )),
    }
}

fn named_template<'a>(
    templates: impl Iterator<Item = (&'a str, Option<&'a str>)>,
) -> Result<Option<String>, DataError> {
    let mut names = Vec::new();
    for (name, source) in templates {
        if let ("default", Some(source)) = (name, source) {
            return Ok(Some(source.to_owned()));
        }
        names.push(name.to_owned());
    }
    Err(bad_config(
        "chat_template",
        &format!(
            "has no template named \"default\", only: {}",
            names.join(", ")
        ),
    ))
}

fn flag(config: Option<&Value>, name: &str) -> Result<Option<bool>, DataError> {
    match config.and_then(|c| c.get(name)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(bad_config(name, "must be true or false")),
    }
}

fn bad_config(field: &str, detail: &str) -> DataError {
    DataError::TokenizerConfig {
        file: "tokenizer_config.json",
        field: field.to_owned(),
        detail: detail.to_owned(),
    }
}

//! The tokenizer: text to ids with offsets, ids to text, special tokens and the chat template.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::error::DataError;
use crate::files::sha256_hex;
use crate::message::Message;

/// The named special tokens of `tokenizer_config.json`.
const SPECIAL_TOKEN_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

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
    chat_template: Option<ChatTemplate>,
    template_arguments: Map<String, Value>,
    sha256: String,
}

/// Token ids with the byte range of the text each of them covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte ranges into the text, one per id; empty for a token that is not in the text.
    pub offsets: Vec<Range<usize>>,
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
        let mut json: Value =
            serde_json::from_slice(tokenizer_json).map_err(|error| DataError::Tokenizer {
                detail: error.to_string(),
            })?;
        keep_whitespace_in_offsets(&mut json);
        let mut inner: tokenizers::Tokenizer =
            serde_json::from_value(json).map_err(|error| DataError::Tokenizer {
                detail: error.to_string(),
            })?;
        inner
            .with_truncation(None)
            .map_err(|error| DataError::Tokenizer {
                detail: error.to_string(),
            })?;
        inner.with_padding(None);

        let special_tokens = special_tokens(tokenizer_config)?;
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
        let vocab_size = vocab.values().max().map_or(0, |id| *id as usize + 1);

        let template_source = match chat_template {
            Some(source) => Some(source.to_owned()),
            None => default_template(tokenizer_config)?,
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
            add_bos: flag(tokenizer_config, "add_bos_token")?,
            add_eos: flag(tokenizer_config, "add_eos_token")?,
            special_ids,
            end_of_turn_ids: Vec::new(),
            vocab_size,
            chat_template,
            template_arguments: Map::new(),
            sha256: sha256_hex(tokenizer_json),
        };
        tokenizer.end_of_turn_ids = tokenizer.find_end_of_turn_ids();
        Ok(tokenizer)
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
        let encoding =
            self.inner
                .encode(text, add_special)
                .map_err(|error| DataError::Tokenizer {
                    detail: error.to_string(),
                })?;
        let mut encoded = Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding
                .get_offsets()
                .iter()
                .map(|&(start, end)| start..end)
                .collect(),
        };
        if add_special {
            self.apply_special_flags(&mut encoded, text.len());
        }
        Ok(encoded)
    }

    /// The text of `ids`; with `skip_special`, without special tokens.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| DataError::Tokenizer {
                detail: error.to_string(),
            })
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
        self.pad_id.or(self.eos_id).unwrap_or(0)
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

/// Sets `trim_offsets` to false everywhere: trimmed offsets would move a token made of white space to
/// the text after it, and with it across a mask's boundary. Ids do not depend on it.
fn keep_whitespace_in_offsets(json: &mut Value) {
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
    for part in ["pre_tokenizer", "post_processor"] {
        if let Some(value) = json.get_mut(part) {
            visit(value);
        }
    }
}

fn special_tokens(config: Option<&Value>) -> Result<Vec<(String, String)>, DataError> {
    let mut tokens = Vec::new();
    for name in SPECIAL_TOKEN_NAMES {
        let token = match config.and_then(|c| c.get(name)) {
            None | Some(Value::Null) => continue,
            Some(Value::String(token)) => token,
            // An AddedToken as transformers serialises it.
            Some(Value::Object(map)) => match map.get("content") {
                Some(Value::String(token)) => token,
                _ => return Err(bad_config(name, "has no text in `content`")),
            },
            Some(_) => return Err(bad_config(name, "must be a string or an AddedToken object")),
        };
        tokens.push((name.to_owned(), token.clone()));
    }
    Ok(tokens)
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
        field: field.to_owned(),
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{
        CHATML, SPECIALS, bos_post_processor, config, tokenizer, tokenizer_json, tokenizer_with,
    };
    use serde_json::json;

    #[test]
    fn special_tokens_come_from_strings_and_objects() {
        let t = tokenizer(None);
        let id = |token| t.token_to_id(token);
        assert_eq!(t.bos_id(), id("<s>"));
        assert_eq!(t.eos_id(), id("</s>"));
        assert_eq!(t.pad_id(), id("<pad>"));
        assert_eq!(t.vocab_size(), 256 + 7 + SPECIALS.len());
        assert!(t.is_special(t.eos_id().unwrap()) && !t.is_special(0));
        assert_eq!(
            t.sha256(),
            sha256_hex(tokenizer_json().to_string().as_bytes())
        );
        // FIPS 180-4's example "abc".
        assert!(sha256_hex(b"abc").starts_with("ba7816bf8f01cfea414140de5dae2223"));
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_off() {
        let t = tokenizer(None);
        assert_eq!(t.encode("abcdefghijkl", true).unwrap().len(), 12);
        assert_eq!(t.encode("ab", true).unwrap().len(), 2);
    }

    #[test]
    fn offsets_keep_white_space_and_whole_characters() {
        let text = "a \n é yes";
        let encoded = tokenizer(None).encode_with_offsets(text, false).unwrap();
        let covered: Vec<&str> = encoded.offsets.iter().map(|o| &text[o.clone()]).collect();
        assert_eq!(covered, ["a", " ", "\n", " ", "é", "é", " yes"]);
    }

    #[test]
    fn bos_is_added_once_and_the_flags_decide() {
        let mut json = tokenizer_json();
        json["post_processor"] = bos_post_processor(&json);
        let t = tokenizer_with(json.clone(), config(), None);
        let (bos, eos) = (t.bos_id().unwrap(), t.eos_id().unwrap());
        let a = t.encode("a", false).unwrap()[0];
        assert_eq!(t.encode("a", true).unwrap(), [bos, a]);
        assert_eq!(t.encode("<s>a", true).unwrap(), [bos, a]);
        assert_eq!(t.encode("<s>a", false).unwrap(), [bos, a]);
        assert_eq!(t.encode("", true).unwrap(), [bos]);

        let mut off = config();
        off["add_bos_token"] = json!(false);
        off["add_eos_token"] = json!(true);
        let t = tokenizer_with(json, off, None);
        assert_eq!(t.encode("a", true).unwrap(), [a, eos]);
        assert_eq!(t.encode("a</s>", true).unwrap(), [a, eos]);
        assert_eq!(t.encode("a", false).unwrap(), [a]);

        let mut on = config();
        on["add_bos_token"] = json!(true);
        let t = tokenizer_with(tokenizer_json(), on, None);
        assert_eq!(t.encode("a", true).unwrap(), [bos, a]);
    }

    #[test]
    fn templates_are_found_by_name_and_the_override_wins() {
        let mut named = config();
        named["chat_template"] =
            json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        let source = |c: &Value, o| {
            let t = tokenizer_with(tokenizer_json(), c.clone(), o);
            t.chat_template().map(|t| t.source().to_owned())
        };
        assert_eq!(source(&named, None).as_deref(), Some("d"));
        assert_eq!(source(&named, Some("o")).as_deref(), Some("o"));
        assert_eq!(source(&config(), None), None);
        named["chat_template"] = json!([{"name": "rag", "template": "t"}]);
        let error =
            Tokenizer::from_parts(tokenizer_json().to_string().as_bytes(), Some(&named), None);
        assert!(error.unwrap_err().to_string().contains("only: rag"));
    }

    #[test]
    fn end_of_turn_tokens_come_from_eos_template_and_vocabulary() {
        let t = tokenizer(Some(
            "{% for m in messages %}{{ m.content }}<pad>{% endfor %}",
        ));
        let expected: Vec<u32> = ["</s>", "<pad>", "<|im_end|>"]
            .iter()
            .map(|token| t.token_to_id(token).unwrap())
            .collect();
        assert_eq!(t.end_of_turn_ids(), expected);
    }

    #[test]
    fn a_chat_has_one_bos() {
        let mut json = tokenizer_json();
        json["post_processor"] = bos_post_processor(&json);
        let t = tokenizer_with(
            json,
            config(),
            Some(&format!("{{{{ bos_token }}}}{CHATML}")),
        );
        let ids = t.encode_chat(&[Message::user("a")], true).unwrap();
        assert_eq!(ids.iter().filter(|&&id| Some(id) == t.bos_id()).count(), 1);
        assert_eq!(
            t.decode(&ids, false).unwrap(),
            "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn malformed_parts_are_errors() {
        let parse = |json: &[u8], config: Value| Tokenizer::from_parts(json, Some(&config), None);
        let good = tokenizer_json().to_string();
        assert!(matches!(
            parse(b"{", json!({})),
            Err(DataError::Tokenizer { .. })
        ));
        assert!(matches!(
            parse(b"{}", json!({})),
            Err(DataError::Tokenizer { .. })
        ));
        for config in [
            json!({"eos_token": 3}),
            json!({"eos_token": {"text": "x"}}),
            json!({"chat_template": 1}),
            json!({"add_bos_token": "yes"}),
        ] {
            let error = parse(good.as_bytes(), config).unwrap_err();
            assert!(
                matches!(error, DataError::TokenizerConfig { .. }),
                "{error}"
            );
        }
        let error = parse(good.as_bytes(), json!({"chat_template": "{% if %}"})).unwrap_err();
        assert!(matches!(error, DataError::Template(_)));
    }
}

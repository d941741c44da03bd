//! Chat templates: a conversation rendered to text, byte for byte as transformers renders it.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value as Json};

use crate::jinja::{self, Kind, Template};
use crate::message::Message;

/// Why a chat template could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template's source is not valid Jinja.
    #[error("the chat template does not parse: {detail}")]
    Parse {
        /// The parser's message, with the template's line.
        detail: String,
    },
    /// The template failed while rendering.
    #[error("the chat template failed: {detail}")]
    Render {
        /// The engine's message, with the template's line.
        detail: String,
    },
    /// The template wants more time, memory or output than a rendering may use, or is larger or
    /// nests deeper than a template may.
    #[error("the chat template goes past its budget: {detail}")]
    Budget {
        /// What there was too much of, and the limit.
        detail: String,
    },
    /// The template refused the conversation through `raise_exception`.
    #[error("the chat template refuses this conversation: {message}")]
    Raised {
        /// The template's own words.
        message: String,
    },
}

/// What a template sees besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// Whether to end with the header of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Tool descriptions (JSON schemas), where the conversation has some.
    pub tools: Option<&'a Json>,
    /// Further variables for the template (`enable_thinking = false`, …).
    pub arguments: Option<&'a Map<String, Json>>,
}

/// A compiled chat template with its tokenizer's special tokens as variables.
///
/// The environment is transformers': `trim_blocks`, `lstrip_blocks`, Python's string and dict
/// methods, loop controls, `raise_exception`, `strftime_now`, `tojson` as `json.dumps` writes it,
/// and `{% generation %}` blocks. `strftime_now` shows UTC. A rendering has a budget that grows with
/// the conversation: see [`TemplateError::Budget`].
#[derive(Debug)]
pub struct ChatTemplate {
    template: Template,
    source: String,
    special_tokens: Vec<(String, Json)>,
    now: i64,
}

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` are variables such as (`eos_token`, `</s>`).
    ///
    /// # Errors
    /// [`TemplateError::Parse`] where the source is not valid Jinja, [`TemplateError::Budget`] where it
    /// is too long or nests too deeply.
    pub fn new(source: &str, special_tokens: &[(String, String)]) -> Result<Self, TemplateError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs() as i64);
        Self::with_now(source, special_tokens, now)
    }

    /// Like [`ChatTemplate::new`], with the time `strftime_now` shows fixed (Unix seconds), so that
    /// a template with a date in it renders the same text on another day.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_now(
        source: &str,
        special_tokens: &[(String, String)],
        now: i64,
    ) -> Result<Self, TemplateError> {
        let template = Template::parse(source).map_err(|error| match error.kind() {
            Kind::Budget | Kind::Depth => TemplateError::Budget {
                detail: error.to_string(),
            },
            _ => TemplateError::Parse {
                detail: error.to_string(),
            },
        })?;
        let special_tokens = special_tokens.iter();
        Ok(Self {
            template,
            source: source.to_owned(),
            special_tokens: special_tokens
                .map(|(name, token)| (name.clone(), Json::String(token.clone())))
                .collect(),
            now,
        })
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The time `strftime_now` shows, in Unix seconds.
    pub fn now(&self) -> i64 {
        self.now
    }

    /// Whether the text depends on the day it is rendered (the template calls `strftime_now`).
    pub fn uses_clock(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Whether the template marks the assistant's text itself with `{% generation %}`.
    pub fn has_generation_blocks(&self) -> bool {
        self.template.has_generation_blocks()
    }

    /// The conversation as text.
    ///
    /// # Errors
    /// What the template raised, or how it failed.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_with(
            messages,
            RenderOptions {
                add_generation_prompt,
                ..RenderOptions::default()
            },
        )
    }

    /// The conversation as text, with tools and further template variables.
    ///
    /// # Errors
    /// What the template raised, or how it failed.
    pub fn render_with(
        &self,
        messages: &[Message],
        options: RenderOptions<'_>,
    ) -> Result<String, TemplateError> {
        Ok(self.render_generation(messages, options)?.0)
    }

    /// The conversation as text, and the byte ranges of its `{% generation %}` blocks; no ranges
    /// where the template rewrites its own output around a block, so that they cannot be trusted.
    ///
    /// # Errors
    /// What the template raised, or how it failed.
    pub fn render_generation(
        &self,
        messages: &[Message],
        options: RenderOptions<'_>,
    ) -> Result<(String, Vec<Range<usize>>), TemplateError> {
        let messages = Json::Array(messages.iter().map(message_value).collect());
        let (null, prompt) = (Json::Null, Json::Bool(options.add_generation_prompt));
        let arguments = options.arguments.into_iter().flatten();
        let special_tokens = self.special_tokens.iter();
        let context: Vec<(&str, &Json)> = special_tokens
            .map(|(name, token)| (name.as_str(), token))
            .chain(arguments.map(|(name, value)| (name.as_str(), value)))
            .chain([
                ("messages", &messages),
                ("tools", options.tools.unwrap_or(&null)),
                ("documents", &null),
                ("add_generation_prompt", &prompt),
            ])
            .collect();
        match self.template.render(&context, self.now) {
            Ok(rendering) => Ok((rendering.text, rendering.spans)),
            Err(error) => Err(failure(error)),
        }
    }
}

/// One conversation (a JSON list of messages) through one template, from foreign text to text.
///
/// # Errors
/// [`TemplateError`] where the template does not parse, refuses the conversation or fails on it, or
/// where the conversation is not a list of objects.
pub fn render(
    source: &str,
    conversation: &Json,
    options: RenderOptions<'_>,
) -> Result<String, TemplateError> {
    let messages: Option<Vec<Message>> = conversation.as_array().and_then(|items| {
        let fields = items.iter().map(|item| item.as_object().cloned());
        fields.map(|f| f.map(Message::from_fields)).collect()
    });
    let messages = messages.ok_or_else(|| TemplateError::Render {
        detail: "a conversation is a list of objects".to_owned(),
    })?;
    ChatTemplate::new(source, &[])?.render_with(&messages, options)
}

/// The names a message's reasoning is passed under; the first is the one templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The message as the template sees it. As in transformers 5, reasoning given under an older name is
/// also there as `reasoning_content` and `thinking`.
fn message_value(message: &Message) -> Json {
    let fields = message.fields();
    let reasoning = REASONING_FIELDS
        .iter()
        .find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    let Some(reasoning) = reasoning else {
        return Json::Object(fields.clone());
    };
    let mut aliased = Map::new();
    aliased.insert("thinking".to_owned(), reasoning.clone());
    aliased.extend(fields.clone());
    aliased.insert("reasoning_content".to_owned(), reasoning.clone());
    Json::Object(aliased)
}

/// The most of a template's own words that is shown: it may raise the whole conversation.
const RAISED_CHARACTERS: usize = 2000;

fn shortened(message: String) -> String {
    match message.char_indices().nth(RAISED_CHARACTERS) {
        Some((end, _)) => format!(
            "{} … ({} more bytes)",
            message.get(..end).unwrap_or_default(),
            message.len().saturating_sub(end)
        ),
        None => message,
    }
}

fn failure(error: jinja::Error) -> TemplateError {
    match error.kind() {
        Kind::Raised => TemplateError::Raised {
            message: shortened(error.into_message()),
        },
        Kind::Budget | Kind::Depth => TemplateError::Budget {
            detail: error.to_string(),
        },
        _ => TemplateError::Render {
            detail: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]
    use sha2::Digest as _;

    use super::*;

    const GOLDENS: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/data/chat_goldens.json"
    );

    fn messages_of(value: &Json) -> Vec<Message> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::from_fields(m.as_object().unwrap().clone()))
            .collect()
    }

    /// Byte offset of the `n`th character.
    fn byte_offset(text: &str, n: u64) -> usize {
        text.char_indices()
            .nth(n as usize)
            .map_or(text.len(), |(at, _)| at)
    }

    #[test]
    fn renders_what_transformers_renders() {
        let goldens: Json = serde_json::from_slice(&std::fs::read(GOLDENS).unwrap()).unwrap();
        let special: Vec<(String, String)> = goldens["special_tokens"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned()))
            .collect();
        let mut wrong = Vec::new();
        let mut spans_seen = 0;
        let cases = goldens["cases"].as_array().unwrap();
        for case in cases {
            let name = case["template"].as_str().unwrap();
            let conversation = case["conversation"].as_str().unwrap();
            let source = goldens["templates"][name].as_str().unwrap();
            let template = ChatTemplate::new(source, &special)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let options = RenderOptions {
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                tools: case.get("tools"),
                arguments: case.get("arguments").and_then(Json::as_object),
            };
            let messages = messages_of(&goldens["conversations"][conversation]);
            let rendered = template.render_generation(&messages, options);
            if let Some(message) = case.get("error") {
                let expected = TemplateError::Raised {
                    message: message.as_str().unwrap().to_owned(),
                };
                assert_eq!(rendered, Err(expected), "{name}/{conversation}");
                continue;
            }
            let text = case["text"].as_str().unwrap();
            let spans: Vec<Range<usize>> = case
                .get("spans")
                .and_then(Json::as_array)
                .into_iter()
                .flatten()
                .map(|s| {
                    byte_offset(text, s[0].as_u64().unwrap())
                        ..byte_offset(text, s[1].as_u64().unwrap())
                })
                .collect();
            spans_seen += spans.len();
            if rendered != Ok((text.to_owned(), spans.clone())) {
                wrong.push(format!(
                    "{name}/{conversation}:\n  ours   {rendered:?}\n  theirs {text:?} {spans:?}"
                ));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(cases.len() > 100 && spans_seen > 20, "the goldens shrank");
    }

    /// Written by `tests/fixtures/make_trl_goldens.py`.
    const TRL_GOLDENS: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/data/trl_goldens.json"
    );

    fn sha256(bytes: &[u8]) -> String {
        let digest = sha2::Sha256::digest(bytes);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A digest of the text and of the spans, in characters, as the fixture script makes it.
    fn digest(rendered: &Result<(String, Vec<Range<usize>>), TemplateError>) -> String {
        let Ok((text, spans)) = rendered else {
            return "-".to_owned();
        };
        let characters = |end: usize| text[..end].chars().count();
        let spans: Vec<String> = spans
            .iter()
            .map(|span| format!("{}:{}", characters(span.start), characters(span.end)))
            .collect();
        sha256(format!("{text}\0{}", spans.join(",")).as_bytes())[..12].to_owned()
    }

    #[test]
    fn templates_that_trl_ships_give_what_transformers_gives() {
        let Ok(folder) = std::env::var("ENAMEL_TRL_TEMPLATES") else {
            eprintln!("skipped: ENAMEL_TRL_TEMPLATES does not name trl's folder chat_templates");
            return;
        };
        let goldens: Json = serde_json::from_slice(&std::fs::read(TRL_GOLDENS).unwrap()).unwrap();
        let special: Vec<(String, String)> = goldens["special_tokens"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned()))
            .collect();
        let mut templates = std::collections::HashMap::new();
        for (name, hash) in goldens["templates"].as_object().unwrap() {
            let bytes = std::fs::read(std::path::Path::new(&folder).join(name)).unwrap();
            assert_eq!(sha256(&bytes), *hash, "{name} is of another version of trl");
            let source = String::from_utf8(bytes).unwrap();
            let now = goldens["now"].as_i64().unwrap();
            let template = ChatTemplate::with_now(&source, &special, now).unwrap();
            templates.insert(name.clone(), template);
        }
        let cases = goldens["cases"].as_array().unwrap();
        assert!(templates.len() >= 72 && cases.len() >= 1296);
        let mut wrong = Vec::new();
        for case in cases {
            let (name, conversation) = (case[0].as_str().unwrap(), case[1].as_str().unwrap());
            let messages = messages_of(&goldens["conversations"][conversation]);
            let mut ours = Vec::new();
            for variant in goldens["variants"].as_array().unwrap() {
                for add_generation_prompt in [false, true] {
                    let options = RenderOptions {
                        add_generation_prompt,
                        tools: variant.get("tools").filter(|tools| !tools.is_null()),
                        arguments: variant["arguments"].as_object(),
                    };
                    ours.push(digest(
                        &templates[name].render_generation(&messages, options),
                    ));
                }
            }
            if ours.join(" ") != case[2].as_str().unwrap() {
                wrong.push(format!("{name} {conversation}: {ours:?} {}", case[2]));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn a_clock_in_the_template_can_be_fixed() {
        let template =
            ChatTemplate::with_now("{{ strftime_now('%d %b %Y') }}", &[], 1_709_164_800).unwrap();
        assert!(template.uses_clock());
        assert_eq!(template.render(&[], false).unwrap(), "29 Feb 2024");
    }

    #[test]
    fn what_a_template_raises_is_shown_in_part_where_it_is_long() {
        let template = ChatTemplate::new("{{ raise_exception('no ' * 100000) }}", &[]).unwrap();
        let error = template.render(&[], false).unwrap_err().to_string();
        assert!(
            error.len() < 2200 && error.ends_with("more bytes)"),
            "{error}"
        );
        assert!(
            error.contains("refuses this conversation: no no"),
            "{error}"
        );
    }

    #[test]
    fn a_budget_gone_past_is_named_with_its_limit() {
        let source =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(source, &[]).unwrap();
        let error = template.render(&[], false).unwrap_err();
        assert!(matches!(error, TemplateError::Budget { .. }), "{error}");
        assert!(error.to_string().contains("more than 100"), "{error}");
        let error = ChatTemplate::new(&"x".repeat(300_000), &[]).unwrap_err();
        assert!(
            error.to_string().contains("300000 bytes, and 262144"),
            "{error}"
        );
    }

    #[test]
    fn broken_templates_name_the_line() {
        let error = ChatTemplate::new("a\n{% if %}", &[]).unwrap_err();
        assert!(error.to_string().contains("template line 2"), "{error}");
        let template =
            ChatTemplate::new("a\n\n{{ messages[0].content.nothing.more }}", &[]).unwrap();
        let error = template.render(&[Message::user("x")], false).unwrap_err();
        assert!(error.to_string().contains("template line 3"), "{error}");
    }
}

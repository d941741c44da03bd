//! Data files: rows of every format, as lines and as one array, under every setting.

use anyhow::Result;
use enamel_data::{DataSpec, Tokenizer, load_examples, spans};
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::mutate;
use crate::random::Random;

const WORDS: [&str; 72] = [
    "messages",
    "role",
    "content",
    "user",
    "assistant",
    "system",
    "tool",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "assistant_masks",
    "completion_mask",
    "tools",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "chat_template_kwargs",
    "weight",
    "train",
    "label",
    "kto",
    "conversations",
    "from",
    "value",
    "human",
    "gpt",
    "instruction",
    "input",
    "output",
    "chosen",
    "rejected",
    "type",
    "reasoning_content",
    "thinking",
    "-100",
    "[]",
    "{}",
    "null",
    "true",
    "\"\"",
    "[[",
    "{\"a\":",
    "\\ud83d",
    "\\u0000",
    "\u{feff}",
    "\r\n",
    "\n",
    "\n\n",
    ",",
    "]",
    "}",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>assistant",
    "\\n",
    "\u{fdd0}",
    "é",
    "🧑\u{200d}🚀",
    "1e5",
    "-1",
    "4294967295",
    "9223372036854775807",
    "0.5",
    "NaN",
    "\\\"",
    "documents",
];

const SPEC: [&str; 20] = [
    "auto",
    "messages",
    "prompt_completion",
    "tokens",
    "text",
    "error",
    "keep_start",
    "keep_end",
    "drop",
    "skip",
    "all",
    "last_assistant",
    "assistant",
    "completion",
    "format",
    "max_length",
    "truncation",
    "on_bad_row",
    "train_on",
    "template_arguments",
];

const NAMES: [&str; 3] = ["data.jsonl", "data.json", "data.txt"];

const TEMPLATES: [&str; 4] = [
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}<s>{{ m.content | trim }} {% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% endif %}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ s }}{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}",
];

struct Rows {
    tokenizers: Vec<Tokenizer>,
    seeds: Vec<Vec<Value>>,
}

/// A byte-level tokenizer of printable letters.
fn tokenizer(template: &str) -> Result<Tokenizer> {
    let letters = (b'!'..=b'~')
        .map(|b| char::from(b).to_string())
        .chain(["Ġ".to_owned(), "Ċ".to_owned()]);
    let merged = ["Ġa", "ab", "er", "Ġc"].map(str::to_owned);
    let vocab: serde_json::Map<String, Value> = letters
        .chain(merged)
        .enumerate()
        .map(|(id, token)| (token, id.into()))
        .collect();
    let first = vocab.len();
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = (special.iter().enumerate())
        .map(|(at, token)| {
            json!({"id": first + at, "content": token, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        })
        .collect();
    let step = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let json = json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": step, "decoder": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["Ġ a", "a b", "e r", "Ġ c"]}});
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    Ok(Tokenizer::from_parts(
        json.to_string().as_bytes(),
        Some(&config),
        Some(template),
    )?)
}

fn seeds() -> Vec<Vec<Value>> {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    vec![
        vec![
            json!({"messages": [turn("user", "a b c"), turn("assistant", "never")]}),
            json!({"messages": [turn("system", "cab"), turn("user", "er"), turn("assistant", "ab"), turn("user", "x"),
                turn("assistant", "yes é")]}),
        ],
        vec![
            json!({"messages": [turn("user", "a"), {"role": "assistant", "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                turn("tool", "2"), turn("assistant", "done")],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]},
                {"role": "assistant", "content": "whole", "reasoning_content": "because", "weight": 1}],
                "chat_template_kwargs": {"enable_thinking": false}}),
        ],
        vec![
            json!({"prompt": "a b", "completion": " cab"}),
            json!({"prompt": "", "completion": "only"}),
            json!({"prompt": [turn("user", "q")], "completion": [turn("assistant", "w")], "label": true}),
        ],
        vec![
            json!({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}),
            json!({"input_ids": [5, 6], "attention_mask": [1, 1]}),
            json!({"input_ids": [7, 8, 9], "assistant_masks": [0, 1, 1]}),
        ],
        vec![
            json!({"text": "a b c ab er"}),
            json!({"text": "<s>x</s> é 🧑", "id": 3}),
        ],
    ]
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let tokenizers = TEMPLATES
        .iter()
        .map(|t| tokenizer(t))
        .collect::<Result<_>>()?;
    let seeds = seeds();
    Ok(Box::new(Rows { tokenizers, seeds }))
}

impl Reader for Rows {
    fn input(&self, random: &mut Random) -> Input {
        let mut rows = random.pick(&self.seeds).clone();
        if random.once_in(6) {
            rows.extend(random.pick(&self.seeds).iter().cloned());
        }
        for row in &mut rows {
            if random.once_in(2) {
                for _ in 0..random.few() {
                    mutate::json(random, row, &WORDS);
                }
            }
        }
        let name = NAMES[random.below(8).saturating_sub(5)];
        let mut text = match (name, random.once_in(2)) {
            ("data.json", true) => Value::Array(rows).to_string(),
            _ => rows.iter().map(|row| format!("{row}\n")).collect(),
        }
        .into_bytes();
        if random.once_in(4) {
            mutate::text(random, &mut text, &WORDS);
        }
        let mut spec = json!({
            "format": random.pick(&["auto", "auto", "auto", "messages", "prompt_completion", "tokens", "text"]),
            "max_length": random.pick(&[None, None, Some(8), Some(1)]),
            "truncation": random.pick(&["error", "keep_start", "keep_end", "drop"]),
            "on_bad_row": random.pick(&["skip", "skip", "skip", "error"]),
        });
        if random.once_in(8) {
            mutate::json(random, &mut spec, &SPEC);
        }
        let template = [random.below(self.tokenizers.len()) as u8];
        Input(vec![
            Part::new(name, text),
            Part::new("@spec", spec.to_string()),
            Part::new("@template", template),
        ])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let Ok(mut spec) = serde_json::from_slice::<DataSpec>(input.part("@spec")) else {
            return Ok(false);
        };
        let name = input.0.iter().find(|part| !part.name.starts_with('@'));
        spec.paths = name
            .map(|part| folder.path().join(&part.name))
            .into_iter()
            .collect();
        let template = input.part("@template").first().copied().unwrap_or(0);
        let Some(tokenizer) = self.tokenizers.get(usize::from(template)) else {
            return Ok(false);
        };
        match load_examples(&spec, tokenizer) {
            Ok(examples) => {
                for row in &examples.rows {
                    assert_eq!(row.input_ids.len(), row.labels.len());
                    let _ = spans(row, tokenizer);
                }
                let _ = examples.skipped.iter().map(ToString::to_string).count();
                let _ = (examples.tokens(), examples.trained());
                Ok(!examples.rows.is_empty())
            }
            Err(error) => {
                let _ = error.to_string();
                Ok(false)
            }
        }
    }
}

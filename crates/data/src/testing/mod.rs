//! A small byte-level BPE tokenizer, templates and files for this crate's tests.

#![allow(clippy::unwrap_used)]

mod loading_tests;
mod row_tests;

use std::io::Write as _;

use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// The special tokens of the test tokenizer; their ids follow the 256 bytes and the merges.
pub(crate) const SPECIALS: [&str; 7] = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
];

/// ChatML, with a generation prompt.
pub(crate) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content \
    + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One token for each byte, merges for " yes" and " blue", and the special tokens.
pub(crate) fn tokenizer_json() -> Value {
    let mut bytes: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
        .into_iter()
        .collect();
    bytes.sort_unstable();
    let merges = [
        ("Ġ", "y"),
        ("e", "s"),
        ("Ġy", "es"),
        ("Ġ", "b"),
        ("l", "u"),
        ("lu", "e"),
        ("Ġb", "lue"),
    ];
    let tokens = bytes
        .iter()
        .map(char::to_string)
        .chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab: serde_json::Map<String, Value> = tokens
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let first_special = vocab.len();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(i, token)| {
            json!({"id": first_special + i, "content": token, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": merges.map(|(a, b)| json!([a, b]))},
    })
}

/// A `tokenizer_config.json` with BOS, EOS and padding.
pub(crate) fn config() -> Value {
    json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<pad>",
           "unk_token": null})
}

/// The test tokenizer with a chat template.
pub(crate) fn tokenizer(template: Option<&str>) -> Tokenizer {
    tokenizer_with(tokenizer_json(), config(), template)
}

pub(crate) fn tokenizer_with(json: Value, config: Value, template: Option<&str>) -> Tokenizer {
    Tokenizer::from_parts(json.to_string().as_bytes(), Some(&config), template).unwrap()
}

/// A post-processor that adds BOS.
pub(crate) fn bos_post_processor(json: &Value) -> Value {
    let id = json["added_tokens"][0]["id"].clone();
    json!({"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}}})
}

/// A data file with the given text.
pub(crate) fn data_file(name: &str, text: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::File::create(&path)
        .unwrap()
        .write_all(text)
        .unwrap();
    (dir, path)
}

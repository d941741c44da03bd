//! A model's tokenizer files: opened with its base, then texts encoded, ids decoded, a conversation rendered.

use anyhow::Result;
use enamel_data::{Message, TokenStream, Tokenizer};
use enamel_train::base::OpenBase;
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Faults, write};
use crate::mutate;
use crate::random::Random;

/// Types, keys and values of `tokenizer.json` and the files beside it.
const WORDS: [&str; 96] = [
    "type",
    "model",
    "vocab",
    "merges",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "truncation",
    "padding",
    "version",
    "id",
    "content",
    "single_word",
    "lstrip",
    "rstrip",
    "normalized",
    "special",
    "BPE",
    "WordLevel",
    "WordPiece",
    "Unigram",
    "unk_token",
    "unk_id",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "dropout",
    "max_input_chars_per_word",
    "ByteLevel",
    "add_prefix_space",
    "trim_offsets",
    "use_regex",
    "Sequence",
    "pretokenizers",
    "normalizers",
    "decoders",
    "processors",
    "Split",
    "pattern",
    "Regex",
    "String",
    "behavior",
    "Isolated",
    "Removed",
    "MergedWithPrevious",
    "invert",
    "Digits",
    "individual_digits",
    "Metaspace",
    "replacement",
    "prepend_scheme",
    "Whitespace",
    "WhitespaceSplit",
    "Punctuation",
    "CharDelimiterSplit",
    "delimiter",
    "Replace",
    "Prepend",
    "prepend",
    "NFC",
    "NFKD",
    "Lowercase",
    "Strip",
    "strip_left",
    "StripAccents",
    "BertNormalizer",
    "Precompiled",
    "precompiled_charsmap",
    "TemplateProcessing",
    "single",
    "pair",
    "special_tokens",
    "SpecialToken",
    "A",
    "B",
    "BertProcessing",
    "RobertaProcessing",
    "sep",
    "cls",
    "Fuse",
    "ByteFallback",
    "CTC",
    "start",
    "stop",
    "cleanup",
    "bos_token",
    "eos_token",
    "<s>",
    "##a",
    "▁",
    "Ġ",
    "<0x41>",
];

/// Keys of the files beside it.
const BESIDE: [&str; 32] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "additional_special_tokens",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
    "chat_template",
    "content",
    "lstrip",
    "special",
    "normalized",
    "<s>",
    "</s>",
    "<pad>",
    "ab",
    "name",
    "template",
    "default",
    "tokenizer_class",
    "model_max_length",
    "legacy",
    "0",
    "1",
    "11",
    "4294967295",
    "4294967296",
    "-1",
    "é",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
];

const TEXTS: [&str; 6] = [
    "ab abc 12 a",
    "",
    "<s>ab</s> <pad>\n\nABC é 🧑\u{200d}🚀 \u{0}\u{301}",
    "   aa bb   \r\n\t'ab's don't 1234567",
    "\u{202e}\u{feff}a\u{fdd0}b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

struct Tokenizers {
    seeds: Vec<Value>,
    config: String,
    weights: Vec<u8>,
}

fn seed(model: Value, more: Value) -> Value {
    let token = |id: u32, text: &str, special: bool| {
        json!({"id": id, "content": text, "special": special, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let mut json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [token(12, "<s>", true), token(13, "</s>", true), token(14, "<pad>", false)],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model,
    });
    if let (Some(json), Value::Object(more)) = (json.as_object_mut(), more) {
        json.extend(more);
    }
    json
}

fn seeds() -> Vec<Value> {
    let vocab = |tokens: &[&str]| -> Value {
        tokens
            .iter()
            .enumerate()
            .map(|(id, t)| ((*t).to_owned(), json!(id)))
            .collect()
    };
    let letters = [
        "a", "b", "c", "1", "2", "Ġ", "ab", "abc", "Ġa", "Ġab", "12", "Ċ",
    ];
    let merges = json!([["a", "b"], ["ab", "c"], ["Ġ", "a"], ["Ġ", "ab"], ["1", "2"]]);
    let bpe = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab(&letters), "merges": merges});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [12], "tokens": ["<s>"]}}});
    let pieces = [
        "<unk>", "▁", "a", "b", "c", "ab", "▁a", "▁ab", "<0x0A>", "<0x41>", "1", "2",
    ];
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let spm = json!({"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
        "vocab": vocab(&pieces), "merges": ["a b", "▁ a", "▁ ab"]});
    let unigram: Vec<Value> = pieces.iter().map(|p| json!([p, -1.0])).collect();
    let words = [
        "[UNK]", "a", "b", "ab", "##a", "##b", "##c", "1", "12", "[CLS]", "[SEP]", "x",
    ];
    vec![
        seed(
            bpe.clone(),
            json!({"pre_tokenizer": byte_level, "decoder": byte_level, "post_processor": template}),
        ),
        seed(
            bpe,
            json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false}]},
            "decoder": byte_level, "post_processor": byte_level}),
        ),
        seed(
            spm,
            json!({"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
            "decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "post_processor": template}),
        ),
        seed(
            json!({"type": "Unigram", "unk_id": 0, "vocab": unigram, "byte_fallback": false}),
            json!({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
                "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}}),
        ),
        seed(
            json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab(&words)}),
            json!({"normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": true}, "pre_tokenizer": {"type": "BertPreTokenizer"},
                "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
                "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 10], "cls": ["[CLS]", 9]}}),
        ),
        seed(
            json!({"type": "WordLevel", "vocab": vocab(&words), "unk_token": "[UNK]"}),
            json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
                    {"type": "Punctuation", "behavior": "Isolated"}]},
                "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "x"},
                "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
                "decoder": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}}),
        ),
    ]
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let mut config = llama::config(8);
    config["vocab_size"] = 64.into();
    let mut tensors = llama::tensors(8, "F32", true, false);
    tensors.truncate(1);
    Ok(Box::new(Tokenizers {
        seeds: seeds(),
        config: config.to_string(),
        weights: write(&tensors, &Faults::default()),
    }))
}

/// Encodes, decodes and shows: whatever a tokenizer is asked.
pub fn try_out(tokenizer: &Tokenizer) {
    for text in TEXTS {
        let _ = tokenizer.encode(text, true);
        let Ok(encoded) = tokenizer.encode_with_offsets(text, false) else {
            continue;
        };
        for range in &encoded.offsets {
            assert!(
                text.get(range.clone()).is_some(),
                "offsets {range:?} cut {text:?}"
            );
        }
        let _ = tokenizer.decode(&encoded.ids, true);
    }
    let mut stream = TokenStream::new(false);
    for id in (0..16).chain([u32::MAX, 64]) {
        let _ = stream.push(tokenizer, id);
        let _ = tokenizer.id_to_token(id);
    }
    let _ = stream.finish(tokenizer);
    let conversation = [
        Message::system("a"),
        Message::user("ab 12"),
        Message::assistant("abc"),
    ];
    let _ = tokenizer.encode_chat(&conversation, true);
    let _ = (tokenizer.padding_id(), tokenizer.vocab_size());
}

impl Reader for Tokenizers {
    fn input(&self, random: &mut Random) -> Input {
        let mut json = random.pick(&self.seeds).clone();
        if !random.once_in(6) {
            for _ in 0..random.few() {
                mutate::json(random, &mut json, &WORDS);
            }
        }
        let mut text = json.to_string().into_bytes();
        if random.once_in(12) {
            mutate::text(random, &mut text, &WORDS);
        }
        let template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}";
        let mut parts = vec![
            Part::new("tokenizer.json", text),
            Part::new("config.json", self.config.as_bytes()),
            Part::new("model.safetensors", self.weights.as_slice()),
        ];
        let beside = [
            (
                "tokenizer_config.json",
                json!({
                "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<pad>",
                "unk_token": null, "chat_template": template, "add_bos_token": true,
                "added_tokens_decoder": {"12": {"content": "<s>", "special": true, "lstrip": false,
                    "normalized": false, "rstrip": false, "single_word": false}}}),
            ),
            ("added_tokens.json", json!({"<pad>": 14, "<extra>": 15})),
            (
                "special_tokens_map.json",
                json!({
                "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<pad>"]}),
            ),
            (
                "generation_config.json",
                json!({"eos_token_id": [2, 13], "temperature": 0.7, "top_p": 0.9}),
            ),
        ];
        for (at, (name, mut json)) in beside.into_iter().enumerate() {
            if at > 0 && random.once_in(2) {
                continue;
            }
            let changed = random.once_in(4);
            if changed {
                for _ in 0..random.few() {
                    mutate::json(random, &mut json, &BESIDE);
                }
            }
            let mut text = json.to_string().into_bytes();
            if changed && random.once_in(6) {
                mutate::bytes(random, &mut text);
            }
            parts.push(Part::new(name, text));
        }
        Input(parts)
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let path = folder.path().display().to_string();
        let Ok(base) = OpenBase::open(&path, None, &mut ()) else {
            return Ok(false);
        };
        let _ = base.checkpoint.generation_config();
        try_out(&base.tokenizer);
        Ok(true)
    }
}

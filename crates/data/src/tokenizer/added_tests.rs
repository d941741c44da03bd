//! Tokens declared in any of the four files, as transformers resolves them, and what it does not refuse.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::testing::{SPECIALS, tokenizer_json};
use serde_json::json;

fn fixture(name: &str) -> Value {
    let path = format!("{}/../../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The files of a case, on a `tokenizer.json` with 256 bytes, 7 merges and the special tokens.
fn read(config: Value, map: Option<Value>, added: Option<Value>) -> Result<Tokenizer, DataError> {
    let bytes = tokenizer_json().to_string();
    Tokenizer::from_files(&TokenizerFiles {
        tokenizer_json: bytes.as_bytes(),
        tokenizer_config: Some(&config),
        special_tokens_map: map.as_ref(),
        added_tokens: added.as_ref(),
        embedding_rows: Some(SIZE + 2),
        ..TokenizerFiles::default()
    })
}

/// Tokens of `tokenizer.json`; the embedding has two rows more.
const SIZE: usize = 256 + 7 + SPECIALS.len();

#[test]
fn tokens_of_all_files_are_those_of_transformers() {
    let golden = fixture("data/added_tokens.json");
    let base = fixture("llama/untied/tokenizer.json");
    let texts: Vec<&str> = golden["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    for (name, case) in golden["cases"].as_object().unwrap() {
        let mut json = base.clone();
        let own = case
            .get("own")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        json["added_tokens"].as_array_mut().unwrap().extend(own);
        let t = Tokenizer::from_files(&TokenizerFiles {
            tokenizer_json: json.to_string().as_bytes(),
            tokenizer_config: case.get("config"),
            special_tokens_map: case.get("map"),
            added_tokens: case.get("added"),
            ..TokenizerFiles::default()
        });
        let t = t.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            t.vocab_size() as u64,
            case["size"].as_u64().unwrap(),
            "{name}"
        );
        for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
            assert_eq!(
                json!(t.encode(text, false).unwrap()),
                *ids,
                "{name}: {text}"
            );
        }
        let golden_named = case["named"].as_object().unwrap();
        for (token, expected) in golden_named {
            let found = t
                .special_tokens()
                .iter()
                .find(|(n, _)| n == token)
                .map(|(_, content)| content);
            let found = found.map(|content| json!([content, t.token_to_id(content)]));
            assert_eq!(found.as_ref(), Some(expected), "{name}: {token}");
        }
        let end = |key: &str| golden_named.get(key).map(|named| named[1].clone());
        for (key, id) in [
            ("bos_token", t.bos_id()),
            ("eos_token", t.eos_id()),
            ("pad_token", t.pad_id()),
        ] {
            assert_eq!(id.map(Value::from), end(key), "{name}: {key}");
        }
        let mut special: Vec<Value> = case["skipped"].as_array().unwrap().clone();
        special.extend(
            ["bos_token", "eos_token", "pad_token"]
                .into_iter()
                .filter_map(end),
        );
        for id in 0..t.vocab_size() as u32 {
            assert_eq!(
                t.is_special(id),
                special.contains(&id.into()),
                "{name}: {id}"
            );
        }
    }
}

#[test]
fn files_that_contradict_each_other_are_refused_with_every_token() {
    let added = json!({"<a>": SIZE + 1, "<b>": SIZE});
    let fine = read(json!({}), None, Some(added)).unwrap();
    assert_eq!(fine.token_to_id("<a>"), Some(SIZE as u32 + 1));
    let added = json!({"<a>": SIZE + 1, "</s>": 3});
    let error = read(json!({}), None, Some(added)).unwrap_err().to_string();
    for part in [
        "\"<a>\" has id 271 by added_tokens.json, 270",
        "\"</s>\" has id 3",
        "help:",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let decoder = json!({"added_tokens_decoder": {"300": {"content": "<a>"}}});
    let error = read(decoder, None, None).unwrap_err().to_string();
    assert!(
        error.contains("\"<a>\" has id 300 by tokenizer_config.json, 270"),
        "{error}"
    );
}

#[test]
fn an_end_that_no_row_is_for_is_refused_and_other_names_are_noted() {
    let config = json!({"sep_token": "<1>", "mask_token": "<2>", "pad_token": "<3>"});
    let t = read(config, None, None).unwrap();
    assert_eq!(t.notes().len(), 3, "{:?}", t.notes());
    assert!(
        t.notes()
            .iter()
            .any(|n| n.contains("mask_token") && n.contains("no token"))
    );
    assert_eq!(
        (t.pad_id(), t.vocab_size()),
        (Some(SIZE as u32 + 1), SIZE + 2)
    );
    let map = json!({"cls_token": "<3>", "eos_token": {"content": "<4>"}});
    let added = json!({"<a>": SIZE, "<b>": SIZE + 1});
    let error = read(json!({}), Some(map), Some(added)).unwrap_err();
    let error = error.to_string();
    for part in [
        "special_tokens_map.json",
        "`eos_token`",
        "\"<4>\"",
        "272 rows",
        "help:",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn fields_of_the_wrong_shape_are_named_with_their_file() {
    let cases = [
        (
            json!({"added_tokens_decoder": []}),
            None,
            None,
            "tokenizer_config.json: `added_tokens_decoder`",
        ),
        (
            json!({"added_tokens_decoder": {"x": {}}}),
            None,
            None,
            "`added_tokens_decoder.x` is no token id",
        ),
        (
            json!({"added_tokens_decoder": {"1": "<a>"}}),
            None,
            None,
            "`added_tokens_decoder.1` must be",
        ),
        (
            json!({"added_tokens_decoder": {"1": {"content": 1}}}),
            None,
            None,
            "`added_tokens_decoder.1` has no text",
        ),
        (
            json!({"eos_token": {"content": "a", "lstrip": 1}}),
            None,
            None,
            "`eos_token.lstrip` must be true or false",
        ),
        (
            json!({"extra_special_tokens": [1]}),
            None,
            None,
            "`extra_special_tokens[0]` must be a string",
        ),
        (
            json!({}),
            Some(json!({"pad_token": 1})),
            None,
            "special_tokens_map.json: `pad_token` must be",
        ),
        (
            json!({}),
            Some(json!([])),
            None,
            "special_tokens_map.json: `the file` must be an object",
        ),
        (
            json!({}),
            None,
            Some(json!({"<a>": "1"})),
            "added_tokens.json: `<a>` must be a token id",
        ),
        (
            json!({}),
            None,
            Some(json!([])),
            "added_tokens.json: `the file` must be an object",
        ),
    ];
    for (config, map, added, wanted) in cases {
        let error = read(config, map, added).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}

#[test]
fn lists_may_hold_objects_as_older_versions_wrote_them() {
    let map = json!({"additional_special_tokens": [{"content": "<a>", "lstrip": false, "normalized": false}, "<b>"]});
    let t = read(json!({}), Some(map), None).unwrap();
    assert!(
        t.is_special(t.token_to_id("<a>").unwrap()) && t.is_special(t.token_to_id("<b>").unwrap())
    );
}

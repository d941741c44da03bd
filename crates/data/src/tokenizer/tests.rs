//! What a tokenizer is made of, and what it refuses.

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
    let error = Tokenizer::from_parts(tokenizer_json().to_string().as_bytes(), Some(&named), None);
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

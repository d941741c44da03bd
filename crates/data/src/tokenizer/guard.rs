//! The tokenizers library stops some damaged files by a panic. Here that becomes an error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::error::DataError;

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives. A panic in it is an error, and prints nothing.
///
/// # Errors
/// [`DataError::Tokenizer`] with the library's own words, whether it returned or threw them.
pub(super) fn guarded<T, E: std::fmt::Display>(
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, DataError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            // A thread that is being torn down catches nothing.
            if !CAUGHT.try_with(Cell::get).unwrap_or(false) {
                before(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    // What `work` borrows is not used again after a panic, but for a cache whose lock says that it broke.
    let result = catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(outer);
    match result {
        Ok(result) => result.map_err(|error| damaged(&error.to_string())),
        Err(panic) => Err(damaged(&format!(
            "it is damaged: the tokenizers library stopped with '{}'",
            message(panic.as_ref())
        ))),
    }
}

pub(super) fn damaged(detail: &str) -> DataError {
    DataError::Tokenizer {
        detail: detail.to_owned(),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no words")
}

/// Refuses what would make the library read outside a list or make text of half a character.
///
/// # Errors
/// All of it, with its place in `tokenizer.json`.
pub(super) fn check(json: &Value) -> Result<(), DataError> {
    let mut problems = Vec::new();
    if let Some(model) = json.get("model") {
        check_merges(model, &mut problems);
    }
    if let Some(processor) = json.get("post_processor") {
        check_processor(processor, "post_processor", &mut problems);
    }
    if let Some(normalizer) = json.get("normalizer") {
        check_charsmaps(normalizer, "normalizer", &mut problems);
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(damaged(&format!("it is damaged: {}", problems.join("; ")))),
    }
}

/// The second part of a merge begins with the prefix, which the library cuts off unseen.
fn check_merges(model: &Value, problems: &mut Vec<String>) {
    let prefix = model.get("continuing_subword_prefix");
    let Some(prefix) = prefix.and_then(Value::as_str).filter(|p| !p.is_empty()) else {
        return;
    };
    let merges = model.get("merges").and_then(Value::as_array);
    let second = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(_, second)| second.to_owned()),
        Value::Array(parts) => parts.get(1).and_then(Value::as_str).map(str::to_owned),
        _ => None,
    };
    let wrong = merges
        .into_iter()
        .flatten()
        .enumerate()
        .find(|(_, merge)| second(merge).is_some_and(|second| !second.starts_with(prefix)));
    if let Some((at, merge)) = wrong {
        problems.push(format!(
            "model.merges[{at}] = {merge} has a second part without the continuing_subword_prefix {prefix:?}"
        ));
    }
}

/// A template names the one text there is, and tokens that it lists with their ids.
fn check_processor(processor: &Value, at: &str, problems: &mut Vec<String>) {
    let nested = processor.get("processors").and_then(Value::as_array);
    for (i, inner) in nested.into_iter().flatten().enumerate() {
        check_processor(inner, &format!("{at}.processors[{i}]"), problems);
    }
    if processor.get("type").and_then(Value::as_str) != Some("TemplateProcessing") {
        return;
    }
    let id_of = |piece: &Value, kind: &str| {
        let id = piece.get(kind).and_then(|piece| piece.get("id"));
        id.and_then(Value::as_str).map(str::to_owned)
    };
    let single = processor.get("single").and_then(Value::as_array);
    for (i, piece) in single.into_iter().flatten().enumerate() {
        if let Some(id) = id_of(piece, "Sequence").filter(|id| id != "A") {
            problems.push(format!(
                "{at}.single[{i}] is of a text {id}, and there is one only, A"
            ));
        }
        if let Some(id) = id_of(piece, "SpecialToken") {
            let known = processor.get("special_tokens").and_then(|all| all.get(&id));
            if known.is_none() {
                problems.push(format!(
                    "{at}.single[{i}] names {id:?}, which {at}.special_tokens lacks"
                ));
            }
        }
    }
    let tokens = processor.get("special_tokens").and_then(Value::as_object);
    for (name, token) in tokens.into_iter().flatten() {
        let count = |key: &str| token.get(key).and_then(Value::as_array).map(Vec::len);
        if count("ids") != count("tokens") {
            problems.push(format!(
                "{at}.special_tokens.{name} has not as many ids as tokens"
            ));
        }
    }
}

/// SentencePiece's table of characters begins with the size of its trie in bytes (little-endian, four
/// bytes; `nmt_norm` in SentencePiece's `normalizer.cc`). The library sets aside that much before it looks at
/// what there is: four gigabytes for a few bytes.
fn check_charsmaps(part: &Value, at: &str, problems: &mut Vec<String>) {
    match part {
        Value::Array(parts) => {
            for (i, part) in parts.iter().enumerate() {
                check_charsmaps(part, &format!("{at}[{i}]"), problems);
            }
        }
        Value::Object(parts) => {
            for (key, part) in parts {
                let at = format!("{at}.{key}");
                match part.as_str().filter(|_| key == "precompiled_charsmap") {
                    Some(text) => problems.extend(check_charsmap(text, &at)),
                    None => check_charsmaps(part, &at, problems),
                }
            }
        }
        _ => {}
    }
}

fn check_charsmap(text: &str, at: &str) -> Option<String> {
    // Eight characters stand for six bytes. What is no base 64 is the library's to refuse.
    let head = STANDARD.decode(text.get(..8)?).ok()?;
    let announced = u32::from_le_bytes(head.get(..4)?.try_into().ok()?) as usize;
    let most = text.len().div_ceil(4).saturating_mul(3).saturating_sub(4);
    (announced > most).then(|| {
        format!("{at} announces a trie of {announced} bytes and goes on for {most} at most")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{bos_post_processor, tokenizer_json};
    use crate::tokenizer::Tokenizer;
    use serde_json::json;

    fn refused(json: &Value) -> String {
        let read = Tokenizer::from_parts(json.to_string().as_bytes(), None, None);
        read.unwrap_err().to_string()
    }

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let error = guarded::<(), String>(|| panic!("seven of {}", 9)).unwrap_err();
        assert!(error.to_string().contains("damaged") && error.to_string().contains("seven of 9"));
        assert!(
            guarded::<(), _>(|| Err("plain"))
                .unwrap_err()
                .to_string()
                .contains("plain")
        );
        assert_eq!(guarded::<_, String>(|| Ok(3)).unwrap(), 3);
    }

    #[test]
    fn merges_without_the_prefix_are_refused_by_number() {
        let mut json = tokenizer_json();
        json["model"]["continuing_subword_prefix"] = json!("##");
        let error = refused(&json);
        assert!(error.contains("model.merges[0] = [\"Ġ\",\"y\"]"), "{error}");
        json["model"]["merges"] = json!(["a b"]);
        assert!(refused(&json).contains("model.merges[0] = \"a b\""));
    }

    #[test]
    fn tables_of_characters_that_announce_more_than_there_is_are_refused() {
        let with = |bytes: &[u8]| {
            let mut json = tokenizer_json();
            let map = STANDARD.encode(bytes);
            json["normalizer"] = json!({"type": "Sequence", "normalizers": [
                {"type": "NFC"}, {"type": "Precompiled", "precompiled_charsmap": map}
            ]});
            json
        };
        let error = refused(&with(b"\x00\x00\x00\x80\x00\x00\x00\x00"));
        let part =
            "normalizer.normalizers[1].precompiled_charsmap announces a trie of 2147483648 bytes";
        assert!(error.contains(part), "{error}");
        // A trie of one unit, and no text: nothing is replaced.
        let sound = with(b"\x04\x00\x00\x00\x00\x00\x00\x00").to_string();
        assert!(Tokenizer::from_parts(sound.as_bytes(), None, None).is_ok());
    }

    #[test]
    fn templates_that_name_what_is_not_there_are_refused() {
        let mut json = tokenizer_json();
        let mut template = bos_post_processor(&json);
        template["special_tokens"] =
            json!({"</s>": {"id": "</s>", "ids": [1, 2], "tokens": ["</s>"]}});
        template["single"][1]["Sequence"]["id"] = json!("B");
        json["post_processor"] = json!({"type": "Sequence", "processors": [template]});
        let error = refused(&json);
        for part in [
            "post_processor.processors[0].single[0] names \"<s>\"",
            "single[1] is of a text B",
            "special_tokens.</s> has not as many",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_template_s_id_without_a_token_is_refused_when_it_is_made() {
        let mut json = tokenizer_json();
        json["post_processor"] = bos_post_processor(&json);
        json["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([70_000]);
        let bytes = json.to_string();
        let tokenizer = Tokenizer::from_parts(bytes.as_bytes(), None, None).unwrap();
        let error = tokenizer.encode("a", true).unwrap_err().to_string();
        assert!(error.contains("token 70000"), "{error}");
        assert!(tokenizer.encode("a", false).is_ok());
    }

    #[test]
    fn a_decoder_that_cuts_more_than_there_is_is_an_error() {
        let mut json = tokenizer_json();
        json["decoder"] = json!({"type": "Strip", "content": "a", "start": 0, "stop": 9});
        let bytes = json.to_string();
        let tokenizer = Tokenizer::from_parts(bytes.as_bytes(), None, None).unwrap();
        let ids = tokenizer.encode("a", false).unwrap();
        assert!(
            tokenizer
                .decode(&ids, false)
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
        assert_eq!(tokenizer.decode(&[], false).unwrap(), "");
    }
}

//! JSON as rows have it: what a parser would read without a word, and differently from what is meant, is an error.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::shown;

/// The value of `bytes`.
///
/// # Errors
/// In words: syntax with its column, a key that an object has twice, an integer of more than 64 bits, and what Python
/// writes and JSON does not have.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    match value {
        Ok(value) => match long_integer(bytes) {
            Some(number) => Err(format!(
                "the number {} has more digits than 64 bits hold; write it as a string",
                shown(&number)
            )),
            None => Ok(value),
        },
        Err(error) => Err(describe(bytes, &error)),
    }
}

/// The parser's words, or better ones where the reason is known.
fn describe(bytes: &[u8], error: &serde_json::Error) -> String {
    if bytes.starts_with(b"\xEF\xBB\xBF") {
        return "it begins with a byte-order mark, as where files were joined; remove it"
            .to_owned();
    }
    if error.line() <= 1 {
        let near = error.column().saturating_sub(2);
        let near = bytes.get(near..).unwrap_or_default();
        for name in ["NaN", "Infinity"] {
            // The parser stops at its first letter, or at the minus before it.
            let at_most_two = [near, near.get(1..).unwrap_or_default()];
            if at_most_two.iter().any(|b| b.starts_with(name.as_bytes())) {
                return format!(
                    "{name} at column {} is Python's, not JSON's; write null, or leave the column out",
                    error.column()
                );
            }
        }
    }
    let text = error.to_string();
    if text.starts_with("recursion limit exceeded") {
        return "it is nested more than 128 levels deep".to_owned();
    }
    text
}

/// An integer outside strings that neither `i64` nor `u64` holds, and that would be read rounded.
fn long_integer(bytes: &[u8]) -> Option<String> {
    const DIGITS: usize = 19;
    let mut in_string = false;
    let mut escaped = false;
    let mut number = String::new();
    let is_long = |number: &str| {
        number.len() > DIGITS
            && !number.contains(['.', 'e', 'E'])
            && number.parse::<i64>().is_err()
            && number.parse::<u64>().is_err()
    };
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E' => number.push(char::from(byte)),
            _ => {
                if is_long(&number) {
                    return Some(number);
                }
                number.clear();
                in_string = byte == b'"';
            }
        }
    }
    is_long(&number).then_some(number)
}

/// Builds a value and refuses objects with a key twice.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict)?;
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "an object has the key `{}` twice",
                    shown(&key)
                )));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn values_are_those_of_serde_json() {
        for text in [
            r#"{"a": [1, -2, 18446744073709551615, 1.5, 1e300, true, null, "é\u0000\n"], "b": {"c": {}}}"#,
            r#"{"digits in a string": "99999999999999999999999"}"#,
            "[]",
            "-9223372036854775808",
            "0.10000000000000000000001",
        ] {
            let theirs: Value = serde_json::from_str(text).unwrap();
            assert_eq!(parse(text.as_bytes()).unwrap(), theirs, "{text}");
        }
    }

    #[test]
    fn what_would_be_read_differently_is_an_error() {
        for (text, expected) in [
            (
                r#"{"a": 1, "b": {"a": 2, "a\u001b": 3, "a\u001b": 4}}"#,
                r"has the key `a\u{1b}` twice",
            ),
            (r#"{"a": NaN}"#, "NaN at column 7 is Python's"),
            (r#"{"a": [1, -Infinity]}"#, "Infinity at column"),
            (r#"{"a": Infinity}"#, "Infinity at column 7 is Python's"),
            (
                r#"{"a": 123456789012345678901}"#,
                "123456789012345678901 has more digits",
            ),
            ("18446744073709551616", "more digits"),
            (r#"{"a": 1e999}"#, "number out of range"),
            (r#"{"a": "\ud800"}"#, "hex escape"),
            ("{} x", "trailing characters"),
            ("\u{FEFF}{}", "byte-order mark"),
            ("{\"a\": \"\u{1}\"}", "control character"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let deep = "[".repeat(200);
        assert!(parse(deep.as_bytes()).unwrap_err().contains("128 levels"));
    }
}

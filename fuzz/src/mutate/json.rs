//! Changes of JSON values.

use serde_json::{Map, Value, json};

use super::EXTREMES;
use crate::random::Random;

const STRINGS: [&str; 16] = [
    "",
    " ",
    "\0",
    "a",
    "0",
    "-1",
    "1e999",
    "null",
    "true",
    "nan",
    "\u{feff}",
    "\u{202e}é🧑\u{200d}🚀",
    "..",
    "a/b",
    "\u{1b}]0;x\u{7}",
    "%s{}{{}}{%",
];

/// A value of any kind.
pub fn leaf(random: &mut Random, words: &[&str]) -> Value {
    match random.below(14) {
        0 => Value::Null,
        1 => Value::Bool(random.once_in(2)),
        2 | 3 => Value::from(*random.pick(&EXTREMES)),
        4 => Value::from((*random.pick(&EXTREMES) as i64).wrapping_neg()),
        5 => {
            let floats = [
                0.5,
                -0.0,
                1e-300,
                5e-324,
                1e300,
                -1e300,
                1.5,
                1e19,
                f64::MAX,
            ];
            Value::from(*random.pick(&floats))
        }
        6 => json!([]),
        7 => json!({}),
        8 => Value::from(*random.pick(&STRINGS)),
        9 => Value::from("x".repeat(1 << random.below(13))),
        10 => nested(random),
        11 => {
            let item = Value::from(*random.pick(&EXTREMES));
            Value::Array(vec![item; random.below(5)])
        }
        _ if words.is_empty() => Value::from("x"),
        _ => Value::from(*random.pick(words)),
    }
}

/// Lists or objects in each other, on both sides of what parsers follow.
fn nested(random: &mut Random) -> Value {
    let depth = *random.pick(&[2, 10, 100, 126, 127, 128, 150]);
    let mut value = Value::Null;
    let lists = random.once_in(2);
    for _ in 0..depth {
        value = match lists {
            true => Value::Array(vec![value]),
            false => Value::Object(Map::from_iter([("a".to_owned(), value)])),
        };
    }
    value
}

/// One change at a random place: another value, a key less, more or renamed, an element twice. `words` are
/// keys and values that mean something where the document is read.
pub fn change(random: &mut Random, document: &mut Value, words: &[&str]) {
    change_within(random, document, words, 16);
}

fn change_within(random: &mut Random, value: &mut Value, words: &[&str], depth: usize) {
    if depth > 0 && !random.once_in(4) {
        let inner = match value {
            Value::Object(map) => {
                let index = random.below(map.len());
                map.values_mut().nth(index)
            }
            Value::Array(list) => {
                let index = random.below(list.len());
                list.get_mut(index)
            }
            _ => None,
        };
        if let Some(inner) = inner {
            return change_within(random, inner, words, depth - 1);
        }
    }
    match value {
        Value::Object(map) if !random.once_in(5) => object(random, map, words),
        Value::Array(list) if !random.once_in(5) => array(random, list, words),
        Value::Number(number) if !random.once_in(3) => {
            let old = number.as_u64().unwrap_or(1);
            *value = match random.below(4) {
                0 => Value::from(super::number(random, old) as i64),
                1 => Value::from(super::number(random, old)),
                2 => Value::from(number.as_f64().unwrap_or(1.0) * 0.5),
                _ => Value::from(number.to_string()),
            };
        }
        Value::String(text) if !random.once_in(3) => {
            let mut bytes = std::mem::take(text).into_bytes();
            super::text(random, &mut bytes, words);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        other => *other = leaf(random, words),
    }
}

fn object(random: &mut Random, map: &mut Map<String, Value>, words: &[&str]) {
    let key = match random.below(map.len().max(1)) {
        _ if map.is_empty() => None,
        index => map.keys().nth(index).cloned(),
    };
    let new = match words.is_empty() || random.once_in(6) {
        true => (*random.pick(&STRINGS)).to_owned(),
        false => (*random.pick(words)).to_owned(),
    };
    match (random.below(5), key) {
        (0, Some(key)) => {
            map.shift_remove(&key);
        }
        (1, Some(key)) => {
            if let Some(value) = map.shift_remove(&key) {
                map.insert(new, value);
            }
        }
        (2, Some(key)) => {
            let copy = map[&key].clone();
            map.insert(new, copy);
        }
        (3, Some(key)) => {
            let value = leaf(random, words);
            map.insert(key, value);
        }
        _ => {
            let value = leaf(random, words);
            map.insert(new, value);
        }
    }
}

fn array(random: &mut Random, list: &mut Vec<Value>, words: &[&str]) {
    let at = random.below(list.len());
    match random.below(5) {
        _ if list.is_empty() => list.push(leaf(random, words)),
        0 => {
            list.remove(at);
        }
        1 => list.insert(at, list[at].clone()),
        2 => {
            let other = random.below(list.len());
            list.swap(at, other);
        }
        3 => list.insert(at, leaf(random, words)),
        _ => list.truncate(at),
    }
}

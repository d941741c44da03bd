//! JSON whose floats are what was written, to the bit.
//!
//! serde_json reads a float of more than 15 digits to within one unit of its last place. Its feature `float_roundtrip`
//! would mend that for every reader of the build; here only what is written again or computed with has to be exact.

use serde_json::{Number, Value};

/// Reads `text`, every float as the nearest to what it says.
///
/// # Errors
/// When it is no JSON.
pub fn exact_json(text: &str) -> serde_json::Result<Value> {
    let value: Value = serde_json::from_str(text)?;
    let mut exact = value.clone();
    // Where a key stands twice, numbers are not in the order of the text: then they stay as they are.
    match settle(&mut exact, &mut numbers(text)) {
        Some(()) => Ok(exact),
        None => Ok(value),
    }
}

/// Puts the numbers of a text into the value that was read from it; none if they are not the same.
fn settle<'a>(value: &mut Value, numbers: &mut impl Iterator<Item = &'a str>) -> Option<()> {
    match value {
        Value::Number(read) => {
            let written: f64 = numbers.next()?.parse().ok()?;
            if !read.is_f64() {
                return Some(());
            }
            let near = read.as_f64()?;
            if (written - near).abs() > near.abs() * 4.0 * f64::EPSILON {
                return None;
            }
            *read = Number::from_f64(written)?;
            Some(())
        }
        Value::Array(items) => items.iter_mut().try_for_each(|item| settle(item, numbers)),
        Value::Object(map) => map.values_mut().try_for_each(|item| settle(item, numbers)),
        _ => Some(()),
    }
}

/// The numbers of a JSON text, in its order.
fn numbers(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let at = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit())?;
            let (_, from) = rest.split_at_checked(at)?;
            if let Some(string) = from.strip_prefix('"') {
                rest = behind(string)?;
                continue;
            }
            let ends = |c: char| !(c.is_ascii_digit() || "+-.eE".contains(c));
            let (number, next) = from.split_at_checked(from.find(ends).unwrap_or(from.len()))?;
            rest = next;
            return Some(number);
        }
    })
}

/// What follows a string whose first quotation mark is off.
fn behind(mut string: &str) -> Option<&str> {
    loop {
        let at = string.find(['"', '\\'])?;
        let (_, from) = string.split_at_checked(at)?;
        let mut chars = from.chars();
        if chars.next() == Some('"') {
            return Some(chars.as_str());
        }
        chars.next();
        string = chars.as_str();
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_float_comes_back_as_it_was_written() {
        let mut state = 7_u64;
        let mut drawn = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            f64::from_bits(state ^ (state >> 29))
        };
        let mut all: Vec<f64> = (0..20_000)
            .map(|_| drawn())
            .filter(|x| x.is_finite())
            .collect();
        all.extend([7.366_080_350_654_069_5, -0.0, 5e-324, f64::MAX, 1e15, 0.1]);
        let text =
            serde_json::to_string(&json!({ "a \"1.5\\": [all], "e": 1, "text": "2.5" })).unwrap();
        let read = exact_json(&text).unwrap();
        let found = read["a \"1.5\\"][0].as_array().unwrap();
        assert_eq!(found.len(), all.len());
        for (found, wanted) in found.iter().zip(&all) {
            assert_eq!(
                found.as_f64().unwrap().to_bits(),
                wanted.to_bits(),
                "{wanted:?}"
            );
        }
        assert_eq!((&read["e"], &read["text"]), (&json!(1), &json!("2.5")));
        // Where this holds no longer, serde_json does it by itself.
        let plain: Vec<f64> = serde_json::from_str(&serde_json::to_string(&all).unwrap()).unwrap();
        assert_ne!(plain, all);
    }

    #[test]
    fn what_cannot_be_matched_stays_as_serde_json_reads_it() {
        for text in [
            "{\"a\": 1.5, \"b\": 2.5, \"a\": 3.5}",
            "[1e2, \"\\\\\", -1.25, 10000000000000000000]",
            "0.5",
        ] {
            let plain: Value = serde_json::from_str(text).unwrap();
            assert_eq!(exact_json(text).unwrap(), plain, "{text}");
        }
        assert!(exact_json("{\"a\": 1.}").is_err());
        assert!(exact_json("\"open").is_err());
    }
}

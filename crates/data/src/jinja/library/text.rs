//! Python's `str`, as functions.

use crate::jinja::error::{Result, value_error};
use crate::jinja::meter::{Builder, Held, spend, spend_bytes, spend_characters};
use crate::jinja::values::{Value, is_space};

/// Whether the character has a case in Python's sense.
fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase()
}

pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
}

pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
}

pub(super) fn is_title(text: &str) -> bool {
    let (mut after_cased, mut any) = (false, false);
    for c in text.chars() {
        if (c.is_uppercase() && after_cased) || (c.is_lowercase() && !after_cased) {
            return false;
        }
        after_cased = is_cased(c);
        any = any || after_cased;
    }
    any
}

/// First code points of Unicode's runs of ten decimal digits beyond ASCII.
const DIGIT_RUNS: [u32; 36] = [
    0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6,
    0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50,
    0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10,
];

pub(super) fn is_decimal(c: char) -> bool {
    let code = c as u32;
    c.is_ascii_digit()
        || DIGIT_RUNS
            .iter()
            .any(|start| (*start..start.saturating_add(10)).contains(&code))
}

/// Python's `isdigit`: decimal digits, and digits written above, below or in a circle.
pub(super) fn is_digit(c: char) -> bool {
    is_decimal(c)
        || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨' | '⑴'..='⑼' | '⒈'..='⒐' | '❶'..='❾' | '➀'..='➈' | '➊'..='➒')
}

/// Python's titlecase of one character: capitals of two letters in one have a form of their own.
fn titlecase(c: char) -> String {
    if c.is_ascii() {
        return c.to_ascii_uppercase().to_string();
    }
    let code = c as u32;
    let single = match code {
        0x1c4..=0x1c6 => Some(0x1c5),
        0x1c7..=0x1c9 => Some(0x1c8),
        0x1ca..=0x1cc => Some(0x1cb),
        0x1f1..=0x1f3 => Some(0x1f2),
        // Georgian has capitals for text that is all capitals only.
        0x10d0..=0x10ff => Some(code),
        // Greek vowels with an iota below keep it there.
        0x1f80..=0x1faf => Some(code | 8),
        0x1fb3 | 0x1fc3 | 0x1ff3 => Some(code.saturating_add(9)),
        0x1fbc | 0x1fcc | 0x1ffc => Some(code),
        _ => None,
    };
    if let Some(titled) = single.and_then(char::from_u32) {
        return titled.to_string();
    }
    let mut upper: Vec<char> = c.to_uppercase().collect();
    match (code, upper.as_mut_slice()) {
        (0x149, _) => {}
        (0x1fb2..=0x1ff7, [_, .., last]) if *last == 'Ι' => *last = '\u{345}',
        (0xdf | 0x587 | 0xfb00..=0xfb17, [_, rest @ ..]) => {
            for c in rest {
                *c = c.to_lowercase().next().unwrap_or(*c);
            }
        }
        _ => {}
    }
    upper.into_iter().collect()
}

/// Python's `str.casefold`.
pub(super) fn casefold(text: &str) -> Result<Value> {
    spend_characters(text.len().saturating_mul(4))?;
    let mut out = Builder::new();
    for c in text.chars() {
        match c {
            'ı' => out.push(c)?,
            // Cherokee folds to its capitals, which are the older letters.
            '\u{13a0}'..='\u{13fd}' | '\u{ab70}'..='\u{abbf}' => {
                out.push_str(&c.to_uppercase().collect::<String>())?;
            }
            c => {
                for upper in c.to_uppercase() {
                    out.push_str(&upper.to_lowercase().collect::<String>())?;
                }
            }
        }
    }
    Ok(Value::built(out))
}

/// Python's `isnumeric`: numbers, and Chinese characters that are some.
pub(super) fn is_numeric(c: char) -> bool {
    const CHINESE: &str = "㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零";
    c.is_numeric() || CHINESE.contains(c)
}

pub(super) fn lower(text: &str) -> Result<Value> {
    drop(Held::new(text.len().saturating_mul(3))?);
    Value::text(text.to_lowercase())
}

pub(super) fn upper(text: &str) -> Result<Value> {
    drop(Held::new(text.len().saturating_mul(3))?);
    Value::text(text.to_uppercase())
}

pub(super) fn swapcase(text: &str) -> Result<Value> {
    spend_characters(text.len().saturating_mul(4))?;
    let mut out = Builder::new();
    for c in text.chars() {
        let swapped: String = match c.is_uppercase() {
            true => c.to_lowercase().collect(),
            false => c.to_uppercase().collect(),
        };
        out.push_str(&swapped)?;
    }
    Ok(Value::built(out))
}

pub(super) fn capitalize(text: &str) -> Result<Value> {
    let mut chars = text.chars();
    let first = chars.next().map(titlecase).unwrap_or_default();
    let mut out = Builder::new();
    out.push_str(&first)?;
    out.push_str(&chars.as_str().to_lowercase())?;
    Ok(Value::built(out))
}

/// `str.title`: a capital after everything that has no case.
pub(super) fn title(text: &str) -> Result<Value> {
    spend_characters(text.len().saturating_mul(4))?;
    let mut out = Builder::new();
    let mut after_cased = false;
    for c in text.chars() {
        let changed: String = match after_cased {
            true => c.to_lowercase().collect(),
            false => titlecase(c),
        };
        out.push_str(&changed)?;
        after_cased = is_cased(c);
    }
    Ok(Value::built(out))
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sides {
    Left,
    Right,
    Both,
}

/// `strip`, `lstrip`, `rstrip`: without `chars`, of whitespace.
pub(super) fn strip<'t>(text: &'t str, chars: Option<&str>, sides: Sides) -> Result<&'t str> {
    let listed = chars.map_or(1, |chars| chars.len().max(1));
    spend_characters(text.len().saturating_mul(listed))?;
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = match sides {
        Sides::Right => text,
        _ => text.trim_start_matches(goes),
    };
    Ok(match sides {
        Sides::Left => text,
        _ => text.trim_end_matches(goes),
    })
}

/// Text in a field `width` characters wide.
pub(super) fn justified(text: &str, width: usize, fill: char, side: Sides) -> Result<Value> {
    let missing = width.saturating_sub(text.chars().count());
    let half = missing / 2;
    // CPython puts the odd character to the left only where the width is odd.
    let odd = missing % 2 == 1 && width % 2 == 1;
    let left = match side {
        Sides::Left => missing,
        Sides::Right => 0,
        Sides::Both => half.saturating_add(usize::from(odd)),
    };
    let mut out = Builder::new();
    let fill = fill.to_string();
    out.push_repeated(&fill, left)?;
    out.push_str(text)?;
    out.push_repeated(&fill, missing.saturating_sub(left))?;
    Ok(Value::built(out))
}

pub(super) fn zfill(text: &str, width: usize) -> Result<Value> {
    let sign = text.chars().next().filter(|c| matches!(c, '+' | '-'));
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let mut out = Builder::new();
    if let Some(sign) = sign {
        out.push(sign)?;
    }
    out.push_repeated("0", width.saturating_sub(text.chars().count()))?;
    out.push_str(digits)?;
    Ok(Value::built(out))
}

/// `str.replace`, at most `count` times where that is given.
pub(super) fn replace(text: &str, old: &str, new: &str, count: Option<usize>) -> Result<Value> {
    let count = count.unwrap_or(usize::MAX);
    spend_bytes(text.len().saturating_mul(2))?;
    let mut out = Builder::new();
    if old.is_empty() {
        let mut left = count;
        for c in text.chars() {
            if left > 0 {
                out.push_str(new)?;
                left = left.saturating_sub(1);
            }
            out.push(c)?;
        }
        if left > 0 {
            out.push_str(new)?;
        }
        return Ok(Value::built(out));
    }
    let mut rest = text;
    let mut left = count;
    while left > 0
        && let Some((before, after)) = rest.split_once(old)
    {
        spend(1)?;
        out.push_str(before)?;
        out.push_str(new)?;
        rest = after;
        left = left.saturating_sub(1);
    }
    out.push_str(rest)?;
    Ok(Value::built(out))
}

fn texts<'t>(parts: impl IntoIterator<Item = &'t str>) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    for part in parts {
        spend(1)?;
        values.push(Value::text(part)?);
    }
    Ok(values)
}

/// `split` and, `from_right`, `rsplit`.
pub(super) fn split(
    text: &str,
    separator: Option<&str>,
    most: Option<usize>,
    from_right: bool,
) -> Result<Value> {
    spend_bytes(text.len().saturating_mul(2))?;
    let most = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text;
    let Some(separator) = separator else {
        while parts.len() < most {
            let trimmed = match from_right {
                false => rest.trim_start_matches(is_space),
                true => rest.trim_end_matches(is_space),
            };
            let cut = match from_right {
                false => trimmed.split_once(is_space),
                true => trimmed.rsplit_once(is_space).map(|(a, b)| (b, a)),
            };
            let Some((part, after)) = cut else {
                rest = trimmed;
                break;
            };
            spend(1)?;
            parts.push(part);
            rest = after;
        }
        let last = match from_right {
            false => rest.trim_start_matches(is_space),
            true => rest.trim_end_matches(is_space),
        };
        if !last.is_empty() {
            parts.push(last);
        }
        if from_right {
            parts.reverse();
        }
        return Value::list(texts(parts)?);
    };
    if separator.is_empty() {
        return value_error("empty separator");
    }
    while parts.len() < most {
        let cut = match from_right {
            false => rest.split_once(separator),
            true => rest.rsplit_once(separator).map(|(a, b)| (b, a)),
        };
        let Some((part, after)) = cut else {
            break;
        };
        spend(1)?;
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    if from_right {
        parts.reverse();
    }
    Value::list(texts(parts)?)
}

/// `splitlines`: at every line end Python knows.
pub(super) fn lines(text: &str, keep_ends: bool) -> Result<Vec<&str>> {
    spend_bytes(text.len())?;
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let tail = rest.get(at..).unwrap_or("");
        let end = match tail.starts_with("\r\n") {
            true => 2,
            false => tail.chars().next().map_or(1, char::len_utf8),
        };
        let after = at.saturating_add(end);
        let kept = if keep_ends { after } else { at };
        lines.push(rest.get(..kept).unwrap_or(""));
        spend(1)?;
        rest = rest.get(after..).unwrap_or("");
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    Ok(lines)
}

/// `splitlines` as a list.
pub(super) fn splitlines(text: &str, keep_ends: bool) -> Result<Value> {
    Value::list(texts(lines(text, keep_ends)?)?)
}

/// `partition` and `rpartition`.
pub(super) fn partition(text: &str, separator: &str, from_right: bool) -> Result<Value> {
    if separator.is_empty() {
        return value_error("empty separator");
    }
    spend_bytes(text.len().saturating_mul(2))?;
    let cut = match from_right {
        false => text.split_once(separator),
        true => text.rsplit_once(separator),
    };
    let parts = match (cut, from_right) {
        (Some((before, after)), _) => [before, separator, after],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Value::tuple(texts(parts)?)
}

/// `text[start:end]` in characters, as the optional bounds of `find` and its like mean it, with the
/// place of its first character; nothing where the start lies behind the end.
pub(super) fn bounded(
    text: &str,
    start: Option<i128>,
    end: Option<i128>,
) -> Result<Option<(&str, usize)>> {
    if start.is_none() && end.is_none() {
        return Ok(Some((text, 0)));
    }
    spend_bytes(text.len().saturating_mul(4))?;
    let length = text.chars().count() as i128;
    let clamp = |index: i128| match index < 0 {
        true => index.saturating_add(length).max(0),
        false => index,
    };
    let start = start.map_or(0, clamp);
    let end = end.map_or(length, clamp).min(length);
    if start > end {
        return Ok(None);
    }
    let offset = |n: i128| {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        text.char_indices().nth(n).map_or(text.len(), |(at, _)| at)
    };
    let part = text.get(offset(start)..offset(end)).unwrap_or("");
    Ok(Some((part, usize::try_from(start).unwrap_or(0))))
}

/// Jinja2's `title` filter: a capital at the start of each word, words ending at `-`, spaces and
/// opening brackets.
pub(super) fn title_filter(text: &str) -> Result<Value> {
    spend_characters(text.len().saturating_mul(4))?;
    let mut out = Builder::new();
    let mut at_start = true;
    for c in text.chars() {
        if c == '-' || is_space(c) || matches!(c, '(' | '{' | '[' | '<') {
            at_start = true;
            out.push(c)?;
            continue;
        }
        let changed: String = match at_start {
            true => c.to_uppercase().collect(),
            false => c.to_lowercase().collect(),
        };
        at_start = false;
        out.push_str(&changed)?;
    }
    Ok(Value::built(out))
}

/// Jinja2's `indent` filter.
pub(super) fn indent(text: &str, indention: &str, first: bool, blank: bool) -> Result<Value> {
    let with_end = format!("{text}\n");
    let mut out = Builder::new();
    for (i, line) in lines(&with_end, false)?.into_iter().enumerate() {
        if i > 0 {
            out.push('\n')?;
        }
        if (i == 0 && first) || (i > 0 && (blank || !line.is_empty())) {
            out.push_str(indention)?;
        }
        out.push_str(line)?;
    }
    Ok(Value::built(out))
}

pub(super) fn word_count(text: &str) -> i128 {
    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    words.filter(|word| !word.is_empty()).count() as i128
}

//! Python's numbers: reading, rounding, and writing them in a field.

use crate::jinja::error::{Error, Kind, Result, budget_error, type_error, value_error};
use crate::jinja::meter::Builder;
use crate::jinja::values::{Value, is_space};

/// Python's `float(text)`.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    let bare = text.strip_prefix(['+', '-']).unwrap_or(text);
    let lower = bare.to_ascii_lowercase();
    if matches!(lower.as_str(), "inf" | "infinity" | "nan") {
        return text.to_ascii_lowercase().parse().ok();
    }
    if !bare.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    without_underscores(text)?.parse().ok()
}

/// Digits without the single underscores Python allows between them.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        if *byte == b'_' {
            let before = at.checked_sub(1).and_then(|at| bytes.get(at));
            let after = at.checked_add(1).and_then(|at| bytes.get(at));
            let digit = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
            if !digit(before) || !digit(after) {
                return None;
            }
        }
    }
    Some(text.replace('_', ""))
}

/// Python's `int(text, base)`.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, bare) = match text.strip_prefix('-') {
        Some(bare) => (true, bare),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = bare.to_ascii_lowercase();
    let prefix = match lower.get(..2) {
        Some("0x") => Some(16),
        Some("0o") => Some(8),
        Some("0b") => Some(2),
        _ => None,
    };
    let (digits, base) = match prefix {
        Some(own) if base == own || base == 0 => (lower.get(2..)?, own),
        _ => (lower.as_str(), if base == 0 { 10 } else { base }),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let magnitude = i128::from_str_radix(&without_underscores(digits)?, base).ok()?;
    match negative {
        true => magnitude.checked_neg(),
        false => Some(magnitude),
    }
}

/// Jinja2's `int` filter.
pub(super) fn int_filter(value: &Value, default: Value, base: i128) -> Result<Value> {
    value.defined()?;
    let truncated = |x: f64| match x.abs() < 1e38 {
        true => Ok(Value::Int(x.trunc() as i128)),
        false if x.is_nan() => Ok(default.clone()),
        false => Err(Error::new(
            Kind::Overflow,
            "an integer has more than 38 digits",
        )),
    };
    if let Some(text) = value.as_str() {
        let base = match u32::try_from(base) {
            Ok(base) if base == 0 || (2..=36).contains(&base) => base,
            _ => return Ok(default),
        };
        if let Some(i) = parse_int(text, base) {
            return Ok(Value::Int(i));
        }
        let number = parse_float(text).filter(|x| x.is_finite());
        return number.map_or_else(|| Ok(default.clone()), truncated);
    }
    match (value, value.as_int()) {
        (Value::Float(x), _) => truncated(*x),
        (_, Some(i)) => Ok(Value::Int(i)),
        _ => Ok(default),
    }
}

/// Powers of ten beyond this change nothing in a float.
const LARGEST_EXPONENT: i128 = 330;

/// Python's `round(x, digits)` of a float: of its exact value, halves to even.
fn round_float(x: f64, digits: i128) -> f64 {
    if !x.is_finite() || digits > LARGEST_EXPONENT {
        return x;
    }
    if digits < -LARGEST_EXPONENT {
        return 0.0_f64.copysign(x);
    }
    if digits >= 0 {
        let digits = usize::try_from(digits).unwrap_or(0);
        return format!("{x:.digits$}").parse().unwrap_or(x);
    }
    let unit = 10_f64.powi(i32::try_from(digits.saturating_neg()).unwrap_or(i32::MAX));
    (x / unit).round_ties_even() * unit
}

/// Jinja2's `round` filter.
pub(super) fn round_filter(value: &Value, precision: i128, method: &str) -> Result<Value> {
    value.defined()?;
    let Some(x) = value.as_float() else {
        return type_error(format!(
            "type {} doesn't define __round__ method",
            value.type_name()
        ));
    };
    match method {
        "common" => match value {
            Value::Float(_) => Ok(Value::Float(round_float(x, precision))),
            _ => {
                let i = value.as_int().unwrap_or(0);
                let unit = u32::try_from(precision.saturating_neg().max(0)).ok();
                let unit = unit.and_then(|unit| 10_i128.checked_pow(unit));
                Ok(Value::Int(unit.map_or(0, |unit| round_int(i, unit))))
            }
        },
        "ceil" | "floor" => {
            let exponent = i32::try_from(precision.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT));
            let unit = 10_f64.powi(exponent.unwrap_or(0));
            let scaled = x * unit;
            if !scaled.is_finite() {
                return Err(Error::new(
                    Kind::Overflow,
                    "a number is too large to be rounded",
                ));
            }
            let rounded = match method {
                "ceil" => scaled.ceil(),
                _ => scaled.floor(),
            };
            Ok(Value::Float(rounded / unit))
        }
        _ => value_error("method must be common, ceil or floor"),
    }
}

/// To a multiple of `unit`, halves to the even one.
fn round_int(i: i128, unit: i128) -> i128 {
    let remainder = i.checked_rem_euclid(unit).unwrap_or(0);
    let below = i.saturating_sub(remainder);
    let twice = remainder.saturating_mul(2);
    let odd = below.checked_div(unit).is_some_and(|count| count % 2 != 0);
    match twice > unit || (twice == unit && odd) {
        true => below.saturating_add(unit),
        false => below,
    }
}

/// Jinja2's `filesizeformat` filter.
pub(super) fn file_size(bytes: f64, binary: bool) -> String {
    const LETTERS: [&str; 8] = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return "1 Byte".to_owned();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let mut unit = base;
    for (i, letter) in LETTERS.iter().enumerate() {
        let next = unit * base;
        if bytes < next || i.saturating_add(1) == LETTERS.len() {
            let size = base * bytes / next;
            return match binary {
                true => format!("{size:.1} {}iB", letter.to_uppercase()),
                false => format!("{size:.1} {letter}B"),
            };
        }
        unit = next;
    }
    String::new()
}

/// How a number or text is laid out: Python's format specifications, of both kinds.
#[derive(Debug, Clone, Default)]
pub(super) struct Layout {
    pub(super) fill: Option<char>,
    /// `<`, `>`, `^` or `=`.
    pub(super) align: Option<char>,
    /// `+`, `-` or a space.
    pub(super) sign: Option<char>,
    pub(super) alternate: bool,
    pub(super) width: usize,
    /// `,` or `_`.
    pub(super) grouping: Option<char>,
    pub(super) precision: Option<usize>,
}

/// More digits than this are a bomb.
const DIGITS: usize = 5000;

fn checked_precision(precision: usize) -> Result<usize> {
    match precision > DIGITS {
        true => budget_error(format!(
            "a number's precision is {precision}, and {DIGITS} is the most"
        )),
        false => Ok(precision),
    }
}

fn grouped(digits: &str, separator: char, every: usize) -> String {
    let length = digits.len();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        let left = length.saturating_sub(i);
        if i > 0 && left.checked_rem(every) == Some(0) {
            out.push(separator);
        }
        out.push(c);
    }
    out
}

/// An integer's digits in the base of `kind` (`d`, `x`, `X`, `o`, `b`), without a sign.
pub(super) fn int_digits(i: i128, kind: char, alternate: bool) -> (String, &'static str) {
    let magnitude = i.unsigned_abs();
    let (digits, prefix) = match kind {
        'x' => (format!("{magnitude:x}"), "0x"),
        'X' => (format!("{magnitude:X}"), "0X"),
        'o' => (format!("{magnitude:o}"), "0o"),
        'b' => (format!("{magnitude:b}"), "0b"),
        _ => (magnitude.to_string(), ""),
    };
    (digits, if alternate { prefix } else { "" })
}

/// A float's digits in the form of `kind` (`e`, `f`, `g`, `%` and capitals), without a sign.
pub(super) fn float_digits(
    x: f64,
    kind: char,
    precision: Option<usize>,
    alternate: bool,
) -> Result<String> {
    let x = x.abs();
    let capital = kind.is_ascii_uppercase();
    let kind = kind.to_ascii_lowercase();
    if !x.is_finite() {
        let word = if x.is_nan() { "nan" } else { "inf" };
        let word = if capital {
            word.to_uppercase()
        } else {
            word.to_owned()
        };
        return Ok(if kind == '%' {
            format!("{word}%")
        } else {
            word
        });
    }
    let precision = checked_precision(precision.unwrap_or(6))?;
    let text = match kind {
        'e' => exponent_form(x, precision),
        'g' => general_form(x, precision.max(1), alternate),
        '%' => format!("{:.precision$}%", x * 100.0),
        _ => format!("{x:.precision$}"),
    };
    Ok(match capital {
        true => text.to_uppercase(),
        false => text,
    })
}

fn exponent_form(x: f64, precision: usize) -> String {
    let text = format!("{x:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    match exponent.strip_prefix('-') {
        Some(exponent) => format!("{digits}e-{exponent:0>2}"),
        None => format!("{digits}e+{exponent:0>2}"),
    }
}

fn general_form(x: f64, precision: usize, alternate: bool) -> String {
    let before_point = precision.saturating_sub(1);
    let scientific = format!("{x:.before_point$e}");
    let exponent = scientific.split_once('e').and_then(|(_, e)| e.parse().ok());
    let exponent: i64 = exponent.unwrap_or(0);
    let fixed = exponent >= -4 && exponent < precision as i64;
    let text = if fixed {
        let decimals = (before_point as i64).saturating_sub(exponent).max(0) as usize;
        format!("{x:.decimals$}")
    } else {
        exponent_form(x, before_point)
    };
    if alternate {
        return text;
    }
    let (digits, tail) = match text.split_once('e') {
        Some((digits, exponent)) => (digits.to_owned(), format!("e{exponent}")),
        None => (text, String::new()),
    };
    match digits.contains('.') {
        true => {
            let short = digits.trim_end_matches('0').trim_end_matches('.');
            format!("{short}{tail}")
        }
        false => format!("{digits}{tail}"),
    }
}

/// A number in its field: sign, prefix, digits, grouped and filled.
pub(super) fn write_number(
    out: &mut Builder,
    negative: bool,
    prefix: &str,
    digits: &str,
    layout: &Layout,
) -> Result<()> {
    let sign = match (negative, layout.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let grouped = match layout.grouping {
        Some(separator) => {
            let whole_end = digits
                .find(|c: char| !c.is_ascii_hexdigit() || c == 'e')
                .unwrap_or(digits.len());
            let (whole, rest) = digits.split_at_checked(whole_end).unwrap_or((digits, ""));
            let every = if prefix.is_empty() || separator == ',' {
                3
            } else {
                4
            };
            format!("{}{rest}", grouped(whole, separator, every))
        }
        None => digits.to_owned(),
    };
    let length = [sign, prefix, grouped.as_str()]
        .into_iter()
        .map(|part| part.chars().count());
    let missing = layout.width.saturating_sub(length.sum());
    let fill = layout.fill.unwrap_or(' ').to_string();
    let (left, inner, right) = match layout.align.unwrap_or('>') {
        '<' => (0, 0, missing),
        '^' => (missing / 2, 0, missing.saturating_sub(missing / 2)),
        '=' => (0, missing, 0),
        _ => (missing, 0, 0),
    };
    out.push_repeated(&fill, left)?;
    out.push_str(sign)?;
    out.push_str(prefix)?;
    out.push_repeated(&fill, inner)?;
    out.push_str(&grouped)?;
    out.push_repeated(&fill, right)
}

/// Text in its field, cut to the precision.
pub(super) fn write_text(out: &mut Builder, text: &str, layout: &Layout) -> Result<()> {
    let cut = layout.precision.map_or(text, |most| {
        let end = text
            .char_indices()
            .nth(most)
            .map_or(text.len(), |(at, _)| at);
        text.get(..end).unwrap_or(text)
    });
    let missing = layout.width.saturating_sub(cut.chars().count());
    let fill = layout.fill.unwrap_or(' ').to_string();
    let left = match layout.align.unwrap_or('<') {
        '>' => missing,
        '^' => missing / 2,
        _ => 0,
    };
    out.push_repeated(&fill, left)?;
    out.push_str(cut)?;
    out.push_repeated(&fill, missing.saturating_sub(left))
}

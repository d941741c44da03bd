//! Python's `text % values`.

use super::numbers::{Layout, float_digits, int_digits, write_number, write_text};
use crate::jinja::error::{Result, type_error, value_error};
use crate::jinja::meter::{Builder, spend};
use crate::jinja::values::{Value, repr};

struct Values<'v> {
    given: &'v Value,
    /// The values one after the other.
    items: Vec<Value>,
    at: usize,
}

impl Values<'_> {
    fn next(&mut self) -> Result<Value> {
        let Some(value) = self.items.get(self.at) else {
            return type_error("not enough arguments for format string");
        };
        self.at = self.at.saturating_add(1);
        Ok(value.clone())
    }
}

/// `format % values`.
pub(crate) fn percent_format(format: &str, values: &Value) -> Result<Value> {
    let mut values = Values {
        given: values,
        items: match values {
            Value::Seq(seq) if seq.kind.is_tuple() => seq.items.clone(),
            other => vec![other.clone()],
        },
        at: 0,
    };
    let mut named = false;
    let mut out = Builder::new();
    let mut rest = format;
    while let Some((before, tail)) = rest.split_once('%') {
        spend(1)?;
        out.push_str(before)?;
        rest = directive(&mut out, tail, &mut values, &mut named)?;
    }
    out.push_str(rest)?;
    let left_over = values.at < values.items.len();
    let may_be_left = named
        || matches!(values.given, Value::Dict(_) | Value::Undefined(_))
        || matches!(values.given, Value::Seq(seq) if !seq.kind.is_tuple());
    if left_over && !may_be_left {
        return type_error("not all arguments converted during string formatting");
    }
    Ok(Value::built(out))
}

/// A count written as digits, or taken from the values where it is a star.
fn count<'t>(text: &'t str, values: &mut Values<'_>) -> Result<(Option<i128>, &'t str)> {
    if let Some(tail) = text.strip_prefix('*') {
        let Some(count) = values.next()?.as_int() else {
            return type_error("* wants int");
        };
        return Ok((Some(count), tail));
    }
    let tail = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let digits = text
        .get(..text.len().saturating_sub(tail.len()))
        .unwrap_or("");
    if digits.is_empty() {
        return Ok((None, tail));
    }
    match digits.parse() {
        Ok(count) => Ok((Some(count), tail)),
        Err(_) => value_error("width too big"),
    }
}

/// One directive, of which the percent sign is read; what is left.
fn directive<'t>(
    out: &mut Builder,
    text: &'t str,
    values: &mut Values<'_>,
    named: &mut bool,
) -> Result<&'t str> {
    let mut text = text;
    let mut key = None;
    if let Some(tail) = text.strip_prefix('(') {
        let Some((name, tail)) = tail.split_once(')') else {
            return value_error("incomplete format key");
        };
        let Value::Dict(dict) = values.given else {
            return type_error("format requires a mapping");
        };
        let Some(value) = dict.get_str(name) else {
            return value_error(format!("there is no key {name:?} to format"));
        };
        key = Some(value.clone());
        *named = true;
        text = tail;
    }
    let mut layout = Layout::default();
    let mut zero = false;
    while let Some(c) = text.chars().next().filter(|c| "-+ 0#".contains(*c)) {
        match c {
            '-' => layout.align = Some('<'),
            '+' => layout.sign = Some('+'),
            ' ' if layout.sign.is_none() => layout.sign = Some(' '),
            '0' => zero = true,
            '#' => layout.alternate = true,
            _ => {}
        }
        text = text.get(1..).unwrap_or("");
    }
    let (width, tail) = count(text, values)?;
    if let Some(width) = width {
        if width < 0 {
            layout.align = Some('<');
        }
        layout.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
    }
    text = tail;
    if let Some(tail) = text.strip_prefix('.') {
        let (precision, tail) = count(tail, values)?;
        let precision = precision.unwrap_or(0).max(0);
        layout.precision = Some(usize::try_from(precision).unwrap_or(usize::MAX));
        text = tail;
    }
    let text = text.strip_prefix(['h', 'l', 'L']).unwrap_or(text);
    let mut chars = text.chars();
    let Some(kind) = chars.next() else {
        return value_error("incomplete format");
    };
    let rest = chars.as_str();
    if kind == '%' {
        out.push('%')?;
        return Ok(rest);
    }
    if !"sradiuoxXeEfFgGc".contains(kind) {
        return value_error(format!("unsupported format character {kind:?}"));
    }
    let value = match key {
        Some(value) => value,
        None => values.next()?,
    };
    let zero_filled = zero && layout.align.is_none();
    match kind {
        's' | 'r' | 'a' => {
            let align = layout.align.unwrap_or('>');
            let shown = match kind {
                's' => value.to_text()?,
                kind => {
                    let mut shown = Builder::new();
                    repr(&mut shown, &value)?;
                    match kind {
                        'a' => ascii(shown.as_str())?,
                        _ => shown.finish().0,
                    }
                }
            };
            layout.align = Some(align);
            write_text(out, &shown, &layout)?;
        }
        'c' => {
            let c = match (value.as_str(), value.as_int()) {
                (Some(text), _) if text.chars().count() == 1 => text.to_owned(),
                (_, Some(code)) => {
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    match c {
                        Some(c) => c.to_string(),
                        None => return value_error("%c arg not in range(0x110000)"),
                    }
                }
                _ => return type_error("%c requires int or char"),
            };
            layout.align = layout.align.or(Some('>'));
            layout.precision = None;
            write_text(out, &c, &layout)?;
        }
        'd' | 'i' | 'u' | 'o' | 'x' | 'X' => {
            value.defined()?;
            let i = match (&value, value.as_int()) {
                (_, Some(i)) => i,
                (Value::Float(x), _) if matches!(kind, 'd' | 'i' | 'u') => float_as_int(*x)?,
                _ => {
                    return type_error(format!(
                        "%{kind} format: a real number is required, not {}",
                        value.type_name()
                    ));
                }
            };
            if zero_filled {
                (layout.fill, layout.align) = (Some('0'), Some('='));
            }
            let (mut digits, prefix) = int_digits(i, kind, layout.alternate);
            if let Some(precision) = layout.precision {
                let missing = precision.saturating_sub(digits.len());
                let mut padded = Builder::new();
                padded.push_repeated("0", missing)?;
                padded.push_str(&digits)?;
                digits = padded.finish().0;
            }
            write_number(out, i < 0, prefix, &digits, &layout)?;
        }
        _ => {
            value.defined()?;
            let Some(x) = value.as_float() else {
                return type_error(format!("must be real number, not {}", value.type_name()));
            };
            if zero_filled {
                (layout.fill, layout.align) = (Some('0'), Some('='));
            }
            let digits = float_digits(x, kind, layout.precision, layout.alternate)?;
            write_number(
                out,
                x.is_sign_negative() && !x.is_nan(),
                "",
                &digits,
                &layout,
            )?;
        }
    }
    Ok(rest)
}

/// A `repr` in ASCII alone, as Python's `ascii` gives it.
pub(super) fn ascii(shown: &str) -> Result<String> {
    let mut out = Builder::new();
    for c in shown.chars() {
        match c as u32 {
            0..=0x7f => out.push(c)?,
            code @ 0x80..=0xff => out.push_str(&format!("\\x{code:02x}"))?,
            code @ 0x100..=0xffff => out.push_str(&format!("\\u{code:04x}"))?,
            code => out.push_str(&format!("\\U{code:08x}"))?,
        }
    }
    Ok(out.finish().0)
}

fn float_as_int(x: f64) -> Result<i128> {
    match x.is_finite() && x.abs() < 1e38 {
        true => Ok(x.trunc() as i128),
        false => value_error("cannot convert float to integer"),
    }
}

//! Python's `str.format`.

use super::args::Args;
use super::numbers::{Layout, float_digits, int_digits, write_number, write_text};
use super::{access, percent};
use crate::jinja::error::{Result, type_error, value_error};
use crate::jinja::meter::{Builder, spend};
use crate::jinja::values::{Value, float_text, repr};

/// How fields without names were numbered so far; one format cannot mix both ways.
#[derive(Default)]
struct Numbering {
    automatic: Option<usize>,
    manual: bool,
}

/// `format.format(args)`.
pub(super) fn format(format: &str, args: &Args) -> Result<Value> {
    let mut out = Builder::new();
    write_all(&mut out, format, args, &mut Numbering::default(), 0)?;
    Ok(Value::built(out))
}

fn write_all(
    out: &mut Builder,
    format: &str,
    args: &Args,
    numbering: &mut Numbering,
    level: u32,
) -> Result<()> {
    if level > 1 {
        return value_error("Max string recursion exceeded");
    }
    let mut rest = format;
    while let Some(at) = rest.find(['{', '}']) {
        spend(1)?;
        out.push_str(rest.get(..at).unwrap_or(""))?;
        let tail = rest.get(at..).unwrap_or("");
        if let Some(after) = tail.strip_prefix("{{").or_else(|| tail.strip_prefix("}}")) {
            out.push_str(tail.get(..1).unwrap_or(""))?;
            rest = after;
            continue;
        }
        let Some(field) = tail.strip_prefix('{') else {
            return value_error("Single '}' encountered in format string");
        };
        let Some(end) = field_end(field) else {
            return value_error("expected '}' before end of string");
        };
        write_field(out, field.get(..end).unwrap_or(""), args, numbering, level)?;
        rest = field.get(end.saturating_add(1)..).unwrap_or("");
    }
    out.push_str(rest)
}

/// Where a field ends, other fields inside it passed over.
fn field_end(text: &str) -> Option<usize> {
    let mut open = 0_u32;
    for (at, c) in text.char_indices() {
        match c {
            '{' => open = open.saturating_add(1),
            '}' if open == 0 => return Some(at),
            '}' => open = open.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// Where a field's specification begins: a colon within brackets is part of a key.
fn colon(field: &str) -> Option<usize> {
    let mut in_key = false;
    for (at, c) in field.char_indices() {
        match c {
            '[' => in_key = true,
            ']' => in_key = false,
            ':' if !in_key => return Some(at),
            _ => {}
        }
    }
    None
}

fn write_field(
    out: &mut Builder,
    field: &str,
    args: &Args,
    numbering: &mut Numbering,
    level: u32,
) -> Result<()> {
    let (path, spec) = match colon(field).and_then(|at| field.split_at_checked(at)) {
        Some((path, spec)) => (path, spec.get(1..).unwrap_or("")),
        None => (field, ""),
    };
    let (path, conversion) = match path.split_once('!') {
        Some((path, conversion)) => (path, Some(conversion)),
        None => (path, None),
    };
    let name_end = path.find(['.', '[']).unwrap_or(path.len());
    let (name, mut steps) = path.split_at_checked(name_end).unwrap_or((path, ""));
    let mut value = if name.is_empty() {
        let at = numbering.automatic.unwrap_or(0);
        numbering.automatic = Some(at.saturating_add(1));
        positional(args, at)?
    } else if let Ok(at) = name.parse::<usize>() {
        numbering.manual = true;
        positional(args, at)?
    } else {
        match args.named.iter().find(|(own, _)| own == name) {
            Some((_, value)) => value.clone(),
            None => return value_error(format!("there is no value named {name:?} to format")),
        }
    };
    if numbering.manual && numbering.automatic.is_some() {
        return value_error("fields are numbered by hand and by themselves");
    }
    while !steps.is_empty() {
        spend(1)?;
        if let Some(tail) = steps.strip_prefix('.') {
            let end = tail.find(['.', '[']).unwrap_or(tail.len());
            let (name, tail) = tail.split_at_checked(end).unwrap_or((tail, ""));
            value = access::attribute(&value, name)?;
            steps = tail;
        } else if let Some((key, tail)) = steps.strip_prefix('[').and_then(|s| s.split_once(']')) {
            let key = match key.parse() {
                Ok(index) => Value::Int(index),
                Err(_) => Value::text(key)?,
            };
            value = access::item(&value, &key)?;
            steps = tail;
        } else {
            return value_error("a format field's path is broken");
        }
    }
    if let Some(conversion) = conversion {
        let mut shown = Builder::new();
        match conversion {
            "s" => shown.push_str(&value.to_text()?)?,
            "r" => repr(&mut shown, &value)?,
            "a" => {
                let mut plain = Builder::new();
                repr(&mut plain, &value)?;
                shown.push_str(&percent::ascii(plain.as_str())?)?;
            }
            _ => return value_error("a conversion is !s, !r or !a"),
        }
        value = Value::built(shown);
    }
    if !spec.contains(['{', '}']) {
        return write_value(out, &value, spec);
    }
    let mut full_spec = Builder::new();
    write_all(
        &mut full_spec,
        spec,
        args,
        numbering,
        level.saturating_add(1),
    )?;
    write_value(out, &value, full_spec.as_str())
}

fn positional(args: &Args, at: usize) -> Result<Value> {
    match args.positional.get(at) {
        Some(value) => Ok(value.clone()),
        None => value_error("Replacement index out of range for positional args tuple"),
    }
}

/// The layout of a specification and its type's letter.
fn parse(spec: &str) -> Result<(Layout, Option<char>)> {
    let mut layout = Layout::default();
    let mut rest = spec;
    let is_align = |c: Option<char>| c.is_some_and(|c| "<>^=".contains(c));
    let mut chars = rest.chars();
    let (first, second) = (chars.next(), chars.next());
    if is_align(second) {
        (layout.fill, layout.align) = (first, second);
        rest = chars.as_str();
    } else if is_align(first) {
        layout.align = first;
        rest = rest.get(1..).unwrap_or("");
    }
    if let Some(sign) = rest.chars().next().filter(|c| "+- ".contains(*c)) {
        layout.sign = Some(sign);
        rest = rest.get(1..).unwrap_or("");
    }
    if let Some(tail) = rest.strip_prefix('#') {
        layout.alternate = true;
        rest = tail;
    }
    if let Some(tail) = rest.strip_prefix('0') {
        layout.fill = layout.fill.or(Some('0'));
        layout.align = layout.align.or(Some('='));
        rest = tail;
    }
    let number = |text: &str| {
        let tail = text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        text.split_at_checked(text.len().saturating_sub(tail))
            .map(|(digits, tail)| (digits.to_owned(), tail.to_owned()))
            .unwrap_or_default()
    };
    let too_large = || value_error("Too many decimal digits in format string");
    let (width, tail) = number(rest);
    if !width.is_empty() {
        layout.width = width.parse().or_else(|_| too_large())?;
    }
    let mut rest = tail;
    if let Some(grouping) = rest.chars().next().filter(|c| ",_".contains(*c)) {
        layout.grouping = Some(grouping);
        rest.remove(0);
    }
    if let Some(tail) = rest.strip_prefix('.') {
        let (precision, tail) = number(tail);
        if precision.is_empty() {
            return value_error("Format specifier missing precision");
        }
        layout.precision = Some(precision.parse().or_else(|_| too_large())?);
        rest = tail;
    }
    let mut chars = rest.chars();
    match (chars.next(), chars.next()) {
        (kind, None) => Ok((layout, kind)),
        _ => value_error(format!("Invalid format specifier {spec:?}")),
    }
}

fn write_value(out: &mut Builder, value: &Value, spec: &str) -> Result<()> {
    if spec.is_empty() {
        return crate::jinja::values::text_of(out, value);
    }
    value.defined()?;
    let (layout, kind) = parse(spec)?;
    let unknown = |kind: char| {
        value_error(format!(
            "Unknown format code '{kind}' for object of type '{}'",
            value.type_name()
        ))
    };
    if let Value::Str(text) = value {
        if layout.align == Some('=') && !spec.starts_with('0') {
            return value_error("'=' alignment not allowed in string format specifier");
        }
        return match kind {
            None | Some('s') => {
                let align = layout.align.filter(|align| *align != '=');
                write_text(out, text.as_str(), &Layout { align, ..layout })
            }
            Some(kind) => unknown(kind),
        };
    }
    if let (Value::Int(_) | Value::Bool(_), Some(i)) = (value, value.as_int()) {
        match kind {
            None if matches!(value, Value::Bool(_)) => {}
            None | Some('d' | 'n' | 'x' | 'X' | 'o' | 'b') => {
                if layout.precision.is_some() {
                    return value_error("Precision not allowed in integer format specifier");
                }
                let (digits, prefix) = int_digits(i, kind.unwrap_or('d'), layout.alternate);
                return write_number(out, i < 0, prefix, &digits, &layout);
            }
            Some('c') => {
                let c = u32::try_from(i).ok().and_then(char::from_u32);
                return match c {
                    Some(c) => write_text(out, &c.to_string(), &layout),
                    None => value_error("%c arg not in range(0x110000)"),
                };
            }
            Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => {}
            Some(kind) => return unknown(kind),
        }
    }
    if let (Some(x), true) = (
        value.as_float(),
        !matches!(value, Value::Bool(_)) || kind.is_some(),
    ) {
        let negative = x.is_sign_negative() && !x.is_nan();
        let digits = match (kind, layout.precision) {
            (None, None) => float_text(x.abs()),
            (None, Some(precision)) => {
                let digits = float_digits(x, 'g', Some(precision), layout.alternate)?;
                // A float shows that it is one.
                match digits.contains(['.', 'e', 'n']) {
                    true => digits,
                    false => format!("{digits}.0"),
                }
            }
            (Some('n'), precision) => float_digits(x, 'g', precision, layout.alternate)?,
            (Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')), precision) => {
                float_digits(x, kind, precision, layout.alternate)?
            }
            (Some(kind), _) => return unknown(kind),
        };
        return write_number(out, negative, "", &digits, &layout);
    }
    if matches!(value, Value::Bool(_)) {
        return write_text(out, &value.to_text()?, &layout);
    }
    type_error(format!(
        "unsupported format string passed to {}.__format__",
        value.type_name()
    ))
}

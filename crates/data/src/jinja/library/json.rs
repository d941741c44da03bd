//! transformers' `tojson`: `json.dumps(x, ensure_ascii=False, …)`, without HTML escapes.

use std::fmt::Write as _;

use super::args::{Args, given, is_set, text_argument};
use crate::jinja::error::{Result, budget_error, type_error, value_error};
use crate::jinja::meter::{Builder, spend};
use crate::jinja::values::{Object, SeqKind, Value, float_text, is_less};

/// The options of Python's `json.dumps` that templates can give.
struct Layout {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

/// Longest indent of one level; more is a bomb.
const INDENT: i128 = 1000;

pub(super) fn tojson(value: &Value, args: &Args) -> Result<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = args.bind("tojson", names)?;
    let indent = match given(indent) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_int()) {
            (Some(text), _) => text.to_owned(),
            (_, Some(width)) if width > INDENT => {
                return budget_error(format!(
                    "tojson's indent is {width}, and {INDENT} is the most"
                ));
            }
            (_, Some(width)) => " ".repeat(usize::try_from(width).unwrap_or(0)),
            _ => return type_error("tojson's indent is a number or text"),
        }),
    };
    let (item_separator, key_separator) = match given(separators) {
        Some(separators) => match separators.items()?.as_slice() {
            [item, key] => (
                text_argument("tojson", item)?.to_owned(),
                text_argument("tojson", key)?.to_owned(),
            ),
            _ => return value_error("tojson's separators are two"),
        },
        // Python's default: no space after the comma at the end of an indented line.
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let layout = Layout {
        indent,
        item_separator,
        key_separator,
        sort_keys: is_set(sort_keys.as_ref()),
        ensure_ascii: is_set(ensure_ascii.as_ref()),
    };
    let mut out = Builder::new();
    write(&mut out, value, &layout, 0)?;
    Ok(Value::built(out))
}

fn json_float(x: f64) -> String {
    match float_text(x).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        finite => finite.to_owned(),
    }
}

fn write(out: &mut Builder, value: &Value, layout: &Layout, depth: usize) -> Result<()> {
    spend(1)?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Int(i) => out.push_str(&i.to_string()),
        Value::Float(x) => out.push_str(&json_float(*x)),
        Value::Str(text) => write_string(out, text.as_str(), layout.ensure_ascii),
        Value::Seq(seq) if seq.kind == SeqKind::List || seq.kind.is_tuple() => {
            if seq.items.is_empty() {
                return out.push_str("[]");
            }
            out.push('[')?;
            for (i, item) in seq.items.iter().enumerate() {
                before_item(out, layout, depth, i)?;
                write(out, item, layout, depth.saturating_add(1))?;
            }
            new_line(out, layout, depth)?;
            out.push(']')
        }
        Value::Dict(dict) => {
            if dict.entries().is_empty() {
                return out.push_str("{}");
            }
            let mut entries: Vec<&(Value, Value)> = dict.entries().iter().collect();
            if layout.sort_keys {
                entries = super::sequences::sorted(entries, |a, b| is_less(&a.0, &b.0))?;
            }
            out.push('{')?;
            for (i, (key, value)) in entries.into_iter().enumerate() {
                before_item(out, layout, depth, i)?;
                let key = match key {
                    Value::Str(text) => text.as_str().to_owned(),
                    Value::None => "null".to_owned(),
                    Value::Bool(b) => b.to_string(),
                    Value::Int(i) => i.to_string(),
                    Value::Float(x) => json_float(*x),
                    other => {
                        return type_error(format!(
                            "keys must be str, int, float, bool or None, not {}",
                            other.type_name()
                        ));
                    }
                };
                write_string(out, &key, layout.ensure_ascii)?;
                out.push_str(&layout.key_separator)?;
                write(out, value, layout, depth.saturating_add(1))?;
            }
            new_line(out, layout, depth)?;
            out.push('}')
        }
        Value::Object(object) if matches!(object.as_ref(), Object::Namespace(_)) => {
            type_error("Object of type Namespace is not JSON serializable")
        }
        other => type_error(format!(
            "Object of type {} is not JSON serializable",
            other.type_name()
        )),
    }
}

fn before_item(out: &mut Builder, layout: &Layout, depth: usize, i: usize) -> Result<()> {
    if i > 0 {
        out.push_str(&layout.item_separator)?;
    }
    new_line(out, layout, depth.saturating_add(1))
}

fn new_line(out: &mut Builder, layout: &Layout, depth: usize) -> Result<()> {
    match &layout.indent {
        Some(indent) => {
            out.push('\n')?;
            out.push_repeated(indent, depth)
        }
        None => Ok(()),
    }
}

fn write_string(out: &mut Builder, text: &str, ensure_ascii: bool) -> Result<()> {
    out.push('"')?;
    let mut plain = 0_usize;
    for (at, c) in text.char_indices() {
        let escape = match c {
            '"' => "\\\"",
            '\\' => "\\\\",
            '\n' => "\\n",
            '\r' => "\\r",
            '\t' => "\\t",
            '\u{8}' => "\\b",
            '\u{c}' => "\\f",
            c if (c as u32) < 0x20 || (ensure_ascii && !(' '..='~').contains(&c)) => "",
            _ => continue,
        };
        out.push_str(text.get(plain..at).unwrap_or(""))?;
        plain = at.saturating_add(c.len_utf8());
        if escape.is_empty() {
            let mut units = String::new();
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(units, "\\u{unit:04x}");
            }
            out.push_str(&units)?;
        } else {
            out.push_str(escape)?;
        }
    }
    out.push_str(text.get(plain..).unwrap_or(""))?;
    out.push('"')
}

//! Python's `str` and `repr`.

use std::fmt::Write as _;

use super::{Object, SeqKind, Value};
use crate::jinja::error::{Error, Kind, Result};
use crate::jinja::meter::{Builder, VALUE_DEPTH, spend};

/// Python's `repr` of a float: the shortest digits that read back, exponent form outside
/// 1e-4 ≤ |x| < 1e16.
pub(crate) fn float_text(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let mut text = format!("{x}");
    if !text.contains('.') {
        text.push_str(".0");
    }
    text
}

/// Whether Python prints a character as it is.
fn is_printable(c: char) -> bool {
    // `escape_debug` of a character that is not the first escapes what is not printable, and no
    // combining marks.
    let pair: String = ['x', c].into_iter().collect();
    matches!(c, '"' | '\'' | '\\') || pair.escape_debug().nth(1) == Some(c)
}

/// Python's `repr` of text.
pub(crate) fn quoted(out: &mut Builder, text: &str) -> Result<()> {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\")?,
            '\n' => out.push_str("\\n")?,
            '\r' => out.push_str("\\r")?,
            '\t' => out.push_str("\\t")?,
            c if c == quote => {
                out.push('\\')?;
                out.push(c)?;
            }
            ' '..='~' => out.push(c)?,
            c if is_printable(c) => out.push(c)?,
            c => {
                let code = c as u32;
                let mut escaped = String::new();
                let _ = match code {
                    0..=0xff => write!(escaped, "\\x{code:02x}"),
                    0x100..=0xffff => write!(escaped, "\\u{code:04x}"),
                    _ => write!(escaped, "\\U{code:08x}"),
                };
                out.push_str(&escaped)?;
            }
        }
    }
    out.push(quote)
}

/// Python's `str`, at the end of `out`.
pub(crate) fn text_of(out: &mut Builder, value: &Value) -> Result<()> {
    match value {
        Value::Str(text) => out.push_str(text.as_str()),
        Value::Undefined(_) => Ok(()),
        other => write_repr(out, other, &mut Open::default()),
    }
}

/// Python's `repr`, at the end of `out`.
pub(crate) fn repr(out: &mut Builder, value: &Value) -> Result<()> {
    write_repr(out, value, &mut Open::default())
}

/// What is being written.
#[derive(Default)]
struct Open {
    /// A namespace inside itself is written as Python does, `{...}`.
    namespaces: Vec<*const Object>,
    levels: u32,
}

/// Namespaces can nest deeper than any one value.
fn write_repr(out: &mut Builder, value: &Value, open: &mut Open) -> Result<()> {
    spend(1)?;
    open.levels = open.levels.saturating_add(1);
    if open.levels > VALUE_DEPTH.saturating_mul(2) {
        let message = format!("a value is nested more than {} levels deep", open.levels);
        return Err(Error::new(Kind::Budget, message));
    }
    write_level(out, value, open)?;
    open.levels = open.levels.saturating_sub(1);
    Ok(())
}

fn write_level(out: &mut Builder, value: &Value, open: &mut Open) -> Result<()> {
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
        Value::Int(i) => out.push_str(&i.to_string()),
        Value::Float(x) => out.push_str(&float_text(*x)),
        Value::Str(text) if text.markup => {
            out.push_str("Markup(")?;
            quoted(out, text.as_str())?;
            out.push(')')
        }
        Value::Str(text) => quoted(out, text.as_str()),
        Value::Seq(seq) => {
            let (before, after) = match seq.kind {
                SeqKind::List => ("[", "]"),
                SeqKind::Tuple | SeqKind::Group if seq.items.len() == 1 => ("(", ",)"),
                SeqKind::Tuple | SeqKind::Group => ("(", ")"),
                SeqKind::Keys => ("dict_keys([", "])"),
                SeqKind::Values => ("dict_values([", "])"),
                SeqKind::Items => ("dict_items([", "])"),
                SeqKind::Range(start, stop, 1) => {
                    return out.push_str(&format!("range({start}, {stop})"));
                }
                SeqKind::Range(start, stop, step) => {
                    return out.push_str(&format!("range({start}, {stop}, {step})"));
                }
            };
            out.push_str(before)?;
            for (i, item) in seq.items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ")?;
                }
                write_repr(out, item, open)?;
            }
            out.push_str(after)
        }
        Value::Dict(dict) => {
            let entries = dict.entries().iter();
            write_entries(
                out,
                entries.map(|(key, value)| (key.clone(), value.clone())),
                open,
            )
        }
        Value::Generator(_) => out.push_str("<generator object>"),
        Value::Object(object) => match object.as_ref() {
            Object::Namespace(namespace) => {
                let this: *const Object = std::rc::Rc::as_ptr(object);
                out.push_str("<Namespace ")?;
                if open.namespaces.contains(&this) {
                    out.push_str("{...}")?;
                } else {
                    open.namespaces.push(this);
                    let attributes = namespace.0.borrow().clone();
                    let entries: Vec<(Value, Value)> = attributes
                        .into_iter()
                        .map(|(name, value)| Ok((Value::text(name)?, value)))
                        .collect::<Result<_>>()?;
                    write_entries(out, entries.into_iter(), open)?;
                    open.namespaces.pop();
                }
                out.push('>')
            }
            Object::Loop(state) => {
                let at = state.at.get().saturating_add(1);
                out.push_str(&format!("<LoopContext {at}/{}>", state.items.items.len()))
            }
            Object::Slice(parts) => {
                out.push_str("slice(")?;
                for (i, part) in parts.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ")?;
                    }
                    write_repr(out, part, open)?;
                }
                out.push(')')
            }
            Object::Function(name) => out.push_str(&format!("<function {name}>")),
            Object::Method(_, name) => out.push_str(&format!("<method {name}>")),
            other => out.push_str(&format!("<{}>", Value::object_name(other))),
        },
    }
}

fn write_entries(
    out: &mut Builder,
    entries: impl Iterator<Item = (Value, Value)>,
    open: &mut Open,
) -> Result<()> {
    out.push('{')?;
    for (i, (key, value)) in entries.enumerate() {
        if i > 0 {
            out.push_str(", ")?;
        }
        write_repr(out, &key, open)?;
        out.push_str(": ")?;
        write_repr(out, &value, open)?;
    }
    out.push('}')
}

impl Value {
    fn object_name(object: &Object) -> &'static str {
        match object {
            Object::Macro(..) => "Macro",
            Object::Cycler(..) => "Cycler",
            Object::Joiner(..) => "Joiner",
            _ => "object",
        }
    }

    /// Python's `str`.
    pub(crate) fn to_text(&self) -> Result<String> {
        if let Value::Str(text) = self {
            drop(crate::jinja::meter::Held::new(text.as_str().len())?);
            return Ok(text.as_str().to_owned());
        }
        let mut out = Builder::new();
        text_of(&mut out, self)?;
        Ok(out.finish().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (123_456.75, "123456.75"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
        ];
        for (x, expected) in cases {
            assert_eq!(float_text(x), expected);
        }
    }
}

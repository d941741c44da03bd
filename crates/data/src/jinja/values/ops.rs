//! Python's operators.

use super::compare::found;
use super::{Dict, Object, Seq, SeqKind, Value};
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::library::percent_format;
use crate::jinja::meter::{Builder, Held, spend, spend_bytes};
use crate::jinja::syntax::ast::Binary;

fn too_large<T>() -> Result<T> {
    Err(Error::new(
        Kind::Overflow,
        "an integer has more than 38 digits",
    ))
}

fn unsupported<T>(op: &str, a: &Value, b: &Value) -> Result<T> {
    type_error(format!(
        "unsupported operand type(s) for {op}: '{}' and '{}'",
        a.type_name(),
        b.type_name()
    ))
}

fn division_by_zero<T>() -> Result<T> {
    Err(Error::new(Kind::ZeroDivision, "division by zero"))
}

/// HTML's five characters as entities, as markupsafe writes them.
pub(crate) fn escaped(text: &str) -> Result<String> {
    let mut out = Builder::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;")?,
            '<' => out.push_str("&lt;")?,
            '>' => out.push_str("&gt;")?,
            '"' => out.push_str("&#34;")?,
            '\'' => out.push_str("&#39;")?,
            c => out.push(c)?,
        }
    }
    Ok(out.finish().0)
}

/// `a + b`.
pub(crate) fn add(a: &Value, b: &Value) -> Result<Value> {
    a.defined()?;
    b.defined()?;
    match (a, b) {
        (Value::Str(x), Value::Str(y)) => {
            let mut out = Builder::new();
            if x.markup == y.markup {
                out.push_str(x.as_str())?;
                out.push_str(y.as_str())?;
            } else {
                // What joins marked text is escaped.
                for part in [x, y] {
                    match part.markup {
                        true => out.push_str(part.as_str())?,
                        false => out.push_str(&escaped(part.as_str())?)?,
                    }
                }
            }
            match x.markup || y.markup {
                true => Value::markup(out.finish().0),
                false => Ok(Value::built(out)),
            }
        }
        (Value::Str(_), other) => type_error(format!(
            "can only concatenate str (not \"{}\") to str",
            other.type_name()
        )),
        (Value::Seq(x), Value::Seq(y))
            if x.kind == y.kind && matches!(x.kind, SeqKind::List | SeqKind::Tuple) =>
        {
            let count = x.items.len().saturating_add(y.items.len());
            drop(Held::new(count.saturating_mul(size_of::<Value>()))?);
            let items = x.items.iter().chain(&y.items).cloned().collect();
            Ok(Value::Seq(Seq::new(items, x.kind)?.into()))
        }
        _ => arithmetic(Binary::Add, a, b),
    }
}

/// Any of Python's binary operators.
pub(crate) fn arithmetic(op: Binary, a: &Value, b: &Value) -> Result<Value> {
    a.defined()?;
    if op == Binary::Rem
        && let Value::Str(format) = a
    {
        return percent_format(format.as_str(), b);
    }
    b.defined()?;
    if op == Binary::Mul
        && let Some(repeated) = repeat(a, b).or_else(|| repeat(b, a))
    {
        return repeated;
    }
    if let (Some(x), Some(y)) = (a.as_int(), b.as_int()) {
        return integers(op, x, y);
    }
    if let (Some(x), Some(y)) = (a.as_float(), b.as_float()) {
        return floats(op, x, y);
    }
    let symbol = match op {
        Binary::Add => "+",
        Binary::Sub => "-",
        Binary::Mul => "*",
        Binary::Div => "/",
        Binary::FloorDiv => "//",
        Binary::Rem => "%",
        Binary::Pow => "** or pow()",
    };
    unsupported(symbol, a, b)
}

/// Text or a list, `times` over; nothing where it is neither.
fn repeat(what: &Value, times: &Value) -> Option<Result<Value>> {
    if !matches!(what, Value::Str(_) | Value::Seq(_)) {
        return None;
    }
    let Some(times) = times.as_int() else {
        return match times.as_float() {
            Some(_) => Some(type_error(
                "can't multiply sequence by non-int of type 'float'",
            )),
            None => Some(type_error(format!(
                "can't multiply sequence by non-int of type '{}'",
                times.type_name()
            ))),
        };
    };
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    Some(match what {
        Value::Str(text) => (|| {
            let mut out = Builder::new();
            if !text.as_str().is_empty() {
                out.push_repeated(text.as_str(), times)?;
            }
            Ok(Value::built(out))
        })(),
        Value::Seq(seq) if matches!(seq.kind, SeqKind::List | SeqKind::Tuple) => (|| {
            let times = if seq.items.is_empty() { 0 } else { times };
            let count = seq.items.len().saturating_mul(times);
            drop(Held::new(count.saturating_mul(size_of::<Value>()))?);
            spend(count as u64)?;
            let items = seq.items.iter().cycle().take(count).cloned().collect();
            Ok(Value::Seq(Seq::new(items, seq.kind)?.into()))
        })(),
        _ => return None,
    })
}

fn integers(op: Binary, a: i128, b: i128) -> Result<Value> {
    let result = match op {
        Binary::Add => a.checked_add(b),
        Binary::Sub => a.checked_sub(b),
        Binary::Mul => a.checked_mul(b),
        Binary::Div | Binary::FloorDiv | Binary::Rem if b == 0 => return division_by_zero(),
        Binary::Div => return Ok(Value::Float(a as f64 / b as f64)),
        Binary::FloorDiv => floor_division(a, b).map(|(quotient, _)| quotient),
        Binary::Rem => floor_division(a, b).map(|(_, remainder)| remainder),
        Binary::Pow if b < 0 => {
            if a == 0 {
                return Err(Error::new(
                    Kind::ZeroDivision,
                    "0.0 cannot be raised to a negative power",
                ));
            }
            return floats(op, a as f64, b as f64);
        }
        Binary::Pow => match a {
            0 | 1 => Some(if b == 0 { 1 } else { a }),
            -1 => Some(if b % 2 == 0 { 1 } else { -1 }),
            _ => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        },
    };
    match result {
        Some(result) => Ok(Value::Int(result)),
        None => too_large(),
    }
}

/// Quotient rounded down, and the remainder, whose sign is the divisor's.
fn floor_division(a: i128, b: i128) -> Option<(i128, i128)> {
    let (quotient, remainder) = (a.checked_div(b)?, a.checked_rem(b)?);
    if remainder != 0 && (remainder < 0) != (b < 0) {
        return Some((quotient.checked_sub(1)?, remainder.checked_add(b)?));
    }
    Some((quotient, remainder))
}

fn floats(op: Binary, a: f64, b: f64) -> Result<Value> {
    Ok(Value::Float(match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div | Binary::FloorDiv | Binary::Rem if b == 0.0 => return division_by_zero(),
        Binary::Div => a / b,
        Binary::FloorDiv => ((a - float_remainder(a, b)) / b).round(),
        Binary::Rem => float_remainder(a, b),
        Binary::Pow if a == 0.0 && b < 0.0 => {
            return Err(Error::new(
                Kind::ZeroDivision,
                "0.0 cannot be raised to a negative power",
            ));
        }
        Binary::Pow if a < 0.0 && b.fract() != 0.0 => {
            return value_error("a negative number has no real power of this exponent");
        }
        Binary::Pow => {
            let power = a.powf(b);
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(Error::new(Kind::Overflow, "a power is too large"));
            }
            power
        }
    }))
}

fn float_remainder(a: f64, b: f64) -> f64 {
    let remainder = a % b;
    if remainder == 0.0 {
        return 0.0_f64.copysign(b);
    }
    if (remainder < 0.0) != (b < 0.0) {
        return remainder + b;
    }
    remainder
}

pub(crate) fn negative(value: &Value) -> Result<Value> {
    value.defined()?;
    match (value, value.as_int()) {
        (Value::Float(x), _) => Ok(Value::Float(-x)),
        (_, Some(i)) => i
            .checked_neg()
            .map_or_else(too_large, |i| Ok(Value::Int(i))),
        _ => type_error(format!(
            "bad operand type for unary -: '{}'",
            value.type_name()
        )),
    }
}

pub(crate) fn positive(value: &Value) -> Result<Value> {
    value.defined()?;
    match (value, value.as_int()) {
        (Value::Float(x), _) => Ok(Value::Float(*x)),
        (_, Some(i)) => Ok(Value::Int(i)),
        _ => type_error(format!(
            "bad operand type for unary +: '{}'",
            value.type_name()
        )),
    }
}

/// Jinja2's `~`: all operands as text.
pub(crate) fn concat(values: &[Value]) -> Result<Value> {
    let mut out = Builder::new();
    for value in values {
        super::text_of(&mut out, value)?;
    }
    Ok(Value::built(out))
}

/// `item in container`.
pub(crate) fn contains(container: &Value, item: &Value) -> Result<bool> {
    match container {
        Value::Str(text) => match item {
            Value::Str(part) => {
                spend_bytes(text.as_str().len().saturating_mul(4))?;
                Ok(text.as_str().contains(part.as_str()))
            }
            _ => type_error(format!(
                "'in <string>' requires string as left operand, not {}",
                item.type_name()
            )),
        },
        Value::Dict(dict) => Ok(Dict::get(dict, item)?.is_some()),
        Value::Seq(seq) => match (seq.kind, item) {
            (SeqKind::Range(..), item) if item.as_float().is_none() => Ok(false),
            _ => found(item, &seq.items),
        },
        Value::Undefined(_) => Ok(false),
        Value::Generator(generator) => {
            while let Some(next) = generator.next() {
                if super::equal(item, &next)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        Value::Object(object) if matches!(object.as_ref(), Object::Loop(_)) => {
            found(item, &container.items()?)
        }
        _ => type_error(format!(
            "argument of type '{}' is not iterable",
            container.type_name()
        )),
    }
}

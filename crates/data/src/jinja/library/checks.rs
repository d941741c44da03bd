//! Tests, the words behind `is`.

use super::args::{Args, required};
use super::text;
use crate::jinja::error::{Error, Kind, Result, type_error};
use crate::jinja::interpret::compare;
use crate::jinja::meter::spend_characters;
use crate::jinja::syntax::ast::{Binary, Comparison};
use crate::jinja::values::{Object, Value, arithmetic, equal, same};

const TESTS: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub(crate) fn is_test(name: &str) -> bool {
    TESTS.contains(&name)
}

/// Whether `value` passes the test.
///
/// # Errors
/// Where there is no such test, or it cannot be asked of the value.
pub(crate) fn test(name: &str, value: &Value, args: Args) -> Result<bool> {
    let comparison = match name {
        "==" | "eq" | "equalto" => Some(Comparison::Eq),
        "!=" | "ne" => Some(Comparison::Ne),
        ">" | "gt" | "greaterthan" => Some(Comparison::Gt),
        ">=" | "ge" => Some(Comparison::Ge),
        "<" | "lt" | "lessthan" => Some(Comparison::Lt),
        "<=" | "le" => Some(Comparison::Le),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        let [other] = args.positional(name)?;
        return compare(comparison, value, &required(name, "other", other)?);
    }
    if matches!(name, "divisibleby" | "sameas") {
        let [other] = args.bind(name, [if name == "sameas" { "other" } else { "num" }])?;
        let other = required(name, "other", other)?;
        return match name {
            "sameas" => Ok(same(value, &other)),
            _ => remainder_is(value, &other, 0),
        };
    }
    let [] = args.bind(name, [])?;
    Ok(match name {
        "odd" => remainder_is(value, &Value::Int(2), 1)?,
        "even" => remainder_is(value, &Value::Int(2), 0)?,
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "filter" => value.as_str().is_some_and(super::is_filter),
        "test" => value.as_str().is_some_and(is_test),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "false" => matches!(value, Value::Bool(false)),
        "true" => matches!(value, Value::Bool(true)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "lower" | "upper" => {
            let own = value.to_text()?;
            spend_characters(own.len())?;
            match name {
                "lower" => text::is_lower(&own),
                _ => text::is_upper(&own),
            }
        }
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "number" => matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_)),
        "sequence" => match value {
            Value::Undefined(_) | Value::Str(_) | Value::Dict(_) => true,
            Value::Seq(seq) => !seq.is_view(),
            _ => false,
        },
        "iterable" => value.is_iterable(),
        "callable" => match value {
            Value::Undefined(_) => true,
            Value::Object(object) => {
                !matches!(object.as_ref(), Object::Namespace(_) | Object::Slice(_))
            }
            _ => false,
        },
        "escaped" => matches!(value, Value::Str(text) if text.markup),
        _ => {
            let message = format!("there is no test {name:?}");
            return Err(Error::new(Kind::Runtime, message));
        }
    })
}

fn remainder_is(value: &Value, divisor: &Value, wanted: i128) -> Result<bool> {
    if value.as_str().is_some() {
        return type_error("not all arguments converted during string formatting");
    }
    let remainder = arithmetic(Binary::Rem, value, divisor)?;
    equal(&remainder, &Value::Int(wanted))
}

//! Filters of single values, and the list of all.

use super::args::{Args, given, int_argument, is_set, required, size_argument, text_argument};
use super::text::{self, Sides};
use super::{access, json, numbers, percent, sequences};
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::meter::{Builder, Held, spend_characters};
use crate::jinja::values::{Value, escaped, repr};

const FILTERS: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

pub(crate) fn is_filter(name: &str) -> bool {
    FILTERS.contains(&name)
}

/// `value|name(args)`.
///
/// # Errors
/// Where there is no such filter, or it cannot take the value or its arguments.
pub(crate) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    if !is_filter(name) {
        let message = format!("there is no filter {name:?}");
        return Err(Error::new(Kind::Runtime, message));
    }
    if let Some(text) = value.as_str() {
        spend_characters(text.len())?;
    }
    let sequences = [
        "map",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "join",
        "sort",
        "unique",
        "min",
        "max",
        "groupby",
        "dictsort",
        "sum",
        "batch",
        "slice",
        "first",
        "last",
        "list",
        "reverse",
        "items",
        "length",
        "count",
    ];
    if sequences.contains(&name) {
        let filtered = sequences::filter(name, value, args);
        return filtered.unwrap_or(Ok(Value::None));
    }
    match name {
        "default" | "d" => {
            let [default, boolean] = args.bind("default", ["default_value", "boolean"])?;
            let missing = matches!(value, Value::Undefined(_))
                || (is_set(boolean.as_ref()) && !value.is_true());
            match missing {
                true => default.map_or_else(|| Value::text(""), Ok),
                false => Ok(value.clone()),
            }
        }
        "tojson" => json::tojson(value, &args),
        "attr" => {
            let [name] = args.bind("attr", ["name"])?;
            let name = required("attr", "name", name)?;
            let name = text_argument("attr", &name)?;
            match value {
                Value::Dict(dict) if dict.get_str(name).is_some() => Ok(Value::undefined(
                    &format!("'dict object' has no attribute '{name}'"),
                )),
                _ => access::attribute(value, name),
            }
        }
        "abs" | "round" | "int" | "float" | "filesizeformat" => number_filter(name, value, &args),
        _ => text_filter(name, value, &args),
    }
}

fn number_filter(name: &str, value: &Value, args: &Args) -> Result<Value> {
    match name {
        "int" => {
            let [default, base] = args.bind("int", ["default", "base"])?;
            let base = base.map_or(Ok(10), |base| int_argument("int", &base))?;
            let default = default.unwrap_or(Value::Int(0));
            numbers::int_filter(value, default, base)
        }
        "float" => {
            let [default] = args.bind("float", ["default"])?;
            value.defined()?;
            let number = match value.as_str() {
                Some(text) => numbers::parse_float(text),
                None => value.as_float(),
            };
            Ok(number.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => {
            let [precision, method] = args.bind("round", ["precision", "method"])?;
            let precision = precision.map_or(Ok(0), |p| int_argument("round", &p))?;
            let method = method.map_or_else(|| Ok("common".to_owned()), |m| m.to_text())?;
            numbers::round_filter(value, precision, &method)
        }
        "abs" => {
            let [] = args.bind("abs", [])?;
            value.defined()?;
            match (value, value.as_int()) {
                (Value::Float(x), _) => Ok(Value::Float(x.abs())),
                (_, Some(i)) => Ok(Value::Int(i.saturating_abs())),
                _ => type_error(format!(
                    "bad operand type for abs(): '{}'",
                    value.type_name()
                )),
            }
        }
        _ => {
            let [binary] = args.bind(name, ["binary"])?;
            value.defined()?;
            let bytes = match value.as_str() {
                Some(text) => numbers::parse_float(text),
                None => value.as_float(),
            };
            match bytes {
                Some(bytes) => Value::text(numbers::file_size(bytes, is_set(binary.as_ref()))),
                None => value_error("filesizeformat wants a number"),
            }
        }
    }
}

fn text_filter(name: &str, value: &Value, args: &Args) -> Result<Value> {
    let own = value.to_text()?;
    let own = own.as_str();
    let no_arguments = || {
        let [] = args.bind(name, [])?;
        Ok(())
    };
    match name {
        "string" => {
            no_arguments()?;
            match value {
                Value::Str(_) => Ok(value.clone()),
                _ => Value::text(own),
            }
        }
        "safe" => {
            no_arguments()?;
            Value::markup(own.to_owned())
        }
        "escape" | "e" | "forceescape" => {
            no_arguments()?;
            match value {
                Value::Str(text) if text.markup && name != "forceescape" => Ok(value.clone()),
                _ => Value::markup(escaped(own)?),
            }
        }
        "trim" => {
            let [chars] = args.bind("trim", ["chars"])?;
            let chars = given(chars);
            let chars = chars
                .as_ref()
                .map(|v| text_argument("trim", v))
                .transpose()?;
            Value::text(text::strip(own, chars, Sides::Both)?)
        }
        "upper" => no_arguments().and_then(|()| text::upper(own)),
        "lower" => no_arguments().and_then(|()| text::lower(own)),
        "capitalize" => no_arguments().and_then(|()| text::capitalize(own)),
        "title" => no_arguments().and_then(|()| text::title_filter(own)),
        "wordcount" => {
            no_arguments()?;
            Ok(Value::Int(text::word_count(own)))
        }
        "center" => {
            let [width] = args.bind("center", ["width"])?;
            let width = width.map_or(Ok(80), |w| size_argument("center", &w))?;
            text::justified(own, width, ' ', Sides::Both)
        }
        "replace" => {
            let [old, new, count] = args.bind("replace", ["old", "new", "count"])?;
            let old = required(name, "old", old)?.to_text()?;
            let new = required(name, "new", new)?.to_text()?;
            let count = given(count).map(|v| int_argument(name, &v)).transpose()?;
            let count = count.and_then(|count| usize::try_from(count).ok());
            text::replace(own, &old, &new, count)
        }
        "indent" => {
            let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
            if value.as_str().is_none() {
                value.defined()?;
                return type_error(format!("indent wants text, not {}", value.type_name()));
            }
            let indention = match &width {
                Some(Value::Str(text)) => text.as_str().to_owned(),
                other => {
                    let width = other.as_ref().map_or(Ok(4), |w| size_argument(name, w))?;
                    drop(Held::new(width)?);
                    " ".repeat(width)
                }
            };
            text::indent(
                own,
                &indention,
                is_set(first.as_ref()),
                is_set(blank.as_ref()),
            )
        }
        "format" => {
            if !args.named.is_empty() && !args.positional.is_empty() {
                return type_error(
                    "can't handle positional and keyword arguments at the same time",
                );
            }
            let given = match args.named.is_empty() {
                true => Value::tuple(args.positional.clone())?,
                false => Args::dict_of(args.named.clone())?,
            };
            percent::percent_format(own, &given)
        }
        "truncate" => {
            let names = ["length", "killwords", "end", "leeway"];
            let [length, kill_words, end, leeway] = args.bind(name, names)?;
            truncate(own, value, [length, kill_words, end, leeway])
        }
        "urlencode" => {
            no_arguments()?;
            if matches!(value, Value::Undefined(_)) {
                return Value::text("");
            }
            if value.as_str().is_none() && value.is_iterable() {
                return type_error("urlencode of pairs is not offered to chat templates");
            }
            url_encode(own)
        }
        "pprint" => {
            no_arguments()?;
            let mut out = Builder::new();
            repr(&mut out, value)?;
            Ok(Value::built(out))
        }
        "random" => Err(Error::new(
            Kind::Security,
            "random is not for chat templates: its text would not be the same twice",
        )),
        _ => Err(Error::new(
            Kind::Security,
            format!("the filter {name} is not offered to chat templates"),
        )),
    }
}

fn truncate(own: &str, value: &Value, arguments: [Option<Value>; 4]) -> Result<Value> {
    let [length, kill_words, end, leeway] = arguments;
    let length = length.map_or(Ok(255), |v| int_argument("truncate", &v))?;
    let end = end.map_or_else(|| Ok("...".to_owned()), |end| end.to_text())?;
    let leeway = given(leeway).map_or(Ok(5), |v| int_argument("truncate", &v))?;
    let end_length = end.chars().count() as i128;
    if length < end_length || leeway < 0 {
        return value_error(format!("truncate wants a length of at least {end_length}"));
    }
    let own_length = match value.as_str() {
        Some(_) => Some(own.chars().count()),
        None => value.len(),
    };
    if own_length.is_some_and(|own| own as i128 <= length.saturating_add(leeway)) {
        return Ok(value.clone());
    }
    if value.as_str().is_none() {
        return type_error(format!("truncate wants text, not {}", value.type_name()));
    }
    let kept = usize::try_from(length.saturating_sub(end_length)).unwrap_or(usize::MAX);
    let cut = own.char_indices().nth(kept).map_or(own.len(), |(at, _)| at);
    let mut head = own.get(..cut).unwrap_or("");
    if !is_set(kill_words.as_ref()) {
        head = head.rsplit_once(' ').map_or(head, |(before, _)| before);
    }
    let mut out = Builder::new();
    out.push_str(head)?;
    out.push_str(&end)?;
    Ok(Value::built(out))
}

fn url_encode(own: &str) -> Result<Value> {
    let mut out = Builder::new();
    for byte in own.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                out.push(char::from(byte))?;
            }
            byte => out.push_str(&format!("%{byte:02X}"))?,
        }
    }
    Ok(Value::built(out))
}

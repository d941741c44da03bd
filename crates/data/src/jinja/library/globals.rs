//! Global functions.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::args::{Args, given, int_argument, required, text_argument};
use super::strftime::strftime;
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::meter::{RANGE_ITEMS, spend};
use crate::jinja::values::{DictBuilder, Namespace, Object, Seq, SeqKind, Value};

const FUNCTIONS: [&str; 8] = [
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "lipsum",
    "raise_exception",
    "strftime_now",
];

/// What a function gave.
pub(crate) enum Calls {
    Value(Value),
    /// A namespace, which the interpreter keeps an eye on.
    Namespace(Rc<Object>),
}

/// The global of that name.
pub(crate) fn global(name: &str) -> Option<Value> {
    let name = FUNCTIONS.into_iter().find(|own| *own == name)?;
    Some(Value::object(Object::Function(name)))
}

/// Calls a global function; `now` is what `strftime_now` shows, in seconds since the Unix epoch.
pub(crate) fn function(name: &str, args: Args, now: i64) -> Result<Calls> {
    let value = match name {
        "range" => range(&args)?,
        "dict" => dict(args)?,
        "namespace" => {
            let Value::Dict(attributes) = dict(args)? else {
                return type_error("namespace() wants attributes");
            };
            let mut own = Vec::new();
            for (key, value) in attributes.entries() {
                let name = text_argument("namespace", key)?;
                if name.starts_with('_') {
                    return Err(Error::new(
                        Kind::Security,
                        format!(
                            "a namespace's attributes cannot begin with an underscore ({name})"
                        ),
                    ));
                }
                own.push((name.to_owned(), value.clone()));
            }
            let namespace = Namespace(RefCell::new(own));
            return Ok(Calls::Namespace(Rc::new(Object::Namespace(namespace))));
        }
        "cycler" => {
            if args.positional.is_empty() {
                return type_error("at least one item has to be provided");
            }
            Value::nesting_object(Object::Cycler(args.positional, Cell::new(0)))?
        }
        "joiner" => {
            let [separator] = args.bind("joiner", ["sep"])?;
            let separator = separator.map_or_else(|| Value::text(", "), Ok)?;
            Value::nesting_object(Object::Joiner(separator, Cell::new(false)))?
        }
        "raise_exception" => {
            let [message] = args.bind("raise_exception", ["message"])?;
            let message = required("raise_exception", "message", message)?;
            return Err(Error::new(Kind::Raised, message.to_text()?));
        }
        "strftime_now" => {
            let [format] = args.bind("strftime_now", ["format"])?;
            let format = required("strftime_now", "format", format)?;
            Value::text(strftime(text_argument("strftime_now", &format)?, now))?
        }
        _ => {
            return Err(Error::new(
                Kind::Security,
                format!("{name} is not for chat templates: its text would not be the same twice"),
            ));
        }
    };
    Ok(Calls::Value(value))
}

fn range(args: &Args) -> Result<Value> {
    let [first, second, step] = args.positional("range")?;
    let first = int_argument("range", &required("range", "stop", first)?)?;
    let (start, stop) = match second {
        Some(stop) => (first, int_argument("range", &stop)?),
        None => (0, first),
    };
    let step = step.map_or(Ok(1), |step| int_argument("range", &step))?;
    let distance = match step.signum() {
        1 => stop.saturating_sub(start),
        -1 => start.saturating_sub(stop),
        _ => return value_error("range() arg 3 must not be zero"),
    };
    let width = i128::try_from(step.unsigned_abs()).unwrap_or(i128::MAX);
    let rounded = distance.max(0).saturating_add(width.saturating_sub(1));
    let count = rounded.checked_div(width).unwrap_or(0);
    if count > RANGE_ITEMS {
        return Err(Error::new(
            Kind::Budget,
            format!("a range has {count} items, and {RANGE_ITEMS} are the most"),
        ));
    }
    spend((count / 8) as u64)?;
    let items = (0..count)
        .map(|i| Value::Int(start.saturating_add(i.saturating_mul(step))))
        .collect();
    let kind = SeqKind::Range(start, stop, step);
    Ok(Value::Seq(Seq::new(items, kind)?.into()))
}

/// Python's `dict(...)`: a dictionary or pairs, and names.
fn dict(args: Args) -> Result<Value> {
    let mut dict = DictBuilder::default();
    if args.positional.len() > 1 {
        return type_error("dict expected at most 1 argument");
    }
    match args.positional.into_iter().next() {
        Some(Value::Dict(given)) => {
            for (key, value) in given.entries() {
                dict.insert(key.clone(), value.clone())?;
            }
        }
        Some(pairs) => {
            for pair in pairs.items()? {
                let mut pair = pair.items()?.into_iter();
                match (pair.next(), pair.next(), pair.next()) {
                    (Some(key), Some(value), None) => dict.insert(key, value)?,
                    _ => return value_error("dict() wants pairs"),
                }
            }
        }
        None => {}
    }
    for (name, value) in args.named {
        dict.insert(Value::text(name)?, value)?;
    }
    dict.finish()
}

/// Python's `dict.fromkeys`.
pub(super) fn fromkeys(args: &Args) -> Result<Value> {
    let [keys, value] = args.positional("fromkeys")?;
    let keys = required("fromkeys", "iterable", keys)?;
    let value = given(value).unwrap_or(Value::None);
    let mut dict = DictBuilder::default();
    for key in keys.items()? {
        dict.insert(key, value.clone())?;
    }
    dict.finish()
}

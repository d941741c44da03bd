//! Methods of text, dictionaries, lists and loops.

use super::args::{Args, given, int_argument, is_set, required, size_argument, text_argument};
use super::text::{self, Sides};
use super::{braces, globals};
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::meter::{Builder, spend, spend_characters};
use crate::jinja::values::{LoopState, Object, Seq, SeqKind, Value, equal, is_space};

const STR: [&str; 43] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
];
const STR_MORE: [&str; 4] = ["upper", "zfill", "translate", "maketrans"];

/// Whether `owner` has this method.
pub(super) fn has(owner: &Value, name: &str) -> bool {
    match owner {
        Value::Str(_) => STR.contains(&name) || STR_MORE.contains(&name),
        Value::Dict(_) => {
            matches!(
                name,
                "copy" | "fromkeys" | "get" | "items" | "keys" | "values"
            )
        }
        Value::Seq(seq) => match seq.kind {
            SeqKind::List => matches!(name, "copy" | "count" | "index"),
            SeqKind::Tuple | SeqKind::Group | SeqKind::Range(..) => {
                matches!(name, "count" | "index")
            }
            SeqKind::Keys | SeqKind::Items => name == "isdisjoint",
            SeqKind::Values => false,
        },
        Value::Int(_) | Value::Bool(_) => matches!(name, "bit_length" | "bit_count"),
        Value::Float(_) => name == "is_integer",
        Value::Object(object) => match object.as_ref() {
            Object::Loop(_) => matches!(name, "cycle" | "changed"),
            Object::Cycler(..) => matches!(name, "next" | "reset"),
            Object::Function("dict") => name == "fromkeys",
            _ => false,
        },
        _ => false,
    }
}

/// Whether the method would change `owner`, which the sandbox refuses.
pub(super) fn changes(owner: &Value, name: &str) -> bool {
    match owner {
        Value::Dict(_) => {
            matches!(name, "clear" | "pop" | "popitem" | "setdefault" | "update")
        }
        Value::Seq(seq) if seq.kind == SeqKind::List => matches!(
            name,
            "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort"
        ),
        _ => false,
    }
}

/// Calls a method.
pub(crate) fn method(owner: &Value, name: &str, args: Args) -> Result<Value> {
    match owner {
        Value::Str(own) => {
            spend_characters(own.as_str().len())?;
            str_method(own.as_str(), name, args)
        }
        Value::Dict(dict) => {
            let entries = dict.entries().iter();
            spend(1)?;
            let (items, kind) = match name {
                "get" => {
                    let [key, default] = args.positional("get")?;
                    let found = dict.get(&required("get", "key", key)?)?.cloned();
                    return Ok(found.or(default).unwrap_or(Value::None));
                }
                "fromkeys" => return globals::fromkeys(&args),
                "copy" => return Ok(owner.clone()),
                "keys" => (entries.map(|(key, _)| key.clone()).collect(), SeqKind::Keys),
                "values" => (
                    entries.map(|(_, value)| value.clone()).collect(),
                    SeqKind::Values,
                ),
                _ => {
                    let pairs = entries.map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()]));
                    (pairs.collect::<Result<_>>()?, SeqKind::Items)
                }
            };
            let [] = args.positional(name)?;
            let items: Vec<Value> = items;
            spend(items.len() as u64)?;
            Ok(Value::Seq(Seq::new(items, kind)?.into()))
        }
        Value::Seq(seq) => seq_method(owner, seq, name, &args),
        Value::Int(_) | Value::Bool(_) => {
            let [] = args.positional(name)?;
            let magnitude = owner.as_int().unwrap_or(0).unsigned_abs();
            Ok(Value::Int(match name {
                "bit_length" => u128::BITS.saturating_sub(magnitude.leading_zeros()).into(),
                _ => magnitude.count_ones().into(),
            }))
        }
        Value::Float(x) => Ok(Value::Bool(x.fract() == 0.0)),
        Value::Object(object) => match object.as_ref() {
            Object::Loop(state) => loop_method(state, name, args),
            Object::Function(_) => globals::fromkeys(&args),
            Object::Cycler(items, at) => {
                if name == "reset" {
                    at.set(0);
                    return Ok(Value::None);
                }
                let item = items.get(at.get()).cloned().unwrap_or(Value::None);
                let next = at.get().saturating_add(1);
                at.set(if next >= items.len() { 0 } else { next });
                Ok(item)
            }
            _ => unknown(owner, name),
        },
        _ => unknown(owner, name),
    }
}

fn unknown(owner: &Value, name: &str) -> Result<Value> {
    type_error(format!("'{}' has no method {name}", owner.type_name()))
}

fn loop_method(state: &LoopState, name: &str, args: Args) -> Result<Value> {
    if name == "cycle" {
        let count = args.positional.len();
        let at = state.at.get().checked_rem(count);
        return match at.and_then(|at| args.positional.get(at)) {
            Some(value) => Ok(value.clone()),
            None => type_error("no items for cycling given"),
        };
    }
    let given = Value::tuple(args.positional)?;
    if given.holds_objects()? {
        return type_error("loop.changed() compares data, not loops, macros or namespaces");
    }
    let mut last = state.last_changed.borrow_mut();
    let changed = match last.as_ref() {
        Some(last) => !equal(last, &given)?,
        None => true,
    };
    *last = Some(given);
    Ok(Value::Bool(changed))
}

fn seq_method(owner: &Value, seq: &Seq, name: &str, args: &Args) -> Result<Value> {
    if name == "copy" {
        let [] = args.positional(name)?;
        return Ok(owner.clone());
    }
    let [wanted] = args.positional(name)?;
    let wanted = required(name, "value", wanted)?;
    if name == "isdisjoint" {
        for item in wanted.items()? {
            for own in &seq.items {
                if equal(own, &item)? {
                    return Ok(Value::Bool(false));
                }
            }
        }
        return Ok(Value::Bool(true));
    }
    let mut count = 0_i128;
    for (at, item) in seq.items.iter().enumerate() {
        if equal(item, &wanted)? {
            if name == "index" {
                return Ok(Value::Int(at as i128));
            }
            count = count.saturating_add(1);
        }
    }
    if name == "index" {
        return value_error("the value is not in the list");
    }
    Ok(Value::Int(count))
}

fn fill_argument(callee: &str, value: Option<Value>) -> Result<char> {
    let Some(value) = value else {
        return Ok(' ');
    };
    let mut chars = text_argument(callee, &value)?.chars();
    match (chars.next(), chars.next()) {
        (Some(c), None) => Ok(c),
        _ => type_error("The fill character must be exactly one character long"),
    }
}

/// `startswith` and `endswith`: one text or any of a tuple.
fn has_affix(own: &str, name: &str, args: &Args) -> Result<bool> {
    let [affix, start, end] = args.positional(name)?;
    let affix = required(name, "prefix", affix)?;
    let start = given(start).map(|v| int_argument(name, &v)).transpose()?;
    let end = given(end).map(|v| int_argument(name, &v)).transpose()?;
    let Some((own, _)) = text::bounded(own, start, end)? else {
        return Ok(false);
    };
    let matches = |affix: &str| match name {
        "startswith" => own.starts_with(affix),
        _ => own.ends_with(affix),
    };
    match &affix {
        Value::Seq(seq) if seq.kind.is_tuple() => {
            let mut any = false;
            for affix in &seq.items {
                any = any || matches(text_argument(name, affix)?);
            }
            Ok(any)
        }
        other => Ok(matches(text_argument(name, other)?)),
    }
}

/// `find`, `rfind`, `index`, `rindex`, `count`.
fn search(own: &str, name: &str, args: &Args) -> Result<Value> {
    let [part, start, end] = args.positional(name)?;
    let part = required(name, "sub", part)?;
    let part = text_argument(name, &part)?;
    let start = given(start).map(|v| int_argument(name, &v)).transpose()?;
    let end = given(end).map(|v| int_argument(name, &v)).transpose()?;
    spend_characters(own.len().saturating_mul(2))?;
    let bounded = text::bounded(own, start, end)?;
    if name == "count" {
        let count = bounded.map_or(0, |(own, _)| match part.is_empty() {
            true => own.chars().count().saturating_add(1),
            false => own.matches(part).count(),
        });
        return Ok(Value::Int(count as i128));
    }
    let found = bounded.and_then(|(own, first)| {
        let at = match name.starts_with('r') {
            true => own.rfind(part)?,
            false => own.find(part)?,
        };
        let before = own.get(..at)?.chars().count();
        Some(before.saturating_add(first) as i128)
    });
    match found {
        Some(at) => Ok(Value::Int(at)),
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => value_error("substring not found"),
    }
}

fn str_method(own: &str, name: &str, args: Args) -> Result<Value> {
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.positional(name)?;
            let chars = given(chars);
            let chars = chars.as_ref().map(|v| text_argument(name, v)).transpose()?;
            let sides = match name {
                "lstrip" => Sides::Left,
                "rstrip" => Sides::Right,
                _ => Sides::Both,
            };
            Value::text(text::strip(own, chars, sides)?)
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(name, ["sep", "maxsplit"])?;
            let separator = given(separator);
            let separator = separator.as_ref().map(|v| text_argument(name, v));
            let most = most.map(|v| int_argument(name, &v)).transpose()?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            text::split(own, separator.transpose()?, most, name == "rsplit")
        }
        "startswith" | "endswith" => Ok(Value::Bool(has_affix(own, name, &args)?)),
        "find" | "rfind" | "index" | "rindex" | "count" => search(own, name, &args),
        "replace" => {
            let [old, new, count] = args.positional(name)?;
            let (old, new) = (required(name, "old", old)?, required(name, "new", new)?);
            let count = count.map(|v| int_argument(name, &v)).transpose()?;
            let count = count.and_then(|count| usize::try_from(count).ok());
            let (old, new) = (text_argument(name, &old)?, text_argument(name, &new)?);
            text::replace(own, old, new, count)
        }
        "join" => {
            let [items] = args.positional(name)?;
            let mut out = Builder::new();
            let items = required(name, "iterable", items)?.items()?;
            for (i, item) in items.iter().enumerate() {
                let Some(part) = item.as_str() else {
                    return type_error(format!(
                        "sequence item {i}: expected str instance, {} found",
                        item.type_name()
                    ));
                };
                if i > 0 {
                    out.push_str(own)?;
                }
                out.push_str(part)?;
            }
            Ok(Value::built(out))
        }
        "partition" | "rpartition" => {
            let [separator] = args.positional(name)?;
            let separator = required(name, "sep", separator)?;
            text::partition(own, text_argument(name, &separator)?, name == "rpartition")
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = args.positional(name)?;
            let affix = required(name, "affix", affix)?;
            let affix = text_argument(name, &affix)?;
            let cut = match name {
                "removeprefix" => own.strip_prefix(affix),
                _ => own.strip_suffix(affix),
            };
            Value::text(cut.unwrap_or(own))
        }
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            text::splitlines(own, is_set(keep.as_ref()))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = args.positional(name)?;
            let width = size_argument(name, &required(name, "width", width)?)?;
            let side = match name {
                "center" => Sides::Both,
                "ljust" => Sides::Right,
                _ => Sides::Left,
            };
            text::justified(own, width, fill_argument(name, fill)?, side)
        }
        "zfill" => {
            let [width] = args.positional(name)?;
            text::zfill(own, size_argument(name, &required(name, "width", width)?)?)
        }
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
            let size = size.map_or(Ok(8), |v| size_argument(name, &v))?;
            expand_tabs(own, size)
        }
        "format" => braces::format(own, &args),
        "format_map" => {
            let [mapping] = args.positional(name)?;
            let Some(Value::Dict(dict)) = mapping else {
                return type_error("format_map() wants a dictionary");
            };
            let mut named = Args::default();
            for (key, value) in dict.entries() {
                named.add_named(text_argument(name, key)?, value.clone())?;
            }
            braces::format(own, &named)
        }
        "encode" | "translate" | "maketrans" => Err(Error::new(
            Kind::Security,
            format!("str.{name} is not offered to chat templates"),
        )),
        _ => {
            let [] = args.positional(name)?;
            plain_str_method(own, name)
        }
    }
}

/// The methods without arguments.
fn plain_str_method(own: &str, name: &str) -> Result<Value> {
    let all = |test: fn(char) -> bool| !own.is_empty() && own.chars().all(test);
    let answer = match name {
        "lower" => return text::lower(own),
        "casefold" => return text::casefold(own),
        "upper" => return text::upper(own),
        "title" => return text::title(own),
        "capitalize" => return text::capitalize(own),
        "swapcase" => return text::swapcase(own),
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => own.is_ascii(),
        "isdecimal" => all(text::is_decimal),
        "isdigit" => all(text::is_digit),
        "isnumeric" => all(text::is_numeric),
        "isspace" => all(is_space),
        "islower" => text::is_lower(own),
        "isupper" => text::is_upper(own),
        "istitle" => text::is_title(own),
        "isidentifier" => {
            let starts = own.starts_with(|c: char| c.is_alphabetic() || c == '_');
            starts && own.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        "isprintable" => {
            let mut shown = Builder::new();
            crate::jinja::values::quoted(&mut shown, &own.replace(['\\', '\'', '"'], ""))?;
            shown.len() == own.replace(['\\', '\'', '"'], "").len().saturating_add(2)
        }
        _ => return type_error(format!("'str' has no method {name}")),
    };
    Ok(Value::Bool(answer))
}

fn expand_tabs(own: &str, size: usize) -> Result<Value> {
    let mut out = Builder::new();
    let mut column = 0_usize;
    for c in own.chars() {
        match c {
            '\t' => {
                let behind = column.checked_rem(size).unwrap_or(0);
                let missing = size.saturating_sub(behind);
                out.push_repeated(" ", missing)?;
                column = column.saturating_add(missing);
            }
            '\n' | '\r' => {
                out.push(c)?;
                column = 0;
            }
            c => {
                out.push(c)?;
                column = column.saturating_add(1);
            }
        }
    }
    Ok(Value::built(out))
}

//! Filters that go through items.

use super::access::{path_attribute, path_attribute_or};
use super::args::{Args, given, int_argument, is_set, required, size_argument, text_argument};
use super::{checks, filters, text};
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::meter::{Builder, Held, spend};
use crate::jinja::values::{Key, Object, Seq, SeqKind, Value, add, equal, is_less, text_of};
use std::collections::HashSet;

/// `items` in the order of a comparison that may fail, equal ones as they were.
pub(super) fn sorted<T: Clone>(
    items: Vec<T>,
    mut less: impl FnMut(&T, &T) -> Result<bool>,
) -> Result<Vec<T>> {
    // The library's sorts want an order that cannot fail: the first failure is kept, and ends it.
    let mut failure = None;
    let mut order = |a: &T, b: &T| {
        if failure.is_some() {
            return std::cmp::Ordering::Equal;
        }
        let mut ask = |a: &T, b: &T| match less(a, b) {
            Ok(less) => less,
            Err(error) => {
                failure.get_or_insert(error);
                false
            }
        };
        if ask(a, b) {
            std::cmp::Ordering::Less
        } else if ask(b, a) {
            std::cmp::Ordering::Greater
        } else {
            std::cmp::Ordering::Equal
        }
    };
    let sorted = merge_sorted(items, &mut order);
    match failure {
        Some(error) => Err(error),
        None => Ok(sorted),
    }
}

/// A stable merge sort that bears an order which is none (floats that are not numbers).
fn merge_sorted<T: Clone>(
    items: Vec<T>,
    order: &mut impl FnMut(&T, &T) -> std::cmp::Ordering,
) -> Vec<T> {
    if items.len() < 2 {
        return items;
    }
    let mut left = items;
    let right = left.split_off(left.len() / 2);
    let left = merge_sorted(left, order);
    let right = merge_sorted(right, order);
    let mut merged = Vec::with_capacity(left.len().saturating_add(right.len()));
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        merged.extend(match order(b, a) == std::cmp::Ordering::Less {
            true => right.next(),
            false => left.next(),
        });
    }
    merged.extend(left);
    merged.extend(right);
    merged
}

/// What is compared of a value where case does not count.
fn without_case(value: Value) -> Result<Value> {
    match value.as_str() {
        Some(own) => text::lower(own),
        None => Ok(value),
    }
}

/// What a filter compares items by.
struct By<'a> {
    attribute: Option<&'a Value>,
    default: Option<&'a Value>,
    case_sensitive: bool,
}

impl By<'_> {
    fn key(&self, item: &Value) -> Result<Value> {
        let value = match self.attribute {
            Some(path) => path_attribute_or(item, path, self.default)?,
            None => item.clone(),
        };
        match self.case_sensitive {
            true => Ok(value),
            false => without_case(value),
        }
    }
}

/// A filter of this module; nothing where the name is another's.
pub(super) fn filter(name: &str, value: &Value, args: Args) -> Option<Result<Value>> {
    Some(match name {
        "map" => map(value, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, args),
        "join" => join(value, &args),
        "sort" => sort(value, &args),
        "unique" => unique(value, &args),
        "min" | "max" => extreme(name, value, &args),
        "groupby" => groupby(value, &args),
        "dictsort" => dictsort(value, &args),
        "sum" => sum(value, &args),
        "batch" => batch(value, &args),
        "slice" => slice(value, &args),
        "first" => plain(name, &args).and_then(|()| first(value)),
        "last" => plain(name, &args).and_then(|()| last(value)),
        "list" => plain(name, &args).and_then(|()| Value::list(value.items()?)),
        "reverse" => plain(name, &args).and_then(|()| reverse(value)),
        "items" => plain(name, &args).and_then(|()| items(value)),
        "length" | "count" => plain(name, &args).and_then(|()| match value.len() {
            Some(length) => Ok(Value::Int(length as i128)),
            None => type_error(format!(
                "object of type '{}' has no len()",
                value.type_name()
            )),
        }),
        _ => return None,
    })
}

fn plain(name: &str, args: &Args) -> Result<()> {
    let [] = args.bind(name, [])?;
    Ok(())
}

fn map(value: &Value, mut args: Args) -> Result<Value> {
    let attribute = match args.positional.is_empty() {
        true => args.take_named("attribute"),
        false => None,
    };
    let default = attribute.as_ref().and_then(|_| args.take_named("default"));
    let mut mapped = Vec::new();
    if !value.is_true() {
        return Value::generator(mapped);
    }
    if let Some(path) = attribute {
        if let Some((name, _)) = args.named.first() {
            return type_error(format!("map() got an unexpected keyword argument '{name}'"));
        }
        for item in value.items()? {
            mapped.push(path_attribute_or(&item, &path, default.as_ref())?);
        }
        return Value::generator(mapped);
    }
    if args.positional.is_empty() {
        return type_error("map requires a filter argument");
    }
    let name = args.positional.remove(0);
    let name = text_argument("map", &name)?.to_owned();
    for item in value.items()? {
        let args = Args {
            positional: args.positional.clone(),
            named: args.named.clone(),
        };
        mapped.push(filters::filter(&name, &item, args)?);
    }
    Value::generator(mapped)
}

fn select(filter: &str, value: &Value, mut args: Args) -> Result<Value> {
    let mut chosen = Vec::new();
    if !value.is_true() {
        return Value::generator(chosen);
    }
    let path = match filter.ends_with("attr") {
        true if args.positional.is_empty() => {
            return type_error(format!("{filter} misses the attribute's name"));
        }
        true => Some(args.positional.remove(0)),
        false => None,
    };
    let test = match args.positional.is_empty() {
        true => None,
        false => Some(args.positional.remove(0)),
    };
    let wanted = filter.starts_with("select");
    for item in value.items()? {
        let subject = match &path {
            Some(path) => path_attribute(&item, path)?,
            None => item.clone(),
        };
        let passes = match &test {
            None => subject.is_true(),
            Some(test) => {
                let args = Args {
                    positional: args.positional.clone(),
                    named: args.named.clone(),
                };
                checks::test(text_argument(filter, test)?, &subject, args)?
            }
        };
        if passes == wanted {
            chosen.push(item);
        }
    }
    Value::generator(chosen)
}

fn join(value: &Value, args: &Args) -> Result<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let separator = separator.map_or_else(|| Ok(String::new()), |value| value.to_text())?;
    let attribute = given(attribute);
    let mut out = Builder::new();
    for (i, item) in value.items()?.iter().enumerate() {
        if i > 0 {
            out.push_str(&separator)?;
        }
        match &attribute {
            Some(path) => text_of(&mut out, &path_attribute(item, path)?)?,
            None => text_of(&mut out, item)?,
        }
    }
    Ok(Value::built(out))
}

fn keyed(items: Vec<Value>, by: &By<'_>) -> Result<Vec<(Value, Value)>> {
    let keyed = items.into_iter().map(|item| Ok((by.key(&item)?, item)));
    keyed.collect()
}

fn sorted_by_key(keyed: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<Value>> {
    // Python keeps the order of equal items in a reversed sort, too.
    let sorted = match reverse {
        true => sorted(keyed, |a, b| is_less(&b.0, &a.0))?,
        false => sorted(keyed, |a, b| is_less(&a.0, &b.0))?,
    };
    Ok(sorted.into_iter().map(|(_, item)| item).collect())
}

fn sort(value: &Value, args: &Args) -> Result<Value> {
    let names = ["reverse", "case_sensitive", "attribute"];
    let [reverse, case_sensitive, attribute] = args.bind("sort", names)?;
    let case_sensitive = is_set(case_sensitive.as_ref());
    let attribute = given(attribute);
    let paths: Vec<Option<Value>> = match &attribute {
        Some(Value::Str(paths)) => {
            let paths = paths.as_str().split(',');
            paths
                .map(|path| Value::text(path).map(Some))
                .collect::<Result<_>>()?
        }
        other => vec![other.clone()],
    };
    let mut with_keys = Vec::new();
    for item in value.items()? {
        let mut key = Vec::new();
        for path in &paths {
            let by = By {
                attribute: path.as_ref(),
                default: None,
                case_sensitive,
            };
            key.push(by.key(&item)?);
        }
        with_keys.push((Value::list(key)?, item));
    }
    Value::list(sorted_by_key(with_keys, is_set(reverse.as_ref()))?)
}

fn unique(value: &Value, args: &Args) -> Result<Value> {
    let [case_sensitive, attribute] = args.bind("unique", ["case_sensitive", "attribute"])?;
    let attribute = given(attribute);
    let by = By {
        attribute: attribute.as_ref(),
        default: None,
        case_sensitive: is_set(case_sensitive.as_ref()),
    };
    let mut seen = HashSet::new();
    let mut held = Held::default();
    let mut chosen = Vec::new();
    for item in value.items()? {
        let key = by.key(&item)?;
        held.grow(key.as_str().map_or(0, str::len).saturating_add(64))?;
        if seen.insert(Key::of(&key, &mut held)?) {
            chosen.push(item);
        }
    }
    Value::generator(chosen)
}

fn extreme(name: &str, value: &Value, args: &Args) -> Result<Value> {
    let [case_sensitive, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
    let attribute = given(attribute);
    let by = By {
        attribute: attribute.as_ref(),
        default: None,
        case_sensitive: is_set(case_sensitive.as_ref()),
    };
    let mut best: Option<(Value, Value)> = None;
    for (key, item) in keyed(value.items()?, &by)? {
        let better = match &best {
            None => true,
            Some((best, _)) if name == "min" => is_less(&key, best)?,
            Some((best, _)) => is_less(best, &key)?,
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or_else(
        || Value::undefined("No aggregated item, sequence was empty."),
        |(_, item)| item,
    ))
}

fn groupby(value: &Value, args: &Args) -> Result<Value> {
    let names = ["attribute", "default", "case_sensitive"];
    let [attribute, default, case_sensitive] = args.bind("groupby", names)?;
    let attribute = required("groupby", "attribute", attribute)?;
    let default = given(default);
    let by = By {
        attribute: Some(&attribute),
        default: default.as_ref(),
        case_sensitive: is_set(case_sensitive.as_ref()),
    };
    let exact = By {
        case_sensitive: true,
        ..by
    };
    let keyed = sorted(keyed(value.items()?, &by)?, |a, b| is_less(&a.0, &b.0))?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in keyed {
        match groups.last_mut() {
            Some((own, items)) if equal(own, &key)? => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (_, items) in groups {
        let key = items
            .first()
            .map_or(Ok(Value::None), |item| exact.key(item))?;
        let group = Seq::new(vec![key, Value::list(items)?], SeqKind::Group)?;
        out.push(Value::Seq(group.into()));
    }
    Value::list(out)
}

fn dictsort(value: &Value, args: &Args) -> Result<Value> {
    let [case_sensitive, by, reverse] =
        args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let by_value = match by.as_ref().map(|by| by.as_str()) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        _ => return value_error("You can only sort by either \"key\" or \"value\""),
    };
    let Value::Dict(dict) = value else {
        value.defined()?;
        return type_error(format!(
            "dictsort wants a dictionary, not {}",
            value.type_name()
        ));
    };
    let case_sensitive = is_set(case_sensitive.as_ref());
    let mut with_keys = Vec::new();
    for (key, item) in dict.entries() {
        let compared = if by_value { item.clone() } else { key.clone() };
        let compared = match case_sensitive {
            true => compared,
            false => without_case(compared)?,
        };
        with_keys.push((compared, Value::tuple(vec![key.clone(), item.clone()])?));
    }
    Value::list(sorted_by_key(with_keys, is_set(reverse.as_ref()))?)
}

fn sum(value: &Value, args: &Args) -> Result<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"])?;
    let attribute = given(attribute);
    let mut total = start.unwrap_or(Value::Int(0));
    if total.as_str().is_some() {
        return type_error("sum() can't sum strings [use ''.join(seq) instead]");
    }
    for item in value.items()? {
        let item = match &attribute {
            Some(path) => path_attribute(&item, path)?,
            None => item,
        };
        total = add(&total, &item)?;
    }
    Ok(total)
}

fn batch(value: &Value, args: &Args) -> Result<Value> {
    let [count, fill] = args.bind("batch", ["linecount", "fill_with"])?;
    let count = required("batch", "linecount", count)?;
    let count = int_argument("batch", &count)?;
    let items = value.items()?;
    let size = match usize::try_from(count) {
        Ok(size) => size,
        Err(_) => usize::MAX,
    };
    let mut batches = Vec::new();
    let chunks: Vec<Vec<Value>> = match size {
        // As Jinja2: an empty batch comes before the first item, and no batch is ever full.
        0 if items.is_empty() => Vec::new(),
        0 => vec![Vec::new(), items.clone()],
        size => items.chunks(size).map(<[Value]>::to_vec).collect(),
    };
    for mut chunk in chunks {
        if let Some(fill) = given(fill.clone())
            && chunk.len() < size
        {
            let missing = size.saturating_sub(chunk.len());
            drop(Held::new(missing.saturating_mul(size_of::<Value>()))?);
            chunk.extend(std::iter::repeat_n(fill, missing));
        }
        batches.push(Value::list(chunk)?);
    }
    Value::generator(batches)
}

fn slice(value: &Value, args: &Args) -> Result<Value> {
    let [count, fill] = args.bind("slice", ["slices", "fill_with"])?;
    let count = size_argument("slice", &required("slice", "slices", count)?)?;
    let items = value.items()?;
    if count == 0 {
        return Err(Error::new(
            Kind::ZeroDivision,
            "integer division or modulo by zero",
        ));
    }
    drop(Held::new(count.saturating_mul(128))?);
    spend(count as u64)?;
    let fill = given(fill);
    let (whole, extra) = (
        items.len().checked_div(count).unwrap_or(0),
        items.len().checked_rem(count).unwrap_or(0),
    );
    let mut rest = items.as_slice();
    let mut slices = Vec::new();
    for i in 0..count {
        let size = whole.saturating_add(usize::from(i < extra));
        let (taken, left) = rest.split_at_checked(size).unwrap_or((rest, &[]));
        rest = left;
        let mut taken = taken.to_vec();
        if i >= extra {
            taken.extend(fill.clone());
        }
        slices.push(Value::list(taken)?);
    }
    Value::generator(slices)
}

fn first(value: &Value) -> Result<Value> {
    let found = match value {
        Value::Generator(generator) => generator.next(),
        Value::Seq(seq) => seq.items.first().cloned(),
        Value::Str(text) => {
            let first = text.as_str().chars().next();
            first.map(|c| Value::text(c.to_string())).transpose()?
        }
        other => other.items()?.into_iter().next(),
    };
    Ok(found.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

/// Python's `reversed`, whose operand must have an end.
fn reversed(value: &Value) -> Result<Vec<Value>> {
    match value {
        Value::Generator(_) | Value::Object(_) => {
            return type_error(format!("'{}' object is not reversible", value.type_name()));
        }
        Value::Undefined(_) => value.defined()?,
        _ => {}
    }
    let mut items = value.items()?;
    items.reverse();
    Ok(items)
}

fn last(value: &Value) -> Result<Value> {
    let found = match value {
        Value::Seq(seq) => seq.items.last().cloned(),
        Value::Str(text) => {
            let last = text.as_str().chars().next_back();
            last.map(|c| Value::text(c.to_string())).transpose()?
        }
        Value::Undefined(_) => None,
        other => reversed(other)?.into_iter().next(),
    };
    Ok(found.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

fn reverse(value: &Value) -> Result<Value> {
    match value {
        Value::Str(text) => {
            spend(text.as_str().len() as u64)?;
            Value::text(text.as_str().chars().rev().collect::<String>())
        }
        Value::Object(object) if !matches!(object.as_ref(), Object::Loop(_)) => {
            type_error("argument must be iterable")
        }
        _ => {
            let mut items = value.items()?;
            items.reverse();
            match value {
                Value::Generator(_) => Value::list(items),
                _ => Value::generator(items),
            }
        }
    }
}

fn items(value: &Value) -> Result<Value> {
    match value {
        Value::Undefined(_) => Value::generator(Vec::new()),
        Value::Dict(dict) => {
            let pairs = dict.entries().iter();
            let pairs = pairs.map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()]));
            let pairs: Vec<Value> = pairs.collect::<Result<_>>()?;
            spend(pairs.len() as u64)?;
            Value::generator(pairs)
        }
        _ => type_error("Can only get item pairs from a mapping."),
    }
}

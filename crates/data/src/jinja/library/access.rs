//! Attributes and items, in the order the sandbox looks for them.

use super::methods;
use crate::jinja::error::{Result, type_error, value_error};
use crate::jinja::meter::{spend, spend_characters};
use crate::jinja::values::{LoopState, Object, Seq, SeqKind, Value};

/// What `owner` is called in Jinja2's words for undefined values.
fn described(owner: &Value) -> String {
    match owner {
        Value::None => "None".to_owned(),
        other => format!("'{} object'", other.type_name()),
    }
}

/// Python's `getattr`, as far as the sandbox lets it be seen.
fn real_attribute(owner: &Value, name: &str) -> Option<Value> {
    let unsafe_attribute = || {
        Value::undefined(&format!(
            "access to attribute '{name}' of '{}' object is unsafe.",
            owner.type_name()
        ))
    };
    if name.starts_with("__") && name.ends_with("__") {
        return Some(unsafe_attribute());
    }
    if methods::changes(owner, name) {
        return Some(unsafe_attribute());
    }
    if methods::has(owner, name) {
        return Some(Value::object(Object::Method(
            owner.clone(),
            name.to_owned(),
        )));
    }
    if let Value::Seq(seq) = owner
        && seq.kind == SeqKind::Group
    {
        let at = match name {
            "grouper" => 0,
            "list" => 1,
            _ => return None,
        };
        return seq.items.get(at).cloned();
    }
    let Value::Object(object) = owner else {
        return None;
    };
    match object.as_ref() {
        Object::Namespace(namespace) => {
            let attributes = namespace.0.borrow();
            let found = attributes.iter().find(|(own, _)| own == name);
            found.map(|(_, value)| value.clone())
        }
        Object::Loop(state) => loop_attribute(state, name),
        Object::Cycler(items, at) if name == "current" => items.get(at.get()).cloned(),
        _ => None,
    }
}

fn loop_attribute(state: &LoopState, name: &str) -> Option<Value> {
    let at = state.at.get() as i128;
    let length = state.items.items.len() as i128;
    let neighbour = |at: Option<usize>, what: &str| {
        let item = at.and_then(|at| state.items.items.get(at));
        item.cloned()
            .unwrap_or_else(|| Value::undefined(&format!("there is no {what} item")))
    };
    Some(match name {
        "index" => Value::Int(at.saturating_add(1)),
        "index0" => Value::Int(at),
        "revindex" => Value::Int(length.saturating_sub(at)),
        "revindex0" => Value::Int(length.saturating_sub(at).saturating_sub(1)),
        "first" => Value::Bool(at == 0),
        "last" => Value::Bool(at.saturating_add(1) >= length),
        "length" => Value::Int(length),
        "depth" => Value::Int(state.depth0.saturating_add(1)),
        "depth0" => Value::Int(state.depth0),
        "previtem" => neighbour(state.at.get().checked_sub(1), "previous"),
        "nextitem" => neighbour(state.at.get().checked_add(1), "next"),
        _ => return None,
    })
}

/// `owner.name`.
///
/// # Errors
/// Where `owner` is undefined; an attribute that is not there is an undefined value.
pub(crate) fn attribute(owner: &Value, name: &str) -> Result<Value> {
    owner.defined()?;
    spend_lookup(owner, name)?;
    if let Some(value) = real_attribute(owner, name) {
        return Ok(value);
    }
    if let Value::Dict(dict) = owner
        && let Some(value) = dict.get_str(name)
    {
        return Ok(value.clone());
    }
    Ok(Value::undefined(&format!(
        "{} has no attribute '{name}'",
        described(owner)
    )))
}

/// `owner[key]`.
///
/// # Errors
/// Where `owner` is undefined; an item that is not there is an undefined value.
pub(crate) fn item(owner: &Value, key: &Value) -> Result<Value> {
    owner.defined()?;
    let found = match (owner, key) {
        (Value::Dict(dict), key) => dict.get(key).ok().flatten().cloned(),
        (Value::Seq(seq), key) if !seq.is_view() => seq_item(seq, key)?,
        (Value::Str(text), key) => str_item(text.as_str(), key)?,
        _ => None,
    };
    if let Some(found) = found {
        return Ok(found);
    }
    if slice_of(key).is_some() {
        // A slice is Python's own, which has no undefined values.
        return type_error(format!("{} is not sliceable", described(owner)));
    }
    let Some(name) = key.as_str() else {
        if matches!(key, Value::Seq(_) | Value::Dict(_) | Value::Object(_)) {
            let message = format!("{} has no such element", described(owner));
            return Ok(Value::undefined(&message));
        }
        let mut shown = crate::jinja::meter::Builder::new();
        crate::jinja::values::repr(&mut shown, key)?;
        return Ok(Value::undefined(&format!(
            "{} has no element {}",
            described(owner),
            shown.as_str()
        )));
    };
    spend_lookup(owner, name)?;
    if let Some(value) = real_attribute(owner, name) {
        return Ok(value);
    }
    Ok(Value::undefined(&format!(
        "{} has no attribute '{name}'",
        described(owner)
    )))
}

/// Counts the work of looking for a name, and of naming it in a message.
fn spend_lookup(owner: &Value, name: &str) -> Result<()> {
    let namespace = match owner {
        Value::Object(object) => match object.as_ref() {
            Object::Namespace(namespace) => namespace.0.borrow().len(),
            _ => 0,
        },
        _ => 0,
    };
    spend((namespace / 8) as u64)?;
    spend_characters(name.len())
}

/// The place an index counts to in `length` items, from the end where it is negative.
fn place(index: i128, length: usize) -> Option<usize> {
    let length = length as i128;
    let index = match index < 0 {
        true => index.checked_add(length)?,
        false => index,
    };
    usize::try_from(index)
        .ok()
        .filter(|i| (*i as i128) < length)
}

fn slice_of(key: &Value) -> Option<&[Value; 3]> {
    match key {
        Value::Object(object) => match object.as_ref() {
            Object::Slice(parts) => Some(parts),
            _ => None,
        },
        _ => None,
    }
}

fn seq_item(seq: &Seq, key: &Value) -> Result<Option<Value>> {
    if let Some(index) = key.as_int() {
        return Ok(place(index, seq.items.len()).and_then(|at| seq.items.get(at).cloned()));
    }
    let Some(parts) = slice_of(key) else {
        return Ok(None);
    };
    let Some(places) = slice_places(parts, seq.items.len())? else {
        return Ok(None);
    };
    spend(places.len() as u64)?;
    let items = places
        .into_iter()
        .filter_map(|at| seq.items.get(at).cloned())
        .collect();
    let kind = match seq.kind {
        SeqKind::Tuple | SeqKind::Group => SeqKind::Tuple,
        SeqKind::Range(start, _, step) => {
            let bounds = slice_bounds(parts, seq.items.len())?;
            let at = |place: i128| start.saturating_add(place.saturating_mul(step));
            bounds.map_or(SeqKind::List, |bounds| {
                let step = step.saturating_mul(bounds.step);
                SeqKind::Range(at(bounds.start), at(bounds.stop), step)
            })
        }
        _ => SeqKind::List,
    };
    Ok(Some(Value::Seq(Seq::new(items, kind)?.into())))
}

fn str_item(text: &str, key: &Value) -> Result<Option<Value>> {
    if let Some(index) = key.as_int() {
        spend_characters(text.len())?;
        let found = match index < 0 {
            true => {
                let from_end = usize::try_from(index.saturating_add(1).unsigned_abs());
                from_end.ok().and_then(|at| text.chars().rev().nth(at))
            }
            false => usize::try_from(index)
                .ok()
                .and_then(|at| text.chars().nth(at)),
        };
        return found.map(|c| Value::text(c.to_string())).transpose();
    }
    let Some(parts) = slice_of(key) else {
        return Ok(None);
    };
    spend_characters(text.len())?;
    let [start, stop, step] = parts;
    let plain_step = matches!(step, Value::None) || step.as_int() == Some(1);
    let length = match text.is_ascii() {
        true => text.len(),
        false => text.chars().count(),
    };
    if plain_step {
        let parts = [start.clone(), stop.clone(), Value::None];
        let Some(bounds) = slice_bounds(&parts, length)? else {
            return Ok(None);
        };
        let (start, stop) = (bounds.start.max(0) as usize, bounds.stop.max(0) as usize);
        let part: &str = match text.is_ascii() {
            true => text.get(start..stop.max(start)).unwrap_or(""),
            false => {
                let offset = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
                text.get(offset(start)..offset(stop.max(start)))
                    .unwrap_or("")
            }
        };
        return Value::text(part).map(Some);
    }
    let Some(places) = slice_places(parts, length)? else {
        return Ok(None);
    };
    spend(places.len() as u64)?;
    // Places lie in one order, so characters are found in one pass.
    let descending = places.first() > places.last();
    let mut wanted: Vec<usize> = places;
    if descending {
        wanted.reverse();
    }
    let mut wanted = wanted.into_iter().peekable();
    let mut chosen: Vec<char> = Vec::new();
    for (at, c) in text.chars().enumerate() {
        if wanted.peek() == Some(&at) {
            wanted.next();
            chosen.push(c);
        }
    }
    if descending {
        chosen.reverse();
    }
    Value::text(chosen.into_iter().collect::<String>()).map(Some)
}

struct Bounds {
    start: i128,
    stop: i128,
    step: i128,
}

/// Python's `slice.indices`; nothing where a part is no integer.
fn slice_bounds(parts: &[Value; 3], length: usize) -> Result<Option<Bounds>> {
    let mut numbers = [None; 3];
    for (part, number) in parts.iter().zip(&mut numbers) {
        match (part, part.as_int()) {
            (Value::None, _) => {}
            (_, Some(i)) => *number = Some(i),
            _ => return Ok(None),
        }
    }
    let [start, stop, step] = numbers;
    let step = step.unwrap_or(1);
    if step == 0 {
        return value_error("slice step cannot be zero");
    }
    let length = length as i128;
    let (lowest, highest) = match step > 0 {
        true => (0, length),
        false => (-1, length.saturating_sub(1)),
    };
    let clamp = |index: i128| {
        let index = match index < 0 {
            true => index.saturating_add(length),
            false => index,
        };
        index.clamp(lowest, highest)
    };
    let (default_start, default_stop) = match step > 0 {
        true => (lowest, highest),
        false => (highest, lowest),
    };
    Ok(Some(Bounds {
        start: start.map_or(default_start, clamp),
        stop: stop.map_or(default_stop, clamp),
        step,
    }))
}

fn slice_places(parts: &[Value; 3], length: usize) -> Result<Option<Vec<usize>>> {
    let Some(bounds) = slice_bounds(parts, length)? else {
        return Ok(None);
    };
    let mut places = Vec::new();
    let mut at = bounds.start;
    while (bounds.step > 0 && at < bounds.stop) || (bounds.step < 0 && at > bounds.stop) {
        places.extend(usize::try_from(at));
        at = at.saturating_add(bounds.step);
    }
    Ok(Some(places))
}

/// The attribute `path` of an item, dots between its parts, as filters take it.
pub(super) fn path_attribute(owner: &Value, path: &Value) -> Result<Value> {
    path_attribute_or(owner, path, None)
}

/// The same; what is not there is `default`, where there is one.
pub(super) fn path_attribute_or(
    owner: &Value,
    path: &Value,
    default: Option<&Value>,
) -> Result<Value> {
    let Some(text) = path.as_str() else {
        return match path.as_int() {
            Some(_) => item(owner, path),
            None => type_error("an attribute is a name or a number"),
        };
    };
    let mut value = owner.clone();
    for part in text.split('.') {
        let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let key = match part.parse().ok().filter(|_| is_number) {
            Some(number) => Value::Int(number),
            None => Value::text(part)?,
        };
        value = item(&value, &key)?;
        if let (Some(default), Value::Undefined(_)) = (default, &value) {
            value = default.clone();
        }
    }
    Ok(value)
}

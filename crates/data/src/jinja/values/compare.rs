//! Equality, order and dictionary keys, as Python has them.

use std::cmp::Ordering;
use std::rc::Rc;

use super::{Object, Seq, SeqKind, Value};
use crate::jinja::error::{Result, type_error};
use crate::jinja::meter::{Held, spend, spend_bytes};

/// A hashable value: numbers that are equal are one key, whatever their type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    None,
    Undefined,
    Int(i128),
    /// Bits of a float that is no integer.
    Float(u64),
    Str(Box<str>),
    Tuple(Vec<Key>),
    /// By identity.
    Object(usize),
}

impl Key {
    /// The key of `value`; what it holds is counted in `held`.
    ///
    /// # Errors
    /// Where the value is of an unhashable type, or there is too much of it: parts that a tuple shares
    /// are written out here.
    pub(crate) fn of(value: &Value, held: &mut Held) -> Result<Self> {
        Ok(match value {
            Value::Undefined(_) => Self::Undefined,
            Value::None => Self::None,
            Value::Bool(b) => Self::Int((*b).into()),
            Value::Int(i) => Self::Int(*i),
            Value::Float(x) if x.fract() == 0.0 && x.abs() < 1e38 => Self::Int(*x as i128),
            Value::Float(x) => Self::Float(x.to_bits()),
            Value::Str(text) => {
                held.grow(text.as_str().len())?;
                Self::Str(text.as_str().into())
            }
            Value::Seq(seq) if seq.kind.is_tuple() => {
                let count = seq.items.len();
                spend(count as u64)?;
                held.grow(count.saturating_mul(size_of::<Self>()))?;
                let keys = seq.items.iter().map(|item| Self::of(item, held));
                Self::Tuple(keys.collect::<Result<_>>()?)
            }
            Value::Object(object) => Self::Object(Rc::as_ptr(object) as usize),
            _ => return type_error(format!("unhashable type: '{}'", value.type_name())),
        })
    }
}

fn numbers_equal(a: &Value, b: &Value) -> Option<bool> {
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Some(a == b);
    }
    Some(a.as_float()? == b.as_float()?)
}

/// Python's `==`.
pub(crate) fn equal(a: &Value, b: &Value) -> Result<bool> {
    spend(1)?;
    if let Some(equal) = numbers_equal(a, b) {
        return Ok(equal);
    }
    Ok(match (a, b) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Str(a), Value::Str(b)) => {
            let (a, b) = (a.as_str(), b.as_str());
            if a.len() == b.len() {
                spend_bytes(a.len())?;
            }
            a == b
        }
        (Value::Seq(a), Value::Seq(b)) => seqs_equal(a, b)?,
        (Value::Dict(a), Value::Dict(b)) => {
            if a.entries().len() != b.entries().len() {
                return Ok(false);
            }
            for (key, value) in a.entries() {
                match b.get(key)? {
                    Some(other) if equal(value, other)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Generator(a), Value::Generator(b)) => Rc::ptr_eq(a, b),
        (Value::Object(a), Value::Object(b)) => match (a.as_ref(), b.as_ref()) {
            (Object::Method(a, n), Object::Method(b, m)) => n == m && same(a, b),
            (Object::Function(n), Object::Function(m)) => n == m,
            _ => Rc::ptr_eq(a, b),
        },
        _ => false,
    })
}

fn seqs_equal(a: &Seq, b: &Seq) -> Result<bool> {
    let comparable = match (a.kind, b.kind) {
        (SeqKind::Range(..), SeqKind::Range(..)) => true,
        (SeqKind::Values, _) | (_, SeqKind::Values) => std::ptr::eq(a, b),
        (a, b) => a == b || (a.is_tuple() && b.is_tuple()),
    };
    if !comparable || a.items.len() != b.items.len() {
        return Ok(false);
    }
    if matches!(a.kind, SeqKind::Keys | SeqKind::Items) {
        // Views are sets.
        for item in &a.items {
            if !found(item, &b.items)? {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    for (a, b) in a.items.iter().zip(&b.items) {
        if !equal(a, b)? {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) fn found(item: &Value, items: &[Value]) -> Result<bool> {
    for other in items {
        if equal(item, other)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Python's `is`, as far as values here have an identity.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::None, Value::None) => true,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Float(a), Value::Float(b)) => a.to_bits() == b.to_bits(),
        // CPython keeps one copy of equal short literals, which is all a template can compare.
        (Value::Str(a), Value::Str(b)) => Rc::ptr_eq(a, b) || a.as_str() == b.as_str(),
        (Value::Seq(a), Value::Seq(b)) => Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b),
        (Value::Generator(a), Value::Generator(b)) => Rc::ptr_eq(a, b),
        (Value::Object(a), Value::Object(b)) => Rc::ptr_eq(a, b),
        _ => false,
    }
}

/// Python's order of two values; nothing where one of them is not a number.
///
/// # Errors
/// Where values of these types have no order.
pub(crate) fn compare_order(a: &Value, b: &Value) -> Result<Option<Ordering>> {
    spend(1)?;
    a.defined()?;
    b.defined()?;
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (a.as_float(), b.as_float()) {
        return Ok(a.partial_cmp(&b));
    }
    match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            spend_bytes(a.as_str().len().min(b.as_str().len()))?;
            Ok(Some(a.as_str().cmp(b.as_str())))
        }
        (Value::Seq(x), Value::Seq(y))
            if x.kind == y.kind && matches!(x.kind, SeqKind::List | SeqKind::Tuple) =>
        {
            for (a, b) in x.items.iter().zip(&y.items) {
                if !equal(a, b)? {
                    return compare_order(a, b);
                }
            }
            Ok(Some(x.items.len().cmp(&y.items.len())))
        }
        _ => type_error(format!(
            "'<' not supported between instances of '{}' and '{}'",
            a.type_name(),
            b.type_name()
        )),
    }
}

/// Python's `<`.
pub(crate) fn is_less(a: &Value, b: &Value) -> Result<bool> {
    Ok(compare_order(a, b)? == Some(Ordering::Less))
}

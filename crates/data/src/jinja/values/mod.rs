//! The values templates compute with: Python's, as far as JSON and Jinja2 make them.
//!
//! Lists and dictionaries never change once made (Jinja2's immutable sandbox refuses to), so they
//! hold no cycles and know their depth. Only namespaces change; the interpreter keeps a list of them
//! and empties them at the end.

mod compare;
mod dict;
mod ops;
mod print;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::Value as Json;

pub(crate) use compare::{Key, compare_order, equal, is_less, same};
pub(crate) use dict::{Dict, DictBuilder};
pub(crate) use ops::{add, arithmetic, concat, contains, escaped, negative, positive};
pub(crate) use print::{float_text, quoted, repr, text_of};

use super::error::{Error, Kind, Result, type_error};
use super::interpret::Scope;
use super::meter::{Builder, Held, VALUE_DEPTH, spend};

/// The longest account of why a value is undefined, in bytes: they are not counted as held.
const UNDEFINED_BYTES: usize = 160;

#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// With what to say where it is used.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Rc<Text>),
    Seq(Rc<Seq>),
    Dict(Rc<Dict>),
    /// What filters such as `map` give: items that can be gone through once.
    Generator(Rc<Generator>),
    Object(Rc<Object>),
}

/// Text that is counted while it lives.
#[derive(Debug)]
pub(crate) struct Text {
    text: String,
    /// Marked by `safe` or `escape`: text that is added to it is escaped.
    pub(crate) markup: bool,
    _held: Held,
}

/// What a sequence is in Python.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SeqKind {
    List,
    Tuple,
    /// A tuple of `groupby`, whose parts also have names.
    Group,
    /// start, stop, step
    Range(i128, i128, i128),
    Keys,
    Values,
    Items,
}

impl SeqKind {
    pub(crate) fn is_tuple(self) -> bool {
        matches!(self, Self::Tuple | Self::Group)
    }
}

#[derive(Debug)]
pub(crate) struct Seq {
    pub(crate) items: Vec<Value>,
    pub(crate) kind: SeqKind,
    depth: u32,
    _held: Held,
}

#[derive(Debug)]
pub(crate) struct Generator {
    items: Rc<Seq>,
    at: Cell<usize>,
}

#[derive(Debug)]
pub(crate) enum Object {
    Namespace(Namespace),
    /// The macro's number in the template, and where it was defined.
    Macro(usize, Rc<Scope>),
    Loop(LoopState),
    /// A global function.
    Function(&'static str),
    /// A method of a value.
    Method(Value, String),
    Slice([Value; 3]),
    Cycler(Vec<Value>, Cell<usize>),
    Joiner(Value, Cell<bool>),
}

/// `namespace()`: attributes that can be set from inner scopes.
#[derive(Debug, Default)]
pub(crate) struct Namespace(pub(crate) RefCell<Vec<(String, Value)>>);

/// What `loop` is inside a loop.
#[derive(Debug)]
pub(crate) struct LoopState {
    pub(crate) items: Rc<Seq>,
    pub(crate) at: Cell<usize>,
    pub(crate) depth0: i128,
    /// The loop's number in the template and the scope around it, where it is recursive.
    pub(crate) recursive: Option<(usize, Rc<Scope>)>,
    pub(crate) last_changed: RefCell<Option<Value>>,
}

/// Python's `str.isspace`.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

impl Text {
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }
}

impl Seq {
    pub(crate) fn new(items: Vec<Value>, kind: SeqKind) -> Result<Self> {
        let held = Held::new(
            items
                .len()
                .saturating_mul(size_of::<Value>())
                .saturating_add(64),
        )?;
        let depth = depth_above(items.iter())?;
        Ok(Self {
            items,
            kind,
            depth,
            _held: held,
        })
    }

    pub(crate) fn is_view(&self) -> bool {
        matches!(self.kind, SeqKind::Keys | SeqKind::Values | SeqKind::Items)
    }
}

/// The depth of what holds `items`.
fn depth_above<'v>(items: impl Iterator<Item = &'v Value>) -> Result<u32> {
    let deepest = items.map(Value::depth).max().unwrap_or(0);
    if deepest >= VALUE_DEPTH {
        return Err(Error::new(
            Kind::Budget,
            format!("a value is nested more than {VALUE_DEPTH} levels deep"),
        ));
    }
    Ok(deepest.saturating_add(1))
}

impl Generator {
    /// What is left, which is gone then.
    pub(crate) fn drain(&self) -> Vec<Value> {
        let from = self.at.replace(self.items.items.len());
        self.items.items.get(from..).unwrap_or_default().to_vec()
    }

    pub(crate) fn next(&self) -> Option<Value> {
        let item = self.items.items.get(self.at.get())?;
        self.at.set(self.at.get().saturating_add(1));
        Some(item.clone())
    }
}

impl Value {
    /// An undefined value; `message` says why, shortened: names come from the template.
    pub(crate) fn undefined(message: &str) -> Self {
        let mut cut = UNDEFINED_BYTES.min(message.len());
        while !message.is_char_boundary(cut) {
            cut = cut.saturating_sub(1);
        }
        Self::Undefined(message.get(..cut).unwrap_or("").into())
    }

    pub(crate) fn text(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let held = Held::new(text.capacity().saturating_add(64))?;
        Ok(Self::from_parts(text, held, false))
    }

    pub(crate) fn built(builder: Builder) -> Self {
        let (text, held) = builder.finish();
        Self::from_parts(text, held, false)
    }

    pub(crate) fn markup(text: String) -> Result<Self> {
        let held = Held::new(text.capacity().saturating_add(64))?;
        Ok(Self::from_parts(text, held, true))
    }

    fn from_parts(text: String, held: Held, markup: bool) -> Self {
        Self::Str(Rc::new(Text {
            text,
            markup,
            _held: held,
        }))
    }

    pub(crate) fn list(items: Vec<Self>) -> Result<Self> {
        Ok(Self::Seq(Rc::new(Seq::new(items, SeqKind::List)?)))
    }

    pub(crate) fn tuple(items: Vec<Self>) -> Result<Self> {
        Ok(Self::Seq(Rc::new(Seq::new(items, SeqKind::Tuple)?)))
    }

    pub(crate) fn generator(items: Vec<Self>) -> Result<Self> {
        Ok(Self::Generator(Rc::new(Generator {
            items: Rc::new(Seq::new(items, SeqKind::List)?),
            at: Cell::new(0),
        })))
    }

    pub(crate) fn object(object: Object) -> Self {
        Self::Object(Rc::new(object))
    }

    /// An object that holds values given by the template, and so may nest.
    ///
    /// # Errors
    /// Where it nests too deeply.
    pub(crate) fn nesting_object(object: Object) -> Result<Self> {
        let value = Self::object(object);
        depth_above(std::iter::once(&value))?;
        Ok(value)
    }

    /// A JSON value, object keys in their own order.
    pub(crate) fn from_json(json: &Json) -> Result<Self> {
        spend(1)?;
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(i), _) => Self::Int(i.into()),
                (None, Some(u)) => Self::Int(u.into()),
                (None, None) => Self::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => Self::text(s.as_str())?,
            Json::Array(items) => {
                Self::list(items.iter().map(Self::from_json).collect::<Result<_>>()?)?
            }
            Json::Object(map) => {
                let mut dict = DictBuilder::default();
                for (key, value) in map {
                    dict.insert(Self::text(key.as_str())?, Self::from_json(value)?)?;
                }
                dict.finish()?
            }
        })
    }

    fn depth(&self) -> u32 {
        match self {
            Self::Seq(seq) => seq.depth,
            Self::Dict(dict) => dict.depth(),
            Self::Generator(generator) => generator.items.depth,
            Self::Object(object) => match object.as_ref() {
                Object::Method(value, _) => value.depth().saturating_add(1),
                Object::Slice(parts) => {
                    let deepest = parts.iter().map(Self::depth).max().unwrap_or(0);
                    deepest.saturating_add(1)
                }
                Object::Cycler(items, _) => {
                    let deepest = items.iter().map(Self::depth).max().unwrap_or(0);
                    deepest.saturating_add(1)
                }
                Object::Joiner(value, _) => value.depth().saturating_add(1),
                Object::Loop(state) => state.items.depth.saturating_add(1),
                Object::Namespace(_) | Object::Macro(..) | Object::Function(_) => 1,
            },
            _ => 0,
        }
    }

    /// Whether there is a namespace, loop, macro or the like in the value.
    pub(crate) fn holds_objects(&self) -> Result<bool> {
        spend(1)?;
        let any = |items: &[Self]| {
            for item in items {
                if item.holds_objects()? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        match self {
            Self::Object(_) => Ok(true),
            Self::Seq(seq) => any(&seq.items),
            Self::Generator(generator) => any(&generator.items.items),
            Self::Dict(dict) => {
                for (_, value) in dict.entries() {
                    if value.holds_objects()? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// Python's name of the value's type, for errors.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(text) if text.markup => "Markup",
            Self::Str(_) => "str",
            Self::Seq(seq) => match seq.kind {
                SeqKind::List => "list",
                SeqKind::Tuple | SeqKind::Group => "tuple",
                SeqKind::Range(..) => "range",
                SeqKind::Keys => "dict_keys",
                SeqKind::Values => "dict_values",
                SeqKind::Items => "dict_items",
            },
            Self::Dict(_) => "dict",
            Self::Generator(_) => "generator",
            Self::Object(object) => match object.as_ref() {
                Object::Namespace(_) => "Namespace",
                Object::Macro(..) => "Macro",
                Object::Loop(_) => "LoopContext",
                Object::Function(_) => "function",
                Object::Method(..) => "method",
                Object::Slice(_) => "slice",
                Object::Cycler(..) => "Cycler",
                Object::Joiner(..) => "Joiner",
            },
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// An integer; Python's booleans are some.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(i) => Some(*i),
            Self::Bool(b) => Some((*b).into()),
            _ => None,
        }
    }

    /// Any number as a float.
    pub(crate) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            other => other.as_int().map(|i| i as f64),
        }
    }

    pub(crate) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(i) => *i != 0,
            Self::Float(x) => *x != 0.0,
            Self::Str(text) => !text.text.is_empty(),
            Self::Seq(seq) => !seq.items.is_empty(),
            Self::Dict(dict) => !dict.entries().is_empty(),
            Self::Generator(_) | Self::Object(_) => true,
        }
    }

    /// Python's `len`.
    pub(crate) fn len(&self) -> Option<usize> {
        match self {
            Self::Undefined(_) => Some(0),
            Self::Str(text) => Some(text.text.chars().count()),
            Self::Seq(seq) => Some(seq.items.len()),
            Self::Dict(dict) => Some(dict.entries().len()),
            Self::Object(object) => match object.as_ref() {
                Object::Loop(state) => Some(state.items.items.len()),
                _ => None,
            },
            _ => None,
        }
    }

    /// The error of using an undefined value, for those that are.
    pub(crate) fn defined(&self) -> Result<()> {
        match self {
            Self::Undefined(message) => Err(Error::new(Kind::Undefined, message.as_ref())),
            _ => Ok(()),
        }
    }

    pub(crate) fn is_iterable(&self) -> bool {
        match self {
            Self::None | Self::Bool(_) | Self::Int(_) | Self::Float(_) => false,
            Self::Object(object) => matches!(object.as_ref(), Object::Loop(_)),
            _ => true,
        }
    }

    /// Python's `iter`, all items at once: characters of text, keys of dictionaries.
    ///
    /// # Errors
    /// Where the value has no items (`None`, numbers).
    pub(crate) fn items(&self) -> Result<Vec<Self>> {
        let items = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Str(text) => {
                let characters = text.text.chars();
                drop(Held::new(text.text.len().saturating_mul(128))?);
                characters
                    .map(|c| Self::text(c.to_string()))
                    .collect::<Result<_>>()?
            }
            Self::Seq(seq) => seq.items.clone(),
            Self::Dict(dict) => dict.entries().iter().map(|(key, _)| key.clone()).collect(),
            Self::Generator(generator) => generator.drain(),
            Self::Object(object) => match object.as_ref() {
                Object::Loop(state) => {
                    let from = state.at.get().saturating_add(1);
                    state.items.items.get(from..).unwrap_or_default().to_vec()
                }
                _ => return type_error(format!("{:?} object is not iterable", self.type_name())),
            },
            _ => return type_error(format!("{:?} object is not iterable", self.type_name())),
        };
        spend(items.len() as u64)?;
        Ok(items)
    }
}

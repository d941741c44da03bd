//! Arguments of a call.

use crate::jinja::error::{Result, type_error};
use crate::jinja::values::{DictBuilder, Value};

#[derive(Debug, Default)]
pub(crate) struct Args {
    pub(crate) positional: Vec<Value>,
    pub(crate) named: Vec<(String, Value)>,
}

impl Args {
    pub(crate) fn add_named(&mut self, name: &str, value: Value) -> Result<()> {
        if self.named.iter().any(|(own, _)| own == name) {
            return type_error(format!("got multiple values for keyword argument '{name}'"));
        }
        self.named.push((name.to_owned(), value));
        Ok(())
    }

    pub(crate) fn take_named(&mut self, name: &str) -> Option<Value> {
        let at = self.named.iter().position(|(own, _)| own == name)?;
        Some(self.named.remove(at).1)
    }

    /// The arguments by the names of `callee`'s parameters.
    ///
    /// # Errors
    /// Where there are too many, or unknown ones.
    pub(crate) fn bind<const N: usize>(
        &self,
        callee: &str,
        names: [&str; N],
    ) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            return type_error(format!(
                "{callee}() takes {N} arguments but {} were given",
                self.positional.len()
            ));
        }
        let mut bound = [const { None }; N];
        for (slot, value) in bound.iter_mut().zip(&self.positional) {
            *slot = Some(value.clone());
        }
        for (name, value) in &self.named {
            let at = names.iter().position(|own| own == name);
            let Some(slot) = at.and_then(|at| bound.get_mut(at)) else {
                return type_error(format!(
                    "{callee}() got an unexpected keyword argument '{name}'"
                ));
            };
            if slot.replace(value.clone()).is_some() {
                return type_error(format!("{callee}() got multiple values for '{name}'"));
            }
        }
        Ok(bound)
    }

    /// Arguments that have no names, as most of Python's built-in methods take them.
    pub(crate) fn positional<const N: usize>(&self, callee: &str) -> Result<[Option<Value>; N]> {
        if !self.named.is_empty() {
            return type_error(format!("{callee}() takes no keyword arguments"));
        }
        self.bind(callee, [""; N])
    }

    /// Named arguments as a dictionary.
    pub(crate) fn dict_of(named: Vec<(String, Value)>) -> Result<Value> {
        let mut dict = DictBuilder::default();
        for (name, value) in named {
            dict.insert(Value::text(name)?, value)?;
        }
        dict.finish()
    }
}

/// An argument that must be there.
pub(super) fn required(callee: &str, name: &str, value: Option<Value>) -> Result<Value> {
    match value {
        Some(value) => Ok(value),
        None => type_error(format!("{callee}() misses the argument '{name}'")),
    }
}

/// An argument that is text.
pub(super) fn text_argument<'v>(callee: &str, value: &'v Value) -> Result<&'v str> {
    value.defined()?;
    match value.as_str() {
        Some(text) => Ok(text),
        None => type_error(format!(
            "{callee}() wants text (str), not {}",
            value.type_name()
        )),
    }
}

/// An argument that is an integer.
pub(super) fn int_argument(callee: &str, value: &Value) -> Result<i128> {
    value.defined()?;
    match value.as_int() {
        Some(i) => Ok(i),
        None => type_error(format!(
            "{callee}() wants an integer, not {}",
            value.type_name()
        )),
    }
}

/// A count or width: negative ones are 0, absurd ones as large as there are.
pub(super) fn size_argument(callee: &str, value: &Value) -> Result<usize> {
    Ok(usize::try_from(int_argument(callee, value)?.max(0)).unwrap_or(usize::MAX))
}

/// An optional argument: nothing where it was not given or is none.
pub(super) fn given(value: Option<Value>) -> Option<Value> {
    value.filter(|value| !matches!(value, Value::None))
}

pub(super) fn is_set(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}

//! Dictionaries in the order of their keys' insertion.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Key, Value, depth_above};
use crate::jinja::error::Result;
use crate::jinja::meter::Held;

/// Below this many entries, looking at all of them is the quicker way.
const INDEXED_FROM: usize = 12;
/// What an entry holds besides its key and value.
const ENTRY_BYTES: usize = 160;

#[derive(Debug)]
pub(crate) struct Dict {
    entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    depth: u32,
    _held: Held,
}

impl Dict {
    pub(crate) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    pub(super) fn depth(&self) -> u32 {
        self.depth
    }

    /// The value of a text key.
    pub(crate) fn get_str(&self, name: &str) -> Option<&Value> {
        if self.entries.len() < INDEXED_FROM {
            let mut entries = self.entries.iter();
            return entries
                .find(|(key, _)| key.as_str() == Some(name))
                .map(|(_, value)| value);
        }
        let at = self.index.get(&Key::Str(name.into()))?;
        self.entries.get(*at).map(|(_, value)| value)
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// Where the key is of an unhashable type.
    pub(crate) fn get(&self, key: &Value) -> Result<Option<&Value>> {
        if let Some(name) = key.as_str() {
            return Ok(self.get_str(name));
        }
        let mut held = Held::default();
        let key = Key::of(key, &mut held)?;
        if self.entries.len() < INDEXED_FROM {
            for (own, value) in &self.entries {
                if Key::of(own, &mut held)? == key {
                    return Ok(Some(value));
                }
            }
            return Ok(None);
        }
        let at = self.index.get(&key);
        Ok(at
            .and_then(|at| self.entries.get(*at))
            .map(|(_, value)| value))
    }
}

/// A dictionary being made.
#[derive(Debug, Default)]
pub(crate) struct DictBuilder {
    entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    held: Held,
}

impl DictBuilder {
    /// Sets `key`; one that is there keeps its place.
    ///
    /// # Errors
    /// Where the key is of an unhashable type.
    pub(crate) fn insert(&mut self, key: Value, value: Value) -> Result<()> {
        let hashed = Key::of(&key, &mut self.held)?;
        if let Some((_, old)) = self
            .index
            .get(&hashed)
            .and_then(|at| self.entries.get_mut(*at))
        {
            *old = value;
            return Ok(());
        }
        self.held.grow(ENTRY_BYTES)?;
        self.index.insert(hashed, self.entries.len());
        self.entries.push((key, value));
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Value> {
        let depth = depth_above(self.entries.iter().flat_map(|(key, value)| [key, value]))?;
        if self.entries.len() < INDEXED_FROM {
            self.index = HashMap::new();
        }
        Ok(Value::Dict(Rc::new(Dict {
            entries: self.entries,
            index: self.index,
            depth,
            _held: self.held,
        })))
    }
}

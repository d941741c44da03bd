//! Reading one JSON object key by key, with every problem noted.

use serde_json::{Map, Value};

/// Sizes above this are taken for a damaged file; no published model comes near.
pub(crate) const LARGEST_SIZE: u64 = 1 << 24;
/// Likewise for layers, of which a list is made before any weight is seen.
pub(crate) const LARGEST_LAYERS: u64 = 1 << 12;

/// Reads keys of one JSON object, noting what is wrong instead of stopping at it. A value that
/// could not be read is replaced by one that later arithmetic can bear.
pub struct Reader<'a> {
    /// The object.
    pub map: &'a Map<String, Value>,
    /// What stands before the key in messages (`rope_parameters.`).
    pub prefix: &'static str,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Of a whole `config.json`.
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self {
            map,
            prefix: "",
            problems: Vec::new(),
        }
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Notes what is wrong with a key.
    pub fn problem(&mut self, key: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("`{}{key}` {what}", self.prefix));
    }

    /// A size of at least 1.
    pub fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_u64() {
                Some(n) if (1..=LARGEST_SIZE).contains(&n) => n as usize,
                _ => {
                    self.problem(key, format_args!("must be a positive integer, not {value}"));
                    1
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1
            }
        }
    }

    /// A number above 0.
    pub fn number(&mut self, key: &str, default: Option<f64>) -> f64 {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_f64() {
                Some(n) if n.is_finite() && n > 0.0 => n,
                _ => {
                    self.problem(key, format_args!("must be a positive number, not {value}"));
                    1.0
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1.0
            }
        }
    }

    /// True or false.
    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(value) => {
                self.problem(key, format_args!("must be true or false, not {value}"));
                default
            }
        }
    }

    /// One token id, a list of them, or none.
    pub fn ids(&mut self, key: &str) -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            None => Vec::new(),
            // Some published files say -1 for "none".
            Some(value) if value.as_i64().is_some_and(|id| id < 0) => Vec::new(),
            Some(value) => {
                let ids = match value {
                    Value::Array(list) => list.iter().map(id).collect(),
                    single => id(single).map(|id| vec![id]),
                };
                ids.unwrap_or_else(|| {
                    let what = format_args!("must be a token id or a list of them, not {value}");
                    self.problem(key, what);
                    Vec::new()
                })
            }
        }
    }
}

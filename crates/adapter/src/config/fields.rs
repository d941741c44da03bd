//! How a configuration's fields are declared, read and written: each once, under PEFT's name.

use serde_json::{Map, Value, json};

use super::targets::Targets;

/// A value as it stands in `adapter_config.json`.
pub(crate) trait PeftValue: Sized {
    /// Reads it; `key` names it in problems.
    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self>;
    /// What is written for it.
    fn write(&self) -> Value;
    /// Whether `null` is a value of its own; otherwise it stands for the default, as older versions
    /// wrote it for what was not set.
    const NULLABLE: bool = false;
}

pub(crate) fn wrong<T>(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<T> {
    problems.push(format!("{key} = {value}: not a value this option takes"));
    None
}

macro_rules! through_serde {
    ($($ty:ty),+) => { $(
        impl PeftValue for $ty {
            fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
                serde_json::from_value(value.clone()).ok().or_else(|| $crate::config::fields::wrong(key, value, problems))
            }
            fn write(&self) -> Value {
                json!(self)
            }
        }
    )+ };
}
through_serde!(usize, i64, u64, bool, String, Targets);
pub(crate) use through_serde;

impl PeftValue for f64 {
    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
        value.as_f64().or_else(|| wrong(key, value, problems))
    }

    /// As Python would have written it: whole numbers without a point.
    fn write(&self) -> Value {
        if self.fract() == 0.0 && self.abs() < 9e15 {
            json!(*self as i64)
        } else {
            json!(self)
        }
    }
}

impl<T: PeftValue> PeftValue for Option<T> {
    const NULLABLE: bool = true;

    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
        match value {
            Value::Null => Some(None),
            value => T::read(key, value, problems).map(Some),
        }
    }

    fn write(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::write)
    }
}

/// One value stands for a list of one.
impl<T: PeftValue> PeftValue for Vec<T> {
    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
        match value {
            Value::Array(list) => list.iter().map(|v| T::read(key, v, problems)).collect(),
            one => T::read(key, one, problems).map(|one| vec![one]),
        }
    }

    fn write(&self) -> Value {
        self.iter().map(T::write).collect()
    }
}

/// A table whose order counts: of two patterns that match, the first decides.
pub type Pattern<T> = Vec<(String, T)>;

macro_rules! pattern {
    ($($ty:ty),+) => { $(
        impl PeftValue for Pattern<$ty> {
            fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
                let Value::Object(map) = value else { return wrong(key, value, problems) };
                let mut pairs = Vec::new();
                for (name, value) in map {
                    let key = format!("{key}.{name:?}");
                    if let Some(value) = <$ty>::read(&key, value, problems) {
                        pairs.push((name.clone(), value));
                    }
                }
                Some(pairs)
            }
            fn write(&self) -> Value {
                let pairs = self.iter().map(|(name, value)| (name.clone(), value.write()));
                Value::Object(pairs.collect())
            }
        }
    )+ };
}
pattern!(usize, f64, String, Vec<bool>, Vec<usize>);

/// Takes known keys out of the object and notes those of the wrong type.
pub(crate) struct Reader {
    pub left: Map<String, Value>,
    pub problems: Vec<String>,
}

impl Reader {
    pub fn take<T: PeftValue>(&mut self, key: &str, default: T) -> T {
        // `shift_remove` keeps the order of the rest.
        match self.left.shift_remove(key) {
            None => default,
            Some(Value::Null) if !T::NULLABLE => default,
            Some(value) => T::read(key, &value, &mut self.problems).unwrap_or(default),
        }
    }
}

/// A foreign setting on one line; a value that would fill pages is cut.
pub(crate) fn setting(key: &str, value: &Value) -> String {
    const LONGEST: usize = 80;
    let value = value.to_string();
    let mut short: String = value.chars().take(LONGEST).collect();
    if short.len() < value.len() {
        short.push('…');
    }
    crate::error::shown(&format!("{key} = {short}"))
}

/// Whether a value switches its feature on.
pub(crate) fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::String(text) => !text.is_empty(),
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// Declares one of PEFT's configurations: its fields with their defaults, and what it does with keys
/// that have no field. Every configuration also has the fields that all of PEFT's share.
macro_rules! peft_config {
    (
        $(#[$meta:meta])*
        pub struct $name:ident in $peft_type:literal {
            $( $(#[$doc:meta])* $field:ident $(as $key:literal)? : $ty:ty = $default:expr; )*
        }
        written { $( $written:literal : $value:expr; )* }
        refused { $( $refused:literal : $what:literal; )* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $( $(#[$doc])* pub $field: $ty, )*
            /// What the model is for (`CAUSAL_LM`, `SEQ_2_SEQ_LM`, `TOKEN_CLS`, `SEQ_CLS`, `FEATURE_EXTRACTION`).
            pub task_type: Option<String>,
            /// The base model's name or directory.
            pub base_model_name_or_path: Option<String>,
            /// The base model's revision.
            pub revision: Option<String>,
            /// Every other key of the file, kept as read.
            pub other: serde_json::Map<String, serde_json::Value>,
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $( $field: $default, )*
                    task_type: None,
                    base_model_name_or_path: None,
                    revision: None,
                    other: serde_json::Map::new(),
                }
            }
        }

        impl $name {
            /// `peft_type` in the file.
            pub const PEFT_TYPE: &'static str = $peft_type;

            /// Keys that ask for what is not here, with what it is.
            const REFUSED: &'static [(&'static str, &'static str)] = &[$( ($refused, $what), )*];

            /// Reads `adapter_config.json`; `origin` names the file in errors. All wrong values are
            /// reported at once, and so is what is not supported.
            pub fn from_json(value: &serde_json::Value, origin: &str) -> crate::error::Result<Self> {
                let object = $crate::config::object_of(value, origin, Some($peft_type))?;
                let mut read = $crate::config::fields::Reader { left: object, problems: Vec::new() };
                read.left.shift_remove("peft_type");
                let config = Self {
                    $( $field: read.take($crate::config::fields::peft_config!(@key $field $($key)?), $default), )*
                    task_type: read.take("task_type", None),
                    base_model_name_or_path: read.take("base_model_name_or_path", None),
                    revision: read.take("revision", None),
                    other: read.left,
                };
                let mut problems = read.problems;
                if problems.is_empty() {
                    problems = MethodConfig::problems(&config, $crate::config::Purpose::Load);
                }
                if problems.is_empty() {
                    return Ok(config);
                }
                Err(crate::error::AdapterError::Config { origin: origin.to_string(), problems })
            }

            /// The file's contents, keys sorted. Patterns keep their order, which decides between them.
            pub fn to_json(&self) -> serde_json::Value {
                #[allow(unused_imports)]
                use $crate::config::fields::PeftValue;
                let mut map = $crate::config::written_by_all();
                $( map.insert($written.to_string(), $value); )*
                map.extend(self.other.clone());
                map.insert("peft_type".to_string(), serde_json::json!($peft_type));
                $( map.insert(
                    $crate::config::fields::peft_config!(@key $field $($key)?).to_string(),
                    self.$field.write(),
                ); )*
                map.insert("task_type".to_string(), self.task_type.write());
                map.insert("base_model_name_or_path".to_string(), self.base_model_name_or_path.write());
                map.insert("revision".to_string(), self.revision.write());
                map.sort_keys();
                serde_json::Value::Object(map)
            }

            /// Keys that neither this crate nor PEFT 0.21 knows and that hold something: kept in the
            /// file, without effect here. Worth telling the user.
            pub fn unknown_keys(&self) -> Vec<&str> {
                let passive: &[&str] = &[$( $written, )*];
                let known = |key: &str| {
                    passive.contains(&key)
                        || $crate::config::KNOWN_TO_ALL.contains(&key)
                        || Self::REFUSED.iter().any(|(k, _)| *k == key)
                };
                let idle = self.other.iter().filter(|(key, value)| {
                    !known(key) && $crate::config::fields::asks(value)
                });
                idle.map(|(key, _)| key.as_str()).collect()
            }

            /// [`Self::unknown_keys`] with their values, for people.
            pub fn unknown_settings(&self) -> Vec<String> {
                let keys = self.unknown_keys().into_iter();
                keys.filter_map(|key| Some($crate::config::fields::setting(key, self.other.get(key)?)))
                    .collect()
            }

            /// One line for each key that asks for what is not here, and for a `task_type` PEFT does
            /// not know.
            fn refused(&self) -> Vec<String> {
                let asked = Self::REFUSED.iter().filter(|(key, _)| {
                    self.other.get(*key).is_some_and($crate::config::fields::asks)
                });
                let mut problems: Vec<String> = asked
                    .map(|(key, what)| {
                        let value = self.other.get(*key).unwrap_or(&serde_json::Value::Null);
                        format!("{key} = {value}: {what} is not supported")
                    })
                    .collect();
                problems.extend($crate::config::task_problem(self.task_type.as_deref()));
                problems
            }
        }
    };
    (@key $field:ident $key:literal) => { $key };
    (@key $field:ident) => { stringify!($field) };
}
pub(crate) use peft_config;

//! How a section of a recipe is declared: each setting once, with its type, default, description and
//! check.

use serde::Serialize;

use super::read::SectionReader;

/// A setting as the reference in `docs/recipe.md` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name within its section.
    pub name: &'static str,
    /// What it does.
    pub doc: String,
    /// The default as TOML; empty where leaving it out means something of its own.
    pub default: String,
}

/// A table of a recipe.
pub(crate) trait Section: Sized {
    /// The table's name; empty for the settings above the first table.
    const NAME: &'static str;
    /// Its settings, in the order in which they are documented.
    fn settings() -> Vec<crate::recipe::section::Setting>;
    /// Takes its settings from what was written, defaults for the rest.
    fn read(reader: &mut SectionReader<'_, '_>) -> Self;
}

/// Declares a section: its settings with their descriptions, defaults and checks.
macro_rules! section {
    (
        $(#[$meta:meta])*
        pub struct $name:ident in $table:literal {
            $( $(#[doc = $doc:literal])+ $field:ident : $ty:ty = $default:expr, $check:expr; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $( $(#[doc = $doc])+ pub $field: $ty, )* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* }
            }
        }

        impl crate::recipe::section::Section for $name {
            const NAME: &'static str = $table;

            fn settings() -> Vec<crate::recipe::section::Setting> {
                let default = Self::default();
                vec![ $( crate::recipe::section::Setting {
                    name: stringify!($field),
                    doc: [$($doc),+].map(str::trim).join(" "),
                    default: crate::recipe::section::default_text(&default.$field),
                }, )* ]
            }

            fn read(reader: &mut crate::recipe::read::SectionReader<'_, '_>) -> Self {
                let mut section = Self::default();
                $( if let Some(value) = reader.take(stringify!($field), $check) {
                    section.$field = value;
                } )*
                section
            }
        }
    };
}

pub(super) use section;

/// A value as it would be written after `name = `, empty for an absent one and for a section.
pub(super) fn default_text<T: Serialize>(value: &T) -> String {
    match toml::Value::try_from(value) {
        Ok(toml::Value::Table(section)) if !section.is_empty() => String::new(),
        Ok(value) => value.to_string(),
        Err(_) => String::new(),
    }
}

/// Whether a value will do, or what it must be.
pub(super) type Verdict = Result<(), String>;

pub(super) fn any<T>(_: &T) -> Verdict {
    Ok(())
}

pub(super) fn given<T>(check: impl Fn(&T) -> Verdict) -> impl Fn(&Option<T>) -> Verdict {
    move |value| value.as_ref().map_or(Ok(()), &check)
}

pub(super) fn verdict(ok: bool, must: &str) -> Verdict {
    if ok { Ok(()) } else { Err(must.to_owned()) }
}

pub(super) fn positive(value: &usize) -> Verdict {
    verdict(*value > 0, "must be at least 1")
}

pub(super) fn at_least_two(value: &usize) -> Verdict {
    verdict(*value >= 2, "must be at least 2")
}

pub(super) fn at_most(limit: u64) -> impl Fn(&u64) -> Verdict {
    move |value| verdict(*value <= limit, &format!("must be at most {limit}"))
}

pub(super) fn positive_number(value: &f64) -> Verdict {
    verdict(value.is_finite() && *value > 0.0, "must be greater than 0")
}

pub(super) fn not_negative(value: &f64) -> Verdict {
    verdict(value.is_finite() && *value >= 0.0, "must be 0 or more")
}

pub(super) fn below_one(value: &f64) -> Verdict {
    verdict((0.0..1.0).contains(value), "must be at least 0 and below 1")
}

pub(super) fn not_empty<S: AsRef<str>>(value: &S) -> Verdict {
    verdict(!value.as_ref().trim().is_empty(), "must not be empty")
}

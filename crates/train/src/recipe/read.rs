//! Reading a recipe file and its overrides: TOML to checked settings, every problem with its line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::adapter::AdapterSettings;
use super::lock::LockInfo;
use super::quantization::QuantizationSettings;
use super::section::{Section, Setting};
use super::settings::{DataSettings, General, ModelSettings, OutputSettings, TrainSettings};
use super::{Recipe, resolve};
use crate::error::recipe::{Origin, Problem, Problems, RecipeError};

/// A recipe as written, with the overrides of the command line; nothing in it is checked yet.
#[derive(Clone, Debug)]
pub struct RecipeFile {
    path: PathBuf,
    text: String,
    overrides: Vec<String>,
}

impl RecipeFile {
    /// Reads the file, which may also be the `recipe.lock.toml` of an earlier run.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path).map_err(|source| RecipeError::Read {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::from_text(path, text))
    }

    /// A recipe that is not (yet) a file; `path` names it in errors and is what its relative paths
    /// are relative to.
    pub fn from_text(path: &Path, text: String) -> Self {
        Self {
            path: path.to_owned(),
            text,
            overrides: Vec::new(),
        }
    }

    /// Adds `section.name=value` settings that take precedence over the file's. The value is TOML;
    /// a word that is not TOML stands for itself as a string. Paths in it are relative to the
    /// current directory.
    pub fn with_overrides<S: AsRef<str>>(mut self, overrides: &[S]) -> Self {
        self.overrides
            .extend(overrides.iter().map(|s| s.as_ref().to_owned()));
        self
    }

    /// The file's path as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks everything and fills in what was left out.
    pub fn resolve(&self) -> Result<Recipe, RecipeError> {
        self.read_settings().map(|(recipe, _)| recipe)
    }

    /// What `enamel compare` trains beside each other: the `[[compare]]` tables of the file.
    ///
    /// # Errors
    /// Anything wrong with the recipe or with one of the variants, each under its name.
    pub fn variants(&self) -> Result<Vec<(Variant, Recipe)>, RecipeError> {
        let (_, extras) = self.read_settings()?;
        let resolved = extras.compare.into_iter().map(|variant| {
            let file = self.clone().with_overrides(&variant.set);
            Ok((variant, file.resolve()?))
        });
        resolved.collect()
    }

    /// What a lock file says about the run that wrote it; `None` for an ordinary recipe.
    pub fn lock_info(&self) -> Result<Option<LockInfo>, RecipeError> {
        self.read_settings().map(|(_, extras)| extras.lock)
    }

    fn read_settings(&self) -> Result<(Recipe, Extras), RecipeError> {
        let snippets: Vec<_> = self
            .overrides
            .iter()
            .map(|text| override_as_toml(text))
            .collect();
        let mut problems = Vec::new();
        let mut written = Written::default();
        let (table, errors) = DeTable::parse_recoverable(&self.text);
        for error in errors {
            problems.push(Problem {
                origin: self.origin(error.span()),
                message: error.message().to_owned(),
                help: None,
            });
        }
        // A syntax error misplaces what follows it; complaints about that would only distract.
        if !problems.is_empty() {
            return Err(self.invalid(problems));
        }
        written.add(table.into_inner(), &|span| self.origin(Some(span)));
        for (snippet, given) in snippets.iter().zip(&self.overrides) {
            let origin = Origin::Override(given.clone());
            match snippet.as_deref().map(DeTable::parse) {
                Some(Ok(table)) => written.add(table.into_inner(), &|_| origin.clone()),
                _ => problems.push(Problem {
                    origin,
                    message: "cannot be read".to_owned(),
                    help: Some("write it as section.name=value".to_owned()),
                }),
            }
        }

        let mut origins = Origins::default();
        let general = written.take_section::<General>(&mut problems, &mut origins);
        let quantization = written.take_section(&mut problems, &mut origins);
        let recipe = Recipe {
            seed: general.seed,
            task: general.task,
            device: general.device,
            model: ModelSettings {
                quantization,
                ..written.take_section(&mut problems, &mut origins)
            },
            adapter: written.take_section::<AdapterSettings>(&mut problems, &mut origins),
            data: written.take_section::<DataSettings>(&mut problems, &mut origins),
            train: written.take_section::<TrainSettings>(&mut problems, &mut origins),
            output: written.take_section::<OutputSettings>(&mut problems, &mut origins),
        };
        let lock = written.sections.remove("lock").and_then(|(origin, table)| {
            let value = DeValue::Table(table);
            match read_value::<LockInfo>(Spanned::new(0..0, value)) {
                Ok(lock) => Some(lock),
                Err(message) => {
                    problems.push(Problem {
                        origin,
                        message: format!("[lock]: {message}"),
                        help: Some("the file was changed or comes from another version".into()),
                    });
                    None
                }
            }
        });
        let compare = written
            .compare
            .take()
            .map_or(Vec::new(), |(origin, value)| {
                read_value::<Vec<Variant>>(value).unwrap_or_else(|message| {
                    problems.push(Problem {
                        origin,
                        message: format!("[[compare]]: {message}"),
                        help: Some(
                            "each has a name, and a list `set` of section.name=value".into(),
                        ),
                    });
                    Vec::new()
                })
            });
        written.report_rest(&mut problems);
        let recipe = resolve::resolve(recipe, &self.path, &origins, &mut problems);
        if problems.is_empty() {
            Ok((recipe, Extras { lock, compare }))
        } else {
            Err(self.invalid(problems))
        }
    }

    fn origin(&self, span: Option<std::ops::Range<usize>>) -> Origin {
        let before = span.and_then(|span| self.text.as_bytes().get(..span.start));
        Origin::Line(1 + before.map_or(0, |b| b.iter().filter(|c| **c == b'\n').count()))
    }

    fn invalid(&self, mut list: Vec<Problem>) -> RecipeError {
        list.sort_by_key(|problem| match problem.origin {
            Origin::Line(line) => (0, line),
            Origin::Override(_) => (1, 0),
            Origin::Recipe => (2, 0),
        });
        RecipeError::Invalid(Problems {
            path: self.path.clone(),
            list,
        })
    }
}

/// What a recipe file may hold besides settings.
struct Extras {
    lock: Option<LockInfo>,
    compare: Vec<Variant>,
}

/// One of the runs that `enamel compare` makes from a recipe.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// What the table calls it.
    pub name: String,
    /// Overrides, as after `--set`.
    #[serde(default)]
    pub set: Vec<String>,
}

/// Turns `a.b=value` into a TOML line, quoting the value if it is a bare word.
fn override_as_toml(text: &str) -> Option<String> {
    let (name, value) = text.split_once('=')?;
    let as_is = format!("{} = {}", name.trim(), value.trim());
    // A line break would smuggle in a second setting.
    if !value.contains(['\n', '\r']) && DeTable::parse(&as_is).is_ok() {
        return Some(as_is);
    }
    let quoted = format!(
        "{} = {}",
        name.trim(),
        toml::Value::String(value.trim().to_owned())
    );
    DeTable::parse(&quoted).is_ok().then_some(quoted)
}

/// Where each setting that was written stands, by full name (`train.epochs`).
#[derive(Debug, Default)]
pub(super) struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// The place of `name`, if it was written at all.
    pub(super) fn get(&self, name: &str) -> Option<&Origin> {
        self.0.get(name)
    }

    /// The place to blame for a problem with `name`.
    pub(super) fn blame(&self, name: &str) -> Origin {
        self.0.get(name).cloned().unwrap_or(Origin::Recipe)
    }
}

struct Entry<'a> {
    origin: Origin,
    value: Spanned<DeValue<'a>>,
}

type Entries<'a> = BTreeMap<String, Entry<'a>>;

/// All that was written, split by section, later documents over earlier ones.
#[derive(Default)]
struct Written<'a> {
    general: Entries<'a>,
    tables: BTreeMap<String, (Origin, Entries<'a>)>,
    sections: BTreeMap<String, (Origin, DeTable<'a>)>,
    compare: Option<(Origin, Spanned<DeValue<'a>>)>,
}

impl<'a> Written<'a> {
    fn add(&mut self, table: DeTable<'a>, origin: &dyn Fn(std::ops::Range<usize>) -> Origin) {
        for (key, value) in table {
            let (at, name) = (origin(key.span()), key.into_inner().into_owned());
            let span = value.span();
            match value.into_inner() {
                // The lock's contents are read as one; it has no overrides worth merging.
                DeValue::Table(table) if name == "lock" => {
                    self.sections.insert(name, (at, table));
                }
                DeValue::Table(table) => {
                    self.add_table(name, at, table, origin);
                }
                value if name == "compare" => {
                    self.compare = Some((at, Spanned::new(span, value)));
                }
                value => {
                    let entry = Entry {
                        origin: at,
                        value: Spanned::new(span, value),
                    };
                    self.general.insert(name, entry);
                }
            }
        }
    }

    /// A section's settings; a table among them that is a section of its own goes to its own place.
    fn add_table(
        &mut self,
        name: String,
        at: Origin,
        table: DeTable<'a>,
        origin: &dyn Fn(std::ops::Range<usize>) -> Origin,
    ) {
        self.tables
            .entry(name.clone())
            .or_insert((at, Entries::new()));
        for (key, value) in table {
            let at = origin(key.span());
            let key = key.into_inner().into_owned();
            let section = full_name(&name, &key);
            let span = value.span();
            match value.into_inner() {
                DeValue::Table(table) if section == QuantizationSettings::NAME => {
                    self.add_table(section, at, table, origin);
                }
                value => {
                    let value = Spanned::new(span, value);
                    if let Some((_, entries)) = self.tables.get_mut(&name) {
                        merge(entries, key, Entry { origin: at, value });
                    }
                }
            }
        }
    }

    fn take_section<S: Section>(
        &mut self,
        problems: &mut Vec<Problem>,
        origins: &mut Origins,
    ) -> S {
        let mut empty = Entries::new();
        let entries = match self.tables.get_mut(S::NAME) {
            _ if S::NAME.is_empty() => &mut self.general,
            Some((_, entries)) => entries,
            None => &mut empty,
        };
        let section = S::read(&mut SectionReader {
            section: S::NAME,
            entries,
            problems,
            origins,
        });
        for (name, entry) in std::mem::take(entries) {
            problems.push(unknown_setting(S::NAME, &name, entry.origin));
        }
        self.tables.remove(S::NAME);
        section
    }

    /// What no section has taken.
    fn report_rest(&mut self, problems: &mut Vec<Problem>) {
        for (name, (origin, _)) in std::mem::take(&mut self.tables) {
            let sections: Vec<_> = all_settings()
                .into_iter()
                .map(|(section, _)| section)
                .collect();
            let near = nearest(&name, sections.iter().copied().filter(|s| !s.is_empty()));
            problems.push(Problem {
                origin,
                message: format!("unknown section [{name}]"),
                help: near.map(|near| format!("did you mean [{near}]?")),
            });
        }
    }
}

/// A table laid over a table (`rank_pattern`) adds to it; anything else replaces.
fn merge<'a>(entries: &mut Entries<'a>, name: String, new: Entry<'a>) {
    match entries.get_mut(&name) {
        Some(old) if old.value.get_ref().is_table() && new.value.get_ref().is_table() => {
            if let (DeValue::Table(old), DeValue::Table(new)) =
                (old.value.get_mut(), new.value.into_inner())
            {
                old.extend(new);
            }
        }
        _ => {
            entries.insert(name, new);
        }
    }
}

/// Hands out the settings of one section by name.
pub(super) struct SectionReader<'r, 'a> {
    section: &'static str,
    entries: &'r mut Entries<'a>,
    problems: &'r mut Vec<Problem>,
    origins: &'r mut Origins,
}

impl SectionReader<'_, '_> {
    /// The setting's value, if it was written, has the right type and passes `check`.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        check: impl Fn(&T) -> Result<(), String>,
    ) -> Option<T> {
        let Entry { origin, value } = self.entries.remove(name)?;
        let full = full_name(self.section, name);
        self.origins.0.insert(full.clone(), origin.clone());
        let shown = show(value.get_ref());
        let outcome = read_value::<T>(value).and_then(|v| {
            check(&v).map(|()| v).map_err(|must| match shown {
                Some(shown) => format!("{must}, not {shown}"),
                None => must,
            })
        });
        outcome
            .map_err(|message| {
                let message = format!("{full}: {message}");
                self.problems.push(Problem {
                    origin,
                    message,
                    help: None,
                });
            })
            .ok()
    }
}

fn read_value<T: DeserializeOwned>(value: Spanned<DeValue<'_>>) -> Result<T, String> {
    // serde names Rust's types; a recipe's author need not know them.
    const PLAIN: [(&str, &str); 7] = [
        ("expected struct QuantizationSettings", "expected a table"),
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected f64", "expected a number"),
        ("expected struct LoftqSettings", "expected a table"),
        ("expected a map", "expected a table"),
        ("unknown variant", "there is no"),
    ];
    T::deserialize(ValueDeserializer::from(value)).map_err(|error| {
        let mut message = error.message().to_owned();
        for (from, to) in PLAIN {
            message = message.replace(from, to);
        }
        message
    })
}

/// Numbers, to be quoted in a complaint.
fn show(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::Integer(n) => Some(n.to_string()),
        DeValue::Float(n) => Some(n.to_string()),
        _ => None,
    }
}

fn full_name(section: &str, name: &str) -> String {
    if section.is_empty() {
        name.to_owned()
    } else {
        format!("{section}.{name}")
    }
}

/// All sections with their settings, in the order of the documentation.
pub(super) fn all_settings() -> Vec<(&'static str, Vec<Setting>)> {
    vec![
        (General::NAME, General::settings()),
        (ModelSettings::NAME, ModelSettings::settings()),
        (QuantizationSettings::NAME, QuantizationSettings::settings()),
        (AdapterSettings::NAME, AdapterSettings::settings()),
        (DataSettings::NAME, DataSettings::settings()),
        (TrainSettings::NAME, TrainSettings::settings()),
        (OutputSettings::NAME, OutputSettings::settings()),
    ]
}

/// Names other trainers use for the same thing.
const OTHER_NAMES: [(&str, &str, &str); 20] = [
    ("blocksize", "model.quantization", "bnb_4bit_blocksize"),
    ("quant_type", "model.quantization", "bnb_4bit_quant_type"),
    ("alpha", "adapter", "lora_alpha"),
    ("dropout_p", "adapter", "lora_dropout"),
    ("init", "adapter", "init_lora_weights"),
    ("rank", "adapter", "r"),
    ("dropout", "adapter", "lora_dropout"),
    ("lora_r", "adapter", "r"),
    ("lora_target_modules", "adapter", "target_modules"),
    ("model_name_or_path", "model", "base"),
    ("base_model", "model", "base"),
    ("num_train_epochs", "train", "epochs"),
    ("num_epochs", "train", "epochs"),
    ("lr", "train", "learning_rate"),
    ("lr_scheduler", "train", "lr_scheduler_type"),
    ("per_device_train_batch_size", "train", "batch_size"),
    ("micro_batch_size", "train", "batch_size"),
    ("max_seq_length", "data", "max_length"),
    ("sequence_len", "data", "max_length"),
    ("output_dir", "output", "dir"),
];

fn unknown_setting(section: &str, name: &str, origin: Origin) -> Problem {
    let all = all_settings();
    let here = all
        .iter()
        .find(|(s, _)| *s == section)
        .map(|(_, settings)| settings.as_slice());
    let near = nearest(name, here.unwrap_or_default().iter().map(|s| s.name));
    let elsewhere = OTHER_NAMES
        .iter()
        .find(|(other, ..)| *other == name)
        .map(|(_, section, name)| full_name(section, name))
        .or_else(|| {
            let has = |settings: &[Setting]| settings.iter().any(|s| s.name == name);
            all.iter()
                .find(|(_, settings)| has(settings))
                .map(|(s, _)| full_name(s, name))
        })
        .or_else(|| near.map(|near| full_name(section, near)))
        .or_else(|| {
            let names = all
                .iter()
                .flat_map(|(s, l)| l.iter().map(|x| (full_name(s, x.name), x.name)));
            names
                .map(|(full, bare)| (strsim::damerau_levenshtein(name, bare), full))
                .filter(|(distance, _)| *distance <= 2 && name.len() > 4)
                .min()
                .map(|(_, full)| full)
        });
    let place = if section.is_empty() {
        "above the first section".to_owned()
    } else {
        format!("in [{section}]")
    };
    Problem {
        origin,
        message: format!("unknown setting `{name}` {place}"),
        help: Some(match elsewhere {
            Some(full) if !section.is_empty() && !full.contains('.') => {
                format!("`{full}` belongs above the first section")
            }
            Some(full) => format!("did you mean `{full}`?"),
            None => {
                let names: Vec<_> = here.unwrap_or_default().iter().map(|s| s.name).collect();
                format!("there are: {}", names.join(", "))
            }
        }),
    }
}

fn nearest<'n>(name: &str, candidates: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

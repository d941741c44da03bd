//! `adapter_config.json`: one configuration a method, named as in PEFT.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

pub(crate) mod fields;
pub(crate) mod targets;
mod trained;

use serde_json::{Map, Value, json};

use crate::error::{AdapterError, Result};

pub use fields::Pattern;
pub use targets::Targets;
pub use trained::{Bias, TokenIndices};

/// What a configuration is about to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// New parameters.
    Initialise,
    /// Parameters from a file.
    Load,
}

/// What an adapter directory says about its origin.
#[derive(Clone, Debug, Default)]
pub struct SaveMeta {
    /// The base model's name or directory.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// What is to be written into the adapter's file.
    pub made: Made,
    /// `CAUSAL_LM` for a language model.
    pub task_type: Option<String>,
    /// Markdown to put at the end of the model card.
    pub extra_readme: Option<String>,
}

/// What the weights' metadata say of an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// What identifies the weights of the base that it was trained on, where that is known.
    pub base: Option<String>,
    /// The names of a classifier's classes, in the order of their numbers.
    pub labels: Vec<String>,
}

/// The version whose key set a new file is written in. Later ones fill in what is missing, so that
/// every PEFT from here on reads it without a warning about unknown keys.
const PEFT_VERSION: &str = "0.18.1";

/// PEFT's task types; a file that names another one would not load there.
const TASKS: [&str; 6] = [
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "SEQ_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
];

/// Bookkeeping that every configuration of PEFT's has.
pub(crate) const KNOWN_TO_ALL: [&str; 6] = [
    "auto_mapping",
    "lora_ga_config",
    "inference_mode",
    "peft_type",
    "peft_version",
    "runtime_config",
];

/// What every file holds besides its method's keys.
pub(crate) fn written_by_all() -> Map<String, Value> {
    let all = [
        ("auto_mapping", Value::Null),
        ("inference_mode", json!(true)),
        ("peft_version", json!(PEFT_VERSION)),
    ];
    all.into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

pub(crate) fn task_problem(task: Option<&str>) -> Option<String> {
    let task = task.filter(|task| !TASKS.contains(task))?;
    Some(format!(
        "task_type = {task:?}: PEFT knows {}",
        TASKS.join(", ")
    ))
}

/// The object behind a configuration file, if it is one of the wanted type.
pub(crate) fn object_of(
    value: &Value,
    origin: &str,
    wanted: Option<&str>,
) -> Result<Map<String, Value>> {
    let fail = |problem: String| {
        Err(AdapterError::Config {
            origin: origin.to_string(),
            problems: vec![problem],
        })
    };
    let Some(object) = value.as_object() else {
        return fail("not a JSON object".into());
    };
    match (object.get("peft_type"), wanted) {
        (None, _) => fail("peft_type is missing: not an adapter configuration".into()),
        (Some(kind), Some(wanted)) if kind.as_str() != Some(wanted) => {
            fail(format!("peft_type is {kind}, not {wanted:?}"))
        }
        _ => Ok(object.clone()),
    }
}

/// `key = value: must be ...` unless the probability is one.
pub(crate) fn probability(key: &str, value: f64) -> Option<String> {
    (!(0.0..1.0).contains(&value))
        .then(|| format!("{key} = {value}: must be at least 0 and below 1"))
}

/// Ranks of zero, alphas that are no numbers.
pub(crate) fn rank_problems(
    r: usize,
    rank_pattern: &[(String, usize)],
    alpha: (&str, f64),
    alpha_pattern: &[(String, f64)],
) -> Vec<String> {
    let ranks = rank_pattern
        .iter()
        .map(|(key, r)| (format!("rank_pattern.{key:?}"), *r));
    let mut problems: Vec<String> = [("r".to_string(), r)]
        .into_iter()
        .chain(ranks)
        .filter(|(_, r)| *r == 0)
        .map(|(key, _)| format!("{key} = 0: the rank must be at least 1"))
        .collect();
    let alphas = alpha_pattern
        .iter()
        .map(|(key, a)| (format!("alpha_pattern.{key:?}"), *a));
    problems.extend(
        alphas
            .chain([(alpha.0.to_string(), alpha.1)])
            .filter(|(_, alpha)| !alpha.is_finite())
            .map(|(key, alpha)| format!("{key} = {alpha}: must be a finite number")),
    );
    problems
}

/// Layer options that go with a list of names only.
pub(crate) fn layer_problems(
    target_modules: Option<&Targets>,
    layers_to_transform: Option<&[usize]>,
    layers_pattern: Option<&[String]>,
) -> Vec<String> {
    let by_list = matches!(target_modules, None | Some(Targets::List(_)));
    let mut problems = Vec::new();
    if !by_list && layers_to_transform.is_some() {
        problems.push("layers_to_transform needs target_modules as a list of names".into());
    }
    if !by_list && layers_pattern.is_some() {
        problems.push("layers_pattern needs target_modules as a list of names".into());
    }
    if layers_pattern.is_some_and(|p| !p.is_empty()) && layers_to_transform.is_none() {
        problems.push("layers_pattern needs layers_to_transform".into());
    }
    problems
}

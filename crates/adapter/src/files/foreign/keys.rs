//! Keys of an adapter's file, as PEFT would have written them.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::module_shape::ModuleShape;
use crate::error::shown;
use crate::files::infer_modules::split;
use crate::methods::AdapterConfig;
use crate::plan::PREFIX;

/// Whether the adapter's name may stand behind a part of a key, as in a plain `state_dict()`: a parameter of a
/// method's, rows of an embedding, a trained copy, or what all modules share and what lies at the top.
fn takes_name(part: &str) -> bool {
    let of_modules = AdapterConfig::all_keys().any(|key| key.split('.').next() == Some(part));
    let shared = AdapterConfig::all_shared_keys();
    of_modules
        || ["trainable_tokens_delta", "modules_to_save"].contains(&part)
        || shared
            .map(|key| key.rsplit('.').next())
            .any(|last| last == Some(part))
}

/// What compiling, sharding and checkpointing wrap modules in.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// One key: what it is in PEFT's files, the adapter's name in it, and what else was taken off or put on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Canonical {
    key: String,
    name: Option<String>,
    changes: BTreeSet<&'static str>,
}

/// Tensors by their new keys, and a note on each kind of change.
pub(crate) type Renamed<T> = (BTreeMap<String, T>, Vec<String>);

/// Keys in PEFT's form, in place of those in the file, with a note on each kind of change.
///
/// # Errors
/// Several adapters in one file; two keys that mean the same tensor. One line each.
pub(crate) fn canonical<T>(stored: BTreeMap<String, T>) -> Result<Renamed<T>, Vec<String>> {
    let (mut names, mut changes) = (BTreeSet::new(), BTreeSet::new());
    let mut all: BTreeMap<String, (String, T)> = BTreeMap::new();
    let mut problems = Vec::new();
    for (own, value) in stored {
        let found = one(&own);
        names.extend(found.name);
        changes.extend(found.changes);
        if let Some((other, _)) = all.get(&found.key) {
            problems.push(format!(
                "{} and {} are one tensor under two keys",
                shown(other),
                shown(&own)
            ));
            continue;
        }
        all.insert(found.key, (own, value));
    }
    if names.len() > 1 {
        let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
        return Err(vec![format!(
            "the file holds several adapters ({}), whose names are in its keys; write the one that is meant with \
             PEFT's save_pretrained(directory, selected_adapters=[name])",
            names.join(", ")
        )]);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut notes: Vec<String> = names
        .iter()
        .map(|name| format!("its keys hold the adapter's name ({name:?}); read as if they did not"))
        .collect();
    if !changes.is_empty() {
        let changes: Vec<&str> = changes.into_iter().collect();
        notes.push(format!(
            "its keys are not as PEFT writes them ({}); read as if they were",
            changes.join(", ")
        ));
    }
    let all = all.into_iter().map(|(key, (_, value))| (key, value));
    Ok((all.collect(), notes))
}

/// Where a key in PEFT's form belongs in a model of these modules, if its module is not there but is with or
/// without the `model.` that `AutoModel` and `AutoModelForCausalLM` differ by.
pub(crate) fn moved(key: &str, modules: &[ModuleShape]) -> Option<String> {
    let (module, own) = split(key)?;
    let is_there = |name: &str| modules.iter().any(|module| module.name == name);
    if is_there(module) {
        return None;
    }
    let longer = format!("model.{module}");
    let shorter = module.strip_prefix("model.");
    let mut found = [Some(longer.as_str()), shorter]
        .into_iter()
        .flatten()
        .filter(|name| is_there(name));
    let (found, other) = (found.next()?, found.next());
    other.is_none().then(|| format!("{PREFIX}{found}.{own}"))
}

fn one(own: &str) -> Canonical {
    let mut found = Canonical::default();
    let mut parts: Vec<&str> = Vec::new();
    for part in own.split('.') {
        match WRAPPERS.iter().find(|wrapper| **wrapper == part) {
            Some(wrapper) => drop(found.changes.insert(*wrapper)),
            None => parts.push(part),
        }
    }
    // Data parallel training puts one before everything; further in it could be a module's own name.
    while parts.len() > 1 && parts.first() == Some(&"module") {
        parts.remove(0);
        found.changes.insert("module.");
    }
    while parts.starts_with(&["base_model", "model", "base_model", "model"]) {
        parts.drain(..2);
        found.changes.insert("base_model.model. twice");
    }
    found.name = take_name(&mut parts);
    let outer = parts.first() == Some(&"base_model");
    if !outer && parts.len() > 1 {
        found.changes.insert("no base_model.model.");
        found.key = format!("{PREFIX}{}", parts.join("."));
    } else {
        found.key = parts.join(".");
    }
    found
}

/// Takes the adapter's name out of a key's parts, if it is there.
fn take_name(parts: &mut Vec<&str>) -> Option<String> {
    let place = parts.iter().rposition(|part| takes_name(part))?;
    let parameter = *parts.get(place)?;
    let next = place.saturating_add(1);
    let after = parts.len().saturating_sub(next);
    let last = parts.last().copied();
    if parameter == "modules_to_save" {
        // `….modules_to_save.default.weight` is `….weight` in PEFT's files.
        if after < 2 {
            return None;
        }
        let name = parts.remove(next).to_owned();
        parts.remove(place);
        return Some(name);
    }
    let with_end = last.map(|last| format!("{parameter}.{last}"));
    let is = |key: &str| with_end.as_deref() == Some(key);
    if AdapterConfig::all_longer_keys().any(is) {
        parts.pop();
        return (after > 1).then(|| parts.remove(next).to_owned());
    }
    let has_end = AdapterConfig::all_keys().any(is) && after > 0;
    let named = if has_end { after == 2 } else { after == 1 };
    named.then(|| parts.remove(next).to_owned())
}

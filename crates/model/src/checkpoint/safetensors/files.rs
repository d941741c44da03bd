//! Which files of a directory hold the model: one, those of an index, or shards that count themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::{CheckpointError, TensorInfo, json};
use super::header::UniqueMap;
use super::names::{is_buffer, some};
use super::{INDEX_FILE, SINGLE_FILE, SafetensorsSet};
use crate::error::Problems;

const ENDING: &str = ".safetensors";

/// Opens `model.safetensors`, or else all shards of the index, or else a whole set of numbered shards.
pub(super) fn open(
    dir: &Path,
    packed: bool,
) -> Result<(SafetensorsSet, Vec<TensorInfo>), CheckpointError> {
    // A link to nowhere is there, and opening it says so.
    let there = |path: &Path| path.symlink_metadata().is_ok();
    let single = dir.join(SINGLE_FILE);
    let numbered = numbered(dir);
    if there(&single) {
        let (mut set, infos) = SafetensorsSet::open_files(vec![single], packed)?;
        if !numbered.is_empty() {
            set.notes.push(format!(
                "{SINGLE_FILE} is read; shards beside it are not: {}",
                some(&numbered)
            ));
        }
        return Ok((set, infos));
    }
    let index = dir.join(INDEX_FILE);
    if there(&index) {
        return open_index(dir, &index, &numbered, packed);
    }
    if !numbered.is_empty() {
        return open_numbered(dir, &numbered, packed);
    }
    Err(CheckpointError::NotACheckpoint {
        path: dir.to_owned(),
        reason: missing_weights(dir),
    })
}

/// Names like `model-00001-of-00003.safetensors`, in order.
fn numbered(dir: &Path) -> Vec<String> {
    let names = names(dir).into_iter();
    let mut names: Vec<String> = names.filter(|name| place(name).is_some()).collect();
    names.sort_unstable();
    names
}

/// The number of such a name and how many there are.
fn place(name: &str) -> Option<(usize, usize)> {
    let middle = name.strip_prefix("model-")?.strip_suffix(ENDING)?;
    let (number, all) = middle.split_once("-of-")?;
    Some((number.parse().ok()?, all.parse().ok()?))
}

/// The names of a directory's entries, without hidden ones.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// Shards without an index, if they are all there.
fn open_numbered(
    dir: &Path,
    numbered: &[String],
    packed: bool,
) -> Result<(SafetensorsSet, Vec<TensorInfo>), CheckpointError> {
    let places: Vec<_> = numbered.iter().filter_map(|name| place(name)).collect();
    let all = places.first().map_or(0, |(_, all)| *all);
    let whole = places.iter().all(|(_, other)| *other == all)
        && places.iter().map(|(number, _)| *number).eq(1..=all);
    if !whole {
        return Err(CheckpointError::NotACheckpoint {
            path: dir.to_owned(),
            reason: format!(
                "it has neither {SINGLE_FILE} nor {INDEX_FILE}, and its shards are not a whole set ({}); fetch \
                 the others too",
                some(numbered)
            ),
        });
    }
    let paths = numbered.iter().map(|name| dir.join(name)).collect();
    let (mut set, infos) = SafetensorsSet::open_files(paths, packed)?;
    set.notes.push(format!(
        "there is no {INDEX_FILE}; its {all} shards are all there and are read without it"
    ));
    Ok((set, infos))
}

/// What an index says, checked: the shard of each tensor.
struct Index {
    wanted: BTreeMap<String, String>,
    shards: BTreeMap<String, PathBuf>,
}

impl Index {
    fn read(dir: &Path, path: &Path) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Raw {
            weight_map: UniqueMap<String>,
        }
        let text = std::fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
        let Raw { weight_map } = json::parse(&text).map_err(|problem| {
            CheckpointError::malformed(path, format!("not a shard index: {problem}"))
        })?;
        let mut problems = Problems::default();
        for name in weight_map.duplicates {
            problems.push(format!("tensor '{name}' is listed twice"));
        }
        let mut index = Self {
            wanted: BTreeMap::new(),
            shards: BTreeMap::new(),
        };
        for (name, shard) in weight_map.entries {
            // A shard is a plain name beside the index: an index must not reach other files.
            if shard.contains(['/', '\\']) || shard == ".." || !shard.ends_with(ENDING) {
                problems.push(format!(
                    "tensor '{name}' is in '{shard}', which is not a plain .safetensors file name"
                ));
                continue;
            }
            if !index.shards.contains_key(&shard) {
                let path = dir.join(&shard);
                if !path.is_file() {
                    problems.push(format!("shard '{shard}' is missing"));
                }
                index.shards.insert(shard.clone(), path);
            }
            index.wanted.insert(name, shard);
        }
        if index.wanted.is_empty() && problems.0.is_empty() {
            problems.push("the index lists no tensors");
        }
        problems.into_malformed(path)?;
        Ok(index)
    }
}

/// Opens the shards that the index names. As in transformers, what lies in them counts, wherever the index says
/// that it lies.
fn open_index(
    dir: &Path,
    path: &Path,
    numbered: &[String],
    packed: bool,
) -> Result<(SafetensorsSet, Vec<TensorInfo>), CheckpointError> {
    let Index { mut wanted, shards } = Index::read(dir, path)?;
    let names: Vec<String> = shards.keys().cloned().collect();
    let (mut set, infos) = SafetensorsSet::open_files(shards.into_values().collect(), packed)?;
    let (mut elsewhere, mut unlisted) = (Vec::new(), Vec::new());
    for (info, place) in infos.iter().zip(&set.places) {
        let found = names.get(place.file).map_or("", String::as_str);
        match wanted.remove(&info.name) {
            Some(listed) if listed == found => {}
            Some(listed) => elsewhere.push(format!("{} in {found}, not {listed}", info.name)),
            None => unlisted.push(format!("{} in {found}", info.name)),
        }
    }
    let left_out = |name: &String| set.ignored.contains(name) || is_buffer(name);
    let mut problems = Problems::default();
    for (name, shard) in wanted.iter().filter(|(name, _)| !left_out(name)) {
        problems.push(format!(
            "tensor '{name}' is listed under {shard} but is not there"
        ));
    }
    problems.into_malformed(path)?;
    let beside: Vec<String> = numbered
        .iter()
        .filter(|name| !names.contains(name))
        .cloned()
        .collect();
    for (list, what) in [
        (
            elsewhere,
            "tensors lie elsewhere than it says, and are read from there",
        ),
        (unlisted, "tensors that it does not list are read"),
        (beside, "shards that it does not name are not read"),
    ] {
        if !list.is_empty() {
            set.notes.push(format!(
                "{INDEX_FILE}: {} {what}: {}",
                list.len(),
                some(&list)
            ));
        }
    }
    Ok((set, infos))
}

/// Says what else lies in a directory without safetensors, since that decides the next step.
fn missing_weights(dir: &Path) -> String {
    let names = names(dir);
    if let Some(file) = names.iter().find(|name| name.ends_with(".gguf")) {
        return format!(
            "it has no {SINGLE_FILE}; to use its GGUF file, name the file itself: {}",
            dir.join(file).display()
        );
    }
    let mut others: Vec<String> = names
        .iter()
        .filter(|name| name.ends_with(ENDING))
        .cloned()
        .collect();
    others.sort_unstable();
    if !others.is_empty() {
        return format!(
            "neither {SINGLE_FILE} nor {INDEX_FILE} is in it, but {}; if that is the whole model, rename it to \
             {SINGLE_FILE}",
            some(&others)
        );
    }
    if names
        .iter()
        .any(|name| name.starts_with("pytorch_model") && name.ends_with(".bin"))
    {
        return format!(
            "it has only pickled weights (pytorch_model*.bin), which are never unpickled here; \
             save the model with transformers' save_pretrained to get {SINGLE_FILE}"
        );
    }
    format!("neither {SINGLE_FILE} nor {INDEX_FILE} is in it")
}

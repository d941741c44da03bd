//! What is to be known of an adapter before it is used on a base: how its files are written, settings without
//! effect, and whether the base is the one that it was made for.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use enamel_adapter::{AdapterConfig, Made, MethodConfig, Tie, takes_head};
use enamel_model::digest::hex;
use sha2::{Digest, Sha256};

use crate::base::OpenBase;
use crate::shown;

/// Places of a file that are looked at.
const SAMPLES: u64 = 256;
/// Bytes at each place.
const SAMPLE: u64 = 4096;

/// What identifies the weights in these files: a hash of each weight file's length and of samples all over it.
/// Fine-tuning changes nearly every weight and merging whole matrices, so samples will do; a hash of all would
/// cost as much as loading. The same weights in another form (GGUF, quantised, other shards) are others here.
/// Nothing where a file cannot be read.
pub fn identity(files: &[PathBuf]) -> Option<String> {
    let weights = |path: &&PathBuf| {
        let kind = path.extension().and_then(|kind| kind.to_str());
        kind.is_some_and(|kind| {
            ["safetensors", "gguf"].contains(&kind.to_ascii_lowercase().as_str())
        })
    };
    let mut hash = Sha256::new();
    let mut weights = files.iter().filter(weights).peekable();
    weights.peek()?;
    for path in weights {
        sample(path, &mut hash).ok()?;
    }
    Some(format!("sampled-sha256:{}", hex(&hash.finalize())))
}

fn sample(path: &Path, hash: &mut Sha256) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.update(length.to_le_bytes());
    let step = length.div_ceil(SAMPLES).max(SAMPLE);
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < length {
        bytes.clear();
        file.seek(SeekFrom::Start(at))?;
        file.by_ref().take(SAMPLE).read_to_end(&mut bytes)?;
        hash.update(&bytes);
        at = at.saturating_add(step);
    }
    Ok(())
}

/// All that is to be said of an adapter before it is used, on `base` if one is there.
pub fn notes(adapter: &Path, base: Option<&OpenBase>) -> Vec<String> {
    let modules = base.map(|base| base.config.modules());
    let mut notes = enamel_adapter::notes(adapter, modules.as_deref());
    notes.extend(base.and_then(|base| other_base(adapter, base)));
    notes.extend(base.and_then(|base| of_head(adapter, base)));
    notes
}

/// The same for several adapters, each note with its directory before it where there are more than one.
pub fn notes_of_all(adapters: &[PathBuf], base: Option<&OpenBase>) -> Vec<String> {
    let all = adapters.iter().flat_map(|adapter| {
        let notes = notes(adapter, base).into_iter();
        notes.map(move |note| match adapters {
            [_] => note,
            _ => format!("{}: {note}", adapter.display()),
        })
    });
    all.collect()
}

/// What becomes of a head that shares the embedding's weights.
fn of_head(adapter: &Path, base: &OpenBase) -> Option<String> {
    let config = enamel_adapter::load_config(adapter).ok()?;
    head_note(&config, base)
}

/// What becomes of a head that shares the embedding's weights with an adapter of this configuration.
pub(crate) fn head_note(config: &AdapterConfig, base: &OpenBase) -> Option<String> {
    if base.tied.is_some() && takes_head(config, &base.config.modules()) {
        let note = "it is on lm_head, which shares the embedding's weights in this base; lm_head has a matrix of its \
                    own with it (ensure_weight_tying would have it follow the embedding)";
        return Some(note.to_owned());
    }
    let asks = config.selection().tie != Tie::No;
    let tied = base.config.ties_head();
    (asks && !tied).then(|| {
        "ensure_weight_tying has no effect: the head of this base does not share the embedding's weights".to_owned()
    })
}

/// What speaks for the adapter having been made for another base.
fn other_base(adapter: &Path, base: &OpenBase) -> Option<String> {
    let config = enamel_adapter::load_config(adapter).ok()?;
    let named = config.base_model_name_or_path();
    let here = &base.local.reference;
    if let Some(trained_on) = enamel_adapter::base_identity(adapter) {
        let same = base.identity().is_none_or(|own| own == trained_on);
        let named = named.map_or(String::new(), |name| format!(" ({})", shown(name)));
        return (!same).then(|| {
            format!(
                "the adapter was trained on other weights{named} than these ({}): another model, or the same in \
                 another form",
                shown(here)
            )
        });
    }
    // Paths say nothing: the same model may lie anywhere.
    let (named, own) = (named?, base.name_for_peft()?);
    let other = on_the_hub(named) && on_the_hub(&own) && !named.eq_ignore_ascii_case(&own);
    other.then(|| {
        format!(
            "the adapter says that it was made for {}, and this is {}",
            shown(named),
            shown(&own)
        )
    })
}

/// `organisation/name`, and no path.
fn on_the_hub(name: &str) -> bool {
    let mut parts = name.split('/');
    let both = parts
        .by_ref()
        .take(2)
        .filter(|part| !part.is_empty() && !part.starts_with('.'))
        .count();
    both == 2 && parts.next().is_none() && !Path::new(name).exists()
}

/// What all these adapters say alike: the base that they were trained on, and the classes.
pub(crate) fn common(adapters: &[PathBuf]) -> Made {
    let all = adapters.iter().map(|dir| enamel_adapter::made(dir));
    let both = |a: Made, b: Made| Made {
        base: a.base.filter(|base| Some(base) == b.base.as_ref()),
        labels: match a.labels == b.labels {
            true => a.labels,
            false => Vec::new(),
        },
    };
    all.reduce(both).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_of_the_weights_wherever_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let of = |path: &PathBuf| identity(std::slice::from_ref(path));
        let own = of(&write("model.safetensors", &bytes));
        assert!(own.is_some());
        assert_eq!(of(&write("other.safetensors", &bytes)), own);
        // A matrix of 64 KiB that was changed, and a file that is longer.
        let mut changed = bytes.clone();
        changed[1_000_000..1_065_536].fill(255);
        assert_ne!(of(&write("a.safetensors", &changed)), own);
        assert_ne!(of(&write("b.safetensors", &bytes[1..])), own);
        assert_eq!(of(&write("config.json", &bytes)), None);
        assert_eq!(of(&dir.path().join("absent.gguf")), None);
    }

    #[test]
    fn only_names_of_the_hub_are_compared() {
        assert!(on_the_hub("org/name"));
        for path in ["name", "./name", "../a", "/a/b", "a/b/c", "org/", "/name"] {
            assert!(!on_the_hub(path), "{path}");
        }
    }
}

//! The head's tensors in the file of an adapter that has the head follow the embedding
//! (`ensure_weight_tying`): PEFT writes the embedding's a second time, as the head has them.

use std::collections::BTreeMap;

use crate::error::shown;
use crate::files::store::Stored;
use crate::methods::{AdapterConfig, MethodConfig};
use crate::model::trainable::HostTensor;
use crate::plan::PREFIX;
use crate::plan::target::Tie;

/// Every key of the head's, up to the parameter's own name.
const HEAD: &str = "base_model.model.lm_head.";
/// A parameter of the head, that of the embedding, and whether one is the other's transpose: a linear layer's
/// factors are an embedding's the other way round.
const PAIRS: [(&str, &str, bool); 3] = [
    ("lora_A.weight", "embed_tokens.lora_embedding_B", true),
    ("lora_B.weight", "embed_tokens.lora_embedding_A", true),
    ("weight", "embed_tokens.weight", false),
];

/// The key of the embedding's parameter that ends so.
fn of_table<'a>(mut keys: impl Iterator<Item = &'a String>, end: &str) -> Option<&'a String> {
    keys.find(|key| {
        let module = key
            .strip_prefix(PREFIX)
            .and_then(|key| key.strip_suffix(end));
        module.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}

/// Takes the head's tensors out of the file of an adapter whose head follows the embedding.
///
/// # Errors
/// Tensors that are not what the embedding has, one line each: which of the two PEFT would use depends on their
/// order in the file. Then nothing is taken out.
pub(crate) fn take_head(stored: &mut BTreeMap<String, Stored>) -> Result<(), Vec<String>> {
    let (mut problems, mut copies) = (Vec::new(), Vec::new());
    for (own, of, transposed) in PAIRS {
        let head = format!("{HEAD}{own}");
        let (Some(copy), Some(table)) = (stored.get(&head), of_table(stored.keys(), of)) else {
            continue;
        };
        let same = stored.get(table).is_some_and(|table| match transposed {
            true => copy.is_transpose_of(table),
            false => (&copy.shape, &copy.values) == (&table.shape, &table.values),
        });
        match same {
            true => copies.push(head),
            false => problems.push(format!(
                "{} is not what {} is, though ensure_weight_tying says that the head follows the embedding",
                shown(&head),
                shown(table)
            )),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    for copy in copies {
        stored.remove(&copy);
    }
    Ok(())
}

/// The same for a file whose model is not known: it may as well be an adapter of a model with a head of its own,
/// where `ensure_weight_tying` means nothing.
pub(crate) fn take_head_if_tied(config: &AdapterConfig, stored: &mut BTreeMap<String, Stored>) {
    if config.selection().tie != Tie::No {
        let _ = take_head(stored);
    }
}

/// The head's tensors, without which PEFT does not load the file.
pub(super) fn head(tensors: &[HostTensor]) -> Vec<HostTensor> {
    let made = PAIRS.into_iter().filter_map(|(own, of, transposed)| {
        let table = of_table(tensors.iter().map(|(key, ..)| key), of)?;
        let (_, shape, values) = tensors.iter().find(|(key, ..)| key == table)?;
        let head = format!("{HEAD}{own}");
        match (transposed, shape.as_slice()) {
            (true, [rows, cols]) => {
                let column = |c| values.iter().skip(c).step_by((*cols).max(1)).copied();
                let values = (0..*cols).flat_map(column).collect();
                Some((head, vec![*cols, *rows], values))
            }
            _ => Some((head, shape.clone(), values.clone())),
        }
    });
    made.collect()
}

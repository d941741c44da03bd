//! Names of tensors: those that training tools leave behind, and those of no weight at all.

use std::collections::HashMap;

use super::super::TensorInfo;
use crate::arch::ArchConfig;
use crate::error::Problems;

/// Parts that wrappers put into names: `torch.compile`, FSDP, activation checkpointing.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];
/// The part that data-parallel wrappers put in front.
const PARALLEL: &str = "module";
/// Names shown of many.
const SHOWN: usize = 3;

/// Gives tensors the names that transformers' models have. What was changed is told.
///
/// # Errors
/// Two tensors of one name.
pub(super) fn usual(infos: &mut [TensorInfo]) -> Result<Vec<String>, Problems> {
    let mut notes = Vec::new();
    let unwrapped = infos.iter().map(|info| unwrap(&info.name)).collect();
    rename(
        infos,
        unwrapped,
        "are read without what a training tool put into their names",
        &mut notes,
    )?;
    let first = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    // A model that was saved without its head, which alone may be beside it.
    for (prefix, inner) in ArchConfig::inner_names() {
        let begins = |name: &str| first(name) == prefix;
        let bare = !infos.iter().any(|info| begins(&info.name));
        let is_inner = |name: &str| inner.contains(&first(name).as_str());
        if !bare || !infos.iter().any(|info| is_inner(&info.name)) {
            continue;
        }
        let prefixed = infos.iter().map(|info| match is_inner(&info.name) {
            true => format!("{prefix}.{}", info.name),
            false => info.name.clone(),
        });
        let prefixed = prefixed.collect();
        rename(
            infos,
            prefixed,
            &format!("lack the first part of their names, `{prefix}.`, and are read with it"),
            &mut notes,
        )?;
    }
    Ok(notes)
}

fn rename(
    infos: &mut [TensorInfo],
    names: Vec<String>,
    what: &str,
    notes: &mut Vec<String>,
) -> Result<(), Problems> {
    let mut first: HashMap<&str, &str> = HashMap::new();
    let mut problems = Problems::default();
    for (info, name) in infos.iter().zip(&names) {
        if let Some(other) = first.insert(name, &info.name) {
            problems.push(format!(
                "tensors '{other}' and '{}' both stand for '{name}'",
                info.name
            ));
        }
    }
    if !problems.0.is_empty() {
        return Err(problems);
    }
    let mut changed = Vec::new();
    for (info, name) in infos.iter_mut().zip(names) {
        if info.name != name {
            changed.push(format!("{} as {name}", info.name));
            info.name = name;
        }
    }
    if !changed.is_empty() {
        notes.push(format!(
            "{} tensors {what}: {}",
            changed.len(),
            some(&changed)
        ));
    }
    Ok(())
}

fn unwrap(name: &str) -> String {
    let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
    let parts: Vec<&str> = parts.skip_while(|part| *part == PARALLEL).collect();
    parts.join(".")
}

/// What is said of tensors that are left out.
pub(super) fn left_out(names: &[String]) -> Option<String> {
    (!names.is_empty()).then(|| {
        format!(
            "{} tensors are left out, being no weights (masks, positions, frequencies, which follow from the \
             configuration): {}",
            names.len(),
            some(names)
        )
    })
}

/// The first few of a list.
pub(super) fn some(list: &[String]) -> String {
    let mut shown: Vec<&str> = list.iter().take(SHOWN).map(String::as_str).collect();
    let more = list.len().saturating_sub(SHOWN);
    let rest = format!("{more} more");
    if more > 0 {
        shown.push(&rest);
    }
    shown.join(", ")
}

/// Buffers that follow from the configuration and that old checkpoints hold.
pub(crate) fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let mask = ["self_attn.bias", "attn.bias", "attention.bias"];
    let known = [
        "inv_freq",
        "original_inv_freq",
        "cos_cached",
        "sin_cached",
        "position_ids",
        "masked_bias",
        "causal_mask",
        "num_batches_tracked",
    ];
    known.contains(&last)
        || mask.iter().any(|end| {
            name.strip_suffix(end)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
}

/// Whether a name is one that quantised weights or what belongs to them have: whole numbers mean something there.
pub(super) fn is_weight(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    last.starts_with("weight")
        || last.starts_with('q')
        || last == "g_idx"
        || name.contains(".weight.")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::super::SourceDtype;
    use super::*;

    fn named(names: &[&str]) -> Result<(Vec<String>, Vec<String>), Problems> {
        let infos = names.iter().map(|name| TensorInfo {
            name: (*name).to_owned(),
            shape: Vec::new(),
            dtype: SourceDtype::F32,
        });
        let mut infos: Vec<_> = infos.collect();
        let notes = usual(&mut infos)?;
        Ok((infos.into_iter().map(|info| info.name).collect(), notes))
    }

    #[test]
    fn wrappers_leave_no_trace_and_the_prefix_is_put_back() {
        let usual = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"];
        assert_eq!(
            named(&usual).unwrap(),
            (usual.map(str::to_owned).to_vec(), Vec::new())
        );
        for names in [
            [
                "_orig_mod.model.layers.0.mlp.up_proj.weight",
                "_orig_mod.lm_head.weight",
            ],
            [
                "module._orig_mod.model.layers.0.mlp.up_proj.weight",
                "module._orig_mod.lm_head.weight",
            ],
            [
                "module.layers.0.mlp.up_proj.weight",
                "module.lm_head.weight",
            ],
            ["layers.0._orig_mod.mlp.up_proj.weight", "lm_head.weight"],
            [
                "model._fsdp_wrapped_module.layers.0.mlp.up_proj.weight",
                "lm_head.weight",
            ],
        ] {
            let (found, notes) = named(&names).unwrap();
            assert_eq!(found, usual, "{names:?}");
            assert!(notes[0].contains(names[0]), "{notes:?}");
        }
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let problems = named(&["_orig_mod.model.norm.weight", "model.norm.weight"]).unwrap_err();
        assert!(
            problems
                .to_string()
                .contains("'_orig_mod.model.norm.weight' and 'model.norm.weight'")
        );
    }

    #[test]
    fn a_bias_of_attention_is_a_mask_and_one_of_a_projection_is_not() {
        assert!(is_buffer("model.layers.0.self_attn.bias"));
        assert!(is_buffer("position_ids"));
        assert!(!is_buffer("model.layers.0.self_attn.q_proj.bias"));
        assert!(!is_buffer("model.layers.0.xattn.bias"));
    }
}

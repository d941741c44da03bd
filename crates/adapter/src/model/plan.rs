//! Matches a configuration against the modules of a model.

use crate::base::module_shape::elements;
use crate::plan::AdapterPlan;
use crate::plan::BiasPlan;
use crate::plan::PREFIX;
use crate::plan::SavedPlan;
use crate::plan::TargetPlan;
use crate::plan::TokensPlan;
use std::collections::BTreeSet;

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::config::{Purpose, Targets};
use crate::error::{AdapterError, Result};
use crate::methods::MethodConfig;
use crate::plan::target::{Matcher, Role, Selection, Tie, nearest};
use crate::plan::trains_bias;

/// Matches a configuration against a model's modules, without the model. Every option that is wrong
/// and every entry that matches nothing is reported, all at once, with the nearest names.
pub fn plan<C: MethodConfig>(modules: &[ModuleShape], cfg: &C) -> Result<AdapterPlan> {
    let problems = cfg.problems(Purpose::Initialise);
    if !problems.is_empty() {
        return Err(AdapterError::Config {
            origin: "adapter configuration".into(),
            problems,
        });
    }
    build(modules, cfg, Purpose::Initialise)
}

/// The plan of an adapter that is read from a file. PEFT's own files may name modules that the model
/// does not have (`["classifier", "score"]`) and initialisations that are not here; the file's tensors
/// decide instead.
pub fn plan_for_load<C: MethodConfig>(modules: &[ModuleShape], cfg: &C) -> Result<AdapterPlan> {
    let problems = cfg.problems(Purpose::Load);
    if !problems.is_empty() {
        return Err(AdapterError::Config {
            origin: "adapter configuration".into(),
            problems,
        });
    }
    build(modules, cfg, Purpose::Load)
}

/// Whether an adapter takes hold of the head of a model with these modules: of a low-rank update beside it or
/// of a copy of its own. On a model whose head shares the embedding's weights it does so only where that model
/// gives the head a matrix of its own, as PEFT does.
pub fn takes_head<C: MethodConfig>(cfg: &C, modules: &[ModuleShape]) -> bool {
    let selection = cfg.selection();
    if cfg.trains_everything() || cfg.is_of_model() || selection.tie != Tie::No {
        return false;
    }
    let Ok(mut matcher) = Matcher::new(&selection) else {
        return false;
    };
    let mut heads = modules
        .iter()
        .filter(|module| module.kind == ModuleKind::Head);
    heads.any(|head| matches!(matcher.role(head), Ok(Role::Target | Role::Saved)))
}

fn build<C: MethodConfig>(
    modules: &[ModuleShape],
    cfg: &C,
    purpose: Purpose,
) -> Result<AdapterPlan> {
    if let Some(plan) = cfg.plan_of_model(modules) {
        return plan;
    }
    let selection = cfg.selection();
    let mut matcher =
        Matcher::new(&selection).map_err(|problems| AdapterError::Plan { problems })?;
    let mut problems = Vec::new();
    let shares = !modules.iter().any(|module| module.kind == ModuleKind::Head);
    let may_tie = shares && selection.tie != Tie::No;
    if may_tie {
        matcher.tie();
    }
    let mut tied = false;
    let (mut targets, mut saved) = (Vec::new(), Vec::new());
    let (mut biases, mut tokens) = (Vec::new(), Vec::new());
    for module in modules {
        let role = match matcher.role(module) {
            Ok(role) => role,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        if may_tie && module.kind == ModuleKind::Embedding && role != Role::Neither {
            tied = true;
            if let (Role::Target, Tie::Not(option)) = (&role, selection.tie) {
                problems.push(format!(
                    "ensure_weight_tying: {} is the head as well, and {option} means another thing there; leave \
                     one of them out, or {} out of target_modules",
                    module.name, module.name
                ));
            }
        }
        match role {
            Role::Target => match target(module, cfg, &selection, &mut matcher, purpose) {
                Ok(plan) => targets.push(plan),
                Err(problem) => problems.push(problem),
            },
            Role::Saved if module.transposed => problems.push(format!(
                "modules_to_save: {} lies the other way round in its files (Conv1D), and no copy of such a layer is \
                 trained; make it a target instead",
                module.name
            )),
            Role::Saved if module.kind == ModuleKind::Param => problems.push(format!(
                "modules_to_save: {} is a parameter and no module; train all of the model with method = \"full\", or \
                 leave it out",
                module.name
            )),
            Role::Saved => saved.push(SavedPlan {
                name: module.name.clone(),
                shape: module.shape.clone(),
                bias: module.bias,
                params: elements(module),
            }),
            Role::Neither => {}
        }
        let is_target = role == Role::Target;
        if module.bias && role != Role::Saved && trains_bias(cfg.bias(), is_target) {
            let own = if is_target { "base_layer.bias" } else { "bias" };
            biases.push(BiasPlan {
                name: module.name.clone(),
                key: format!("{PREFIX}{}.{own}", module.name),
                len: module.shape[0],
            });
        }
        if module.kind == ModuleKind::Embedding
            && let Some(indices) = cfg.token_indices().and_then(|t| t.for_module(&module.name))
        {
            match token_rows(module, indices, &role) {
                Ok(plan) => tokens.push(plan),
                Err(problem) => problems.push(problem),
            }
        }
    }
    if cfg.token_indices().is_some() && tokens.is_empty() && problems.is_empty() {
        problems.push("trainable_token_indices: matches no embedding of the model".into());
    }
    if purpose == Purpose::Initialise {
        problems.extend(
            matcher
                .unused()
                .into_iter()
                .map(|(option, entry)| unused(option, entry, selection.target, modules)),
        );
        problems.extend(matcher.unused_layers().into_iter().map(|layer| {
            format!("layers_to_transform: layer {layer} holds none of the target modules")
        }));
    }
    let idle = targets.is_empty() && saved.is_empty() && tokens.is_empty() && biases.is_empty();
    if idle && problems.is_empty() && !cfg.trains_everything() {
        problems.push(format!(
            "nothing to adapt; its linear layers are {}",
            known(modules)
        ));
    }
    if !problems.is_empty() {
        return Err(AdapterError::Plan { problems });
    }
    let base = modules.iter().map(elements).sum::<usize>();
    if cfg.trains_everything() {
        return Ok(AdapterPlan {
            trainable: base,
            total: base,
            ..AdapterPlan::default()
        });
    }
    // Biases are the base's own, so they do not add to the total.
    let new = targets.iter().map(|t| t.params).sum::<usize>()
        + saved.iter().map(|s| s.params).sum::<usize>()
        + tokens
            .iter()
            .map(|t| t.indices.len() * t.width)
            .sum::<usize>();
    Ok(AdapterPlan {
        shared: cfg.shared(&targets),
        tied,
        trainable: new + biases.iter().map(|b| b.len).sum::<usize>(),
        total: base + new,
        targets,
        saved,
        biases,
        tokens,
    })
}

/// Checks the rows asked for.
fn token_rows(
    module: &ModuleShape,
    indices: &[usize],
    role: &Role,
) -> std::result::Result<TokensPlan, String> {
    let name = &module.name;
    let rows = module.shape[0];
    if *role != Role::Neither {
        return Err(format!(
            "trainable_token_indices: {name} is adapted or saved whole as well; choose one"
        ));
    }
    if let Some(index) = indices.iter().find(|i| **i >= rows) {
        return Err(format!(
            "trainable_token_indices: {name} has rows 0 to {}, and no row {index}",
            rows.saturating_sub(1)
        ));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = indices.iter().find(|i| !seen.insert(**i)) {
        return Err(format!("trainable_token_indices: {twice} is there twice"));
    }
    if indices.is_empty() {
        return Err(format!(
            "trainable_token_indices: no rows of {name} are named"
        ));
    }
    Ok(TokensPlan {
        name: name.clone(),
        key: format!("{PREFIX}{name}.token_adapter.trainable_tokens_delta"),
        indices: indices.to_vec(),
        width: module.shape[1],
    })
}

fn target<C: MethodConfig>(
    module: &ModuleShape,
    cfg: &C,
    selection: &Selection<'_>,
    matcher: &mut Matcher,
    purpose: Purpose,
) -> std::result::Result<TargetPlan, String> {
    let name = module.name.clone();
    let embedding = module.kind == ModuleKind::Embedding;
    let (out_features, in_features) = match (module.kind, module.shape.as_slice()) {
        (ModuleKind::Linear | ModuleKind::Head, [out, width]) => (*out, *width),
        (ModuleKind::Embedding, [rows, width]) if cfg.adapts_embeddings() => (*width, *rows),
        _ => {
            let what = match module.kind {
                ModuleKind::Embedding => "an embedding, which this method does not adapt",
                ModuleKind::Conv => {
                    return Err(format!(
                        "target_modules: {name} is a convolution, which no method adapts; leave it out, or train all \
                         of the model with method = \"full\""
                    ));
                }
                ModuleKind::Param => {
                    return Err(format!(
                        "target_modules: {name} is a parameter and no module; leave it out, or train all of the model \
                         with method = \"full\""
                    ));
                }
                _ => "not a linear layer",
            };
            return Err(format!(
                "target_modules: {name} is {what} (modules_to_save trains a full copy)"
            ));
        }
    };
    let (r, alpha) = matcher.rank_alpha(&name, selection.rank, selection.alpha)?;
    // A file's rank may exceed what a matrix can hold and still mean something; a new adapter's is a
    // mistake. Past the second bound counting would overflow before the file is even opened.
    let most = match purpose {
        Purpose::Initialise => cfg.largest_rank(out_features, in_features),
        Purpose::Load => in_features.saturating_mul(out_features).saturating_add(256),
    };
    if r > most {
        return Err(format!(
            "{name} is [{out_features}, {in_features}]: rank {r} is more than it can hold"
        ));
    }
    let mut plan = TargetPlan {
        name,
        embedding,
        r,
        alpha,
        scale: cfg.scale(r, alpha),
        in_features,
        out_features,
        params: 0,
    };
    if let Some(why) = cfg.misfit(&plan) {
        return Err(format!(
            "{} is [{out_features}, {in_features}]: {why}",
            plan.name
        ));
    }
    plan.params = cfg
        .parameters(&plan)
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    Ok(plan)
}

/// Why an entry may have matched nothing, and what to write instead.
fn unused(option: &str, entry: &str, targets: Option<&Targets>, modules: &[ModuleShape]) -> String {
    let is_end = |m: &ModuleShape| {
        m.name
            .strip_suffix(entry)
            .is_some_and(|head| head.is_empty() || head.ends_with('.'))
    };
    if modules.iter().any(is_end) {
        let why = match (option, targets) {
            ("target_modules", Some(Targets::Regex(_))) => format!(
                "matches no module's whole name, as a string must; write [{entry:?}] for modules of this name"
            ),
            ("rank_pattern" | "alpha_pattern", _) => {
                "matches no target that an earlier pattern has not matched already".into()
            }
            _ => "is excluded, saved whole or in a layer that is not asked for".into(),
        };
        return format!("{option}: {entry:?} {why}");
    }
    let inside = format!(".{entry}.");
    if modules
        .iter()
        .any(|m| format!(".{}", m.name).contains(&inside))
    {
        return format!("{option}: {entry:?} is a block, not a layer; name the layers in it");
    }
    if entry.rsplit('.').next() == Some("lm_head") {
        return format!(
            "{option}: the model has no lm_head of its own: its output weights are the embedding's (tied). Leave \
             lm_head out, or untie the model first"
        );
    }
    match nearest(entry, modules).as_slice() {
        [] => format!(
            "{option}: {entry:?} matches no module; linear layers are {}",
            known(modules)
        ),
        names => format!(
            "{option}: {entry:?} matches no module; nearest: {}",
            names.join(", ")
        ),
    }
}

/// The last parts of the linear layers' names.
fn known(modules: &[ModuleShape]) -> String {
    let linear = modules
        .iter()
        .filter(|m| matches!(m.kind, ModuleKind::Linear | ModuleKind::Head));
    let names: BTreeSet<&str> = linear.filter_map(|m| m.name.rsplit('.').next()).collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;

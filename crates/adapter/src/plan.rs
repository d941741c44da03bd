//! What an adapter would be on a model: which modules, which ranks, how many parameters.

use std::collections::BTreeSet;

use crate::config::{Purpose, Targets};
use crate::error::{AdapterError, Result};
use crate::methods::MethodConfig;
use crate::slot::{ModuleKind, ModuleShape};
use crate::target::{Matcher, Role, Selection, nearest};

/// PEFT's prefix of every name in an adapter's file.
pub(crate) const PREFIX: &str = "base_model.model.";

/// One adapted module.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetPlan {
    /// Full name.
    pub name: String,
    /// Rank.
    pub r: usize,
    /// Alpha.
    pub alpha: f64,
    /// The factor in front of the update.
    pub scale: f64,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Elements of its adapter.
    pub params: usize,
}

impl TargetPlan {
    /// The key in PEFT's file of the parameter that is called `parameter` after the module's name.
    pub fn key(&self, parameter: &str) -> String {
        format!("{PREFIX}{}.{parameter}", self.name)
    }
}

/// One module of which a full copy is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedPlan {
    /// Full name.
    pub name: String,
    /// Shape of its weight.
    pub shape: Vec<usize>,
    /// Whether it has a bias.
    pub bias: bool,
    /// Elements of the copy.
    pub params: usize,
}

/// The whole adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterPlan {
    /// The adapted modules, in the model's order.
    pub targets: Vec<TargetPlan>,
    /// The modules trained whole, in the model's order.
    pub saved: Vec<SavedPlan>,
    /// Elements that are trained.
    pub trainable: usize,
    /// Elements of the base and the adapter together. As in PEFT, a module trained whole counts
    /// twice: its base stays.
    pub total: usize,
}

impl AdapterPlan {
    /// Trained elements in percent of all.
    pub fn percent(&self) -> f64 {
        self.trainable as f64 / self.total.max(1) as f64 * 100.0
    }
}

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

fn build<C: MethodConfig>(
    modules: &[ModuleShape],
    cfg: &C,
    purpose: Purpose,
) -> Result<AdapterPlan> {
    let selection = cfg.selection();
    let mut matcher =
        Matcher::new(&selection).map_err(|problems| AdapterError::Plan { problems })?;
    let mut problems = Vec::new();
    let (mut targets, mut saved) = (Vec::new(), Vec::new());
    for module in modules {
        match matcher.role(module) {
            Ok(Role::Target) => match target(module, cfg, &selection, &mut matcher, purpose) {
                Ok(plan) => targets.push(plan),
                Err(problem) => problems.push(problem),
            },
            Ok(Role::Saved) => saved.push(SavedPlan {
                name: module.name.clone(),
                shape: module.shape.clone(),
                bias: module.bias,
                params: elements(module),
            }),
            Ok(Role::Neither) => {}
            Err(problem) => problems.push(problem),
        }
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
    if targets.is_empty() && saved.is_empty() && problems.is_empty() {
        problems.push(format!(
            "nothing to adapt; its linear layers are {}",
            known(modules)
        ));
    }
    if !problems.is_empty() {
        return Err(AdapterError::Plan { problems });
    }
    let trainable = targets.iter().map(|t| t.params).sum::<usize>()
        + saved.iter().map(|s| s.params).sum::<usize>();
    let base = modules.iter().map(elements).sum::<usize>();
    Ok(AdapterPlan {
        targets,
        saved,
        trainable,
        total: base + trainable,
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
    let (out_features, in_features) = match (module.kind, module.shape.as_slice()) {
        (ModuleKind::Linear | ModuleKind::Head, [out, width]) => (*out, *width),
        (kind, _) => {
            let what = if kind == ModuleKind::Embedding {
                "an embedding"
            } else {
                "not a linear layer"
            };
            return Err(format!(
                "target_modules: {name} is {what}; LoRA on anything but a linear layer is not supported (modules_to_save trains a full copy)"
            ));
        }
    };
    let (r, alpha) = matcher.rank_alpha(&name, selection.rank, selection.alpha)?;
    // A file's rank may exceed what a matrix can hold and still mean something; a new adapter's is a
    // mistake. Past the second bound counting would overflow before the file is even opened.
    let most = match purpose {
        Purpose::Initialise => in_features.min(out_features),
        Purpose::Load => in_features * out_features,
    };
    if r > most {
        return Err(format!(
            "{name} is [{out_features}, {in_features}]: rank {r} is more than it can hold"
        ));
    }
    let mut plan = TargetPlan {
        name,
        r,
        alpha,
        scale: cfg.scale(r, alpha),
        in_features,
        out_features,
        params: 0,
    };
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

fn elements(module: &ModuleShape) -> usize {
    let bias = if module.bias {
        module.shape.first().copied().unwrap_or(0)
    } else {
        0
    };
    module.shape.iter().product::<usize>() + bias
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::config::LoraConfig;
    use crate::testing::LlamaSizes;

    const SMOLLM2: LlamaSizes = LlamaSizes {
        layers: 30,
        hidden: 576,
        kv: 192,
        inner: 1536,
        vocab: 49152,
        tied: true,
    };
    const LLAMA3_8B: LlamaSizes = LlamaSizes {
        layers: 32,
        hidden: 4096,
        kv: 1024,
        inner: 14336,
        vocab: 128_256,
        tied: false,
    };
    const SMALL: LlamaSizes = LlamaSizes {
        layers: 12,
        hidden: 64,
        kv: 32,
        inner: 96,
        vocab: 256,
        tied: false,
    };

    const SEVEN: [&str; 7] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];

    fn list(names: &[&str]) -> Option<Targets> {
        Some(Targets::List(names.iter().map(|s| s.to_string()).collect()))
    }

    fn config(names: &[&str]) -> LoraConfig {
        LoraConfig {
            target_modules: list(names),
            ..LoraConfig::default()
        }
    }

    fn names(cfg: &LoraConfig) -> Vec<String> {
        plan(&SMALL.modules(), cfg)
            .unwrap()
            .targets
            .into_iter()
            .map(|t| t.name)
            .collect()
    }

    fn problems(cfg: &LoraConfig, sizes: &LlamaSizes) -> Vec<String> {
        match plan(&sizes.modules(), cfg) {
            Err(AdapterError::Plan { problems } | AdapterError::Config { problems, .. }) => {
                problems
            }
            other => panic!("expected problems, got {other:?}"),
        }
    }

    /// PEFT 0.21.2's `get_nb_trainable_parameters` on the same shapes.
    #[test]
    fn counts_are_pefts() {
        let count = |sizes: &LlamaSizes, cfg: LoraConfig| {
            let plan = plan(&sizes.modules(), &cfg).unwrap();
            (plan.trainable, plan.total)
        };
        assert_eq!(
            count(
                &SMOLLM2,
                LoraConfig {
                    r: 16,
                    ..config(&SEVEN)
                }
            ),
            (4_884_480, 139_399_488)
        );
        let all = LoraConfig {
            r: 16,
            target_modules: Some(Targets::AllLinear),
            ..LoraConfig::default()
        };
        assert_eq!(count(&SMOLLM2, all.clone()), (4_884_480, 139_399_488));
        assert_eq!(
            count(&SMOLLM2, LoraConfig::default()),
            (460_800, 134_975_808)
        );
        assert_eq!(
            count(&LLAMA3_8B, LoraConfig::default()),
            (3_407_872, 8_033_669_120)
        );
        assert_eq!(
            count(
                &LLAMA3_8B,
                LoraConfig {
                    r: 16,
                    ..LoraConfig::default()
                }
            )
            .0,
            6_815_744
        );
        assert_eq!(count(&LLAMA3_8B, all), (41_943_040, 8_072_204_288));
        let two = LlamaSizes { layers: 2, ..SMALL };
        let saved = LoraConfig {
            modules_to_save: Some(vec!["lm_head".into()]),
            ..LoraConfig::default()
        };
        assert_eq!(count(&two, saved), (19_968, 114_496));
    }

    #[test]
    fn a_list_matches_whole_names_and_ends_after_a_dot() {
        assert_eq!(
            names(&config(&["model.layers.3.self_attn.q_proj"])),
            ["model.layers.3.self_attn.q_proj"]
        );
        assert_eq!(
            names(&config(&["3.self_attn.q_proj"])),
            ["model.layers.3.self_attn.q_proj"]
        );
        assert_eq!(names(&config(&["q_proj"])).len(), 12);
        // "_proj" ends every name, but not after a dot.
        assert!(problems(&config(&["_proj"]), &SMALL)[0].contains("matches no module"));
    }

    #[test]
    fn a_string_must_match_the_whole_name() {
        let regex = |s: &str| LoraConfig {
            target_modules: Some(Targets::Regex(s.into())),
            ..LoraConfig::default()
        };
        assert_eq!(
            names(&regex(r".*\.(self_attn|mlp)\.(q_proj|up_proj)$")).len(),
            24
        );
        assert_eq!(names(&regex(r".*layers\.(?P<n>[01])\..*q_proj")).len(), 2);
        assert!(problems(&regex("q_proj"), &SMALL)[0].contains("write [\"q_proj\"]"));
        assert!(problems(&regex("(q_proj"), &SMALL)[0].contains("not a regular expression"));
    }

    #[test]
    fn exclusion_and_saved_modules_win_over_targets() {
        let cfg = LoraConfig {
            exclude_modules: list(&["layers.0.self_attn.q_proj"]),
            ..config(&["q_proj"])
        };
        assert_eq!(names(&cfg).len(), 11);
        let cfg = LoraConfig {
            exclude_modules: Some(Targets::Regex(r".*\.1?0\..*".into())),
            ..config(&["q_proj"])
        };
        assert_eq!(names(&cfg).len(), 10);
        // A saved block takes its layers with it.
        let cfg = LoraConfig {
            modules_to_save: Some(vec!["layers.2.mlp".into()]),
            ..config(&["up_proj"])
        };
        let plan = plan(&SMALL.modules(), &cfg).unwrap();
        assert_eq!(plan.targets.len(), 11);
        assert_eq!(plan.saved.len(), 3);
    }

    #[test]
    fn layers_are_chosen_by_number_unless_named_in_full() {
        let cfg = LoraConfig {
            layers_to_transform: Some(vec![1, 11]),
            ..config(&["q_proj"])
        };
        assert_eq!(
            names(&cfg),
            [
                "model.layers.1.self_attn.q_proj",
                "model.layers.11.self_attn.q_proj"
            ]
        );
        let cfg = LoraConfig {
            layers_pattern: Some(vec!["layers".into()]),
            ..cfg
        };
        assert_eq!(names(&cfg).len(), 2);
        let cfg = LoraConfig {
            layers_to_transform: Some(vec![1]),
            ..config(&["k_proj", "model.layers.5.self_attn.q_proj"])
        };
        assert_eq!(
            names(&cfg),
            [
                "model.layers.1.self_attn.k_proj",
                "model.layers.5.self_attn.q_proj"
            ]
        );
        let cfg = LoraConfig {
            layers_to_transform: Some(vec![1, 99]),
            ..config(&["q_proj"])
        };
        assert_eq!(
            problems(&cfg, &SMALL),
            ["layers_to_transform: layer 99 holds none of the target modules"]
        );
    }

    #[test]
    fn the_first_pattern_that_matches_decides_rank_and_alpha() {
        let cfg = LoraConfig {
            rank_pattern: vec![(r"layers\.0\..*q_proj".into(), 3), ("q_proj".into(), 4)],
            alpha_pattern: vec![("v_proj".into(), 32.0)],
            lora_alpha: 16.0,
            use_rslora: true,
            ..config(&["q_proj", "v_proj"])
        };
        let plan = plan(&SMALL.modules(), &cfg).unwrap();
        let of = |name: &str| {
            plan.targets
                .iter()
                .find(|t| t.name.ends_with(name))
                .map(|t| (t.r, t.alpha, t.scale))
                .unwrap()
        };
        assert_eq!(
            of("layers.0.self_attn.q_proj"),
            (3, 16.0, 16.0 / 3.0_f64.sqrt())
        );
        assert_eq!(of("layers.1.self_attn.q_proj"), (4, 16.0, 8.0));
        assert_eq!(
            of("layers.1.self_attn.v_proj"),
            (8, 32.0, 32.0 / 8.0_f64.sqrt())
        );
    }

    #[test]
    fn everything_that_matches_nothing_is_reported_at_once_with_the_nearest_names() {
        let cfg = LoraConfig {
            exclude_modules: list(&["o_porj"]),
            modules_to_save: Some(vec!["lm_hed".into()]),
            rank_pattern: vec![("gate".into(), 4)],
            alpha_pattern: vec![("up_proj".into(), 4.0)],
            ..config(&["q_proj", "v_prj", "mlp", "zzz"])
        };
        let found = problems(&cfg, &SMALL);
        assert_eq!(found.len(), 7, "{found:#?}");
        for part in [
            "target_modules: \"v_prj\" matches no module; nearest: v_proj",
            "target_modules: \"mlp\" is a block",
            "target_modules: \"zzz\" matches no module; linear layers are down_proj, gate_proj",
            "exclude_modules: \"o_porj\" matches no module; nearest: o_proj",
            "modules_to_save: \"lm_hed\" matches no module; nearest: lm_head",
            "rank_pattern: \"gate\"",
            "alpha_pattern: \"up_proj\" matches no target that",
        ] {
            assert!(
                found.iter().any(|p| p.contains(part)),
                "{part} not in {found:#?}"
            );
        }
    }

    #[test]
    fn a_tied_head_cannot_be_named() {
        let tied = LlamaSizes {
            tied: true,
            ..SMALL
        };
        let cfg = LoraConfig {
            modules_to_save: Some(vec!["lm_head".into()]),
            ..config(&["q_proj"])
        };
        assert!(problems(&cfg, &tied)[0].contains("tied"));
        assert!(problems(&config(&["lm_head"]), &tied)[0].contains("tied"));
        // With a head of its own both work, and all-linear leaves it out.
        assert_eq!(names(&config(&["lm_head"])), ["lm_head"]);
        let all = LoraConfig {
            target_modules: Some(Targets::AllLinear),
            ..LoraConfig::default()
        };
        assert_eq!(names(&all).len(), 12 * 7);
    }

    #[test]
    fn ranks_that_cannot_be_are_refused() {
        assert!(
            problems(
                &LoraConfig {
                    r: 0,
                    ..config(&["q_proj"])
                },
                &SMALL
            )[0]
            .contains("r = 0")
        );
        let found = problems(
            &LoraConfig {
                r: 33,
                ..config(&["k_proj"])
            },
            &SMALL,
        );
        assert_eq!(found.len(), 12);
        assert!(found[0].contains("[32, 64]: rank 33"), "{}", found[0]);
        let absurd = LoraConfig {
            r: usize::MAX,
            ..config(&["k_proj"])
        };
        assert!(plan_for_load(&SMALL.modules(), &absurd).is_err());
    }

    #[test]
    fn an_empty_name_is_not_every_module() {
        let cfg = LoraConfig {
            modules_to_save: Some(vec![String::new()]),
            ..config(&["q_proj"])
        };
        assert!(problems(&cfg, &SMALL)[0].contains("empty name"));
        assert!(problems(&config(&[""]), &SMALL)[0].contains("matches no module"));
    }

    #[test]
    fn embeddings_and_norms_are_not_targets() {
        assert!(problems(&config(&["embed_tokens"]), &SMALL)[0].contains("an embedding"));
        assert!(problems(&config(&["model.norm"]), &SMALL)[0].contains("not a linear layer"));
    }
}

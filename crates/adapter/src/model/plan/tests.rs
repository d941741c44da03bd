//! What a configuration matches and counts, and what it is refused for.

use super::*;
use crate::AdapterConfig;
use crate::methods::lora::config::LoraConfig;
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
        Err(AdapterError::Plan { problems } | AdapterError::Config { problems, .. }) => problems,
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
fn norms_are_no_targets_and_embeddings_are_lora_s_alone() {
    assert!(problems(&config(&["model.norm"]), &SMALL)[0].contains("not a linear layer"));
    let plan = plan(&SMALL.modules(), &config(&["embed_tokens"])).unwrap();
    assert!(plan.targets[0].embedding);
    // A is `[8, 256]`, B `[64, 8]`.
    assert_eq!(plan.trainable, 8 * 256 + 64 * 8);
    let embedding = || list(&["embed_tokens"]);
    let others: [AdapterConfig; 4] = [
        crate::LohaConfig {
            target_modules: embedding(),
            ..Default::default()
        }
        .into(),
        crate::LokrConfig {
            target_modules: embedding(),
            ..Default::default()
        }
        .into(),
        crate::VeraConfig {
            target_modules: embedding(),
            ..Default::default()
        }
        .into(),
        crate::Ia3Config {
            target_modules: embedding(),
            ..Default::default()
        }
        .into(),
    ];
    for other in others {
        let found = super::plan(&SMALL.modules(), &other)
            .unwrap_err()
            .to_string();
        assert!(found.contains("an embedding, which this method"), "{found}");
    }
}

#[test]
fn token_rows_that_cannot_be_are_refused() {
    let rows = |rows: &[usize]| LoraConfig {
        trainable_token_indices: Some(crate::TokenIndices::Input(rows.to_vec())),
        ..config(&["q_proj"])
    };
    for (wrong, part) in [
        (rows(&[0, 256]), "no row 256"),
        (rows(&[3, 3]), "3 is there twice"),
        (rows(&[]), "no rows of model.embed_tokens"),
        (
            LoraConfig {
                modules_to_save: Some(vec!["embed_tokens".into()]),
                ..rows(&[1])
            },
            "saved whole as well",
        ),
    ] {
        let found = problems(&wrong, &SMALL);
        assert!(found[0].contains(part), "{found:?}");
    }
    let elsewhere = crate::TokenIndices::Named([("wte".to_string(), vec![1])].into());
    let wrong = LoraConfig {
        trainable_token_indices: Some(elsewhere),
        ..config(&["q_proj"])
    };
    assert!(problems(&wrong, &SMALL)[0].contains("matches no embedding"));
}

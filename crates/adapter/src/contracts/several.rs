//! Several adapters on one model.

use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use tempfile::TempDir;

use super::{adalora, apart, base_of, ia3, list, loha, lokr, lora, miss, strings, vera};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::testing::{Tiny, fill, ids, perturb_as};
use crate::{
    AdapterConfig, AdapterError, InitLora, InitMiss, LoraConfig, SaveForm, SaveMeta, TokenIndices,
    VeraConfig, adapters, attach_as, delete, export_params_of, hotswap, load_pretrained_as, merge,
    merge_adapters, save_pretrained_as, set_active, set_rows, unmerge,
};

const SALTS: [(&str, usize); 3] = [("a", 1), ("b", 5), ("c", 9)];

/// Adds a trained adapter.
fn add(model: &mut Tiny, name: &str, config: &AdapterConfig) {
    attach_as(model, name, config, 3).unwrap();
    let salt = SALTS
        .iter()
        .find(|(n, _)| *n == name)
        .map_or(0, |(_, salt)| *salt);
    perturb_as(model, name, salt);
}

fn with(adapters: &[(&str, AdapterConfig)]) -> Tiny {
    let mut model = Tiny::new(&Device::flex());
    for (name, config) in adapters {
        add(&mut model, name, config);
    }
    model
}

fn dora() -> LoraConfig {
    LoraConfig {
        use_dora: true,
        ..lora()
    }
}

fn everywhere() -> LoraConfig {
    LoraConfig {
        target_modules: list(&["embed_tokens", "lm_head", "q_proj", "down_proj"]),
        bias: crate::Bias::LoraOnly,
        ..lora()
    }
}

fn rows() -> LoraConfig {
    LoraConfig {
        trainable_token_indices: Some(TokenIndices::Input(vec![5, 79])),
        ..lora()
    }
}

fn save(model: &Tiny, name: &str, config: &AdapterConfig, form: SaveForm) -> TempDir {
    let dir = TempDir::new().unwrap();
    save_pretrained_as(model, name, config, &SaveMeta::default(), dir.path(), form).unwrap();
    dir
}

/// Pairs of configurations, and whether their parts add up.
fn pairs() -> Vec<(&'static str, AdapterConfig, AdapterConfig, bool)> {
    let pissa = LoraConfig {
        init_lora_weights: InitLora::Pissa,
        ..lora()
    };
    let other_key = VeraConfig {
        projection_prng_key: 9,
        ..vera()
    };
    let on_embedding = LoraConfig {
        bias: crate::Bias::None,
        ..everywhere()
    };
    let smaller = LoraConfig {
        r: 2,
        use_rslora: true,
        target_modules: list(&["q_proj", "up_proj"]),
        ..lora()
    };
    vec![
        ("two LoRAs", lora().into(), smaller.into(), true),
        ("LoRA, LoKr", lora().into(), lokr(2).into(), true),
        ("LoHa, VeRA", loha(2).into(), vera().into(), true),
        ("AdaLoRA, PiSSA", adalora().into(), pissa.into(), true),
        ("two VeRAs", vera().into(), other_key.into(), true),
        (
            "on all kinds of modules",
            everywhere().into(),
            rows().into(),
            true,
        ),
        (
            "two MiSSes",
            miss(InitMiss::Default).into(),
            miss(InitMiss::Mini).into(),
            true,
        ),
        (
            "LoRA, MiSS with bat",
            lora().into(),
            miss(InitMiss::Bat).into(),
            false,
        ),
        ("two IA3s", ia3().into(), ia3().into(), false),
        ("LoRA, IA3", lora().into(), ia3().into(), false),
        ("DoRA, LoRA", dora().into(), lora().into(), false),
        (
            "LoRA, DoRA on an embedding",
            on_embedding.clone().into(),
            LoraConfig {
                use_dora: true,
                ..on_embedding
            }
            .into(),
            false,
        ),
    ]
}

#[test]
fn each_alone_both_and_none_can_be_in_use() {
    let bare = Tiny::new(&Device::flex()).logits();
    for (name, a, b, is_additive) in pairs() {
        let [alone_a, alone_b] =
            [("a", &a), ("b", &b)].map(|(n, c)| with(&[(n, c.clone())]).logits());
        let mut model = with(&[("a", a), ("b", b)]);
        assert_eq!(adapters(&model).len(), 2, "{name}");
        assert_eq!(model.logits(), alone_b, "{name}: the last one is in use");
        set_active(&mut model, &["a"]).unwrap();
        assert_eq!(model.logits(), alone_a, "{name}");
        set_active(&mut model, &["b"]).unwrap();
        assert_eq!(model.logits(), alone_b, "{name}");
        set_active(&mut model, &[]).unwrap();
        assert_eq!(model.logits(), bare, "{name}");
        // One is in use or not, however often it is named.
        set_active(&mut model, &["a", "a"]).unwrap();
        assert_eq!(model.logits(), alone_a, "{name}");
        set_active(&mut model, &["a", "b"]).unwrap();
        let both = model.logits();
        let training = apart(&both, &model.clone().train().logits());
        assert!(training <= 1e-5, "{name}: {training}");
        if is_additive {
            parts_add_up(&mut model, name);
            set_active(&mut model, &["a", "b"]).unwrap();
        }
        let bits = base_of(&model);
        merge_adapters(&mut model, &["a", "b"]).unwrap();
        let gap = apart(&both, &model.logits());
        assert!(gap <= 1e-5, "{name}: {gap}");
        assert!(bits != base_of(&model));
        unmerge(&mut model);
        assert!(bits == base_of(&model), "{name}");
        assert_eq!(model.logits(), both, "{name}");
        merge(&mut model).unwrap();
        let gap = apart(&both, &model.logits());
        assert!(gap <= 1e-5 && adapters(&model).is_empty(), "{name}: {gap}");
    }
}

/// In every linear layer: the base, and what each of the two adds to it.
fn parts_add_up(model: &mut Tiny, name: &str) {
    let mut outputs = Vec::new();
    for names in [&["a"][..], &["b"], &[], &["a", "b"]] {
        set_active(model, names).unwrap();
        let mut all: Vec<f32> = Vec::new();
        model.for_each_slot_ref(&mut |_, slot| {
            if let SlotRef::Linear(linear) = slot {
                let [_, width] = linear.weight.dims();
                let y = linear.forward(fill([3, width], 2, &Device::flex()) * 10.0);
                all.extend(y.into_data().try_into_vec::<f32>().unwrap());
            }
        });
        outputs.push(all);
    }
    let [a, b, base, both] = [0, 1, 2, 3].map(|i| &outputs[i]);
    let sum: Vec<f32> = (0..a.len()).map(|i| a[i] + b[i] - base[i]).collect();
    let gap = apart(both, &sum);
    assert!(gap <= 1e-5, "{name}: {gap}");
}

#[test]
fn each_row_of_a_batch_can_have_its_own() {
    let width = 5 * crate::testing::VOCAB;
    for (name, a, b, _) in pairs() {
        let mut model = with(&[("a", a), ("b", b)]);
        let mut alone = |names: &[&str]| {
            set_active(&mut model, names).unwrap();
            model.logits()
        };
        let by = [alone(&["a"]), alone(&["b"]), alone(&[])];
        let column = |choice: Option<&str>| match choice {
            Some("a") => 0,
            Some(_) => 1,
            None => 2,
        };
        for choice in [
            [Some("a"), Some("b")],
            [Some("b"), Some("a")],
            [None, Some("a")],
            [Some("b"), None],
            [Some("a"), Some("a")],
            [None, None],
        ] {
            set_rows(&mut model, &choice).unwrap();
            let together = model.logits();
            for (row, choice) in choice.into_iter().enumerate() {
                let range = row * width..(row + 1) * width;
                let gap = apart(&by[column(choice)][range.clone()], &together[range]);
                assert!(gap <= 1e-6, "{name}: {choice:?}: {gap}");
            }
        }
        // In training too, with gradients for both.
        set_rows(&mut model, &[Some("a"), Some("b")]).unwrap();
        let training = model.clone().train();
        let gap = apart(&model.logits(), &training.logits());
        assert!(gap <= 1e-5, "{name}: {gap}");
        let device = Device::flex().autodiff();
        let grads = training
            .forward(ids(&device))
            .powf_scalar(2.0)
            .mean()
            .backward();
        for adapter in ["a", "b"] {
            let mut reached = 0;
            crate::for_each_param_of(&training, adapter, &mut |key, param| {
                let gradient = param.gradient(key, &grads).unwrap();
                reached += usize::from(gradient.is_some_and(|g| g.iter().any(|v| *v != 0.0)));
            });
            assert!(reached > 0, "{name}: {adapter}");
        }
    }
}

#[test]
fn what_rows_cannot_differ_in_is_refused() {
    let norm = LoraConfig {
        modules_to_save: Some(strings(&["model.norm"])),
        ..lora()
    };
    let mut model = with(&[("a", lora().into()), ("b", norm.into())]);
    let message = set_rows(&mut model, &[Some("a"), Some("b")])
        .unwrap_err()
        .to_string();
    assert!(message.contains("b trains model.norm whole"), "{message}");
    set_rows(&mut model, &[Some("a"), None]).unwrap();
    // A head that shares the table would have to differ in its rows as well.
    let mut tied = Tiny::with(&Device::flex(), false);
    add(&mut tied, "a", &rows().into());
    let message = set_rows(&mut tied, &[Some("a"), None])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("model.embed_tokens") && message.contains("head"),
        "{message}"
    );
}

#[test]
fn one_can_be_deleted_and_the_others_stay() {
    let bare = Tiny::new(&Device::flex());
    let mut model = with(&[
        ("a", lora().into()),
        ("b", loha(2).into()),
        ("c", ia3().into()),
    ]);
    set_active(&mut model, &["a", "b"]).unwrap();
    let b = with(&[("b", loha(2).into())]).logits();
    let values = export_params_of(&model, "c").unwrap();
    delete(&mut model, "a").unwrap();
    assert_eq!(adapters(&model), ["b", "c"]);
    assert_eq!(model.logits(), b);
    assert_eq!(export_params_of(&model, "c").unwrap(), values);
    delete(&mut model, "b").unwrap();
    assert_eq!(model.logits(), bare.logits());
    delete(&mut model, "c").unwrap();
    assert!(adapters(&model).is_empty());
    assert_eq!(base_of(&model), base_of(&bare));
    add(&mut model, "b", &loha(2).into());
    assert_eq!(model.logits(), b);
}

#[test]
fn each_is_saved_and_loaded_under_its_name() {
    let whole = LoraConfig {
        modules_to_save: Some(strings(&["lm_head"])),
        ..lora()
    };
    let configs: [(&str, AdapterConfig); 3] = [
        ("a", whole.into()),
        ("b", vera().into()),
        ("c", dora().into()),
    ];
    let mut model = with(&configs);
    let mut other = Tiny::new(&Device::flex());
    for (name, config) in &configs {
        let dir = save(&model, name, config, SaveForm::Exchange);
        load_pretrained_as(&mut other, name, dir.path(), true).unwrap();
        set_active(&mut model, &[name]).unwrap();
        assert_eq!(other.logits(), model.logits(), "{name}");
        assert_eq!(
            export_params_of(&other, name).unwrap(),
            export_params_of(&model, name).unwrap()
        );
        let again = load_pretrained_as(&mut other, name, dir.path(), true);
        assert!(matches!(again, Err(AdapterError::Attached(_))), "{name}");
    }
    assert_eq!(adapters(&other).len(), 3);
    let ids_of = |name: &str| {
        let mut ids = Vec::new();
        crate::for_each_param_of(&other, name, &mut |_, param| ids.push(param.id()));
        ids
    };
    let mut all: Vec<_> = ["a", "b", "c"].into_iter().flat_map(ids_of).collect();
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count, "no two adapters share an id");
    let nobody = SaveForm::Exchange;
    let dir = TempDir::new().unwrap();
    let lora: AdapterConfig = lora().into();
    let message = save_pretrained_as(&model, "d", &lora, &SaveMeta::default(), dir.path(), nobody);
    assert!(matches!(message, Err(AdapterError::NoAdapter)));
}

#[test]
fn values_can_be_exchanged_in_place() {
    for (name, config) in [
        ("LoRA", AdapterConfig::from(everywhere())),
        ("token rows", rows().into()),
        ("DoRA", dora().into()),
        ("LoHa", loha(2).into()),
        ("LoKr", lokr(2).into()),
        ("AdaLoRA", adalora().into()),
        ("VeRA", vera().into()),
        ("IA3", ia3().into()),
        ("MiSS", miss(InitMiss::Mini).into()),
        ("MiSS with bat", miss(InitMiss::Bat).into()),
    ] {
        let other = with(&[("b", config.clone())]);
        let dir = save(&other, "b", &config, SaveForm::Exchange);
        let mut model = with(&[("a", config)]);
        assert_ne!(model.logits(), other.logits(), "{name}");
        hotswap(&mut model, "a", dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(model.logits(), other.logits(), "{name}");
    }
}

#[test]
fn values_of_another_shape_scale_or_start_are_not_exchanged() {
    let pissa = LoraConfig {
        init_lora_weights: InitLora::Pissa,
        ..lora()
    };
    let (exchange, resume) = (SaveForm::Exchange, SaveForm::Resume);
    let other_key = VeraConfig {
        projection_prng_key: 1,
        ..vera()
    };
    let cases: [(AdapterConfig, AdapterConfig, SaveForm, &str); 7] = [
        (
            lora().into(),
            LoraConfig { r: 2, ..lora() }.into(),
            exchange,
            "is not what is attached",
        ),
        (
            lora().into(),
            LoraConfig {
                lora_alpha: 4.0,
                ..lora()
            }
            .into(),
            exchange,
            "is scaled by 4, not by 1",
        ),
        (
            lora().into(),
            loha(2).into(),
            exchange,
            "is not what is attached",
        ),
        (
            lora().into(),
            dora().into(),
            exchange,
            "lora_magnitude_vector",
        ),
        (vera().into(), other_key.into(), exchange, "another matrix"),
        (
            pissa.clone().into(),
            lora().into(),
            exchange,
            "took over a part of the base",
        ),
        (
            lora().into(),
            pissa.into(),
            resume,
            "took over a part of the base",
        ),
    ];
    for (have, config, form, part) in cases {
        let dir = save(&with(&[("b", config.clone())]), "b", &config, form);
        let mut model = with(&[("a", have)]);
        let before = model.logits();
        let message = hotswap(&mut model, "a", dir.path())
            .unwrap_err()
            .to_string();
        assert!(message.contains(part), "{part} not in {message}");
        assert_eq!(model.logits(), before);
    }
    let mut none = Tiny::new(&Device::flex());
    let dir = TempDir::new().unwrap();
    assert!(matches!(
        hotswap(&mut none, "a", dir.path()),
        Err(AdapterError::NoAdapter)
    ));
}

/// The message of a result that must be an error.
fn message<T>(result: crate::error::Result<T>) -> String {
    result.err().map(|e| e.to_string()).unwrap()
}

#[test]
fn names_that_nobody_has_are_told_with_those_that_are_there() {
    let mut model = with(&[("a", lora().into()), ("b", loha(2).into())]);
    let before = model.logits();
    for text in [
        message(set_active(&mut model, &["a", "z", "y"])),
        message(set_rows(&mut model, &[Some("z"), Some("y")])),
    ] {
        assert!(
            text.contains("\"z\"") && text.contains("\"y\"") && text.contains("a, b"),
            "{text}"
        );
    }
    for text in [
        message(delete(&mut model, "z")),
        message(merge_adapters(&mut model, &["a", "z"])),
    ] {
        assert!(text.contains("\"z\""), "{text}");
    }
    assert!(message(merge_adapters(&mut model, &[])).contains("no adapter"));
    assert_eq!(model.logits(), before);
    let mut none = Tiny::new(&Device::flex());
    assert!(message(set_active(&mut none, &["a"])).contains("carries none"));
    set_active(&mut none, &[]).unwrap();
}

#[test]
fn nothing_is_chosen_added_or_taken_off_while_some_are_merged() {
    let mut model = with(&[("a", lora().into()), ("b", loha(2).into())]);
    let dir = save(&model, "a", &lora().into(), SaveForm::Exchange);
    merge_adapters(&mut model, &["a"]).unwrap();
    let merged = model.logits();
    for text in [
        message(set_active(&mut model, &["b"])),
        message(set_rows(&mut model, &[Some("b"), None])),
        message(delete(&mut model, "b")),
        message(attach_as(&mut model, "c", &lora(), 1)),
        message(load_pretrained_as(&mut model, "c", dir.path(), true)),
        message(hotswap(&mut model, "a", dir.path())),
        message(merge_adapters(&mut model, &["b"])),
    ] {
        assert!(
            text.contains("merged") && text.contains("unmerge"),
            "{text}"
        );
    }
    assert_eq!(model.logits(), merged);
    unmerge(&mut model);
    set_active(&mut model, &["b"]).unwrap();
}

#[test]
fn two_copies_of_one_module_do_not_go_together() {
    let whole = LoraConfig {
        modules_to_save: Some(strings(&["lm_head", "model.norm", "embed_tokens"])),
        ..lora()
    };
    let mut model = with(&[("a", whole.clone().into()), ("b", whole.into())]);
    let text = message(set_active(&mut model, &["a", "b"]));
    for module in ["lm_head", "model.norm", "model.embed_tokens"] {
        assert!(
            text.contains(&format!("{module} is trained whole by a and b")),
            "{text}"
        );
    }
    let text = message(merge_adapters(&mut model, &["a", "b"]));
    assert!(text.contains("trained whole"), "{text}");
    set_active(&mut model, &["a"]).unwrap();
}

#[test]
fn two_trainings_of_one_bias_or_row_do_not_go_together() {
    let (everywhere, rows) = (everywhere(), rows());
    for (config, parts) in [
        (
            everywhere,
            vec![
                "lm_head.bias is trained whole by a and b",
                "1.self_attn.q_proj.bias is",
            ],
        ),
        (
            rows,
            vec!["embed_tokens row 5 is", "embed_tokens row 79 is"],
        ),
    ] {
        let mut model = with(&[("a", config.clone().into()), ("b", config.into())]);
        for text in [
            message(set_active(&mut model, &["a", "b"])),
            message(merge_adapters(&mut model, &["a", "b"])),
        ] {
            for part in &parts {
                assert!(text.contains(part), "{part} not in {text}");
            }
        }
    }
}

#[test]
fn names_that_would_leave_their_folder_or_split_a_key_are_refused() {
    let saved = with(&[("a", lora().into())]);
    let dir = save(&saved, "a", &lora().into(), SaveForm::Exchange);
    let mut model = Tiny::new(&Device::flex());
    for name in [
        "../x", "a/b", "a\\b", "", ".", "..", "a.b", "C:x", "a\nb", "/etc",
    ] {
        for text in [
            message(load_pretrained_as(&mut model, name, dir.path(), true)),
            message(attach_as(&mut model, name, &lora(), 1)),
        ] {
            assert!(
                text.contains("cannot be an adapter's name"),
                "{name:?}: {text}"
            );
        }
    }
    assert!(adapters(&model).is_empty());
    for name in ["ä b", "poet-2", "0"] {
        load_pretrained_as(&mut model, name, dir.path(), true).unwrap();
    }
    assert!(!Path::new("../x").exists());
}

//! LoftQ on the tiny model: errors without and with the factors, and what is refused.

use burn::tensor::Device;

use super::*;
use crate::testing::{Tiny, generator, packed};
use crate::{
    InitLora, MethodConfig, Purpose, Targets, attach, attach_given, detach, export_trainable,
    set_enabled,
};

fn config(r: usize, lora_alpha: f64) -> LoraConfig {
    LoraConfig {
        r,
        lora_alpha,
        target_modules: Some(Targets::AllLinear),
        init_lora_weights: InitLora::Loftq,
        ..LoraConfig::default()
    }
}

/// The weights of the layers in blocks, as they were before they were quantised.
fn dense() -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    Tiny::new(&Device::flex()).for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot {
            let values = linear.weight.dense().into_data().try_into_vec().unwrap();
            all.insert(name.to_owned(), values);
        }
    });
    all
}

fn started(model: &Tiny, config: &LoraConfig) -> LoftqStart {
    let dense = dense();
    start(model, config, &|name| Ok(dense[name].clone())).unwrap()
}

fn attached(model: &mut Tiny, config: &LoraConfig) -> LoftqStart {
    let start = started(model, config);
    attach_given(model, crate::DEFAULT, config, 1, Some(&start.given())).unwrap();
    start
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum()
}

/// The squares of the differences between the layers' weights in use and those before quantising.
fn errors(model: &Tiny) -> BTreeMap<String, f64> {
    let dense = dense();
    let mut all = BTreeMap::new();
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot
            && linear.weight.packed().is_some()
        {
            let weight = linear.weight_in_use().into_data().try_into_vec().unwrap();
            all.insert(name.to_owned(), error(&weight, &dense[name]));
        }
    });
    all
}

#[test]
fn factors_make_up_for_what_was_lost_whatever_the_scale() {
    let _alone = generator();
    let (eight, sixteen) = (config(8, 8.0), config(8, 16.0));
    let stabilised = LoraConfig {
        use_rslora: true,
        ..eight.clone()
    };
    let mut wanted: Option<BTreeMap<String, f64>> = None;
    for config in [eight, sixteen, stabilised] {
        let mut model = packed(&Device::flex());
        let before = errors(&model);
        let start = attached(&mut model, &config);
        let after = errors(&model);
        assert_eq!(start.errors.len(), 14, "seven layers in each of two blocks");
        for (name, [lost, left]) in &start.errors {
            // The sums of some thousands of squares of differences of f32.
            let near = |a: f64, b: f64| (a - b).abs() < 1e-4 * b;
            assert!(near(*lost, before[name]), "{name}: {lost}");
            assert!(near(*left, after[name]), "{name}: {left} {}", after[name]);
            assert!(*left < 0.9 * lost, "{name}: {left} of {lost}");
            if let Some(wanted) = &wanted {
                assert!(near(*left, wanted[name]), "{name}: another scale");
            }
        }
        wanted = Some(after);
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let model = packed(&Device::flex());
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| started(&model, &config(4, 4.0)))
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn more_ranks_leave_less_and_the_full_rank_nothing() {
    let model = packed(&Device::flex());
    let left = |r: usize| {
        let config = LoraConfig {
            target_modules: Some(Targets::List(vec!["k_proj".into()])),
            ..config(r, r as f64)
        };
        let start = started(&model, &config);
        let sums = start
            .errors
            .values()
            .fold([0.0; 2], |sum, e| [sum[0] + e[0], sum[1] + e[1]]);
        sums[1] / sums[0]
    };
    let ratios = [1, 4, 16, 32].map(left);
    assert!(
        ratios.windows(2).all(|pair| pair[1] < pair[0]),
        "{ratios:?}"
    );
    assert!(ratios[3] < 1e-6, "{ratios:?}");
}

#[test]
fn an_answer_is_nearer_to_the_dense_models_than_the_quantised_base_is() {
    let _alone = generator();
    let wanted = Tiny::new(&Device::flex()).logits();
    for use_dora in [false, true] {
        let config = LoraConfig {
            use_dora,
            ..config(16, 16.0)
        };
        let mut model = packed(&Device::flex());
        let plain = error(&model.logits(), &wanted);
        attached(&mut model, &config);
        let with = error(&model.logits(), &wanted);
        // Sixteen directions of 32 or 64 in each layer.
        assert!(with < 0.7 * plain, "dora {use_dora}: {with} of {plain}");
        // The base is as it was.
        set_enabled(&mut model, false);
        assert_eq!(error(&model.logits(), &wanted), plain);
        detach(&mut model);
    }
}

/// DoRA's lengths are those of what it starts from, as in PEFT: it changes nothing then.
#[test]
fn dora_starts_where_lora_does() {
    let _alone = generator();
    let logits = |use_dora| {
        let mut model = packed(&Device::flex());
        let config = LoraConfig {
            use_dora,
            ..config(8, 8.0)
        };
        attached(&mut model, &config);
        model.logits()
    };
    let (plain, dora) = (logits(false), logits(true));
    let gap = plain.iter().zip(&dora).map(|(a, b)| (a - b).abs());
    assert!(gap.fold(0.0, f32::max) < 1e-4);
}

#[test]
fn layers_that_are_not_quantised_start_as_lora_does() {
    let _alone = generator();
    let config = LoraConfig {
        target_modules: Some(Targets::List(vec!["q_proj".into(), "lm_head".into()])),
        ..config(4, 4.0)
    };
    let mut model = packed(&Device::flex());
    let start = attached(&mut model, &config);
    assert_eq!((start.factors.len(), start.others), (2, 1));
    let head = export_trainable(&model).unwrap().into_iter();
    let head: BTreeMap<_, _> = head.map(|(key, _, values)| (key, values)).collect();
    let of = |part: &str| &head[&format!("base_model.model.lm_head.{part}.weight")];
    assert!(of("lora_A").iter().any(|v| *v != 0.0));
    assert!(of("lora_B").iter().all(|v| *v == 0.0));
    let text = start.to_string();
    assert!(text.contains("1 other adapted layers"), "{text}");
}

/// A factor of zeros beside another could not be trained: neither would have a gradient.
#[test]
fn a_layer_that_lost_nothing_starts_as_lora_does() {
    let model = packed(&Device::flex());
    let mut held = BTreeMap::new();
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot
            && let Some(packed) = linear.weight.packed()
        {
            held.insert(name.to_owned(), packed.values());
        }
    });
    let start = start(&model, &config(4, 4.0), &|name| Ok(held[name].clone())).unwrap();
    assert_eq!((start.factors.len(), start.others), (0, 14));
    let mut model = model;
    let config = config(4, 4.0);
    attach_given(&mut model, crate::DEFAULT, &config, 1, Some(&start.given())).unwrap();
    let values = export_trainable(&model).unwrap();
    let (key, _, a) = &values[0];
    assert!(key.ends_with("lora_A.weight") && a.iter().any(|v| *v != 0.0));
}

#[test]
fn what_loftq_cannot_start_from_is_refused_and_nothing_is_attached() {
    let asks = |model: &Tiny, original: &Original<'_>| {
        start(model, &config(4, 4.0), original)
            .unwrap_err()
            .to_string()
    };
    let dense = Tiny::new(&Device::flex());
    let text = asks(&dense, &|_| Ok(Vec::new()));
    assert!(text.contains("no layer among target_modules"), "{text}");
    let mut model = packed(&Device::flex());
    let text = asks(&model, &|_| Ok(vec![0.0; 3]));
    assert!(text.contains("has 3 values, not 4096"), "{text}");
    let text = asks(&model, &|name| {
        let size = dense_size(name);
        Ok(vec![f32::NAN; size])
    });
    assert!(text.contains("finite"), "{text}");
    let text = attach(&mut model, &config(4, 4.0), 1).unwrap_err();
    assert!(text.to_string().contains("before is not there"), "{text}");
    assert!(export_trainable(&model).unwrap().is_empty());
}

fn dense_size(name: &str) -> usize {
    dense()[name].len()
}

#[test]
fn one_iteration_of_four_or_eight_bits_is_what_there_is() {
    let with = |text: serde_json::Value| {
        let mut config = config(4, 4.0);
        config.other.insert("loftq_config".into(), text);
        MethodConfig::problems(&config, Purpose::Initialise)
    };
    for fine in [
        serde_json::json!({}),
        serde_json::json!({"loftq_bits": 8}),
        serde_json::json!({"loftq_bits": 4, "loftq_iter": 1}),
    ] {
        assert_eq!(with(fine.clone()), Vec::<String>::new(), "{fine}");
    }
    for (wrong, part) in [
        (
            serde_json::json!({"loftq_iter": 5}),
            "loftq_iter = 5: from the second",
        ),
        (
            serde_json::json!({"loftq_iter": "one"}),
            "loftq_iter = \"one\"",
        ),
        (
            serde_json::json!({"loftq_bits": 2}),
            "loftq_bits = 2: LoftQ is for 4 or 8",
        ),
    ] {
        let problems = with(wrong);
        assert!(problems[0].contains(part), "{problems:?}");
    }
}

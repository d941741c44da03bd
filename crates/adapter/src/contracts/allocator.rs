//! AdaLoRA's budget.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Device;

use super::{adalora, apart, strings};
use crate::methods::adalora::allocator::{orthogonality, trim};
use crate::testing::{Tiny, ids, perturb};
use crate::{
    AdaLoraConfig, RankAllocator, SaveMeta, attach, export_trainable, load_pretrained,
    save_pretrained, trainable,
};

/// From 84 ranks (6 in each of 14 modules) to 28, over steps 2 to 7 of 10.
fn config() -> AdaLoraConfig {
    AdaLoraConfig {
        tinit: 2,
        tfinal: 3,
        delta_t: 2,
        modules_to_save: Some(strings(&["model.norm"])),
        ..adalora()
    }
}

fn adapted() -> Tiny {
    let mut model = Tiny::new(&Device::flex());
    attach(&mut model, &config(), 3).unwrap();
    perturb(&mut model);
    model
}

/// One step of training without an optimizer: gradients, then other values.
fn step(
    allocator: &mut RankAllocator,
    model: &mut Tiny,
    step: usize,
) -> crate::methods::adalora::allocator::Allocation {
    let device = Device::flex().autodiff();
    let grads = model
        .forward(ids(&device))
        .powf_scalar(2.0)
        .mean()
        .backward();
    let grads = GradientsParams::from_grads(grads, model);
    allocator
        .note_gradients(model, &|id| grads.get(id), 1.0)
        .unwrap();
    perturb(model);
    allocator.update(model, step).unwrap()
}

#[test]
fn the_budget_falls_with_the_cube_of_what_is_left() {
    let allocator = RankAllocator::new(&config(), &adapted());
    assert_eq!(
        (allocator.initial_budget(), allocator.target_budget()),
        (84, 28)
    );
    // 28 + 56·(1 - (step - 2) / 5)³, rounded down: 56.672, 40.096, 31.584, 28.448, 28.
    let expected = [
        (84, false),
        (84, false),
        (84, false),
        (56, false),
        (40, true),
        (31, false),
        (28, true),
        (28, false),
        (28, true),
        (28, true),
    ];
    for (step, expected) in expected.into_iter().enumerate() {
        assert_eq!(allocator.schedule(step), expected, "step {step}");
    }
}

#[test]
fn ranks_go_as_the_budget_says_and_stay_away_at_the_end() {
    let mut model = adapted().train();
    let mut allocator = RankAllocator::new(&config(), &model);
    let zeros = |model: &Tiny| {
        let state = export_trainable(model).unwrap();
        let e = state
            .into_iter()
            .filter(|(key, ..)| key.ends_with("lora_E"));
        e.flat_map(|(.., values)| values)
            .filter(|v| *v == 0.0)
            .count()
    };
    let mut last = Vec::new();
    for i in 0..10 {
        let allocation = step(&mut allocator, &mut model, i);
        // Steps 4 and 6 are due, 7 is the last choice; ranks that went at 4 may come back at 6.
        match (i, &allocation.kept) {
            (4 | 6 | 7, Some(kept)) => {
                let count: usize = kept
                    .iter()
                    .map(|(_, k)| k.iter().filter(|k| **k).count())
                    .sum();
                assert_eq!(count, allocation.budget, "step {i}");
                assert_eq!(zeros(&model), 84 - count, "step {i}");
                last = kept.clone();
            }
            (8.., None) => assert_eq!(zeros(&model), 84 - 28, "step {i}"),
            (_, None) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(allocator.kept(), last);
    assert_eq!(last.len(), 14);
}

#[test]
fn a_budget_goes_on_from_its_state_as_if_it_had_never_stopped() {
    let mut model = adapted().train();
    let mut allocator = RankAllocator::new(&config(), &model);
    for i in 0..5 {
        step(&mut allocator, &mut model, i);
    }
    let state = allocator.state();
    assert!(state.is_sorted_by(|a, b| a.0 < b.0));
    let mut other = RankAllocator::new(&config(), &model);
    other.restore(state.clone());
    assert_eq!(other.state(), state);
    assert_eq!(other.kept(), allocator.kept());
    let mut twin = model.clone();
    for i in 5..10 {
        let [a, b] = [
            step(&mut allocator, &mut model, i),
            step(&mut other, &mut twin, i),
        ];
        assert_eq!(a, b, "step {i}");
        assert_eq!(
            export_trainable(&model).unwrap(),
            export_trainable(&twin).unwrap()
        );
        assert_eq!(other.state(), allocator.state());
    }
}

#[test]
fn ranks_that_are_not_in_use_are_cut_off_without_a_change() {
    let mut model = adapted();
    let mut allocator = RankAllocator::new(&config(), &model);
    let names: Vec<String> = trainable(&model)
        .into_iter()
        .filter_map(|(key, ..)| {
            Some(
                key.strip_prefix("base_model.model.")?
                    .strip_suffix(".lora_E")?
                    .into(),
            )
        })
        .collect();
    // None in the first module, one in the second and so on.
    let kept = |i: usize| (0..6).map(|k| k < i % 7).rev().collect::<Vec<bool>>();
    let kept: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.clone(), kept(i)))
        .collect();
    let state = kept.iter().map(|(name, kept)| {
        let values = kept.iter().map(|k| f32::from(u8::from(*k))).collect();
        (format!("kept.{name}"), vec![6], values)
    });
    allocator.restore(state.collect());
    assert_eq!(allocator.kept(), kept);
    allocator.mask(&mut model);
    let before = model.logits();
    let norm = export_trainable(&model)
        .unwrap()
        .into_iter()
        .find(|(key, ..)| key.contains("norm"));
    let cut = trim(&mut model, &config(), &kept).unwrap();
    let gap = apart(&before, &model.logits());
    assert!(gap <= 1e-6, "{gap}");
    let left: usize = kept
        .iter()
        .map(|(_, k)| k.iter().filter(|k| **k).count())
        .sum();
    let e = export_trainable(&model).unwrap();
    let count: usize = e
        .iter()
        .filter(|(key, ..)| key.ends_with("lora_E"))
        .map(|(.., values)| values.len())
        .sum();
    assert_eq!(count, left);
    assert_eq!(e.into_iter().find(|(key, ..)| key.contains("norm")), norm);
    // It is stored as it is now, and comes back so.
    let dir = tempfile::TempDir::new().unwrap();
    save_pretrained(&model, &cut, &SaveMeta::default(), dir.path()).unwrap();
    let mut other = Tiny::new(&Device::flex());
    load_pretrained(&mut other, dir.path(), false).unwrap();
    assert_eq!(other.logits(), model.logits());
    // Without a choice there is nothing to cut.
    assert_eq!(trim(&mut model, &cut, &[]).unwrap(), cut);
}

#[test]
fn the_term_that_keeps_factors_orthogonal_is_zero_where_they_are() {
    let config = AdaLoraConfig {
        target_modules: super::list(&["q_proj"]),
        modules_to_save: None,
        ..config()
    };
    let mut model = Tiny::new(&Device::flex());
    assert!(orthogonality(&model, 0.5).is_none());
    attach(&mut model, &config, 3).unwrap();
    let value = |model: &Tiny| {
        let term = orthogonality(model, 0.5).unwrap();
        term.into_data().try_into_vec::<f32>().unwrap()[0]
    };
    let mut state = export_trainable(&model).unwrap();
    for (key, shape, values) in &mut state {
        let columns = shape[1];
        let one = |i: usize| f32::from(u8::from(i / columns == i % columns));
        if !key.ends_with("lora_E") {
            *values = (0..values.len()).map(one).collect();
        }
    }
    crate::import_trainable(&mut model, state.clone()).unwrap();
    assert!(value(&model).abs() < 1e-6);
    // Twice a row of orthonormal ones: A·Aᵀ - I has one entry of 3, in one of four factors.
    let first = state
        .iter_mut()
        .find(|(key, ..)| key.ends_with("lora_A"))
        .unwrap();
    first.2[0] = 2.0;
    crate::import_trainable(&mut model, state).unwrap();
    assert!((value(&model) - 0.5 * 3.0 / 4.0).abs() < 1e-6);
}

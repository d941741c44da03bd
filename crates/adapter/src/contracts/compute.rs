//! What an adapter computes: at first, trained, merged, on other backends, backwards.

use burn::module::Module;
use burn::tensor::Device;

use super::{BASE, Case, apart, base_of, cases};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::testing::{Tiny, ids};
use crate::{
    DEFAULT, detach, export_gradients, export_trainable, merge, merge_adapters, set_enabled,
    shapes, trainable, unmerge,
};

fn not_full() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| !case.is_full())
}

#[test]
fn the_output_is_unchanged_at_first_where_that_is_promised() {
    let base = Tiny::new(&Device::flex()).logits();
    for case in cases() {
        let gap = apart(&base, &case.fresh(&Device::flex()).logits());
        if case.starts_unchanged {
            assert!(gap <= 1e-5, "{}: {gap}", case.name);
        } else {
            assert!(gap > 1e-2, "{}: {gap}", case.name);
        }
    }
}

#[test]
fn what_is_trained_is_counted_as_by_hand() {
    for case in cases() {
        let mut model = Tiny::new(&Device::flex());
        let plan = crate::attach(&mut model, &case.config, 3).unwrap();
        assert_eq!(plan.trainable, case.count, "{}", case.name);
        let elements = |shape: &[usize]| shape.iter().product::<usize>();
        let exported = export_trainable(&model).unwrap();
        let sum: usize = exported.iter().map(|(_, shape, _)| elements(shape)).sum();
        assert_eq!(sum, case.count, "{}", case.name);
        for (key, shape, values) in exported {
            assert_eq!(values.len(), elements(&shape), "{}: {key}", case.name);
        }
        let base: usize = shapes(&model)
            .iter()
            .map(|m| elements(&m.shape) + if m.bias { m.shape[0] } else { 0 })
            .sum();
        assert_eq!(base, BASE);
        let biases: usize = plan.biases.iter().map(|b| b.len).sum();
        let new = if case.is_full() {
            0
        } else {
            plan.trainable - biases
        };
        assert_eq!(plan.total, BASE + new, "{}", case.name);
    }
}

#[test]
fn merged_it_computes_the_same_and_unmerged_it_is_what_it_was_to_the_bit() {
    for case in not_full() {
        let name = case.name;
        let plain = Tiny::new(&Device::flex());
        let (bits, bare) = (base_of(&plain), plain.logits());
        let mut model = case.adapted(&Device::flex());
        assert_eq!(
            base_of(&model),
            bits,
            "{name}: attaching leaves the base alone"
        );
        let with = model.logits();
        assert!(
            apart(&bare, &with) > 1e-3,
            "{name}: the adapter does something"
        );
        merge_adapters(&mut model, &[DEFAULT]).unwrap();
        let gap = apart(&with, &model.logits());
        assert!(gap <= 1e-5, "{name}: {gap}");
        unmerge(&mut model);
        assert_eq!(base_of(&model), bits, "{name}");
        assert_eq!(model.logits(), with, "{name}");
        set_enabled(&mut model, false);
        assert_eq!(model.logits(), bare, "{name}");
        set_enabled(&mut model, true);
        assert_eq!(model.logits(), with, "{name}");
        let mut gone = model.clone();
        detach(&mut gone);
        assert_eq!(gone.logits(), bare, "{name}");
        merge(&mut model).unwrap();
        let gap = apart(&with, &model.logits());
        assert!(gap <= 1e-5 && trainable(&model).is_empty(), "{name}: {gap}");
    }
}

#[test]
fn gradients_reach_every_parameter_of_the_adapter_and_nothing_else() {
    let device = Device::flex().autodiff();
    for case in cases() {
        let name = case.name;
        let model = case.adapted(&Device::flex()).train();
        let grads = model
            .forward(ids(&device))
            .powf_scalar(2.0)
            .mean()
            .backward();
        let found = export_gradients(&model, &grads).unwrap();
        for (key, _, shape) in trainable(&model) {
            // A rank that the budget took away has nothing to move.
            if shape.contains(&0) {
                continue;
            }
            let gradient = found.iter().find(|(k, ..)| *k == key);
            let moves = gradient.is_some_and(|(.., g)| g.iter().any(|v| *v != 0.0));
            assert!(moves, "{name}: {key}");
        }
        if case.is_full() {
            continue;
        }
        model.for_each_slot_ref(&mut |module, slot| {
            let reached = match slot {
                SlotRef::Linear(l) => {
                    let bias = l
                        .bias
                        .as_ref()
                        .is_some_and(|b| b.val().grad(&grads).is_some());
                    bias || l.weight.dense().grad(&grads).is_some()
                }
                SlotRef::Embedding(e) => e.weight.dense().grad(&grads).is_some(),
                SlotRef::Norm(n) => n.weight.val().grad(&grads).is_some(),
                SlotRef::Conv(n) => n.weight.val().grad(&grads).is_some(),
                SlotRef::Param(n) => n.weight.val().grad(&grads).is_some(),
            };
            assert!(!reached, "{name}: {module}");
        });
    }
}

/// The forward pass takes short cuts, and so does its gradient; the folded weights take none.
#[test]
fn gradients_are_those_of_the_folded_weights() {
    let device = Device::flex().autodiff();
    for case in not_full() {
        let model = case.adapted(&Device::flex()).train();
        let gradients = |output: burn::tensor::Tensor<3>| {
            let grads = output.powf_scalar(2.0).mean().backward();
            export_gradients(&model, &grads).unwrap()
        };
        let short = gradients(model.forward(ids(&device)));
        let long = gradients(model.dense(ids(&device)));
        for ((key, _, short), (other, _, long)) in short.iter().zip(&long) {
            assert_eq!(key, other);
            let gap = apart(long, short);
            assert!(
                gap <= 1e-4 || short.is_empty(),
                "{}: {key}: {gap}",
                case.name
            );
        }
        assert_eq!(short.len(), long.len(), "{}", case.name);
    }
}

#[test]
fn a_model_in_training_computes_what_it_does_out_of_it() {
    for case in cases() {
        let model = case.adapted(&Device::flex());
        let without = model.logits();
        let training = model.train();
        let gap = apart(&without, &training.logits());
        assert!(gap <= 1e-5, "{}: {gap}", case.name);
        assert_eq!(training.valid().logits(), without, "{}", case.name);
    }
}

#[test]
#[allow(deprecated)]
fn flex_and_ndarray_agree_on_values_and_gradients() {
    for case in cases() {
        let run = |device: &Device| {
            let model = case.adapted(device);
            let logits = model.logits();
            let model = model.train();
            let output = model.forward(ids(&device.clone().autodiff()));
            let grads = output.powf_scalar(2.0).mean().backward();
            (logits, export_gradients(&model, &grads).unwrap())
        };
        let (flex, ndarray) = (run(&Device::flex()), run(&Device::ndarray()));
        let gap = apart(&flex.0, &ndarray.0);
        assert!(gap <= 1e-5, "{}: {gap}", case.name);
        assert_eq!(flex.1.len(), ndarray.1.len(), "{}", case.name);
        for ((key, _, a), (_, _, b)) in flex.1.iter().zip(&ndarray.1) {
            let gap = apart(a, b);
            assert!(gap <= 1e-4 || a.is_empty(), "{}: {key}: {gap}", case.name);
        }
    }
}

#[test]
fn it_works_beside_a_tied_head() {
    for case in not_full() {
        let mut model = Tiny::with(&Device::flex(), false);
        let bare = model.logits();
        // Those that name the head do not fit.
        if crate::attach(&mut model, &case.config, 3).is_err() {
            assert_eq!(model.logits(), bare, "{}", case.name);
            continue;
        }
        if case.starts_unchanged {
            assert!(apart(&bare, &model.logits()) <= 1e-5, "{}", case.name);
        }
        crate::testing::perturb(&mut model);
        let with = model.logits();
        set_enabled(&mut model, false);
        assert_eq!(model.logits(), bare, "{}", case.name);
        set_enabled(&mut model, true);
        merge_adapters(&mut model, &[DEFAULT]).unwrap();
        // A merged table is the head's too, which its factors were not.
        if !shares_table(&model) {
            let gap = apart(&with, &model.logits());
            assert!(gap <= 1e-5, "{}: {gap}", case.name);
        }
        unmerge(&mut model);
        assert_eq!(model.logits(), with, "{}", case.name);
    }
}

/// Whether the embedding carries factors that a tied head does not follow.
fn shares_table(model: &Tiny) -> bool {
    let mut found = false;
    model.for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Embedding(table) = slot {
            found |= table.parts.iter().any(|part| part.tokens.is_none());
        }
    });
    found
}

//! Every method beside a base that is packed: it computes and trains as beside the base's dense values.

use burn::module::Module;
use burn::tensor::Device;
use enamel_kernels::BaseWeight;

use super::dropout::pairs;
use super::{apart, cases};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::testing::{Tiny, generator, ids, nf4, packed, perturb};
use crate::{AdapterConfig, AdapterError, attach, export_gradients};

/// Products of the same numbers in another order, through two blocks and back.
const TOLERANCE: f32 = 1e-5;

fn dequantised(device: &Device) -> Tiny {
    Tiny::holding(device, true, &|values| {
        BaseWeight::from(nf4(values).dense())
    })
}

/// Logits and the gradients of what is trained, with the generator in a known state where dropout draws.
type Outcome = (Vec<f32>, Vec<(String, Vec<f32>)>);

fn train(base: &Tiny, config: &AdapterConfig, device: &Device) -> Outcome {
    let mut model = base.clone();
    attach(&mut model, config, 3).unwrap();
    perturb(&mut model);
    let model = model.train();
    let device = device.clone().autodiff();
    device.seed(5);
    let output = model.forward(ids(&device));
    let logits = output.clone().into_data().try_into_vec().unwrap();
    let grads = output.powf_scalar(2.0).mean().backward();
    let grads = export_gradients(&model, &grads).unwrap();
    let grads = grads.into_iter().map(|(key, _, values)| (key, values));
    (logits, grads.collect())
}

fn same(name: &str, got: &Outcome, want: &Outcome) {
    let gap = apart(&want.0, &got.0);
    assert!(gap <= TOLERANCE, "{name}: {gap}");
    assert!(!got.1.is_empty(), "{name}");
    assert_eq!(got.1.len(), want.1.len(), "{name}");
    for ((key, got), (other, want)) in got.1.iter().zip(&want.1) {
        assert_eq!(key, other, "{name}");
        let gap = apart(want, got);
        assert!(gap <= TOLERANCE || got.is_empty(), "{name}: {key}: {gap}");
    }
}

#[allow(deprecated)]
fn devices() -> [Device; 2] {
    [Device::flex(), Device::ndarray()]
}

#[test]
fn every_method_trains_beside_a_packed_base_as_beside_its_values_or_is_refused() {
    let _alone = generator();
    for device in devices() {
        let (packed, dense) = (packed(&device), dequantised(&device));
        for case in cases() {
            if case.is_full() {
                let refused = attach(&mut packed.clone(), &case.config, 3);
                let Err(AdapterError::Plan { problems }) = refused else {
                    panic!("{}", case.name);
                };
                // Seven layers in each of two blocks.
                assert_eq!(problems.len(), 14);
                assert!(problems[0].contains("held in nf4"), "{}", problems[0]);
                continue;
            }
            let got = train(&packed, &case.config, &device);
            let want = train(&dense, &case.config, &device);
            same(case.name, &got, &want);
        }
    }
}

#[test]
fn every_dropout_drops_beside_a_packed_base_what_it_does_beside_its_values() {
    let _alone = generator();
    for device in devices() {
        let (packed, dense) = (packed(&device), dequantised(&device));
        for (name, config, _) in pairs() {
            let got = train(&packed, &config, &device);
            let want = train(&dense, &config, &device);
            same(name, &got, &want);
        }
    }
}

/// What was packed stays so: nothing puts dense values in its place.
#[test]
fn a_packed_base_stays_packed_in_training() {
    for case in cases().into_iter().filter(|case| !case.is_full()) {
        let mut model = packed(&Device::flex());
        attach(&mut model, &case.config, 3).unwrap();
        let model = model.train();
        let mut count = 0;
        model.for_each_slot_ref(&mut |_, slot| {
            if let SlotRef::Linear(linear) = slot {
                count += usize::from(linear.weight.packed().is_some());
            }
        });
        assert_eq!(count, 14, "{}", case.name);
    }
}

//! What every method owes on a base that is held in bf16: what it does on the same values in f32.

use burn::module::Module;
use burn::tensor::{DType, Device};
use enamel_kernels::{BaseWeight, Compute, HostValues};

use super::*;
use crate::base::base_param::BaseParam;
use crate::layers::adaptable::Slot;
use crate::testing::ids;
use crate::{attach, export_gradients, merge};

/// The tiny model with the values of its matrices rounded to bf16, and held in it if `held`.
fn rounded(held: bool, compute: Compute) -> Tiny {
    let device = Device::flex();
    let mut model = Tiny::new(&device);
    let hold = |name: &str, weight: &BaseParam| {
        let shape = weight.dims();
        let values = weight.dense().into_data().try_into_vec().unwrap();
        let values = HostValues::F32(values).rounded();
        let tensor = match held {
            true => values.into_tensor(shape, &device),
            false => HostValues::F32(values.into_f32()).into_tensor(shape, &device),
        };
        assert_eq!(tensor.dtype() == DType::BF16, held);
        BaseParam::new(&format!("{name}.weight"), BaseWeight::new(tensor, compute))
    };
    model.for_each_slot(&mut |name, slot| match slot {
        Slot::Linear(linear) => linear.weight = hold(name, &linear.weight),
        Slot::Embedding(table) => table.weight = hold(name, &table.weight),
        Slot::Norm(_) | Slot::Conv(_) | Slot::Param(_) => {}
    });
    model
}

type Outcome = (Vec<f32>, Vec<crate::HostTensor>, Vec<f32>);

/// Logits, gradients of a loss, and logits after merging.
fn outcome(case: &Case, mut model: Tiny) -> Outcome {
    attach(&mut model, &case.config, 3).unwrap();
    perturb(&mut model);
    let logits = model.logits();
    let training = model.clone().train();
    let output = training.forward(ids(&Device::flex().autodiff()));
    let grads = output.powf_scalar(2.0).mean().backward();
    let gradients = export_gradients(&training, &grads).unwrap();
    if !matches!(case.config, AdapterConfig::Full(_)) {
        merge(&mut model).unwrap();
    }
    (logits, gradients, model.logits())
}

fn compare(case: &Case, got: &Outcome, want: &Outcome, tolerance: f32) {
    let near = |what: &str, got: &[f32], want: &[f32]| {
        let gap = apart(want, got);
        assert!(gap <= tolerance, "{}: {what}: {gap}", case.name);
    };
    near("logits", &got.0, &want.0);
    near("merged", &got.2, &want.2);
    assert_eq!(got.1.len(), want.1.len(), "{}", case.name);
    for ((key, shape, got), (other, _, want)) in got.1.iter().zip(&want.1) {
        assert_eq!(key, other);
        assert_eq!(shape.iter().product::<usize>(), got.len());
        if !got.is_empty() {
            near(key, got, want);
        }
    }
}

#[test]
fn every_method_trains_and_merges_on_a_bf16_base_as_on_its_values_in_f32() {
    for case in cases() {
        let want = outcome(&case, rounded(false, Compute::F32));
        compare(
            &case,
            &outcome(&case, rounded(true, Compute::F32)),
            &want,
            1e-5,
        );
        // Ten rows of 64 to 96 products of which each factor is off by 2⁻⁹ at most, a few layers deep.
        compare(
            &case,
            &outcome(&case, rounded(true, Compute::Bf16)),
            &want,
            5e-2,
        );
    }
}

#[test]
fn a_bf16_base_comes_back_to_the_bit_and_in_bf16_when_an_adapter_is_unmerged() {
    let mut model = rounded(true, Compute::F32);
    attach(&mut model, &lora(), 3).unwrap();
    perturb(&mut model);
    let before = base_of(&model);
    crate::merge_adapters(&mut model, &[crate::DEFAULT]).unwrap();
    assert!(base_of(&model) != before);
    crate::unmerge(&mut model);
    assert_eq!(base_of(&model), before);
    let dtype = model.layers[0].first().weight.get().values().dtype();
    assert_eq!(dtype, DType::BF16);
}

#[test]
fn what_is_trained_of_a_bf16_base_is_f32() {
    let mut model = rounded(true, Compute::Bf16);
    let config = LoraConfig {
        modules_to_save: Some(strings(&["lm_head", "embed_tokens"])),
        ..lora()
    };
    attach(&mut model, &config, 3).unwrap();
    let mut copies = 0;
    crate::for_each_trainable(&model, &mut |key, param| {
        let crate::ParamRef::Matrix(param) = param else {
            return;
        };
        copies += usize::from(key.contains("lm_head") || key.contains("embed"));
        assert_eq!(param.val().dtype(), DType::F32, "{key}");
    });
    assert_eq!(copies, 2);
    let mut whole = rounded(true, Compute::Bf16);
    attach(&mut whole, &crate::FullConfig::default(), 3).unwrap();
    crate::for_each_trainable(&whole, &mut |key, param| {
        if let crate::ParamRef::Matrix(param) = param {
            assert_eq!(param.val().dtype(), DType::F32, "{key}");
        }
    });
}

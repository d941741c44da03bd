//! When a layer hands itself to the fused operations, and that those compute what it does.

use burn::module::Module;
use burn::tensor::Device;
use enamel_kernels::{Compute, project};

use super::{cases, loha, lora};
use crate::testing::{Tiny, difference, fill, generator, perturb};
use crate::{
    AdapterConfig, Bias, FullConfig, InitLora, Linear, LoraConfig, attach, attach_as,
    merge_adapters, set_active, set_enabled, set_rows,
};

fn adapted(config: &AdapterConfig, device: &Device) -> Tiny {
    let mut model = Tiny::new(device);
    attach(&mut model, config, 5).unwrap();
    perturb(&mut model);
    model
}

/// Whether the layer fuses; its fused result must be what it computes.
fn fuses(what: &str, layer: &Linear) -> bool {
    // Dropout draws its mask: both ways the same one.
    let device = layer.weight.dense().device();
    device.seed(9);
    let Some(projection) = layer.fused() else {
        return false;
    };
    device.seed(9);
    let x = fill([3, 64], 1, &device) * 10.0;
    let values = |tensor: burn::tensor::Tensor<2>| tensor.into_data().try_into_vec().unwrap();
    let fused = project(x.clone(), None, vec![projection], Compute::F32);
    // 64 products of values up to 1, in another order.
    assert!(
        difference(&values(fused), &values(layer.forward(x))) < 1e-5,
        "{what}"
    );
    true
}

#[test]
fn every_method_computes_the_same_where_it_fuses() {
    let _alone = generator();
    let mut fused = 0;
    for case in cases() {
        let model = adapted(&case.config, &Device::flex());
        fused += usize::from(fuses(case.name, model.layers[0].first()));
        let training = adapted(&case.config, &Device::flex().autodiff()).train();
        fused += usize::from(fuses(case.name, training.layers[0].first()));
    }
    assert!(fused > 2, "{fused}");
}

#[test]
fn a_frozen_base_with_one_plain_lora_fuses() {
    let _alone = generator();
    let with = |change: fn(&mut LoraConfig)| {
        let mut config = lora();
        change(&mut config);
        AdapterConfig::from(config)
    };
    // The configuration; whether it fuses in training and out of it.
    let table: Vec<(&str, AdapterConfig, bool, bool)> = vec![
        ("LoRA", with(|_| ()), true, true),
        ("rsLoRA", with(|c| c.use_rslora = true), true, true),
        (
            "PiSSA",
            with(|c| c.init_lora_weights = InitLora::Pissa),
            true,
            true,
        ),
        ("DoRA", with(|c| c.use_dora = true), false, false),
        ("dropout", with(|c| c.lora_dropout = 0.5), true, true),
        (
            "PiSSA and dropout",
            with(|c| {
                c.init_lora_weights = InitLora::Pissa;
                c.lora_dropout = 0.5;
            }),
            false,
            true,
        ),
        (
            "a bias of its own",
            with(|c| c.lora_bias = true),
            false,
            false,
        ),
        (
            "the base's bias",
            with(|c| c.bias = Bias::LoraOnly),
            false,
            true,
        ),
        (
            "a copy",
            with(|c| {
                c.target_modules = super::list(&["v_proj"]);
                c.modules_to_save = Some(vec!["q_proj".into()]);
            }),
            false,
            true,
        ),
        ("LoHa", loha(2).into(), false, false),
        ("everything", FullConfig::default().into(), false, true),
    ];
    for (name, config, in_training, otherwise) in table {
        let model = adapted(&config, &Device::flex().autodiff()).train();
        let layer = |model: &Tiny| fuses(name, model.layers[0].first());
        assert_eq!(layer(&model), in_training, "{name}, in training");
        assert_eq!(layer(&model.valid()), otherwise, "{name}, otherwise");
    }
}

#[test]
fn routing_decides_whether_a_layer_fuses() {
    let _alone = generator();
    let mut model = adapted(&lora().into(), &Device::flex());
    attach_as(&mut model, "second", &lora(), 6).unwrap();
    perturb(&mut model);
    let layer = |model: &Tiny| fuses("routing", model.layers[0].first());
    set_active(&mut model, &["default", "second"]).unwrap();
    assert!(!layer(&model), "two adapters");
    set_enabled(&mut model, false);
    assert!(layer(&model), "adapters are off");
    set_enabled(&mut model, true);
    set_rows(&mut model, &[Some("second"), None, None]).unwrap();
    assert!(!layer(&model), "rows differ");
    set_active(&mut model, &["second"]).unwrap();
    assert!(layer(&model), "the second alone");
    set_active(&mut model, &[]).unwrap();
    assert!(layer(&model), "none");
    merge_adapters(&mut model, &["default"]).unwrap();
    assert!(layer(&model), "merged");
}

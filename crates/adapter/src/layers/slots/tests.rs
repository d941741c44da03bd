//! Convolutions and bare parameters: counted, trained, saved and merged, and no target of a method.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::base::module_shape::{ModuleKind, elements};
use crate::config::Targets;
use crate::methods::full::FullConfig;
use crate::methods::lora::config::LoraConfig;
use crate::model::trainable::for_each_param_of;
use crate::{DEFAULT, Frozen, Linear, ModuleShape, attach, merge_adapters, shapes, unmerge};

/// The first layers of a ViT, by their names in transformers' files.
#[derive(Module, Debug)]
struct Patches {
    cls_token: Frozen<3>,
    position_embeddings: Frozen<3>,
    projection: Frozen<4>,
    query: Linear,
}

crate::slots!(model Patches {
    cls_token: "embeddings.cls_token",
    position_embeddings: "embeddings.position_embeddings",
    projection: "embeddings.patch_embeddings.projection",
    query,
});

const CONV: &str = "embeddings.patch_embeddings.projection";

fn patches() -> Patches {
    let device = Device::flex().autodiff();
    let bias = format!("{CONV}.bias");
    let projection = Frozen::new(
        &format!("{CONV}.weight"),
        Tensor::ones([4, 3, 2, 2], &device),
    );
    Patches {
        cls_token: Frozen::new("embeddings.cls_token", Tensor::ones([1, 1, 4], &device)),
        position_embeddings: Frozen::new(
            "embeddings.position_embeddings",
            Tensor::ones([1, 5, 4], &device),
        ),
        projection: projection.with_bias(&bias, Tensor::zeros([4], &device)),
        query: Linear::new("query", Tensor::ones([4, 4], &device), None),
    }
}

fn params(model: &Patches) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    for_each_param_of(model, "default", &mut |key, param| {
        all.push((key.to_owned(), param.shape()));
    });
    all
}

#[test]
fn they_are_described_as_what_they_are() {
    let shapes = shapes(&patches());
    let kinds: Vec<_> = shapes.iter().map(|module| module.kind).collect();
    let wanted = [
        ModuleKind::Param,
        ModuleKind::Param,
        ModuleKind::Conv,
        ModuleKind::Linear,
    ];
    assert_eq!(kinds, wanted);
    let names: Vec<_> = shapes
        .iter()
        .flat_map(ModuleShape::tensors)
        .map(|(name, _)| name)
        .collect();
    let wanted = [
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.bias",
        "embeddings.patch_embeddings.projection.weight",
        "query.weight",
    ];
    assert_eq!(names, wanted);
    assert_eq!(
        shapes.iter().map(elements).sum::<usize>(),
        4 + 20 + 48 + 4 + 16
    );
}

#[test]
fn full_fine_tuning_trains_them_under_their_own_names() {
    let mut model = patches();
    let plan = attach(&mut model, &FullConfig::default(), 1).unwrap();
    let params = params(&model);
    let names: Vec<_> = params.iter().map(|(name, _)| name.as_str()).collect();
    let wanted = [
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
        "query.weight",
    ];
    assert_eq!(names, wanted);
    let numbers = |shape: &Vec<usize>| shape.iter().product::<usize>();
    let count: usize = params.iter().map(|(_, shape)| numbers(shape)).sum();
    assert_eq!((count, plan.trainable), (92, 92));
}

#[test]
fn a_method_that_targets_one_is_refused_by_name() {
    let cfg = |name: &str| LoraConfig {
        r: 2,
        target_modules: Some(Targets::List(vec![name.to_owned(), "query".to_owned()])),
        ..LoraConfig::default()
    };
    let refusal = |name| {
        attach(&mut patches(), &cfg(name), 1)
            .unwrap_err()
            .to_string()
    };
    let conv = refusal("projection");
    assert!(
        conv.contains(CONV) && conv.contains("convolution"),
        "{conv}"
    );
    let token = refusal("cls_token");
    assert!(
        token.contains("embeddings.cls_token is a parameter"),
        "{token}"
    );
}

#[test]
fn a_trained_copy_of_a_convolution_is_merged_and_taken_out_again() {
    let mut model = patches();
    let cfg = LoraConfig {
        r: 2,
        target_modules: Some(Targets::List(vec!["query".to_owned()])),
        modules_to_save: Some(vec!["projection".to_owned()]),
        ..LoraConfig::default()
    };
    attach(&mut model, &cfg, 1).unwrap();
    let saved = |own: &str| format!("base_model.model.{CONV}.{own}");
    let names: Vec<_> = params(&model).into_iter().map(|(name, _)| name).collect();
    assert!(
        names.contains(&saved("weight")) && names.contains(&saved("bias")),
        "{names:?}"
    );
    for part in &mut model.projection.parts {
        part.saved = part
            .saved
            .take()
            .map(|copy| copy.map(|x| x.detach().mul_scalar(2.0)));
    }
    let sum = |model: &Patches| {
        let weight = model.projection.weight.val().inner();
        weight.sum().into_scalar::<f32>()
    };
    merge_adapters(&mut model, &[DEFAULT]).unwrap();
    assert_eq!(sum(&model), 96.0);
    unmerge(&mut model);
    assert_eq!(sum(&model), 48.0);
}

#[test]
fn a_bare_parameter_has_no_copy_of_its_own() {
    let cfg = LoraConfig {
        r: 2,
        target_modules: Some(Targets::List(vec!["query".to_owned()])),
        modules_to_save: Some(vec!["cls_token".to_owned()]),
        ..LoraConfig::default()
    };
    let error = attach(&mut patches(), &cfg, 1).unwrap_err().to_string();
    assert!(
        error.contains("embeddings.cls_token is a parameter"),
        "{error}"
    );
}

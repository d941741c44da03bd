//! Several adapters on one model against PEFT: one at a time, together, a row each, merged.

use burn::tensor::Device;
use enamel_adapter::{
    adapters, delete, load_pretrained_as, merge_adapters, set_active, set_rows, unmerge,
};
use enamel_model::Model;

use crate::on_every_device;
use crate::parity::llama::logits;
use crate::support::adapted::{base, base_values, folder, input};
use crate::support::goldens::{Tensors, assert_close};

on_every_device!(
    one_at_a_time_together_and_none,
    each_row_of_a_batch_has_its_own,
    two_are_merged_and_taken_out_again,
);

fn loaded(device: &Device) -> Model {
    let mut model = base("several", device);
    for name in ["a", "b", "c"] {
        load_pretrained_as(&mut model, name, &folder("combine").join(name), false)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    assert_eq!(adapters(&model), ["a", "b", "c"]);
    model
}

fn golden() -> Tensors {
    Tensors::open(folder("several").join("case.safetensors"))
}

/// Logits of order one: 1e-5, as with one adapter.
fn compare(model: &Model, golden: &Tensors, name: &str, device: &Device) {
    let (input, _) = input(golden, "", device);
    assert_close(
        name,
        &logits(model, &input),
        &golden.floats(name).values,
        1e-5,
    );
}

fn one_at_a_time_together_and_none(device: &Device) {
    let (mut model, golden) = (loaded(device), golden());
    // The one that was loaded last is in use.
    compare(&model, &golden, "c", device);
    for name in ["a", "b", "c", "a+b", "a+b+c"] {
        let names: Vec<&str> = name.split('+').collect();
        set_active(&mut model, &names).unwrap_or_else(|e| panic!("{name}: {e}"));
        compare(&model, &golden, name, device);
    }
    let (input, _) = input(&golden, "", device);
    let plain = logits(&base("several", device), &input);
    set_active(&mut model, &[]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(logits(&model, &input), plain);

    // Without one of two, the other is left.
    set_active(&mut model, &["b", "c"]).unwrap_or_else(|e| panic!("{e}"));
    delete(&mut model, "c").unwrap_or_else(|e| panic!("{e}"));
    compare(&model, &golden, "b", device);
    assert_eq!(adapters(&model), ["a", "b"]);
}

fn each_row_of_a_batch_has_its_own(device: &Device) {
    let (mut model, golden) = (loaded(device), golden());
    set_rows(&mut model, &[Some("a"), Some("b"), None]).unwrap_or_else(|e| panic!("{e}"));
    compare(&model, &golden, "mixed", device);
}

fn two_are_merged_and_taken_out_again(device: &Device) {
    let (mut model, golden) = (loaded(device), golden());
    let before = base_values(&model);
    merge_adapters(&mut model, &["a", "b"]).unwrap_or_else(|e| panic!("{e}"));
    let (input, _) = input(&golden, "", device);
    // Rounded once more than the sum of products.
    let theirs = golden.floats("merged.a+b").values;
    assert_close("merged.a+b", &logits(&model, &input), &theirs, 2e-5);
    assert!(set_active(&mut model, &["c"]).is_err(), "they are merged");
    unmerge(&mut model);
    assert_eq!(base_values(&model), before);
    set_active(&mut model, &["a"]).unwrap_or_else(|e| panic!("{e}"));
    compare(&model, &golden, "a", device);
}

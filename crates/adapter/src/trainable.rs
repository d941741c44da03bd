//! The adapter's parameters in a fixed order, to count, store and restore them.

use burn::module::ParamId;
use burn::tensor::Gradients;

use crate::error::{AdapterError, Result};
use crate::methods::{ParamMut, ParamRef};
use crate::plan::PREFIX;
use crate::slot::{Adaptable, Slot, SlotRef};

/// Calls `f` with every parameter of the adapter (trained copies of `modules_to_save` included) under
/// its key in PEFT's file, in the model's order.
pub fn for_each_trainable<M: Adaptable>(model: &M, f: &mut dyn FnMut(&str, ParamRef<'_>)) {
    model.for_each_slot_ref(&mut |name, slot| match slot {
        SlotRef::Linear(linear) => {
            if let Some(adapter) = &linear.adapter {
                adapter
                    .for_each_param(&mut |own, param| f(&format!("{PREFIX}{name}.{own}"), param));
            }
            if let Some(saved) = &linear.saved {
                f(
                    &format!("{PREFIX}{name}.weight"),
                    ParamRef::Matrix(&saved.weight),
                );
                if let Some(bias) = &saved.bias {
                    f(&format!("{PREFIX}{name}.bias"), ParamRef::Vector(bias));
                }
            }
        }
        SlotRef::Embedding(table) => {
            if let Some(saved) = &table.saved {
                f(&format!("{PREFIX}{name}.weight"), ParamRef::Matrix(saved));
            }
        }
        SlotRef::Norm(norm) => {
            if let Some(saved) = &norm.saved {
                f(&format!("{PREFIX}{name}.weight"), ParamRef::Vector(saved));
            }
        }
    });
}

/// The same, to change them.
pub fn for_each_trainable_mut<M: Adaptable>(model: &mut M, f: &mut dyn FnMut(&str, ParamMut<'_>)) {
    model.for_each_slot(&mut |name, slot| match slot {
        Slot::Linear(linear) => {
            if let Some(adapter) = &mut linear.adapter {
                adapter.for_each_param_mut(&mut |own, param| {
                    f(&format!("{PREFIX}{name}.{own}"), param)
                });
            }
            if let Some(saved) = &mut linear.saved {
                f(
                    &format!("{PREFIX}{name}.weight"),
                    ParamMut::Matrix(&mut saved.weight),
                );
                if let Some(bias) = &mut saved.bias {
                    f(&format!("{PREFIX}{name}.bias"), ParamMut::Vector(bias));
                }
            }
        }
        Slot::Embedding(table) => {
            if let Some(saved) = &mut table.saved {
                f(&format!("{PREFIX}{name}.weight"), ParamMut::Matrix(saved));
            }
        }
        Slot::Norm(norm) => {
            if let Some(saved) = &mut norm.saved {
                f(&format!("{PREFIX}{name}.weight"), ParamMut::Vector(saved));
            }
        }
    });
}

/// Key, id and shape of every parameter of the adapter.
pub fn trainable<M: Adaptable>(model: &M) -> Vec<(String, ParamId, Vec<usize>)> {
    let mut all = Vec::new();
    for_each_trainable(model, &mut |key, param| {
        all.push((key.to_string(), param.id(), param.shape()))
    });
    all
}

/// A tensor on the host: key in PEFT's file, shape, values (row-major).
pub type HostTensor = (String, Vec<usize>, Vec<f32>);

/// Key, shape and values (bit for bit) of every parameter of the adapter.
pub fn export_trainable<M: Adaptable>(model: &M) -> Result<Vec<HostTensor>> {
    let mut all = Vec::new();
    for_each_trainable(model, &mut |key, param| {
        all.push(
            param
                .read(key)
                .map(|values| (key.to_string(), param.shape(), values)),
        );
    });
    all.into_iter().collect()
}

/// Key, shape and gradient of every parameter of the adapter that the backward pass reached.
pub fn export_gradients<M: Adaptable>(model: &M, grads: &Gradients) -> Result<Vec<HostTensor>> {
    let mut all = Vec::new();
    for_each_trainable(model, &mut |key, param| {
        let gradient = param.gradient(key, grads).transpose();
        all.extend(gradient.map(|g| g.map(|values| (key.to_string(), param.shape(), values))));
    });
    all.into_iter().collect()
}

/// Puts back what [`export_trainable`] returned. Names and shapes must be exactly the adapter's; all
/// differences are reported, and then nothing is changed.
pub fn import_trainable<M: Adaptable>(model: &mut M, state: Vec<HostTensor>) -> Result<()> {
    let have = trainable(model);
    let mut problems = Vec::new();
    for (key, _, shape) in &have {
        match state
            .iter()
            .filter(|(k, ..)| k == key)
            .collect::<Vec<_>>()
            .as_slice()
        {
            [] => problems.push(format!("{key} is missing")),
            [(_, stored, _)] if stored != shape => {
                problems.push(format!(
                    "{key} is {stored:?} where the adapter has {shape:?}"
                ));
            }
            [(_, _, values)] if values.len() != shape.iter().product::<usize>() => {
                problems.push(format!(
                    "{key} has {} values for shape {shape:?}",
                    values.len()
                ));
            }
            [_] => {}
            _ => problems.push(format!("{key} is there more than once")),
        }
    }
    let unexpected = state
        .iter()
        .filter(|(key, ..)| !have.iter().any(|(k, ..)| k == key));
    problems.extend(unexpected.map(|(key, ..)| format!("{key} is not part of the adapter")));
    if !problems.is_empty() {
        return Err(AdapterError::Import { problems });
    }
    let mut values: std::collections::HashMap<String, Vec<f32>> = state
        .into_iter()
        .map(|(key, _, values)| (key, values))
        .collect();
    for_each_trainable_mut(model, &mut |key, mut param| {
        if let Some(values) = values.remove(key) {
            param.write(values);
        }
    });
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::testing::{Tiny, perturb};
    use crate::{LoraConfig, attach};
    use burn::tensor::Device;

    fn adapted() -> Tiny {
        let cfg = LoraConfig {
            modules_to_save: Some(vec!["lm_head".into()]),
            ..LoraConfig::default()
        };
        let mut model = Tiny::new(&Device::flex());
        attach(&mut model, &cfg, 1).unwrap();
        model
    }

    #[test]
    fn values_come_back_to_the_bit_and_ids_stay() {
        let mut model = adapted();
        perturb(&mut model);
        let state = export_trainable(&model).unwrap();
        let mut other = adapted();
        import_trainable(&mut other, state.clone()).unwrap();
        assert_eq!(export_trainable(&other).unwrap(), state);
        assert_eq!(trainable(&other), trainable(&model));
        assert_eq!(other.logits(), model.logits());
    }

    #[test]
    fn all_differences_are_reported_and_nothing_is_changed() {
        let mut model = adapted();
        let before = export_trainable(&model).unwrap();
        let mut state = before.clone();
        state[0].0 = "elsewhere".into();
        state[1].1 = vec![1, 2];
        state[2].2.pop();
        let again = state[3].clone();
        state.push(again);
        let Err(AdapterError::Import { problems }) = import_trainable(&mut model, state) else {
            panic!()
        };
        for part in [
            "lora_A.weight is missing",
            "is [1, 2] where",
            "511 values",
            "more than once",
            "elsewhere is not",
        ] {
            assert!(
                problems.iter().any(|p| p.contains(part)),
                "{part} not in {problems:#?}"
            );
        }
        assert_eq!(problems.len(), 5);
        assert_eq!(export_trainable(&model).unwrap(), before);
    }
}

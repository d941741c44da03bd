//! The parameters of an adapter in a fixed order, to count, store and restore them.

use std::collections::HashMap;

use burn::module::{Param, ParamId};
use burn::tensor::{Gradients, Tensor};

use crate::base::routing::DEFAULT;
use crate::base::to_host;
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, Slot, SlotRef, model_part};
use crate::layers::frozen::Frozen;
use crate::methods::{ParamMut, ParamRef};
use crate::plan::PREFIX;

/// Calls `f` with every trained parameter of the adapter called `adapter` (copies, biases and single
/// rows included) under its key in PEFT's file, in the model's order. Where the base itself is trained,
/// these are its own parameters under their own names. Adapters that are trained along with a part at the
/// model itself (X-LoRA's experts) come after it, under their keys with their name and a slash before it.
pub fn for_each_param_of<M: Adaptable>(
    model: &M,
    adapter: &str,
    f: &mut dyn FnMut(&str, ParamRef<'_>),
) {
    let whole = adapter == DEFAULT;
    model.for_each_slot_ref(&mut |name, slot| {
        let key = |own: &str| format!("{PREFIX}{name}.{own}");
        match slot {
            SlotRef::Linear(linear) => {
                if whole && linear.trains_base {
                    if let Some(weight) = linear.weight.param() {
                        f(&format!("{name}.weight"), ParamRef::Matrix(weight));
                    }
                    if let Some(bias) = &linear.bias {
                        f(&format!("{name}.bias"), ParamRef::Vector(bias));
                    }
                }
                let Some(part) = linear.part(adapter) else {
                    return;
                };
                if let Some(adapter) = &part.adapter {
                    adapter.for_each_param(&mut |own, param| f(&key(own), param));
                }
                if let Some(saved) = &part.saved {
                    f(&key("weight"), ParamRef::Matrix(&saved.weight));
                    if let Some(bias) = &saved.bias {
                        f(&key("bias"), ParamRef::Vector(bias));
                    }
                }
                if let Some(bias) = &part.bias {
                    f(
                        &key(bias_name(part.adapter.is_some())),
                        ParamRef::Vector(bias),
                    );
                }
            }
            SlotRef::Embedding(table) => {
                if whole
                    && table.trains_base
                    && let Some(weight) = table.weight.param()
                {
                    f(&format!("{name}.weight"), ParamRef::Matrix(weight));
                }
                let Some(part) = table.part(adapter) else {
                    return;
                };
                if let Some(lora) = &part.lora {
                    lora.for_each_param(&mut |own, param| f(&key(own), param));
                }
                if let Some(saved) = &part.saved {
                    f(&key("weight"), ParamRef::Matrix(saved));
                }
                if let Some(tokens) = &part.tokens {
                    f(&key(TOKENS), ParamRef::Matrix(&tokens.delta));
                }
            }
            SlotRef::Norm(norm) => frozen_params(norm, (name, "weight"), adapter, f),
            SlotRef::Conv(conv) => frozen_params(conv, (name, "weight"), adapter, f),
            SlotRef::Param(param) => frozen_params(param, (name, ""), adapter, f),
        }
    });
    if let Some(part) = model_part(model).filter(|_| whole) {
        part.for_each_param(f);
        for member in part.trained_along().iter() {
            for_each_param_of(model, member, &mut |key, param| {
                f(&format!("{member}/{key}"), param)
            });
        }
    }
}

const TOKENS: &str = "token_adapter.trainable_tokens_delta";

/// An adapted layer's own bias lies one level deeper in PEFT's model.
fn bias_name(is_target: bool) -> &'static str {
    if is_target { "base_layer.bias" } else { "bias" }
}

/// The trained parameters of a module that is used as a whole. `own` is what its weight is called behind the
/// module's name; a bare parameter's is called as the module itself.
fn frozen_params<const D: usize>(
    module: &Frozen<D>,
    (name, own): (&str, &str),
    adapter: &str,
    f: &mut dyn FnMut(&str, ParamRef<'_>),
) where
    for<'a> ParamRef<'a>: From<&'a Param<Tensor<D>>>,
{
    if adapter == DEFAULT && module.trains_base {
        f(&under(name, own), (&module.weight).into());
        if let Some(bias) = &module.bias {
            f(&under(name, "bias"), bias.into());
        }
    }
    for part in module.parts.iter().filter(|part| part.name == adapter) {
        let key = |own: &str| format!("{PREFIX}{}", under(name, own));
        if let Some(saved) = &part.saved {
            f(&key(own), saved.into());
        }
        if let Some(bias) = &part.bias {
            f(&key("bias"), bias.into());
        }
    }
}

/// [`frozen_params`], to change them.
fn frozen_params_mut<const D: usize>(
    module: &mut Frozen<D>,
    (name, own): (&str, &str),
    adapter: &str,
    f: &mut dyn FnMut(&str, ParamMut<'_>),
) where
    for<'a> ParamMut<'a>: From<&'a mut Param<Tensor<D>>>,
{
    if adapter == DEFAULT && module.trains_base {
        f(&under(name, own), (&mut module.weight).into());
        if let Some(bias) = &mut module.bias {
            f(&under(name, "bias"), bias.into());
        }
    }
    for part in module.parts.iter_mut().filter(|part| part.name == adapter) {
        let key = |own: &str| format!("{PREFIX}{}", under(name, own));
        if let Some(saved) = &mut part.saved {
            f(&key(own), saved.into());
        }
        if let Some(bias) = &mut part.bias {
            f(&key("bias"), bias.into());
        }
    }
}

/// `name.own`, or the name alone.
fn under(name: &str, own: &str) -> String {
    match own {
        "" => name.to_owned(),
        own => format!("{name}.{own}"),
    }
}

/// [`for_each_param_of`], to change them.
pub fn for_each_param_of_mut<M: Adaptable>(
    model: &mut M,
    adapter: &str,
    f: &mut dyn FnMut(&str, ParamMut<'_>),
) {
    let whole = adapter == DEFAULT;
    model.for_each_slot(&mut |name, slot| {
        let key = |own: &str| format!("{PREFIX}{name}.{own}");
        match slot {
            Slot::Linear(linear) => {
                if whole && linear.trains_base {
                    if let Some(weight) = linear.weight.param_mut() {
                        f(&format!("{name}.weight"), ParamMut::Matrix(weight));
                    }
                    if let Some(bias) = &mut linear.bias {
                        f(&format!("{name}.bias"), ParamMut::Vector(bias));
                    }
                }
                for part in linear.parts.iter_mut().filter(|p| p.name == adapter) {
                    let is_target = part.adapter.is_some();
                    if let Some(adapter) = &mut part.adapter {
                        adapter.for_each_param_mut(&mut |own, param| f(&key(own), param));
                    }
                    if let Some(saved) = &mut part.saved {
                        f(&key("weight"), ParamMut::Matrix(&mut saved.weight));
                        if let Some(bias) = &mut saved.bias {
                            f(&key("bias"), ParamMut::Vector(bias));
                        }
                    }
                    if let Some(bias) = &mut part.bias {
                        f(&key(bias_name(is_target)), ParamMut::Vector(bias));
                    }
                }
            }
            Slot::Embedding(table) => {
                if whole
                    && table.trains_base
                    && let Some(weight) = table.weight.param_mut()
                {
                    f(&format!("{name}.weight"), ParamMut::Matrix(weight));
                }
                for part in table.parts.iter_mut().filter(|p| p.name == adapter) {
                    if let Some(lora) = &mut part.lora {
                        lora.for_each_param_mut(&mut |own, param| f(&key(own), param));
                    }
                    if let Some(saved) = &mut part.saved {
                        f(&key("weight"), ParamMut::Matrix(saved));
                    }
                    if let Some(tokens) = &mut part.tokens {
                        f(&key(TOKENS), ParamMut::Matrix(&mut tokens.delta));
                    }
                }
            }
            Slot::Norm(norm) => frozen_params_mut(norm, (name, "weight"), adapter, f),
            Slot::Conv(conv) => frozen_params_mut(conv, (name, "weight"), adapter, f),
            Slot::Param(param) => frozen_params_mut(param, (name, ""), adapter, f),
        }
    });
    let Some(part) = model.model_part_mut().filter(|_| whole) else {
        return;
    };
    part.for_each_param_mut(f);
    for member in part.trained_along().iter() {
        for_each_param_of_mut(model, member, &mut |key, param| {
            f(&format!("{member}/{key}"), param)
        });
    }
}

/// [`for_each_param_of`] the adapter called [`DEFAULT`].
pub fn for_each_trainable<M: Adaptable>(model: &M, f: &mut dyn FnMut(&str, ParamRef<'_>)) {
    for_each_param_of(model, DEFAULT, f);
}

/// [`for_each_trainable`], to change them.
pub fn for_each_trainable_mut<M: Adaptable>(model: &mut M, f: &mut dyn FnMut(&str, ParamMut<'_>)) {
    for_each_param_of_mut(model, DEFAULT, f);
}

/// Key, id and shape of every trained parameter of the adapter called [`DEFAULT`].
pub fn trainable<M: Adaptable>(model: &M) -> Vec<(String, ParamId, Vec<usize>)> {
    let mut all = Vec::new();
    for_each_trainable(model, &mut |key, param| {
        all.push((key.to_string(), param.id(), param.shape()))
    });
    all
}

/// A tensor on the host: key in PEFT's file, shape, values (row-major).
pub type HostTensor = (String, Vec<usize>, Vec<f32>);

/// Key, shape and values (bit for bit) of every trained parameter of the adapter called [`DEFAULT`].
pub fn export_trainable<M: Adaptable>(model: &M) -> Result<Vec<HostTensor>> {
    export_params_of(model, DEFAULT)
}

/// The same of the adapter called `adapter`.
pub fn export_params_of<M: Adaptable>(model: &M, adapter: &str) -> Result<Vec<HostTensor>> {
    let mut all = Vec::new();
    for_each_param_of(model, adapter, &mut |key, param| {
        all.push(
            param
                .read(key)
                .map(|values| (key.to_string(), param.shape(), values)),
        );
    });
    all.into_iter().collect()
}

/// The frozen tensors that the layers of one adapter share.
pub(crate) fn export_shared_of<M: Adaptable>(model: &M, adapter: &str) -> Result<Vec<HostTensor>> {
    let mut found = Vec::new();
    model.for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Linear(linear) = slot
            && let Some(adapter) = linear.part(adapter).and_then(|part| part.adapter.as_ref())
            && found.is_empty()
        {
            found = adapter.shared();
        }
    });
    found
        .into_iter()
        .map(|(key, tensor)| {
            let shape = tensor.dims().to_vec();
            Ok((key.to_string(), shape, to_host(key, tensor)?))
        })
        .collect()
}

/// Key, shape and values of what an adapter's parameters started from, where the base is understood to
/// have given that up; `None` where it gave up nothing.
pub(crate) fn export_origin_of<M: Adaptable>(
    model: &M,
    adapter: &str,
) -> Result<Option<Vec<HostTensor>>> {
    let mut found = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot
            && let Some(adapter) = linear.part(adapter).and_then(|part| part.adapter.as_ref())
            && let Some(origin) = adapter.initial_factors()
        {
            let mut names = Vec::new();
            adapter.for_each_param(&mut |own, _| names.push(format!("{PREFIX}{name}.{own}")));
            found.extend(names.into_iter().zip(origin));
        }
    });
    if found.is_empty() {
        return Ok(None);
    }
    let read = found.into_iter().map(|(key, tensor)| {
        let shape = tensor.dims().to_vec();
        let values = to_host(&key, tensor)?;
        Ok((key, shape, values))
    });
    read.collect::<Result<_>>().map(Some)
}

/// Key, shape and gradient of every parameter of the adapter called [`DEFAULT`] that the backward pass reached.
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
    let mut values: HashMap<String, Vec<f32>> = state
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

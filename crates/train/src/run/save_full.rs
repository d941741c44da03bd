//! A model whose own weights were trained, as a directory in Hugging Face layout.

use std::path::Path;

use enamel_adapter::{Adaptable, ModuleShape, SlotRef};
use enamel_model::Model;
use enamel_model::checkpoint::Checkpoint;
use enamel_model::save::{self, SaveDtype, SaveOptions};

use crate::error::TrainError;

/// Writes it in f32, which loses nothing, into a new directory; tokenizer and settings come from `source`.
///
/// # Errors
/// When a weight cannot be read back or the disk refuses.
pub fn write(model: &Model, source: &Checkpoint, dir: &Path) -> Result<(), TrainError> {
    let options = SaveOptions::new(SaveDtype::F32).for_model(model.config());
    let read = &mut |name: &str| values(model, name);
    save::write_hf(dir, &tensors(model), read, source, &options)?;
    Ok(())
}

/// Names and shapes of all weights, in the model's order.
pub fn tensors(model: &Model) -> Vec<(String, Vec<usize>)> {
    let modules = enamel_adapter::shapes(model);
    modules.iter().flat_map(ModuleShape::tensors).collect()
}

/// The values of one of [`tensors`].
///
/// # Errors
/// No such tensor.
pub fn values(
    model: &Model,
    tensor: &str,
) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
    let mut data = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let parameter = tensor
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('.'));
        match (parameter, slot) {
            (Some("weight"), SlotRef::Linear(linear)) => {
                let weight = linear.weight.dense();
                let stored = match linear.is_stored_transposed() {
                    true => weight.transpose(),
                    false => weight,
                };
                data = Some(stored.into_data())
            }
            (Some("bias"), SlotRef::Linear(linear)) => {
                data = linear.bias.as_ref().map(|bias| bias.val().into_data());
            }
            (Some("weight"), SlotRef::Embedding(table)) => {
                data = Some(table.weight.dense().into_data())
            }
            (Some("weight"), SlotRef::Norm(norm)) => data = Some(norm.weight.val().into_data()),
            (Some("bias"), SlotRef::Norm(norm)) => {
                data = norm.bias.as_ref().map(|bias| bias.val().into_data());
            }
            (Some("weight"), SlotRef::Conv(conv)) => data = Some(conv.weight.val().into_data()),
            (Some("bias"), SlotRef::Conv(conv)) => {
                data = conv.bias.as_ref().map(|bias| bias.val().into_data());
            }
            (None, SlotRef::Param(param)) if tensor == name => {
                data = Some(param.weight.val().into_data());
            }
            _ => {}
        }
    });
    let data = data.ok_or("the model has no such tensor")?;
    Ok(data.iter::<f32>().collect())
}

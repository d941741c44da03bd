//! What this crate's tests share: a tiny configuration and a checkpoint in memory.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::{Adaptable, SlotRef};
use serde_json::{Value, json};

use crate::Model;
use crate::arch::llama::Llama;
use crate::arch::{AnyBackbone, ArchConfig};
use crate::checkpoint::{CheckpointError, SourceDtype, TensorInfo, TensorSource};

/// The devices that every test of the forward pass runs on.
pub fn devices() -> [Device; 2] {
    #[allow(deprecated)] // Burn 0.22 still has NdArray, and so have we
    [Device::flex(), Device::ndarray()]
}

/// Two blocks of width 16 with grouped heads; `changes` are merged into the file.
pub fn tiny_config(changes: Value) -> ArchConfig {
    let mut json = json!({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.3
    });
    json.as_object_mut()
        .unwrap()
        .extend(changes.as_object().unwrap().clone());
    ArchConfig::from_json(&json).unwrap()
}

/// Row-major token ids on a device.
pub fn ids(rows: &[&[i64]], device: &Device) -> Tensor<2, Int> {
    let shape = [rows.len(), rows[0].len()];
    Tensor::from_data(TensorData::new(rows.concat(), shape), device)
}

/// A tensor's values.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// The largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// A checkpoint in memory.
#[derive(Default)]
pub struct MemorySource {
    infos: Vec<TensorInfo>,
    values: BTreeMap<String, Vec<f32>>,
}

impl MemorySource {
    /// All parameters of a model.
    pub fn of(model: &Model) -> Self {
        let mut source = Self::default();
        model.for_each_slot_ref(&mut |name, slot| {
            let (weight, shape, bias) = match slot {
                SlotRef::Linear(l) => {
                    let bias = l.bias.as_ref().map(|b| values(b.val()));
                    (values(l.weight.dense()), l.weight.dims().to_vec(), bias)
                }
                SlotRef::Embedding(e) => (values(e.weight.dense()), e.weight.dims().to_vec(), None),
                SlotRef::Conv(_) | SlotRef::Param(_) => unreachable!("no model has one yet"),
                SlotRef::Norm(n) => {
                    let bias = n.bias.as_ref().map(|b| values(b.val()));
                    (values(n.weight.val()), n.weight.dims().to_vec(), bias)
                }
            };
            source.put(&format!("{name}.weight"), &shape, weight);
            if let Some(bias) = bias {
                source.put(&format!("{name}.bias"), &[bias.len()], bias);
            }
        });
        source
    }

    /// Adds or replaces a tensor.
    pub fn put(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.remove(name);
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.values.insert(name.clone(), values);
        self.infos.push(TensorInfo {
            name,
            shape,
            dtype: SourceDtype::F32,
        });
    }

    /// Removes a tensor and returns its values.
    pub fn remove(&mut self, name: &str) -> Option<Vec<f32>> {
        self.infos.retain(|info| info.name != name);
        self.values.remove(name)
    }

    /// Forgets the values, so that reading any is an error.
    pub fn without_values(mut self) -> Self {
        self.values.clear();
        self
    }
}

impl TensorSource for MemorySource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.values.get(name).cloned().unwrap_or_default())
    }
}

/// The blocks of a model of Llama's architecture.
pub fn llama(model: &Model) -> &Llama {
    match &model.backbone {
        AnyBackbone::Llama(llama) => llama,
        other => panic!("{other:?}"),
    }
}

//! The model that this crate's tests adapt: the layers of a small Llama under a Llama's names, joined by
//! simpler arithmetic, so that every layer has a say in the output.
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};

use enamel_kernels::quantized::formats::{FloatKind, FourBitOptions, FourBitTensor};
use enamel_kernels::{BaseWeight, PackedRows, PackedWeight};

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::layers::adaptable::{Adaptable, Slot, SlotRef};
use crate::{Embedding, Frozen, Linear};

pub const HIDDEN: usize = 64;
pub const KV: usize = 32;
pub const INNER: usize = 96;
pub const VOCAB: usize = 256;

#[derive(Module, Debug)]
pub struct Block {
    norm: Frozen<1>,
    linear: Vec<Linear>,
}

impl Block {
    /// Its q_proj.
    pub fn first(&self) -> &Linear {
        &self.linear[0]
    }
}

#[derive(Module, Debug)]
pub struct Tiny {
    embed: Embedding,
    pub layers: Vec<Block>,
    norm: Frozen<1>,
    pub head: Option<Linear>,
}

/// A matrix in NF4, in blocks of 64.
pub fn nf4(values: Tensor<2>) -> PackedWeight {
    let (shape, device) = (values.dims(), values.device());
    let values = values.into_data().try_into_vec::<f32>().unwrap();
    let rows = FourBitTensor::quantise(&values, &shape, FourBitOptions::default()).unwrap();
    PackedWeight::new(PackedRows::FourBit(rows), FloatKind::F32, &device).unwrap()
}

/// [`Tiny::new`] with the blocks' layers in NF4.
pub fn packed(device: &Device) -> Tiny {
    Tiny::holding(device, true, &|values| nf4(values).into())
}

const LAYERS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", KV, HIDDEN),
    ("self_attn.v_proj", KV, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", INNER, HIDDEN),
    ("mlp.up_proj", INNER, HIDDEN),
    ("mlp.down_proj", HIDDEN, INNER),
];

impl Tiny {
    /// Two blocks with biases and a head of its own.
    pub fn new(device: &Device) -> Self {
        Self::with(device, true)
    }

    pub fn with(device: &Device, untied: bool) -> Self {
        Self::holding(device, untied, &BaseWeight::from)
    }

    /// The same with the weights of the blocks' layers held as `hold` holds them.
    pub fn holding(device: &Device, untied: bool, hold: &dyn Fn(Tensor<2>) -> BaseWeight) -> Self {
        let block = |i: usize| Block {
            norm: Frozen::new(
                &format!("model.layers.{i}.input_layernorm.weight"),
                fill([HIDDEN], 90 + i, device) + 1.0,
            ),
            linear: LAYERS
                .iter()
                .enumerate()
                .map(|(j, (name, out, width))| {
                    let bias = Some(fill([*out], 50 + 7 * i + j, device));
                    Linear::new(
                        &format!("model.layers.{i}.{name}"),
                        hold(fill([*out, *width], 10 * i + j, device)),
                        bias,
                    )
                })
                .collect(),
        };
        Self {
            embed: Embedding::new(
                "model.embed_tokens.weight",
                fill([VOCAB, HIDDEN], 70, device) * 5.0,
            ),
            layers: (0..2).map(block).collect(),
            norm: Frozen::new("model.norm.weight", fill([HIDDEN], 95, device) + 1.0),
            head: untied.then(|| {
                Linear::new(
                    "lm_head",
                    fill([VOCAB, HIDDEN], 80, device),
                    Some(fill([VOCAB], 81, device)),
                )
            }),
        }
    }

    /// `[batch, time]` to `[batch, time, vocabulary]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.embed.forward(ids);
        let x = self.between(x, &|linear, x| linear.forward(x));
        match &self.head {
            Some(head) => head.forward(x),
            None => x.matmul(self.embed.head_weight().dense().transpose().unsqueeze()),
        }
    }

    /// The same by the weights into which the adapter is folded, with a head of its own.
    pub fn dense(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let product = |linear: &Linear, x: Tensor<3>| {
            let y = x.matmul(linear.weight_in_use().transpose().unsqueeze());
            y + linear.bias_in_use().unwrap().unsqueeze()
        };
        let table = self.embed.folded(&[crate::DEFAULT.to_string()]).dense();
        let x = burn::tensor::module::embedding(table, ids);
        product(self.head.as_ref().unwrap(), self.between(x, &product))
    }

    /// From the embedding to the head.
    fn between(
        &self,
        mut x: Tensor<3>,
        layer: &dyn Fn(&Linear, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        for block in &self.layers {
            let h = x.clone() * block.norm.val().unsqueeze();
            let [q, k, v, o, gate, up, down] = [0, 1, 2, 3, 4, 5, 6].map(|i| &block.linear[i]);
            let kv = Tensor::cat(vec![layer(k, h.clone()), layer(v, h.clone())], 2);
            let inner = activation::silu(layer(gate, h.clone())) * layer(up, h.clone());
            x = x + layer(o, (layer(q, h) * 0.5).tanh() + kv) + layer(down, inner);
        }
        x * self.norm.val().unsqueeze()
    }

    /// Its output on a fixed input.
    pub fn logits(&self) -> Vec<f32> {
        self.forward(ids(&self.embed.weight.device()))
            .into_data()
            .try_into_vec()
            .unwrap()
    }
}

pub fn ids(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..10).map(|i| (i * 37 + 5) % VOCAB as i64).collect();
    Tensor::from_data(TensorData::new(ids, [2, 5]), device)
}

/// Values in ±0.1 that differ between tensors.
pub fn fill<const D: usize>(shape: [usize; D], salt: usize, device: &Device) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let value = |i: usize| ((i * 7919 + salt * 104_729) % 2003) as f32 / 10_015.0 - 0.1;
    Tensor::from_data(
        TensorData::new((0..count).map(value).collect::<Vec<f32>>(), shape),
        device,
    )
}

impl Adaptable for Tiny {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        f("model.embed_tokens", Slot::Embedding(&mut self.embed));
        for (i, block) in self.layers.iter_mut().enumerate() {
            f(
                &format!("model.layers.{i}.input_layernorm"),
                Slot::Norm(&mut block.norm),
            );
            for ((name, ..), linear) in LAYERS.iter().zip(&mut block.linear) {
                f(&format!("model.layers.{i}.{name}"), Slot::Linear(linear));
            }
        }
        f("model.norm", Slot::Norm(&mut self.norm));
        if let Some(head) = &mut self.head {
            f("lm_head", Slot::Linear(head));
        }
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        f("model.embed_tokens", SlotRef::Embedding(&self.embed));
        for (i, block) in self.layers.iter().enumerate() {
            f(
                &format!("model.layers.{i}.input_layernorm"),
                SlotRef::Norm(&block.norm),
            );
            for ((name, ..), linear) in LAYERS.iter().zip(&block.linear) {
                f(&format!("model.layers.{i}.{name}"), SlotRef::Linear(linear));
            }
        }
        f("model.norm", SlotRef::Norm(&self.norm));
        if let Some(head) = &self.head {
            f("lm_head", SlotRef::Linear(head));
        }
    }
}

/// A Llama by its sizes alone.
pub struct LlamaSizes {
    pub layers: usize,
    pub hidden: usize,
    pub kv: usize,
    pub inner: usize,
    pub vocab: usize,
    pub tied: bool,
}

impl LlamaSizes {
    pub fn modules(&self) -> Vec<ModuleShape> {
        let mut all = Vec::new();
        let mut add = |name: String, kind, shape: &[usize]| {
            all.push(ModuleShape {
                name,
                kind,
                shape: shape.to_vec(),
                bias: false,
                transposed: false,
            });
        };
        add(
            "model.embed_tokens".into(),
            ModuleKind::Embedding,
            &[self.vocab, self.hidden],
        );
        for i in 0..self.layers {
            for (name, out, width) in [
                ("self_attn.q_proj", self.hidden, self.hidden),
                ("self_attn.k_proj", self.kv, self.hidden),
                ("self_attn.v_proj", self.kv, self.hidden),
                ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.inner, self.hidden),
                ("mlp.up_proj", self.inner, self.hidden),
                ("mlp.down_proj", self.hidden, self.inner),
            ] {
                add(
                    format!("model.layers.{i}.{name}"),
                    ModuleKind::Linear,
                    &[out, width],
                );
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                add(
                    format!("model.layers.{i}.{name}"),
                    ModuleKind::Norm,
                    &[self.hidden],
                );
            }
        }
        add("model.norm".into(), ModuleKind::Norm, &[self.hidden]);
        if !self.tied {
            add(
                "lm_head".into(),
                ModuleKind::Head,
                &[self.vocab, self.hidden],
            );
        }
        all
    }
}

/// The largest difference between two outputs.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Gives every parameter of the adapter values that are not its initial ones.
pub fn perturb<M: Adaptable>(model: &mut M) {
    perturb_as(model, crate::DEFAULT, 0);
}

/// The same for the adapter called `name`; other values for another `salt`.
pub fn perturb_as<M: Adaptable>(model: &mut M, name: &str, salt: usize) {
    let mut i = salt;
    crate::for_each_param_of_mut(model, name, &mut |key, mut param| {
        let mut values = param.as_ref().read(key).unwrap();
        for (j, value) in values.iter_mut().enumerate() {
            *value += ((i * 31 + j * 17) % 13) as f32 / 130.0 - 0.046;
        }
        param.write(values);
        i += 1;
    });
}

/// Held while a test seeds the backend or draws from it: all threads share its generator.
pub fn generator() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

//! The fused block against its separate operations.
#![allow(clippy::unwrap_used)]

use burn::module::Module;
use burn::tensor::{Device, Gradients, TensorData};
use enamel_adapter::{Adaptable, InitLora, LoraConfig, SlotRef, Targets, attach, set_enabled};
use enamel_kernels::{AttentionSpec, attention, rope};
use serde_json::json;

use super::*;
use crate::Model;
use crate::arch::llama::Llama;
use crate::testing::{llama, tiny_config, values};

impl DecoderLayer {
    /// [`Self::forward`] in separate operations.
    fn separate(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let attn = &self.self_attn;
        let normed = rms_norm(x.clone(), self.input_layernorm.val(), self.eps);
        let heads = |y: Tensor<3>| {
            let [batch, tokens, width] = y.dims();
            y.reshape([batch, tokens, width / attn.head_dim, attn.head_dim])
        };
        let turn = |y: Tensor<4>| rope(y, positions.cos.clone(), positions.sin.clone());
        let q = turn(heads(attn.q_proj.forward(normed.clone())));
        let k = turn(heads(attn.k_proj.forward(normed.clone())));
        let v = heads(attn.v_proj.forward(normed));
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, k, v),
            None => (k, v),
        };
        let spec = AttentionSpec {
            causal: true,
            scale: (attn.head_dim as f64).sqrt().recip(),
            offset: positions.offset,
            sliding_window: None,
            key_mask: None,
            segments: None,
        };
        let y = attention(q, k, v, &spec).flatten(2, 3);
        let x = x + attn.o_proj.forward(y);
        let normed = rms_norm(x.clone(), self.post_attention_layernorm.val(), self.eps);
        x + self.mlp.forward(normed)
    }
}

fn adapted(targets: Targets, device: &Device) -> Llama {
    let changes = json!({"attention_bias": true, "mlp_bias": true, "num_hidden_layers": 1});
    let mut model = Model::random(&tiny_config(changes), 3, device).unwrap();
    let config = LoraConfig {
        r: 3,
        lora_alpha: 6.0,
        init_lora_weights: InitLora::Random,
        target_modules: Some(targets),
        ..LoraConfig::default()
    };
    attach(&mut model, &config, 1).unwrap();
    llama(&model).clone()
}

/// Numbers between -1 and 1 that no other test has a hand in, as it would in the device's generator.
fn input(device: &Device) -> Tensor<3> {
    let values: Vec<f32> = (0..2 * 7 * 16)
        .map(|i| (i * 67 % 101) as f32 / 50.5 - 1.0)
        .collect();
    Tensor::from_data(TensorData::new(values, [2, 7, 16]), device)
}

/// The gradients of all that is trained, by module and parameter.
fn gradients(model: &Llama, grads: &Gradients) -> Vec<(String, Vec<f32>)> {
    let mut found = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        let SlotRef::Linear(linear) = slot else {
            return;
        };
        for adapter in linear.parts.iter().filter_map(|p| p.adapter.as_ref()) {
            adapter.for_each_param(&mut |parameter, p| {
                let name = format!("{name}.{parameter}");
                if let Some(gradient) = p.gradient(&name, grads).unwrap() {
                    found.push((name, gradient));
                }
            });
        }
    });
    found
}

/// Sums of up to 24 products in another order, through a block of four layers and two norms.
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 2e-6 * largest, "{what}: {got} {want}");
    }
}

#[test]
fn the_fused_block_computes_what_its_separate_operations_do() {
    let device = Device::flex().autodiff();
    for targets in [
        Targets::AllLinear,
        Targets::List(vec!["q_proj".into(), "up_proj".into()]),
        Targets::List(vec!["down_proj".into(), "o_proj".into()]),
    ] {
        let model = adapted(targets.clone(), &device);
        let positions = model.positions(0, 7, None, &device);
        let layer = &model.layers[0];
        assert!(layer.mlp.fused().is_some() && layer.self_attn.o_proj.fused().is_some());
        let run = |fused: bool| {
            let x = input(&device).require_grad();
            let y = if fused {
                layer.forward(x.clone(), &positions, None)
            } else {
                layer.separate(x.clone(), &positions, None)
            };
            let weights = input(&device);
            let grads = (y.clone() * weights).sum().backward();
            let mut all = gradients(&model, &grads);
            all.push(("x".into(), values(x.grad(&grads).unwrap())));
            (values(y), all)
        };
        let (got, want) = (run(true), run(false));
        assert_close("output", &got.0, &want.0);
        assert!(want.1.len() >= 5);
        assert_eq!(got.1.len(), want.1.len());
        for ((name, got), (_, want)) in got.1.iter().zip(&want.1) {
            assert_close(name, got, want);
        }
    }
}

/// A token after cached ones, out of training; with the adapters in use and off.
#[test]
fn the_fused_block_decodes_as_its_separate_operations_do() {
    let device = Device::flex();
    let mut model = adapted(Targets::AllLinear, &device.clone().autodiff()).valid();
    for enabled in [true, false] {
        set_enabled(&mut model, enabled);
        let run = |fused: bool| {
            let mut cache = KvCache::new();
            let x = input(&device);
            let mut ys = Vec::new();
            for (from, count) in [(0, 6), (6, 1)] {
                let positions = model.positions(from, count, None, &device);
                let x = x.clone().narrow(1, from, count);
                let layer = &model.layers[0];
                let at = Some((&mut cache, 0));
                ys.extend(values(if fused {
                    layer.forward(x, &positions, at)
                } else {
                    layer.separate(x, &positions, at)
                }));
                cache.advance(count);
            }
            ys
        };
        assert_close("decoding", &run(true), &run(false));
    }
}

/// A trained norm takes the separate path and gets its gradient.
#[test]
fn a_trained_norm_is_not_fused() {
    let device = Device::flex().autodiff();
    let changes = json!({"num_hidden_layers": 1});
    let mut model = Model::random(&tiny_config(changes), 3, &device).unwrap();
    let config = LoraConfig {
        target_modules: Some(Targets::AllLinear),
        modules_to_save: Some(vec!["post_attention_layernorm".into()]),
        ..LoraConfig::default()
    };
    attach(&mut model, &config, 1).unwrap();
    let model = llama(&model);
    let positions = model.positions(0, 7, None, &device);
    let y = model.layers[0].forward(input(&device), &positions, None);
    let grads = y.powf_scalar(2.0).sum().backward();
    let norm = &model.layers[0].post_attention_layernorm;
    assert!(
        norm.parts[0]
            .saved
            .as_ref()
            .unwrap()
            .val()
            .grad(&grads)
            .is_some()
    );
}

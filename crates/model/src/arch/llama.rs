//! Llama (Touvron et al., 2023) and its siblings Mistral and Qwen2, parameter by parameter as in
//! transformers' `modeling_llama.py`.

use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use enamel_adapter::{Adaptable, Embedding, Frozen, Linear, Slot, SlotRef, XLora};
use enamel_kernels::{
    AttentionSpec, BaseWeight, Compute, HostValues, KeyMask, Norm, PackedWeight, Projection,
    attention, attention_qkv, fuses, project, project_add, rms_norm, rope, silu_mul,
    swiglu_project,
};

use crate::causal_lm::{LoadError, ModelInput};
use crate::config::LlamaConfig;
use crate::generation::kv_cache::KvCache;
use crate::nn::recompute::train_blocks;

/// Hands out a parameter's values by full name and shape.
pub(crate) type Fetch<'a> = dyn FnMut(&str, &[usize]) -> Result<HostValues, LoadError> + 'a;

/// Hands out a linear layer's weight by the layer's name, if it is to be held packed.
pub(crate) type Pack<'a> = dyn FnMut(&str) -> Result<Option<PackedWeight>, LoadError> + 'a;

/// A decoder with a language-model head.
#[derive(Module, Debug)]
pub struct Llama {
    /// `model.embed_tokens` `[vocabulary, hidden]`.
    pub embed_tokens: Embedding,
    /// `model.layers.N`.
    pub layers: Vec<Layer>,
    /// `model.norm`.
    pub norm: Frozen<1>,
    /// `lm_head`; absent when the head is the embedding.
    pub lm_head: Option<Linear>,
    /// The classifier of an X-LoRA, where the model carries one.
    pub gate: Option<XLora>,
    #[module(skip)]
    config: LlamaConfig,
    /// Blocks a segment that training runs again in the backward pass.
    #[module(skip)]
    pub(crate) recompute: Option<NonZeroUsize>,
}

/// One block: attention, then the MLP, each behind a norm and beside a residual.
#[derive(Module, Debug)]
pub struct Layer {
    /// `self_attn`.
    pub self_attn: Attention,
    /// `mlp`.
    pub mlp: Mlp,
    /// `input_layernorm`.
    pub input_layernorm: Frozen<1>,
    /// `post_attention_layernorm`.
    pub post_attention_layernorm: Frozen<1>,
    #[module(skip)]
    eps: f64,
}

/// Grouped-query self-attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `q_proj` `[heads · head_dim, hidden]`.
    pub q_proj: Linear,
    /// `k_proj` `[kv_heads · head_dim, hidden]`.
    pub k_proj: Linear,
    /// `v_proj` `[kv_heads · head_dim, hidden]`.
    pub v_proj: Linear,
    /// `o_proj` `[hidden, heads · head_dim]`.
    pub o_proj: Linear,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    sliding_window: Option<usize>,
}

/// SwiGLU: `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `gate_proj` `[intermediate, hidden]`.
    pub gate_proj: Linear,
    /// `up_proj` `[intermediate, hidden]`.
    pub up_proj: Linear,
    /// `down_proj` `[hidden, intermediate]`.
    pub down_proj: Linear,
}

/// What every block needs to know of the tokens at hand.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Cosines `[tokens, head_dim / 2]`.
    pub cos: Tensor<2>,
    /// Sines `[tokens, head_dim / 2]`.
    pub sin: Tensor<2>,
    /// Position of the first token: how many the cache holds already.
    pub offset: usize,
    /// Padding among the keys, if there is any.
    pub key_mask: Option<KeyMask>,
}

impl Llama {
    /// Builds the module, asking `fetch` for each parameter in the order of [`LlamaConfig::modules`].
    /// Linear layers' weights are what `pack` makes of them; other matrices are held as `compute` says, or in
    /// bf16 where they came in it.
    pub(crate) fn build(
        config: &LlamaConfig,
        device: &Device,
        compute: Compute,
        fetch: &mut Fetch<'_>,
        pack: &mut Pack<'_>,
    ) -> Result<Self, LoadError> {
        let mut build = Builder {
            device,
            compute,
            fetch,
            pack,
        };
        let hidden = config.hidden_size;
        let inner = config.intermediate_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let embed_tokens = Embedding::new(
            "model.embed_tokens.weight",
            build.matrix("model.embed_tokens.weight", [config.vocab_size, hidden])?,
        );
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for (i, sliding_window) in config.sliding_windows.iter().enumerate() {
            let name = |rest: &str| format!("model.layers.{i}.{rest}");
            let bias = config.attention_bias;
            layers.push(Layer {
                self_attn: Attention {
                    q_proj: build.linear(&name("self_attn.q_proj"), [queries, hidden], bias)?,
                    k_proj: build.linear(&name("self_attn.k_proj"), [keys, hidden], bias)?,
                    v_proj: build.linear(&name("self_attn.v_proj"), [keys, hidden], bias)?,
                    o_proj: build.linear(
                        &name("self_attn.o_proj"),
                        [hidden, queries],
                        config.output_bias,
                    )?,
                    head_dim: config.head_dim,
                    sliding_window: *sliding_window,
                },
                mlp: Mlp {
                    gate_proj: build.linear(
                        &name("mlp.gate_proj"),
                        [inner, hidden],
                        config.mlp_bias,
                    )?,
                    up_proj: build.linear(
                        &name("mlp.up_proj"),
                        [inner, hidden],
                        config.mlp_bias,
                    )?,
                    down_proj: build.linear(
                        &name("mlp.down_proj"),
                        [hidden, inner],
                        config.mlp_bias,
                    )?,
                },
                input_layernorm: build.frozen(&name("input_layernorm"), [hidden])?,
                post_attention_layernorm: build
                    .frozen(&name("post_attention_layernorm"), [hidden])?,
                eps: config.rms_norm_eps,
            });
        }
        let norm = build.frozen("model.norm", [hidden])?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(build.linear("lm_head", [config.vocab_size, hidden], false)?)
        };
        Ok(Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            gate: None,
            config: config.clone(),
            recompute: None,
        })
    }

    /// The settings that the model was built with.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The final norm's output `[batch, tokens, hidden]`; see
    /// [`CausalLm::forward_hidden`](crate::CausalLm::forward_hidden).
    pub fn forward_hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [_, tokens] = input.input_ids.dims();
        let mut x = self.embed(input.input_ids.clone());
        let positions = self.positions(
            cache.as_ref().map_or(0, |cache| cache.len()),
            tokens,
            input.attention_mask.as_ref(),
            &x.device(),
        );
        match cache {
            None if x.device().is_autodiff() => {
                x = train_blocks(&self.layers, x, &positions, self.recompute, input.seed);
            }
            mut cache => {
                for (i, layer) in self.layers.iter().enumerate() {
                    x = layer.forward(x, &positions, cache.as_deref_mut().map(|cache| (cache, i)));
                }
                if let Some(cache) = cache {
                    cache.advance(tokens);
                }
            }
        }
        self.final_norm(x)
    }

    /// Token ids `[batch, tokens]` to the residual stream `[batch, tokens, hidden]`.
    pub fn embed(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        self.embed_tokens.forward(input_ids)
    }

    /// The rotary tables and the mask for `tokens` tokens after `offset` cached ones.
    pub fn positions(
        &self,
        offset: usize,
        tokens: usize,
        key_mask: Option<&KeyMask>,
        device: &Device,
    ) -> Positions {
        let (cos, sin) = self
            .config
            .rope
            .tables(self.config.head_dim, offset, tokens, device);
        // A mask that hides nothing would only send attention down its slower path.
        let key_mask = key_mask
            .filter(|mask| mask.valid.iter().any(|valid| !valid))
            .cloned();
        Positions {
            cos,
            sin,
            offset,
            key_mask,
        }
    }

    /// The norm after the last block.
    pub fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        rms_norm(x, self.norm.val(), self.config.rms_norm_eps)
    }
}

impl Layer {
    /// The block, `[batch, tokens, hidden]` to the same; with a cache and this block's index in it,
    /// the tokens' keys and values are appended and attention covers all that it holds.
    pub fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let x = self.attend(x, positions, cache);
        self.feed_forward(x)
    }

    /// `x + attention(norm(x))`.
    fn attend(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let (attn, norm) = (&self.self_attn, &self.input_layernorm);
        let y = attn.forward(x.clone(), norm, self.eps, positions, cache);
        match attn.o_proj.fused().filter(|_| fuses(&x)) {
            Some(o_proj) => {
                let dims = x.dims();
                project_add(rows(y), o_proj, rows(x), attn.o_proj.compute()).reshape(dims)
            }
            None => x + attn.o_proj.forward(y),
        }
    }

    /// `x + mlp(norm(x))`.
    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let norm = &self.post_attention_layernorm;
        let fused = self.mlp.fused().filter(|_| fuses(&x));
        match fused.zip(frozen(norm, self.eps)) {
            Some((MlpProjections { gate_up, down }, norm)) => {
                let dims = x.dims();
                let compute = self.mlp.down_proj.compute();
                let x = rows(x);
                let gate_up = project(x.clone(), Some(norm), gate_up, compute);
                swiglu_project(gate_up, down, Some(x), compute).reshape(dims)
            }
            None => {
                let normed = rms_norm(x.clone(), norm.val(), self.eps);
                x + self.mlp.forward(normed)
            }
        }
    }
}

/// `[batch, tokens, width]` as one row a token: a batched product would read its weight for every batch row.
fn rows(x: Tensor<3>) -> Tensor<2> {
    x.flatten(0, 1)
}

/// A norm that is not trained, as the fused operations take it.
fn frozen(norm: &Frozen<1>, eps: f64) -> Option<Norm> {
    let weight = norm.val();
    (!weight.is_tracked()).then_some(Norm { weight, eps })
}

impl Attention {
    /// The norm and all but the output's projection, `[batch, tokens, hidden]` to
    /// `[batch, tokens, heads · head_dim]`.
    fn forward(
        &self,
        x: Tensor<3>,
        norm: &Frozen<1>,
        eps: f64,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let spec = AttentionSpec {
            causal: true,
            scale: (self.head_dim as f64).sqrt().recip(),
            offset: positions.offset,
            sliding_window: self.sliding_window,
            key_mask: positions.key_mask.clone(),
            segments: None,
        };
        let (cos, sin) = (positions.cos.clone(), positions.sin.clone());
        if cache.is_none()
            && let Some(qkv) = self.side_by_side(&x, norm, eps)
        {
            let [heads, kv_heads] = self.counts();
            return attention_qkv(qkv, cos, sin, heads, kv_heads, &spec);
        }
        let (q, k, v) = self.heads(x, norm, eps);
        let q = rope(q, cos.clone(), sin.clone());
        let k = rope(k, cos, sin);
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, k, v),
            None => (k, v),
        };
        let [_, _, count, _] = q.dims();
        attention(q, k, v, &spec).reshape([batch, tokens, count * self.head_dim])
    }

    /// Queries, keys and values `[batch, tokens, heads, head_dim]` of the normalised x.
    fn heads(&self, x: Tensor<3>, norm: &Frozen<1>, eps: f64) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [batch, tokens, _] = x.dims();
        // In a graph, cutting one result into three would cost a gradient of its whole width for each.
        let whole = match x.device().is_autodiff() {
            true => None,
            false => self.side_by_side(&x, norm, eps),
        };
        if let Some(whole) = whole {
            let [heads, kv_heads] = self.counts();
            let whole = whole.reshape([batch, tokens, heads + 2 * kv_heads, self.head_dim]);
            let part = |from, count| whole.clone().narrow(2, from, count);
            return (
                part(0, heads),
                part(heads, kv_heads),
                part(heads + kv_heads, kv_heads),
            );
        }
        let x = rms_norm(x, norm.val(), eps);
        let heads = |y: Tensor<3>| {
            let count = y.dims()[2] / self.head_dim;
            y.reshape([batch, tokens, count, self.head_dim])
        };
        (
            heads(self.q_proj.forward(x.clone())),
            heads(self.k_proj.forward(x.clone())),
            heads(self.v_proj.forward(x)),
        )
    }

    /// Queries, keys and values of the normalised x in one tensor,
    /// `[batch, tokens, (heads + 2 · kv_heads) · head_dim]`, where their layers and the norm fuse.
    fn side_by_side(&self, x: &Tensor<3>, norm: &Frozen<1>, eps: f64) -> Option<Tensor<3>> {
        if !fuses(x) {
            return None;
        }
        let norm = frozen(norm, eps)?;
        let all = [&self.q_proj, &self.k_proj, &self.v_proj];
        let all = all
            .into_iter()
            .map(Linear::fused)
            .collect::<Option<Vec<_>>>()?;
        let [batch, tokens, _] = x.dims();
        let y = project(rows(x.clone()), Some(norm), all, self.q_proj.compute());
        let width = y.dims()[1];
        Some(y.reshape([batch, tokens, width]))
    }

    /// Heads of the queries, and of keys and values each.
    fn counts(&self) -> [usize; 2] {
        [&self.q_proj, &self.k_proj].map(|layer| layer.weight.dims()[0] / self.head_dim)
    }
}

/// An MLP's layers as the fused operations take them.
struct MlpProjections {
    gate_up: Vec<Projection>,
    down: Projection,
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj
            .forward(silu_mul(gate, self.up_proj.forward(x)))
    }

    fn fused(&self) -> Option<MlpProjections> {
        Some(MlpProjections {
            gate_up: vec![self.gate_proj.fused()?, self.up_proj.fused()?],
            down: self.down_proj.fused()?,
        })
    }
}

impl Adaptable for Llama {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        f(
            "model.embed_tokens",
            Slot::Embedding(&mut self.embed_tokens),
        );
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let name = |rest: &str| format!("model.layers.{i}.{rest}");
            let attn = &mut layer.self_attn;
            f(&name("self_attn.q_proj"), Slot::Linear(&mut attn.q_proj));
            f(&name("self_attn.k_proj"), Slot::Linear(&mut attn.k_proj));
            f(&name("self_attn.v_proj"), Slot::Linear(&mut attn.v_proj));
            f(&name("self_attn.o_proj"), Slot::Linear(&mut attn.o_proj));
            f(
                &name("mlp.gate_proj"),
                Slot::Linear(&mut layer.mlp.gate_proj),
            );
            f(&name("mlp.up_proj"), Slot::Linear(&mut layer.mlp.up_proj));
            f(
                &name("mlp.down_proj"),
                Slot::Linear(&mut layer.mlp.down_proj),
            );
            f(
                &name("input_layernorm"),
                Slot::Norm(&mut layer.input_layernorm),
            );
            f(
                &name("post_attention_layernorm"),
                Slot::Norm(&mut layer.post_attention_layernorm),
            );
        }
        f("model.norm", Slot::Norm(&mut self.norm));
        if let Some(head) = &mut self.lm_head {
            f("lm_head", Slot::Linear(head));
        }
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        f("model.embed_tokens", SlotRef::Embedding(&self.embed_tokens));
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |rest: &str| format!("model.layers.{i}.{rest}");
            let attn = &layer.self_attn;
            f(&name("self_attn.q_proj"), SlotRef::Linear(&attn.q_proj));
            f(&name("self_attn.k_proj"), SlotRef::Linear(&attn.k_proj));
            f(&name("self_attn.v_proj"), SlotRef::Linear(&attn.v_proj));
            f(&name("self_attn.o_proj"), SlotRef::Linear(&attn.o_proj));
            f(
                &name("mlp.gate_proj"),
                SlotRef::Linear(&layer.mlp.gate_proj),
            );
            f(&name("mlp.up_proj"), SlotRef::Linear(&layer.mlp.up_proj));
            f(
                &name("mlp.down_proj"),
                SlotRef::Linear(&layer.mlp.down_proj),
            );
            f(
                &name("input_layernorm"),
                SlotRef::Norm(&layer.input_layernorm),
            );
            f(
                &name("post_attention_layernorm"),
                SlotRef::Norm(&layer.post_attention_layernorm),
            );
        }
        f("model.norm", SlotRef::Norm(&self.norm));
        if let Some(head) = &self.lm_head {
            f("lm_head", SlotRef::Linear(head));
        }
    }

    fn gate(&self) -> Option<&XLora> {
        self.gate.as_ref()
    }

    fn gate_place(&mut self) -> Option<&mut Option<XLora>> {
        Some(&mut self.gate)
    }
}

/// Makes modules from fetched values: one parameter is in host memory at a time.
struct Builder<'a, 'f> {
    device: &'a Device,
    compute: Compute,
    fetch: &'a mut Fetch<'f>,
    pack: &'a mut Pack<'f>,
}

impl Builder<'_, '_> {
    /// A parameter's values, rounded if the base is held in bf16.
    fn values(&mut self, name: &str, shape: &[usize]) -> Result<HostValues, LoadError> {
        let values = (self.fetch)(name, shape)?;
        Ok(match self.compute {
            Compute::F32 => values,
            Compute::Bf16 => values.rounded(),
        })
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<BaseWeight, LoadError> {
        let values = self.values(name, &shape)?.into_tensor(shape, self.device);
        Ok(BaseWeight::new(values, self.compute))
    }

    /// A small parameter, in f32 whatever its values are rounded to.
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        let values = HostValues::F32(self.values(name, &shape)?.into_f32());
        Ok(values.into_tensor(shape, self.device))
    }

    fn frozen<const D: usize>(
        &mut self,
        module: &str,
        shape: [usize; D],
    ) -> Result<Frozen<D>, LoadError> {
        let name = format!("{module}.weight");
        let weight = self.tensor(&name, shape)?;
        Ok(Frozen::new(&name, weight))
    }

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<Linear, LoadError> {
        let weight = match (self.pack)(module)? {
            Some(packed) => BaseWeight::new(packed, self.compute),
            None => self.matrix(&format!("{module}.weight"), shape)?,
        };
        let bias = bias
            .then(|| self.tensor(&format!("{module}.bias"), [shape[0]]))
            .transpose()?;
        Ok(Linear::new(module, weight, bias))
    }
}

#[cfg(test)]
mod tests;

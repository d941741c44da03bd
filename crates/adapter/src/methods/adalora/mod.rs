//! AdaLoRA: `y = W·x + b + s·B·(E∘(A·drop(x)))`, `s = alpha / init_r`: a product in the form of a singular
//! value decomposition, whose rank a budget takes away where it matters least (see [`crate::methods::adalora::allocator`]).
//!
//! Formulas as in Zhang et al. 2023 (arXiv:2303.10512), names and initial values as in PEFT's
//! `tuners/adalora/`. As there, the scale keeps dividing by `init_r` when ranks have gone.

pub mod allocator;

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use enamel_kernels::lora_linear;
use serde_json::{Value, json};

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::{Pattern, peft_config};
use crate::config::{Purpose, Targets, layer_problems, probability};
use crate::error::Result;
use crate::linalg::random::gaussian;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection};

pub(crate) const A: &str = "lora_A";
pub(crate) const B: &str = "lora_B";
pub(crate) const E: &str = "lora_E";
/// PEFT's guard in the scale.
const GUARD: f64 = 1e-5;
/// Standard deviation of A and B at the start.
const DEVIATION: f64 = 0.02;

peft_config! {
    /// PEFT's `AdaLoraConfig`.
    pub struct AdaLoraConfig in "ADALORA" {
        /// Mean rank that the budget comes down to.
        target_r: usize = 8;
        /// Rank of every module at the start.
        init_r: usize = 12;
        /// Steps before the budget begins to fall.
        tinit: usize = 0;
        /// Last steps, in which ranks stay as they are.
        tfinal: usize = 0;
        /// Steps between two allocations.
        delta_t as "deltaT": usize = 1;
        /// Decay of the mean importance.
        beta1: f64 = 0.85;
        /// Decay of its mean uncertainty.
        beta2: f64 = 0.85;
        /// Weight of the term that keeps A and B orthogonal.
        orth_reg_weight: f64 = 0.5;
        /// Steps of the whole training.
        total_step: Option<usize> = None;
        /// Which of a module's `init_r` ranks are left, once the budget is spent.
        rank_pattern: Option<Pattern<Vec<bool>>> = None;
        /// Numerator of the scale.
        lora_alpha: f64 = 8.0;
        /// Probability with which an element of the adapter's input is dropped in training.
        lora_dropout: f64 = 0.0;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
        /// Only these layers (with a list of target names).
        layers_to_transform: Option<Vec<usize>> = None;
        /// The name before the layer's number.
        layers_pattern: Option<Vec<String>> = None;
        /// Start with E at zero, which changes nothing.
        init_lora_weights: bool = true;
        /// Which biases of the base are trained; only `none`.
        bias: String = "none".to_string();
    }
    written {
        "r": json!(8);
        "fan_in_fan_out": json!(false);
        "corda_config": Value::Null;
        "eva_config": Value::Null;
        "layer_replication": Value::Null;
        "loftq_config": json!({});
        "megatron_config": Value::Null;
        "megatron_core": json!("megatron.core");
        "qalora_group_size": json!(16);
        "use_qalora": json!(false);
    }
    refused {
        "alpha_pattern": "an alpha of a module's own in AdaLoRA";
        "alora_invocation_tokens": "activated LoRA";
        "arrow_config": "Arrow routing";
        "ensure_weight_tying": "adapters shared between tied layers";
        "kasa_config": "KaSA";
        "layer_replication": "replicating layers";
        "lora_bias": "a bias on lora_B in AdaLoRA";
        "megatron_config": "Megatron's parallel layers";
        "monteclora_config": "Monte Carlo LoRA";
        "target_parameters": "LoRA on bare parameters";
        "trainable_token_indices": "training single rows in AdaLoRA";
        "use_bdlora": "block-diagonal LoRA";
        "use_dora": "DoRA in AdaLoRA";
        "use_qalora": "QA-LoRA";
        "use_rslora": "the rank-stabilised scale in AdaLoRA";
        "velora_config": "VeLoRA";
    }
}

/// The three factors beside one linear layer.
#[derive(Module, Debug)]
pub struct AdaLora {
    /// `[r, in]`
    pub lora_a: Param<Tensor<2>>,
    /// `[out, r]`
    pub lora_b: Param<Tensor<2>>,
    /// `[r, 1]`
    pub lora_e: Param<Tensor<2>>,
    /// On the adapter's input only, and only in training.
    pub dropout: Dropout,
    #[module(skip)]
    scale: f64,
    /// Weight of the term that keeps A and B orthogonal.
    #[module(skip)]
    pub(crate) orth_reg_weight: f64,
}

impl AdaLora {
    fn is_empty(&self) -> bool {
        self.lora_a.dims()[0] == 0
    }

    /// `E∘A`, `[r, in]`.
    fn scaled_a(&self) -> Tensor<2> {
        self.lora_a.val() * self.lora_e.val()
    }
}

impl Method for AdaLora {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        if self.is_empty() {
            return base.forward(x);
        }
        let (a, b) = (self.scaled_a(), self.lora_b.val());
        let weight = base.weight.clone();
        let y = if self.has_dropout() {
            super::dropping(x, weight, a, b, self.scale, &self.dropout)
        } else {
            lora_linear(x, weight, a, b, self.scale)
        };
        base.plus_bias(y)
    }

    fn merged(&self, base: Base) -> Base {
        if self.is_empty() {
            return base;
        }
        let delta = self.lora_b.val().matmul(self.scaled_a());
        Base {
            weight: base.weight.map(|w| w + delta.mul_scalar(self.scale)),
            ..base
        }
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn has_dropout(&self) -> bool {
        super::at_work(&self.dropout, &self.lora_a)
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(A, ParamRef::Matrix(&self.lora_a));
        f(B, ParamRef::Matrix(&self.lora_b));
        f(E, ParamRef::Matrix(&self.lora_e));
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(A, ParamMut::Matrix(&mut self.lora_a));
        f(B, ParamMut::Matrix(&mut self.lora_b));
        f(E, ParamMut::Matrix(&mut self.lora_e));
    }
}

impl AdaLoraConfig {
    /// The key of a module in `rank_pattern`.
    pub(crate) fn pattern_key(module: &str) -> String {
        format!("{module}.{E}")
    }

    /// Which of a module's ranks are left, if the budget is spent.
    pub(crate) fn kept(&self, module: &str) -> Option<&[bool]> {
        let key = Self::pattern_key(module);
        let pattern = self.rank_pattern.as_ref()?;
        let found = pattern.iter().find(|(name, _)| *name == key);
        found.map(|(_, kept)| kept.as_slice())
    }

    /// The rank that a module has now.
    fn rank(&self, module: &str) -> usize {
        let kept = self.kept(module);
        kept.map_or(self.init_r, |kept| kept.iter().filter(|k| **k).count())
    }
}

impl MethodConfig for AdaLoraConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &DEFAULT_TARGETS,
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.init_r,
            alpha: self.lora_alpha,
            ..Selection::NOTHING
        }
    }

    fn problems(&self, purpose: Purpose) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, value) in [
            ("init_r", self.init_r),
            ("target_r", self.target_r),
            ("deltaT", self.delta_t),
        ] {
            if value == 0 {
                problems.push(format!("{key} = 0: must be at least 1"));
            }
        }
        if purpose == Purpose::Initialise && self.target_r > self.init_r {
            problems.push(format!(
                "target_r = {}: the budget falls, so it must be at most init_r = {}",
                self.target_r, self.init_r
            ));
        }
        for (key, value) in [
            ("lora_alpha", self.lora_alpha),
            ("orth_reg_weight", self.orth_reg_weight),
        ] {
            if !value.is_finite() || value <= 0.0 {
                problems.push(format!("{key} = {value}: must be greater than 0"));
            }
        }
        problems.extend(probability("lora_dropout", self.lora_dropout));
        problems.extend(probability("beta1", self.beta1));
        problems.extend(probability("beta2", self.beta2));
        if purpose == Purpose::Initialise {
            match self.total_step {
                None | Some(0) => problems.push(
                    "total_step: AdaLoRA spreads its budget over the steps of the training and must know them".into(),
                ),
                Some(total) if self.tinit + self.tfinal >= total => problems.push(format!(
                    "tinit = {} and tfinal = {} leave none of the {total} steps for the budget to fall in",
                    self.tinit, self.tfinal
                )),
                Some(_) => {}
            }
        }
        for (key, kept) in self.rank_pattern.iter().flatten() {
            if kept.len() != self.init_r {
                problems.push(format!(
                    "rank_pattern.{key:?} has {} entries where init_r = {}",
                    kept.len(),
                    self.init_r
                ));
            }
        }
        if self.bias != "none" {
            problems.push(format!(
                "bias = {:?}: AdaLoRA with trained biases is not supported; use \"none\"",
                self.bias
            ));
        }
        problems.extend(layer_problems(
            self.target_modules.as_ref(),
            self.layers_to_transform.as_deref(),
            self.layers_pattern.as_deref(),
        ));
        problems.extend(self.refused());
        problems
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        alpha / (r as f64 + GUARD)
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        let r = self.rank(&target.name);
        vec![
            (A, vec![r, target.in_features]),
            (B, vec![target.out_features, r]),
            (E, vec![r, 1]),
        ]
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        let values = self.parameters(target).into_iter().map(|(name, shape)| {
            let count = shape.iter().product();
            let deviation = match (name, self.init_lora_weights) {
                (E, true) => return vec![0.0; count],
                // Without it PEFT leaves what a fresh tensor was drawn with.
                (_, false) => 1.0,
                (_, true) => DEVIATION,
            };
            gaussian(&mut start.rng(target, name), count, deviation)
        });
        Ok(values.collect())
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let r = self.rank(&target.name);
        let mut values = values.into_iter();
        let mut param = |name: &str, shape: [usize; 2]| {
            place.param(&target.key(name), values.next().unwrap_or_default(), shape)
        };
        Adapter::AdaLora(AdaLora {
            lora_a: param(A, [r, target.in_features]),
            lora_b: param(B, [target.out_features, r]),
            lora_e: param(E, [r, 1]),
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scale: target.scale,
            orth_reg_weight: self.orth_reg_weight,
        })
    }
}

impl MethodFacts for AdaLoraConfig {
    const KEYS: &'static [&'static str] = &[A, B, E];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let (out, width) = own.pair(B, A)?;
        Some(BaseShape::Linear(out, width))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "AdaLoRA"
    }

    fn headline(&self) -> &'static [&'static str] {
        &["init_r", "target_r", "lora_alpha", "lora_dropout"]
    }

    // PEFT's file has an `r` that AdaLoRA does not use, and which of its ranks are left fills pages.
    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "init_r",
            "target_r",
            "lora_alpha",
            "lora_dropout",
            "bias",
            "modules_to_save",
        ]
    }

    fn rank(&self) -> Option<usize> {
        Some(self.init_r)
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        Weighing::Factor {
            keys: &[E],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        match self.drops_inputs() && !layer.kernels {
            true => Kept::dropped(layer, 3 * layer.rank, 0),
            // `E∘A`.
            false => Kept::low_rank(layer, layer.rank * layer.input),
        }
    }

    fn drops_inputs(&self) -> bool {
        self.lora_dropout > 0.0
    }
}

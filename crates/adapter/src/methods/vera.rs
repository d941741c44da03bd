//! VeRA: `y = W·x + b + λ_b∘(B·(λ_d∘(A·drop(x))))` with random A and B that all layers share and that are
//! never trained.
//!
//! Formulas as in Kopiczko et al. 2023 (arXiv:2310.11454), names and initial values as in PEFT's
//! `tuners/vera/`. The shared matrices come from PyTorch's own generator, so that a file without them
//! (`save_projection = false`) means the same here and there.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use enamel_kernels::lora_linear;

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::peft_config;
use crate::config::{Purpose, Targets, layer_problems, probability};
use crate::error::Result;
use crate::linalg::random::gaussian;
use crate::linalg::torch_rng::Mersenne;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection};

const LAMBDA_B: &str = "vera_lambda_b";
const LAMBDA_D: &str = "vera_lambda_d";
const SHARED_A: &str = "base_model.vera_A";
const SHARED_B: &str = "base_model.vera_B";

peft_config! {
    /// PEFT's `VeraConfig`.
    pub struct VeraConfig in "VERA" {
        /// Rank of the shared matrices.
        r: usize = 256;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
        /// Only these layers (with a list of target names).
        layers_to_transform: Option<Vec<usize>> = None;
        /// The name before the layer's number.
        layers_pattern: Option<Vec<String>> = None;
        /// Seed of the shared matrices.
        projection_prng_key: u64 = 0;
        /// Store the shared matrices with the adapter.
        save_projection: bool = true;
        /// Probability with which an element of the adapter's input is dropped in training.
        vera_dropout: f64 = 0.0;
        /// What `λ_d` starts at.
        d_initial: f64 = 0.1;
        /// Start with `λ_b` at zero, which changes nothing; else at one, and `λ_d` at random.
        init_weights: bool = true;
        /// Which biases of the base are trained; only `none`.
        bias: String = "none".to_string();
    }
    written {
        "fan_in_fan_out": serde_json::json!(false);
    }
    refused {}
}

/// The two vectors of one layer, and the matrices that it shares with all others.
#[derive(Module, Debug)]
pub struct Vera {
    /// `[out]`
    pub lambda_b: Param<Tensor<1>>,
    /// `[r]`
    pub lambda_d: Param<Tensor<1>>,
    /// `[r, widest in]`, the same tensor in every layer.
    pub shared_a: Tensor<2>,
    /// `[widest out, r]`, the same tensor in every layer.
    pub shared_b: Tensor<2>,
    /// On the adapter's input only, and only in training.
    pub dropout: Dropout,
    #[module(skip)]
    in_features: usize,
}

impl Vera {
    /// `λ_d∘A` `[r, in]` and `λ_b∘B` `[out, r]`: a LoRA of scale 1.
    fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let [r, _] = self.shared_a.dims();
        let [out] = self.lambda_b.dims();
        let a = self.shared_a.clone().slice([0..r, 0..self.in_features]);
        let b = self.shared_b.clone().slice([0..out, 0..r]);
        (
            a * self.lambda_d.val().unsqueeze_dim(1),
            b * self.lambda_b.val().unsqueeze_dim(1),
        )
    }
}

impl Method for Vera {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        let (a, b) = self.factors();
        let weight = base.weight.clone();
        let y = if self.has_dropout() {
            super::dropping(x, weight, a, b, 1.0, &self.dropout)
        } else {
            lora_linear(x, weight, a, b, 1.0)
        };
        base.plus_bias(y)
    }

    fn merged(&self, base: Base) -> Base {
        let (a, b) = self.factors();
        Base {
            weight: base.weight.map(|w| w + b.matmul(a)),
            ..base
        }
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn has_dropout(&self) -> bool {
        super::at_work(&self.dropout, &self.lambda_b)
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(LAMBDA_B, ParamRef::Vector(&self.lambda_b));
        f(LAMBDA_D, ParamRef::Vector(&self.lambda_d));
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(LAMBDA_B, ParamMut::Vector(&mut self.lambda_b));
        f(LAMBDA_D, ParamMut::Vector(&mut self.lambda_d));
    }

    fn shared(&self) -> Vec<(&'static str, Tensor<2>)> {
        vec![
            (SHARED_A, self.shared_a.clone()),
            (SHARED_B, self.shared_b.clone()),
        ]
    }
}

impl MethodConfig for VeraConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &DEFAULT_TARGETS,
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.r,
            ..Selection::NOTHING
        }
    }

    fn problems(&self, _: Purpose) -> Vec<String> {
        let mut problems = Vec::new();
        if self.r == 0 {
            problems.push("r = 0: the rank must be at least 1".into());
        }
        problems.extend(probability("vera_dropout", self.vera_dropout));
        problems.extend(layer_problems(
            self.target_modules.as_ref(),
            self.layers_to_transform.as_deref(),
            self.layers_pattern.as_deref(),
        ));
        if self.bias != "none" {
            problems.push(format!(
                "bias = {:?}: VeRA with trained biases is not supported; use \"none\"",
                self.bias
            ));
        }
        problems.extend(self.refused());
        problems
    }

    fn scale(&self, _: usize, _: f64) -> f64 {
        1.0
    }

    fn largest_rank(&self, _: usize, _: usize) -> usize {
        // Each direction of the shared space has a weight of its own, however many there are.
        usize::MAX
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        vec![
            (LAMBDA_B, vec![target.out_features]),
            (LAMBDA_D, vec![target.r]),
        ]
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        Ok(if self.init_weights {
            vec![
                vec![0.0; target.out_features],
                vec![self.d_initial as f32; target.r],
            ]
        } else {
            let rng = &mut start.rng(target, LAMBDA_D);
            vec![vec![1.0; target.out_features], gaussian(rng, target.r, 1.0)]
        })
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        let (r, width, out) = (target.r, target.in_features, target.out_features);
        let shared = |key: &str, shape: [usize; 2]| {
            let missing = || place.tensor(vec![0.0; shape[0] * shape[1]], shape);
            place.shared(key).unwrap_or_else(missing)
        };
        Adapter::Vera(Vera {
            lambda_b: place.param(&target.key(LAMBDA_B), next(), [out]),
            lambda_d: place.param(&target.key(LAMBDA_D), next(), [r]),
            shared_a: shared(SHARED_A, [r, width]),
            shared_b: shared(SHARED_B, [out, r]),
            dropout: DropoutConfig::new(self.vera_dropout).init(),
            in_features: width,
        })
    }

    fn shared(&self, targets: &[TargetPlan]) -> Vec<(&'static str, [usize; 2])> {
        let widest_in = targets.iter().map(|t| t.in_features).max().unwrap_or(0);
        let widest_out = targets.iter().map(|t| t.out_features).max().unwrap_or(0);
        vec![
            (SHARED_A, [self.r, widest_in]),
            (SHARED_B, [widest_out, self.r]),
        ]
    }

    /// Kaiming-uniform with a gain of √2, drawn by PyTorch's CPU generator: A first, then B from the same
    /// stream.
    fn initial_shared(&self, shapes: &[(&'static str, [usize; 2])]) -> Vec<Vec<f32>> {
        let mut generator = Mersenne::new(self.projection_prng_key);
        let draw = shapes.iter().map(|(_, [rows, columns])| {
            let deviation = 2.0_f64.sqrt() / (*columns as f64).sqrt();
            generator.uniform(rows * columns, 3.0_f64.sqrt() * deviation)
        });
        draw.collect()
    }

    fn stores_shared(&self) -> bool {
        self.save_projection
    }
}

impl MethodFacts for VeraConfig {
    const KEYS: &'static [&'static str] = &[LAMBDA_B, LAMBDA_D];
    const SHARED_KEYS: &'static [&'static str] = &[SHARED_A, SHARED_B];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let wide = own.shared_side(SHARED_A, 1).unwrap_or(1);
        Some(BaseShape::Linear(own.side(LAMBDA_B, 0)?, wide))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Shared
    }

    fn label(&self) -> &'static str {
        "VeRA"
    }

    fn headline(&self) -> &'static [&'static str] {
        &["r", "d_initial", "vera_dropout"]
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "r",
            "vera_dropout",
            "d_initial",
            "projection_prng_key",
            "modules_to_save",
        ]
    }

    fn rank(&self) -> Option<usize> {
        Some(self.r)
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        Weighing::Factor {
            keys: &[LAMBDA_B],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        match self.drops_inputs() && !layer.kernels {
            true => Kept::dropped(layer, layer.rank, layer.factors()),
            // Both factors with the vectors in them.
            false => Kept::low_rank(layer, layer.factors()),
        }
    }

    fn drops_inputs(&self) -> bool {
        self.vera_dropout > 0.0
    }
}

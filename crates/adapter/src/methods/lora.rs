//! LoRA: `y = W·x + s·B·A·drop(x)`, `s = alpha / r` (or `alpha / √r`, rank-stabilised).
//!
//! Formulas as in Hu et al. 2021 (arXiv:2106.09685) and Kalajdzievski 2023 (arXiv:2312.03732);
//! initialisation and names as in PEFT's `tuners/lora/layer.py`.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;

use super::{Adapter, Method, MethodConfig, ParamMut, ParamRef, Placement};
use crate::attach::{gaussian, uniform};
use crate::config::{InitLora, LoraConfig, Purpose};
use crate::plan::TargetPlan;
use crate::target::Selection;

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// The two factors beside one linear layer.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[r, in]`
    pub lora_a: Param<Tensor<2>>,
    /// `[out, r]`
    pub lora_b: Param<Tensor<2>>,
    /// On the adapter's input only, and only in training.
    pub dropout: Dropout,
    /// `s` above.
    #[module(skip)]
    pub scale: f64,
}

impl Method for Lora {
    fn forward(&self, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        // The base sees all of x, so with dropout the two products no longer share their input.
        if self.dropout.prob > 0.0 && x.device().is_autodiff() && self.dropout.training.is_enabled()
        {
            let low = self
                .dropout
                .forward(x.clone())
                .matmul(a.transpose())
                .mul_scalar(self.scale);
            return enamel_kernels::linear(x, weight) + low.matmul(b.transpose());
        }
        enamel_kernels::lora_linear(x, weight, a, b, self.scale)
    }

    fn delta_weight(&self) -> Tensor<2> {
        self.lora_b
            .val()
            .matmul(self.lora_a.val())
            .mul_scalar(self.scale)
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(A, ParamRef::Matrix(&self.lora_a));
        f(B, ParamRef::Matrix(&self.lora_b));
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(A, ParamMut::Matrix(&mut self.lora_a));
        f(B, ParamMut::Matrix(&mut self.lora_b));
    }
}

impl MethodConfig for LoraConfig {
    const PEFT_TYPE: &'static str = "LORA";

    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.r,
            alpha: self.lora_alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
        }
    }

    fn problems(&self, purpose: Purpose) -> Vec<String> {
        self.unsupported(purpose)
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn parameters(&self, target: &TargetPlan) -> Vec<(&'static str, Vec<usize>)> {
        vec![
            (A, vec![target.r, target.in_features]),
            (B, vec![target.out_features, target.r]),
        ]
    }

    fn initial(&self, target: &TargetPlan, name: &str, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let (r, width) = (target.r, target.in_features);
        match (name, &self.init_lora_weights) {
            // Kaiming uniform with a = √5 is U(±1/√fan_in).
            (A, InitLora::Default | InitLora::Random) => {
                uniform(rng, r * width, 1.0 / (width as f64).sqrt())
            }
            (A, _) => gaussian(rng, r * width, 1.0 / r as f64),
            // PEFT's `False` leaves torch's own initialisation of a linear layer on B too.
            (_, InitLora::Random) => uniform(rng, target.out_features * r, 1.0 / (r as f64).sqrt()),
            _ => vec![0.0; target.out_features * r],
        }
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        Adapter::Lora(Lora {
            lora_a: place.param(&target.key(A), next(), [target.r, target.in_features]),
            lora_b: place.param(&target.key(B), next(), [target.out_features, target.r]),
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scale: target.scale,
        })
    }
}

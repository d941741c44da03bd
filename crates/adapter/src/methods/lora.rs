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

    fn scale(&self) -> f64 {
        self.scale
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use burn::module::Module;
    use burn::tensor::{Device, Distribution, Tensor};

    use crate::config::{LoraConfig, Targets};
    use crate::slot::{Adaptable, SlotRef};
    use crate::testing::{Tiny, difference, fill, perturb};
    use crate::{Linear, attach};

    fn adapted(cfg: LoraConfig) -> Tiny {
        let cfg = LoraConfig {
            target_modules: Some(Targets::AllLinear),
            ..cfg
        };
        let mut model = Tiny::new(&Device::flex());
        attach(&mut model, &cfg, 5).unwrap();
        perturb(&mut model);
        model
    }

    fn first(model: &Tiny) -> Linear {
        let mut found = None;
        model.for_each_slot_ref(&mut |name, slot| {
            if let (SlotRef::Linear(l), true) = (slot, name.ends_with("0.mlp.up_proj")) {
                found = Some(l.clone());
            }
        });
        found.unwrap()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec().unwrap()
    }

    #[test]
    fn the_forward_pass_adds_the_delta() {
        for cfg in [
            LoraConfig {
                lora_alpha: 16.0,
                ..LoraConfig::default()
            },
            LoraConfig {
                lora_alpha: 16.0,
                use_rslora: true,
                ..LoraConfig::default()
            },
        ] {
            let linear = first(&adapted(cfg));
            let x = fill([3, 64], 1, &Device::flex()) * 10.0;
            let dense = x.clone().matmul(linear.weight_in_use().transpose())
                + linear.bias_in_use().unwrap().unsqueeze();
            // 64 products of values up to 1, twice.
            assert!(difference(&values(linear.forward(x)), &values(dense)) < 1e-5);
        }
    }

    /// The scale by hand: `alpha / r = 2`, `alpha / √r = 16 / √8`.
    #[test]
    fn the_delta_is_the_scaled_product() {
        for (use_rslora, scale) in [(false, 2.0), (true, 16.0 / 8.0_f64.sqrt())] {
            let linear = first(&adapted(LoraConfig {
                lora_alpha: 16.0,
                use_rslora,
                ..LoraConfig::default()
            }));
            let super::Adapter::Lora(lora) = linear.adapter.as_ref().unwrap();
            let by_hand = lora.lora_b.val().matmul(lora.lora_a.val()) * scale;
            assert!(difference(&values(lora.delta_weight_of()), &values(by_hand)) < 1e-6);
        }
    }

    #[test]
    fn dropout_touches_the_adapters_input_alone_and_only_in_training() {
        let plain = adapted(LoraConfig::default());
        let dropping = adapted(LoraConfig {
            lora_dropout: 0.5,
            ..LoraConfig::default()
        });
        // Not in training: the same bits.
        assert_eq!(plain.logits(), dropping.logits());
        let training = dropping.train();
        assert_eq!(training.valid().logits(), plain.logits());
        let autodiff = Device::flex().autodiff();
        autodiff.seed(1);
        let linear = first(&training);
        let x = fill([1, 64], 1, &autodiff) * 10.0;
        let base = values(enamel_kernels::linear(x.clone(), linear.weight.val()));
        let without = values(first(&plain).forward(x.clone().inner()));
        let mut sum = vec![0.0; without.len()];
        let runs = 4000;
        let mut seen = Vec::new();
        for _ in 0..runs {
            let y = values(linear.forward(x.clone()));
            y.iter()
                .zip(&mut sum)
                .for_each(|(y, sum)| *sum += y / runs as f32);
            seen.push(y);
        }
        assert_ne!(seen[0], seen[1], "a new mask every time");
        // The mean of the inverted dropout is the output without it. The deviation of one run is the
        // root of the sum of 64 squared terms; allow five of the mean's.
        let deviation = |i: usize| {
            let mean = sum[i];
            let squares = seen.iter().map(|y| (y[i] - mean).powi(2)).sum::<f32>();
            (squares / runs as f32).sqrt()
        };
        for i in 0..without.len() {
            let allowed = 5.0 * deviation(i) / (runs as f32).sqrt() + 1e-4;
            assert!(
                (sum[i] - without[i]).abs() < allowed,
                "{i}: {} {} {allowed}",
                sum[i],
                without[i]
            );
        }
        assert!(difference(&without, &base) > 0.0);
    }

    #[test]
    fn dropped_everything_leaves_the_base() {
        // With nearly everything dropped most runs are the base to the bit: it never sees the mask.
        let model = adapted(LoraConfig {
            lora_dropout: 0.999,
            ..LoraConfig::default()
        })
        .train();
        let linear = first(&model);
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::random([1, 64], Distribution::Default, &device);
        let base = values(
            enamel_kernels::linear(x.clone(), linear.weight.val())
                + linear.bias_in_use().unwrap().unsqueeze(),
        );
        assert!((0..50).any(|_| values(linear.forward(x.clone())) == base));
    }

    impl super::Lora {
        fn delta_weight_of(&self) -> Tensor<2> {
            super::Method::delta_weight(self)
        }
    }
}

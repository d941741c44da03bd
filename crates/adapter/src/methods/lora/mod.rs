//! LoRA: `y = W·x + b + s·(B·A·drop(x) + b_B)`, `s = alpha / r` (or `alpha / √r`, rank-stabilised), and
//! DoRA, which learns the length of each row of `W + s·B·A` by itself.
//!
//! Formulas as in Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732) and Liu et al.
//! 2024 (arXiv:2402.09353, with the length taken as a constant in the backward pass, its section 4.3);
//! initialisation and names as in PEFT's `tuners/lora/layer.py`.

pub mod config;
pub mod embedding;
mod facts;
pub mod init;

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use enamel_kernels::{BaseWeight, Held, LowRank, dora_linear, fuses, linear, lora_linear};

use embedding::LoraEmbedding;

use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement, drawn,
    dropping,
};
use crate::base::Base;
use crate::config::{Bias, Purpose, TokenIndices};
use crate::error::Result;
use crate::methods::lora::config::LoraConfig;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection, Tie};

pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";
const B_BIAS: &str = "lora_B.bias";
pub(super) const MAGNITUDE: &str = "lora_magnitude_vector";

/// The two factors beside one linear layer.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[r, in]`
    pub lora_a: Param<Tensor<2>>,
    /// `[out, r]`
    pub lora_b: Param<Tensor<2>>,
    /// A bias behind B, `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// DoRA's lengths, `[out]`.
    pub magnitude: Option<Magnitude>,
    /// What the factors started from, where the base is understood to have given it up.
    pub origin: Option<Origin>,
    /// On the adapter's input only, and only in training.
    pub dropout: Dropout,
    /// `s` above.
    #[module(skip)]
    pub scale: f64,
}

/// DoRA's part of a layer.
#[derive(Module, Debug)]
pub struct Magnitude {
    /// The length of each row, `[out]`.
    pub length: Param<Tensor<1>>,
    /// Squared lengths of the base's rows, `[out]`: they never change.
    pub base_squares: Tensor<1>,
}

/// First values of A and B, frozen.
#[derive(Module, Debug)]
pub struct Origin {
    /// `[r, in]`
    pub a: Tensor<2>,
    /// `[out, r]`
    pub b: Tensor<2>,
}

impl Lora {
    /// Whether this pass drops inputs: in training, which is on an autodiff device.
    fn dropping(&self) -> bool {
        super::at_work(&self.dropout, &self.lora_a)
    }

    /// A and B, and what they started from taken off again: of twice the rank then.
    fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        match &self.origin {
            Some(origin) => (
                Tensor::cat(vec![a, origin.a.clone()], 0),
                Tensor::cat(vec![b, -origin.b.clone()], 1),
            ),
            None => (a, b),
        }
    }

    /// The base that the factors are beside.
    fn residual(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        let weight = base.weight.clone();
        match &self.origin {
            Some(origin) => lora_linear(x, weight, origin.a.clone(), -origin.b.clone(), self.scale),
            None => linear(x, weight),
        }
    }

    fn plus_bias(&self, y: Tensor<2>, base: &Base) -> Tensor<2> {
        let y = base.plus_bias(y);
        match &self.bias {
            Some(bias) => y + bias.val().mul_scalar(self.scale).unsqueeze(),
            None => y,
        }
    }
}

/// Out of the graph: a leaf that is trained stays one when it is detached.
pub(super) fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().set_require_grad(false)
}

/// Squared lengths of the rows of a base, `[rows]`.
fn row_squares(weight: &BaseWeight, place: &Placement<'_>) -> Tensor<1> {
    let [rows, _] = weight.dims();
    match weight.matrix() {
        Held::Packed(packed) => place.tensor(packed.row_squares(), [rows]),
        Held::Dense(_) => {
            let weight = untracked(weight.dense());
            (weight.clone() * weight).sum_dim(1).reshape([rows])
        }
    }
}

/// Lengths of the rows of a matrix, `[rows]`.
pub(super) fn row_lengths(matrix: Tensor<2>) -> Tensor<1> {
    let [rows, _] = matrix.dims();
    (matrix.clone() * matrix).sum_dim(1).reshape([rows]).sqrt()
}

impl Method for Lora {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        let weight = base.weight.clone();
        let y = match (&self.magnitude, self.dropping()) {
            (None, false) => {
                let (a, b) = self.factors();
                lora_linear(x, weight, a, b, self.scale)
            }
            (None, true) if self.origin.is_none() => {
                let (a, b) = (self.lora_a.val(), self.lora_b.val());
                dropping(x, weight, a, b, self.scale, &self.dropout)
            }
            // What the base has given up is a part of it, so it sees all of x.
            (None, true) => {
                let low = self.dropout.forward(x.clone());
                let low = low.matmul(self.lora_a.val().transpose());
                let low = low.mul_scalar(self.scale);
                self.residual(x, base) + low.matmul(self.lora_b.val().transpose())
            }
            (Some(magnitude), dropping) => {
                let (a, b) = (self.lora_a.val(), self.lora_b.val());
                // The LoRA map, each output times the learnt length over that of a row of `W + s·B·A`.
                let scaled = |x| {
                    let (length, squares) =
                        (magnitude.length.val(), magnitude.base_squares.clone());
                    dora_linear(x, weight.clone(), a, b, length, squares, self.scale)
                };
                if dropping {
                    // PEFT scales what the dropped input makes and leaves the rest as the base has it.
                    let kept = self.dropout.forward(x.clone());
                    linear(x - kept.clone(), weight.clone()) + scaled(kept)
                } else {
                    scaled(x)
                }
            }
        };
        self.plus_bias(y, base)
    }

    fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        if self.magnitude.is_some() || self.dropping() {
            return self.forward(x.clone(), base) - base.forward(x);
        }
        let (a, b) = self.factors();
        let low = x.matmul(a.transpose()).mul_scalar(self.scale);
        let y = low.matmul(b.transpose());
        match &self.bias {
            Some(bias) => y + bias.val().mul_scalar(self.scale).unsqueeze(),
            None => y,
        }
    }

    fn merged(&self, base: Base) -> Base {
        let (a, b) = self.factors();
        let weight = base.weight.map(|weight| {
            let sum = weight + b.matmul(a).mul_scalar(self.scale);
            match &self.magnitude {
                Some(magnitude) => {
                    let factor = magnitude.length.val() / row_lengths(untracked(sum.clone()));
                    sum * factor.unsqueeze_dim(1)
                }
                None => sum,
            }
        });
        let own = self.bias.as_ref().map(|b| b.val().mul_scalar(self.scale));
        let bias = match (base.bias, own) {
            (Some(bias), Some(own)) => Some(bias + own),
            (bias, own) => bias.or(own),
        };
        Base { weight, bias }
    }

    fn is_additive(&self) -> bool {
        self.magnitude.is_none()
    }

    fn low_rank(&self) -> Option<LowRank> {
        if self.magnitude.is_some() || self.bias.is_some() {
            return None;
        }
        let (a, b) = self.factors();
        let dropout = match self.dropping() {
            // Elsewhere, or beside what sees all of the input, the operations are separate.
            true if self.origin.is_some() || !fuses(&a) => return None,
            true => Some(drawn(&self.dropout, &a.device())),
            false => None,
        };
        Some(LowRank {
            a,
            b,
            scale: self.scale,
            dropout,
        })
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn has_dropout(&self) -> bool {
        self.dropping()
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(A, ParamRef::Matrix(&self.lora_a));
        f(B, ParamRef::Matrix(&self.lora_b));
        if let Some(bias) = &self.bias {
            f(B_BIAS, ParamRef::Vector(bias));
        }
        if let Some(magnitude) = &self.magnitude {
            f(MAGNITUDE, ParamRef::Vector(&magnitude.length));
        }
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(A, ParamMut::Matrix(&mut self.lora_a));
        f(B, ParamMut::Matrix(&mut self.lora_b));
        if let Some(bias) = &mut self.bias {
            f(B_BIAS, ParamMut::Vector(bias));
        }
        if let Some(magnitude) = &mut self.magnitude {
            f(MAGNITUDE, ParamMut::Vector(&mut magnitude.length));
        }
    }

    fn initial_factors(&self) -> Option<Vec<Tensor<2>>> {
        let origin = self.origin.as_ref()?;
        Some(vec![origin.a.clone(), origin.b.clone()])
    }
}

impl MethodConfig for LoraConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &DEFAULT_TARGETS,
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.r,
            alpha: self.lora_alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
            tie: match (self.ensure_weight_tying, self.use_dora, self.lora_bias) {
                (false, _, _) => Tie::No,
                (true, true, _) => Tie::Not("use_dora"),
                (true, _, true) => Tie::Not("lora_bias"),
                (true, false, false) => Tie::Follows,
            },
        }
    }

    fn problems(&self, purpose: Purpose) -> Vec<String> {
        self.unsupported(purpose)
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        let (r, out) = (target.r, target.out_features);
        if target.embedding {
            return embedding::parameters(target, self.use_dora);
        }
        let mut all = vec![(A, vec![r, target.in_features]), (B, vec![out, r])];
        if self.lora_bias {
            all.push((B_BIAS, vec![out]));
        }
        if self.use_dora {
            all.push((MAGNITUDE, vec![out]));
        }
        all
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        init::initial(self, target, start)
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let (r, width, out) = (target.r, target.in_features, target.out_features);
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        let lora_a = place.param(&target.key(A), next(), [r, width]);
        let lora_b = place.param(&target.key(B), next(), [out, r]);
        let bias = self
            .lora_bias
            .then(|| place.param(&target.key(B_BIAS), next(), [out]));
        let magnitude = self.use_dora.then(|| Magnitude {
            length: place.param(&target.key(MAGNITUDE), next(), [out]),
            base_squares: row_squares(&place.weight, place),
        });
        let origin = place.origin.as_ref().map(|origin| {
            let at = |i: usize| origin.get(i).cloned().unwrap_or_default();
            Origin {
                a: place.tensor(at(0), [r, width]),
                b: place.tensor(at(1), [out, r]),
            }
        });
        Adapter::Lora(Lora {
            lora_a,
            lora_b,
            bias,
            magnitude,
            origin,
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scale: target.scale,
        })
    }

    fn build_embedding(
        &self,
        target: &TargetPlan,
        values: Vec<Vec<f32>>,
        place: &Placement<'_>,
    ) -> Option<LoraEmbedding> {
        Some(LoraEmbedding::build(target, values, place, self.use_dora))
    }

    fn adapts_embeddings(&self) -> bool {
        true
    }

    fn bias(&self) -> Bias {
        self.bias
    }

    fn token_indices(&self) -> Option<&TokenIndices> {
        self.trainable_token_indices.as_ref()
    }

    fn subtracts_initial(&self) -> bool {
        self.init_lora_weights.subtracts_initial()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use burn::module::Module;
    use burn::tensor::{Device, Distribution, Tensor};

    use crate::config::Targets;
    use crate::layers::adaptable::{Adaptable, SlotRef};
    use crate::methods::lora::config::LoraConfig;
    use crate::testing::{Tiny, difference, fill, generator, perturb};
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
            let super::Adapter::Lora(lora) = linear.parts[0].adapter.as_ref().unwrap() else {
                panic!()
            };
            let by_hand =
                linear.weight.dense() + lora.lora_b.val().matmul(lora.lora_a.val()) * scale;
            assert!(difference(&values(linear.weight_in_use()), &values(by_hand)) < 1e-6);
        }
    }

    #[test]
    fn dropout_touches_the_adapters_input_alone_and_only_in_training() {
        let plain = adapted(LoraConfig::default());
        let dropping = adapted(LoraConfig {
            lora_dropout: 0.5,
            ..LoraConfig::default()
        });
        let _alone = generator();
        // Not in training: the same bits.
        assert_eq!(plain.logits(), dropping.logits());
        let training = dropping.train();
        assert_eq!(training.valid().logits(), plain.logits());
        let autodiff = Device::flex().autodiff();
        autodiff.seed(1);
        let linear = first(&training);
        let x = fill([1, 64], 1, &autodiff) * 10.0;
        let base = values(enamel_kernels::linear(x.clone(), linear.weight.dense()));
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
        let _alone = generator();
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
            enamel_kernels::linear(x.clone(), linear.weight.dense())
                + linear.bias_in_use().unwrap().unsqueeze(),
        );
        assert!((0..50).any(|_| values(linear.forward(x.clone())) == base));
    }
}

//! LoHa: `ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b)`, `s = alpha / r`: an update of rank up to r² from two of rank r.
//!
//! Formulas as in Hyeon-Woo et al. 2021 (FedPara, arXiv:2108.06098), names, initial values and the two
//! kinds of dropout as in PEFT's `tuners/loha/layer.py`.
//!
//! An elementwise product of two products is a product of row-wise Kronecker products:
//! `(A·B) ∘ (C·D) = (A ∗ C)·(B ∗ D)` with r² columns and rows. For a small r that is a LoRA, and the
//! dense update never exists; past the rank at which it is cheaper, the update is formed.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use enamel_kernels::{Held, khatri_rao_columns, khatri_rao_rows, linear, lora_linear};

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::peft_config;
use crate::config::{Pattern, Purpose, Targets, layer_problems, probability, rank_problems};
use crate::error::Result;
use crate::linalg::random::kaiming;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection};

/// Rows of input that a product with the dense update takes as long for as forming it, and passing its
/// gradient on to the factors, takes: as measured, a few hundred.
const FORMING: usize = 256;

const NAMES: [&str; 4] = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];

peft_config! {
    /// PEFT's `LoHaConfig`.
    pub struct LohaConfig in "LOHA" {
        /// Rank of each of the two factors.
        r: usize = 8;
        /// Numerator of the scale.
        alpha: f64 = 8.0;
        /// Probability with which an output of the update is dropped in training.
        rank_dropout: f64 = 0.0;
        /// Probability with which a layer's whole update is left out of a forward pass in training.
        module_dropout: f64 = 0.0;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// Start with `w2_b` at zero, which changes nothing; else all at random.
        init_weights: bool = true;
        /// Only these layers (with a list of target names).
        layers_to_transform: Option<Vec<usize>> = None;
        /// The name before the layer's number.
        layers_pattern: Option<Vec<String>> = None;
        /// Other ranks for some modules, first match wins.
        rank_pattern: Pattern<usize> = Vec::new();
        /// Other alphas for some modules, first match wins.
        alpha_pattern: Pattern<f64> = Vec::new();
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
    }
    written {
        // About convolutions, of which there are none here.
        "use_effective_conv2d": serde_json::json!(false);
    }
    refused {}
}

/// The four factors beside one linear layer.
#[derive(Module, Debug)]
pub struct Loha {
    /// `[out, r]`
    pub w1_a: Param<Tensor<2>>,
    /// `[r, in]`
    pub w1_b: Param<Tensor<2>>,
    /// `[out, r]`
    pub w2_a: Param<Tensor<2>>,
    /// `[r, in]`
    pub w2_b: Param<Tensor<2>>,
    /// On the outputs of the update.
    pub rank_dropout: Dropout,
    /// On the update as a whole.
    pub module_dropout: Dropout,
    #[module(skip)]
    scale: f64,
}

impl Loha {
    /// `w1_a ∗ w2_a` `[out, r²]` and `w1_b ∗ w2_b` `[r², in]`.
    fn khatri_rao(&self) -> (Tensor<2>, Tensor<2>) {
        (
            khatri_rao_rows(self.w1_a.val(), self.w2_a.val()),
            khatri_rao_columns(self.w1_b.val(), self.w2_b.val()),
        )
    }

    /// The update without its scale, `[out, in]`.
    fn delta(&self) -> Tensor<2> {
        let first = self.w1_a.val().matmul(self.w1_b.val());
        first * self.w2_a.val().matmul(self.w2_b.val())
    }

    /// Whether r² columns cost less than a dense update: in training the factored form multiplies every
    /// row of the input by `r²·(in + out)` numbers three times, the dense one by `in·out` once more than
    /// the base does (for its gradient), after the update was formed. Factors of more numbers than the
    /// update has cost memory and, as sums of r² terms that cancel, digits.
    fn factoring_is_cheaper(&self, rows: usize) -> bool {
        let [out, r] = self.w1_a.dims();
        let [_, width] = self.w1_b.dims();
        factoring_is_cheaper(r * r * (width + out), width * out, rows)
    }
}

/// The same for so many numbers in the factors and in the update.
fn factoring_is_cheaper(factors: usize, dense: usize, rows: usize) -> bool {
    factors < dense && 3 * factors * rows < dense * (rows + FORMING)
}

/// A mask over outputs with the probability of `dropout`, zeros and ones, `[1, out]`.
pub(super) fn output_mask(out: usize, dropout: &Dropout, like: &Tensor<2>) -> Tensor<2> {
    let keep = burn::tensor::Distribution::Bernoulli(1.0 - dropout.prob);
    Tensor::random([1, out], keep, &like.device())
}

/// Whether this pass goes without the update.
pub(super) fn left_out<const D: usize>(dropout: &Dropout, parameter: &Param<Tensor<D>>) -> bool {
    if !super::at_work(dropout, parameter) {
        return false;
    }
    let keep = burn::tensor::Distribution::Bernoulli(1.0 - dropout.prob);
    let drawn = Tensor::<1>::random([1], keep, &parameter.val().device());
    drawn.into_data().iter::<f32>().next() == Some(0.0)
}

impl Method for Loha {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        if left_out(&self.module_dropout, &self.w1_a) {
            return base.forward(x);
        }
        let weight = base.weight.clone();
        if super::at_work(&self.rank_dropout, &self.w1_a) {
            let mask = output_mask(weight.dims()[0], &self.rank_dropout, &x);
            // PEFT keeps the update's mean by what was really dropped.
            let mask = mask.clone() / mask.mean().unsqueeze();
            return base.forward(x.clone()) + self.own(x) * mask;
        }
        let y = if self.factoring_is_cheaper(x.dims()[0]) {
            let (left, right) = self.khatri_rao();
            lora_linear(x, weight, right, left, self.scale)
        } else if let Held::Packed(_) = weight.matrix() {
            // Their sum would be another matrix of the weight's size.
            linear(x.clone(), weight) + self.own(x)
        } else {
            linear(x, weight.map(|w| w + self.delta().mul_scalar(self.scale)))
        };
        base.plus_bias(y)
    }

    fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        let random = [&self.module_dropout, &self.rank_dropout];
        if random.iter().any(|d| super::at_work(d, &self.w1_a)) {
            return self.forward(x.clone(), base) - base.forward(x);
        }
        self.own(x)
    }

    fn merged(&self, base: Base) -> Base {
        Base {
            weight: base.weight.map(|w| w + self.delta().mul_scalar(self.scale)),
            ..base
        }
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn has_dropout(&self) -> bool {
        super::at_work(&self.rank_dropout, &self.w1_a)
            || super::at_work(&self.module_dropout, &self.w1_a)
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        for (name, param) in NAMES
            .iter()
            .zip([&self.w1_a, &self.w1_b, &self.w2_a, &self.w2_b])
        {
            f(name, ParamRef::Matrix(param));
        }
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        let all = [
            &mut self.w1_a,
            &mut self.w1_b,
            &mut self.w2_a,
            &mut self.w2_b,
        ];
        for (name, param) in NAMES.iter().zip(all) {
            f(name, ParamMut::Matrix(param));
        }
    }
}

impl Loha {
    /// What the update alone makes of the input, `[rows, out]`.
    fn own(&self, x: Tensor<2>) -> Tensor<2> {
        let y = if self.factoring_is_cheaper(x.dims()[0]) {
            let (left, right) = self.khatri_rao();
            x.matmul(right.transpose()).matmul(left.transpose())
        } else {
            linear(x, self.delta())
        };
        y.mul_scalar(self.scale)
    }
}

impl MethodConfig for LohaConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &DEFAULT_TARGETS,
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.r,
            alpha: self.alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
            ..Selection::NOTHING
        }
    }

    fn problems(&self, _: Purpose) -> Vec<String> {
        let alpha = ("alpha", self.alpha);
        let mut problems = rank_problems(self.r, &self.rank_pattern, alpha, &self.alpha_pattern);
        problems.extend(probability("rank_dropout", self.rank_dropout));
        problems.extend(probability("module_dropout", self.module_dropout));
        problems.extend(layer_problems(
            self.target_modules.as_ref(),
            self.layers_to_transform.as_deref(),
            self.layers_pattern.as_deref(),
        ));
        problems.extend(self.refused());
        problems
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        alpha / r as f64
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        let (left, right) = (
            vec![target.out_features, target.r],
            vec![target.r, target.in_features],
        );
        let shapes = [left.clone(), right.clone(), left, right];
        NAMES.into_iter().zip(shapes).collect()
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        let values = self.parameters(target).into_iter().map(|(name, shape)| {
            if name == NAMES[3] && self.init_weights {
                return vec![0.0; shape.iter().product()];
            }
            kaiming(&mut start.rng(target, name), shape[0], shape[1])
        });
        Ok(values.collect())
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let mut values = values.into_iter();
        let mut param = |name: &str, shape| {
            place.param(&target.key(name), values.next().unwrap_or_default(), shape)
        };
        let (left, right) = (
            [target.out_features, target.r],
            [target.r, target.in_features],
        );
        Adapter::Loha(Loha {
            w1_a: param(NAMES[0], left),
            w1_b: param(NAMES[1], right),
            w2_a: param(NAMES[2], left),
            w2_b: param(NAMES[3], right),
            rank_dropout: DropoutConfig::new(self.rank_dropout).init(),
            module_dropout: DropoutConfig::new(self.module_dropout).init(),
            scale: target.scale,
        })
    }
}

impl MethodFacts for LohaConfig {
    const KEYS: &'static [&'static str] = &NAMES;

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let (out, width) = own.pair(NAMES[0], NAMES[1])?;
        Some(BaseShape::Linear(out, width))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "LoHa"
    }

    fn headline(&self) -> &'static [&'static str] {
        &["r", "alpha"]
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "r",
            "rank_pattern",
            "alpha",
            "alpha_pattern",
            "rank_dropout",
            "module_dropout",
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
            keys: &[NAMES[0]],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        let (r, dense) = (layer.rank, layer.input * layer.out);
        let squared = r * layer.factors();
        match factoring_is_cheaper(squared, dense, layer.rows) {
            true => Kept {
                row: r * r,
                ..Kept::low_rank(layer, squared)
            },
            // Both products, and the weight with their product added.
            false => Kept {
                fixed: 3 * dense,
                ..Kept::INPUT
            },
        }
    }

    fn drops_inputs(&self) -> bool {
        false
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use burn::tensor::Device;

    use super::{Adapter, LohaConfig};
    use crate::attach;
    use crate::config::Targets;
    use crate::layers::adaptable::{Adaptable, SlotRef};
    use crate::testing::{Tiny, difference, fill, perturb};

    /// Few rows take the update in factors, many the dense one.
    #[test]
    fn both_forms_of_the_update_are_that_of_the_merged_weight() {
        let mut model = Tiny::new(&Device::flex());
        let config = LohaConfig {
            r: 4,
            target_modules: Some(Targets::AllLinear),
            ..LohaConfig::default()
        };
        attach(&mut model, &config, 5).unwrap();
        perturb(&mut model);
        let mut forms = [0; 2];
        model.for_each_slot_ref(&mut |_, slot| {
            let SlotRef::Linear(linear) = slot else {
                return;
            };
            let part = linear.parts.first().and_then(|part| part.adapter.as_ref());
            let Some(Adapter::Loha(loha)) = part else {
                return;
            };
            let [_, width] = linear.weight.dims();
            for rows in [1, 3, 1000] {
                forms[usize::from(loha.factoring_is_cheaper(rows))] += 1;
                let x = fill([rows, width], 1, &Device::flex()) * 10.0;
                let mut want = x.clone().matmul(linear.weight_in_use().transpose());
                if let Some(bias) = linear.bias_in_use() {
                    want = want + bias.unsqueeze();
                }
                let [got, want] =
                    [linear.forward(x), want].map(|y| y.into_data().try_into_vec().unwrap());
                // Up to 128 products of values up to 1, twice.
                assert!(difference(&got, &want) < 1e-5);
            }
        });
        assert!(forms.iter().all(|n| *n > 0), "{forms:?}");
    }
}

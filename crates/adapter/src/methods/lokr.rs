//! LoKr: `ΔW = s·(w1 ⊗ w2)`, `s = alpha / r`, either factor perhaps a product of two narrow ones.
//!
//! Formulas as in Yeh et al. 2023 (LyCORIS, arXiv:2309.14859), names, factorisation, initial values and the
//! two kinds of dropout as in PEFT's `tuners/lokr/layer.py`. The Kronecker product is formed for merging
//! alone; the forward pass applies one factor after the other.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use enamel_kernels::{kron, kron_linear};
use serde_json::Value;

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::loha::{left_out, output_mask};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::{PeftValue, peft_config};
use crate::config::{Pattern, Purpose, Targets, layer_problems, probability, rank_problems};
use crate::error::Result;
use crate::linalg::random::kaiming;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection};

/// How the factors start (`init_weights`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLokr {
    /// `true`: w1 (or its left factor) zero.
    #[default]
    Default,
    /// `"lycoris"`: w2 (or its right factor) zero, as the authors' own code does it.
    Lycoris,
    /// `false`: nothing is zero; the output starts changed.
    Random,
}

impl PeftValue for InitLokr {
    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
        match value {
            Value::Bool(true) => Some(Self::Default),
            Value::Bool(false) => Some(Self::Random),
            Value::String(name) if name == "lycoris" => Some(Self::Lycoris),
            _ => {
                problems.push(format!(
                    "{key} = {value}: must be true, false or \"lycoris\""
                ));
                None
            }
        }
    }

    fn write(&self) -> Value {
        match self {
            Self::Default => Value::Bool(true),
            Self::Random => Value::Bool(false),
            Self::Lycoris => Value::String("lycoris".into()),
        }
    }
}

peft_config! {
    /// PEFT's `LoKrConfig`.
    pub struct LokrConfig in "LOKR" {
        /// Rank of a factor that is a product.
        r: usize = 8;
        /// Numerator of the scale.
        alpha: f64 = 8.0;
        /// Probability with which an output of the update is dropped in training.
        rank_dropout: f64 = 0.0;
        /// Probability with which a layer's whole update is left out of a forward pass in training.
        module_dropout: f64 = 0.0;
        /// Whether w1 may be a product too.
        decompose_both: bool = false;
        /// Largest size of w1's sides; -1 for as near to a square as the sizes allow.
        decompose_factor: i64 = -1;
        /// Divide what `rank_dropout` left by its share.
        rank_dropout_scale: bool = false;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// How the factors start.
        init_weights: InitLokr = InitLokr::Default;
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

/// One side of the Kronecker product.
#[derive(Module, Debug)]
pub enum Factor {
    /// The matrix itself, `[rows, columns]`.
    Whole(Param<Tensor<2>>),
    /// A product of two narrow ones.
    Product(Narrow),
}

/// `[rows, r]` and `[r, columns]`.
#[derive(Module, Debug)]
pub struct Narrow {
    /// `[rows, r]`
    pub a: Param<Tensor<2>>,
    /// `[r, columns]`
    pub b: Param<Tensor<2>>,
}

impl Factor {
    /// The matrix, `[rows, columns]`.
    pub fn val(&self) -> Tensor<2> {
        match self {
            Self::Whole(whole) => whole.val(),
            Self::Product(narrow) => narrow.a.val().matmul(narrow.b.val()),
        }
    }
}

/// The factors beside one linear layer.
#[derive(Module, Debug)]
pub struct Lokr {
    /// `[out_l, in_m]`
    pub w1: Factor,
    /// `[out_k, in_n]`
    pub w2: Factor,
    /// On the outputs of the update.
    pub rank_dropout: Dropout,
    /// On the update as a whole.
    pub module_dropout: Dropout,
    #[module(skip)]
    rank_dropout_scale: bool,
    #[module(skip)]
    scale: f64,
}

impl Lokr {
    /// Any parameter, to ask for its device.
    fn some_param(&self) -> &Param<Tensor<2>> {
        match &self.w1 {
            Factor::Whole(whole) => whole,
            Factor::Product(narrow) => &narrow.a,
        }
    }
}

impl Method for Lokr {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        if left_out(&self.module_dropout, self.some_param()) {
            return base.forward(x);
        }
        let weight = base.weight.clone();
        let y = kron_linear(x.clone(), weight, self.w1.val(), self.w2.val(), self.scale);
        if !super::at_work(&self.rank_dropout, self.some_param()) {
            return base.plus_bias(y);
        }
        let mut mask = output_mask(y.dims()[1], &self.rank_dropout, &x);
        if self.rank_dropout_scale {
            mask = mask.clone() / mask.mean().unsqueeze();
        }
        let plain = enamel_kernels::linear(x, base.weight.clone());
        base.plus_bias(plain.clone() + (y - plain) * mask)
    }

    fn merged(&self, base: Base) -> Base {
        let delta = kron(self.w1.val(), self.w2.val()).mul_scalar(self.scale);
        Base {
            weight: base.weight.map(|w| w + delta),
            ..base
        }
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn has_dropout(&self) -> bool {
        let random = [&self.rank_dropout, &self.module_dropout];
        random.iter().any(|d| super::at_work(d, self.some_param()))
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        for (factor, [whole, a, b]) in [(&self.w1, W1), (&self.w2, W2)] {
            match factor {
                Factor::Whole(param) => f(whole, ParamRef::Matrix(param)),
                Factor::Product(narrow) => {
                    f(a, ParamRef::Matrix(&narrow.a));
                    f(b, ParamRef::Matrix(&narrow.b));
                }
            }
        }
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        for (factor, [whole, a, b]) in [(&mut self.w1, W1), (&mut self.w2, W2)] {
            match factor {
                Factor::Whole(param) => f(whole, ParamMut::Matrix(param)),
                Factor::Product(narrow) => {
                    f(a, ParamMut::Matrix(&mut narrow.a));
                    f(b, ParamMut::Matrix(&mut narrow.b));
                }
            }
        }
    }
}

/// Names in PEFT's file: whole, left factor, right factor.
const W1: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
const W2: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];

/// Splits a size in two as PEFT and LyCORIS do: `factor` itself first where it divides the size; else the
/// divisors nearest to each other, the smaller first and at most `factor` (-1: any).
pub fn factorization(size: usize, factor: i64) -> (usize, usize) {
    if let Ok(wanted @ 1..) = usize::try_from(factor)
        && size.is_multiple_of(wanted)
    {
        return (wanted, size / wanted);
    }
    let limit = usize::try_from(factor).unwrap_or(size);
    // Sums of two divisors fall until the root and rise behind it, so the last divisor up to both is the one.
    let root = match size <= WIDEST {
        true => size.isqrt(),
        false => 1,
    };
    let divides = |m: &usize| size.is_multiple_of(*m);
    let m = (1..=root.min(limit)).rev().find(divides).unwrap_or(1);
    (m.min(size), (size / m).max(1))
}

/// No layer is wider: a damaged file may say so, and its divisors are not looked for.
const WIDEST: usize = 1 << 40;

/// The shapes of one layer's factors.
struct Split {
    w1: [usize; 2],
    w2: [usize; 2],
    w1_whole: bool,
    w2_whole: bool,
}

impl LokrConfig {
    fn split(&self, target: &TargetPlan) -> Split {
        let (in_m, in_n) = factorization(target.in_features, self.decompose_factor);
        let (out_l, out_k) = factorization(target.out_features, self.decompose_factor);
        let narrow = |a: usize, b: usize| 2 * target.r < a.max(b);
        Split {
            w1: [out_l, in_m],
            w2: [out_k, in_n],
            w1_whole: !(self.decompose_both && narrow(out_l, in_m)),
            w2_whole: !narrow(out_k, in_n),
        }
    }
}

impl MethodConfig for LokrConfig {
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
        if self.decompose_factor == 0 || self.decompose_factor < -1 {
            problems.push(format!(
                "decompose_factor = {}: must be -1 or at least 1",
                self.decompose_factor
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
        alpha / r as f64
    }

    fn largest_rank(&self, _: usize, _: usize) -> usize {
        // Past half a factor's size the factors are whole, and the rank only scales.
        usize::MAX
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        let split = self.split(target);
        let mut all = Vec::new();
        for (names, [rows, columns], whole) in [
            (W1, split.w1, split.w1_whole),
            (W2, split.w2, split.w2_whole),
        ] {
            if whole {
                all.push((names[0], vec![rows, columns]));
            } else {
                all.push((names[1], vec![rows, target.r]));
                all.push((names[2], vec![target.r, columns]));
            }
        }
        all
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        let zero: &[&str] = match self.init_weights {
            InitLokr::Default => &[W1[0], W1[1]],
            InitLokr::Lycoris => &[W2[0], W2[2]],
            InitLokr::Random => &[],
        };
        let values = self.parameters(target).into_iter().map(|(name, shape)| {
            if zero.contains(&name) {
                return vec![0.0; shape.iter().product()];
            }
            kaiming(&mut start.rng(target, name), shape[0], shape[1])
        });
        Ok(values.collect())
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let split = self.split(target);
        let mut values = values.into_iter();
        let mut param = |name: &str, shape: [usize; 2]| {
            place.param(&target.key(name), values.next().unwrap_or_default(), shape)
        };
        let mut factor = |names: [&str; 3], [rows, columns]: [usize; 2], whole: bool| {
            if whole {
                return Factor::Whole(param(names[0], [rows, columns]));
            }
            let a = param(names[1], [rows, target.r]);
            let b = param(names[2], [target.r, columns]);
            Factor::Product(Narrow { a, b })
        };
        Adapter::Lokr(Lokr {
            w1: factor(W1, split.w1, split.w1_whole),
            w2: factor(W2, split.w2, split.w2_whole),
            rank_dropout: DropoutConfig::new(self.rank_dropout).init(),
            module_dropout: DropoutConfig::new(self.module_dropout).init(),
            rank_dropout_scale: self.rank_dropout_scale,
            scale: target.scale,
        })
    }
}

impl MethodFacts for LokrConfig {
    const KEYS: &'static [&'static str] = &[W1[0], W1[1], W1[2], W2[0], W2[1], W2[2]];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let factor = |names: [&str; 3]| {
            let whole = own.pair(names[0], names[0]);
            whole.or_else(|| own.pair(names[1], names[2]))
        };
        let ((a, b), (c, d)) = (factor(W1)?, factor(W2)?);
        Some(BaseShape::Linear(a.checked_mul(c)?, b.checked_mul(d)?))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "LoKr"
    }

    fn headline(&self) -> &'static [&'static str] {
        &["r", "alpha", "decompose_factor"]
    }

    fn remarks(&self) -> Vec<&'static str> {
        let both = self.decompose_both.then_some("both factors decomposed");
        both.into_iter().collect()
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "r",
            "rank_pattern",
            "alpha",
            "alpha_pattern",
            "rank_dropout",
            "module_dropout",
            "decompose_both",
            "decompose_factor",
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
            keys: &[W1[0], W1[1]],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn keeps(&self, _: &LayerSize<'_>) -> Kept {
        Kept::INPUT
    }

    fn drops_inputs(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::factorization;

    #[test]
    fn sizes_split_as_pefts_do() {
        // Worked through by hand from the rule: the divisors nearest to each other.
        for (size, factor, split) in [
            (4096, -1, (64, 64)),
            (11008, -1, (86, 128)),
            (14336, -1, (112, 128)),
            (576, -1, (24, 24)),
            (1536, -1, (32, 48)),
            (7, -1, (1, 7)),
            (128, 4, (4, 32)),
            (128, 64, (64, 2)),
            (90, 4, (3, 30)),
            (1, -1, (1, 1)),
        ] {
            assert_eq!(factorization(size, factor), split, "{size} by {factor}");
        }
        // What a damaged file may say takes no time.
        let absurd = usize::MAX / 2;
        assert_eq!(factorization(absurd, -1), (1, absurd));
        assert_eq!(factorization(0, -1), (0, 1));
    }
}

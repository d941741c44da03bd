//! MiSS: `y = W·x + b + Dᵀ·s(x)`, `s` the sum of the input's pieces of r elements: an update that repeats one
//! matrix `D` `[r, out]` over the input's pieces. With `mini_r`, `D` itself repeats `[r, mini_r]` over the outputs;
//! `bat` multiplies the base's weight besides, `ΔW = W·B + B` in blocks of r × r.
//!
//! Formulas as in Kang and Yin 2024 (arXiv:2409.15371), names, initial values, the zeros behind an input that r does not
//! divide, and dropout (none with `bat`) as in PEFT's `tuners/miss/layer.py`.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use serde_json::Value;

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::{PeftValue, peft_config};
use crate::config::{Purpose, Targets, layer_problems, probability};
use crate::error::Result;
use crate::linalg::random::kaiming;
use crate::plan::TargetPlan;
use crate::plan::target::{DEFAULT_TARGETS, Selection};

const BLOCK: &str = "miss_block";

/// Which form it has and how it starts (`init_weights`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitMiss {
    /// `true`: `D` for all outputs, zero.
    #[default]
    Default,
    /// `false`: the same at random; the output starts changed.
    Random,
    /// `"bat"`: blocks that multiply the base's weight too, zero.
    Bat,
    /// `"mini"`: `D` for `mini_r` outputs, zero.
    Mini,
}

impl PeftValue for InitMiss {
    fn read(key: &str, value: &Value, problems: &mut Vec<String>) -> Option<Self> {
        match value {
            Value::Bool(true) => Some(Self::Default),
            Value::Bool(false) => Some(Self::Random),
            Value::String(name) if name == "bat" => Some(Self::Bat),
            Value::String(name) if name == "mini" => Some(Self::Mini),
            _ => {
                problems.push(format!(
                    "{key} = {value}: must be true, false, \"bat\" or \"mini\""
                ));
                None
            }
        }
    }

    fn write(&self) -> Value {
        match self {
            Self::Default => Value::Bool(true),
            Self::Random => Value::Bool(false),
            Self::Bat => Value::String("bat".into()),
            Self::Mini => Value::String("mini".into()),
        }
    }
}

peft_config! {
    /// PEFT's `MissConfig`.
    pub struct MissConfig in "MISS" {
        /// Length of the pieces that inputs are summed over.
        r: usize = 64;
        /// Probability with which an element of the adapter's input is dropped in training.
        miss_dropout: f64 = 0.0;
        /// Outputs after which the matrix repeats, with `init_weights = "mini"`.
        mini_r: usize = 1;
        /// The modules to adapt; `None` stands for `q_proj` and `v_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// Which form it has and how it starts.
        init_weights: InitMiss = InitMiss::Default;
        /// Only these layers (with a list of target names).
        layers_to_transform: Option<Vec<usize>> = None;
        /// The name before the layer's number.
        layers_pattern: Option<Vec<String>> = None;
        /// Which biases of the base are trained; only `none`.
        bias: String = "none".to_string();
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
    }
    written {}
    refused {}
}

/// The parameter beside one linear layer.
#[derive(Module, Debug)]
pub enum Miss {
    /// Added to the outputs.
    Shards(Shards),
    /// Multiplied with the weight and added to it.
    Bat(Bat),
}

/// `D`, over pieces of the input.
#[derive(Module, Debug)]
pub struct Shards {
    /// `[r, mini_r]`, or `[r, out]`.
    pub block: Param<Tensor<2>>,
    /// On the adapter's input only, and only in training.
    pub dropout: Dropout,
    #[module(skip)]
    in_features: usize,
    #[module(skip)]
    out_features: usize,
}

/// A block for every r outputs.
#[derive(Module, Debug)]
pub struct Bat {
    /// `[out / r, r, r]`
    pub block: Param<Tensor<3>>,
}

impl Shards {
    fn drops(&self) -> bool {
        super::at_work(&self.dropout, &self.block)
    }

    /// What it adds to the outputs, `[rows, in]` to `[rows, out]`.
    fn own(&self, x: Tensor<2>) -> Tensor<2> {
        let [r, columns] = self.block.dims();
        let [rows, width] = x.dims();
        let pieces = width.div_ceil(r);
        let x = match self.drops() {
            true => self.dropout.forward(x),
            false => x,
        };
        let x = match pieces * r - width {
            0 => x,
            missing => {
                let zeros = Tensor::zeros([rows, missing], &x.device());
                Tensor::cat(vec![x, zeros], 1)
            }
        };
        let sums = x.reshape([rows, pieces, r]).sum_dim(1).reshape([rows, r]);
        let y = sums.matmul(self.block.val());
        match self.out_features / columns {
            1 => y,
            times => y.repeat_dim(1, times),
        }
    }

    /// The update, `[out, in]`: `ΔW[o, i] = D[i mod r, o mod mini_r]`.
    fn delta(&self) -> Tensor<2> {
        let [r, columns] = self.block.dims();
        let block = self.block.val().transpose();
        let tall = block.repeat_dim(0, self.out_features / columns);
        let wide = tall.repeat_dim(1, self.in_features.div_ceil(r));
        wide.slice([0..self.out_features, 0..self.in_features])
    }
}

impl Bat {
    /// `W + ΔW`, both `[out, in]`. Rows of W lie in groups of r, each with a block B: cut into pieces of r, every row
    /// `w` of a group becomes `w + w·B`, and the a-th row of the group gets row a of B besides.
    fn folded(&self, weight: Tensor<2>) -> Tensor<2> {
        let [groups, r, _] = self.block.dims();
        let [out, width] = weight.dims();
        let block = self.block.val();
        let product = weight
            .clone()
            .reshape([groups, width, r])
            .matmul(block.clone());
        let added = product.reshape([groups, r, width / r, r]) + block.reshape([groups, r, 1, r]);
        weight + added.reshape([out, width])
    }
}

impl Method for Miss {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        match self {
            Self::Shards(shards) => base.forward(x.clone()) + shards.own(x),
            Self::Bat(bat) => {
                let weight = base.weight.clone().map(|w| bat.folded(w));
                base.plus_bias(enamel_kernels::linear(x, weight))
            }
        }
    }

    fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        match self {
            Self::Shards(shards) => shards.own(x),
            Self::Bat(_) => self.forward(x.clone(), base) - base.forward(x),
        }
    }

    fn merged(&self, base: Base) -> Base {
        let weight = base.weight.map(|w| match self {
            Self::Shards(shards) => w + shards.delta(),
            Self::Bat(bat) => bat.folded(w),
        });
        Base { weight, ..base }
    }

    fn is_additive(&self) -> bool {
        matches!(self, Self::Shards(_))
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn has_dropout(&self) -> bool {
        match self {
            Self::Shards(shards) => shards.drops(),
            Self::Bat(_) => false,
        }
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        match self {
            Self::Shards(shards) => f(BLOCK, ParamRef::Matrix(&shards.block)),
            Self::Bat(bat) => f(BLOCK, ParamRef::Blocks(&bat.block)),
        }
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        match self {
            Self::Shards(shards) => f(BLOCK, ParamMut::Matrix(&mut shards.block)),
            Self::Bat(bat) => f(BLOCK, ParamMut::Blocks(&mut bat.block)),
        }
    }
}

impl MissConfig {
    /// Outputs after which the matrix repeats.
    fn columns(&self, target: &TargetPlan) -> usize {
        match self.init_weights {
            InitMiss::Mini => self.mini_r,
            _ => target.out_features,
        }
    }

    fn is_bat(&self) -> bool {
        self.init_weights == InitMiss::Bat
    }
}

impl MethodConfig for MissConfig {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &DEFAULT_TARGETS,
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            layers: self.layers_to_transform.as_deref().unwrap_or_default(),
            layers_pattern: self.layers_pattern.as_deref().unwrap_or_default(),
            rank: self.r,
            ..Selection::NOTHING
        }
    }

    fn problems(&self, purpose: Purpose) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, value) in [("r", self.r), ("mini_r", self.mini_r)] {
            if value == 0 {
                problems.push(format!("{key} = 0: must be at least 1"));
            }
        }
        problems.extend(probability("miss_dropout", self.miss_dropout));
        if purpose == Purpose::Initialise && self.is_bat() && self.miss_dropout > 0.0 {
            problems.push(format!(
                "miss_dropout = {}: nothing is dropped with init_weights = \"bat\"; leave it out",
                self.miss_dropout
            ));
        }
        problems.extend(layer_problems(
            self.target_modules.as_ref(),
            self.layers_to_transform.as_deref(),
            self.layers_pattern.as_deref(),
        ));
        if self.bias != "none" {
            problems.push(format!(
                "bias = {:?}: MiSS with trained biases is not supported; use \"none\"",
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
        // `misfit` has the bound, which holds for files too.
        usize::MAX
    }

    fn misfit(&self, target: &TargetPlan) -> Option<String> {
        let (out, width, r) = (target.out_features, target.in_features, target.r);
        if r > width {
            return Some(format!("r = {r} is more than it has inputs"));
        }
        match self.init_weights {
            InitMiss::Bat if !out.is_multiple_of(r) || !width.is_multiple_of(r) => Some(format!(
                "init_weights = \"bat\" cuts it into blocks of r × r, and r = {r} does not divide both sides; choose \
                 an r that does, or leave it out of target_modules"
            )),
            InitMiss::Mini if !out.is_multiple_of(self.mini_r) => Some(format!(
                "mini_r = {} does not divide its outputs; choose one that does, or leave it out of target_modules",
                self.mini_r
            )),
            _ => None,
        }
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        let r = target.r;
        let shape = match self.is_bat() {
            true => vec![target.out_features / r.max(1), r, r],
            false => vec![r, self.columns(target)],
        };
        vec![(BLOCK, shape)]
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        let (r, out) = (target.r, target.out_features);
        Ok(vec![match self.init_weights {
            InitMiss::Random => kaiming(&mut start.rng(target, BLOCK), r, out),
            InitMiss::Bat => vec![0.0; out * r],
            _ => vec![0.0; r * self.columns(target)],
        }])
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let values = values.into_iter().next().unwrap_or_default();
        let (r, key) = (target.r, target.key(BLOCK));
        Adapter::Miss(match self.is_bat() {
            true => Miss::Bat(Bat {
                block: place.param(&key, values, [target.out_features / r, r, r]),
            }),
            false => Miss::Shards(Shards {
                block: place.param(&key, values, [r, self.columns(target)]),
                dropout: DropoutConfig::new(self.miss_dropout).init(),
                in_features: target.in_features,
                out_features: target.out_features,
            }),
        })
    }
}

impl MethodFacts for MissConfig {
    const KEYS: &'static [&'static str] = &[BLOCK];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let shape = *own.own.get(BLOCK)?;
        match *shape {
            // At least as many outputs as before they repeat, and inputs as a piece has.
            [r, columns] => Some(BaseShape::Linear(columns, r)),
            [groups, r, _] => Some(BaseShape::Linear(groups.checked_mul(r)?, r)),
            _ => None,
        }
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Untold
    }

    fn label(&self) -> &'static str {
        "MiSS"
    }

    fn headline(&self) -> &'static [&'static str] {
        match self.init_weights {
            InitMiss::Mini => &["r", "mini_r", "miss_dropout"],
            _ => &["r", "miss_dropout"],
        }
    }

    fn remarks(&self) -> Vec<&'static str> {
        let bat = self
            .is_bat()
            .then_some("bat: multiplies the base's weights");
        bat.into_iter().collect()
    }

    fn card_settings(&self) -> &'static [&'static str] {
        match self.init_weights {
            InitMiss::Mini => &[
                "r",
                "mini_r",
                "miss_dropout",
                "init_weights",
                "modules_to_save",
            ],
            _ => &["r", "miss_dropout", "init_weights", "modules_to_save"],
        }
    }

    fn rank(&self) -> Option<usize> {
        Some(self.r)
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        // With "bat" too: `W·B + B` is linear in B.
        Weighing::Factor {
            keys: &[BLOCK],
            neutral: 0.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        self.is_bat().then_some(
            "MiSS with init_weights = \"bat\" multiplies the base's weights, so what it adds depends on the base",
        )
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        if self.is_bat() {
            // The sum that the input is multiplied with, and the weight that the blocks multiply, where it is a copy.
            return Kept {
                fixed: (1 + usize::from(layer.widened)) * layer.input * layer.out,
                ..Kept::INPUT
            };
        }
        // The sums over the pieces, and with dropout its mask.
        let mask = match self.drops_inputs() {
            true => layer.input,
            false => 0,
        };
        Kept {
            row: layer.rank + mask,
            ..Kept::default()
        }
    }

    fn drops_inputs(&self) -> bool {
        self.miss_dropout > 0.0 && !self.is_bat()
    }
}

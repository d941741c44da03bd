//! (IA)³: each output of a layer, or each input of a feed-forward layer, is multiplied by a learnt number.
//! `y = l∘(W·x + b)`, or `y = W·(l∘x) + b`.
//!
//! Formulas as in Liu et al. 2022 (arXiv:2205.05638), names and initial values as in PEFT's
//! `tuners/ia3/layer.py`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{
    Adapter, InitContext, Method, MethodConfig, ParamMut, ParamRef, Parameters, Placement,
};
use crate::base::Base;
use crate::config::fields::peft_config;
use crate::config::{Purpose, Targets};
use crate::error::Result;
use crate::linalg::random::gaussian;
use crate::plan::TargetPlan;
use crate::plan::target::{Selection, names_module};

const L: &str = "ia3_l";
/// PEFT's defaults for the Llama family.
const TARGETS: [&str; 3] = ["k_proj", "v_proj", "down_proj"];
const FEEDFORWARD: [&str; 1] = ["down_proj"];

peft_config! {
    /// PEFT's `IA3Config`.
    pub struct Ia3Config in "IA3" {
        /// The modules to adapt; `None` stands for `k_proj`, `v_proj` and `down_proj`.
        target_modules: Option<Targets> = None;
        /// Modules to leave out of them.
        exclude_modules: Option<Targets> = None;
        /// Those of them whose inputs are scaled; `None` stands for `down_proj`.
        feedforward_modules: Option<Targets> = None;
        /// Modules of which a full copy is trained and saved.
        modules_to_save: Option<Vec<String>> = None;
        /// Start at one, which changes nothing; else at random.
        init_ia3_weights: bool = true;
    }
    written {
        "fan_in_fan_out": serde_json::json!(false);
    }
    refused {}
}

/// The factors of one layer.
#[derive(Module, Debug)]
pub struct Ia3 {
    /// `[out, 1]`, or `[1, in]` for a feed-forward layer.
    pub l: Param<Tensor<2>>,
    /// Whether inputs are scaled, not outputs.
    #[module(skip)]
    pub feedforward: bool,
}

impl Ia3 {
    fn as_row(&self) -> Tensor<2> {
        let count = self.l.shape().num_elements();
        self.l.val().reshape([1, count])
    }
}

impl Method for Ia3 {
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        if self.feedforward {
            base.forward(x * self.as_row())
        } else {
            base.forward(x) * self.as_row()
        }
    }

    fn merged(&self, base: Base) -> Base {
        // `[out, 1]` scales rows, `[1, in]` columns.
        let weight = base.weight.map(|w| w * self.l.val());
        let bias = match (base.bias, self.feedforward) {
            (Some(bias), false) => {
                let count = bias.dims()[0];
                Some(bias * self.l.val().reshape([count]))
            }
            (bias, _) => bias,
        };
        Base { weight, bias }
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn has_dropout(&self) -> bool {
        false
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(L, ParamRef::Matrix(&self.l));
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(L, ParamMut::Matrix(&mut self.l));
    }
}

impl Ia3Config {
    fn is_feedforward(&self, module: &str) -> bool {
        match &self.feedforward_modules {
            Some(targets) => names_module(targets, module),
            None => FEEDFORWARD.iter().any(|name| {
                module
                    .strip_suffix(name)
                    .is_some_and(|head| head.is_empty() || head.ends_with('.'))
            }),
        }
    }

    fn shape(&self, target: &TargetPlan) -> [usize; 2] {
        if self.is_feedforward(&target.name) {
            [1, target.in_features]
        } else {
            [target.out_features, 1]
        }
    }
}

impl MethodConfig for Ia3Config {
    fn selection(&self) -> Selection<'_> {
        Selection {
            target: self.target_modules.as_ref(),
            default: &TARGETS,
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref().unwrap_or_default(),
            ..Selection::NOTHING
        }
    }

    fn problems(&self, purpose: Purpose) -> Vec<String> {
        let mut problems = self.refused();
        if let (Purpose::Initialise, Some(Targets::List(listed)), Some(Targets::List(targets))) =
            (purpose, &self.feedforward_modules, &self.target_modules)
        {
            let strangers = listed.iter().filter(|name| !targets.contains(name));
            problems.extend(strangers.map(|name| {
                format!("feedforward_modules: {name:?} is not among the target_modules")
            }));
        }
        problems
    }

    fn scale(&self, _: usize, _: f64) -> f64 {
        1.0
    }

    fn parameters(&self, target: &TargetPlan) -> Parameters {
        vec![(L, self.shape(target).to_vec())]
    }

    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        let count = self.shape(target).iter().product();
        Ok(vec![if self.init_ia3_weights {
            vec![1.0; count]
        } else {
            gaussian(&mut start.rng(target, L), count, 1.0)
        }])
    }

    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        let values = values.into_iter().next().unwrap_or_default();
        Adapter::Ia3(Ia3 {
            l: place.param(&target.key(L), values, self.shape(target)),
            feedforward: self.is_feedforward(&target.name),
        })
    }
}

/// An adapter of ones.
pub(crate) fn neutral(target: &TargetPlan, place: &Placement<'_>) -> Adapter {
    let shape = [target.out_features, 1];
    Adapter::Ia3(Ia3 {
        l: place.param(&target.key(L), vec![1.0; target.out_features], shape),
        feedforward: false,
    })
}

impl MethodFacts for Ia3Config {
    const KEYS: &'static [&'static str] = &[L];

    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape> {
        let (out, width) = own.pair(L, L)?;
        Some(BaseShape::Linear(out, width))
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "(IA)³"
    }

    fn headline(&self) -> &'static [&'static str] {
        &[]
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &["modules_to_save"]
    }

    fn rank(&self) -> Option<usize> {
        None
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        Weighing::Factor {
            keys: &[L],
            neutral: 1.0,
        }
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        Some("(IA)³ multiplies the base's weights, so what it adds depends on the base")
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        match self.is_feedforward(layer.name) {
            true => Kept::INPUT,
            // The base's output.
            false => Kept {
                row: layer.out,
                ..Kept::default()
            },
        }
    }

    fn drops_inputs(&self) -> bool {
        false
    }
}

//! Full fine-tuning: every parameter of the base is trained, and there is no adapter. The baseline that
//! the others are judged against.
//!
//! PEFT has no such method. Its configuration exists so that a checkpoint of such a run is a directory
//! like any other; PEFT refuses it by its type.

use super::facts::{BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing};
use super::{Adapter, InitContext, MethodConfig, Parameters, Placement};
use crate::config::fields::peft_config;
use crate::config::{Purpose, Targets};
use crate::error::{AdapterError, Result};
use crate::plan::TargetPlan;
use crate::plan::target::Selection;

peft_config! {
    /// Full fine-tuning has nothing to set.
    pub struct FullConfig in "ENAMEL_FULL" {
        /// No module is adapted.
        target_modules: Option<Targets> = Some(Targets::Nothing);
    }
    written {}
    refused {}
}

impl MethodConfig for FullConfig {
    fn selection(&self) -> Selection<'_> {
        Selection::NOTHING
    }

    fn problems(&self, _: Purpose) -> Vec<String> {
        self.refused()
    }

    fn scale(&self, _: usize, _: f64) -> f64 {
        1.0
    }

    fn parameters(&self, _: &TargetPlan) -> Parameters {
        Vec::new()
    }

    fn initial(&self, target: &TargetPlan, _: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        Err(no_target(target))
    }

    fn build(&self, target: &TargetPlan, _: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        // Never asked for: no module is a target. An adapter that adds nothing is the honest answer.
        super::ia3::neutral(target, place)
    }

    fn trains_everything(&self) -> bool {
        true
    }
}

fn no_target(target: &TargetPlan) -> AdapterError {
    AdapterError::Start {
        module: target.name.clone(),
        reason: "full fine-tuning adapts no module".into(),
    }
}

impl MethodFacts for FullConfig {
    // Its file holds the model's own names.
    const KEYS: &'static [&'static str] = &[];

    fn base_of(_: &OwnShapes<'_>) -> Option<BaseShape> {
        None
    }

    fn input_width(&self) -> InputWidth {
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "full fine-tuning"
    }

    fn headline(&self) -> &'static [&'static str] {
        &[]
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[]
    }

    fn rank(&self) -> Option<usize> {
        None
    }

    fn no_weights(&self) -> Option<&'static str> {
        None
    }

    fn weighing(&self) -> Weighing {
        Weighing::None
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        Some("full fine-tuning holds whole weights, not what was added")
    }

    fn keeps(&self, _: &LayerSize<'_>) -> Kept {
        Kept::INPUT
    }

    fn drops_inputs(&self) -> bool {
        false
    }
}

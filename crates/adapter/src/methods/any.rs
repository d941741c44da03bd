//! The configuration of any method is one too.

use std::collections::BTreeMap;
use std::path::Path;

use super::facts::{
    BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Tensors, Weighing,
};
use super::lora::embedding::LoraEmbedding;
use super::{
    Adapter, AdapterConfig, InitContext, LoadedAdapter, MethodConfig, Parameters, Placement,
};
use crate::base::module_shape::ModuleShape;
use crate::config::{Bias, Purpose, SaveMeta, TokenIndices};
use crate::error::Result;
use crate::layers::adaptable::Adaptable;
use crate::plan::target::Selection;
use crate::plan::{AdapterPlan, TargetPlan};

impl MethodConfig for AdapterConfig {
    fn selection(&self) -> Selection<'_> {
        each_config!(self, config => config.selection())
    }
    fn problems(&self, purpose: Purpose) -> Vec<String> {
        each_config!(self, config => config.problems(purpose))
    }
    fn scale(&self, r: usize, alpha: f64) -> f64 {
        each_config!(self, config => config.scale(r, alpha))
    }
    fn largest_rank(&self, out_features: usize, in_features: usize) -> usize {
        each_config!(self, config => config.largest_rank(out_features, in_features))
    }
    fn misfit(&self, target: &TargetPlan) -> Option<String> {
        each_config!(self, config => config.misfit(target))
    }
    fn parameters(&self, target: &TargetPlan) -> Parameters {
        each_config!(self, config => config.parameters(target))
    }
    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        each_config!(self, config => config.initial(target, start))
    }
    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        each_config!(self, config => config.build(target, values, place))
    }
    fn build_embedding(
        &self,
        target: &TargetPlan,
        values: Vec<Vec<f32>>,
        place: &Placement<'_>,
    ) -> Option<LoraEmbedding> {
        each_config!(self, config => config.build_embedding(target, values, place))
    }
    fn adapts_embeddings(&self) -> bool {
        each_config!(self, config => config.adapts_embeddings())
    }
    fn bias(&self) -> Bias {
        each_config!(self, config => config.bias())
    }
    fn token_indices(&self) -> Option<&TokenIndices> {
        each_config!(self, config => config.token_indices())
    }
    fn trains_everything(&self) -> bool {
        each_config!(self, config => config.trains_everything())
    }
    fn shared(&self, targets: &[TargetPlan]) -> Vec<(&'static str, [usize; 2])> {
        each_config!(self, config => config.shared(targets))
    }
    fn initial_shared(&self, shapes: &[(&'static str, [usize; 2])]) -> Vec<Vec<f32>> {
        each_config!(self, config => config.initial_shared(shapes))
    }
    fn stores_shared(&self) -> bool {
        each_config!(self, config => config.stores_shared())
    }
    fn subtracts_initial(&self) -> bool {
        each_config!(self, config => config.subtracts_initial())
    }
    fn is_of_model(&self) -> bool {
        each_config!(self, config => config.is_of_model())
    }
    fn plan_of_model(&self, modules: &[ModuleShape]) -> Option<Result<AdapterPlan>> {
        each_config!(self, config => config.plan_of_model(modules))
    }
    fn attach_to_model<M: Adaptable>(
        &self,
        model: &mut M,
        name: &str,
        seed: u64,
    ) -> Option<Result<AdapterPlan>> {
        each_config!(self, config => config.attach_to_model(model, name, seed))
    }
    fn load_to_model<M: Adaptable>(
        &self,
        model: &mut M,
        name: &str,
        dir: &Path,
        trainable: bool,
    ) -> Option<Result<LoadedAdapter>> {
        each_config!(self, config => config.load_to_model(model, name, dir, trainable))
    }
    fn save_from_model<M: Adaptable>(
        &self,
        model: &M,
        meta: &SaveMeta,
        dir: &Path,
    ) -> Option<Result<()>> {
        each_config!(self, config => config.save_from_model(model, meta, dir))
    }
}

/// The facts of whatever method it is; each is said at [`MethodFacts`].
impl AdapterConfig {
    /// The base's module as the shapes of its parameters tell it.
    pub fn base_of(&self, own: &OwnShapes<'_>) -> Option<BaseShape> {
        fn of<C: MethodFacts>(_: &C, own: &OwnShapes<'_>) -> Option<BaseShape> {
            C::base_of(own)
        }
        each_config!(self, config => of(config, own))
    }

    /// Whether its tensors tell how wide its modules' inputs are.
    pub fn input_width(&self) -> InputWidth {
        each_config!(self, config => config.input_width())
    }

    /// Whole keys of what its modules share.
    pub fn shared_keys(&self) -> &'static [&'static str] {
        fn of<C: MethodFacts>(_: &C) -> &'static [&'static str] {
            C::SHARED_KEYS
        }
        each_config!(self, config => of(config))
    }

    /// What it is called.
    pub fn label(&self) -> &'static str {
        each_config!(self, config => config.label())
    }

    /// Settings that a line about it names.
    pub fn headline(&self) -> &'static [&'static str] {
        each_config!(self, config => config.headline())
    }

    /// What such a line says besides.
    pub fn remarks(&self) -> Vec<&'static str> {
        each_config!(self, config => config.remarks())
    }

    /// Settings on its model card.
    pub fn card_settings(&self) -> &'static [&'static str] {
        each_config!(self, config => config.card_settings())
    }

    /// What the model card says of using it.
    pub fn card_note(&self) -> Option<String> {
        each_config!(self, config => config.card_note())
    }

    /// Its rank.
    pub fn rank(&self) -> Option<usize> {
        each_config!(self, config => config.rank())
    }

    /// Why there are no weights of its own for a single module.
    pub fn no_weights(&self) -> Option<&'static str> {
        each_config!(self, config => config.no_weights())
    }

    /// How its part is made larger or smaller.
    pub fn weighing(&self) -> Weighing {
        each_config!(self, config => config.weighing())
    }

    /// Why the base's weights are needed to say what it adds to them.
    pub fn needs_base(&self, has_start: bool) -> Option<&'static str> {
        each_config!(self, config => config.needs_base(has_start))
    }

    /// The names of A and B, where what it adds is their scaled product.
    pub fn factor_keys(&self, embedding: bool) -> Option<[&'static str; 2]> {
        each_config!(self, config => config.factor_keys(embedding))
    }

    /// Its parameter that is added to a layer's bias.
    pub fn bias_key(&self) -> Option<&'static str> {
        each_config!(self, config => config.bias_key())
    }

    /// Why what its parameters started from cannot be worked out again.
    pub fn start_is_lost(&self) -> Option<String> {
        each_config!(self, config => config.start_is_lost())
    }

    /// The adapter with what its parameters started from written into it.
    pub fn with_start(
        self,
        tensors: Tensors,
        start: BTreeMap<String, Vec<f32>>,
    ) -> (Self, Tensors) {
        each_config!(self, config => {
            let (config, tensors) = config.with_start(tensors, start);
            (config.into(), tensors)
        })
    }

    /// The same, read from the files in `dir`.
    pub fn located(self, dir: &Path) -> Self {
        each_config!(self, config => config.located(dir).into())
    }

    /// The adapters that it is made of: name and directory.
    pub fn members(&self) -> &[(String, String)] {
        each_config!(self, config => config.members())
    }

    /// What the operation of a layer with it keeps for the backward pass.
    pub fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        each_config!(self, config => config.keeps(layer))
    }

    /// Whether elements of the layers' inputs are dropped in training.
    pub fn drops_inputs(&self) -> bool {
        each_config!(self, config => config.drops_inputs())
    }
}

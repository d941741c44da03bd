//! What a method must say: of its parameters, and of its configuration.

use std::path::Path;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use enamel_kernels::{BaseWeight, LowRank};
use rand_chacha::ChaCha8Rng;

use super::lora::embedding::LoraEmbedding;
use super::{Adapter, AdapterConfig, ParamMut, ParamRef};
use crate::base::Base;
use crate::base::module_shape::ModuleShape;
use crate::config::{Bias, Purpose, SaveMeta, TokenIndices};
use crate::error::Result;
use crate::layers::adaptable::Adaptable;
use crate::plan::target::Selection;
use crate::plan::{AdapterPlan, TargetPlan};

/// What a method's parameters do, once they are attached to a linear layer.
pub trait Method: Module {
    /// The layer with the adapter, in activation space.
    ///
    /// # Shapes
    /// - x: `[rows, in]`, result: `[rows, out]`
    fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2>;
    /// Weight and bias with the adapter folded in: the definition that merging and export use and that
    /// `forward` is tested against.
    fn merged(&self, base: Base) -> Base;
    /// What the adapter adds to the layer's output, `[rows, out]`, for sums over several adapters.
    fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
        self.forward(x.clone(), base) - base.forward(x)
    }
    /// Whether [`Method::contribution`] is the same whatever other adapters are in use, so that parts add up.
    fn is_additive(&self) -> bool {
        true
    }
    /// The factors, where `forward` is the base plus their scaled product with x, and nothing else.
    fn low_rank(&self) -> Option<LowRank> {
        None
    }
    /// The factor in front of the adapter's product.
    fn scale(&self) -> f64;
    /// Whether the forward pass, as things stand, drops anything at random.
    fn has_dropout(&self) -> bool;
    /// Calls `f` with each trained parameter under the name it has in PEFT's file after the module's.
    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>));
    /// The same, to change them.
    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>));
    /// Frozen tensors that all layers share, under their whole key in PEFT's file.
    fn shared(&self) -> Vec<(&'static str, Tensor<2>)> {
        Vec::new()
    }
    /// What the parameters started from, where the base is understood to have given it up
    /// ([`InitLora::subtracts_initial`](crate::methods::lora::config::InitLora::subtracts_initial)), in the order of [`MethodConfig::parameters`].
    fn initial_factors(&self) -> Option<Vec<Tensor<2>>> {
        None
    }
}

/// Names (after the module's) and shapes of parameters.
pub type Parameters = Vec<(&'static str, Vec<usize>)>;

/// What a method's configuration tells the rest of the crate.
pub trait MethodConfig {
    /// Which modules it takes hold of.
    fn selection(&self) -> Selection<'_>;
    /// Options that are wrong or not supported, one line each.
    fn problems(&self, purpose: Purpose) -> Vec<String>;
    /// The factor in front of the adapter's product.
    fn scale(&self, r: usize, alpha: f64) -> f64;
    /// The highest rank that means something on a matrix of this shape.
    fn largest_rank(&self, out_features: usize, in_features: usize) -> usize {
        in_features.min(out_features)
    }
    /// Why it cannot be on a layer of these sizes, if it cannot, whether it is new or from a file.
    fn misfit(&self, _target: &TargetPlan) -> Option<String> {
        None
    }
    /// Names and shapes of the parameters one target gets, in a fixed order.
    fn parameters(&self, target: &TargetPlan) -> Parameters;
    /// Values that the parameters of one target start from, in the order of
    /// [`MethodConfig::parameters`].
    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>>;
    /// The adapter of one linear layer, from values in the order of [`MethodConfig::parameters`].
    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter;
    /// The factors beside an embedding; `None` where the method knows only linear layers.
    fn build_embedding(
        &self,
        _target: &TargetPlan,
        _values: Vec<Vec<f32>>,
        _place: &Placement<'_>,
    ) -> Option<LoraEmbedding> {
        None
    }
    /// Whether an embedding may be a target.
    fn adapts_embeddings(&self) -> bool {
        false
    }
    /// Which biases of the base are trained along.
    fn bias(&self) -> Bias {
        Bias::None
    }
    /// Single embedding rows to train.
    fn token_indices(&self) -> Option<&TokenIndices> {
        None
    }
    /// Whether everything in the base is trained, and no adapter.
    fn trains_everything(&self) -> bool {
        false
    }
    /// Frozen tensors that all targets share: whole key in PEFT's file and shape.
    fn shared(&self, _targets: &[TargetPlan]) -> Vec<(&'static str, [usize; 2])> {
        Vec::new()
    }
    /// Values of the shared tensors where no file holds them, in the order of
    /// [`MethodConfig::shared`].
    fn initial_shared(&self, _shapes: &[(&'static str, [usize; 2])]) -> Vec<Vec<f32>> {
        Vec::new()
    }
    /// Whether a file must hold the shared tensors.
    fn stores_shared(&self) -> bool {
        true
    }
    /// Whether the parameters begin with what the base is understood to have given up.
    fn subtracts_initial(&self) -> bool {
        false
    }
    /// Whether it is an adapter of the whole model, with a [part](crate::layers::adaptable::ModelPart) there: it plans,
    /// attaches, reads and writes itself by the functions below, which answer `None` for all others.
    fn is_of_model(&self) -> bool {
        false
    }
    /// Its plan on these modules.
    fn plan_of_model(&self, _modules: &[ModuleShape]) -> Option<Result<AdapterPlan>> {
        None
    }
    /// Attaches it.
    fn attach_to_model<M: Adaptable>(
        &self,
        _model: &mut M,
        _name: &str,
        _seed: u64,
    ) -> Option<Result<AdapterPlan>>
    where
        Self: Sized,
    {
        None
    }
    /// Attaches it with the values that lie in `dir`.
    fn load_to_model<M: Adaptable>(
        &self,
        _model: &mut M,
        _name: &str,
        _dir: &Path,
        _trainable: bool,
    ) -> Option<Result<LoadedAdapter>>
    where
        Self: Sized,
    {
        None
    }
    /// Writes it.
    fn save_from_model<M: Adaptable>(
        &self,
        _model: &M,
        _meta: &SaveMeta,
        _dir: &Path,
    ) -> Option<Result<()>>
    where
        Self: Sized,
    {
        None
    }
}

/// First values of a linear layer's factors from elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct InitFactors {
    /// A, row-major `[r, in]`.
    pub a: Vec<f32>,
    /// B, row-major `[out, r]`; zero where it is not given.
    pub b: Option<Vec<f32>>,
}

/// First values of the factors (EVA, LoftQ), by module.
pub type InitFactorsFor<'a> = dyn Fn(&str) -> Option<InitFactors> + 'a;

/// What first values may depend on.
pub struct InitContext<'a> {
    /// The run's seed.
    pub seed: u64,
    /// The base's weight `[out, in]` (`[vocabulary, hidden]` for an embedding), row-major, when asked
    /// for.
    pub weight: &'a dyn Fn() -> Result<Vec<f32>>,
    /// First values from elsewhere (EVA, LoftQ).
    pub given: Option<&'a InitFactorsFor<'a>>,
}

impl InitContext<'_> {
    /// The generator of one parameter: seed and name decide what it draws.
    pub fn rng(&self, target: &TargetPlan, parameter: &str) -> ChaCha8Rng {
        crate::linalg::random::rng(self.seed, &target.key(parameter))
    }
}

/// Where a new parameter goes and whether it is trained.
pub struct Placement<'a> {
    /// Its device.
    pub device: &'a Device,
    /// Whether it requires a gradient.
    pub trainable: bool,
    /// The adapter's name, which sets its parameters apart from another adapter's.
    pub adapter: &'a str,
    /// Frozen tensors that all layers share.
    pub shared: &'a [(&'static str, Tensor<2>)],
    /// The weight that the adapter is beside.
    pub weight: BaseWeight,
    /// Values that the parameters started from, where [`MethodConfig::subtracts_initial`].
    pub origin: Option<Vec<Vec<f32>>>,
}

impl Placement<'_> {
    /// A parameter of f32 values whose id follows from its key in PEFT's file.
    pub fn param<const D: usize>(
        &self,
        key: &str,
        values: Vec<f32>,
        shape: [usize; D],
    ) -> Param<Tensor<D>> {
        let value = self.tensor(values, shape);
        Param::initialized(adapter_param_id(self.adapter, key), value)
            .set_require_grad(self.trainable)
    }

    /// A tensor that is no parameter.
    pub fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), (self.device, DType::F32))
    }

    /// The shared tensor under `key`.
    pub fn shared(&self, key: &str) -> Option<Tensor<2>> {
        let found = self.shared.iter().find(|(k, _)| *k == key);
        found.map(|(_, tensor)| tensor.clone())
    }
}

/// The id of an adapter's parameter. The adapter without a name has ids that depend on the key alone.
pub(crate) fn adapter_param_id(adapter: &str, key: &str) -> ParamId {
    if adapter == crate::base::routing::DEFAULT {
        crate::base::ids::param_id(key)
    } else {
        crate::base::ids::param_id(&format!("{adapter}/{key}"))
    }
}

/// An adapter that has been read and attached.
#[derive(Clone, Debug)]
pub struct LoadedAdapter {
    /// Its configuration, as in the file.
    pub config: AdapterConfig,
    /// What was attached.
    pub plan: AdapterPlan,
}

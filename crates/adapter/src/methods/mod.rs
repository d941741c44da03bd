//! The adapter methods: one file each, one line each in the lists below.
//!
//! A method's file holds its parameters with [`Method`] (what they compute, what they make of the weight
//! when they are folded in, what they are called in PEFT's file) and its configuration with
//! [`MethodConfig`] (which modules, how many parameters, how they start). Matching, counting, attaching,
//! merging, storing and the directory format ask for nothing else.

pub mod adalora;
mod dropout;
pub mod full;
pub mod ia3;
pub mod loha;
pub mod lokr;
pub mod lora;
pub mod tokens;
pub mod vera;
pub mod xlora;

use std::path::Path;

use crate::base::to_host;
use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use enamel_kernels::{BaseWeight, LowRank};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

pub(crate) use dropout::{at_work, drawn, dropping};

use crate::base::Base;
use crate::base::module_shape::ModuleShape;
use crate::config::{Bias, Purpose, SaveMeta, Targets, TokenIndices, object_of};
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::Adaptable;
use crate::methods::lora::config::LoraConfig;
use crate::methods::xlora::XLoraConfig;
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
    ) -> Option<lora::embedding::LoraEmbedding> {
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

/// A parameter of any rank, to read.
pub enum ParamRef<'a> {
    /// Of one axis.
    Vector(&'a Param<Tensor<1>>),
    /// Of two axes.
    Matrix(&'a Param<Tensor<2>>),
}

/// A parameter of any rank, to change.
pub enum ParamMut<'a> {
    /// Of one axis.
    Vector(&'a mut Param<Tensor<1>>),
    /// Of two axes.
    Matrix(&'a mut Param<Tensor<2>>),
}

impl ParamRef<'_> {
    /// Its id.
    pub fn id(&self) -> ParamId {
        match self {
            Self::Vector(p) => p.id,
            Self::Matrix(p) => p.id,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Vector(p) => p.dims().to_vec(),
            Self::Matrix(p) => p.dims().to_vec(),
        }
    }

    /// Its values as f32, row-major.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Self::Vector(p) => to_host(name, p.val()),
            Self::Matrix(p) => to_host(name, p.val()),
        }
    }

    /// Its gradient as f32, row-major; `None` if the backward pass did not reach it.
    pub fn gradient(
        &self,
        name: &str,
        grads: &burn::tensor::Gradients,
    ) -> Result<Option<Vec<f32>>> {
        match self {
            Self::Vector(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
            Self::Matrix(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
        }
    }
}

impl ParamMut<'_> {
    /// The same parameter, to read.
    pub fn as_ref(&self) -> ParamRef<'_> {
        match self {
            Self::Vector(p) => ParamRef::Vector(p),
            Self::Matrix(p) => ParamRef::Matrix(p),
        }
    }

    /// Replaces the values (as many as the shape holds); id and trainability stay.
    pub(crate) fn write(&mut self, values: Vec<f32>) {
        match self {
            Self::Vector(p) => replace(p, values),
            Self::Matrix(p) => replace(p, values),
        }
    }
}

fn replace<const D: usize>(param: &mut Param<Tensor<D>>, values: Vec<f32>) {
    let data = TensorData::new(values, param.dims());
    // `map` keeps the id and what `train` restores.
    *param = param.clone().map(|old| {
        let new = Tensor::from_data(data, (&old.device(), old.dtype()));
        if old.is_require_grad() {
            new.require_grad()
        } else {
            new
        }
    });
}

/// An adapter that has been read and attached.
#[derive(Clone, Debug)]
pub struct LoadedAdapter {
    /// Its configuration, as in the file.
    pub config: AdapterConfig,
    /// What was attached.
    pub plan: AdapterPlan,
}

/// Makes one enum of the methods and passes every call on.
macro_rules! methods {
    ($($variant:ident($adapter:ty)),+ $(,)?) => {
        /// The adapter beside a linear layer.
        #[derive(Module, Debug)]
        // As large as its largest method; there is one a layer.
        #[allow(clippy::large_enum_variant)]
        pub enum Adapter {
            $(
                #[doc = concat!("[`", stringify!($adapter), "`]")]
                $variant($adapter),
            )+
        }

        impl Adapter {
            /// The layer with the adapter; see [`Method::forward`].
            pub fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.forward(x, base),)+ }
            }

            /// What it adds to the layer's output; see [`Method::contribution`].
            pub fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.contribution(x, base),)+ }
            }

            /// Weight and bias with the adapter folded in; see [`Method::merged`].
            pub fn merged(&self, base: Base) -> Base {
                match self { $(Self::$variant(m) => m.merged(base),)+ }
            }

            /// Whether its part is the same whatever others do; see [`Method::is_additive`].
            pub fn is_additive(&self) -> bool {
                match self { $(Self::$variant(m) => m.is_additive(),)+ }
            }

            /// Its factors, where there is nothing else to it; see [`Method::low_rank`].
            pub fn low_rank(&self) -> Option<LowRank> {
                match self { $(Self::$variant(m) => m.low_rank(),)+ }
            }

            /// The factor in front of the adapter's product.
            pub fn scale(&self) -> f64 {
                match self { $(Self::$variant(m) => m.scale(),)+ }
            }

            /// Whether it drops anything at random now.
            pub fn has_dropout(&self) -> bool {
                match self { $(Self::$variant(m) => m.has_dropout(),)+ }
            }

            /// Its parameters; see [`Method::for_each_param`].
            pub fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param(f),)+ }
            }

            /// Its parameters, to change; see [`Method::for_each_param_mut`].
            pub fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param_mut(f),)+ }
            }

            /// Frozen tensors that all layers share; see [`Method::shared`].
            pub fn shared(&self) -> Vec<(&'static str, Tensor<2>)> {
                match self { $(Self::$variant(m) => m.shared(),)+ }
            }

            /// What its parameters started from; see [`Method::initial_factors`].
            pub fn initial_factors(&self) -> Option<Vec<Tensor<2>>> {
                match self { $(Self::$variant(m) => m.initial_factors(),)+ }
            }
        }
    };
}

/// Makes one enum of the configurations and passes every call on.
macro_rules! configs {
    // `$dollar` is a `$`, for the macro that this one writes.
    ($dollar:tt $($variant:ident($config:ty) $($untargeted:ident)?),+ $(,)?) => {
        /// The configuration of any method.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(clippy::large_enum_variant)]
        pub enum AdapterConfig {
            $(
                #[doc = concat!("[`", stringify!($config), "`]")]
                $variant($config),
            )+
        }


        $(impl From<$config> for AdapterConfig {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })+

        impl AdapterConfig {
            /// Every `peft_type` that is read.
            pub const PEFT_TYPES: &'static [&'static str] = &[$(<$config>::PEFT_TYPE,)+];

            /// `peft_type` in the file.
            pub fn peft_type(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$config>::PEFT_TYPE,)+ }
            }

            /// Reads `adapter_config.json` of any method; `origin` names the file in errors.
            ///
            /// # Errors
            /// A type that is not one of [`Self::PEFT_TYPES`]; all wrong values and all that is not
            /// supported, at once.
            pub fn from_json(value: &Value, origin: &str) -> Result<Self> {
                let object = object_of(value, origin, None)?;
                let kind = object.get("peft_type").and_then(Value::as_str).unwrap_or_default();
                $(if kind == <$config>::PEFT_TYPE {
                    return <$config>::from_json(value, origin).map(Self::$variant);
                })+
                Err(AdapterError::Config {
                    origin: origin.to_string(),
                    problems: vec![format!(
                        "peft_type is {}; supported are {}",
                        object.get("peft_type").unwrap_or(&Value::Null),
                        Self::PEFT_TYPES.join(", ")
                    )],
                })
            }

            /// The file's contents, keys sorted.
            pub fn to_json(&self) -> Value {
                match self { $(Self::$variant(c) => c.to_json(),)+ }
            }

            /// The same with their values; see [`LoraConfig::unknown_settings`].
            pub fn unknown_settings(&self) -> Vec<String> {
                match self { $(Self::$variant(c) => c.unknown_settings(),)+ }
            }

            /// Keys that nobody knows; see [`LoraConfig::unknown_keys`].
            pub fn unknown_keys(&self) -> Vec<&str> {
                match self { $(Self::$variant(c) => c.unknown_keys(),)+ }
            }

            /// The base model's name or directory.
            pub fn base_model_name_or_path(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.base_model_name_or_path.as_deref(),)+ }
            }

            /// The base model's revision.
            pub fn revision(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.revision.as_deref(),)+ }
            }

            /// What the model is for.
            pub fn task_type(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.task_type.as_deref(),)+ }
            }

            /// Sets what the file says of its base; `None` leaves a field alone.
            pub fn set_origin(
                &mut self,
                base: Option<&str>,
                revision: Option<&str>,
                task_type: Option<&str>,
            ) {
                match self { $(Self::$variant(c) => {
                    if let Some(base) = base { c.base_model_name_or_path = Some(base.into()); }
                    if let Some(revision) = revision { c.revision = Some(revision.into()); }
                    if let Some(task) = task_type { c.task_type = Some(task.into()); }
                    c.other.insert("inference_mode".into(), Value::Bool(true));
                })+ }
            }

            /// Says that layers are stored the other way round (transformers' `Conv1D`), where the file of the method
            /// has a key for it: PEFT merges such layers transposed.
            pub fn set_fan_in_fan_out(&mut self) {
                const KEY: &str = "fan_in_fan_out";
                if self.to_json().get(KEY).is_none() {
                    return;
                }
                match self { $(Self::$variant(c) => {
                    c.other.insert(KEY.into(), Value::Bool(true));
                })+ }
            }

            /// Replaces `target_modules`, where the method has that.
            pub fn set_targets(&mut self, targets: Targets) {
                match self { $(Self::$variant(c) => configs!(@targets c targets $($untargeted)?),)+ }
            }

            fn inner(&self) -> &dyn MethodConfig {
                match self { $(Self::$variant(c) => c,)+ }
            }
        }

        /// Does the same to whatever configuration it is.
        macro_rules! each_config {
            ($dollar any:expr, $dollar config:ident => $dollar body:expr) => {
                match $dollar any { $(AdapterConfig::$variant($dollar config) => $dollar body,)+ }
            };
        }
    };
    (@targets $config:ident $targets:ident) => { $config.target_modules = Some($targets) };
    (@targets $config:ident $targets:ident untargeted) => {{
        let _ = ($config, $targets);
    }};
}

// The lists: a new method is a file beside this one and a line in each.
methods! {
    Lora(lora::Lora),
    Loha(loha::Loha),
    Lokr(lokr::Lokr),
    AdaLora(adalora::AdaLora),
    Vera(vera::Vera),
    Ia3(ia3::Ia3),
}

configs! { $
    Lora(LoraConfig),
    Loha(loha::LohaConfig),
    Lokr(lokr::LokrConfig),
    AdaLora(adalora::AdaLoraConfig),
    Vera(vera::VeraConfig),
    Ia3(ia3::Ia3Config),
    Full(full::FullConfig),
    XLora(XLoraConfig) untargeted,
}

impl MethodConfig for AdapterConfig {
    fn selection(&self) -> Selection<'_> {
        self.inner().selection()
    }
    fn problems(&self, purpose: Purpose) -> Vec<String> {
        self.inner().problems(purpose)
    }
    fn scale(&self, r: usize, alpha: f64) -> f64 {
        self.inner().scale(r, alpha)
    }
    fn largest_rank(&self, out_features: usize, in_features: usize) -> usize {
        self.inner().largest_rank(out_features, in_features)
    }
    fn parameters(&self, target: &TargetPlan) -> Parameters {
        self.inner().parameters(target)
    }
    fn initial(&self, target: &TargetPlan, start: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        self.inner().initial(target, start)
    }
    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        self.inner().build(target, values, place)
    }
    fn build_embedding(
        &self,
        target: &TargetPlan,
        values: Vec<Vec<f32>>,
        place: &Placement<'_>,
    ) -> Option<lora::embedding::LoraEmbedding> {
        self.inner().build_embedding(target, values, place)
    }
    fn adapts_embeddings(&self) -> bool {
        self.inner().adapts_embeddings()
    }
    fn bias(&self) -> Bias {
        self.inner().bias()
    }
    fn token_indices(&self) -> Option<&TokenIndices> {
        self.inner().token_indices()
    }
    fn trains_everything(&self) -> bool {
        self.inner().trains_everything()
    }
    fn shared(&self, targets: &[TargetPlan]) -> Vec<(&'static str, [usize; 2])> {
        self.inner().shared(targets)
    }
    fn initial_shared(&self, shapes: &[(&'static str, [usize; 2])]) -> Vec<Vec<f32>> {
        self.inner().initial_shared(shapes)
    }
    fn stores_shared(&self) -> bool {
        self.inner().stores_shared()
    }
    fn subtracts_initial(&self) -> bool {
        self.inner().subtracts_initial()
    }
    fn is_of_model(&self) -> bool {
        self.inner().is_of_model()
    }
    fn plan_of_model(&self, modules: &[ModuleShape]) -> Option<Result<AdapterPlan>> {
        self.inner().plan_of_model(modules)
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

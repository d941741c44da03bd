//! The adapter methods: one file each, one line each in the list at the end of this one.
//!
//! A method's file holds its parameters with [`Method`] (what they compute, what they add to the weight,
//! what they are called in PEFT's file) and its configuration's [`MethodConfig`] (which modules, how many
//! parameters, how they start). Matching, counting, attaching, merging, storing and the directory format
//! ask for nothing else.

pub mod lora;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;

use crate::config::Purpose;
use crate::error::{AdapterError, Result};
use crate::plan::TargetPlan;
use crate::target::Selection;

/// What a method's parameters do, once they are attached to a linear layer.
pub trait Method: Module {
    /// `x · wᵀ` plus the adapter's part, in activation space.
    ///
    /// # Shapes
    /// - x: `[rows, in]`, weight: `[out, in]`, result: `[rows, out]`
    fn forward(&self, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2>;
    /// What the adapter adds to the weight, `[out, in]`: the definition that merging and export use
    /// and that `forward` is tested against.
    fn delta_weight(&self) -> Tensor<2>;
    /// The factor in front of the adapter's product.
    fn scale(&self) -> f64;
    /// Calls `f` with each parameter under the name it has in PEFT's file after the module's.
    fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>));
    /// The same, to change them.
    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>));
}

/// What a method's configuration tells the rest of the crate.
pub trait MethodConfig {
    /// `peft_type` in `adapter_config.json`.
    const PEFT_TYPE: &'static str;
    /// Which modules it takes hold of.
    fn selection(&self) -> Selection<'_>;
    /// Options that are wrong or not supported, one line each.
    fn problems(&self, purpose: Purpose) -> Vec<String>;
    /// The factor in front of the adapter's product.
    fn scale(&self, r: usize, alpha: f64) -> f64;
    /// Names (after the module's) and shapes of the parameters one target gets, in a fixed order.
    fn parameters(&self, target: &TargetPlan) -> Vec<(&'static str, Vec<usize>)>;
    /// The values the parameter called `name` starts from, drawn from `rng` alone.
    fn initial(&self, target: &TargetPlan, name: &str, rng: &mut ChaCha8Rng) -> Vec<f32>;
    /// The adapter of one target, from values in the order of [`MethodConfig::parameters`].
    fn build(&self, target: &TargetPlan, values: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter;
}

/// Where a new parameter goes and whether it is trained.
pub struct Placement<'a> {
    /// Its device.
    pub device: &'a Device,
    /// Whether it requires a gradient.
    pub trainable: bool,
}

impl Placement<'_> {
    /// A parameter of f32 values whose id follows from its key in PEFT's file.
    pub fn param<const D: usize>(
        &self,
        key: &str,
        values: Vec<f32>,
        shape: [usize; D],
    ) -> Param<Tensor<D>> {
        let value = Tensor::from_data(TensorData::new(values, shape), (self.device, DType::F32));
        Param::initialized(crate::frozen::param_id(key), value).set_require_grad(self.trainable)
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

/// A tensor's values as f32, row-major.
pub(crate) fn to_host<const D: usize>(name: &str, tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|e| AdapterError::Read {
            name: name.to_string(),
            reason: format!("{e:?}"),
        })
}

/// Makes one enum of the methods and passes every call on.
macro_rules! methods {
    ($($variant:ident($adapter:ty)),+ $(,)?) => {
        /// The adapter beside a linear layer.
        #[derive(Module, Debug)]
        pub enum Adapter {
            $(
                #[doc = concat!("[`", stringify!($adapter), "`]")]
                $variant($adapter),
            )+
        }

        impl Adapter {
            /// `x · wᵀ` plus the adapter's part; see [`Method::forward`].
            pub fn forward(&self, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.forward(x, weight),)+ }
            }

            /// What the adapter adds to the weight; see [`Method::delta_weight`].
            pub fn delta_weight(&self) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.delta_weight(),)+ }
            }

            /// The factor in front of the adapter's product.
            pub fn scale(&self) -> f64 {
                match self { $(Self::$variant(m) => m.scale(),)+ }
            }

            /// Its parameters; see [`Method::for_each_param`].
            pub fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param(f),)+ }
            }

            /// Its parameters, to change; see [`Method::for_each_param_mut`].
            pub fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param_mut(f),)+ }
            }
        }
    };
}

// The list: a new method is a file beside this one and a line here.
methods! {
    Lora(lora::Lora),
}

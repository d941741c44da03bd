//! A model's parameters as it is built: from files, or their names and shapes alone.

use burn::tensor::{Device, Tensor};
use enamel_adapter::{Embedding, Frozen, Linear, ModuleKind, ModuleShape};
use enamel_kernels::{BaseWeight, Compute, HostValues, PackedWeight};

use crate::error::LoadError;

/// Hands out a parameter's values by full name and shape.
pub(crate) type Fetch<'a> = dyn FnMut(&str, &[usize]) -> Result<HostValues, LoadError> + 'a;

/// Hands out a linear layer's weight by the layer's name, if it is to be held packed; and is told whether it is
/// stored as `[in, out]`.
pub(crate) type Pack<'a> = dyn FnMut(&str, bool) -> Result<Option<PackedWeight>, LoadError> + 'a;

/// Where parameters come from.
enum From<'a, 'f> {
    /// One is in host memory at a time.
    Files {
        fetch: &'a mut Fetch<'f>,
        pack: &'a mut Pack<'f>,
    },
    /// Nowhere: what is asked for is noted, and each module gets a single number in its place.
    Nowhere(Vec<ModuleShape>),
}

/// Makes a model's modules, each under its full name. An architecture asks for every module once, in the order
/// in which a loaded model lists them: that is the one place where names, shapes and biases are said, for
/// loading as for everything that is known without weights.
pub struct Weights<'a, 'f> {
    device: &'a Device,
    compute: Compute,
    from: From<'a, 'f>,
}

impl<'a, 'f> Weights<'a, 'f> {
    /// From values that `fetch` hands out. Linear layers' weights are what `pack` makes of them; other matrices
    /// are held as `compute` says, or in bf16 where they came in it.
    pub(crate) fn new(
        device: &'a Device,
        compute: Compute,
        fetch: &'a mut Fetch<'f>,
        pack: &'a mut Pack<'f>,
    ) -> Self {
        let from = From::Files { fetch, pack };
        Self {
            device,
            compute,
            from,
        }
    }

    /// The modules that `build` asks for.
    pub(crate) fn shapes<T>(
        device: &'a Device,
        build: impl FnOnce(&mut Weights<'_, '_>) -> Result<T, LoadError>,
    ) -> Vec<ModuleShape> {
        let mut weights = Weights {
            device,
            compute: Compute::F32,
            from: From::Nowhere(Vec::new()),
        };
        // Nothing is read, so nothing fails.
        let _ = build(&mut weights);
        match weights.from {
            From::Nowhere(shapes) => shapes,
            From::Files { .. } => Vec::new(),
        }
    }

    /// A linear layer of shape `[out, in]`.
    pub fn linear(
        &mut self,
        module: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Linear, LoadError> {
        self.linear_of(ModuleKind::Linear, module, shape, bias)
    }

    /// The linear layer that yields the logits.
    pub fn head(
        &mut self,
        module: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Linear, LoadError> {
        self.linear_of(ModuleKind::Head, module, shape, bias)
    }

    fn linear_of(
        &mut self,
        kind: ModuleKind,
        module: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Linear, LoadError> {
        if self.noted(kind, module, &shape, bias) {
            return Ok(Linear::new(module, self.nothing::<2>(), None));
        }
        let packed = match &mut self.from {
            From::Files { pack, .. } => pack(module, false)?,
            From::Nowhere(_) => None,
        };
        let weight = match packed {
            Some(packed) => BaseWeight::new(packed, self.compute),
            None => self.matrix(&format!("{module}.weight"), shape)?,
        };
        let bias = bias
            .then(|| self.tensor(&format!("{module}.bias"), [shape[0]]))
            .transpose()?;
        Ok(Linear::new(module, weight, bias))
    }

    /// A linear layer of shape `[out, in]` with a bias whose weight lies in checkpoints as `[in, out]`:
    /// transformers' `Conv1D`.
    pub fn conv1d(&mut self, module: &str, shape: [usize; 2]) -> Result<Linear, LoadError> {
        if self.noted(ModuleKind::Linear, module, &shape, true) {
            if let From::Nowhere(shapes) = &mut self.from
                && let Some(shape) = shapes.last_mut()
            {
                shape.transposed = true;
            }
            return Ok(Linear::new(module, self.nothing::<2>(), None));
        }
        let packed = match &mut self.from {
            From::Files { pack, .. } => pack(module, true)?,
            From::Nowhere(_) => None,
        };
        let [out, input] = shape;
        let weight = match packed {
            Some(packed) => BaseWeight::new(packed, self.compute),
            None => {
                let values = self.values(&format!("{module}.weight"), &[input, out])?;
                let values = values.transposed(out).into_tensor(shape, self.device);
                BaseWeight::new(values, self.compute)
            }
        };
        let bias = self.tensor(&format!("{module}.bias"), [out])?;
        Ok(Linear::new(module, weight, Some(bias)).stored_transposed())
    }

    /// A norm with a bias.
    pub fn layer_norm(&mut self, module: &str, width: usize) -> Result<Frozen<1>, LoadError> {
        let (weight, bias) = (format!("{module}.weight"), format!("{module}.bias"));
        if self.noted(ModuleKind::Norm, module, &[width], true) {
            return Ok(Frozen::new(&weight, self.nothing::<1>()));
        }
        let values = self.tensor(&weight, [width])?;
        let norm = Frozen::new(&weight, values);
        let values = self.tensor(&bias, [width])?;
        Ok(norm.with_bias(&bias, values))
    }

    /// An embedding table `[rows, width]`.
    pub fn embedding(&mut self, module: &str, shape: [usize; 2]) -> Result<Embedding, LoadError> {
        let name = format!("{module}.weight");
        if self.noted(ModuleKind::Embedding, module, &shape, false) {
            return Ok(Embedding::new(&name, self.nothing::<2>()));
        }
        Ok(Embedding::new(&name, self.matrix(&name, shape)?))
    }

    /// A norm's weight.
    pub fn norm(&mut self, module: &str, width: usize) -> Result<Frozen<1>, LoadError> {
        let name = format!("{module}.weight");
        if self.noted(ModuleKind::Norm, module, &[width], false) {
            return Ok(Frozen::new(&name, self.nothing::<1>()));
        }
        Ok(Frozen::new(&name, self.tensor(&name, [width])?))
    }

    /// Notes a module where no values are to be had.
    fn noted(&mut self, kind: ModuleKind, module: &str, shape: &[usize], bias: bool) -> bool {
        let From::Nowhere(shapes) = &mut self.from else {
            return false;
        };
        shapes.push(ModuleShape {
            name: module.to_owned(),
            kind,
            shape: shape.to_vec(),
            bias,
            transposed: false,
        });
        true
    }

    fn nothing<const D: usize>(&self) -> Tensor<D> {
        Tensor::zeros([1; D], self.device)
    }

    /// A parameter's values, rounded if the base is held in bf16.
    fn values(&mut self, name: &str, shape: &[usize]) -> Result<HostValues, LoadError> {
        let values = match &mut self.from {
            From::Files { fetch, .. } => fetch(name, shape)?,
            From::Nowhere(_) => HostValues::F32(Vec::new()),
        };
        Ok(match self.compute {
            Compute::F32 => values,
            Compute::Bf16 => values.rounded(),
        })
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<BaseWeight, LoadError> {
        let values = self.values(name, &shape)?.into_tensor(shape, self.device);
        Ok(BaseWeight::new(values, self.compute))
    }

    /// A small parameter, in f32 whatever its values are rounded to.
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        let values = HostValues::F32(self.values(name, &shape)?.into_f32());
        Ok(values.into_tensor(shape, self.device))
    }
}

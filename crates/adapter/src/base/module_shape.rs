//! A module without its weights.

use enamel_kernels::transposed;

/// What kind of module a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear layer (an adapter's target).
    Linear,
    /// The linear layer that yields logits; `all-linear` leaves it out.
    Head,
    /// An embedding table.
    Embedding,
    /// A norm.
    Norm,
    /// A convolution over images.
    Conv,
    /// A parameter that belongs to no module of its own: a class token, a table of positions. Its name is the
    /// parameter's, with no `.weight` behind it.
    Param,
}

/// One module of a model that need not be loaded: enough to match targets and count parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleShape {
    /// Full name.
    pub name: String,
    /// Kind.
    pub kind: ModuleKind,
    /// Shape of `weight`: `[out, in]`, `[vocabulary, hidden]`, `[hidden]`, of a convolution
    /// `[out, in, height, width]`; a bare parameter's own.
    pub shape: Vec<usize>,
    /// Whether there is a bias, of `shape[0]` elements.
    pub bias: bool,
    /// Whether checkpoints have the weight the other way round, `[in, out]`: transformers' `Conv1D`. PEFT calls
    /// it `fan_in_fan_out`.
    pub transposed: bool,
}

impl ModuleShape {
    /// Names and shapes of its tensors in a checkpoint.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        if self.bias {
            tensors.push((format!("{}.bias", self.name), self.shape[..1].to_vec()));
        }
        tensors.push((self.weight_name(), self.stored_shape()));
        tensors
    }

    /// The name of its weight in a checkpoint.
    pub fn weight_name(&self) -> String {
        match self.kind {
            ModuleKind::Param => self.name.clone(),
            _ => format!("{}.weight", self.name),
        }
    }

    /// Names and shapes of its parameters as the model holds them.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let as_held = Self {
            transposed: false,
            ..self.clone()
        };
        as_held.tensors()
    }

    /// The shape of the weight in a checkpoint.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    /// Values of the weight as a checkpoint has them become `[out, in]`.
    pub fn from_stored(&self, values: Vec<f32>) -> Vec<f32> {
        match (self.transposed, self.shape.as_slice()) {
            (true, [out, _]) => transposed(&values, *out),
            _ => values,
        }
    }

    /// Values of the weight become as a checkpoint has them.
    pub fn to_stored(&self, values: Vec<f32>) -> Vec<f32> {
        match (self.transposed, self.shape.as_slice()) {
            (true, [_, input]) => transposed(&values, *input),
            _ => values,
        }
    }
}

pub(crate) fn elements(module: &ModuleShape) -> usize {
    let bias = if module.bias {
        module.shape.first().copied().unwrap_or(0)
    } else {
        0
    };
    module.shape.iter().product::<usize>() + bias
}

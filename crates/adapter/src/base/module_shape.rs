//! A module without its weights.

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
}

/// One module of a model that need not be loaded: enough to match targets and count parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleShape {
    /// Full name.
    pub name: String,
    /// Kind.
    pub kind: ModuleKind,
    /// Shape of `weight`: `[out, in]`, `[vocabulary, hidden]` or `[hidden]`.
    pub shape: Vec<usize>,
    /// Whether there is a bias, of `shape[0]` elements.
    pub bias: bool,
}

impl ModuleShape {
    /// Names and shapes of its tensors in a checkpoint.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        if self.bias {
            tensors.push((format!("{}.bias", self.name), self.shape[..1].to_vec()));
        }
        tensors.push((format!("{}.weight", self.name), self.shape.clone()));
        tensors
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

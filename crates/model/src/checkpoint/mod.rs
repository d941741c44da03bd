//! Where a model's tensors come from: names and shapes first, values one tensor at a time.

/// The element type a tensor has in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceDtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    BF16,
    /// One of GGUF's block-quantised types.
    Quantised,
}

/// A tensor of a checkpoint, before any of its values is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).
    pub name: String,
    /// The shape, outermost axis first (`[out, in]` for a linear layer).
    pub shape: Vec<usize>,
    /// The element type in the file.
    pub dtype: SourceDtype,
}

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A tensor that the checkpoint does not list was asked for.
    #[error("the checkpoint has no tensor '{name}'")]
    NoSuchTensor {
        /// The name asked for.
        name: String,
    },
}

/// Tensors by Hugging Face name.
pub trait TensorSource {
    /// All tensors, with their shapes.
    fn tensors(&self) -> &[TensorInfo];
    /// The values of one tensor, row-major, widened or dequantised to f32.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError>;
}

//! Global-norm clipping, as `torch.nn.utils.clip_grad_norm_`.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use enamel_kernels::sum_of_squares;

/// Added to the norm before dividing, as PyTorch does.
const EPSILON: f64 = 1e-6;

/// Elements whose squares are added up at once, all of an adapter's: a gradient that lies in another order is
/// copied, and the copies of a whole model should not be there together.
const BATCH: usize = 1 << 24;

/// What clipping came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clipping {
    /// Global norm of the gradient before clipping.
    pub norm: f64,
    /// By what the gradients are to be multiplied: `max_norm / (norm + 1e-6)` where that is below 1, else 1. The
    /// optimizer does it on the way, so that no scaled gradient is ever written.
    pub factor: f64,
}

impl Clipping {
    /// Measures the gradients; `max_norm = 0` only measures.
    pub fn of<M: Module>(module: &M, grads: &GradientsParams, max_norm: f64) -> Self {
        let mut found = Found {
            grads,
            flat: Vec::with_capacity(grads.len()),
            elements: 0,
            sum: 0.0,
        };
        module.visit(&mut found);
        found.add_up();
        let norm = found.sum.sqrt();
        let factor = max_norm / (norm + EPSILON);
        let clips = max_norm > 0.0 && factor < 1.0;
        Self {
            norm,
            factor: if clips { factor } else { 1.0 },
        }
    }
}

/// The gradients in the order of the module's parameters, and the sum of their squares.
struct Found<'a> {
    grads: &'a GradientsParams,
    /// Those not added up yet.
    flat: Vec<Tensor<1>>,
    elements: usize,
    sum: f64,
}

impl Found<'_> {
    fn add_up(&mut self) {
        self.sum += sum_of_squares(&self.flat);
        self.elements = 0;
        self.flat.clear();
    }
}

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            let length = grad.shape().num_elements();
            self.flat.push(grad.reshape([length]));
            self.elements += length;
            if self.elements >= BATCH {
                self.add_up();
            }
        }
    }
}

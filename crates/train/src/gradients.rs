//! Global-norm clipping, as `torch.nn.utils.clip_grad_norm_`.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use crate::trainee::scalar;

/// Added to the norm before dividing, as PyTorch does.
const EPSILON: f64 = 1e-6;

/// Scales all gradients by `max_norm / (norm + 1e-6)` where that is below 1, and returns them with
/// the norm from before. `max_norm = 0` only measures.
pub fn clip_global_norm<M: Module>(
    module: &M,
    mut grads: GradientsParams,
    max_norm: f64,
) -> (GradientsParams, f64) {
    let mut norm = SquaredNorm {
        grads: &grads,
        sum: None,
    };
    module.visit(&mut norm);
    let norm = norm.sum.map_or(0.0, |s| scalar(s).sqrt());
    let factor = max_norm / (norm + EPSILON);
    if max_norm > 0.0 && factor < 1.0 {
        let mut scaled = GradientsParams::new();
        module.visit(&mut Scale {
            from: &mut grads,
            to: &mut scaled,
            factor,
        });
        return (scaled, norm);
    }
    (grads, norm)
}

/// Adds up on the device: one read-back a step, whatever the number of parameters.
struct SquaredNorm<'a> {
    grads: &'a GradientsParams,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            let square = (grad.clone() * grad).sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
}

struct Scale<'a> {
    from: &'a mut GradientsParams,
    to: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.from.remove::<D>(param.id) {
            self.to.register(param.id, grad.mul_scalar(self.factor));
        }
    }
}

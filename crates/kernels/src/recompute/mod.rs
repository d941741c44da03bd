//! Part of a model run again in the backward pass instead of being remembered.
//!
//! Chen et al. 2016 (arXiv:1604.06174): only the part's input is kept, and its activations live from the
//! moment its gradient is asked for until that gradient is there. The gradients are those of the plain
//! graph, bit for bit: the same operations on the same numbers, in the same order.

mod ops;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::backend::DispatchDevice;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};

use crate::cpu::storage::of_backend;
use ops::{Again, Mailbox};

/// Whether [`checkpoint_module`] can run a module again on this device; elsewhere it records all.
pub fn can_checkpoint(device: &Device) -> bool {
    of_backend(device, |device| match device {
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => true,
        _ => false,
    })
}

/// `f(block, x)`, of which the graph keeps x and no activation: the backward pass calls `f` again.
///
/// Gradients reach x and every parameter of `block` that requires one, however many those are. What `f`
/// captures besides must not be tracked; if it is, there is no way for a gradient to reach it through
/// the second call, so everything is recorded as without this function. Random numbers that `f` draws
/// must be the same both times: let it seed the device's generator itself.
///
/// On a device without autodiff this is `f(block, x)`; so it is where [`can_checkpoint`] says no, and
/// where there is nothing to record in any case.
///
/// # Shapes
/// - x: any, and of the same number of axes as the result
pub fn checkpoint_module<const D: usize, M>(
    block: &M,
    x: Tensor<D>,
    f: impl Fn(&M, Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
) -> Tensor<D>
where
    M: Module + Sync + 'static,
{
    let device = x.device();
    if !device.is_autodiff() || !can_checkpoint(&device) {
        return f(block, x);
    }
    let wanted = x.is_tracked();
    let mailbox = Mailbox::default();
    let mut join = Join {
        mailbox: mailbox.clone(),
        slot: 0,
        token: Tensor::zeros([1], &device),
    };
    block.visit(&mut join);
    if !wanted && join.slot == 0 {
        return f(block, x);
    }

    let kept = x.clone().inner();
    let y = f(&block.clone().no_grad(), Tensor::from_inner(kept.clone()));
    if y.is_tracked() {
        // Only something captured can have brought a graph along.
        return f(block, x);
    }
    let block = block.valid();
    let again = Again::new(move |grad| {
        // New leaves: the outer graph is locked as long as its backward pass runs.
        let block = block.clone().train();
        let mut x = Tensor::<D>::from_inner(kept.clone());
        if wanted {
            x = x.require_grad();
        }
        let y = f(&block, x.clone());
        if !y.is_tracked() {
            return None;
        }
        let mut grads = ops::seeded(y, Tensor::from_dispatch(grad)).backward();
        block.visit(&mut Deliver {
            mailbox: &mailbox,
            slot: 0,
            grads: &mut grads,
        });
        x.grad_remove(&mut grads).map(Tensor::into_dispatch)
    });
    ops::checkpoint(x, join.token, y, again)
}

/// Ties every trained parameter to the token, in the visitor's order.
struct Join {
    mailbox: Mailbox,
    slot: usize,
    token: Tensor<1>,
}

impl ModuleVisitor for Join {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if value.is_tracked() {
            let slot = self.mailbox.slot(self.slot);
            self.token = ops::join(self.token.clone(), value, slot);
            self.slot += 1;
        }
    }
}

/// Puts the gradients of the second run's leaves where [`Join`] will have them fetched.
struct Deliver<'a> {
    mailbox: &'a Mailbox,
    slot: usize,
    grads: &'a mut Gradients,
}

impl ModuleVisitor for Deliver<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if value.is_tracked() {
            if let Some(grad) = value.grad_remove(self.grads) {
                self.mailbox.put(self.slot, grad.into_dispatch());
            }
            self.slot += 1;
        }
    }
}

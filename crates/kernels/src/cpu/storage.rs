//! Flex tensors as slices, and fresh output buffers that are written exactly once.

use std::mem::{ManuallyDrop, MaybeUninit};

use burn::backend::DispatchDevice;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};

use super::path::CpuPath;

/// Elements one parallel task of an elementwise loop handles: 64 KiB a buffer.
pub(crate) const CHUNK: usize = 16 * 1024;

/// Whether tensors live where the CPU kernels can read them: on Flex, as f32.
pub(crate) trait OnFlex {
    fn on_flex(&self) -> bool;

    /// Why no CPU kernel takes a tensor that is on Flex; `None` where one does, and on other devices.
    fn refusal(&self) -> Option<&'static str>;
}

/// Counts a call that goes to the reference, if that is because of a tensor on Flex.
pub(crate) fn note_fallback(op: &'static str, tensors: &[&dyn OnFlex]) {
    if let Some(reason) = tensors.iter().find_map(|t| t.refusal()) {
        crate::profile::fallback(op, || reason.to_string());
    }
}

impl<const D: usize> OnFlex for Tensor<D> {
    fn on_flex(&self) -> bool {
        self.dtype() == DType::F32 && weight_on_flex(self)
    }

    fn refusal(&self) -> Option<&'static str> {
        if !is_flex(&self.device()) {
            None
        } else if CpuPath::chosen() == CpuPath::Reference {
            Some("the reference path was asked for")
        } else if self.dtype() != DType::F32 {
            Some(self.dtype().name())
        } else {
            None
        }
    }
}

/// Whether a weight lies where the CPU kernels can read it: on Flex, as f32 or bf16.
pub(crate) fn weight_on_flex<const D: usize>(w: &Tensor<D>) -> bool {
    matches!(w.dtype(), DType::F32 | DType::BF16)
        && CpuPath::chosen() != CpuPath::Reference
        && is_flex(&w.device())
}

/// Whether tensors of a device are Flex's, with or without a graph.
pub(crate) fn is_flex(device: &Device) -> bool {
    of_backend(device, |device| matches!(device, DispatchDevice::Flex(_)))
}

/// Whether the device computes on the processor, in its memory.
pub fn on_host(device: &Device) -> bool {
    of_backend(device, |device| match device {
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        _ => false,
    })
}

/// What `is` says of a device as it is without a graph.
pub(crate) fn of_backend(device: &Device, is: impl Fn(&DispatchDevice) -> bool) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Autodiff(_) => is(device.clone().without_autodiff().as_dispatch()),
        plain => is(plain),
    }
}

/// The tensor itself when its elements lie in order, else an ordered copy.
pub(crate) fn dense(t: FlexTensor) -> FlexTensor {
    if t.layout().is_contiguous() {
        t
    } else {
        t.to_contiguous()
    }
}

/// The elements of a tensor that went through [`dense`].
pub(crate) fn values(t: &FlexTensor) -> &[f32] {
    match t.as_slice::<f32>() {
        Some(v) => v,
        None => unreachable!("callers pass f32 tensors made dense"),
    }
}

/// The tensor as the whole of its buffer, to be overwritten through `storage_mut`: in place when
/// this is the last handle, in a copy otherwise.
pub(crate) fn owned(t: FlexTensor) -> FlexTensor {
    t.to_contiguous()
}

/// A tensor around a finished vector.
pub(crate) fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    debug_assert_eq!(values.len(), shape.num_elements());
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape),
        DType::F32,
    )
}

/// An output whose memory is not touched before the kernel writes it: zeroing first would cost a
/// whole pass over memory.
pub(crate) struct Fresh(Vec<MaybeUninit<f32>>);

impl Fresh {
    pub(crate) fn new(len: usize) -> Self {
        let mut v = Vec::with_capacity(len);
        // SAFETY: `MaybeUninit` needs no initialisation, and the capacity is `len`.
        unsafe { v.set_len(len) };
        Self(v)
    }

    pub(crate) fn slots(&mut self) -> &mut [MaybeUninit<f32>] {
        &mut self.0
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }

    /// # Safety
    /// Every element has been written.
    pub(crate) unsafe fn into_vec(self) -> Vec<f32> {
        let mut v = ManuallyDrop::new(self.0);
        // SAFETY: same size and alignment, and the caller has initialised every element.
        unsafe { Vec::from_raw_parts(v.as_mut_ptr().cast(), v.len(), v.capacity()) }
    }

    /// # Safety
    /// Every element has been written.
    pub(crate) unsafe fn into_tensor(self, shape: Shape) -> FlexTensor {
        // SAFETY: passed on to the caller.
        tensor(unsafe { self.into_vec() }, shape)
    }
}

/// A pointer that parallel tasks share, each writing its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub(crate) *mut f32);

// SAFETY: the tasks that share it write disjoint elements; each says which.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

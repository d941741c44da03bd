//! `[batch, tokens, heads, dim]` tensors read in place.

use burn::backend::flex::FlexTensor;

/// A `[batch, tokens, heads, dim]` tensor whose last axis lies in order.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) data: &'a [f32],
    start: usize,
    /// Of batch, token and head; 0 for an axis of one.
    pub(crate) strides: [usize; 3],
    dim: usize,
}

impl<'a> Heads<'a> {
    pub(crate) fn of(t: &'a FlexTensor) -> Self {
        let (shape, strides) = (t.layout().shape(), t.layout().strides());
        Self {
            data: t.storage::<f32>(),
            start: t.layout().start_offset(),
            strides: [0, 1, 2].map(|i| if shape[i] > 1 { strides[i] as usize } else { 0 }),
            dim: shape[3],
        }
    }

    /// Part of a larger buffer: its first element lies at `start`.
    pub(crate) fn within(data: &'a [f32], start: usize, strides: [usize; 3], dim: usize) -> Self {
        Self {
            data,
            start,
            strides,
            dim,
        }
    }

    pub(crate) fn at(&self, batch: usize, token: usize, head: usize) -> usize {
        let [b, t, h] = self.strides;
        self.start + batch * b + token * t + head * h
    }

    pub(crate) fn row(&self, batch: usize, token: usize, head: usize) -> &'a [f32] {
        let at = self.at(batch, token, head);
        &self.data[at..at + self.dim]
    }
}

/// The tensor itself when [`Heads`] can read it in place, else an ordered copy.
pub(crate) fn by_heads(t: FlexTensor) -> FlexTensor {
    let (shape, strides) = (t.layout().shape(), t.layout().strides());
    let ok = (0..4).all(|i| shape[i] <= 1 || strides[i] > 0) && (strides[3] == 1 || shape[3] <= 1);
    if ok { t } else { t.to_contiguous() }
}

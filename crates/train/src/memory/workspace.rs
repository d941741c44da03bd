//! What is in memory for a moment: the loss's buffers, what the backward pass works in, and the program.

use enamel_kernels::loss_bytes;

use super::{FLOAT, Kind, ModelSizes, Settings, Weights};

/// The program's code and tables, and its threads: measured with a model of a few thousand numbers.
const PROGRAM: usize = 36 << 20;
/// Bytes a token of the vocabulary that reading and holding a tokenizer takes, less what the weights fill again of
/// it: measured with SmolLM2's, of 49,152 tokens.
const TOKENIZER: usize = 1250;
/// What the allocator rounds dense matrices up by: one of 3.4 MiB to 3.5, and a bit for its own notes.
const ROUNDED: f64 = 0.03;
/// Share of the largest matrix's f32 values that stays unfilled where they are made of a file's blocks, and bf16 of
/// them (measured).
const CONVERTED: f64 = 1.0 / 6.0;
/// Share of a step's tensors that the allocator cannot fill: it cuts memory into pieces of 32 MiB in which
/// tensors of many sizes leave gaps, and gives nothing back (see `keep_freed_memory` in the program).
const UNFILLED: f64 = 0.15;
/// Twice that once more of what a segment of gradient checkpointing keeps and works in: it comes and goes between
/// inputs that stay.
const UNFILLED_SEGMENT: f64 = 0.30;
/// The same of an optimizer's moments, which stay: they are made once, beside all gradients, and are rounded up.
const UNFILLED_MOMENTS: f64 = 0.10;
/// A thread makes ready so many columns of so many rows at most, of operands of products (`cpu/gemm/drive.rs`).
const ROOM: [usize; 2] = [96, 1664];
/// A CUDA context with this program's kernels.
const CONTEXT: usize = 512 << 20;

/// Bytes of the loss's buffers.
pub(super) fn logits(model: &ModelSizes, settings: &Settings) -> usize {
    let (rows, width, vocabulary) = (settings.rows(), model.hidden, model.outputs);
    // The final norm's output.
    let hidden = FLOAT * rows * width;
    let whole = model.head.whole_logits || settings.kind != Kind::Kernels;
    if whole {
        // Logits, their log-softmax, and the gradient of each.
        return hidden + FLOAT * (4 * rows * vocabulary + rows * width) + model.head_gradient();
    }
    let bf16 = settings.weights == Weights::Bf16 && !model.head.trained;
    hidden + loss_bytes(rows, width, vocabulary, model.head.trained, bf16)
}

/// Bytes that the backward pass of a block works in: the gradients of the residual stream, of what the MLP's
/// last product reads, and of what that was made of, where it is not overwritten with it.
pub(super) fn backward(model: &ModelSizes, settings: &Settings) -> usize {
    let fused = settings.kind == Kind::Kernels && !model.trains_base();
    let inner = if fused { model.inner } else { 3 * model.inner };
    with_inner(inner, model, settings)
}

/// The same where `silu_mul`'s gradients are in the place of what was kept for them already: later in a block, when
/// most of its own gradients are there.
pub(super) fn late(model: &ModelSizes, settings: &Settings) -> usize {
    with_inner(model.inner, model, settings)
}

fn with_inner(inner: usize, model: &ModelSizes, settings: &Settings) -> usize {
    let rows = settings.rows();
    let scores = match settings.kind {
        Kind::Kernels => 0,
        _ => 2 * rows * model.heads * settings.length,
    };
    // Of attention: q, their gradient and the output's, for the query heads of one key head.
    let group = model.heads / model.kv_heads.max(1);
    let head = 3 * settings.length * model.head_dim * group;
    let threads = match settings.kind {
        Kind::Kernels => {
            let [columns, longest] = ROOM;
            let room = columns * longest.min(model.inner.max(model.hidden));
            settings.threads * FLOAT * (room + head)
        }
        _ => 0,
    };
    FLOAT * (rows * (inner + 2 * model.hidden)).max(scores) + threads
}

/// Bytes of tensors of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensors {
    /// Those that come and go.
    pub(super) step: usize,
    /// Those of them that come and go with each segment of gradient checkpointing.
    pub(super) segment: usize,
    /// The optimizer's moments, which stay.
    pub(super) moments: usize,
}

/// Bytes of the program beside such tensors.
pub(super) fn runtime(model: &ModelSizes, settings: &Settings, tensors: Tensors) -> usize {
    let share = |bytes: usize, share: f64| (bytes as f64 * share) as usize;
    let unfilled = share(tensors.step, UNFILLED)
        + share(tensors.segment, UNFILLED_SEGMENT)
        + share(tensors.moments, UNFILLED_MOMENTS);
    if settings.kind == Kind::Gpu {
        return CONTEXT + unfilled;
    }
    let largest = model.modules.iter().map(|m| m.shape.iter().product());
    let largest: usize = FLOAT * largest.max().unwrap_or(0);
    let halved = settings.weights == Weights::Bf16 && !model.trains_base();
    let converted = match halved && !model.packed.is_empty() {
        true => share(largest, CONVERTED),
        false => 0,
    };
    let rounded = share(settings.dense_bytes(model), ROUNDED);
    PROGRAM + TOKENIZER * model.vocabulary + rounded + converted + unfilled
}

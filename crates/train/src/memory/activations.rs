//! What the forward pass keeps for the backward pass, operation by operation.
//!
//! In a fused block (frozen layers with at most one plain LoRA each) that is, for each token: the input of
//! both norms and one number each (`block_linear` keeps x and `1/rms`, and makes the normalised rows twice),
//! q, k and v side by side, the attention's output and a number a head, gate and up, and `x̂·aᵀ` of each
//! adapter. Elsewhere the normalised rows and the gated ones are kept too, where an adapter's gradient reads
//! them, and what the method's own operations keep.

use enamel_adapter::methods::facts::{Kept as Own, LayerSize};
use enamel_model::Format;

use super::model::{Block, Part};
use super::{FLOAT, Kind, ModelSizes, Settings, Weights};

/// Bytes of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Between the forward and the backward pass.
    pub(super) between: usize,
    /// In the backward pass of the last blocks, when a segment was run again.
    pub(super) most: usize,
    /// In the backward pass of the first block, or of the first segment, which it ends with.
    pub(super) last: usize,
}

/// What one linear layer's operation keeps besides what the block keeps anyway.
fn own(part: &Part, model: &ModelSizes, settings: &Settings) -> Own {
    match (part.rank, part.whole) {
        (Some(rank), whole) => model.adapter.keeps(&LayerSize {
            name: &part.name,
            input: part.input,
            out: part.out,
            rank,
            rows: settings.rows(),
            whole,
            kernels: settings.kind == Kind::Kernels,
            widened: settings.weights == Weights::Bf16
                || settings.quantization.format.is_some()
                || model.packed.contains_key(&format!("{}.weight", part.name)),
        }),
        (None, true) => Own::INPUT,
        (None, false) => Own {
            fuses: true,
            ..Own::default()
        },
    }
}

/// Numbers that a block keeps a token, and besides.
fn of_block(block: &Block, model: &ModelSizes, settings: &Settings) -> (usize, usize) {
    let [q, k, v, o, ..] = &block.parts;
    let mut all: [Own; 7] = std::array::from_fn(|i| own(&block.parts[i], model, settings));
    if matches!(settings.quantization.format, Some(Format::Int8 { .. })) {
        // It rounds the input for the base and not for the adapter, which takes two operations.
        all.iter_mut().for_each(|own| own.fuses = false);
    }
    if !model.fuses {
        all.iter_mut().for_each(|own| own.fuses = false);
    }
    let [oq, ok, ov, _, ogate, oup, odown] = all;
    let fixed = all.iter().map(|own| own.fixed).sum();
    let extra: usize = all.iter().map(|own| own.row).sum();
    let (hidden, inner) = (model.hidden, model.inner);
    let qkv = q.out + k.out + v.out;
    if settings.kind != Kind::Kernels {
        // Norm: x, x·1/rms. Attention: q, k and v repeated for all heads, scores and their softmax, the
        // output. SwiGLU: gate, its sigmoid, silu, up and the product.
        let scores = 2 * model.heads * settings.length;
        let row = 4 * hidden + qkv + 2 * q.out + o.input + scores + 5 * inner;
        return (row + 2 * extra, fixed);
    }
    let attention = qkv + o.input + model.heads;
    let mut row = extra + attention + 2 * (hidden + 1) + 2 * inner;
    let fused = |parts: &[Own]| parts.iter().all(|own| own.fuses) && !model.trains_base();
    if !fused(&[oq, ok, ov]) && [oq, ok, ov].iter().any(|own| own.input) {
        row += hidden;
    }
    if !fused(&[ogate, oup, odown]) {
        if ogate.input || oup.input {
            row += hidden;
        }
        if odown.input {
            row += inner;
        }
    }
    (row, fixed)
}

/// Activations of all blocks, and what the loss is made of.
pub(super) fn activations(model: &ModelSizes, settings: &Settings) -> Kept {
    let rows = settings.rows();
    let bytes = |(row, fixed): (usize, usize)| FLOAT * (rows * row + fixed);
    let blocks: Vec<usize> = model
        .blocks
        .iter()
        .map(|b| bytes(of_block(b, model, settings)))
        .collect();
    // The head with an adapter in it: the product and the sum.
    let head = match model.head.adapted {
        true => FLOAT * 2 * model.outputs * model.hidden,
        false => 0,
    };
    // The final norm's input and its number.
    let tail = FLOAT * rows * (model.hidden + 1);
    let Some(every) = settings.every else {
        let all = blocks.iter().sum::<usize>() + tail + head;
        return Kept {
            between: all,
            most: all,
            last: blocks.first().copied().unwrap_or(0),
        };
    };
    let segments: Vec<usize> = blocks.chunks(every.get()).map(|s| s.iter().sum()).collect();
    let inputs = FLOAT * rows * model.hidden;
    // When the last segment is run again, the final norm has what it wanted, and the segment's input is what
    // its first block keeps. Segments before it have fewer inputs beside them.
    let again = segments.iter().copied().max().unwrap_or(0);
    Kept {
        between: segments.len() * inputs + tail + head,
        most: segments.len().saturating_sub(1) * inputs + again + head,
        last: segments.first().copied().unwrap_or(0),
    }
}

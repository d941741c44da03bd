//! Fused, differentiable operations for frozen-base training.
//!
//! One folder an operation: `mod.rs` is the public function, `reference.rs` the same thing in plain
//! Burn operations (any backend, the definition the others are tested against), `cpu.rs` the Flex
//! implementation. `recompute` is about no operation but about what is remembered of several, `quantized` about how
//! weights are held. This crate knows nothing of adapters or models.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod check;
mod cpu;
pub mod quantized;
pub mod quantized_linear;
pub mod recompute;

pub mod adamw;
pub mod add_rms_norm;
pub mod attention;
pub mod base_weight;
pub mod block_linear;
pub mod cross_entropy;
pub mod dora_linear;
pub mod embedding;
pub mod gelu;
pub mod khatri_rao;
pub mod kron_linear;
pub mod layer_norm;
pub mod lora_linear;
pub mod profile;
pub mod rms_norm;
pub mod rope;
pub mod silu_mul;

pub use cpu::dropout::Dropout;
pub use cpu::gemm::Compute;
pub use cpu::path::{CPU_VARIABLE, CpuPath};
pub use cpu::storage::on_host;

pub use crate::cpu::roofline::{measured_product_speed, measured_read_bandwidth};
pub use crate::quantized::{GgufKind, GgufRows, PackedRows, PackedWeight};
pub use crate::quantized_linear::packed_linear;
pub use crate::recompute::{can_checkpoint, checkpoint_module};
pub use adamw::{
    AdamW, AdamWInput, Codes, HostCodes, HostMoments, MOMENT_BLOCK, Moments, Paging, adamw,
    adamw_8bit, adamw_host, sum_of_squares,
};
pub use add_rms_norm::add_rms_norm;
pub use attention::{AttentionSpec, KeyMask, Segments, SegmentsError, attention, attention_qkv};
pub use base_weight::{BaseWeight, Held, HostValues, Matrix, holds_bf16, transposed};
pub use block_linear::{LowRank, Norm, Projection, fuses, project, project_add, swiglu_project};
pub use cross_entropy::{
    LossSpec, linear_cross_entropy, linear_cross_entropy_with, loss_bytes, token_log_probs,
};
pub use dora_linear::dora_linear;
pub use embedding::embedding;
pub use gelu::{GeluKind, gelu, gelu_mul};
pub use khatri_rao::{khatri_rao_columns, khatri_rao_rows};
pub use kron_linear::{kron, kron_linear};
pub use layer_norm::layer_norm;
pub use lora_linear::{linear, lora_linear, lora_linear_dropout};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use silu_mul::silu_mul;

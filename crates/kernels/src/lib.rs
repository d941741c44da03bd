//! Fused, differentiable operations for frozen-base training.
//!
//! One folder an operation: `mod.rs` is the public function, `reference.rs` the same thing in plain
//! Burn operations (any backend, the definition the others are tested against), `cpu.rs` the Flex
//! implementation. This crate knows nothing of adapters or models.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod check;
mod cpu;

pub mod attention;
pub mod base_weight;
pub mod cross_entropy;
pub mod dora_linear;
pub mod khatri_rao;
pub mod kron_linear;
pub mod lora_linear;
pub mod profile;
pub mod rms_norm;
pub mod rope;
pub mod silu_mul;

pub use cpu::gemm::Compute;
pub use cpu::path::{CPU_VARIABLE, CpuPath};

pub use attention::{AttentionSpec, KeyMask, attention};
pub use base_weight::{BaseWeight, HostValues, holds_bf16};
pub use cross_entropy::{linear_cross_entropy, token_log_probs};
pub use dora_linear::dora_linear;
pub use khatri_rao::{khatri_rao_columns, khatri_rao_rows};
pub use kron_linear::{kron, kron_linear};
pub use lora_linear::{Dropout, linear, lora_linear, lora_linear_dropout};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use silu_mul::silu_mul;

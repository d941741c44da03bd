//! What the CPU implementations share: the SIMD level, `exp`, matrix products and tensor views.
//!
//! Everything here is deterministic whatever the number of threads: work is cut by shape alone and
//! each output element is written by one task in a fixed order.

pub(crate) mod dropout;
pub(crate) mod erf;
pub(crate) mod exp;
pub(crate) mod gemm;
pub(crate) mod half;
pub(crate) mod heads;
pub(crate) mod matrix;
pub(crate) mod path;
pub(crate) mod roofline;
pub(crate) mod simd;
pub(crate) mod storage;

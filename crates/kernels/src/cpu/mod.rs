//! What the CPU implementations share: the SIMD level, `exp`, matrix products and tensor views.
//!
//! Everything here is deterministic whatever the number of threads: work is cut by shape alone and
//! each output element is written by one task in a fixed order.

pub(crate) mod exp;
pub(crate) mod heads;
pub(crate) mod matrix;
pub(crate) mod simd;
pub(crate) mod storage;

/// The instruction set the CPU kernels use on this machine: `"avx512"`, `"avx2"` or `"portable"`. The
/// environment variable `ENAMEL_CPU_PATH` can name a lesser one than the best.
pub fn cpu_path() -> &'static str {
    simd::level().name()
}

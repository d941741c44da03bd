//! Instruction sets, chosen at run time, and the macro that compiles a loop once for each.

use std::sync::OnceLock;

/// An instruction set that this processor was seen to have. There is no other way to make one, and
/// that is what makes calling the code compiled for it sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) enum Kind {
    Avx512,
    Avx2,
    Portable,
}

impl Level {
    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Kind::Avx512 => "avx512",
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    /// Every level of this machine, the best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let v3 = has!("avx2") && has!("fma");
            let v4 = has!("avx512f")
                && has!("avx512vl")
                && has!("avx512bw")
                && has!("avx512dq")
                && has!("avx512cd");
            if v3 && v4 {
                levels.push(Self(Kind::Avx512));
            }
            if v3 {
                levels.push(Self(Kind::Avx2));
            }
        }
        levels.push(Self(Kind::Portable));
        levels
    }
}

/// The best level of this machine.
pub(crate) fn level() -> Level {
    static BEST: OnceLock<Level> = OnceLock::new();
    *BEST.get_or_init(|| {
        Level::available()
            .first()
            .copied()
            .unwrap_or(Level(Kind::Portable))
    })
}

/// `a · b + c`, fused where `FMA` says the instruction exists (elsewhere it would be a libm call).
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Compiles a function's body for every level; the function then takes the `Level` to run first.
/// Inside, the named constant says whether fused multiply-add is at hand.
macro_rules! simd_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$fma:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(level: $crate::cpu::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512cd,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v4($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v3($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                match level.kind() {
                    // SAFETY: a `Level` exists only for what the processor was seen to have.
                    $crate::cpu::simd::Kind::Avx512 => unsafe { v4($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::simd::Kind::Avx2 => unsafe { v3($($arg),*) },
                    $crate::cpu::simd::Kind::Portable => body::<false>($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                // 64-bit Arm always has the fused instruction.
                body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
            }
        }
    };
}
pub(crate) use simd_fn;

/// Running sums side by side, so that a reduction vectorises and its order is fixed.
pub(crate) const LANES: usize = 32;

/// The sum of the lanes, as a tree of fixed shape.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ a·b` over the common length.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut lanes = [0.0f32; LANES];
    let (ac, bc) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut tail = 0.0;
    for (x, y) in ac.remainder().iter().zip(bc.remainder()) {
        tail = fma::<FMA>(*x, *y, tail);
    }
    for (x, y) in ac.zip(bc) {
        for i in 0..LANES {
            lanes[i] = fma::<FMA>(x[i], y[i], lanes[i]);
        }
    }
    sum_lanes(lanes) + tail
}

//! Instruction sets, chosen at run time, and the macro that compiles a loop once for each.

use super::path::CpuPath;

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

    /// The vector instructions of a path.
    fn of(path: CpuPath) -> Self {
        Self(match path {
            CpuPath::Amx | CpuPath::Avx512Bf16 | CpuPath::Avx512 => Kind::Avx512,
            CpuPath::Avx2 => Kind::Avx2,
            CpuPath::Portable | CpuPath::Reference => Kind::Portable,
        })
    }

    /// Every level of this machine, the best first.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let paths = CpuPath::available().iter().rev();
        let mut levels: Vec<Self> = paths.map(|path| Self::of(*path)).collect();
        levels.dedup();
        levels
    }
}

/// The level in use.
pub(crate) fn level() -> Level {
    Level::of(CpuPath::chosen())
}

/// What the code of a [`simd_fn`] may count on, as its constant parameter.
pub(crate) mod code {
    /// Nothing beyond the target's baseline.
    pub(crate) const PORTABLE: u8 = 0;
    /// Fused multiply-add in the baseline, as on 64-bit Arm.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) const FUSED: u8 = 1;
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const AVX2: u8 = 2;
    /// AVX-512 F, VL, BW, DQ, CD.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const AVX512: u8 = 3;
}

/// `a · b + c`, fused where the instruction exists (elsewhere it would be a libm call).
#[inline(always)]
pub(crate) fn fma<const L: u8>(a: f32, b: f32, c: f32) -> f32 {
    if L == code::PORTABLE {
        a * b + c
    } else {
        a.mul_add(b, c)
    }
}

/// Compiles a function's body for every level; the function then takes the `Level` to run first.
/// Inside, the named constant says which level it is (see [`code`]).
macro_rules! simd_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$code:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(level: $crate::cpu::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const $code: u8>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512cd,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v4($($arg: $ty),*) $(-> $ret)? {
                    body::<{ $crate::cpu::simd::code::AVX512 }>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v3($($arg: $ty),*) $(-> $ret)? {
                    body::<{ $crate::cpu::simd::code::AVX2 }>($($arg),*)
                }
                match level.kind() {
                    // SAFETY: a `Level` exists only for what the processor was seen to have.
                    $crate::cpu::simd::Kind::Avx512 => unsafe { v4($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::simd::Kind::Avx2 => unsafe { v3($($arg),*) },
                    $crate::cpu::simd::Kind::Portable => {
                        body::<{ $crate::cpu::simd::code::PORTABLE }>($($arg),*)
                    }
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                // 64-bit Arm always has the fused instruction.
                body::<{ cfg!(target_arch = "aarch64") as u8 * $crate::cpu::simd::code::FUSED }>(
                    $($arg),*
                )
            }
        }
    };
}
pub(crate) use simd_fn;

/// Running sums side by side, so that a reduction vectorises and its order is fixed.
pub(crate) const LANES: usize = 32;

/// The sum of the lanes, as a tree of fixed shape. One array a level: each is a vector addition.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    #[inline(always)]
    fn halved<const N: usize, const H: usize>(x: [f32; N]) -> [f32; H] {
        let mut sums = [0.0; H];
        for i in 0..H {
            sums[i] = x[i] + x[i + H];
        }
        sums
    }
    let x: [f32; 16] = halved(lanes);
    let x: [f32; 8] = halved(x);
    let x: [f32; 4] = halved(x);
    let x: [f32; 2] = halved(x);
    x[0] + x[1]
}

/// The largest of `values` and `floor`. A NaN is passed over: callers subtract the result from each
/// value, and so meet it there.
#[inline(always)]
pub(crate) fn max(values: &[f32], floor: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [floor; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(floor, |m, x| larger(m, *x));
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], x[i]);
        }
    }
    lanes.iter().fold(tail, |m, x| larger(m, *x))
}

/// `Σ a·b` over the common length. By hand for x86: of a sum that ends in one number, the compiler
/// makes vectors of two.
#[inline(always)]
pub(crate) fn dot<const L: u8>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    #[cfg(target_arch = "x86_64")]
    {
        if L == code::AVX512 {
            // SAFETY: this code runs only where a `Level` vouches for AVX-512.
            return unsafe { x86::dot_avx512(a, b) };
        }
        if L == code::AVX2 {
            // SAFETY: this code runs only where a `Level` vouches for AVX2 and FMA.
            return unsafe { x86::dot_avx2(a, b) };
        }
    }
    dot_lanes::<L, _>(a, b, |y| y)
}

/// `Σ a·wide(b)` in lanes, for slices of one length.
#[inline(always)]
pub(crate) fn dot_lanes<const L: u8, T: Copy>(a: &[f32], b: &[T], wide: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (ac, bc) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut tail = 0.0;
    for (x, y) in ac.remainder().iter().zip(bc.remainder()) {
        tail = fma::<L>(*x, wide(*y), tail);
    }
    for (x, y) in ac.zip(bc) {
        for i in 0..LANES {
            lanes[i] = fma::<L>(x[i], wide(y[i]), lanes[i]);
        }
    }
    sum_lanes(lanes) + tail
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::x86_64::*;

    /// Both slices have the same length.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        let (n, a, b) = (a.len(), a.as_ptr(), b.as_ptr());
        let (mut s0, mut s1) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        let mut i = 0;
        // SAFETY: every load lies below `n`; masked lanes are not read.
        unsafe {
            while i + 32 <= n {
                s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(i)), _mm512_loadu_ps(b.add(i)), s0);
                let (x, y) = (
                    _mm512_loadu_ps(a.add(i + 16)),
                    _mm512_loadu_ps(b.add(i + 16)),
                );
                s1 = _mm512_fmadd_ps(x, y, s1);
                i += 32;
            }
            while i < n {
                let mask = first(n - i);
                let x = _mm512_maskz_loadu_ps(mask, a.add(i));
                let y = _mm512_maskz_loadu_ps(mask, b.add(i));
                s0 = _mm512_fmadd_ps(x, y, s0);
                i += 16;
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(s0, s1))
    }

    /// Both slices have the same length.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
        let (n, a, b) = (a.len(), a.as_ptr(), b.as_ptr());
        let mut sums = [_mm256_setzero_ps(); 4];
        let (mut i, mut tail) = (0, 0.0f32);
        // SAFETY: every load lies below `n`.
        unsafe {
            while i + 32 <= n {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let (x, y) = (
                        _mm256_loadu_ps(a.add(i + 8 * j)),
                        _mm256_loadu_ps(b.add(i + 8 * j)),
                    );
                    *sum = _mm256_fmadd_ps(x, y, *sum);
                }
                i += 32;
            }
            while i < n {
                tail = (*a.add(i)).mul_add(*b.add(i), tail);
                i += 1;
            }
        }
        total(sums) + tail
    }

    /// The sum of all lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) fn total(sums: [__m256; 4]) -> f32 {
        let sum = _mm256_add_ps(
            _mm256_add_ps(sums[0], sums[1]),
            _mm256_add_ps(sums[2], sums[3]),
        );
        let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
    }

    /// The first `left` of sixteen lanes.
    #[inline]
    pub(crate) fn first(left: usize) -> u16 {
        if left >= 16 { !0 } else { (1 << left) - 1 }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::path::CPU_VARIABLE;
    use super::*;
    use crate::check::noise;

    simd_fn! {
        fn dot_of<L>(a: &[f32], b: &[f32]) -> f32 {
            dot::<L>(a, b)
        }
    }

    /// Every path of the machine against f64, at every remainder. A sum of `n` products of numbers
    /// below one is off by at most `n` half units in the last place of `n`.
    #[test]
    fn dot_on_every_path() {
        for n in (0..70).chain([576, 1531]) {
            let (a, b) = (noise(1, n), noise(2, n));
            let want = crate::check::inner(&a, &b);
            for level in Level::available() {
                let got = f64::from(dot_of(level, &a, &b));
                let bound = 1e-7 * (n as f64).powf(1.5);
                assert!((got - want).abs() <= bound, "{level:?} {n}: {got} {want}");
            }
        }
    }

    /// The operations' comparisons with their references, once more on every lesser path. Each runs
    /// in a process of its own: the choice is made once.
    #[test]
    fn every_path_matches_the_references() {
        let paths = CpuPath::available().iter().rev().skip(1);
        for path in paths.filter(|p| **p != CpuPath::Reference) {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["matches_reference", "--test-threads", "2"])
                .env(CPU_VARIABLE, path.name())
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{}: {text}", path.name());
            assert!(
                text.contains("silu_mul::tests::matches_reference"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_environment_can_only_ask_for_what_is_there() {
        assert!(Level::available().contains(&level()));
    }
}

//! A branch-free `exp` that the compiler turns into vector code.

use super::simd::fma;

/// `exp(x)`, within 2 units in the last place; exact 0 and infinity where f32 under- or overflows,
/// NaN for NaN. Polynomial and range reduction after Cephes' `expf` (S. Moshier).
#[inline(always)]
pub(crate) fn exp<const L: u8>(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it leaves the rounded integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has so few bits that its product with an integer is exact.
    const LN2_HI: f32 = 355.0 / 512.0;
    const LN2_LO: f32 = -2.121_944_4e-4;

    // Written so that a NaN passes both comparisons unchanged.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = fma::<L>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<L>(n, -LN2_HI, x);
    let r = fma::<L>(n, -LN2_LO, r);
    let p = 1.987_569_1e-4;
    let p = fma::<L>(p, r, 1.398_199_9e-3);
    let p = fma::<L>(p, r, 8.333_452e-3);
    let p = fma::<L>(p, r, 4.166_579_6e-2);
    let p = fma::<L>(p, r, 1.666_666_5e-1);
    let p = fma::<L>(p, r, 0.5);
    let p = fma::<L>(p, r * r, r) + 1.0;
    // 2ⁿ as two factors: n = 128 and n = −149 are not exponents of a normal number.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + exp(−x))`.
#[inline(always)]
pub(crate) fn sigmoid<const L: u8>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<L>(-x))
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, simd_fn};
    use super::*;

    simd_fn! {
        fn exp_all<L>(x: &mut [f32]) {
            for x in x {
                *x = exp::<L>(*x);
            }
        }
    }

    /// Two units in the last place against f64, over the whole range, on every path of the machine.
    #[test]
    fn matches_f64() {
        let xs: Vec<f32> = (-870_000..887_000).map(|i| i as f32 * 1e-4).collect();
        for level in Level::available() {
            let mut ys = xs.clone();
            exp_all(level, &mut ys);
            for (x, y) in xs.iter().zip(&ys) {
                let want = f64::from(*x).exp();
                let ulp = f64::from(f32::EPSILON) * want;
                assert!(
                    (f64::from(*y) - want).abs() <= 2.0 * ulp,
                    "{level:?} {x}: {y} {want}"
                );
            }
        }
    }

    #[test]
    fn special_values() {
        for level in Level::available() {
            let mut v = [
                0.0,
                -0.0,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                88.8,
                -104.0,
                -95.0,
            ];
            exp_all(level, &mut v);
            assert_eq!(v[..4], [1.0, 1.0, f32::INFINITY, 0.0]);
            assert!(v[4].is_nan());
            assert_eq!(v[5], f32::INFINITY);
            assert_eq!(v[6], 0.0);
            // Below the normal numbers the result is a rounded subnormal, not zero.
            assert!((v[7] - (-95.0f32).exp()).abs() < 1e-43);
        }
    }
}

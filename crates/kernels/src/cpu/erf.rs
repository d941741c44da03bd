//! The normal distribution function, and with it erf, in a branch-free form that the compiler turns into
//! vector code.

use super::exp::exp;
use super::simd::fma;

/// `erfc(z)·exp(z²) = t·P(t)` with `t = 1 / (1 + PACE·z)`, for z from 0 to 10, beyond which `exp(−z²)`
/// is below f32. The form is that of Abramowitz and Stegun, 7.1.26; the coefficients of P, the constant
/// first, are a fit of the relative error (1.2e-8 at most).
const PACE: f32 = 0.375;
const P: [f32; 9] = [
    0.211_613_48,
    0.210_649_68,
    0.205_313_18,
    0.121_506_21,
    0.273_721_58,
    -0.229_408_62,
    0.432_394_3,
    -0.287_327_9,
    0.061_538_1,
];

/// `Φ(x) = (1 + erf(x/√2)) / 2`, within 2e-7, and `exp(−x²/2)`. Below zero Φ is within
/// `8e-7·(1 + x²)` of itself, because it is not one less a number near one. NaN for NaN.
#[inline(always)]
pub(crate) fn normal<const L: u8>(x: f32) -> (f32, f32) {
    let bell = exp::<L>(-0.5 * x * x);
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / fma::<L>(z, PACE, 1.0);
    let mut p = P[8];
    let mut i = 8;
    while i > 0 {
        i -= 1;
        p = fma::<L>(p, t, P[i]);
    }
    let tail = 0.5 * bell * (t * p);
    (if x < 0.0 { tail } else { 1.0 - tail }, bell)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::simd::{Level, simd_fn};
    use super::*;

    simd_fn! {
        fn normal_all<L>(x: &mut [f32]) {
            for x in x {
                *x = normal::<L>(*x).0;
            }
        }
    }

    /// `Φ(x)` in f64: the series of erf near zero, the continued fraction of erfc farther out.
    pub(crate) fn normal_f64(x: f64) -> f64 {
        let z = x.abs() / std::f64::consts::SQRT_2;
        let tail = if z < 2.5 {
            let (mut term, mut sum) = (z, z);
            for n in 1..120 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            0.5 - sum / std::f64::consts::PI.sqrt()
        } else {
            let mut fraction = z;
            for n in (1..200).rev() {
                fraction = z + 0.5 * f64::from(n) / fraction;
            }
            0.5 * (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
        };
        if x < 0.0 { tail } else { 1.0 - tail }
    }

    #[test]
    fn the_yardstick_knows_a_few_values() {
        for (x, want) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-3.0, 1.349_898_031_630_094_6e-3),
            (-6.0, 9.865_876_450_376_98e-10),
        ] {
            let got = normal_f64(x);
            assert!((got - want).abs() <= 1e-9 * want, "{x}: {got} {want}");
        }
    }

    /// On every path of the machine: to 2e-7 everywhere, and relative to the result where it is small.
    #[test]
    fn matches_f64() {
        let xs: Vec<f32> = (-120_000..120_000).map(|i| i as f32 * 1e-4).collect();
        for level in Level::available() {
            let mut ys = xs.clone();
            normal_all(level, &mut ys);
            for (x, y) in xs.iter().zip(&ys) {
                let want = normal_f64(f64::from(*x));
                let off = (f64::from(*y) - want).abs();
                assert!(off <= 2e-7, "{level:?} {x}: {y} {want}");
                let close = 8e-7 * (1.0 + f64::from(x * x)) * want;
                assert!(off <= close, "{level:?} {x}: {y} {want}, relative");
            }
        }
    }

    #[test]
    fn special_values() {
        for level in Level::available() {
            let mut v = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30];
            normal_all(level, &mut v);
            // The fit is not exact at zero, only as near as anywhere.
            assert!(v[..2].iter().all(|y| (y - 0.5).abs() < 2e-7));
            assert_eq!(v[2..4], [1.0, 0.0]);
            assert!(v[4].is_nan());
            assert_eq!(v[5], 1.0);
        }
    }
}

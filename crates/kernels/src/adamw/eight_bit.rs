//! The step of moments in 8 bits on a CPU, block by block: nothing in f32 is longer than a block.

use super::cpu::{Rounded, update};
use super::host::HostCodes;
use super::{MOMENT_BLOCK, Moments};
use crate::cpu::simd::{Level, simd_fn};
use crate::quantized::formats;
use crate::quantized::formats::{STEPS, dynamic_map, unsigned_dynamic_map};

/// What the codes of a moment mean, and the code of each step between -1 and 1.
struct Map {
    values: &'static [f32; 256],
    nearest: &'static [u8; STEPS],
}

impl Moments<Map> {
    fn get() -> Self {
        Self {
            first: Map {
                values: dynamic_map(),
                nearest: formats::nearest(),
            },
            second: Map {
                values: unsigned_dynamic_map(),
                nearest: formats::unsigned_nearest(),
            },
        }
    }
}

/// Updates elements of one parameter that begin with a block.
pub(super) fn step(
    level: Level,
    numbers: Rounded,
    value: &mut [f32],
    grad: &[f32],
    moments: &mut Moments<HostCodes<'_>>,
) {
    let maps = Moments::get();
    let Moments { first, second } = moments;
    blocks(level, numbers, value, grad, first, second, &maps);
}

simd_fn! {
    fn blocks<L>(
        n: Rounded,
        value: &mut [f32],
        grad: &[f32],
        first: &mut HostCodes<'_>,
        second: &mut HostCodes<'_>,
        maps: &Moments<Map>,
    ) {
        let (mut m, mut v) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
        let firsts = first.codes.chunks_mut(MOMENT_BLOCK).zip(first.absmax.iter_mut());
        let seconds = second.codes.chunks_mut(MOMENT_BLOCK).zip(second.absmax.iter_mut());
        let values = value.chunks_mut(MOMENT_BLOCK).zip(grad.chunks(MOMENT_BLOCK));
        for ((value, grad), (first, second)) in values.zip(firsts.zip(seconds)) {
            let (m, v) = (&mut m[..value.len()], &mut v[..value.len()]);
            read(&maps.first, first.0, *first.1, m);
            read(&maps.second, second.0, *second.1, v);
            update(n, value, m, v, grad);
            write(&maps.first, m, first.0, first.1);
            write(&maps.second, v, second.0, second.1);
        }
    }
}

#[inline(always)]
fn read(map: &Map, codes: &[u8], scale: f32, moment: &mut [f32]) {
    for (x, code) in moment.iter_mut().zip(codes) {
        *x = map.values[usize::from(*code)] * scale;
    }
}

#[inline(always)]
fn write(map: &Map, moment: &[f32], codes: &mut [u8], scale: &mut f32) {
    *scale = absmax(moment);
    let inverse = 1.0 / *scale;
    let mut steps = [0u16; MOMENT_BLOCK];
    for (step, x) in steps.iter_mut().zip(moment) {
        *step = formats::step(*x * inverse);
    }
    for (code, step) in codes.iter_mut().zip(&steps) {
        *code = map.nearest[usize::from(*step)];
    }
}

/// The largest magnitude, NaN if there is a NaN or an infinity. Magnitudes are in the order of their bits.
#[inline(always)]
fn absmax(values: &[f32]) -> f32 {
    let bits = values.iter().map(|x| x.to_bits() & 0x7FFF_FFFF);
    let largest = f32::from_bits(bits.fold(0, u32::max));
    match largest.is_finite() {
        true => largest,
        false => f32::NAN,
    }
}

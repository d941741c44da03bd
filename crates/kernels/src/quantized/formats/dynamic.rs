//! bitsandbytes' 8-bit dynamic map, the blocks quantised with it, and PyTorch's mean.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::{QuantError, absmax, expect, finite};

/// Steps of the table that maps a scaled value to its code.
pub(crate) const STEPS: usize = 1 << 16;

/// The 256 values of the signed dynamic map, ascending: for each of seven powers of ten, the middles of
/// 1, 2, 4, ... 64 equal parts of 0.1 to 1, times that power and either sign; 0 and 1 besides.
///
/// The same f32 numbers as bitsandbytes' `create_dynamic_map()`.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| build_map(true))
}

/// The 256 values of the unsigned dynamic map, ascending: as [`dynamic_map`] without a sign, and with twice
/// as many parts of each power.
///
/// The same f32 numbers as bitsandbytes' `create_dynamic_map(signed=False)`.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| build_map(false))
}

fn build_map(signed: bool) -> [f32; 256] {
    let mut map = [0.0_f32; 256];
    let mut at = 0;
    let mut put = |value| {
        map[at] = value;
        at += 1;
    };
    for exponent in 0..7 {
        let parts = (if signed { 1_usize } else { 2 }) << exponent;
        let power = 10_f64.powi(exponent - 6) as f32;
        let bound = |i| linspace_point(parts + 1, i);
        for i in 0..parts {
            let middle = power * ((bound(i) + bound(i + 1)) / 2.0);
            put(middle);
            if signed {
                put(-middle);
            }
        }
    }
    // 254 are filled; what is left is 0, which the array holds already, and 1.
    map[255] = 1.0;
    map.sort_by(f32::total_cmp);
    map
}

/// Point `i` of `torch.linspace(0.1, 1, points)`: counted from the nearer end, product and sum rounded once.
fn linspace_point(points: usize, i: usize) -> f32 {
    let step = (1.0_f32 - 0.1) / (points - 1) as f32;
    if i < points / 2 {
        step.mul_add(i as f32, 0.1)
    } else {
        (-step).mul_add((points - 1 - i) as f32, 1.0)
    }
}

/// The code of each of 65536 evenly spaced values in [-1, 1]: the nearest of the signed map.
pub(crate) fn nearest() -> &'static [u8; STEPS] {
    static TABLE: OnceLock<Box<[u8; STEPS]>> = OnceLock::new();
    TABLE.get_or_init(|| nearest_of(dynamic_map()))
}

/// The same of the unsigned map: nothing below 0 has another code than 0.
pub(crate) fn unsigned_nearest() -> &'static [u8; STEPS] {
    static TABLE: OnceLock<Box<[u8; STEPS]>> = OnceLock::new();
    TABLE.get_or_init(|| nearest_of(unsigned_dynamic_map()))
}

fn nearest_of(map: &[f32; 256]) -> Box<[u8; STEPS]> {
    let mut table = Box::new([0; STEPS]);
    let mut code = 0;
    for (k, of_step) in table.iter_mut().enumerate() {
        let value = (k as f32 / (STEPS - 1) as f32) * 2.0 - 1.0;
        while code < 255 && (map[code + 1] - value).abs() < (value - map[code]).abs() {
            code += 1;
        }
        *of_step = code as u8;
    }
    table
}

/// The step of a value scaled into [-1, 1]. A NaN, 0 over an underflowed scale, has step 0.
#[inline(always)]
#[allow(clippy::manual_clamp)]
pub(crate) fn step(scaled: f32) -> u16 {
    // Both pass over a NaN, which becomes the lower end; `clamp` would let it through.
    let scaled = scaled.max(-1.0).min(1.0);
    let step = ((scaled + 1.0) * 0.5) * (STEPS - 1) as f32 + 0.5;
    // SAFETY: between 0.5 and 65535.5, whatever `scaled` was. A cast that checks is no vector instruction.
    unsafe { step.to_int_unchecked::<i32>() as u16 }
}

/// Values as 8-bit codes of a dynamic map, a scale for every block.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicBlocks {
    /// A code for each value.
    pub codes: Vec<u8>,
    /// The largest magnitude of each block.
    pub absmax: Vec<f32>,
    /// What the codes stand for: 256 values.
    pub map: Vec<f32>,
    /// Values in a block; the last may have fewer.
    pub block: usize,
}

impl DynamicBlocks {
    /// Quantises `values` in blocks of `block`, as bitsandbytes' `quantize_blockwise` does on a CPU: a
    /// value is first rounded to one of 65536 steps in [-1, 1], and a step has the nearest code. The
    /// plain PyTorch backend takes the nearest code of the value itself, which may be the neighbour and, below 1e-5 of the scale,
    /// a few codes away. A block of zeros gets code 0 and scale 0.
    ///
    /// Fails where a value is not finite.
    pub fn quantise(values: &[f32], block: usize) -> Result<Self, QuantError> {
        if block == 0 {
            return Err(QuantError::BlockSize(0));
        }
        finite(values)?;
        let table = nearest();
        let mut codes = vec![0; values.len()];
        let mut scales = vec![0.0; values.len().div_ceil(block)];
        (
            values.par_chunks(block),
            codes.par_chunks_mut(block),
            &mut scales,
        )
            .into_par_iter()
            .for_each(|(values, codes, scale)| {
                *scale = absmax(values);
                if *scale > 0.0 {
                    let inverse = 1.0 / *scale;
                    for (c, v) in codes.iter_mut().zip(values) {
                        *c = table[usize::from(step(v * inverse))];
                    }
                }
            });
        Ok(Self {
            codes,
            absmax: scales,
            map: dynamic_map().to_vec(),
            block,
        })
    }

    /// Wraps what a checkpoint holds. Fails where the parts do not fit each other.
    pub fn from_parts(
        codes: Vec<u8>,
        absmax: Vec<f32>,
        map: Vec<f32>,
        block: usize,
    ) -> Result<Self, QuantError> {
        if block == 0 {
            return Err(QuantError::BlockSize(0));
        }
        let shape = [codes.len()];
        expect("values of the 8-bit map", &shape, 256, map.len())?;
        expect(
            "scales of the scales",
            &shape,
            codes.len().div_ceil(block),
            absmax.len(),
        )?;
        Ok(Self {
            codes,
            absmax,
            map,
            block,
        })
    }

    /// The value at `index`, which must be below the number of codes.
    pub(super) fn value(&self, index: usize) -> f32 {
        self.map[self.codes[index] as usize] * self.absmax[index / self.block]
    }

    /// All values.
    pub fn dequantise(&self) -> Vec<f32> {
        (0..self.codes.len()).map(|i| self.value(i)).collect()
    }
}

/// Columns of PyTorch's sum, lanes of each (its vectors of 256 bits), and its levels of partial sums.
const COLUMNS: usize = 4;
const LANES: usize = 8;
const LEVELS: usize = 4;

/// The mean as PyTorch forms it on one thread: sums of sums, in an order that depends on the length alone.
///
/// With several threads PyTorch cuts more than 32768 values into a piece a thread, so that its own last
/// bit depends on the machine there.
pub(super) fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (rows, single) = vectors.as_chunks::<COLUMNS>();
    let mut partial = sum_rows(rows);
    for vector in single {
        add(&mut partial[0], vector);
    }
    let [mut total, others @ ..] = partial;
    for other in &others {
        add(&mut total, other);
    }
    let mut sum = 0.0;
    for v in rest.iter().chain(&total) {
        sum += v;
    }
    sum / values.len() as f32
}

/// Adds up rows, level by level: after every `step` rows a level's sum goes to the next and starts anew.
fn sum_rows(rows: &[[[f32; LANES]; COLUMNS]]) -> [[f32; LANES]; COLUMNS] {
    let log = rows.len().next_power_of_two().trailing_zeros() as usize;
    let power = (log / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; LANES]; COLUMNS]; LEVELS];
    let mut done = 0;
    while done + step <= rows.len() {
        for row in &rows[done..done + step] {
            add_row(&mut levels[0], row);
        }
        done += step;
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; LANES]; COLUMNS]);
            add_row(&mut levels[level], &below);
            if done & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    for row in &rows[done..] {
        add_row(&mut levels[0], row);
    }
    let [mut total, others @ ..] = levels;
    for other in &others {
        add_row(&mut total, other);
    }
    total
}

fn add_row(to: &mut [[f32; LANES]; COLUMNS], row: &[[f32; LANES]; COLUMNS]) {
    for (to, vector) in to.iter_mut().zip(row) {
        add(to, vector);
    }
}

fn add(to: &mut [f32; LANES], vector: &[f32; LANES]) {
    for (to, v) in to.iter_mut().zip(vector) {
        *to += v;
    }
}

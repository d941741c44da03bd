//! Changes to inputs: of bytes, of texts by their tokens, and of JSON by its values.

mod json;
mod text;

pub use json::change as json;
pub use text::change as text;

use crate::random::Random;

/// Integers at which readers go wrong.
pub const EXTREMES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    33,
    64,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX,
];

/// A number near `value`, or one of the extremes.
pub fn number(random: &mut Random, value: u64) -> u64 {
    match random.below(8) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => value.wrapping_mul(2),
        3 => value / 2,
        4 => value ^ (1 << random.below(64)),
        5 => value.wrapping_neg(),
        _ => *random.pick(&EXTREMES),
    }
}

/// A few changes of `bytes`.
pub fn bytes(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..random.few() {
        let length = bytes.len();
        if length == 0 {
            bytes.push(random.next() as u8);
            continue;
        }
        let at = random.below(length);
        match random.below(12) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = *random.pick(&[0, 1, 0x7F, 0x80, 0xFE, 0xFF]),
            3 => bytes[at] = bytes[at].wrapping_add(1),
            4 | 5 => {
                // A little-endian integer of some width.
                let width = *random.pick(&[2, 4, 8]);
                if let Some(place) = bytes.get_mut(at..at + width) {
                    let mut old = [0; 8];
                    old[..width].copy_from_slice(place);
                    let new = number(random, u64::from_le_bytes(old)).to_le_bytes();
                    place.copy_from_slice(&new[..width]);
                }
            }
            6 => bytes.truncate(at),
            7 => {
                let range = random.range(length);
                bytes.drain(range);
            }
            8 => {
                let range = random.range(length);
                let piece = bytes[range].to_vec();
                bytes.splice(at..at, piece);
            }
            9 => {
                let range = random.range(length);
                let piece = bytes[range].to_vec();
                let end = (at + piece.len()).min(length);
                bytes[at..end].copy_from_slice(&piece[..end - at]);
            }
            10 => {
                let count = 1 + random.below(16);
                let new: Vec<u8> = (0..count).map(|_| random.next() as u8).collect();
                bytes.splice(at..at, new);
            }
            _ => bytes.swap(at, length - 1 - at),
        }
    }
}

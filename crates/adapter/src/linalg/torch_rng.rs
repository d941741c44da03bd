//! PyTorch's generator of random numbers on a CPU: the 32-bit Mersenne Twister of Matsumoto and Nishimura
//! (1998), seeded as `torch.Generator.manual_seed` does.

const N: usize = 624;
const M: usize = 397;

/// The generator's state.
pub(crate) struct Mersenne {
    state: [u32; N],
    next: usize,
}

impl Mersenne {
    /// Seeded by the lower half of `seed`, as PyTorch's engine is.
    pub fn new(seed: u64) -> Self {
        let mut state = [0_u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = 1_812_433_253_u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    fn refill(&mut self) {
        for i in 0..N {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (mixed >> 1) ^ twist;
        }
        self.next = 0;
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `tensor.uniform_(-bound, bound)` on f32: 24 bits each, scaled and shifted with one rounding.
    pub fn uniform(&mut self, count: usize, bound: f64) -> Vec<f32> {
        let (from, to) = (-bound as f32, bound as f32);
        let draw = |_| {
            let unit = (self.bits() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0);
            unit.mul_add(to - from, from)
        };
        (0..count).map(draw).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 10000th output for the customary seed 5489, as the C++ standard gives it for `std::mt19937`.
    #[test]
    fn it_is_the_standard_generator() {
        let mut generator = Mersenne::new(5489);
        let last = (0..10_000).map(|_| generator.bits()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}

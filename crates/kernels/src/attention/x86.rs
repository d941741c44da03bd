//! The tile products for x86, by hand: the compiler would keep the sums in memory.

/// A stripe's product for one instruction set. The arguments are the vector's type, how many floats it
/// has, the numbers of vectors that a strip of columns may have, and the operations.
macro_rules! kernel {
    (
        $name:ident, $features:literal, $vector:ty, $lanes:literal, [$($vectors:literal),*], $widest:literal,
        $zero:ident, $splat:ident, $fma:ident, $load:ident, $store:ident
    ) => {
        pub(super) mod $name {
            use std::arch::x86_64::*;

            use super::super::tile::Stripe;

            /// Columns in strips of equal width, so that none is left narrow.
            ///
            /// # Safety
            /// The operands have the rows, columns and depth, and the processor the instructions.
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn stripe(s: Stripe) {
                let vectors = s.cols / $lanes;
                if vectors == 0 {
                    return;
                }
                let strip = vectors.div_ceil(vectors.div_ceil($widest));
                let mut done = 0;
                while done < vectors {
                    let n = strip.min(vectors - done);
                    let part = Stripe {
                        right: s.right.wrapping_add(done * $lanes),
                        c: s.c.wrapping_add(done * $lanes),
                        ..s
                    };
                    // SAFETY: columns stay below the number there is.
                    unsafe {
                        match n {
                            $($vectors => rows::<$vectors>(part),)*
                            _ => {}
                        }
                    }
                    done += n;
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn rows<const V: usize>(s: Stripe) {
                // SAFETY: passed on.
                unsafe {
                    if s.left.transposed {
                        some_rows::<true, V>(s);
                    } else {
                        some_rows::<false, V>(s);
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn some_rows<const T: bool, const V: usize>(s: Stripe) {
                let mut row = 0;
                // SAFETY: rows stay below the number there is.
                unsafe {
                    while row < s.rows {
                        row += match s.rows - row {
                            6.. => tile::<T, 6, V>(s, row),
                            4..6 => tile::<T, 4, V>(s, row),
                            2..4 => tile::<T, 2, V>(s, row),
                            _ => tile::<T, 1, V>(s, row),
                        };
                    }
                }
            }

            /// `P` rows from `row` on, of `V` vectors.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)]
            unsafe fn tile<const T: bool, const P: usize, const V: usize>(
                s: Stripe,
                row: usize,
            ) -> usize {
                let mut sums: [[$vector; V]; P] = [[$zero(); V]; P];
                // SAFETY: inside the operands, says the caller.
                unsafe {
                    let c = s.c.add(row * s.c_stride);
                    if s.add {
                        for p in 0..P {
                            for v in 0..V {
                                sums[p][v] = $load(c.add(p * s.c_stride + v * $lanes));
                            }
                        }
                    }
                    let left = s.left.from(row, 0).at;
                    for d in 0..s.depth {
                        let right_row = s.right.add(d * s.right_stride);
                        let mut right: [$vector; V] = [$zero(); V];
                        for v in 0..V {
                            right[v] = $load(right_row.add(v * $lanes));
                        }
                        for p in 0..P {
                            let at = if T {
                                d * s.left.stride + p
                            } else {
                                p * s.left.stride + d
                            };
                            let left = $splat(*left.add(at));
                            for v in 0..V {
                                sums[p][v] = $fma(left, right[v], sums[p][v]);
                            }
                        }
                    }
                    for p in 0..P {
                        for v in 0..V {
                            $store(c.add(p * s.c_stride + v * $lanes), sums[p][v]);
                        }
                    }
                }
                P
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f",
    __m512,
    16,
    [1, 2, 3, 4],
    4,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps
);

kernel!(
    avx2,
    "avx2,fma",
    __m256,
    8,
    [2],
    2,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps
);

//! Many products of small matrices, straight from where the operands lie: a general matrix product
//! would spend its time on packing them.

use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};
use crate::cpu::simd::{Level, code, fma, simd_fn};

/// From so many elements of the right operand on, packing pays.
const LARGE: usize = 128 * 128;

/// `count` products, of `[rows, depth]` with `[depth, cols]`. No axis is empty.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) cols: usize,
}

/// An operand: element `(i, j)` of product `c` lies at `c·step + i·rs + j·cs`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    data: &'a [f32],
    step: usize,
    rs: usize,
    cs: usize,
}

impl<'a> Operand<'a> {
    /// Rows of consecutive elements, each `stride` after the one before.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            step: 0,
            rs: stride,
            cs: 1,
        }
    }

    pub(super) fn t(self) -> Self {
        Self {
            rs: self.cs,
            cs: self.rs,
            ..self
        }
    }

    /// How far a product's operand lies behind that of the product before.
    pub(super) fn step(self, step: usize) -> Self {
        Self { step, ..self }
    }

    fn check(&self, count: usize, rows: usize, cols: usize) {
        let last = (count - 1) * self.step + (rows - 1) * self.rs + (cols - 1) * self.cs;
        assert!(last < self.data.len(), "small product out of bounds");
    }

    /// Product `c`'s part, for the general product.
    fn matrix(&self, c: usize, rows: usize, cols: usize) -> MatRef<'a> {
        if self.cs == 1 {
            MatRef::strided(self.data, c * self.step, rows, cols, self.rs)
        } else {
            MatRef::strided(self.data, c * self.step, cols, rows, self.cs).t()
        }
    }
}

/// Where the results go: rows of consecutive elements.
pub(super) struct Target<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) step: usize,
    pub(super) rs: usize,
}

impl<'a> Target<'a> {
    pub(super) fn rows(data: &'a mut [f32], stride: usize) -> Self {
        Self {
            data,
            step: 0,
            rs: stride,
        }
    }

    pub(super) fn step(self, step: usize) -> Self {
        Self { step, ..self }
    }
}

/// `dst = [dst +] scale · a · b` for every product, on the calling thread; the rows of b are of
/// consecutive elements.
pub(super) fn products(
    level: Level,
    sizes: Sizes,
    dst: Target<'_>,
    into: Into,
    scale: f32,
    a: Operand<'_>,
    b: Operand<'_>,
) {
    let Sizes {
        count,
        rows,
        depth,
        cols,
    } = sizes;
    a.check(count, rows, depth);
    b.check(count, depth, cols);
    assert_eq!(b.cs, 1, "the right operand's rows lie in order");
    let last = (count - 1) * dst.step + (rows - 1) * dst.rs + cols - 1;
    assert!(last < dst.data.len(), "small product out of bounds");
    if depth * cols < LARGE {
        let first = Strips {
            rows,
            depth,
            into,
            scale,
            a: (a.data.as_ptr(), a.rs, a.cs),
            b: (b.data.as_ptr(), b.rs),
            dst: (dst.data.as_mut_ptr(), dst.rs),
        };
        return walk(level, first, count, cols, [a.step, b.step, dst.step]);
    }
    for c in 0..count {
        // SAFETY: inside the exclusive slice, as just checked; its elements are initialised.
        let mut part =
            unsafe { MatMut::raw(dst.data.as_mut_ptr().add(c * dst.step), rows, cols, dst.rs) };
        let (a, b) = (a.matrix(c, rows, depth), b.matrix(c, depth, cols));
        product(&mut part, into, scale, a, b, Threads::One);
    }
}

/// `dst += scale · Σ a · bᵀ`, summed over all the products, on the calling thread; the rows of both
/// are of consecutive elements. The sizes' `depth` is the rows' length, `cols` the rows of b.
pub(super) fn inner_products(
    level: Level,
    sizes: Sizes,
    dst: &mut [f32],
    scale: f32,
    a: Operand<'_>,
    b: Operand<'_>,
) {
    let Sizes {
        count,
        rows,
        depth,
        cols,
    } = sizes;
    a.check(count, rows, depth);
    b.check(count, cols, depth);
    assert!(a.cs == 1 && b.cs == 1, "rows lie in order");
    assert_eq!(dst.len(), rows * cols, "one number for each pair of rows");
    let rows = Rows {
        count,
        depth,
        a: (a.data.as_ptr(), a.rs, a.step),
        b: (b.data.as_ptr(), b.rs, b.step),
    };
    meet(level, rows, dst, cols, scale);
}

/// Rows to multiply with each other: start, distance of rows, distance of products.
#[derive(Clone, Copy)]
struct Rows {
    count: usize,
    depth: usize,
    a: (*const f32, usize, usize),
    b: (*const f32, usize, usize),
}

/// What the tiles of one product share.
#[derive(Clone, Copy)]
struct Strips {
    rows: usize,
    depth: usize,
    into: Into,
    scale: f32,
    a: (*const f32, usize, usize),
    b: (*const f32, usize),
    dst: (*mut f32, usize),
}

impl Strips {
    /// From column `col` on.
    ///
    /// # Safety
    /// The operands have that column.
    #[inline(always)]
    unsafe fn from(self, col: usize) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            Self {
                b: (self.b.0.add(col), self.b.1),
                dst: (self.dst.0.add(col), self.dst.1),
                ..self
            }
        }
    }
}

simd_fn! {
    /// Every product. For [`products`] alone, which checks what this relies on.
    fn walk<L>(first: Strips, count: usize, cols: usize, steps: [usize; 3]) {
        for c in 0..count {
            // SAFETY: inside the operands, whose last elements the caller has checked; the
            // instructions are those that the `Level` vouches for.
            unsafe {
                let s = Strips {
                    a: (first.a.0.add(c * steps[0]), first.a.1, first.a.2),
                    b: (first.b.0.add(c * steps[1]), first.b.1),
                    dst: (first.dst.0.add(c * steps[2]), first.dst.1),
                    ..first
                };
                #[cfg(target_arch = "x86_64")]
                match L {
                    code::AVX512 => avx512::one(s, cols),
                    code::AVX2 => avx2::one(s, cols),
                    _ => plain::one::<L>(s, cols),
                }
                #[cfg(not(target_arch = "x86_64"))]
                plain::one::<L>(s, cols);
            }
        }
    }
}

simd_fn! {
    /// All pairs of rows, in blocks whose sums fit the registers. For [`inner_products`] alone, which
    /// checks what this relies on.
    fn meet<L>(all: Rows, dst: &mut [f32], cols: usize, scale: f32) {
        let rows = dst.len() / cols;
        let mut row = 0;
        while row < rows {
            let height = if row + 4 <= rows { 4 } else { 1 };
            let mut col = 0;
            while col < cols {
                let width = if col + 4 <= cols { 4 } else { 1 };
                // SAFETY: rows and columns stay below the numbers there are.
                unsafe {
                    let part = Rows {
                        a: (all.a.0.add(row * all.a.1), all.a.1, all.a.2),
                        b: (all.b.0.add(col * all.b.1), all.b.1, all.b.2),
                        ..all
                    };
                    let at = &mut dst[row * cols + col..];
                    match (height, width) {
                        (4, 4) => block::<L, 4, 4>(part, at, cols, scale),
                        (4, _) => block::<L, 4, 1>(part, at, cols, scale),
                        (_, 4) => block::<L, 1, 4>(part, at, cols, scale),
                        _ => block::<L, 1, 1>(part, at, cols, scale),
                    }
                }
                col += width;
            }
            row += height;
        }
    }
}

/// `P` rows of a with `Q` rows of b.
///
/// # Safety
/// The operands have these rows, and the processor the instructions.
#[inline(always)]
unsafe fn block<const L: u8, const P: usize, const Q: usize>(
    s: Rows,
    dst: &mut [f32],
    stride: usize,
    scale: f32,
) {
    // SAFETY: passed on to the caller.
    let sums: [[f32; Q]; P] = unsafe {
        #[cfg(target_arch = "x86_64")]
        match L {
            code::AVX512 => avx512::inner(s),
            code::AVX2 => avx2::inner(s),
            _ => plain::inner::<L, P, Q>(s),
        }
        #[cfg(not(target_arch = "x86_64"))]
        plain::inner::<L, P, Q>(s)
    };
    for (p, sums) in sums.iter().enumerate() {
        for (q, sum) in sums.iter().enumerate() {
            dst[p * stride + q] += scale * sum;
        }
    }
}

/// A product for an instruction set of x86, by hand: of loops like [`plain`]'s the compiler keeps the
/// sums in memory, or not, as it happens. The arguments are the vector's and the mask's type, how many
/// floats a vector has, how many vectors and rows of them fit the registers, and the operations.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    (
        $name:ident, $features:literal, $vector:ty, $mask:ty, $lanes:literal, $widest:literal,
        $tallest:literal, $zero:ident, $splat:ident, $mul:ident, $fma:ident, $load:ident,
        $store:ident, $masked_load:path, $masked_store:ident, $first:path, $total:path
    ) => {
        mod $name {
            use std::arch::x86_64::*;

            use super::{Into, Rows, Strips};

            /// One product: columns in strips of equal width, so that none is left narrow; of each,
            /// all rows, so that the strip of b stays in the nearest cache.
            ///
            /// # Safety
            /// The operands have the rows and columns.
            #[inline]
            #[target_feature(enable = $features)]
            pub(super) unsafe fn one(s: Strips, cols: usize) {
                let vectors = cols.div_ceil($lanes);
                let width = vectors.div_ceil(vectors.div_ceil($widest)) * $lanes;
                let mut col = 0;
                while col < cols {
                    let n = width.min(cols - col);
                    let mask = $first((n - 1) % $lanes + 1);
                    // SAFETY: columns stay below the number there is.
                    unsafe {
                        let s = s.from(col);
                        match n.div_ceil($lanes) {
                            1 => strip::<1>(s, mask),
                            2 => strip::<2>(s, mask),
                            _ => strip::<3>(s, mask),
                        }
                    }
                    col += n;
                }
            }

            /// Inner products of `P` rows of a and `Q` rows of b.
            ///
            /// # Safety
            /// The operands have these rows.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)]
            pub(super) unsafe fn inner<const P: usize, const Q: usize>(s: Rows) -> [[f32; Q]; P] {
                let mut sums: [[$vector; Q]; P] = [[$zero(); Q]; P];
                let mask = $first((s.depth - 1) % $lanes + 1);
                for c in 0..s.count {
                    let mut d = 0;
                    while d < s.depth {
                        // SAFETY: below the rows' length; what the mask leaves out is not touched.
                        unsafe {
                            let (a, b) = (s.a.0.add(c * s.a.2 + d), s.b.0.add(c * s.b.2 + d));
                            let full = d + $lanes <= s.depth;
                            let read = |at| {
                                if full {
                                    $load(at)
                                } else {
                                    $masked_load(mask, at)
                                }
                            };
                            let mut right: [$vector; Q] = [$zero(); Q];
                            for q in 0..Q {
                                right[q] = read(b.add(q * s.b.1));
                            }
                            for p in 0..P {
                                let left = read(a.add(p * s.a.1));
                                for q in 0..Q {
                                    sums[p][q] = $fma(left, right[q], sums[p][q]);
                                }
                            }
                        }
                        d += $lanes;
                    }
                }
                let mut totals = [[0.0; Q]; P];
                for p in 0..P {
                    for q in 0..Q {
                        totals[p][q] = $total(sums[p][q]);
                    }
                }
                totals
            }

            /// `V` vectors of columns, of the last those in the mask.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn strip<const V: usize>(s: Strips, mask: $mask) {
                let mut row = 0;
                // SAFETY: passed on; rows stay below the number there is.
                unsafe {
                    while row + $tallest <= s.rows {
                        tile::<$tallest, V>(s, row, mask);
                        row += $tallest;
                    }
                    while row + 4 <= s.rows {
                        tile::<4, V>(s, row, mask);
                        row += 4;
                    }
                    while row < s.rows {
                        tile::<1, V>(s, row, mask);
                        row += 1;
                    }
                }
            }

            /// `P` rows from row `row` on.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)]
            unsafe fn tile<const P: usize, const V: usize>(s: Strips, row: usize, mask: $mask) {
                let ((a, rs, cs), (b, stride), (dst, dst_rs)) = (s.a, s.b, s.dst);
                let mut sums: [[$vector; V]; P] = [[$zero(); V]; P];
                // SAFETY: the operands have these rows and columns; what the mask leaves out is not
                // touched.
                unsafe {
                    let a = a.add(row * rs);
                    for d in 0..s.depth {
                        let b = b.add(d * stride);
                        let mut right: [$vector; V] = [$zero(); V];
                        for v in 0..V {
                            let at = b.add(v * $lanes);
                            right[v] = if v + 1 < V {
                                $load(at)
                            } else {
                                $masked_load(mask, at)
                            };
                        }
                        for p in 0..P {
                            let left = $splat(*a.add(p * rs + d * cs));
                            for v in 0..V {
                                sums[p][v] = $fma(left, right[v], sums[p][v]);
                            }
                        }
                    }
                    let scale = $splat(s.scale);
                    for p in 0..P {
                        for v in 0..V {
                            let at = dst.add((row + p) * dst_rs + v * $lanes);
                            let last = v + 1 == V;
                            let sum = if s.into == Into::Set {
                                $mul(scale, sums[p][v])
                            } else if last {
                                $fma(scale, sums[p][v], $masked_load(mask, at))
                            } else {
                                $fma(scale, sums[p][v], $load(at))
                            };
                            if last {
                                $masked_store(at, mask, sum);
                            } else {
                                $store(at, sum);
                            }
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(
    avx512,
    "avx512f",
    __m512,
    __mmask16,
    16,
    3,
    8,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_maskz_loadu_ps,
    _mm512_mask_storeu_ps,
    super::first_16,
    _mm512_reduce_add_ps
);

#[cfg(target_arch = "x86_64")]
kernel!(
    avx2,
    "avx2,fma",
    __m256,
    __m256i,
    8,
    2,
    4,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    super::masked_load_8,
    _mm256_maskstore_ps,
    super::first_8,
    super::total_8
);

/// The mask of the first `n` floats, of 1 to 16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn first_16(n: usize) -> u16 {
    u16::MAX >> (16 - n)
}

/// The mask of the first `n` floats, of 1 to 8.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn first_8(n: usize) -> std::arch::x86_64::__m256i {
    use std::arch::x86_64::*;
    let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), index)
}

/// The arguments in AVX-512's order.
///
/// # Safety
/// Floats in the mask can be read.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn masked_load_8(
    mask: std::arch::x86_64::__m256i,
    at: *const f32,
) -> std::arch::x86_64::__m256 {
    // SAFETY: passed on to the caller.
    unsafe { std::arch::x86_64::_mm256_maskload_ps(at, mask) }
}

/// The sum of the floats.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn total_8(x: std::arch::x86_64::__m256) -> f32 {
    use std::arch::x86_64::*;
    let half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}

/// A product in loops that the compiler makes vectors of.
mod plain {
    use super::{Into, Rows, Strips, fma};
    use crate::cpu::simd::dot;

    /// Inner products of `P` rows of a and `Q` rows of b.
    ///
    /// # Safety
    /// The operands have these rows.
    #[inline(always)]
    pub(super) unsafe fn inner<const L: u8, const P: usize, const Q: usize>(
        s: Rows,
    ) -> [[f32; Q]; P] {
        let mut sums = [[0.0; Q]; P];
        for c in 0..s.count {
            for (p, sums) in sums.iter_mut().enumerate() {
                for (q, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: as long as the rows are.
                    let (a, b) = unsafe {
                        let a = s.a.0.add(c * s.a.2 + p * s.a.1);
                        let b = s.b.0.add(c * s.b.2 + q * s.b.1);
                        (
                            std::slice::from_raw_parts(a, s.depth),
                            std::slice::from_raw_parts(b, s.depth),
                        )
                    };
                    *sum += dot::<L>(a, b);
                }
            }
        }
        sums
    }

    /// # Safety
    /// The operands have the rows and columns.
    #[inline(always)]
    pub(super) unsafe fn one<const L: u8>(s: Strips, cols: usize) {
        let mut col = 0;
        // SAFETY: passed on; columns stay below the number there is.
        unsafe {
            while col + 8 <= cols {
                strip::<L, 8>(s.from(col));
                col += 8;
            }
            while col < cols {
                strip::<L, 1>(s.from(col));
                col += 1;
            }
        }
    }

    /// `W` columns of all rows.
    #[inline(always)]
    unsafe fn strip<const L: u8, const W: usize>(s: Strips) {
        let mut row = 0;
        // SAFETY: passed on; rows stay below the number there is.
        unsafe {
            while row + 4 <= s.rows {
                tile::<L, 4, W>(s, row);
                row += 4;
            }
            while row < s.rows {
                tile::<L, 1, W>(s, row);
                row += 1;
            }
        }
    }

    /// `P` rows from row `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn tile<const L: u8, const P: usize, const W: usize>(s: Strips, row: usize) {
        let ((a, rs, cs), (b, stride), (dst, dst_rs)) = (s.a, s.b, s.dst);
        let mut sums = [[0.0f32; W]; P];
        // SAFETY: the operands have these rows and columns, and the destination is exclusive.
        unsafe {
            let a = a.add(row * rs);
            for d in 0..s.depth {
                let right = *b.add(d * stride).cast::<[f32; W]>();
                for p in 0..P {
                    let left = *a.add(p * rs + d * cs);
                    for i in 0..W {
                        sums[p][i] = fma::<L>(left, right[i], sums[p][i]);
                    }
                }
            }
            for p in 0..P {
                let out = &mut *dst.add((row + p) * dst_rs).cast::<[f32; W]>();
                if s.into == Into::Set {
                    for i in 0..W {
                        out[i] = s.scale * sums[p][i];
                    }
                } else {
                    for i in 0..W {
                        out[i] = fma::<L>(s.scale, sums[p][i], out[i]);
                    }
                }
            }
        }
    }
}

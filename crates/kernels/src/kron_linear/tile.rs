//! Many products of small matrices, straight from where the operands lie: a general matrix product
//! would spend its time on packing them.

#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::code;
use crate::cpu::simd::{Level, fma, simd_fn};

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

impl Sizes {
    pub(super) fn one(rows: usize, depth: usize, cols: usize) -> Self {
        Self {
            count: 1,
            rows,
            depth,
            cols,
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
pub(super) struct Rows {
    pub(super) count: usize,
    pub(super) depth: usize,
    pub(super) a: (*const f32, usize, usize),
    pub(super) b: (*const f32, usize, usize),
}

/// What the tiles of one product share.
#[derive(Clone, Copy)]
pub(super) struct Strips {
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) into: Into,
    pub(super) scale: f32,
    pub(super) a: (*const f32, usize, usize),
    pub(super) b: (*const f32, usize),
    pub(super) dst: (*mut f32, usize),
}

impl Strips {
    /// From column `col` on.
    ///
    /// # Safety
    /// The operands have that column.
    #[inline(always)]
    pub(super) unsafe fn from(self, col: usize) -> Self {
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
                    code::AVX512 => x86::avx512::one(s, cols),
                    code::AVX2 => x86::avx2::one(s, cols),
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
            code::AVX512 => x86::avx512::inner(s),
            code::AVX2 => x86::avx2::inner(s),
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

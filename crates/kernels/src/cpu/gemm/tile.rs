//! The inner loop: one tile of a product held in registers, for each instruction set.

use super::super::path::CpuPath;
use super::super::simd::{Kind, Level};

/// One stretch of a contraction, `Σ_k a(k, i) · b(k, j)`: `a` is read a number at a time, `b` by vectors.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// Length of the contraction.
    pub(super) len: usize,
    /// `a(0, 0)`.
    pub(super) a: *const f32,
    /// From `a(k, i)` to `a(k, i + 1)`.
    pub(super) a_row: isize,
    /// From `a(k, i)` to `a(k + 1, i)`.
    pub(super) a_step: isize,
    /// `b(0, 0)`; whole vectors are read.
    pub(super) b: *const f32,
    /// From `b(k, j)` to `b(k + 1, j)`.
    pub(super) b_step: isize,
    /// What the next tile wants from far away: eight rows of twice `len` floats, as far as they are worth
    /// fetching. Any address may be named.
    pub(super) ahead: *const f32,
    /// Between those rows.
    pub(super) ahead_row: isize,
}

/// Where a tile goes.
#[derive(Clone, Copy)]
pub(super) struct Out {
    /// The element of the tile's first row and column.
    pub(super) at: *mut f32,
    /// Between rows of the destination.
    pub(super) stride: isize,
    /// Whether the tile's rows are the destination's columns.
    pub(super) transposed: bool,
    /// Whether the destination's values are added to.
    pub(super) add: bool,
    /// Columns of the tile that exist.
    pub(super) cols: usize,
}

/// A tile of `rows` by `vectors · lanes`.
///
/// # Safety
/// The processor has the instructions; all of the runs may be read and the destination written.
pub(super) type TileFn = unsafe fn(rows: usize, vectors: usize, runs: &[Run], out: Out);

/// Transposes an 8 by 8 block.
///
/// # Safety
/// The processor has the instructions; both blocks are in bounds.
pub(super) type TransposeFn =
    unsafe fn(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);

/// The tiles of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// Floats a vector.
    pub(super) lanes: usize,
    /// Most vectors a row of a tile; a panel is that wide.
    pub(super) vectors: usize,
    /// Most rows a tile: a power of two.
    pub(super) rows: usize,
    /// The same where a row is one vector, which leaves room for more of them.
    pub(super) narrow: usize,
    /// Computes one.
    pub(super) tile: TileFn,
    /// Turns a block around.
    pub(super) transpose: TransposeFn,
    /// Whether a float is a pair of bf16.
    pub(super) pairs: bool,
    /// Whether the tiles are AMX's, which a thread must ask for before it uses them.
    pub(super) amx: bool,
}

impl Tiles {
    pub(super) fn of(level: Level) -> Self {
        match level.kind() {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Self {
                lanes: 16,
                vectors: 3,
                rows: 8,
                narrow: 16,
                tile: super::x86::avx512::tile,
                transpose: super::x86::transpose,
                pairs: false,
                amx: false,
            },
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => Self {
                lanes: 8,
                vectors: 3,
                rows: 4,
                narrow: 8,
                tile: super::x86::avx2::tile,
                transpose: super::x86::transpose,
                pairs: false,
                amx: false,
            },
            _ => Self {
                lanes: portable::LANES,
                vectors: portable::VECTORS,
                rows: portable::ROWS,
                narrow: portable::ROWS,
                tile: portable::tile,
                transpose: portable::transpose,
                pairs: false,
                amx: false,
            },
        }
    }

    /// The tiles that multiply bf16, where the path has some.
    pub(super) fn of_bf16(path: CpuPath) -> Option<Self> {
        match path {
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512Bf16 => Some(Self {
                lanes: 16,
                vectors: 3,
                rows: 8,
                narrow: 16,
                tile: super::x86::avx512bf16::tile,
                transpose: super::x86::transpose,
                pairs: true,
                amx: false,
            }),
            #[cfg(target_arch = "x86_64")]
            CpuPath::Amx if amx_works() => Some(Self {
                lanes: 16,
                vectors: 2,
                rows: 32,
                narrow: 32,
                tile: super::amx::tile::<super::amx::Amx>,
                transpose: super::x86::transpose,
                pairs: true,
                amx: true,
            }),
            #[cfg(target_arch = "x86_64")]
            CpuPath::Amx => CpuPath::available()
                .contains(&CpuPath::Avx512Bf16)
                .then(|| Self::of_bf16(CpuPath::Avx512Bf16))
                .flatten(),
            _ => None,
        }
    }

    /// Runs a task that computes tiles.
    pub(super) fn within<R>(&self, task: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        if self.amx {
            /// Gives the registers back, also when the task panics.
            struct End;
            impl Drop for End {
                fn drop(&mut self) {
                    // SAFETY: made only where the tiles are AMX's.
                    unsafe { super::amx::Amx::end() }
                }
            }
            // SAFETY: such tiles exist only where the path was found to have AMX.
            unsafe { super::amx::Amx::begin() };
            let _end = End;
            return task();
        }
        task()
    }

    /// Columns of a panel.
    pub(super) fn panel(&self) -> usize {
        self.lanes * self.vectors
    }

    /// Calls `f` with the first row and the height of each tile of `vectors` vectors among `rows` rows: as
    /// high as they come, then the rest by powers of two.
    pub(super) fn heights(&self, rows: usize, vectors: usize, mut f: impl FnMut(usize, usize)) {
        let mut at = 0;
        let mut height = if vectors == 1 { self.narrow } else { self.rows };
        while at < rows {
            while height > rows - at {
                height /= 2;
            }
            f(at, height);
            at += height;
        }
    }
}

/// Asks for the cache lines of `len` floats that will be read soon. Any address may be named.
pub(super) fn fetch(from: *const f32, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len + 15).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, len);
}

/// Whether AMX computes what it should, asked once.
#[cfg(target_arch = "x86_64")]
fn amx_works() -> bool {
    static WORKS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: asked only on the path with AMX, which is there only where the processor has it and the
    // system permits it.
    *WORKS.get_or_init(|| unsafe { super::amx::works() })
}

/// Writes a tile that was spilt to memory, row by row.
///
/// # Safety
/// `tile` holds `rows` rows of `width` floats, and the destination may be written.
#[inline(always)]
pub(super) unsafe fn store(tile: *const f32, rows: usize, width: usize, out: Out) {
    for i in 0..rows {
        for j in 0..out.cols {
            let (i_at, j_at) = if out.transposed {
                (1, out.stride)
            } else {
                (out.stride, 1)
            };
            // SAFETY: passed on to the caller.
            unsafe {
                let at = out.at.offset(i as isize * i_at + j as isize * j_at);
                let value = *tile.add(i * width + j);
                *at = if out.add { *at + value } else { value };
            }
        }
    }
}

/// The tile in arrays, which the compiler turns into the target's own vectors (NEON on 64-bit Arm).
pub(super) mod portable {
    use super::{Out, Run, store};

    pub(crate) const LANES: usize = 4;
    /// 64-bit Arm has 32 vector registers, the x86 baseline 16.
    const MANY: bool = cfg!(target_arch = "aarch64");
    pub(crate) const VECTORS: usize = if MANY { 3 } else { 2 };
    pub(crate) const ROWS: usize = if MANY { 8 } else { 4 };

    fn fma(a: f32, b: f32, c: f32) -> f32 {
        if cfg!(target_arch = "aarch64") {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }

    /// # Safety
    /// As [`super::TileFn`].
    pub(crate) unsafe fn tile(rows: usize, vectors: usize, runs: &[Run], out: Out) {
        // SAFETY: passed on to the caller.
        unsafe {
            match (rows, vectors) {
                (8, 3) => body::<8, 12>(runs, out),
                (8, 2) => body::<8, 8>(runs, out),
                (8, 1) => body::<8, 4>(runs, out),
                (4, 3) => body::<4, 12>(runs, out),
                (4, 2) => body::<4, 8>(runs, out),
                (4, 1) => body::<4, 4>(runs, out),
                (2, 3) => body::<2, 12>(runs, out),
                (2, 2) => body::<2, 8>(runs, out),
                (2, 1) => body::<2, 4>(runs, out),
                (1, 3) => body::<1, 12>(runs, out),
                (1, 2) => body::<1, 8>(runs, out),
                (1, 1) => body::<1, 4>(runs, out),
                _ => unreachable!("no tile of {rows} by {vectors}"),
            }
        }
    }

    unsafe fn body<const M: usize, const W: usize>(runs: &[Run], out: Out) {
        let mut acc = [[0.0f32; W]; M];
        for run in runs {
            let (mut a, mut b) = (run.a, run.b);
            for _ in 0..run.len {
                // SAFETY: passed on to the caller.
                unsafe {
                    let row: [f32; W] = b.cast::<[f32; W]>().read();
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let x = *a.offset(i as isize * run.a_row);
                        for j in 0..W {
                            acc[j] = fma(x, row[j], acc[j]);
                        }
                    }
                }
                a = a.wrapping_offset(run.a_step);
                b = b.wrapping_offset(run.b_step);
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { store(acc.as_ptr().cast(), M, W, out) }
    }

    /// # Safety
    /// As [`super::TransposeFn`].
    pub(crate) unsafe fn transpose(
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        for i in 0..8 {
            for j in 0..8 {
                // SAFETY: passed on to the caller.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * from_stride + j) }
            }
        }
    }
}

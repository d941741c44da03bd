//! Tiles of a bf16 product in AMX's tile registers: 32 by 32 at a time, two operands' tiles against two.
//!
//! The instructions go through a small trait, so that the loops around them can be tested on machines
//! without them. They are not in stable Rust's intrinsics, hence the assembly.

use super::tile::{Out, Run, store};

/// Rows of a tile register, and pairs or floats a row.
const SIDE: usize = 16;
/// Floats of a tile register.
const AREA: usize = SIDE * SIDE;

/// Eight tile registers of 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 rows of `a`, 6 and 7 of `b`.
pub(super) trait Unit {
    /// # Safety
    /// The instructions exist and the registers are configured.
    unsafe fn zero<const T: u8>();
    /// # Safety
    /// As [`Self::zero`]; 16 rows of 64 bytes, `stride` bytes apart, may be read.
    unsafe fn load<const T: u8>(from: *const f32, stride: usize);
    /// `c[i][j] += Σ_k a[i][k] · b[k][j]` over 16 pairs.
    ///
    /// # Safety
    /// As [`Self::zero`].
    unsafe fn multiply<const C: u8, const A: u8, const B: u8>();
    /// # Safety
    /// As [`Self::zero`]; 16 rows of 64 bytes may be written.
    unsafe fn store<const T: u8>(to: *mut f32, stride: usize);
}

/// A tile of up to 32 rows by one or two vectors.
///
/// # Safety
/// As [`super::tile::TileFn`], and the unit is ready.
pub(super) unsafe fn tile<U: Unit>(rows: usize, vectors: usize, runs: &[Run], out: Out) {
    let mut sums = [0.0f32; 4 * AREA];
    let width = vectors * SIDE;
    let (tall, wide) = (rows > SIDE, vectors > 1);
    // SAFETY: whole blocks of the operands are inside the runs; others are copied first.
    unsafe {
        U::zero::<0>();
        U::zero::<1>();
        U::zero::<2>();
        U::zero::<3>();
        let (mut a_copy, mut b_copy) = ([0.0f32; 2 * AREA], [0.0f32; 2 * AREA]);
        for run in runs {
            debug_assert!(run.a_step == 1);
            for from in (0..run.len).step_by(SIDE) {
                let len = SIDE.min(run.len - from);
                let (mut a, mut a_row) = (run.a.add(from), run.a_row as usize);
                let (mut b, mut b_row) =
                    (run.b.add(from * run.b_step as usize), run.b_step as usize);
                if len < SIDE || !rows.is_multiple_of(SIDE) {
                    a_copy.fill(0.0);
                    for i in 0..rows {
                        let row = a_copy[i * SIDE..].as_mut_ptr();
                        std::ptr::copy_nonoverlapping(a.add(i * a_row), row, len);
                    }
                    (a, a_row) = (a_copy.as_ptr(), SIDE);
                }
                if len < SIDE {
                    b_copy.fill(0.0);
                    for k in 0..len {
                        let row = b_copy[k * width..].as_mut_ptr();
                        std::ptr::copy_nonoverlapping(b.add(k * b_row), row, width);
                    }
                    (b, b_row) = (b_copy.as_ptr(), width);
                }
                U::load::<4>(a, 4 * a_row);
                U::load::<6>(b, 4 * b_row);
                U::multiply::<0, 4, 6>();
                if wide {
                    U::load::<7>(b.add(SIDE), 4 * b_row);
                    U::multiply::<1, 4, 7>();
                }
                if tall {
                    U::load::<5>(a.add(SIDE * a_row), 4 * a_row);
                    U::multiply::<2, 5, 6>();
                    if wide {
                        U::multiply::<3, 5, 7>();
                    }
                }
            }
        }
        let at = sums.as_mut_ptr();
        U::store::<0>(at, 4 * width);
        if wide {
            U::store::<1>(at.add(SIDE), 4 * width);
        }
        if tall {
            U::store::<2>(at.add(SIDE * width), 4 * width);
            if wide {
                U::store::<3>(at.add(SIDE * width + SIDE), 4 * width);
            }
        }
        if out.transposed && rows.is_multiple_of(8) {
            for i in (0..rows).step_by(8) {
                let part = Out {
                    at: out.at.add(i),
                    ..out
                };
                super::x86::store_columns(at.add(i * width), width, part);
            }
        } else {
            store(at, rows, width, out);
        }
    }
}

/// The processor's own tiles.
pub(super) struct Amx;

/// What `ldtilecfg` reads: palette 1, all eight registers of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = Shape {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Amx {
    /// Configures this thread's registers.
    ///
    /// # Safety
    /// The processor has AMX and the system permits its use.
    pub(super) unsafe fn begin() {
        // SAFETY: passed on to the caller.
        unsafe {
            std::arch::asm!("ldtilecfg [{0}]", in(reg) &raw const SHAPE, options(nostack, readonly));
        }
    }

    /// Gives the registers back, so that they need not be saved when threads change.
    ///
    /// # Safety
    /// As [`Self::begin`].
    pub(super) unsafe fn end() {
        // SAFETY: passed on to the caller.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
    }
}

impl Unit for Amx {
    #[inline(always)]
    unsafe fn zero<const T: u8>() {
        // SAFETY: passed on to the caller.
        unsafe { std::arch::asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) }
    }

    #[inline(always)]
    unsafe fn load<const T: u8>(from: *const f32, stride: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            std::arch::asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) from, s = in(reg) stride,
                options(nostack, readonly));
        }
    }

    #[inline(always)]
    unsafe fn multiply<const C: u8, const A: u8, const B: u8>() {
        // SAFETY: passed on to the caller.
        unsafe {
            std::arch::asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, nomem));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: u8>(to: *mut f32, stride: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            std::arch::asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) to, s = in(reg) stride,
                options(nostack));
        }
    }
}

/// Whether the tiles compute: a small product with a known result. Asked once; a machine that promises
/// them and gets it wrong is treated as one without.
///
/// # Safety
/// As [`Amx::begin`].
pub(super) unsafe fn works() -> bool {
    /// The pair (1, 2) in bf16.
    const PAIR: u32 = 0x4000_3F80;
    let ones = [f32::from_bits(PAIR); AREA];
    let mut sums = [0.0f32; AREA];
    let run = Run {
        len: SIDE,
        a: ones.as_ptr(),
        a_row: SIDE as isize,
        a_step: 1,
        b: ones.as_ptr(),
        b_step: SIDE as isize,
        ahead: std::ptr::null(),
        ahead_row: 0,
    };
    let out = Out {
        at: sums.as_mut_ptr(),
        stride: SIDE as isize,
        transposed: false,
        add: false,
        cols: SIDE,
    };
    // SAFETY: passed on to the caller.
    unsafe {
        Amx::begin();
        tile::<Amx>(SIDE, 1, &[run], out);
        Amx::end();
    }
    // Sixteen pairs of 1·1 + 2·2.
    sums.iter().all(|sum| *sum == 80.0)
}

/// The registers as arrays, for tests.
#[cfg(test)]
pub(super) struct Emulated;

#[cfg(test)]
thread_local! {
    static REGISTERS: std::cell::RefCell<[[f32; AREA]; 8]> = const { std::cell::RefCell::new([[0.0; AREA]; 8]) };
}

#[cfg(test)]
impl Unit for Emulated {
    unsafe fn zero<const T: u8>() {
        REGISTERS.with_borrow_mut(|r| r[usize::from(T)] = [0.0; AREA]);
    }

    unsafe fn load<const T: u8>(from: *const f32, stride: usize) {
        REGISTERS.with_borrow_mut(|r| {
            for i in 0..SIDE {
                for j in 0..SIDE {
                    // SAFETY: passed on to the caller.
                    r[usize::from(T)][i * SIDE + j] = unsafe { *from.add(i * stride / 4 + j) };
                }
            }
        });
    }

    unsafe fn multiply<const C: u8, const A: u8, const B: u8>() {
        let halves = |x: f32| {
            let bits = x.to_bits();
            [
                f32::from_bits(bits << 16),
                f32::from_bits(bits & 0xFFFF_0000),
            ]
        };
        REGISTERS.with_borrow_mut(|r| {
            for i in 0..SIDE {
                for j in 0..SIDE {
                    let mut sum = r[usize::from(C)][i * SIDE + j];
                    for k in 0..SIDE {
                        let a = halves(r[usize::from(A)][i * SIDE + k]);
                        let b = halves(r[usize::from(B)][k * SIDE + j]);
                        sum += a[0] * b[0];
                        sum += a[1] * b[1];
                    }
                    r[usize::from(C)][i * SIDE + j] = sum;
                }
            }
        });
    }

    unsafe fn store<const T: u8>(to: *mut f32, stride: usize) {
        REGISTERS.with_borrow(|r| {
            for i in 0..SIDE {
                for j in 0..SIDE {
                    // SAFETY: passed on to the caller.
                    unsafe { *to.add(i * stride / 4 + j) = r[usize::from(T)][i * SIDE + j] };
                }
            }
        });
    }
}

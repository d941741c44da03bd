//! Strided matrix views over f32 memory and their product.

use std::marker::PhantomData;

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use gemm::Parallelism;

use super::storage::Fresh;

/// A matrix read in place: element `(i, j)` lies `i·rs + j·cs` floats after the start.
#[derive(Clone, Copy)]
pub(crate) struct MatRef<'a> {
    ptr: *const f32,
    rows: usize,
    cols: usize,
    rs: isize,
    cs: isize,
    life: PhantomData<&'a [f32]>,
}

// SAFETY: a shared view of `f32`s, like `&[f32]`.
unsafe impl Send for MatRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for MatRef<'_> {}

impl<'a> MatRef<'a> {
    /// Rows of `cols` floats, each `stride` after the one before, the first at `start`.
    pub(crate) fn strided(
        data: &'a [f32],
        start: usize,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Self {
        if rows * cols > 0 {
            assert!(
                start + (rows - 1) * stride + cols <= data.len(),
                "matrix view out of bounds"
            );
        }
        Self {
            ptr: data.as_ptr().wrapping_add(start),
            rows,
            cols,
            rs: stride as isize,
            cs: 1,
            life: PhantomData,
        }
    }

    /// Rows one after the other.
    pub(crate) fn rows_of(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, 0, rows, cols, cols)
    }

    /// A rank-2 tensor in whatever order it lies; copy it first when [`readable`] says no.
    pub(crate) fn of(t: &'a FlexTensor) -> Self {
        let layout = t.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        let (rows, cols, rs, cs) = (shape[0], shape[1], strides[0], strides[1]);
        let data = t.storage::<f32>();
        let start = layout.start_offset();
        if rows * cols > 0 {
            assert!(rs > 0 || rows == 1);
            assert!(cs > 0 || cols == 1);
            let last = start as isize + (rows as isize - 1) * rs + (cols as isize - 1) * cs;
            assert!(
                last >= 0 && (last as usize) < data.len(),
                "matrix view out of bounds"
            );
        }
        Self {
            ptr: data.as_ptr().wrapping_add(start),
            rows,
            cols,
            rs,
            cs,
            life: PhantomData,
        }
    }

    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    pub(crate) fn cols(self) -> usize {
        self.cols
    }

    /// `count` of the rows, from `from` on.
    pub(crate) fn rows_from(self, from: usize, count: usize) -> Self {
        assert!(from + count <= self.rows, "rows out of bounds");
        Self {
            ptr: self.ptr.wrapping_offset(from as isize * self.rs),
            rows: count,
            ..self
        }
    }

    pub(crate) fn get(self, i: usize, j: usize) -> f32 {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: the view was checked when made, and the element is inside it.
        unsafe { *self.ptr.offset(i as isize * self.rs + j as isize * self.cs) }
    }

    /// Whether the elements of a row lie one after the other.
    pub(crate) fn unit_columns(self) -> bool {
        self.cs == 1 || self.cols <= 1
    }

    pub(crate) fn row_stride(self) -> usize {
        self.rs as usize
    }

    pub(crate) fn column_stride(self) -> usize {
        self.cs as usize
    }

    /// The address of an element, or of the one past the last row or column.
    pub(crate) fn at(self, i: usize, j: usize) -> *const f32 {
        assert!(i <= self.rows && j <= self.cols);
        self.ptr
            .wrapping_offset(i as isize * self.rs + j as isize * self.cs)
    }

    /// The address an element would have, whether or not there is one: to be named, not read.
    pub(crate) fn at_or_end(self, i: usize, j: usize) -> *const f32 {
        self.ptr
            .wrapping_offset(i as isize * self.rs + j as isize * self.cs)
    }

    /// Row `i`, if its numbers lie in order.
    pub(crate) fn line(self, i: usize) -> Option<&'a [f32]> {
        self.unit_columns().then(|| self.row(i))
    }

    pub(crate) fn row(self, i: usize) -> &'a [f32] {
        assert!(i < self.rows && self.unit_columns());
        let start = self.ptr.wrapping_offset(i as isize * self.rs);
        // SAFETY: the view was checked when made, and the row lies in order.
        unsafe { std::slice::from_raw_parts(start, self.cols) }
    }

    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            rs: self.cs,
            cs: self.rs,
            ..self
        }
    }
}

/// The tensor itself when [`MatRef::of`] can read it in place, else an ordered copy.
pub(crate) fn readable(t: FlexTensor) -> FlexTensor {
    let layout = t.layout();
    let ok = layout
        .strides()
        .iter()
        .zip(layout.shape().iter())
        .all(|(s, n)| *s > 0 || *n <= 1);
    if ok { t } else { t.to_contiguous() }
}

/// A matrix written in place.
pub(crate) struct MatMut<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    rs: isize,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    pub(crate) fn rows_of(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= data.len(), "matrix view out of bounds");
        // SAFETY: in bounds, exclusive and initialised.
        unsafe { Self::raw(data.as_mut_ptr(), rows, cols, cols) }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    pub(crate) fn stride(&self) -> usize {
        self.rs as usize
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.ptr
    }

    /// A row to be added to: as it is for [`Into::Add`], else zero.
    pub(crate) fn row_mut(&mut self, i: usize, into: Into) -> &mut [f32] {
        assert!(i < self.rows);
        // SAFETY: a row of the view, which is exclusive; initialised where it is added to, and here else.
        unsafe {
            let at = self.ptr.offset(i as isize * self.rs);
            if into == Into::Set {
                std::ptr::write_bytes(at, 0, self.cols);
            }
            std::slice::from_raw_parts_mut(at, self.cols)
        }
    }

    /// Sets an element or adds to it.
    pub(crate) fn put(&mut self, i: usize, j: usize, into: Into, value: f32) {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: inside the view, which is exclusive; added to only where it is initialised.
        unsafe {
            let at = self.ptr.offset(i as isize * self.rs).add(j);
            *at = if into == Into::Add {
                *at + value
            } else {
                value
            };
        }
    }

    /// # Safety
    /// For `'a`, the rows are valid for writes and nothing else touches them; they are initialised
    /// before anything is accumulated into them.
    pub(crate) unsafe fn raw(ptr: *mut f32, rows: usize, cols: usize, stride: usize) -> Self {
        Self {
            ptr,
            rows,
            cols,
            rs: stride as isize,
            life: PhantomData,
        }
    }
}

/// What happens to the destination's old values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are replaced, unread.
    Set,
    /// The product is added to them.
    Add,
}

/// Threads of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread only: for tiles inside a parallel task.
    One,
    /// The rayon pool. Tiles of the result are shared out; the sum over the inner axis never is.
    All,
}

/// `dst = [dst +] scale · a · b`.
pub(crate) fn product(
    dst: &mut MatMut<'_>,
    into: Into,
    scale: f32,
    a: MatRef<'_>,
    b: MatRef<'_>,
    threads: Threads,
) {
    let (m, n, k) = (dst.rows, dst.cols, a.cols);
    assert!(
        a.rows == m && b.cols == n && b.rows == k,
        "product of mismatched shapes"
    );
    if m == 0 || n == 0 {
        return;
    }
    let threads = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the views were checked when made, shapes agree, and `dst` is exclusive.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.ptr,
            1,
            dst.rs,
            into == Into::Add,
            a.ptr,
            a.cs,
            a.rs,
            b.ptr,
            b.cs,
            b.rs,
            1.0f32,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Rows and columns.
pub(crate) fn dims(t: &FlexTensor) -> (usize, usize) {
    (t.layout().shape()[0], t.layout().shape()[1])
}

/// A fresh `[rows, cols]` matrix of which `fill` sets every element.
pub(crate) fn fresh(rows: usize, cols: usize, fill: impl FnOnce(&mut MatMut<'_>)) -> Fresh {
    let mut out = Fresh::new(rows * cols);
    // SAFETY: the buffer has that many elements, and nothing else knows it.
    fill(&mut unsafe { MatMut::raw(out.as_mut_ptr(), rows, cols, cols) });
    out
}

/// The same as a tensor.
pub(crate) fn filled(rows: usize, cols: usize, fill: impl FnOnce(&mut MatMut<'_>)) -> FlexTensor {
    let out = fresh(rows, cols, fill);
    // SAFETY: the caller's first product sets all of it.
    unsafe { out.into_tensor(Shape::from(vec![rows, cols])) }
}

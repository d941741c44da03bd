//! The loops around the tiles, in f32: which piece of which operand is where in the caches, and which task
//! computes what. Work is cut by shape alone, and each element is summed by one task in one order.

use rayon::prelude::*;

use super::super::matrix::{Into, MatMut, MatRef};
use super::super::storage::Shared;
use super::pack::Panels;
use super::room::with_room;
use super::tile::{Out, Run, Tiles, fetch};
use super::view::View;

/// Rows of the weight that a task of [`times_t`] holds in its core's cache.
const OUT_BLOCK: usize = 64;
/// Panels of packed rows that such a task goes through.
const PANEL_BLOCK: usize = 4;
/// Longest contraction in one go; what is longer is added up in several.
const LONGEST: usize = 2048 + 64;
/// Rows of g that a task of [`times`] goes through.
const ROW_BLOCK: usize = 512;
/// The same where w is no wider than a panel.
const NARROW_BLOCK: usize = 64;
/// Longest contraction that [`times`] and [`outer`] pack or read at once.
const STRETCH: usize = 1664;

/// Fewer tasks than that are cut in two.
const FEW_TASKS: usize = 6;
/// Rows of the weight between one that is copied and the one that is asked for.
const SOON: usize = 12;

/// A stretch of one term's contraction.
#[derive(Clone, Copy)]
struct Piece {
    term: usize,
    from: usize,
    len: usize,
}

/// Stretches of at most `longest` together, in order; a group is what is summed in registers.
fn groups(lengths: impl Iterator<Item = usize>, longest: usize) -> Vec<Vec<Piece>> {
    let mut groups: Vec<Vec<Piece>> = vec![Vec::new()];
    let mut taken = 0;
    for (term, len) in lengths.enumerate() {
        // Equal parts, so that no part is a short rest.
        let parts = len.div_ceil(longest).max(1);
        let part = len.div_ceil(parts).next_multiple_of(16).min(len.max(1));
        for from in (0..len).step_by(part) {
            let len = part.min(len - from);
            if taken + len > longest && taken > 0 {
                groups.push(Vec::new());
                taken = 0;
            }
            if let Some(group) = groups.last_mut() {
                group.push(Piece { term, from, len });
            }
            taken += len;
        }
    }
    groups
}

/// All tasks, on the pool unless there is one.
fn run(tiles: Tiles, tasks: usize, task: impl Fn(usize) + Sync + Send) {
    let task = |i| tiles.within(|| task(i));
    if tasks <= 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// `dst [rows, out] = [dst +] Σ x · wᵀ`. A tile is eight rows of w by the columns of a panel, so that w is
/// read as it lies.
pub(super) fn times_t(dst: &mut MatMut<'_>, into: Into, terms: &[(&Panels, View<'_>)]) {
    let Some((first, w)) = terms.first() else {
        return;
    };
    let (tiles, rows, out) = (first.tiles, first.rows, w.out());
    if rows == 0 || out == 0 {
        return;
    }
    let groups = groups(terms.iter().map(|(x, _)| x.width), LONGEST);
    let panel_blocks = first.count().div_ceil(PANEL_BLOCK);
    let (at, stride) = (Shared(dst.as_mut_ptr()), dst.stride());
    // The panels of a task stay in the cache for the next one, which has other rows of w.
    let out_blocks = out.div_ceil(OUT_BLOCK);
    run(tiles, out_blocks * panel_blocks, |task| {
        let (block, panels) = (task % out_blocks * OUT_BLOCK, task / out_blocks);
        let height = OUT_BLOCK.min(out - block);
        let panels = panels * PANEL_BLOCK..((panels + 1) * PANEL_BLOCK).min(first.count());
        for (g, group) in groups.iter().enumerate() {
            let room: usize = group.iter().map(|p| widened(terms[p.term].1, p.len)).sum();
            with_room(room * height, |room| {
                let mut weights = Vec::with_capacity(group.len());
                let mut room = room;
                for piece in group {
                    let w = terms[piece.term].1;
                    let (own, rest) = room.split_at_mut(widened(w, piece.len) * height);
                    weights.push(rows_of(w, block, height, piece, own));
                    room = rest;
                }
                let mut runs = Vec::with_capacity(group.len());
                for (nth, p) in panels.clone().enumerate() {
                    let place = first.panel(p);
                    tiles.heights(height, place.vectors, |from, height| {
                        runs.clear();
                        for (piece, (w, row)) in group.iter().zip(&weights) {
                            let panel = terms[piece.term].0.panel(p);
                            let columns = panel.vectors * tiles.lanes;
                            // The first panel meets rows of w that come from memory; later, an eighth of
                            // the next panel a tile, since there are eight to a block.
                            let (ahead, ahead_row) = if nth == 0 {
                                (w.wrapping_add((from + height) * row), *row)
                            } else {
                                let next = terms[piece.term].0.width * columns;
                                let eighth = (from / 8 * piece.len + piece.from * 8) * 6;
                                (panel.at.wrapping_add(next + eighth), piece.len * 6 / 8)
                            };
                            let ahead_row = ahead_row as isize;
                            runs.push(Run {
                                len: piece.len,
                                a: w.wrapping_add(from * row),
                                a_row: *row as isize,
                                a_step: 1,
                                b: panel.at.wrapping_add(piece.from * columns),
                                b_step: columns as isize,
                                ahead,
                                ahead_row,
                            });
                        }
                        let out = Out {
                            at: at.at(place.first * stride + block + from),
                            stride: stride as isize,
                            transposed: true,
                            add: into == Into::Add || g > 0,
                            cols: place.cols,
                        };
                        // SAFETY: the weight's rows and the panels are as long as the pieces, and this
                        // task alone writes these rows and columns of the destination.
                        unsafe { (tiles.tile)(height, place.vectors, &runs, out) };
                    });
                }
            });
        }
    });
}

/// Floats a row that [`rows_of`] needs room for.
fn widened(w: View<'_>, len: usize) -> usize {
    if w.direct().is_some() { 0 } else { len }
}

/// Rows `first ..` of a stretch of w, as they lie or in `room`; the pointer and the distance of rows.
fn rows_of(
    w: View<'_>,
    first: usize,
    height: usize,
    piece: &Piece,
    room: &mut [f32],
) -> (*const f32, usize) {
    if let Some(w) = w.direct() {
        return (w.at(first, piece.from), w.row_stride());
    }
    let rows = room.chunks_exact_mut(piece.len.max(1)).take(height);
    for (i, row) in rows.enumerate() {
        w.read(first + i, piece.from, row);
    }
    (room.as_ptr(), piece.len)
}

/// `dst [rows, width] = [dst +] Σ g · w`. A tile is eight rows of g by a panel of w's columns; the panel is
/// copied, since w's rows are far apart.
pub(super) fn times(
    tiles: Tiles,
    dst: &mut MatMut<'_>,
    into: Into,
    terms: &[(MatRef<'_>, View<'_>)],
) {
    let Some((g, w)) = terms.first() else { return };
    let (rows, width) = (g.rows(), w.width());
    if rows == 0 || width == 0 {
        return;
    }
    let panel = tiles.panel();
    let groups = groups(terms.iter().map(|(g, _)| g.cols()), STRETCH);
    // A narrow result is little work a row, and there is one column of tasks.
    let block = if width <= panel {
        NARROW_BLOCK
    } else {
        ROW_BLOCK
    };
    let row_blocks = rows.div_ceil(block);
    // Few tasks: narrow ones, so that there are some for every thread.
    let few = row_blocks * width.div_ceil(2 * panel) < FEW_TASKS;
    let columns = if few { panel } else { 2 * panel };
    let column_blocks = width.div_ceil(columns);
    let (at, stride) = (Shared(dst.as_mut_ptr()), dst.stride());
    run(tiles, row_blocks * column_blocks, |task| {
        let (column, row) = (task / row_blocks * columns, task % row_blocks * block);
        let wide = columns.min(width - column);
        let high = block.min(rows - row);
        let padded = wide.next_multiple_of(tiles.lanes);
        for (g, group) in groups.iter().enumerate() {
            let length: usize = group.iter().map(|p| p.len).sum();
            with_room(length * padded, |room| {
                // `[panel][contraction][column]`
                for from in (0..padded).step_by(panel) {
                    let part = panel.min(padded - from);
                    let real = part.min(wide - from);
                    let mut slots = room[from * length..].chunks_exact_mut(part);
                    for piece in group {
                        let w = terms[piece.term].1;
                        for (n, slot) in (0..piece.len).zip(&mut slots) {
                            if let Some(w) = w.direct() {
                                let soon = w.at_or_end(piece.from + n + SOON, column + from);
                                fetch(soon, real);
                            }
                            w.read(piece.from + n, column + from, &mut slot[..real]);
                            slot[real..].fill(0.0);
                        }
                    }
                }
                let mut runs = Vec::with_capacity(group.len());
                tiles.heights(high, padded / tiles.lanes, |up, height| {
                    for from in (0..padded).step_by(panel) {
                        let part = panel.min(padded - from);
                        let mut b = room[from * length..].as_ptr();
                        runs.clear();
                        for piece in group {
                            let x = terms[piece.term].0;
                            runs.push(Run {
                                len: piece.len,
                                a: x.at(row + up, piece.from),
                                a_row: x.row_stride() as isize,
                                a_step: x.column_stride() as isize,
                                b,
                                b_step: part as isize,
                                ahead: x.at_or_end(row + up + height, piece.from),
                                ahead_row: x.row_stride() as isize,
                            });
                            b = b.wrapping_add(piece.len * part);
                        }
                        let out = Out {
                            at: at.at((row + up) * stride + column + from),
                            stride: stride as isize,
                            transposed: false,
                            add: into == Into::Add || g > 0,
                            cols: part.min(wide - from),
                        };
                        // SAFETY: the runs lie inside g and the room, and this task alone writes these
                        // rows and columns of the destination.
                        unsafe { (tiles.tile)(height, part / tiles.lanes, &runs, out) };
                    }
                });
            });
        }
    });
}

/// `dst [p, q] = [dst +] scale · gᵀ · x`: the sum over rows goes in stretches, and the longer side of the
/// result lies along the vectors.
pub(super) fn outer(
    tiles: Tiles,
    dst: &mut MatMut<'_>,
    into: Into,
    scale: f32,
    g: MatRef<'_>,
    x: MatRef<'_>,
) {
    /// Rows between two visits of the sums in the cache.
    const ROWS: usize = 128;
    /// Rows of the result that a task computes.
    const HIGH: usize = 64;
    let flipped = g.cols() > x.cols();
    let (high, wide) = if flipped { (x, g) } else { (g, x) };
    if dst.is_empty() {
        return;
    }
    let rows = g.rows();
    let columns = 2 * tiles.panel();
    let (high_blocks, wide_blocks) = (high.cols().div_ceil(HIGH), wide.cols().div_ceil(columns));
    let (at, stride) = (Shared(dst.as_mut_ptr()), dst.stride());
    run(tiles, high_blocks * wide_blocks, |task| {
        let (block, column) = (task / wide_blocks * HIGH, task % wide_blocks * columns);
        let tall = HIGH.min(high.cols() - block);
        let across = columns.min(wide.cols() - column);
        let padded = across.next_multiple_of(tiles.lanes);
        let ready = wide.unit_columns() && padded == across;
        with_room(tall * padded + ROWS * padded, |room| {
            let (sums, copy) = room.split_at_mut(tall * padded);
            sums.fill(0.0);
            for from in (0..rows).step_by(ROWS) {
                let len = ROWS.min(rows - from);
                if !ready {
                    for (i, slot) in copy.chunks_exact_mut(padded).take(len).enumerate() {
                        for (j, slot) in slot[..across].iter_mut().enumerate() {
                            *slot = wide.get(from + i, column + j);
                        }
                        slot[across..].fill(0.0);
                    }
                }
                for left in (0..padded).step_by(tiles.panel()) {
                    let part = tiles.panel().min(padded - left);
                    let (b, b_step) = if ready {
                        (wide.at(from, column + left), wide.row_stride())
                    } else {
                        (copy[left..].as_ptr(), padded)
                    };
                    tiles.heights(tall, part / tiles.lanes, |up, height| {
                        let run = Run {
                            len,
                            a: high.at(from, block + up),
                            a_row: high.column_stride() as isize,
                            a_step: high.row_stride() as isize,
                            b,
                            b_step: b_step as isize,
                            ahead: std::ptr::null(),
                            ahead_row: 0,
                        };
                        let out = Out {
                            at: sums[up * padded + left..].as_mut_ptr(),
                            stride: padded as isize,
                            transposed: false,
                            add: true,
                            cols: part,
                        };
                        // SAFETY: the run lies inside the operands, the sums inside the room.
                        unsafe { (tiles.tile)(height, part / tiles.lanes, &[run], out) };
                    });
                }
            }
            for (i, sums) in sums.chunks_exact(padded).enumerate() {
                for (j, sum) in sums[..across].iter().enumerate() {
                    let (p, q) = if flipped {
                        (column + j, block + i)
                    } else {
                        (block + i, column + j)
                    };
                    // SAFETY: inside the destination, and this task's own.
                    unsafe {
                        let to = at.at(p * stride + q);
                        let old = if into == Into::Add { *to } else { 0.0 };
                        *to = old + scale * sum;
                    }
                }
            }
        });
    });
}

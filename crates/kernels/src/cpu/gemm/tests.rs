//! The products against sums in f64, on every instruction set of the machine.

use super::*;
use crate::check::{noise, same_on_any_pool};
use crate::cpu::simd::Level;

fn mat(data: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    MatRef::rows_of(data, rows, cols)
}

/// Each addition of a sum of `n` rounds by half a unit in the last place of the sum so far, which is about
/// as large as the result or as the square root of `n` thirds.
fn close(what: &str, got: &[f32], want: &[f64], n: usize) {
    let root = (n as f64).sqrt();
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let bound = 2.4e-7 * root * w.abs().max(root / 3.0).max(0.1);
        assert!((f64::from(*g) - w).abs() <= bound, "{what}[{i}]: {g} {w}");
    }
}

fn want_times_t(rows: usize, out: usize, terms: &[(&[f32], &[f32], usize)], old: f64) -> Vec<f64> {
    let mut want = vec![old; rows * out];
    for (x, w, width) in terms {
        for i in 0..rows {
            for j in 0..out {
                want[i * out + j] +=
                    crate::check::inner(&x[i * width..][..*width], &w[j * width..][..*width]);
            }
        }
    }
    want
}

const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 1),
    (5, 3, 7, 2),
    (16, 8, 33, 16),
    (47, 65, 48, 3),
    (48, 64, 8, 8),
    (49, 131, 17, 5),
    (200, 70, 64, 16),
    (3, 100, 2200, 4),
    (70, 9, 2300, 16),
];

#[test]
fn times_t_on_every_path() {
    for level in Level::available() {
        let tiles = Tiles::of(level);
        for (rows, out, width, rank) in SHAPES {
            let (x, w) = (noise(1, rows * width), noise(2, out * width));
            let (low, b) = (noise(3, rows * rank), noise(4, out * rank));
            let pack = |x: &[f32], width: usize| {
                Panels::new(rows, width, tiles, |i, row| {
                    row.copy_from_slice(&x[i * width..][..width]);
                })
            };
            let (px, pl) = (pack(&x, width), pack(&low, rank));
            for (into, old) in [(Into::Set, f32::NAN), (Into::Add, 1.5)] {
                let mut got = vec![old; rows * out];
                let terms = [
                    (&px, View::Plain(Weight::F32(mat(&w, out, width)))),
                    (&pl, View::Plain(Weight::F32(mat(&b, out, rank)))),
                ];
                drive::times_t(&mut MatMut::rows_of(&mut got, rows, out), into, &terms);
                let start = if into == Into::Add { 1.5 } else { 0.0 };
                let want = want_times_t(rows, out, &[(&x, &w, width), (&low, &b, rank)], start);
                close(
                    &format!("{level:?} {rows}x{out}x{width}"),
                    &got,
                    &want,
                    width + rank,
                );
            }
        }
    }
}

#[test]
fn times_on_every_path() {
    for level in Level::available() {
        let tiles = Tiles::of(level);
        for (rows, width, n, rank) in SHAPES {
            let (g, w) = (noise(1, rows * n), noise(2, n * width));
            let (low, a) = (noise(3, rows * rank), noise(4, rank * width));
            for (into, old) in [(Into::Set, f32::NAN), (Into::Add, 1.5)] {
                let mut got = vec![old; rows * width];
                let terms = [
                    (
                        mat(&g, rows, n),
                        View::Plain(Weight::F32(mat(&w, n, width))),
                    ),
                    (
                        mat(&low, rows, rank),
                        View::Plain(Weight::F32(mat(&a, rank, width))),
                    ),
                ];
                drive::times(
                    tiles,
                    &mut MatMut::rows_of(&mut got, rows, width),
                    into,
                    &terms,
                );
                let start = if into == Into::Add { 1.5 } else { 0.0 };
                let mut want = vec![start; rows * width];
                for i in 0..rows {
                    for j in 0..width {
                        let sum: f64 = (0..n)
                            .map(|k| f64::from(g[i * n + k]) * f64::from(w[k * width + j]))
                            .sum();
                        let low: f64 = (0..rank)
                            .map(|k| f64::from(low[i * rank + k]) * f64::from(a[k * width + j]))
                            .sum();
                        want[i * width + j] += sum + low;
                    }
                }
                close(
                    &format!("{level:?} {rows}x{width}x{n}"),
                    &got,
                    &want,
                    n + rank,
                );
            }
        }
    }
}

#[test]
fn outer_on_every_path() {
    for level in Level::available() {
        let tiles = Tiles::of(level);
        for (p, q, rows, _) in SHAPES {
            let (g, x) = (noise(1, rows * p), noise(2, rows * q));
            for (g_turned, x_turned) in [(false, false), (true, false), (false, true)] {
                let turn = |v: &[f32], rows: usize, cols: usize| -> Vec<f32> {
                    (0..cols * rows)
                        .map(|i| v[i % rows * cols + i / rows])
                        .collect()
                };
                let (tg, tx) = (turn(&g, rows, p), turn(&x, rows, q));
                let gm = if g_turned {
                    mat(&tg, p, rows).t()
                } else {
                    mat(&g, rows, p)
                };
                let xm = if x_turned {
                    mat(&tx, q, rows).t()
                } else {
                    mat(&x, rows, q)
                };
                let mut got = vec![0.5f32; p * q];
                let mut dst = MatMut::rows_of(&mut got, p, q);
                drive::outer(tiles, &mut dst, Into::Add, 0.5, gm, xm);
                let mut want = vec![0.5f64; p * q];
                for i in 0..p {
                    for j in 0..q {
                        let sum: f64 = (0..rows)
                            .map(|k| f64::from(g[k * p + i]) * f64::from(x[k * q + j]))
                            .sum();
                        want[i * q + j] += 0.5 * sum;
                    }
                }
                close(&format!("{level:?} {p}x{q}x{rows}"), &got, &want, rows);
            }
        }
    }
}

#[test]
fn bf16_weights_are_read_exactly() {
    for (rows, out, width, rank) in SHAPES {
        let (x, g) = (noise(1, rows * width), noise(5, rows * out));
        let w: Vec<bf16> = noise(2, out * width)
            .into_iter()
            .map(bf16::from_f32)
            .collect();
        let wide: Vec<f32> = w.iter().map(|v| v.to_f32()).collect();
        let (low, b) = (noise(3, rows * rank), noise(4, out * rank));
        let narrow = Weight::Bf16 {
            data: &w,
            out,
            width,
        };
        let mut got = vec![f32::NAN; rows * out];
        let packed = Packed::of(mat(&x, rows, width), 1.0, Compute::F32);
        let packed_low = Packed::of(mat(&low, rows, rank), 0.5, Compute::F32);
        let terms = [
            (&packed, narrow),
            (&packed_low, Weight::F32(mat(&b, out, rank))),
        ];
        times_t(&mut MatMut::rows_of(&mut got, rows, out), Into::Set, &terms);
        let half: Vec<f32> = low.iter().map(|v| 0.5 * v).collect();
        let want = want_times_t(rows, out, &[(&x, &wide, width), (&half, &b, rank)], 0.0);
        close("forward", &got, &want, width + rank);

        let mut got = vec![f32::NAN; rows * width];
        let mut same = vec![f32::NAN; rows * width];
        let g = mat(&g, rows, out);
        times(
            &mut MatMut::rows_of(&mut got, rows, width),
            Into::Set,
            &[(g, narrow)],
            Compute::F32,
        );
        let wide = Weight::F32(mat(&wide, out, width));
        times(
            &mut MatMut::rows_of(&mut same, rows, width),
            Into::Set,
            &[(g, wide)],
            Compute::F32,
        );
        assert_eq!(got, same);
    }
}

#[test]
fn thread_count_changes_nothing() {
    let (rows, out, width) = (130, 200, 300);
    let (x, w, g) = (
        noise(1, rows * width),
        noise(2, out * width),
        noise(3, rows * out),
    );
    same_on_any_pool(|| {
        let mut y = vec![0.0; rows * out];
        let packed = Packed::of(mat(&x, rows, width), 1.0, Compute::F32);
        let terms = [(&packed, Weight::F32(mat(&w, out, width)))];
        times_t(&mut MatMut::rows_of(&mut y, rows, out), Into::Set, &terms);
        let mut dx = vec![0.0; rows * width];
        let terms = [(mat(&g, rows, out), Weight::F32(mat(&w, out, width)))];
        times(
            &mut MatMut::rows_of(&mut dx, rows, width),
            Into::Set,
            &terms,
            Compute::F32,
        );
        let mut dw = vec![0.0; out * width];
        let mut dst = MatMut::rows_of(&mut dw, out, width);
        outer(
            &mut dst,
            Into::Set,
            1.0,
            mat(&g, rows, out),
            mat(&x, rows, width),
        );
        vec![y, dx, dw]
    });
}

/// Tiles of pairs: AMX's by its emulation, and those of the machine.
#[cfg(target_arch = "x86_64")]
fn pair_tiles() -> Vec<(&'static str, Tiles)> {
    let mut all = Vec::new();
    if CpuPath::available().contains(&CpuPath::Avx2) {
        all.push((
            "emulated",
            Tiles {
                lanes: 16,
                vectors: 2,
                rows: 32,
                narrow: 32,
                tile: amx::tile::<amx::Emulated>,
                transpose: x86::transpose,
                pairs: true,
                amx: false,
            },
        ));
    }
    let own = CpuPath::available().iter();
    all.extend(own.filter_map(|path| Some((path.name(), Tiles::of_bf16(*path)?))));
    all
}

#[cfg(target_arch = "x86_64")]
fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| view::through_bf16(*x)).collect()
}

/// Products of bf16 numbers are exact in f32, so the sums err as those of floats do.
#[cfg(target_arch = "x86_64")]
#[test]
fn products_of_bf16_are_those_of_the_rounded_numbers() {
    for (name, tiles) in pair_tiles() {
        for (rows, out, width, rank) in SHAPES {
            let what = format!("{name} {rows}x{out}x{width}");
            let (x, g) = (noise(1, rows * width), noise(5, rows * out));
            let w = rounded(&noise(2, out * width));
            let narrow: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let narrow = Weight::Bf16 {
                data: &narrow,
                out,
                width,
            };
            let (low, b) = (noise(3, rows * rank), noise(4, out * rank));
            let pack = |x: &[f32], width: usize| {
                Panels::of_pairs(rows, width, tiles, |i, row| {
                    row.copy_from_slice(&x[i * width..][..width]);
                })
            };
            let (px, pl) = (pack(&x, width), pack(&low, rank));
            let mut got = vec![f32::NAN; rows * out];
            let terms = [
                (&px, View::RowPairs(narrow)),
                (&pl, View::RowPairs(Weight::F32(mat(&b, out, rank)))),
            ];
            let mut dst = MatMut::rows_of(&mut got, rows, out);
            drive::times_t(&mut dst, Into::Set, &terms);
            let (x, low, b) = (rounded(&x), rounded(&low), rounded(&b));
            let want = want_times_t(rows, out, &[(&x, &w, width), (&low, &b, rank)], 0.0);
            close(&what, &got, &want, width + rank);

            let pairs = in_pairs(mat(&g, rows, out));
            let g = rounded(&g);
            let mut got = vec![1.5; rows * width];
            let mut dst = MatMut::rows_of(&mut got, rows, width);
            let pairs = mat(&pairs, rows, out.div_ceil(2));
            drive::times(
                tiles,
                &mut dst,
                Into::Add,
                &[(pairs, View::ColumnPairs(narrow))],
            );
            let mut want = vec![1.5; rows * width];
            for i in 0..rows {
                for j in 0..width {
                    let terms =
                        (0..out).map(|k| f64::from(g[i * out + k]) * f64::from(w[k * width + j]));
                    want[i * width + j] += terms.sum::<f64>();
                }
            }
            close(&what, &got, &want, out);
        }
    }
}

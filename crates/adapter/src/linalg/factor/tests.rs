use super::*;
use crate::linalg::tests::{distance, noise};

const SHAPES: [(usize, usize); 8] = [
    (1, 1),
    (1, 7),
    (7, 1),
    (5, 5),
    (40, 17),
    (17, 40),
    (200, 150),
    (150, 200),
];

fn identity(n: usize) -> Matrix {
    Matrix::from_fn(n, n, |i, j| f32::from(u8::from(i == j)))
}

fn orthonormal(svd: &Svd) -> f32 {
    let k = svd.s.len();
    let left = svd.u.transposed_matmul(&svd.u).unwrap();
    let right = svd.vt.matmul_transposed(&svd.vt).unwrap();
    distance(&left, &identity(k)).max(distance(&right, &identity(k)))
}

#[test]
fn all_terms_restore_the_matrix_and_are_orthonormal_and_sorted() {
    for (rows, cols) in SHAPES {
        let a = noise(3, rows, cols);
        let svd = svd_truncated(&a, rows.min(cols)).unwrap();
        assert!(
            distance(&svd.restore().unwrap(), &a) < 1e-5,
            "{rows} x {cols}"
        );
        assert!(orthonormal(&svd) < 1e-5, "{rows} x {cols}");
        assert!(svd.s.windows(2).all(|pair| pair[0] >= pair[1]));
        let squares = svd.s.iter().map(|s| s * s).sum::<f64>().sqrt();
        assert!((squares / a.frobenius() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn the_first_terms_leave_what_the_other_singular_values_say() {
    let a = noise(4, 60, 90);
    let svd = ThinSvd::new(&a).unwrap();
    let kept = svd.truncated(10).unwrap().restore().unwrap();
    let rest = Matrix::from_fn(60, 90, |i, j| a.row(i)[j] - kept.row(i)[j]);
    let expected = svd.singular_values()[10..]
        .iter()
        .map(|s| s * s)
        .sum::<f64>()
        .sqrt();
    assert!((rest.frobenius() / expected - 1.0).abs() < 1e-5);
}

#[test]
fn the_last_terms_hold_the_smallest_singular_values() {
    let svd = ThinSvd::new(&noise(5, 30, 20)).unwrap();
    let last = svd.terms(17..20).unwrap();
    assert_eq!(last.s, svd.singular_values()[17..]);
    let all = svd.truncated(20).unwrap();
    assert_eq!(last.vt.row(0), all.vt.row(17));
    assert_eq!((last.u.rows(), last.u.cols()), (30, 3));
}

#[test]
fn a_known_two_by_two_matrix_decomposes_as_by_hand() {
    // [[3, 0], [4, 5]]: aᵀa has the eigenvalues 45 and 5.
    let a = Matrix::new(2, 2, vec![3.0, 0.0, 4.0, 5.0]).unwrap();
    let svd = svd_truncated(&a, 2).unwrap();
    assert!((svd.s[0] - 45_f64.sqrt()).abs() < 1e-12);
    assert!((svd.s[1] - 5_f64.sqrt()).abs() < 1e-12);
    let (tenth, half) = (0.1_f32.sqrt(), 0.5_f32.sqrt());
    let u = Matrix::new(2, 2, vec![tenth, 3.0 * tenth, 3.0 * tenth, -tenth]).unwrap();
    assert!(distance(&svd.u, &u) < 1e-6);
    let vt = Matrix::new(2, 2, vec![half, half, half, -half]).unwrap();
    assert!(distance(&svd.vt, &vt) < 1e-6);
}

#[test]
fn the_largest_entry_of_every_left_vector_is_positive() {
    for (rows, cols) in SHAPES {
        let svd = svd_truncated(&noise(6, rows, cols), rows.min(cols)).unwrap();
        for column in svd.u.transpose().data().chunks(rows) {
            let largest = column
                .iter()
                .fold(0.0_f32, |m, v| if v.abs() > m.abs() { *v } else { m });
            assert!(largest > 0.0);
        }
    }
}

#[test]
fn a_matrix_of_low_rank_has_as_many_singular_values_above_zero() {
    let a = noise(7, 50, 3).matmul(&noise(8, 3, 70)).unwrap();
    let svd = svd_truncated(&a, 5).unwrap();
    assert!(svd.s[2] > 1.0 && svd.s[3] < 1e-4, "{:?}", svd.s);
    assert!(distance(&svd.restore().unwrap(), &a) < 1e-5);
    assert!(orthonormal(&svd) < 1e-5);
    let zero = svd_truncated(&Matrix::zeros(4, 6), 4).unwrap();
    assert_eq!(zero.s, [0.0; 4]);
    assert!(orthonormal(&zero) < 1e-6);
}

#[test]
fn a_product_decomposes_as_the_dense_matrix_does() {
    for (rows, r, cols) in [(40, 4, 30), (30, 4, 40), (5, 9, 7), (8, 8, 8), (9, 0, 3)] {
        let (b, a) = (noise(9, rows, r), noise(10, r, cols));
        let product = ThinSvd::of_product(&b, &a).unwrap();
        let dense = ThinSvd::new(&b.matmul(&a).unwrap()).unwrap();
        let k = r.min(rows).min(cols);
        for (x, y) in product
            .singular_values()
            .iter()
            .zip(dense.singular_values())
        {
            assert!((x - y).abs() < 1e-5);
        }
        let (product, dense) = (product.truncated(k).unwrap(), dense.truncated(k).unwrap());
        assert!(distance(&product.u, &dense.u) < 1e-4, "{rows} {r} {cols}");
        assert!(distance(&product.vt, &dense.vt) < 1e-4, "{rows} {r} {cols}");
    }
}

#[test]
fn qr_restores_the_matrix_with_an_orthonormal_and_a_triangular_factor() {
    for (rows, cols) in SHAPES {
        let a = noise(11, rows, cols);
        let (q, r) = qr(&a).unwrap();
        let k = rows.min(cols);
        assert_eq!((q.rows(), q.cols(), r.rows(), r.cols()), (rows, k, k, cols));
        assert!(distance(&q.matmul(&r).unwrap(), &a) < 1e-5);
        assert!(distance(&q.transposed_matmul(&q).unwrap(), &identity(k)) < 1e-5);
        assert!((0..k).all(|i| r.row(i)[..i].iter().all(|&v| v == 0.0)));
    }
}

#[test]
fn qr_has_the_signs_of_lapack() {
    // The first reflection maps (3, 4) to -5; the second column has nothing below it to reflect,
    // so its entry keeps its sign.
    let a = Matrix::new(2, 2, vec![3.0, 1.0, 4.0, 2.0]).unwrap();
    let (_, r) = qr(&a).unwrap();
    let expected = Matrix::new(2, 2, vec![-5.0, -2.2, 0.0, 0.4]).unwrap();
    assert!(distance(&r, &expected) < 1e-6, "{r:?}");
    assert_eq!(qr(&identity(3)).unwrap().1, identity(3));
}

#[test]
fn the_randomized_decomposition_is_exact_for_a_matrix_of_that_rank() {
    for (rows, cols) in [(50, 30), (30, 50), (6, 6)] {
        let a = noise(12, rows, 4).matmul(&noise(13, 4, cols)).unwrap();
        let (exact, fast) = (
            svd_truncated(&a, 4).unwrap(),
            svd_randomized(&a, 4, 1, 0).unwrap(),
        );
        assert!(distance(&fast.u, &exact.u) < 1e-4);
        assert!(distance(&fast.vt, &exact.vt) < 1e-4);
        assert!(
            fast.s
                .iter()
                .zip(&exact.s)
                .all(|(x, y)| (x - y).abs() < 1e-4)
        );
    }
}

#[test]
fn more_iterations_bring_the_randomized_decomposition_closer() {
    let a = noise(14, 80, 60);
    let best = ThinSvd::new(&a).unwrap();
    let errors = [0, 2, 16].map(|n_iter| {
        let fast = svd_randomized(&a, 5, n_iter, 1).unwrap();
        assert!(orthonormal(&fast) < 1e-5);
        best.singular_values()[0] - fast.s[0]
    });
    assert!(
        errors[0] > errors[1] && errors[1] > errors[2] && errors[2] > -1e-9,
        "{errors:?}"
    );
    assert!(errors[2] < 0.05);
}

#[test]
fn a_decomposition_is_the_same_every_time_and_follows_its_seed() {
    let a = noise(15, 100, 64);
    assert_eq!(svd_truncated(&a, 8).unwrap(), svd_truncated(&a, 8).unwrap());
    assert_eq!(
        svd_randomized(&a, 8, 2, 5).unwrap(),
        svd_randomized(&a, 8, 2, 5).unwrap()
    );
    assert_ne!(
        svd_randomized(&a, 8, 2, 5).unwrap(),
        svd_randomized(&a, 8, 2, 6).unwrap()
    );
}

#[test]
fn the_start_is_normally_distributed() {
    let start = gaussian(101, 99, 7).unwrap();
    let count = (101 * 99) as f64;
    let mean = start.data().iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let deviation = start.frobenius() / count.sqrt();
    assert!(
        mean.abs() < 0.03 && (deviation - 1.0).abs() < 0.03,
        "{mean} {deviation}"
    );
}

#[test]
fn values_that_are_not_finite_and_ranks_that_are_too_large_are_errors() {
    let mut a = noise(16, 3, 4);
    a.data_mut()[6] = f32::NAN;
    let message = svd_truncated(&a, 1).unwrap_err().to_string();
    assert!(message.contains("NaN at row 1, column 2"), "{message}");
    assert!(qr(&a).is_err() && svd_randomized(&a, 1, 1, 0).is_err());
    assert!(ThinSvd::of_product(&noise(1, 9, 3), &a).is_err());
    let a = noise(16, 3, 4);
    assert!(
        svd_truncated(&a, 4)
            .unwrap_err()
            .to_string()
            .contains("at most 3")
    );
    assert!(
        svd_randomized(&a, 4, 1, 0)
            .unwrap_err()
            .to_string()
            .contains("at most 3")
    );
    assert!(svd_randomized_from(&a, &noise(1, 2, 1), 1).is_err());
}

#[test]
fn empty_matrices_have_empty_decompositions() {
    for (rows, cols) in [(0, 0), (0, 3), (3, 0)] {
        let svd = svd_truncated(&Matrix::zeros(rows, cols), 0).unwrap();
        assert_eq!((svd.u.rows(), svd.s.len(), svd.vt.cols()), (rows, 0, cols));
        let (q, r) = qr(&Matrix::zeros(rows, cols)).unwrap();
        assert_eq!((q.cols(), r.rows()), (0, 0));
    }
}

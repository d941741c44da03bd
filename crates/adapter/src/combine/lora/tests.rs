use super::*;
use crate::combine::{CombineOptions, MajoritySign, SeededMasks};
use crate::linalg::tests::{distance, noise};

const NO_MASKS: fn(Draw<'_>, f64, usize) -> Vec<bool> = |_, _, _| panic!("no mask is needed");

fn factors(seed: u64, r: usize, scale: f64) -> LoraFactors {
    LoraFactors {
        a: noise(seed, r, 12),
        b: noise(seed + 100, 9, r),
        scale,
    }
}

fn plan(options: &CombineOptions, adapters: &[&LoraFactors]) -> CombinePlan {
    let ranks: Vec<_> = adapters.iter().map(|f| ("adapter", f.a.rows())).collect();
    options.plan(&ranks).unwrap()
}

fn combine(
    options: &CombineOptions,
    adapters: &[&LoraFactors],
    masks: &mut dyn Masks,
) -> LoraFactors {
    let plan = plan(options, adapters);
    let inputs: Vec<_> = adapters.iter().map(|f| Some(*f)).collect();
    let result = combine_module(&plan, "q_proj", &inputs, masks).unwrap();
    assert_eq!(
        (result.a.rows(), result.b.cols(), result.scale),
        (plan.rank(), plan.rank(), 1.0)
    );
    result
}

fn options(kind: CombinationType, weights: &[f64]) -> CombineOptions {
    let density = kind.prunes().then_some(1.0);
    CombineOptions {
        density,
        ..CombineOptions::new(kind, weights.to_vec())
    }
}

fn sum_of_deltas(adapters: &[&LoraFactors], weights: &[f64]) -> Matrix {
    let deltas: Vec<_> = adapters
        .iter()
        .map(|f| f.delta().unwrap().into_data())
        .collect();
    let weights: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
    Matrix::new(9, 12, weighted_sum(&deltas, &weights)).unwrap()
}

#[test]
fn cat_and_svd_of_full_rank_hold_the_weighted_sum_of_the_deltas() {
    let (x, y) = (factors(1, 3, 2.0), factors(2, 2, 0.5));
    for weights in [[0.7, 0.3], [1.0, -0.4], [0.0, 1.0]] {
        let expected = sum_of_deltas(&[&x, &y], &weights);
        let cat = combine(
            &options(CombinationType::Cat, &weights),
            &[&x, &y],
            &mut NO_MASKS.clone(),
        );
        assert!(distance(&cat.delta().unwrap(), &expected) < 1e-5);
        let svd_options = CombineOptions {
            svd_rank: Some(5),
            ..options(CombinationType::Svd, &weights)
        };
        let svd = combine(&svd_options, &[&x, &y], &mut NO_MASKS.clone());
        assert!(distance(&svd.delta().unwrap(), &expected) < 1e-5);
    }
}

#[test]
fn a_truncated_svd_is_the_best_approximation_of_its_rank() {
    let (x, y) = (factors(1, 3, 2.0), factors(2, 3, 0.5));
    let weights = [0.7, 0.3];
    let sum = sum_of_deltas(&[&x, &y], &weights);
    let expected = ThinSvd::new(&sum)
        .unwrap()
        .truncated(3)
        .unwrap()
        .restore()
        .unwrap();
    for kind in CombinationType::ALL
        .into_iter()
        .filter(|kind| kind.truncates())
    {
        let with_ties = matches!(
            kind,
            CombinationType::TiesSvd | CombinationType::DareTiesSvd
        );
        let result = combine(&options(kind, &weights), &[&x, &y], &mut NO_MASKS.clone());
        // At density 1 nothing is pruned; only elected signs make a difference.
        let same = distance(&result.delta().unwrap(), &expected) < 1e-5;
        assert_eq!(same, !with_ties, "{}", kind.name());
    }
}

#[test]
fn one_adapter_combined_linearly_keeps_its_delta_times_the_weight() {
    let x = factors(3, 4, 2.0);
    for weight in [0.5, -0.5, 0.0] {
        let result = combine(
            &options(CombinationType::Cat, &[weight]),
            &[&x],
            &mut NO_MASKS.clone(),
        );
        assert!(distance(&result.delta().unwrap(), &sum_of_deltas(&[&x], &[weight])) < 1e-5);
    }
}

#[test]
fn linear_gives_both_factors_the_root_and_a_negative_sign_to_a_alone() {
    let one = |a: f32, b: f32, scale| LoraFactors {
        a: Matrix::new(1, 1, vec![a]).unwrap(),
        b: Matrix::new(1, 1, vec![b]).unwrap(),
        scale,
    };
    let (x, y) = (one(1.0, 2.0, 4.0), one(10.0, 20.0, 9.0));
    let result = combine(
        &options(CombinationType::Linear, &[1.0, -1.0]),
        &[&x, &y],
        &mut NO_MASKS.clone(),
    );
    assert_eq!(result.a.data(), [2.0 - 30.0]);
    assert_eq!(result.b.data(), [4.0 + 60.0]);
}

#[test]
fn ties_prunes_elects_and_averages_each_factor_as_by_hand() {
    let adapter = |a: [f32; 4], b: [f32; 2]| LoraFactors {
        a: Matrix::new(1, 4, a.to_vec()).unwrap(),
        b: Matrix::new(2, 1, b.to_vec()).unwrap(),
        scale: 1.0,
    };
    let x = adapter([4.0, -3.0, 1.0, 0.5], [1.0, -2.0]);
    let y = adapter([2.0, 5.0, 0.1, 0.2], [-3.0, 1.0]);
    let options = CombineOptions {
        density: Some(0.5),
        ..options(CombinationType::Ties, &[4.0, 1.0])
    };
    let result = combine(&options, &[&x, &y], &mut NO_MASKS.clone());
    // A: (4, -3, 0, 0) and (2, 5, 0, 0), elected (+, +); roots of the weights are 2 and 1.
    assert_eq!(result.a.data(), [(8.0 + 2.0) / 2.0, 5.0, 0.0, 0.0]);
    // B: (0, -2) and (-3, 0), elected (-, -).
    assert_eq!(result.b.data(), [-3.0, -4.0]);
}

#[test]
fn magnitude_prune_is_linear_on_what_is_kept() {
    let (x, y) = (factors(4, 2, 1.0), factors(5, 2, 1.0));
    let pruned = |f: &LoraFactors| {
        let mut f = f.clone();
        by_magnitude(f.a.data_mut(), 0.3);
        by_magnitude(f.b.data_mut(), 0.3);
        f
    };
    let weights = [0.7, -0.3];
    let prune = CombineOptions {
        density: Some(0.3),
        ..options(CombinationType::MagnitudePrune, &weights)
    };
    let result = combine(&prune, &[&x, &y], &mut NO_MASKS.clone());
    let linear = options(CombinationType::Linear, &weights);
    let expected = combine(&linear, &[&pruned(&x), &pruned(&y)], &mut NO_MASKS.clone());
    assert_eq!(result, expected);
}

#[test]
fn dare_asks_for_the_masks_of_all_a_then_all_b_and_applies_them() {
    let (x, y) = (factors(6, 2, 1.0), factors(7, 2, 1.0));
    let dare = CombineOptions {
        density: Some(0.5),
        ..options(CombinationType::DareLinear, &[1.0, 1.0])
    };
    let mut asked = Vec::new();
    let mut every_other = |draw: Draw<'_>, density: f64, count: usize| {
        asked.push((
            draw.module.to_owned(),
            draw.tensor,
            draw.adapter,
            density,
            count,
        ));
        (0..count).map(|i| i % 2 == 0).collect()
    };
    let result = combine(&dare, &[&x, &y], &mut every_other);
    let m = || "q_proj".to_owned();
    let expected = [
        (m(), "lora_A", 0, 0.5, 24),
        (m(), "lora_A", 1, 0.5, 24),
        (m(), "lora_B", 0, 0.5, 18),
        (m(), "lora_B", 1, 0.5, 18),
    ];
    assert_eq!(asked, expected);
    for (i, value) in result.a.data().iter().enumerate() {
        let sum = x.a.data()[i] / 0.5 + y.a.data()[i] / 0.5;
        assert_eq!(*value, if i % 2 == 0 { sum } else { 0.0 });
    }
}

#[test]
fn dare_on_deltas_asks_for_one_mask_an_adapter_that_is_there() {
    let (x, y) = (factors(6, 2, 1.0), factors(7, 2, 1.0));
    let dare = CombineOptions {
        density: Some(0.5),
        ..options(CombinationType::DareTiesSvd, &[1.0, 1.0, 1.0])
    };
    let plan = dare.plan(&[("x", 2), ("z", 2), ("y", 2)]).unwrap();
    let mut asked = Vec::new();
    let mut all = |draw: Draw<'_>, _: f64, count: usize| {
        asked.push((draw.tensor, draw.adapter, count));
        vec![true; count]
    };
    combine_module(&plan, "q_proj", &[Some(&x), None, Some(&y)], &mut all).unwrap();
    assert_eq!(asked, [("delta_weight", 0, 108), ("delta_weight", 2, 108)]);
}

#[test]
fn all_types_give_finite_factors_that_depend_only_on_the_seed() {
    let (x, y, z) = (factors(8, 3, 2.0), factors(9, 3, 1.0), factors(10, 3, 0.5));
    for kind in CombinationType::ALL {
        let density = kind.prunes().then_some(0.5);
        for majority_sign in [MajoritySign::Total, MajoritySign::Frequency] {
            let options = CombineOptions {
                density,
                majority_sign,
                ..CombineOptions::new(kind, vec![0.5, -0.2, 0.7])
            };
            let run = |seed| combine(&options, &[&x, &y, &z], &mut SeededMasks(seed));
            let result = run(1);
            assert!(result.a.check_finite().is_ok() && result.b.check_finite().is_ok());
            assert_eq!(result, run(1));
            assert_eq!(
                result != run(2),
                kind.name().contains("dare"),
                "{}",
                kind.name()
            );
        }
    }
}

#[test]
fn a_missing_adapter_leaves_zeros_where_its_factors_would_be() {
    let (x, y) = (factors(1, 2, 1.0), factors(2, 3, 1.0));
    let plan = plan(&options(CombinationType::Cat, &[0.5, 2.0]), &[&x, &y]);
    let result = combine_module(&plan, "k", &[None, Some(&y)], &mut NO_MASKS.clone()).unwrap();
    assert_eq!(result.a.rows(), 5);
    assert!(
        result
            .a
            .row(3)
            .iter()
            .chain(result.a.row(4))
            .all(|&v| v == 0.0)
    );
    assert!(distance(&result.delta().unwrap(), &sum_of_deltas(&[&y], &[2.0])) < 1e-5);
}

#[test]
fn a_rank_above_what_a_layer_can_have_is_filled_with_zeros() {
    let (x, y) = (factors(1, 2, 1.0), factors(2, 2, 1.0));
    let options = CombineOptions {
        svd_rank: Some(11),
        ..options(CombinationType::MagnitudePruneSvd, &[1.0, 1.0])
    };
    let result = combine(&options, &[&x, &y], &mut NO_MASKS.clone());
    assert!(
        distance(
            &result.delta().unwrap(),
            &sum_of_deltas(&[&x, &y], &[1.0, 1.0])
        ) < 1e-5
    );
}

#[test]
fn clamping_cuts_both_factors_at_the_quantile() {
    let (x, y) = (factors(1, 2, 1.0), factors(2, 2, 1.0));
    let free = options(CombinationType::Svd, &[1.0, 1.0]);
    let clamped = CombineOptions {
        svd_clamp: Some(0.9),
        ..free.clone()
    };
    let (free, clamped) = (
        combine(&free, &[&x, &y], &mut NO_MASKS.clone()),
        combine(&clamped, &[&x, &y], &mut NO_MASKS.clone()),
    );
    let values = free.b.data().iter().chain(free.a.data()).copied().collect();
    let high = quantile_of(values, 0.9);
    for (free, clamped) in [(&free.a, &clamped.a), (&free.b, &clamped.b)] {
        for (free, clamped) in free.data().iter().zip(clamped.data()) {
            assert_eq!(*clamped, free.clamp(-high, high));
        }
    }
    assert_eq!(quantile_of(vec![3.0, 1.0, 2.0, 4.0], 0.5), 2.5);
    assert_eq!(quantile_of(vec![3.0, 1.0], 1.0), 3.0);
}

#[test]
fn everything_that_does_not_fit_is_named_with_the_module() {
    let (x, mut y) = (factors(1, 2, 1.0), factors(2, 2, f64::NAN));
    y.a = noise(1, 3, 13);
    let plan = plan(&options(CombinationType::Linear, &[1.0, 1.0]), &[&x, &x]);
    let message = combine_module(
        &plan,
        "layers.0.q_proj",
        &[Some(&x), Some(&y), None],
        &mut NO_MASKS.clone(),
    )
    .unwrap_err()
    .to_string();
    for part in [
        "layers.0.q_proj: 3 adapters are given, but the combination was planned for 2",
        "adapter 2 has a lora_A of rank 3 and a lora_B of rank 2",
        "adapter 2 is for a [9, 13] weight, others for [9, 12]",
        "adapter 2 has rank 3 here, others 2",
        "scale NaN",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let none = combine_module(&plan, "k", &[None, None], &mut NO_MASKS.clone()).unwrap_err();
    assert!(none.to_string().contains("none of the adapters"));
    let mut short = |_: Draw<'_>, _: f64, _: usize| vec![true];
    let dare = CombineOptions {
        density: Some(0.5),
        ..options(CombinationType::DareTies, &[1.0, 1.0])
    };
    let dare = dare.plan(&[("x", 2), ("y", 2)]).unwrap();
    let error = combine_module(&dare, "k", &[Some(&x), Some(&x)], &mut short).unwrap_err();
    assert!(error.to_string().contains("1 entries, not 24"), "{error}");
}

#[test]
fn factors_that_are_not_finite_are_an_error_for_every_type() {
    let (mut x, y) = (factors(1, 2, 1.0), factors(2, 2, 1.0));
    x.a.data_mut()[13] = f32::NAN;
    for kind in CombinationType::ALL {
        let plan = plan(&options(kind, &[1.0, 1.0]), &[&x, &y]);
        let error =
            combine_module(&plan, "k", &[Some(&y), Some(&x)], &mut NO_MASKS.clone()).unwrap_err();
        let expected = "k: lora_A of adapter 2: a [2, 12] matrix holds NaN at row 1, column 1";
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

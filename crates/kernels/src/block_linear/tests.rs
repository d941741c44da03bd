//! The fused operations against the separate ones on NdArray.

use burn::backend::flex::FlexTensor;
use burn::backend::{DispatchKindConversion, DispatchTensor, Flex, TensorMetadata};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::operands::{Operands, Source};
use super::*;
use crate::check::*;

/// Sums of up to 300 products in another order, behind a norm's rounded factors.
const TOLERANCE: f32 = 5e-6;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Project,
    ProjectNormed,
    ProjectAdd,
    Swiglu,
    SwigluAdd,
}

use Op::*;

const OPS: [Op; 5] = [Project, ProjectNormed, ProjectAdd, Swiglu, SwigluAdd];

/// One call: sizes, and for each projection its output's width, its rank (0 without an adapter) and whether
/// there is a bias.
#[derive(Clone, Debug)]
struct Case {
    op: Op,
    rows: usize,
    width: usize,
    parts: Vec<(usize, usize, bool)>,
    /// Bit 0: x, bit 1: the residual, then a and b of each projection.
    tracked: usize,
    /// Whether some adapters have dropout.
    drops: bool,
}

struct Tensors {
    x: Tensor<2>,
    norm: Option<Norm>,
    residual: Option<Tensor<2>>,
    projections: Vec<Projection>,
}

impl Case {
    fn new(op: Op, rows: usize, width: usize, parts: &[(usize, usize, bool)]) -> Self {
        let parts = match op {
            Project | ProjectNormed => parts.to_vec(),
            _ => parts[..1].to_vec(),
        };
        Self {
            op,
            rows,
            width,
            parts,
            tracked: usize::MAX,
            drops: false,
        }
    }

    fn dropping(self) -> Self {
        Self {
            drops: true,
            ..self
        }
    }

    /// Out of any graph.
    fn plain(&self) -> Tensors {
        let frozen = Self {
            tracked: 0,
            ..self.clone()
        };
        frozen.tensors(&Device::flex())
    }

    fn tensors(&self, device: &Device) -> Tensors {
        let bit = |i: usize| self.tracked >> i & 1 == 1;
        let (rows, width) = (self.rows, self.width);
        let gated = matches!(self.op, Swiglu | SwigluAdd);
        let columns = if gated { 2 * width } else { width };
        let part = |(i, &(out, r, bias)): (usize, &(usize, usize, bool))| {
            let seed = 10 * (i as u64 + 1);
            Projection {
                weight: leaf(seed, [out, width], false, device).into(),
                bias: bias.then(|| leaf(seed + 1, [out], false, device)),
                lora: (r > 0).then(|| LowRank {
                    a: leaf(seed + 2, [r, width], bit(2 + 2 * i), device),
                    b: leaf(seed + 3, [out, r], bit(3 + 2 * i), device),
                    scale: 0.75 + i as f64,
                    // Not the second one's: a call may have both.
                    dropout: (self.drops && i != 1).then_some(Dropout {
                        probability: 0.3,
                        seed,
                    }),
                }),
            }
        };
        let out = self.parts.iter().map(|part| part.0).sum();
        Tensors {
            x: leaf(1, [rows, columns], bit(0), device),
            norm: (self.op == ProjectNormed).then(|| Norm {
                weight: leaf(2, [width], false, device),
                eps: 1e-5,
            }),
            residual: matches!(self.op, ProjectAdd | SwigluAdd)
                .then(|| leaf(3, [rows, out], bit(1), device)),
            projections: self.parts.iter().enumerate().map(part).collect(),
        }
    }

    fn run(&self, device: &Device, fused: bool) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let t = self.tensors(device);
        let y = t.apply(self.op, fused);
        let mut leaves = vec![Some(t.x), t.residual];
        for projection in t.projections {
            let lora = projection.lora.map(|lora| [lora.a, lora.b]);
            let [a, b] = lora.map_or([None, None], |factors| factors.map(Some));
            leaves.extend([a, b]);
        }
        let tracked = leaves.iter().flatten().any(|leaf| leaf.is_tracked());
        let mut grads = vec![None; leaves.len()];
        if tracked {
            let g = backward(&y, 4);
            grads = leaves
                .iter()
                .map(|leaf| leaf.as_ref().and_then(|leaf| grad(leaf, &g)))
                .collect();
        }
        (floats(y), grads)
    }

    fn check(&self) {
        let (got, got_grads) = self.run(&flex(), true);
        let (want, want_grads) = self.run(&ndarray(), false);
        let what = format!("{self:?}");
        close(&what, &got, &want, TOLERANCE);
        close_grads(&what, &got_grads, &want_grads, TOLERANCE);
    }
}

impl Tensors {
    fn apply(&self, op: Op, fused: bool) -> Tensor<2> {
        let (x, residual) = (self.x.clone(), self.residual.clone());
        let (norm, mut all) = (self.norm.clone(), self.projections.clone());
        if !fused {
            let y = match op {
                Project | ProjectNormed | ProjectAdd => reference::project(x, norm, all),
                Swiglu | SwigluAdd => reference::swiglu_project(x, all),
            };
            return match residual {
                Some(residual) => y + residual,
                None => y,
            };
        }
        let compute = Compute::F32;
        match (op, residual) {
            (Project | ProjectNormed, _) => project(x, norm, all, compute),
            (ProjectAdd, Some(residual)) => project_add(x, all.remove(0), residual, compute),
            (_, residual) => swiglu_project(x, all.remove(0), residual, compute),
        }
    }
}

/// Odd sizes, one row (dot products), several tasks of rows; ranks 1, 3 and 16, and none; with and without
/// a bias.
#[test]
fn every_operation_matches_reference_at_odd_sizes() {
    let parts = [(33, 3, true), (5, 0, false), (17, 16, false)];
    for op in OPS {
        for (rows, width) in [(1, 1), (1, 70), (3, 37), (70, 301)] {
            Case::new(op, rows, width, &parts).check();
            Case::new(op, rows, width, &[(9, 1, false)]).check();
            Case::new(op, rows, width, &[(9, 0, true), (40, 2, true)]).check();
        }
    }
}

/// Masks are of the normalised or gated input, each projection's its own; with the second one's adapter whole,
/// and for every way to track what one adapter has.
#[test]
fn dropout_matches_reference() {
    let parts = [(33, 3, true), (5, 4, false), (17, 16, false)];
    for op in OPS {
        for (rows, width) in [(1, 7), (3, 37), (70, 301)] {
            Case::new(op, rows, width, &parts).dropping().check();
            Case::new(
                op,
                rows,
                width,
                &[(9, 0, true), (40, 2, true), (3, 2, false)],
            )
            .dropping()
            .check();
        }
        for tracked in 0..16 {
            let case = Case::new(op, 6, 20, &[(9, 3, true)]).dropping();
            Case { tracked, ..case }.check();
        }
    }
}

/// Of 2⁸ ways to track x, the residual and three adapters' factors: all of them with one adapter, every
/// seventh with three.
#[test]
fn every_mask_matches_reference() {
    for op in OPS {
        for tracked in 0..16 {
            let mut case = Case::new(op, 6, 20, &[(11, 4, true)]);
            case.tracked = tracked;
            case.check();
            case.parts[0].1 = 0;
            case.check();
        }
    }
    for tracked in (0..256).step_by(7) {
        for op in [Project, ProjectNormed] {
            let mut case = Case::new(op, 6, 20, &[(11, 4, true), (3, 2, false), (8, 5, false)]);
            case.tracked = tracked;
            case.check();
        }
    }
}

/// Transposed, narrowed and broadcast inputs; the incoming gradient is a transposed view as well.
#[test]
fn reads_views() {
    let run = |device: &Device, fused: bool| {
        let x = leaf(1, [44, 9], true, device);
        let projection = Projection {
            weight: leaf(2, [30, 22], false, device)
                .narrow(0, 7, 11)
                .narrow(1, 0, 22)
                .into(),
            bias: Some(leaf(3, [30], false, device).narrow(0, 2, 11)),
            lora: Some(LowRank {
                a: leaf(4, [22, 5], true, device).transpose(),
                b: leaf(5, [1, 5], true, device).expand([11, 5]),
                scale: 2.0,
                dropout: None,
            }),
        };
        let transposed = Projection {
            weight: leaf(6, [22, 11], false, device).transpose().into(),
            ..projection.clone()
        };
        let norm = Norm {
            weight: leaf(7, [40], false, device).narrow(0, 3, 22),
            eps: 1e-6,
        };
        let residual = leaf(8, [11, 9], true, device);
        let rows = x.clone().transpose().narrow(1, 22, 22);
        let t = Tensors {
            x: x.clone().transpose(),
            norm: None,
            residual: Some(residual.clone().transpose()),
            projections: vec![projection.clone()],
        };
        let normed = Tensors {
            x: rows,
            norm: Some(norm),
            residual: None,
            projections: vec![projection, transposed],
        };
        let y = Tensor::cat(
            vec![
                t.apply(SwigluAdd, fused),
                normed.apply(ProjectNormed, fused),
            ],
            1,
        );
        let g = backward(&y.clone().transpose(), 9);
        (floats(y), vec![grad(&x, &g), grad(&residual, &g)])
    };
    let (got, want) = (run(&flex(), true), run(&ndarray(), false));
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

/// A bf16 weight is the f32 weight of the same values.
#[test]
fn a_bf16_weight_matches_reference() {
    for op in OPS {
        let run = |device: &Device, fused: bool| {
            let case = Case::new(op, 7, 40, &[(12, 3, false), (5, 0, true)]);
            let mut t = case.tensors(device);
            for projection in &mut t.projections {
                let [out, width] = projection.weight.dims();
                let rounded = floats(projection.weight.dense())
                    .into_iter()
                    .map(|v| half::bf16::from_f32(v).to_f32());
                let data = TensorData::new(rounded.collect::<Vec<f32>>(), [out, width]);
                let plain = device.clone().without_autodiff();
                let mut rounded = Tensor::<2>::from_data(data, &plain);
                if fused {
                    rounded = rounded.cast(DType::BF16);
                    assert_eq!(rounded.dtype(), DType::BF16);
                }
                projection.weight = rounded.into();
            }
            assert_eq!(t.projections.iter().all(Projection::fuses), fused);
            let y = t.apply(op, fused);
            let g = backward(&y, 4);
            (floats(y), vec![grad(&t.x, &g)])
        };
        let (got, want) = (run(&flex(), true), run(&ndarray(), false));
        close("bf16", &got.0, &want.0, TOLERANCE);
        close_grads("bf16", &got.1, &want.1, TOLERANCE);
    }
}

/// The separate operations take what the fused ones do not, with every gradient.
#[test]
fn what_does_not_fuse_still_matches_reference() {
    let run = |device: &Device, fused: bool| {
        let mut t = Case::new(
            ProjectNormed,
            5,
            12,
            &[(4, 2, true), (3, 0, false), (2, 0, false), (6, 1, false)],
        )
        .tensors(device);
        t.norm = t.norm.map(|norm| Norm {
            weight: norm.weight.require_grad(),
            ..norm
        });
        let weight = t.projections[1].weight.dense().require_grad();
        t.projections[1].weight = weight.clone().into();
        assert!(t.projections[1].trains_base());
        let y = t.apply(ProjectNormed, fused);
        let g = backward(&y, 4);
        let norm = t.norm.as_ref().map(|norm| norm.weight.clone()).unwrap();
        (floats(y), vec![grad(&weight, &g), grad(&norm, &g)])
    };
    let (got, want) = (run(&flex(), true), run(&ndarray(), false));
    close("fallback", &got.0, &want.0, TOLERANCE);
    close_grads("fallback", &got.1, &want.1, TOLERANCE);
    assert!(want.1.iter().all(Option::is_some));
}

/// The backward works in place on what it kept: other uses of the same tensors must not see that, nor a
/// second use of the result.
#[test]
fn other_uses_of_the_operands_are_untouched() {
    let run = |device: &Device, fused: bool| {
        let t = Case::new(SwigluAdd, 5, 8, &[(16, 2, false)]).tensors(device);
        let before = floats(t.x.clone());
        let y = t.apply(SwigluAdd, fused);
        // x and the residual once more, and the result twice.
        let sum = y.clone() * y.clone() + t.x.clone() * 3.0 + t.residual.clone().unwrap();
        let g = backward(&(sum + y), 4);
        assert_eq!(floats(t.x.clone()), before);
        vec![grad(&t.x, &g), grad(&t.residual.unwrap(), &g)]
    };
    close_grads("sum", &run(&flex(), true), &run(&ndarray(), false), 1e-5);
}

/// A residual that is still in use is not overwritten.
#[test]
fn a_shared_residual_is_copied() {
    let t = Case::new(ProjectAdd, 5, 8, &[(16, 2, false)]).plain();
    let residual = t.residual.clone().unwrap();
    let before = floats(residual.clone());
    let first = floats(t.apply(ProjectAdd, true));
    assert_eq!(floats(residual), before);
    assert_eq!(floats(t.apply(ProjectAdd, true)), first);
}

#[test]
fn not_a_number_and_infinity_pass() {
    let device = flex();
    let weight = || Projection {
        weight: tensor(vec![1.0; 4], [2, 2], false, &device).into(),
        bias: None,
        lora: None,
    };
    let rows = |values: [f32; 4]| tensor(values.to_vec(), [2, 2], false, &device);
    let spoilt = [f32::NAN, 1.0, 1.0, f32::INFINITY];
    let y = floats(project(rows(spoilt), None, vec![weight()], Compute::F32));
    assert!(y[..2].iter().all(|v| v.is_nan()) && y[2..] == [f32::INFINITY; 2]);
    let norm = Norm {
        weight: tensor(vec![1.0; 2], [2], false, &device),
        eps: 1e-5,
    };
    let y = project(rows(spoilt), Some(norm), vec![weight()], Compute::F32);
    // An infinite row has no length to divide by.
    assert!(floats(y).iter().all(|v| v.is_nan()));
    let y = project_add(rows([1.0; 4]), weight(), rows(spoilt), Compute::F32);
    let y = floats(y);
    assert!(y[0].is_nan() && y[1] == 3.0 && y[3] == f32::INFINITY);
    let gate_up = tensor(
        vec![f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, f32::INFINITY, 1.0],
        [2, 4],
        false,
        &device,
    );
    let y = floats(swiglu_project(gate_up, weight(), None, Compute::F32));
    assert!(y[0].is_nan() && y[2] == f32::INFINITY);
}

#[test]
fn threads_do_not_matter() {
    let parts = [(192, 16, true), (64, 4, false), (64, 16, false)];
    for op in OPS {
        for rows in [1, 130] {
            let case = Case::new(op, rows, 160, &parts);
            for case in [case.clone(), case.dropping()] {
                same_on_any_pool(move || {
                    let (y, g) = case.run(&flex(), true);
                    std::iter::once(y).chain(g.into_iter().flatten()).collect()
                });
            }
        }
    }
}

/// The gradients are the slopes of the forward pass. The bound is the rounding of two sums of some hundred
/// numbers of order one, over the step.
#[test]
fn gradients_are_slopes() {
    for op in OPS {
        let case = Case::new(op, 4, 10, &[(6, 2, true), (5, 3, false)]);
        let (_, grads) = case.run(&flex(), true);
        let t = case.plain();
        let [rows, columns] = t.x.dims();
        let weights = noise(
            4,
            rows * case.parts.iter().map(|part| part.0).sum::<usize>(),
        );
        let at = |t: Tensors| inner(&floats(t.apply(op, true)), &weights);
        let direction = noise(77, rows * columns);
        let x = floats(t.x);
        let measured = slope(&x, &direction, 1e-2, |x| {
            let mut t = case.plain();
            t.x = tensor(x, [rows, columns], false, &Device::flex());
            at(t)
        });
        let claimed = inner(grads[0].as_ref().unwrap(), &direction);
        assert!(
            (measured - claimed).abs() < 2e-3 * claimed.abs().max(1.0),
            "{op:?}: x: {measured} {claimed}"
        );
        for (i, projection) in t.projections.iter().enumerate() {
            let lora = projection.lora.as_ref().unwrap();
            for (j, factor) in [&lora.a, &lora.b].into_iter().enumerate() {
                let (shape, values) = (factor.dims(), floats(factor.clone()));
                let direction = noise(78, values.len());
                let measured = slope(&values, &direction, 1e-2, |values| {
                    let mut t = case.plain();
                    let lora = t.projections[i].lora.as_mut().unwrap();
                    let place = if j == 0 { &mut lora.a } else { &mut lora.b };
                    *place = tensor(values, shape, false, &Device::flex());
                    at(t)
                });
                let claimed = inner(grads[2 + 2 * i + j].as_ref().unwrap(), &direction);
                assert!(
                    (measured - claimed).abs() < 2e-3 * claimed.abs().max(1.0),
                    "{op:?}: factor {j} of {i}: {measured} {claimed}"
                );
            }
        }
    }
}

fn inside(t: DispatchTensor) -> FlexTensor {
    <DispatchTensor as DispatchKindConversion<Flex>>::try_into_backend(t)
        .unwrap()
        .float()
}

/// What the node keeps, by what is tracked: never the normalised or gated input, and nothing for gradients
/// that nobody asks for.
#[test]
fn keeps_only_what_a_gradient_uses() {
    let kept = |op: Op, tracked: usize| {
        let case = Case::new(op, 3, 8, &[(6, 2, false), (5, 3, false)]);
        let bit = |i: usize| tracked >> i & 1 == 1;
        let t = case.plain();
        let source = match op {
            Swiglu | SwigluAdd => Source::Gated,
            _ => Source::new(t.norm),
        };
        let mut tracked = vec![bit(0)];
        tracked.extend(matches!(source, Source::Normed { .. }).then_some(false));
        tracked.extend(t.residual.as_ref().map(|_| bit(1)));
        for i in 0..t.projections.len() {
            tracked.extend([false, bit(2 + 2 * i), bit(3 + 2 * i)]);
        }
        let mut tracked = tracked.into_iter();
        let operands = Operands::new(t.x, source, t.residual, t.projections)
            .map(|t| (inside(t), tracked.next().unwrap()));
        let (_, saved) = autodiff::forward_saving::<Flex>(operands, Compute::F32);
        let own = [&saved.inverse, &saved.low].into_iter().flatten();
        let numbers = own.map(|t| t.shape().num_elements()).sum::<usize>();
        (saved, numbers)
    };
    // (x, inverse, low; then weight, a and b of the first projection)
    let x = 1;
    let a = 4;
    let b = 8;
    for (op, tracked, want) in [
        (
            ProjectNormed,
            x | a | b,
            [true, true, true, true, true, true],
        ),
        (ProjectNormed, a | b, [true, true, true, false, false, true]),
        (ProjectNormed, b, [false, false, true, false, false, false]),
        (ProjectNormed, x, [true, true, false, true, true, true]),
        (ProjectAdd, x, [false, false, false, true, true, true]),
        (ProjectAdd, x | a | b, [true, false, true, true, true, true]),
        (ProjectAdd, 2, [false; 6]),
        (SwigluAdd, x | a | b, [true, false, true, true, true, true]),
        (SwigluAdd, b, [false, false, true, false, false, false]),
    ] {
        let (saved, numbers) = kept(op, tracked);
        let part = &saved.parts[0];
        let got = [
            saved.x.is_some(),
            saved.inverse.is_some(),
            saved.low.is_some(),
            part.weight.is_some(),
            part.a.is_some(),
            part.b.is_some(),
        ];
        assert_eq!(got, want, "{op:?} {tracked}");
        // Beside handles of its operands: one number a row for the norm, a rank a row for the adapters.
        let ranks: usize = saved.parts.iter().map(|part| part.rank).sum();
        let own = usize::from(want[1]) * 3 + usize::from(want[2]) * 3 * ranks;
        assert_eq!(numbers, own, "{op:?} {tracked}");
    }
}

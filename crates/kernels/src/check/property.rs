//! What every operation must do, on random shapes, options and layouts: the reference's results and
//! gradients, its non-finite numbers where it has them, and gradients that are slopes.

use burn::tensor::{Device, Tensor};

use super::{close, flex, floats, grad, inner, ndarray, noise, tensor};

/// Cases of the comparison with the reference, and of the one with non-finite numbers.
const CASES: u64 = 16;
/// Cases whose slopes are measured.
const SLOPES: u64 = 6;

/// Draws sizes and options, from a seed.
pub(crate) struct Pick {
    seed: u64,
    drawn: u64,
    /// Sizes are at most this.
    limit: usize,
}

impl Pick {
    fn new(seed: u64, limit: usize) -> Self {
        Self {
            seed,
            drawn: 0,
            limit,
        }
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        let share = noise(self.seed.wrapping_mul(1013) + self.drawn, 2)[1];
        (((share + 1.0) / 2.0 * n as f32) as usize).min(n - 1)
    }

    /// From 1 to `most`, and 1 more often than by chance.
    pub(crate) fn size(&mut self, most: usize) -> usize {
        if self.below(6) == 0 {
            1
        } else {
            1 + self.below(most.min(self.limit))
        }
    }
}

/// One drawn call.
pub(crate) struct Case {
    /// Of the inputs; those of rank 1 are `[1, n]` here.
    shapes: Vec<[usize; 2]>,
    /// Inputs that get no gradient.
    constant: Vec<usize>,
    /// Input whose noise is this much larger.
    scaled: Option<(usize, f32)>,
    /// Whatever else the operation wants to know.
    pub(crate) options: Vec<usize>,
}

impl Case {
    pub(crate) fn new(shapes: Vec<[usize; 2]>) -> Self {
        Self {
            shapes,
            constant: Vec::new(),
            scaled: None,
            options: Vec::new(),
        }
    }

    pub(crate) fn constant(mut self, inputs: &[usize]) -> Self {
        self.constant = inputs.to_vec();
        self
    }

    pub(crate) fn scaled(mut self, input: usize, factor: f32) -> Self {
        self.scaled = Some((input, factor));
        self
    }

    pub(crate) fn options(mut self, options: Vec<usize>) -> Self {
        self.options = options;
        self
    }

    fn values(&self, seed: u64, input: usize) -> Vec<f32> {
        let factor = match self.scaled {
            Some((scaled, factor)) if scaled == input => factor,
            _ => 1.0,
        };
        let [rows, cols] = self.shapes[input];
        let mut values = noise(seed * 31 + input as u64, rows * cols);
        values.iter_mut().for_each(|x| *x *= factor);
        values
    }
}

type Run = fn(&Case, Vec<Tensor<2>>) -> Vec<Tensor<2>>;

/// An operation under test; inputs and outputs are of rank 2.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    /// See [`close`].
    pub(crate) tolerance: f32,
    pub(crate) case: fn(&mut Pick) -> Case,
    pub(crate) ours: Run,
    pub(crate) reference: Run,
    /// Inputs whose gradient is the slope, where not all of them are.
    pub(crate) slopes: Option<&'static [usize]>,
    /// Whether non-finite inputs are compared; where not, say why.
    pub(crate) non_finite: bool,
}

/// How an input lies in memory.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Rows,
    Transposed,
    /// Inside a larger tensor.
    Narrowed,
}

impl Lie {
    /// The leaf, and the view of it that has `values` in `shape`.
    fn input(
        self,
        values: &[f32],
        [rows, cols]: [usize; 2],
        tracked: bool,
        device: &Device,
    ) -> (Tensor<2>, Tensor<2>) {
        match self {
            Self::Rows => {
                let leaf = tensor(values.to_vec(), [rows, cols], tracked, device);
                (leaf.clone(), leaf)
            }
            Self::Transposed => {
                let moved = (0..rows * cols).map(|i| values[i % rows * cols + i / rows]);
                let leaf = tensor(moved.collect(), [cols, rows], tracked, device);
                (leaf.clone(), leaf.transpose())
            }
            Self::Narrowed => {
                let (wide, from) = (cols + 5, 3);
                let mut all = noise(77, (rows + 2) * wide);
                for (i, row) in values.chunks_exact(cols).enumerate() {
                    all[(i + 1) * wide + from..][..cols].copy_from_slice(row);
                }
                let leaf = tensor(all, [rows + 2, wide], tracked, device);
                let view = leaf.clone().narrow(0, 1, rows).narrow(1, from, cols);
                (leaf, view)
            }
        }
    }
}

/// Values, layout, and whether a gradient is wanted.
type Input = (Vec<f32>, Lie, bool);

struct Outcome {
    outputs: Vec<Vec<f32>>,
    grads: Vec<Option<Vec<f32>>>,
}

/// Runs one side. Where `turned`, the gradients arrive as transposed views.
fn run(op: Run, case: &Case, inputs: &[Input], turned: bool, device: &Device) -> Outcome {
    let made = inputs
        .iter()
        .zip(&case.shapes)
        .map(|((values, lie, tracked), shape)| lie.input(values, *shape, *tracked, device));
    let (leaves, views): (Vec<_>, Vec<_>) = made.unzip();
    let outputs = op(case, views);
    let mut grads = vec![None; leaves.len()];
    if inputs.iter().any(|(_, _, tracked)| *tracked) {
        let weighted = outputs.iter().enumerate().map(|(i, y)| {
            let y = if turned {
                y.clone().transpose()
            } else {
                y.clone()
            };
            let weights = noise(500 + i as u64, y.shape().num_elements());
            (y.clone() * tensor(weights, y.dims(), false, device)).sum()
        });
        let loss = weighted.reduce(|a, b| a + b).unwrap();
        let g = loss.backward();
        grads = leaves.iter().map(|leaf| grad(leaf, &g)).collect();
    }
    Outcome {
        outputs: outputs.into_iter().map(floats).collect(),
        grads,
    }
}

/// All that is asked of an operation.
pub(crate) fn everything(check: &Check) {
    compare(check);
    if check.non_finite {
        compare_non_finite(check);
    }
    compare_slopes(check);
}

fn drawn(check: &Check, seed: u64, limit: usize) -> (Case, Vec<Input>, bool, Pick) {
    let mut pick = Pick::new(seed, limit);
    let case = (check.case)(&mut pick);
    let inputs = (0..case.shapes.len())
        .map(|i| {
            let lie = [Lie::Rows, Lie::Rows, Lie::Transposed, Lie::Narrowed][pick.below(4)];
            let tracked = pick.below(3) > 0 && !case.constant.contains(&i);
            (case.values(seed, i), lie, tracked)
        })
        .collect();
    let turned = pick.below(3) == 0;
    (case, inputs, turned, pick)
}

/// Outputs and gradients are the reference's, for every layout and every set of tracked inputs.
fn compare(check: &Check) {
    for seed in 1..=CASES {
        let (case, inputs, turned, _) = drawn(check, seed, usize::MAX);
        let got = run(check.ours, &case, &inputs, turned, &flex());
        let want = run(check.reference, &case, &inputs, turned, &ndarray());
        let what = |part: &str, i: usize| {
            let lies: Vec<_> = inputs.iter().map(|(_, lie, t)| (lie, t)).collect();
            let (name, shapes, options) = (check.name, &case.shapes, &case.options);
            format!("{name}, case {seed}, {part} {i} of {shapes:?} {options:?} {lies:?}")
        };
        for (i, (g, w)) in got.outputs.iter().zip(&want.outputs).enumerate() {
            close(&what("output", i), g, w, check.tolerance);
        }
        for (i, (g, w)) in got.grads.iter().zip(&want.grads).enumerate() {
            match (g, w) {
                (Some(g), Some(w)) => close(&what("gradient", i), g, w, check.tolerance),
                (None, None) => {}
                _ => panic!("{} exists in one only", what("gradient", i)),
            }
        }
    }
}

/// With a few NaN and infinities in one input, outputs and gradients are finite where the reference's are.
fn compare_non_finite(check: &Check) {
    for seed in 101..=100 + CASES {
        let (case, mut inputs, turned, mut pick) = drawn(check, seed, 48);
        let bad = pick.below(inputs.len());
        for _ in 0..=pick.below(3) {
            let at = pick.below(inputs[bad].0.len());
            inputs[bad].0[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][pick.below(3)];
        }
        let got = run(check.ours, &case, &inputs, turned, &flex());
        let want = run(check.reference, &case, &inputs, turned, &ndarray());
        let alike = |part: &str, i: usize, got: &[f32], want: &[f32]| {
            for (j, (g, w)) in got.iter().zip(want).enumerate() {
                assert!(
                    g.is_finite() == w.is_finite(),
                    "{}, case {seed}, {part} {i}[{j}] of {:?} {:?} with {:?} in input {bad}: got {g}, \
                     want {w}",
                    check.name,
                    case.shapes,
                    case.options,
                    inputs[bad].0.iter().find(|x| !x.is_finite()),
                );
            }
        };
        for (i, (g, w)) in got.outputs.iter().zip(&want.outputs).enumerate() {
            alike("output", i, g, w);
        }
        for (i, (g, w)) in got.grads.iter().zip(&want.grads).enumerate() {
            if let (Some(g), Some(w)) = (g, w) {
                alike("gradient", i, g, w);
            }
        }
    }
}

/// The slope of the weighted sum of the outputs along a random direction is the gradient's inner product
/// with it. At a step of 5e-3 the third order's share and the rounding of the forward are both below 3e-3.
fn compare_slopes(check: &Check) {
    const STEP: f32 = 5e-3;
    for seed in 201..=200 + SLOPES {
        let (case, mut inputs, _, _) = drawn(check, seed, 9);
        for (i, (_, lie, tracked)) in inputs.iter_mut().enumerate() {
            *lie = Lie::Rows;
            *tracked = match check.slopes {
                Some(these) => these.contains(&i),
                None => !case.constant.contains(&i),
            };
        }
        let directions: Vec<Vec<f32>> = inputs
            .iter()
            .enumerate()
            .map(|(i, (values, _, tracked))| {
                let mut d = noise(900 + i as u64, values.len());
                d.iter_mut()
                    .for_each(|d| *d *= f32::from(u8::from(*tracked)));
                d
            })
            .collect();
        let at = |step: f32| {
            let moved: Vec<_> = inputs
                .iter()
                .zip(&directions)
                .map(|((values, lie, _), d)| {
                    let values = values.iter().zip(d).map(|(x, d)| x + step * d).collect();
                    (values, *lie, false)
                })
                .collect();
            let outcome = run(check.ours, &case, &moved, false, &flex());
            let sums = outcome
                .outputs
                .iter()
                .enumerate()
                .map(|(i, y)| inner(y, &noise(500 + i as u64, y.len())));
            sums.sum::<f64>()
        };
        let want = (at(STEP) - at(-STEP)) / (2.0 * f64::from(STEP));
        let grads = run(check.ours, &case, &inputs, false, &flex()).grads;
        let got: f64 = grads
            .iter()
            .zip(&directions)
            .filter_map(|(g, d)| g.as_ref().map(|g| inner(g, d)))
            .sum();
        let size = grads
            .iter()
            .flatten()
            .map(|g| inner(g, g))
            .sum::<f64>()
            .sqrt();
        assert!(
            (got - want).abs() <= 3e-3 * (1.0 + size),
            "{}, case {seed} of {:?} {:?}: slope {want}, gradient {got}, of size {size}",
            check.name,
            case.shapes,
            case.options,
        );
    }
}

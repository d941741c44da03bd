use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Gradients, Tensor};

use super::{can_checkpoint, checkpoint_module};
use crate::check::{flex, floats, grad, leaf, ndarray};
use crate::{lora_linear, rms_norm};

const WIDTH: usize = 12;

/// A norm, and layers of which each has a frozen weight and two trained factors.
#[derive(Module, Debug)]
struct Block {
    norm: Param<Tensor<1>>,
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    weight: Param<Tensor<2>>,
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
}

impl Block {
    fn new(seed: u64, layers: usize, device: &Device) -> Self {
        let matrix = |seed, shape, trained| {
            Param::from_tensor(leaf::<2>(seed, shape, false, device)).set_require_grad(trained)
        };
        let layers = (0..layers as u64).map(|i| Layer {
            weight: matrix(seed + 10 * i + 1, [WIDTH, WIDTH], false),
            a: matrix(seed + 10 * i + 2, [3, WIDTH], true),
            b: matrix(seed + 10 * i + 3, [WIDTH, 3], true),
        });
        Self {
            norm: Param::from_tensor(leaf(seed, [WIDTH], false, device)),
            layers: layers.collect(),
        }
    }

    fn forward(&self, mut x: Tensor<2>) -> Tensor<2> {
        for layer in &self.layers {
            let (w, a, b) = (layer.weight.val(), layer.a.val(), layer.b.val());
            let normed = rms_norm(x.clone(), self.norm.val(), 1e-5);
            // Three readers of one tensor: the order of their sum shows.
            let y = lora_linear(normed.clone(), w, a, b, 0.5).tanh();
            x = x + y * normed.clone() + normed;
        }
        x
    }
}

/// Bits of all gradients of a module, in the visitor's order.
struct Bits<'a>(&'a Gradients, Vec<Option<Vec<u32>>>);

impl ModuleVisitor for Bits<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.push(grad(&param.val(), self.0).map(bits));
    }
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

type Outcome = (Vec<u32>, Option<Vec<u32>>, Vec<Option<Vec<u32>>>);

/// Result, gradient of the input, gradients of the parameters.
fn run(blocks: &[Block], x: Tensor<2>, each: impl Fn(&Block, Tensor<2>) -> Tensor<2>) -> Outcome {
    let y = blocks.iter().fold(x.clone(), |x, block| each(block, x));
    let result = bits(floats(y.clone()));
    let grads = (y.clone() * y).sum().backward();
    let mut all = Bits(&grads, Vec::new());
    blocks.iter().for_each(|block| block.visit(&mut all));
    (result, grad(&x, &grads).map(bits), all.1)
}

fn plain(block: &Block, x: Tensor<2>) -> Tensor<2> {
    block.forward(x)
}

fn again(block: &Block, x: Tensor<2>) -> Tensor<2> {
    checkpoint_module(block, x, |block: &Block, x| block.forward(x))
}

#[test]
fn gradients_are_those_of_the_plain_graph_bit_for_bit() {
    for device in [flex(), ndarray()] {
        for tracked in [false, true] {
            let blocks: Vec<_> = (0..4).map(|i| Block::new(100 * i, 3, &device)).collect();
            let x = || leaf::<2>(7, [5, WIDTH], tracked, &device);
            let want = run(&blocks, x(), plain);
            assert!(want.1.is_some() == tracked);
            assert_eq!(want.2.iter().flatten().count(), 4 * (1 + 3 * 2));
            assert!(run(&blocks, x(), again) == want, "{device:?}, {tracked}");
        }
    }
}

/// Which kernel multiplies is chosen by timing there, and operations are fused as they come: bits may differ.
#[cfg(feature = "cube")]
#[test]
fn gradients_on_a_cube_device_are_those_of_the_plain_graph() {
    let Some(device) = crate::check::gpu() else {
        return;
    };
    assert!(can_checkpoint(&device));
    let blocks: Vec<_> = (0..4).map(|i| Block::new(100 * i, 3, &device)).collect();
    let x = || leaf::<2>(7, [5, WIDTH], true, &device);
    let numbers =
        |bits: &Vec<u32>| -> Vec<f32> { bits.iter().map(|x| f32::from_bits(*x)).collect() };
    let all = |(y, x, parameters): Outcome| -> Vec<Option<Vec<f32>>> {
        let gradients = std::iter::once(x).chain(parameters);
        let gradients = gradients.map(|g| g.as_ref().map(numbers));
        std::iter::once(Some(numbers(&y)))
            .chain(gradients)
            .collect()
    };
    let (got, want) = (run(&blocks, x(), again), run(&blocks, x(), plain));
    // Sums of a dozen products, a dozen layers deep.
    crate::check::close_grads("checkpointed", &all(got), &all(want), 1e-5);
}

#[test]
fn a_block_may_have_more_parameters_than_any_table_of_sizes_foresees() {
    let blocks = [Block::new(3, 300, &flex())];
    let x = || leaf::<2>(8, [2, WIDTH], true, &flex());
    let want = run(&blocks, x(), plain);
    assert_eq!(want.2.iter().flatten().count(), 601);
    assert!(run(&blocks, x(), again) == want);
}

#[test]
fn blocks_nest() {
    let device = flex();
    let blocks = vec![Block::new(1, 2, &device), Block::new(2, 2, &device)];
    let x = || leaf::<2>(9, [4, WIDTH], true, &device);
    let want = run(&blocks, x(), plain);
    let input = x();
    let y = checkpoint_module(&blocks, input.clone(), |blocks: &Vec<Block>, x| {
        blocks.iter().fold(x, |x, block| again(block, x))
    });
    let grads = (y.clone() * y).sum().backward();
    let mut all = Bits(&grads, Vec::new());
    blocks.visit(&mut all);
    assert!((grad(&input, &grads).map(bits), all.1) == (want.1, want.2));
}

#[test]
fn frozen_parameters_and_unused_ones_get_no_gradient() {
    let device = flex();
    let block = Block::new(5, 2, &device);
    let frozen = [block.clone().no_grad()];
    let x = || leaf::<2>(9, [4, WIDTH], true, &device);
    let want = run(&frozen, x(), plain);
    assert!(want.1.is_some() && want.2.iter().all(Option::is_none));
    assert!(run(&frozen, x(), again) == want);

    let first_only = |block: &Block, x: Tensor<2>| block.layers[0].b.val().matmul(x);
    let x = || leaf::<2>(9, [3, WIDTH], false, &device);
    let want = run(std::slice::from_ref(&block), x(), first_only);
    assert_eq!(want.2.iter().flatten().count(), 1);
    let got = run(&[block], x(), |block, x| {
        checkpoint_module(block, x, first_only)
    });
    assert!(got == want);
}

#[test]
fn nothing_is_recorded_where_nothing_is_trained_or_there_is_no_autodiff() {
    let device = flex();
    let block = Block::new(5, 2, &device);
    let x = leaf::<2>(9, [4, WIDTH], false, &device);
    assert!(!again(&block.clone().no_grad(), x.clone()).is_tracked());
    let y = again(&block.valid(), x.clone().inner());
    assert_eq!(floats(y), floats(block.forward(x)));
    assert!(can_checkpoint(&device) && can_checkpoint(&device.without_autodiff()));
}

#[test]
fn a_captured_tensor_that_is_tracked_keeps_its_gradient() {
    let device = flex();
    let block = Block::new(5, 2, &device);
    let (x, gate) = (
        leaf::<2>(9, [4, WIDTH], true, &device),
        leaf::<2>(10, [4, WIDTH], true, &device),
    );
    let captured = gate.clone();
    let y = checkpoint_module(&block, x.clone(), move |block: &Block, x| {
        block.forward(x) * captured.clone()
    });
    let got = y.sum().backward();
    let want = (block.forward(x.clone()) * gate.clone()).sum().backward();
    for t in [&x, &gate] {
        assert!(grad(t, &got).is_some() && grad(t, &got) == grad(t, &want));
    }
}

#[test]
fn random_numbers_are_the_same_both_times_when_the_block_seeds_them() {
    let device = flex();
    let blocks = [Block::new(5, 2, &device), Block::new(6, 2, &device)];
    let noisy = |block: &Block, x: Tensor<2>| {
        x.device().seed(block.layers.len() as u64);
        let mask = x.random_like(Distribution::Bernoulli(0.5));
        block.forward(x * mask)
    };
    let x = || leaf::<2>(9, [4, WIDTH], true, &device);
    let want = run(&blocks, x(), noisy);
    let got = run(&blocks, x(), |block, x| checkpoint_module(block, x, noisy));
    assert!(got == want);
}

#[test]
fn a_block_runs_once_forward_and_once_backward_and_is_let_go_of_afterwards() {
    let device = flex();
    let block = Block::new(5, 2, &device);
    let (calls, alive) = (Arc::new(AtomicUsize::new(0)), Arc::new(()));
    let step = |backward: bool| {
        let (calls, alive) = (calls.clone(), alive.clone());
        let x = leaf::<2>(9, [4, WIDTH], true, &device);
        let y = checkpoint_module(&block, x, move |block: &Block, x| {
            let _alive = &alive;
            calls.fetch_add(1, Ordering::Relaxed);
            block.forward(x)
        });
        if backward {
            let _ = y.sum().backward();
        }
    };
    for _ in 0..50 {
        step(true);
    }
    assert_eq!(calls.load(Ordering::Relaxed), 100);
    assert_eq!(Arc::strong_count(&alive), 1);
    // Graphs that are given up go with a later backward pass of any other. It skips those that another
    // thread is looking at, hence the patience.
    (0..50).for_each(|_| step(false));
    for _ in 0..1000 {
        step(true);
        if Arc::strong_count(&alive) == 1 {
            return;
        }
    }
    panic!("{} graphs are still there", Arc::strong_count(&alive) - 1);
}

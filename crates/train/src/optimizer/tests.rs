//! The optimizer against Burn's, its file, and what it leaves in place.

#[allow(clippy::unwrap_used)]
mod optim;

use std::path::Path;

use burn::backend::Flex;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::module::{Module, Param, ParamGroup};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor, TensorData};
use enamel_kernels::AdamW;

use super::Optimizer;
use crate::error::TrainError;

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
};
const RATE: f64 = 0.05;

#[derive(Module, Debug)]
struct Model {
    matrix: Param<Tensor<2>>,
    frozen: Param<Tensor<2>>,
    vector: Param<Tensor<1>>,
    /// Has no gradient.
    unused: Param<Tensor<1>>,
}

fn values<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|i| (((i + 1) * (seed + 3) * 7919) % 1013) as f32 / 1013.0 - 0.5)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

fn model() -> Model {
    Model {
        matrix: Param::from_tensor(values([5, 7], 1)),
        frozen: Param::from_tensor(values([4, 4], 2)).set_require_grad(false),
        vector: Param::from_tensor(values([7], 3)),
        unused: Param::from_tensor(values([3], 4)),
    }
}

fn grads(model: &Model, step: usize) -> GradientsParams {
    let x = values([6, 5], 10 + step);
    let y = x.matmul(model.matrix.val()) + model.vector.val().unsqueeze();
    GradientsParams::from_grads(y.tanh().powf_scalar(2.0).sum().backward(), model)
}

fn lists(model: &Model) -> Vec<Vec<f32>> {
    let list = |t: Tensor<1>| t.into_data().try_to_vec::<f32>().unwrap();
    vec![
        list(model.matrix.val().reshape([35])),
        list(model.frozen.val().reshape([16])),
        list(model.vector.val()),
        list(model.unused.val()),
    ]
}

fn advance(optimizer: &mut Optimizer, model: &mut Model, steps: std::ops::Range<usize>) {
    for step in steps {
        let grads = grads(model, step);
        optimizer.step(model, grads, 0.5, &RATE.into());
    }
}

fn burns() -> ModuleOptimizer {
    AdamWConfig::new()
        .with_beta_1(SETTINGS.beta1 as f32)
        .with_beta_2(SETTINGS.beta2 as f32)
        .with_epsilon(SETTINGS.epsilon as f32)
        .with_weight_decay(SETTINGS.weight_decay as f32)
        .init()
}

fn burns_advance(
    optimizer: &mut ModuleOptimizer,
    mut model: Model,
    steps: std::ops::Range<usize>,
) -> Model {
    for step in steps {
        let mut grads = grads(&model, step);
        let matrix = grads.remove::<2>(model.matrix.id).unwrap();
        let vector = grads.remove::<1>(model.vector.id).unwrap();
        grads.register(model.matrix.id, matrix.mul_scalar(0.5));
        grads.register(model.vector.id, vector.mul_scalar(0.5));
        model = optimizer.step(RATE, model, grads);
    }
    model
}

fn close(got: &Model, want: &Model) {
    for (got, want) in lists(got).iter().zip(lists(want)) {
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
}

#[test]
fn it_moves_what_burns_adamw_moves_and_as_far() {
    let start = model();
    let want = burns_advance(&mut burns(), start.clone(), 0..20);
    let mut got = start.clone();
    advance(&mut Optimizer::new(SETTINGS), &mut got, 0..20);
    close(&got, &want);
    let (start, got) = (lists(&start), lists(&got));
    assert_eq!((&got[1], &got[3]), (&start[1], &start[3]));
    assert!(got[0] != start[0] && got[2] != start[2]);
}

#[test]
fn gradient_flags_survive() {
    let mut model = model();
    advance(&mut Optimizer::new(SETTINGS), &mut model, 0..2);
    assert!(model.matrix.is_require_grad() && model.matrix.val().is_require_grad());
    assert!(model.unused.is_require_grad() && !model.frozen.is_require_grad());
    let again = model.valid().train();
    assert!(again.vector.is_require_grad() && !again.frozen.is_require_grad());
}

#[test]
fn a_parameter_held_nowhere_else_is_overwritten_in_place() {
    let address = |model: &Model| {
        let t = model.matrix.val().inner();
        let t = t.try_into_primitive::<Flex>().unwrap();
        t.storage::<f32>().as_ptr() as usize
    };
    let mut model = model();
    let mut optimizer = Optimizer::new(SETTINGS);
    let at = address(&model);
    advance(&mut optimizer, &mut model, 0..3);
    assert_eq!(address(&model), at);

    let (held, before) = (model.clone(), lists(&model));
    advance(&mut optimizer, &mut model, 3..4);
    assert_ne!(address(&model), at);
    assert_eq!(lists(&held), before);
    assert_ne!(lists(&model), before);
}

#[test]
fn groups_learn_at_their_own_rates() {
    let mut model = model();
    let start = lists(&model);
    let group = ParamGroup::from_ids(vec![model.vector.id]);
    let mut rates = ModuleLrScheduler::new(RATE).with_group(group, 0.0);
    let rates: ModuleLearningRate = rates.step();
    let grads = grads(&model, 0);
    Optimizer::new(SETTINGS).step(&mut model, grads, 1.0, &rates);
    let end = lists(&model);
    assert_ne!(end[0], start[0]);
    assert_eq!(end[2], start[2], "a rate of zero");
}

fn saved(optimizer: &Optimizer, dir: &Path) -> std::path::PathBuf {
    let path = dir.join("optimizer.bpk");
    optimizer.save(&path).unwrap();
    path
}

#[test]
fn a_loaded_optimizer_goes_on_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, mut optimizer) = (model(), Optimizer::new(SETTINGS));
    advance(&mut optimizer, &mut model, 0..3);
    let path = saved(&optimizer, dir.path());
    let mut other = Optimizer::new(SETTINGS);
    let mut resumed = model.clone();
    other.load(&path, &resumed).unwrap();
    advance(&mut optimizer, &mut model, 3..8);
    advance(&mut other, &mut resumed, 3..8);
    assert_eq!(lists(&model), lists(&resumed));

    let mut fresh = Optimizer::new(SETTINGS);
    fresh.load(&path, &model).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(
        std::fs::read(saved(&fresh, dir.path())).unwrap(),
        bytes,
        "the file of a loaded file"
    );
}

#[test]
fn taking_an_optimizer_leaves_one_without_moments() {
    let (mut model, mut optimizer) = (model(), Optimizer::new(SETTINGS));
    advance(&mut optimizer, &mut model, 0..1);
    let taken = optimizer.take();
    assert_eq!((taken.states.len(), optimizer.states.len()), (2, 0));
    assert_eq!(taken.settings, optimizer.settings);
}

#[test]
fn it_goes_on_from_burns_record_and_burn_from_its() {
    let dir = tempfile::tempdir().unwrap();
    let start = model();
    let want = burns_advance(&mut burns(), start.clone(), 0..8);

    let mut theirs = burns();
    let mut model = burns_advance(&mut theirs, start.clone(), 0..4);
    let path = dir.path().join("burns.bpk");
    theirs.to_record().save(&path).unwrap();
    let mut ours = Optimizer::new(SETTINGS);
    ours.load(&path, &model).unwrap();
    advance(&mut ours, &mut model, 4..8);
    close(&model, &want);

    let (mut ours, mut model) = (Optimizer::new(SETTINGS), start);
    advance(&mut ours, &mut model, 0..4);
    let record = OptimizerRecord::load(saved(&ours, dir.path())).unwrap();
    let mut theirs = burns().load_record(record);
    close(&burns_advance(&mut theirs, model, 4..8), &want);
}

#[test]
fn a_file_that_does_not_fit_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, mut optimizer) = (model(), Optimizer::new(SETTINGS));
    advance(&mut optimizer, &mut model, 0..1);
    let path = saved(&optimizer, dir.path());
    let bytes = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8], model: &Model, words: &str| {
        std::fs::write(&path, bytes).unwrap();
        let mut fresh = Optimizer::new(SETTINGS);
        match fresh.load(&path, model) {
            Err(error @ TrainError::Run { .. }) => {
                let text = error.to_string();
                assert!(text.contains(words), "{text}");
                assert!(text.contains("optimizer.bpk"), "{text}");
            }
            other => panic!("{words}: {other:?}"),
        }
        assert!(fresh.states.is_empty());
    };
    refused(&bytes[..bytes.len() - 1], &model, "not an optimizer");
    refused(b"nothing", &model, "not an optimizer");
    let stranger = self::model();
    refused(&bytes, &stranger, "does not have");
    let mut other = model.clone();
    other.vector = Param::initialized(model.vector.id, values([8], 1));
    refused(&bytes, &other, "has the shape [7], its parameter [8]");

    let id = model.vector.id;
    let mut without = optimizer.take();
    without.states.get_mut(&id).unwrap().shape = [7, 1].into();
    let bytes = std::fs::read(saved(&without, dir.path())).unwrap();
    refused(&bytes, &model, "has the shape [7, 1]");
}

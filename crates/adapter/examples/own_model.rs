//! Adapts a plain Burn model that knows nothing of adapters, trains the adapter with burn-train, and saves
//! it in PEFT's format.
//!
//!     cargo run --release --example own_model
//!
//! A small network has learnt `sin x`. A LoRA on its layers teaches it `sin x + cos 2x` from few points;
//! the network itself stays as it is.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use burn::data::dataloader::{DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use burn::train::metric::LossMetric;
use burn::train::{
    InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
};
use enamel_adapter::{
    Linear, LoraConfig, SaveMeta, Targets, attach, load_pretrained, merge, save_pretrained, slots,
};

/// The model that somebody else wrote and trained: burn's own layers.
#[derive(Module, Debug)]
struct Plain {
    first: nn::Linear,
    second: nn::Linear,
    last: nn::Linear,
}

impl Plain {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.first.forward(x).tanh();
        self.last.forward(self.second.forward(x).tanh())
    }
}

/// The same model with layers that adapters attach to.
#[derive(Module, Debug)]
struct Adapted {
    first: Linear,
    second: Linear,
    last: Linear,
}

impl Adapted {
    fn new(plain: Plain) -> Self {
        Self {
            first: Linear::from_burn("first", plain.first),
            second: Linear::from_burn("second", plain.second),
            last: Linear::from_burn("last", plain.last),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.first.forward(x).tanh();
        self.last.forward(self.second.forward(x).tanh())
    }
}

// All that adapters need to know of a model: its layers, called as the fields.
slots!(model Adapted { first, second, last });

/// Points of a curve, `[batch, 1]` each.
#[derive(Clone, Debug)]
struct Points {
    x: Tensor<2>,
    y: Tensor<2>,
}

#[derive(Clone)]
struct ToTensors;

impl Batcher<(f32, f32), Points> for ToTensors {
    fn batch(&self, items: Vec<(f32, f32)>, device: &Device) -> Points {
        let (x, y): (Vec<f32>, Vec<f32>) = items.into_iter().unzip();
        let column = |values: Vec<f32>| {
            let rows = values.len();
            Tensor::from_data(TensorData::new(values, [rows, 1]), device)
        };
        Points {
            x: column(x),
            y: column(y),
        }
    }
}

fn judge(output: Tensor<2>, y: Tensor<2>) -> RegressionOutput {
    let loss = (output.clone() - y.clone()).powi_scalar(2).mean();
    RegressionOutput::new(loss, output, y)
}

impl TrainStep for Adapted {
    type Input = Points;
    type Output = RegressionOutput;

    fn step(&self, points: Points) -> TrainOutput<RegressionOutput> {
        let out = judge(self.forward(points.x), points.y);
        TrainOutput::new(self, out.loss.backward(), out)
    }
}

impl InferenceStep for Adapted {
    type Input = Points;
    type Output = RegressionOutput;

    fn step(&self, points: Points) -> RegressionOutput {
        judge(self.forward(points.x), points.y)
    }
}

fn curve(count: usize, f: impl Fn(f32) -> f32) -> Vec<(f32, f32)> {
    let x = |i: usize| i as f32 / count as f32 * 6.0 - 3.0;
    (0..count).map(|i| (x(i), f(x(i)))).collect()
}

/// Somebody else's work: the network learns `sin x`.
fn pretrained(device: &Device) -> Plain {
    let linear = |from, to| nn::LinearConfig::new(from, to).init(device);
    let mut model = Plain {
        first: linear(1, 64),
        second: linear(64, 64),
        last: linear(64, 1),
    };
    let points = ToTensors.batch(curve(256, f32::sin), device);
    let mut optimizer = AdamWConfig::new().init();
    for _ in 0..600 {
        let loss = (model.forward(points.x.clone()) - points.y.clone())
            .powi_scalar(2)
            .mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, grads);
    }
    model.valid()
}

fn main() {
    let device = Device::flex();
    device.seed(7);
    let mut model = Adapted::new(pretrained(&device.clone().autodiff()));
    let target = |x: f32| x.sin() + (2.0 * x).cos();
    let test = ToTensors.batch(curve(101, target), &device);
    let error = |model: &Adapted| {
        let off = model.forward(test.x.clone()) - test.y.clone();
        off.powi_scalar(2).mean().into_scalar::<f32>()
    };
    let before = error(&model);

    // The adapter: a LoRA of rank 4 on all layers.
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        target_modules: Some(Targets::List(vec![
            "first".into(),
            "second".into(),
            "last".into(),
        ])),
        rank_pattern: vec![("first".into(), 1), ("last".into(), 1)],
        ..LoraConfig::default()
    };
    let plan = attach(&mut model, &config, 42).unwrap();
    println!(
        "{} of {} parameters are trained",
        plan.trainable, plan.total
    );

    // burn-train's own loop; gradients reach the adapter alone.
    let autodiff = device.clone().autodiff();
    let loader = |count, seed| {
        DataLoaderBuilder::new(ToTensors)
            .batch_size(32)
            .shuffle(seed)
            .set_device(autodiff.clone())
            .build(InMemDataset::new(curve(count, target)))
    };
    let directory = std::env::temp_dir().join("enamel-own-model");
    let learner = Learner::new(model.train(), AdamWConfig::new().init(), 1e-2);
    let result = SupervisedTraining::new(&directory, loader(512, 1), loader(128, 2))
        .metric_train_numeric(LossMetric::new())
        .metric_valid_numeric(LossMetric::new())
        .num_epochs(20)
        .with_application_logger(None)
        .launch(learner);
    let model = result.model;
    let after = error(&model);
    println!("mean squared error: {before:.4} before, {after:.4} after");

    // Saved in PEFT's format, loaded on a fresh copy of the base, folded into its weights.
    let adapter = directory.join("adapter");
    save_pretrained(&model, &config, &SaveMeta::default(), &adapter).unwrap();
    let mut fresh = model.clone();
    enamel_adapter::detach(&mut fresh);
    assert!(
        (error(&fresh) - before).abs() < 1e-6,
        "the base is what it was"
    );
    load_pretrained(&mut fresh, &adapter, false).unwrap();
    assert_eq!(error(&fresh), after, "the same adapter to the bit");
    merge(&mut fresh).unwrap();
    println!(
        "merged: {:.4}; the adapter is in {}",
        error(&fresh),
        adapter.display()
    );
    assert!(
        after < before / 10.0,
        "the adapter has learnt the new curve"
    );
}

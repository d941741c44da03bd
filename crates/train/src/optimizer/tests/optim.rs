//! 8-bit and paged optimizers: the same steps wherever moments lie, and files that go on where they stopped.

use std::path::Path;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};
use burn_pack::{Reader, Tensor as Packed, Writer};
use enamel_kernels::{AdamW, MOMENT_BLOCK};

use crate::error::TrainError;
use crate::optimizer::{Held, MIN_8BIT_SIZE, MIN_PAGED_SIZE, Optim, Optimizer};

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
};

/// A parameter on either side of each size that counts, one large and not trained.
#[derive(Module, Debug)]
struct Model {
    tiny: Param<Tensor<1>>,
    medium: Param<Tensor<2>>,
    large: Param<Tensor<2>>,
    frozen: Param<Tensor<2>>,
}

fn values<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
    let n: usize = shape.iter().product();
    let values = (0..n).map(|i| (((i + 1) * (seed + 3) * 7919) % 1013) as f32 / 1013.0 - 0.5);
    Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape), device)
}

fn model(device: &Device) -> Model {
    Model {
        tiny: Param::from_tensor(values([MIN_8BIT_SIZE - 1], 1, device)),
        medium: Param::from_tensor(values([3, 1500], 2, device)),
        large: Param::from_tensor(values([25, MIN_PAGED_SIZE / 25 + 1], 3, device)),
        frozen: Param::from_tensor(values([25, MIN_PAGED_SIZE / 25 + 1], 4, device))
            .set_require_grad(false),
    }
}

fn flex() -> Device {
    Device::flex().autodiff()
}

#[allow(deprecated)]
fn ndarray() -> Device {
    Device::ndarray().autodiff()
}

fn optimizer(optim: Optim, dir: &Path, model: &Model) -> Optimizer {
    Optimizer::with_optim(SETTINGS, optim, (dir, ""), model).unwrap()
}

fn advance(optimizer: &mut Optimizer, model: &mut Model, steps: std::ops::Range<usize>) {
    let rates: ModuleLearningRate = 0.02.into();
    for step in steps {
        let mut grads = GradientsParams::new();
        let device = model.tiny.val().inner().device();
        grads.register(
            model.tiny.id,
            values([MIN_8BIT_SIZE - 1], 10 + step, &device),
        );
        grads.register(model.medium.id, values([3, 1500], 20 + step, &device));
        let shape = model.large.val().dims();
        grads.register(model.large.id, values(shape, 30 + step, &device));
        optimizer.step(model, grads, 0.5, &rates);
    }
}

fn lists(model: &Model) -> [Vec<f32>; 4] {
    let list = |t: Tensor<1>| t.into_data().try_to_vec::<f32>().unwrap();
    [
        list(model.tiny.val()),
        list(model.medium.val().flatten(0, 1)),
        list(model.large.val().flatten(0, 1)),
        list(model.frozen.val().flatten(0, 1)),
    ]
}

/// Names of what lies in a folder.
fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn moments_are_held_as_the_name_and_the_size_say() {
    let dir = tempfile::tempdir().unwrap();
    for (optim, want) in [
        (Optim::AdamwTorch, ["f32", "f32", "f32"]),
        (Optim::Adamw8bit, ["f32", "8 bits", "8 bits"]),
        (Optim::PagedAdamw32bit, ["f32", "f32", "paged"]),
        (Optim::PagedAdamw8bit, ["f32", "8 bits", "paged"]),
    ] {
        let mut model = model(&flex());
        let mut optimizer = optimizer(optim, dir.path(), &model);
        advance(&mut optimizer, &mut model, 0..1);
        let ids = [model.tiny.id, model.medium.id, model.large.id];
        let held = ids.map(|id| match optimizer.states[&id].moments {
            Held::F32(_) => "f32",
            Held::EightBit(_) => "8 bits",
            Held::Paged => "paged",
        });
        assert_eq!(held, want, "{optim}");
        assert_eq!(optimizer.states.len(), 3);
    }
}

#[test]
fn paging_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    for device in [flex(), ndarray()] {
        for (resident, paged) in [
            (Optim::AdamwTorch, Optim::PagedAdamw32bit),
            (Optim::Adamw8bit, Optim::PagedAdamw8bit),
        ] {
            let start = model(&device);
            let run = |optim| {
                let mut model = start.clone();
                let mut optimizer = optimizer(optim, dir.path(), &model);
                advance(&mut optimizer, &mut model, 0..4);
                lists(&model)
            };
            assert!(run(resident) == run(paged), "{paged}");
        }
    }
}

#[test]
fn eight_bits_end_near_f32_and_leave_small_and_frozen_parameters_as_they_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let start = model(&flex());
    let run = |optim| {
        let mut model = start.clone();
        let mut optimizer = optimizer(optim, dir.path(), &model);
        advance(&mut optimizer, &mut model, 0..10);
        lists(&model)
    };
    let (want, got) = (run(Optim::AdamwTorch), run(Optim::Adamw8bit));
    assert!(got[0] == want[0] && got[3] == want[3]);
    let start = lists(&start);
    for i in [1, 2] {
        let moved = |to: &[f32], from: &[f32]| {
            let pairs = to.iter().zip(from);
            pairs.map(|(a, b)| f64::from((a - b).abs())).sum::<f64>()
        };
        // A code is a few percent off where it is not near its block's scale.
        let (off, all) = (moved(&got[i], &want[i]), moved(&want[i], &start[i]));
        assert!(off > 0.0 && off < 0.1 * all, "{i}: {off} of {all}");
    }
}

#[test]
fn a_loaded_optimizer_goes_on_with_the_same_bits_and_writes_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    for device in [flex(), ndarray()] {
        for optim in Optim::ALL {
            let path = dir.path().join("optimizer.bpk");
            let mut model = model(&device);
            let mut first = optimizer(optim, dir.path(), &model);
            advance(&mut first, &mut model, 0..3);
            first.save(&path).unwrap();
            let bytes = std::fs::read(&path).unwrap();

            let mut resumed = model.clone();
            let mut second = optimizer(optim, dir.path(), &resumed);
            second.load(&path, &resumed).unwrap();
            second.save(&path).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{optim}: the file");
            advance(&mut first, &mut model, 3..6);
            advance(&mut second, &mut resumed, 3..6);
            assert!(lists(&model) == lists(&resumed), "{optim}: the bits");
        }
    }
}

#[test]
fn codes_are_written_as_codes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.bpk");
    let size = |optim| {
        let mut model = model(&flex());
        let mut optimizer = optimizer(optim, dir.path(), &model);
        advance(&mut optimizer, &mut model, 0..1);
        optimizer.save(&path).unwrap();
        std::fs::metadata(&path).unwrap().len() as usize
    };
    let sizes = [MIN_8BIT_SIZE - 1, 4500, MIN_PAGED_SIZE + 25];
    for optim in Optim::ALL {
        let state = crate::optimizer::state_bytes(optim, sizes).total();
        let written = size(optim);
        // Names, and tensors that begin at multiples of 256 bytes.
        assert!(
            (state..state + 8192).contains(&written),
            "{optim}: {written} of {state}"
        );
    }
    assert!(size(Optim::Adamw8bit) < size(Optim::AdamwTorch) / 3);
}

#[test]
fn the_state_of_another_optimizer_is_refused_and_both_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.bpk");
    let mut model = model(&flex());
    for written in Optim::ALL {
        let mut first = optimizer(written, dir.path(), &model);
        advance(&mut first, &mut model, 0..1);
        first.save(&path).unwrap();
        for asked in Optim::ALL {
            let mut second = optimizer(asked, dir.path(), &model);
            let loaded = second.load(&path, &model);
            assert_eq!(
                crate::optimizer::check_optim(&path, asked).is_ok(),
                loaded.is_ok()
            );
            let Err(error) = loaded else {
                assert_eq!(written, asked);
                continue;
            };
            let text = error.to_string();
            for part in [written.name(), asked.name(), "optimizer.bpk", "help:"] {
                assert!(text.contains(part), "{text}");
            }
        }
    }
}

/// A file with one of its tensors changed.
fn damaged(path: &Path, name: &str, change: impl FnOnce(&mut Packed)) {
    let reader = Reader::from_bytes(Bytes::from_bytes_vec(std::fs::read(path).unwrap()));
    let reader = reader.unwrap();
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let mut tensors = reader.into_tensors().unwrap();
    let found = tensors.iter_mut().find(|t| t.name == name);
    change(found.unwrap_or_else(|| panic!("no {name}")));
    let mut writer = Writer::new(tensors);
    for (key, value) in metadata {
        writer = writer.with_metadata(&key, &value);
    }
    for (key, value) in scalars {
        writer = writer.with_scalar(&key, value);
    }
    writer.write_to_file(path).unwrap();
}

#[test]
fn damaged_codes_and_scales_are_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.bpk");
    for optim in [Optim::Adamw8bit, Optim::PagedAdamw8bit] {
        let mut model = model(&flex());
        let mut first = optimizer(optim, dir.path(), &model);
        advance(&mut first, &mut model, 0..1);
        let elements = MIN_PAGED_SIZE + 25;
        let blocks = elements.div_ceil(MOMENT_BLOCK);
        let id = model.large.id.val();
        let refused = |field: &str, change: &dyn Fn(&mut Packed), words: &str| {
            first.save(&path).unwrap();
            damaged(&path, &format!("{id}.{field}"), change);
            let mut fresh = optimizer(optim, dir.path(), &model);
            let error = fresh.load(&path, &model).unwrap_err();
            assert!(matches!(error, TrainError::Run { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains(words) && text.contains("optimizer.bpk"),
                "{text}"
            );
            assert!(fresh.states.is_empty());
            // What was read before the fault is forgotten too.
            let (mut again, mut clean) = (model.clone(), model.clone());
            advance(&mut fresh, &mut again, 5..6);
            let mut other = optimizer(optim, dir.path(), &model);
            advance(&mut other, &mut clean, 5..6);
            assert!(lists(&again) == lists(&clean));
        };
        let floats = |values: Vec<f32>| Bytes::from_elems(values);
        let rename = |to: &str| {
            let name = format!("{id}.{to}");
            move |t: &mut Packed| t.name = name.clone()
        };
        let replace = |dtype, shape: [usize; 1], bytes: Bytes| {
            move |t: &mut Packed| {
                *t = Packed::new(t.name.clone(), dtype, shape, None, bytes.clone());
            }
        };
        refused("absmax2", &rename("other"), "is no moment of AdamW");
        refused("state1", &rename("momentum.moment_1"), "does not go with");
        let none = replace(DType::F32, [3], floats(vec![0.0; 3]));
        refused("absmax1", &none, "has the shape [3], its blocks");
        let negative = replace(DType::F32, [blocks], floats(vec![-1.0; blocks]));
        refused("absmax2", &negative, "-1 is no scale of a block");
        let wide = move |t: &mut Packed| {
            let bytes = floats(vec![0.0; elements]);
            *t = Packed::new(t.name.clone(), DType::F32, t.shape.clone(), None, bytes);
        };
        refused("state2", &wide, "F32 is no type of a moment");
        let stranger = move |t: &mut Packed| t.name = format!("{}.absmax2", id ^ 1);
        refused("absmax2", &stranger, "does not have");
    }
}

#[test]
fn the_file_of_paged_moments_is_gone_with_the_run_however_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = model(&flex());
    let mut paged = optimizer(Optim::PagedAdamw32bit, dir.path(), &model);
    advance(&mut paged, &mut model, 0..1);
    if cfg!(unix) {
        assert_eq!(
            entries(dir.path()),
            [""; 0],
            "it has no name while it is used"
        );
    }
    drop(paged);
    assert_eq!(entries(dir.path()), [""; 0]);
}

#[test]
fn without_large_parameters_nothing_is_paged_and_no_file_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = model(&flex());
    model.large = Param::from_tensor(values([5, 5], 1, &flex()));
    let paged = optimizer(Optim::PagedAdamw32bit, &dir.path().join("none"), &model);
    assert!(paged.pages.is_none());
    assert!(!dir.path().join("none").exists());
}

#[test]
fn a_folder_that_cannot_hold_the_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let made = Optimizer::with_optim(
        SETTINGS,
        Optim::PagedAdamw8bit,
        (&file, ""),
        &model(&flex()),
    );
    let text = made.unwrap_err().to_string();
    assert!(text.contains("file"), "{text}");
}

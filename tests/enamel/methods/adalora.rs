//! A whole AdaLoRA run against PEFT: losses, budgets and masks of 40 steps, the trimmed adapter at the end.

use burn::optim::GradientsParams;
use burn::tensor::Device;
use enamel_adapter::methods::adalora::allocator::trim;
use enamel_adapter::{
    AdaLoraConfig, AdapterConfig, AdapterFile, RankAllocator, attach, export_trainable,
    import_trainable, load_pretrained, save_pretrained,
};
use enamel_model::ModelInput;
use enamel_train::training::grad_clipping::Clipping;
use serde_json::Value;
use tempfile::TempDir;

use crate::methods::peft_files::save_meta;
use crate::on_every_device;
use crate::parity::llama::{assert_logits, floats, ids, logits};
use crate::support::adapted::{added_loss, base, batch, folder, load_adapted, task_loss};
use crate::support::curves::Curve;
use crate::support::goldens::{Tensors, assert_close_to_largest};

on_every_device!(forty_steps_agree_and_so_does_the_trimmed_adapter);

const CASE: &str = "adalora_run";

/// The configuration before its ranks were chosen.
fn untrimmed() -> AdaLoraConfig {
    let file = AdapterFile::read(&folder(CASE).join("adapter")).unwrap_or_else(|e| panic!("{e}"));
    match file.config {
        AdapterConfig::AdaLora(config) => AdaLoraConfig {
            rank_pattern: None,
            ..config
        },
        other => panic!("{} is no AdaLoRA", other.peft_type()),
    }
}

fn ranks_of(state: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<usize> {
    let e = state.iter().filter(|(key, ..)| key.ends_with(".lora_E"));
    e.map(|(.., values)| values.iter().filter(|v| **v != 0.0).count())
        .collect()
}

fn forty_steps_agree_and_so_does_the_trimmed_adapter(device: &Device) {
    let training = device.clone().autodiff();
    let config = untrimmed();
    let curve = Curve::open(CASE, "plain");
    for (key, ours) in [
        ("init_r", config.init_r),
        ("target_r", config.target_r),
        ("tinit", config.tinit),
        ("tfinal", config.tfinal),
        ("deltaT", config.delta_t),
        ("first_step", 0),
    ] {
        assert_eq!(curve.setting(key), ours as f64, "{key}");
    }
    let mut model = base(CASE, &training);
    attach(&mut model, &config, 1).unwrap_or_else(|e| panic!("{e}"));
    let start = Tensors::open(folder(CASE).join("start.safetensors"));
    let start = start.names().into_iter().map(|name| {
        let tensor = start.floats(&name);
        (name, tensor.shape, tensor.values)
    });
    import_trainable(&mut model, start.collect()).unwrap_or_else(|e| panic!("{e}"));

    let modules: Vec<&str> = curve.golden["modules"]
        .as_array()
        .expect("modules")
        .iter()
        .map(|m| m.as_str().expect("a name"))
        .collect();
    let whole = AdapterConfig::AdaLora(config.clone());
    let mut allocator = RankAllocator::new(&config, &model);
    let mut optimizer = curve.optimizer();
    assert_eq!(curve.steps(), 40);
    for step in 0..curve.steps() {
        let (rows, labels) = curve.batch(step);
        let input = ModelInput::new(ids(&rows, &training));
        let task = task_loss(&model, &input, &labels);
        curve.compare(
            "loss_task",
            step,
            f64::from(floats(task.clone().inner())[0]),
            1e-4,
        );
        let loss = task + added_loss(&model, &whole).expect("the orthogonality term");
        curve.compare(
            "loss",
            step,
            f64::from(floats(loss.clone().inner())[0]),
            1e-4,
        );
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let Clipping { norm, factor } = Clipping::of(&model, &grads, curve.setting("clip"));
        curve.compare("grad_norm", step, norm, 1e-4 * curve.at("grad_norm", step));
        allocator
            .note_gradients(&model, &|id| grads.get(id), factor)
            .unwrap_or_else(|e| panic!("{e}"));
        optimizer.step(&mut model, grads, factor, &curve.setting("lr").into());
        let done = allocator
            .update(&mut model, step)
            .unwrap_or_else(|e| panic!("{e}"));

        assert_eq!(done.budget as f64, curve.at("budget", step), "step {step}");
        let wanted = &curve.golden["rank_pattern"][step];
        match done.kept {
            None => assert!(wanted.is_null(), "step {step}: PEFT chooses ranks"),
            Some(kept) => {
                let names: Vec<_> = kept.iter().map(|(module, _)| module.as_str()).collect();
                assert_eq!(names, modules, "step {step}");
                for (module, kept) in kept {
                    let theirs = pattern(&wanted[format!("{module}.lora_E")]);
                    assert_eq!(kept, theirs, "step {step}: {module}");
                }
            }
        }
        let state = export_trainable(&model).unwrap_or_else(|e| panic!("{e}"));
        let theirs: Vec<usize> = curve.golden["ranks"][step]
            .as_array()
            .expect("ranks")
            .iter()
            .map(|r| r.as_u64().expect("a rank") as usize)
            .collect();
        assert_eq!(
            ranks_of(&state),
            theirs,
            "step {step}: ranks that are not zero"
        );
    }

    let golden = Tensors::open(folder(CASE).join("untrimmed.safetensors"));
    let state = export_trainable(&model).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(state.len(), golden.names().len());
    for (key, _, values) in &state {
        let theirs = golden.floats(key).values;
        if theirs.iter().all(|v| *v == 0.0) {
            assert_eq!(*values, theirs, "{key}: a module without ranks");
            continue;
        }
        // As after 20 steps of `parity_trainer`.
        assert_close_to_largest(key, values, &theirs, 1e-2);
    }

    // The same answers before and after the ranks out of use are cut off, and they are PEFT's.
    let batch = batch(CASE, &training);
    let before = logits(&model, &batch.input);
    let trimmed = trim(&mut model, &config, allocator.kept()).unwrap_or_else(|e| panic!("{e}"));
    let after = logits(&model, &batch.input);
    assert_logits("cut down", &after, &before, &batch.mask, 1e-5);
    // Forty steps from the same start: as the losses.
    let theirs = batch.golden.floats("right.logits").values;
    assert_logits("after the run", &after, &theirs, &batch.mask, 1e-4);

    let out = TempDir::new().expect("a temporary directory");
    save_pretrained(&model, &trimmed, &save_meta(), out.path()).unwrap_or_else(|e| panic!("{e}"));
    let ours = AdapterFile::read(out.path()).unwrap_or_else(|e| panic!("{e}"));
    let theirs = AdapterFile::read(&folder(CASE).join("adapter")).unwrap_or_else(|e| panic!("{e}"));
    let shapes = |file: &AdapterFile| -> Vec<(String, Vec<usize>)> {
        let tensors = file.tensors.iter();
        tensors
            .map(|(key, shape, _)| (key.clone(), shape.clone()))
            .collect()
    };
    assert_eq!(shapes(&ours), shapes(&theirs));
    assert_eq!(rank_pattern(&ours), rank_pattern(&theirs));
    assert!(
        shapes(&ours).iter().any(|(_, shape)| shape[0] == 0),
        "a module of rank 0"
    );
}

fn pattern(value: &Value) -> Vec<bool> {
    let list = value.as_array().expect("a list of ranks in use");
    list.iter()
        .map(|v| v.as_bool().expect("a truth value"))
        .collect()
}

/// Sorted by module.
fn rank_pattern(file: &AdapterFile) -> Vec<(String, Vec<bool>)> {
    let AdapterConfig::AdaLora(config) = &file.config else {
        panic!("no AdaLoRA");
    };
    let mut pattern = config.rank_pattern.clone().expect("a rank pattern");
    pattern.sort();
    pattern
}

#[test]
fn a_trimmed_adapter_of_pefts_gives_its_logits_and_is_written_back_to_the_bit() {
    let device = crate::support::devices::device("flex");
    let (mut model, loaded) = load_adapted(CASE, false, &device);
    let batch = batch(CASE, &device);
    let theirs = batch.golden.floats("right.logits").values;
    let ours = logits(&model, &batch.input);
    assert_logits(CASE, &ours, &theirs, &batch.mask, 1e-5);
    crate::methods::peft_files::check_round_trip(
        CASE,
        &folder(CASE).join("adapter"),
        &model,
        &loaded,
    );

    // And it merges to the same, the module without ranks included.
    enamel_adapter::merge(&mut model).unwrap_or_else(|e| panic!("{e}"));
    assert_logits(
        CASE,
        &logits(&model, &batch.input),
        &theirs,
        &batch.mask,
        2e-5,
    );
}

#[test]
fn a_run_that_was_interrupted_chooses_the_same_ranks() {
    // The allocator's state, written and read in the middle, is all that it needs beside the adapter.
    let device = crate::support::devices::device("flex").autodiff();
    let (mut model, loaded) = {
        let mut model = base("adalora", &device);
        let dir = folder("adalora").join("adapter");
        let loaded = load_pretrained(&mut model, &dir, true).unwrap_or_else(|e| panic!("{e}"));
        (model, loaded)
    };
    let AdapterConfig::AdaLora(config) = &loaded.config else {
        panic!("no AdaLoRA");
    };
    let curve = Curve::open(CASE, "plain");
    let mut first = RankAllocator::new(config, &model);
    let mut optimizer = curve.optimizer();
    for step in 0..12 {
        let (rows, labels) = curve.batch(step);
        let loss = task_loss(&model, &ModelInput::new(ids(&rows, &device)), &labels);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        first
            .note_gradients(&model, &|id| grads.get(id), 1.0)
            .unwrap_or_else(|e| panic!("{e}"));
        let mut second = RankAllocator::new(config, &model);
        second.restore(first.state());
        second
            .note_gradients(&model, &|id| grads.get(id), 1.0)
            .unwrap_or_else(|e| panic!("{e}"));
        optimizer.step(&mut model, grads, 1.0, &curve.setting("lr").into());
        let mut other = model.clone();
        let a = first
            .update(&mut model, step)
            .unwrap_or_else(|e| panic!("{e}"));
        let b = second
            .update(&mut other, step)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(a, b, "step {step}");
        assert_eq!(first.state(), second.state(), "step {step}");
    }
}

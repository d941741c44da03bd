//! LoRA's other starting points against PEFT: initial factors, native, resumable and exchangeable folders.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::linalg::Matrix;
use enamel_adapter::{
    AdapterConfig, AdapterFile, HostTensor, LoraConfig, SaveForm, attach, detach, export_trainable,
    load_pretrained, save_pretrained_as,
};
use enamel_model::Model;
use tempfile::TempDir;

use crate::methods::peft_files::save_meta;
use crate::on_every_device;
use crate::parity::llama::logits;
use crate::parity::matching::adapter;
use crate::support::adapted::{base, folder, input, meta};
use crate::support::devices::device;
use crate::support::goldens::{Tensors, assert_close, copy, largest_difference};

on_every_device!(
    the_same_part_of_the_base_is_taken_and_the_output_is_unchanged,
    native_folders_answer_as_in_peft,
    converted_folders_answer_as_in_peft,
);

/// What is computed from the weight alone, so that everyone computes the same.
const DETERMINED: [&str; 3] = ["init_pissa", "init_pissa_rslora", "init_olora"];
/// And what draws random numbers, so that nobody does.
const RANDOMISED: &str = "init_pissa_niter_4";
/// PEFT's decomposition in f32 is up to 5e-6 from that in f64, entry by entry, and an input has some thirty
/// of them: an answer with a decomposition of one's own in it is not within 1e-5.
const OWN_DECOMPOSITION: f32 = 3e-5;
const PREFIX: &str = "base_model.model.";

fn golden(case: &str) -> Tensors {
    Tensors::open(folder(case).join("case.safetensors"))
}

fn answers(model: &Model, golden: &Tensors, device: &Device) -> Vec<f32> {
    logits(model, &input(golden, "none.", device).0)
}

fn config(case: &str) -> LoraConfig {
    match adapter("LORA", &meta(case)["config"]) {
        Ok(AdapterConfig::Lora(config)) => config,
        other => panic!("{case}: {other:?}"),
    }
}

fn scale(config: &LoraConfig) -> f64 {
    let r = config.r as f64;
    config.lora_alpha / if config.use_rslora { r.sqrt() } else { r }
}

/// `s·B·A` of every module, in order of names; the signs of the vectors do not matter to it.
pub fn deltas(tensors: &[HostTensor], scale: f64) -> Vec<(String, Matrix)> {
    let part = |module: &str, part: &str| {
        let key = format!("{module}.{part}.weight");
        let (_, shape, values) = tensors.iter().find(|(k, ..)| *k == key).expect("a factor");
        Matrix::new(shape[0], shape[1], values.clone()).expect("a matrix")
    };
    let modules = tensors
        .iter()
        .filter_map(|(key, ..)| key.strip_suffix(".lora_A.weight"));
    let mut all: Vec<_> = modules
        .map(|module| {
            let product = part(module, "lora_B").matmul(&part(module, "lora_A"));
            (
                module.to_owned(),
                product.expect("a product").scaled(scale as f32),
            )
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Tensors of a golden whose names begin with `prefix`, without it.
pub fn host(golden: &Tensors, prefix: &str) -> Vec<HostTensor> {
    let names = golden.names().into_iter().filter(|n| n.starts_with(prefix));
    names
        .map(|name| {
            let tensor = golden.floats(&name);
            (name[prefix.len()..].to_owned(), tensor.shape, tensor.values)
        })
        .collect()
}

pub fn compare_deltas(what: &str, ours: &[(String, Matrix)], theirs: &[(String, Matrix)]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for ((name, a), (other, b)) in ours.iter().zip(theirs) {
        assert_eq!(name, other, "{what}");
        assert_close(&format!("{what}: {name}"), a.data(), b.data(), 1e-5);
    }
}

fn the_same_part_of_the_base_is_taken_and_the_output_is_unchanged(device: &Device) {
    for case in [&DETERMINED[..], &[RANDOMISED, "init_orthogonal"]].concat() {
        let (golden, config) = (golden(case), config(case));
        let mut model = base(case, device);
        let before = answers(&model, &golden, device);
        attach(&mut model, &config, 1).unwrap_or_else(|e| panic!("{case}: {e}"));
        // As PEFT's own output after attaching is within 4e-6 of the base's.
        let what = format!("{case}: output");
        assert_close(&what, &answers(&model, &golden, device), &before, 1e-5);
        let theirs = golden.floats("none.logits.init").values;
        assert_close(&what, &answers(&model, &golden, device), &theirs, 1e-5);

        let start = export_trainable(&model).unwrap_or_else(|e| panic!("{case}: {e}"));
        let ours = deltas(&start, scale(&config));
        let peft = deltas(&host(&golden, "init."), scale(&config));
        if DETERMINED.contains(&case) {
            compare_deltas(case, &ours, &peft);
        } else if case == RANDOMISED {
            // Another draw of the same approximation: as much of the weight is left as in PEFT.
            for ((name, ours), (_, theirs)) in ours.iter().zip(&peft) {
                let module = name.strip_prefix(PREFIX).expect("PEFT's prefix");
                let left = golden.floats(&format!("base.{module}.weight")).values;
                let whole: Vec<f32> = left.iter().zip(theirs.data()).map(|(l, d)| l + d).collect();
                let ours: Vec<f32> = whole.iter().zip(ours.data()).map(|(w, d)| w - d).collect();
                let size = |v: &[f32]| v.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                let ratio = size(&ours) / size(&left);
                assert!((0.98..1.02).contains(&ratio), "{name}: {ratio}");
            }
        } else {
            // B·A is zero, and neither is.
            for (name, delta) in &ours {
                let (most, _) = largest_difference(delta.data(), &vec![0.0; delta.data().len()]);
                assert!(most < 1e-6, "{name}: {most}");
            }
            for ((key, shape, ours), (other, theirs_shape, theirs)) in
                sorted(start).iter().zip(&host(&golden, "init."))
            {
                assert_eq!((key, shape), (other, theirs_shape));
                let deviation = |v: &[f32]| {
                    (v.iter().map(|x| f64::from(x * x)).sum::<f64>() / v.len() as f64).sqrt()
                };
                let ratio = deviation(ours) / deviation(theirs);
                // 128 or 256 draws on either side.
                assert!((0.7..1.4).contains(&ratio), "{key}: {ratio}");
            }
        }
    }
}

fn sorted(mut tensors: Vec<HostTensor>) -> Vec<HostTensor> {
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn native_folders_answer_as_in_peft(device: &Device) {
    for case in [&DETERMINED[..], &["init_orthogonal"]].concat() {
        let golden = golden(case);
        let mut model = base(case, device);
        load_pretrained(&mut model, &folder(case).join("adapter"), false)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let theirs = golden.floats("none.logits").values;
        let tolerance = if case.starts_with("init_pissa") {
            OWN_DECOMPOSITION
        } else {
            1e-5
        };
        assert_close(case, &answers(&model, &golden, device), &theirs, tolerance);
    }
}

fn converted_folders_answer_as_in_peft(device: &Device) {
    for case in [&DETERMINED[..], &[RANDOMISED]].concat() {
        let golden = golden(case);
        let mut model = base(case, device);
        load_pretrained(&mut model, &folder(case).join("converted"), false)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let theirs = golden.floats("none.logits.converted").values;
        assert_close(case, &answers(&model, &golden, device), &theirs, 1e-5);
    }
}

#[test]
fn a_native_folder_of_a_randomised_start_is_refused_by_name() {
    let mut model = base(RANDOMISED, &device("flex"));
    let error = load_pretrained(&mut model, &folder(RANDOMISED).join("adapter"), false)
        .expect_err("what was taken from the base cannot be known")
        .to_string();
    for part in ["pissa_niter_4", "path_initial_model_for_weight_conversion"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(export_trainable(&model).is_ok_and(|all| all.is_empty()));
}

/// The native folder with PEFT's initial factors where ours go.
fn with_start(case: &str) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    std::fs::create_dir(dir.path().join("initial_adapter")).expect("room on the disk");
    for (from, to) in [("adapter", ""), ("initial", "initial_adapter")] {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            copy(
                &folder(case).join(from).join(file),
                &dir.path().join(to).join(file),
            );
        }
    }
    dir
}

fn saved(model: &Model, config: &AdapterConfig, form: SaveForm) -> TempDir {
    let out = TempDir::new().expect("a temporary directory");
    save_pretrained_as(model, "default", config, &save_meta(), out.path(), form)
        .unwrap_or_else(|e| panic!("{e}"));
    out
}

fn read(dir: &Path) -> AdapterFile {
    AdapterFile::read(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn lora(file: &AdapterFile) -> &LoraConfig {
    match &file.config {
        AdapterConfig::Lora(config) => config,
        other => panic!("{}", other.peft_type()),
    }
}

#[test]
fn the_exchange_form_is_what_peft_converts_to() {
    let device = device("flex");
    for case in [&DETERMINED[..], &[RANDOMISED]].concat() {
        let theirs = read(&folder(case).join("converted"));
        let start = with_start(case);
        let native: PathBuf = folder(case).join("adapter");
        // With PEFT's start beside it to the bit; without, up to the signs of the vectors.
        for (dir, exact) in [(start.path(), true), (native.as_path(), false)] {
            if case == RANDOMISED && !exact {
                continue;
            }
            let mut model = base(case, &device);
            let loaded =
                load_pretrained(&mut model, dir, false).unwrap_or_else(|e| panic!("{case}: {e}"));
            let out = saved(&model, &loaded.config, SaveForm::Exchange);
            let ours = read(out.path());
            let (a, b) = (lora(&ours), lora(&theirs));
            assert_eq!(
                (a.r, a.use_rslora, &a.init_lora_weights),
                (b.r, b.use_rslora, &b.init_lora_weights),
                "{case}"
            );
            assert!(
                (a.lora_alpha - b.lora_alpha).abs() < 1e-12 * b.lora_alpha,
                "{case}"
            );
            assert_eq!(a.rank_pattern, b.rank_pattern, "{case}");
            let names = |f: &AdapterFile| -> Vec<(String, Vec<usize>)> {
                f.tensors
                    .iter()
                    .map(|(k, s, _)| (k.clone(), s.clone()))
                    .collect()
            };
            assert_eq!(names(&ours), names(&theirs), "{case}");
            if exact {
                assert_eq!(ours.tensors, theirs.tensors, "{case}");
            } else {
                let (a, b) = (
                    deltas(&ours.tensors, scale(a)),
                    deltas(&theirs.tensors, scale(b)),
                );
                compare_deltas(case, &a, &b);
            }
            assert!(!out.path().join("initial_adapter").exists());

            // And it answers as the native one does, on the untouched base.
            let golden = golden(case);
            let wanted = golden.floats("none.logits").values;
            let tolerance = if exact { 1e-5 } else { OWN_DECOMPOSITION };
            assert_close(case, &answers(&model, &golden, &device), &wanted, tolerance);
            detach(&mut model);
            load_pretrained(&mut model, out.path(), false)
                .unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_close(case, &answers(&model, &golden, &device), &wanted, tolerance);
        }
    }
}

#[test]
fn the_form_to_go_on_from_comes_back_to_the_bit() {
    let device = device("flex");
    for case in [&DETERMINED[..], &[RANDOMISED]].concat() {
        let golden = golden(case);
        let start = with_start(case);
        let mut model = base(case, &device);
        let loaded = load_pretrained(&mut model, start.path(), true)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let before = answers(&model, &golden, &device);
        let out = saved(&model, &loaded.config, SaveForm::Resume);
        assert_eq!(
            read(out.path()).tensors,
            read(&folder(case).join("adapter")).tensors,
            "{case}"
        );
        assert_eq!(
            read(&out.path().join("initial_adapter")).tensors,
            read(&folder(case).join("initial")).tensors,
            "{case}"
        );
        detach(&mut model);
        load_pretrained(&mut model, out.path(), true).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(answers(&model, &golden, &device), before, "{case}");
    }
}

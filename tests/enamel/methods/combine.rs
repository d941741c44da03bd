//! Combined adapters against PEFT's `add_weighted_adapter`: factors, deltas, logits, DARE's masks replayed.

use std::collections::BTreeMap;

use enamel_adapter::combine::{
    CombinationType, CombineOptions, Draw, LoraFactors, MajoritySign, combine_module,
};
use enamel_adapter::linalg::Matrix;
use enamel_adapter::{AdapterConfig, AdapterFile, LoraConfig, Targets, load_pretrained};
use serde_json::Value;
use tempfile::TempDir;

use crate::parity::llama::logits;
use crate::support::adapted::{base, folder, input};
use crate::support::devices::device;
use crate::support::goldens::{Floats, Tensors, assert_close, json};

const PREFIX: &str = "base_model.model.";

fn read(name: &str) -> AdapterFile {
    AdapterFile::read(&folder("combine").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn lora(file: &AdapterFile) -> &LoraConfig {
    match &file.config {
        AdapterConfig::Lora(config) => config,
        other => panic!("{} is no LoRA", other.peft_type()),
    }
}

/// Factors by module.
fn factors(file: &AdapterFile) -> BTreeMap<String, LoraFactors> {
    let config = lora(file);
    let matrix = |module: &str, part: &str| {
        let key = format!("{PREFIX}{module}.{part}.weight");
        let (_, shape, values) = file
            .tensors
            .iter()
            .find(|(k, ..)| *k == key)
            .expect("a factor");
        Matrix::new(shape[0], shape[1], values.clone()).expect("a matrix")
    };
    let modules = file.tensors.iter().filter_map(|(key, ..)| {
        let key = key.strip_prefix(PREFIX)?;
        key.strip_suffix(".lora_A.weight")
    });
    modules
        .map(|module| {
            let factors = LoraFactors {
                a: matrix(module, "lora_A"),
                b: matrix(module, "lora_B"),
                scale: config.lora_alpha / config.r as f64,
            };
            (module.to_owned(), factors)
        })
        .collect()
}

fn options(case: &Value) -> CombineOptions {
    let text = |key: &str| case[key].as_str();
    let list = case["weights"].as_array().expect("weights");
    let weights = list.iter().map(|w| w.as_f64().expect("a weight")).collect();
    let kind: CombinationType = text("combination_type")
        .expect("a type")
        .parse()
        .expect("a type");
    CombineOptions {
        density: case["density"].as_f64(),
        svd_rank: case["svd_rank"].as_u64().map(|r| r as usize),
        majority_sign: text("majority_sign_method")
            .map_or(MajoritySign::Total, |sign| sign.parse().expect("a method")),
        ..CombineOptions::new(kind, weights)
    }
}

/// A combined adapter as a file of its own.
fn as_file(r: usize, modules: &BTreeMap<String, LoraFactors>) -> AdapterFile {
    let tensors = modules.iter().flat_map(|(module, f)| {
        [("lora_A", &f.a), ("lora_B", &f.b)].map(|(part, m)| {
            let key = format!("{PREFIX}{module}.{part}.weight");
            (key, vec![m.rows(), m.cols()], m.data().to_vec())
        })
    });
    let config = LoraConfig {
        r,
        lora_alpha: r as f64,
        target_modules: Some(Targets::List(
            ["down_proj", "q_proj"].map(String::from).to_vec(),
        )),
        ..LoraConfig::default()
    };
    AdapterFile {
        tensors: tensors.collect(),
        config: config.into(),
        made: Default::default(),
    }
}

#[test]
fn every_combination_is_pefts() {
    let cases = json(&folder("combine").join("cases.json"));
    let cases = cases["cases"].as_object().expect("cases");
    let mut kinds: Vec<&str> = Vec::new();
    for (name, case) in cases {
        let options = options(case);
        kinds.push(options.kind.name());
        let list = case["adapters"].as_array().expect("adapters");
        let names: Vec<&str> = list.iter().map(|n| n.as_str().expect("a name")).collect();
        let files: Vec<AdapterFile> = names.iter().map(|n| read(n)).collect();
        let ranks: Vec<(&str, usize)> = names
            .iter()
            .zip(&files)
            .map(|(n, f)| (*n, lora(f).r))
            .collect();
        let plan = options
            .plan(&ranks)
            .unwrap_or_else(|e| panic!("{name}: {}", e.join("; ")));
        assert_eq!(Some(plan.rank() as u64), case["r"].as_u64(), "{name}");
        assert_eq!(case["r"], case["lora_alpha"], "{name}: a scale of 1");

        let golden = Tensors::open(folder("combine").join(format!("{name}.safetensors")));
        let mut drawn = 0;
        let mut masks = |draw: Draw<'_>, density: f64, count: usize| {
            drawn += 1;
            assert_eq!(density, 0.5);
            let part = draw.tensor.strip_suffix("_weight").unwrap_or(draw.tensor);
            let key = format!("{}.mask.{part}.{}", draw.module, names[draw.adapter]);
            let mask = golden.flags(&key);
            assert_eq!(mask.len(), count, "{name}: {key}");
            mask
        };
        let all: Vec<_> = files.iter().map(factors).collect();
        let modules: Vec<String> = all[0].keys().cloned().collect();
        let mut combined = BTreeMap::new();
        for module in &modules {
            let inputs: Vec<_> = all.iter().map(|adapter| adapter.get(module)).collect();
            let result = combine_module(&plan, module, &inputs, &mut masks)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let delta = result.delta().expect("a delta");
            // Values up to one. PEFT's singular value decomposition in f32 is up to 3.8e-6 from that in
            // f64.
            let tolerance = if options.kind.truncates() { 1e-5 } else { 1e-6 };
            let what = format!("{name}: {module}");
            let theirs = golden.floats(&format!("{module}.delta")).values;
            assert_close(&what, delta.data(), &theirs, tolerance);
            for (part, ours) in [("lora_A", &result.a), ("lora_B", &result.b)] {
                let key = format!("{module}.{part}");
                if !golden.has(&key) {
                    // The vectors' signs are the decomposition's choice.
                    assert!(options.kind.truncates(), "{name}: {key}");
                    continue;
                }
                let Floats { shape, values } = golden.floats(&key);
                assert_eq!(shape, [ours.rows(), ours.cols()], "{name}: {key}");
                assert_close(&format!("{name}: {key}"), ours.data(), &values, 1e-6);
            }
            combined.insert(module.clone(), result);
        }
        let stored = golden
            .names()
            .iter()
            .filter(|n| n.contains(".mask."))
            .count();
        assert_eq!(drawn, stored, "{name}: masks");

        // And the whole, through a directory.
        let dir = TempDir::new().expect("a temporary directory");
        let file = as_file(plan.rank(), &combined);
        file.write(dir.path(), None)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let device = device("flex");
        let mut model = base("several", &device);
        load_pretrained(&mut model, dir.path(), false).unwrap_or_else(|e| panic!("{name}: {e}"));
        let batch = Tensors::open(folder("combine").join("batch.safetensors"));
        let (input, _) = input(&batch, "", &device);
        let theirs = golden.floats("logits").values;
        let tolerance = if options.kind.truncates() { 3e-5 } else { 1e-5 };
        assert_close(
            &format!("{name}: logits"),
            &logits(&model, &input),
            &theirs,
            tolerance,
        );

        // Two of them PEFT has written as files as well.
        if folder("combine").join("saved").join(name).is_dir() {
            let theirs = read(&format!("saved/{name}"));
            let (a, b) = (lora(&file), lora(&theirs));
            assert_eq!((a.r, a.lora_alpha), (b.r, b.lora_alpha), "{name}");
            let sorted = |targets: &Option<Targets>| match targets {
                Some(Targets::List(list)) => {
                    let mut list = list.clone();
                    list.sort();
                    list
                }
                other => panic!("{name}: {other:?}"),
            };
            assert_eq!(
                sorted(&a.target_modules),
                sorted(&b.target_modules),
                "{name}"
            );
            assert_eq!(file.tensors.len(), theirs.tensors.len(), "{name}");
            for (ours, theirs) in file.tensors.iter().zip(&theirs.tensors) {
                assert_eq!((&ours.0, &ours.1), (&theirs.0, &theirs.1), "{name}");
                assert_close(&ours.0, &ours.2, &theirs.2, 1e-6);
            }
        }
    }
    for kind in CombinationType::ALL {
        assert!(kinds.contains(&kind.name()), "{} has a case", kind.name());
    }
}

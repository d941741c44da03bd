//! bf16 bases through the library and through `enamel train`.

use std::fs;

use burn::tensor::{DType, Device};
use enamel_kernels::{Compute, CpuPath, HostValues};
use enamel_model::ArchConfig;
use enamel_model::Model;
use enamel_model::ModelInput;
use enamel_model::checkpoint::{Checkpoint, TensorSource};

use crate::parity::llama::{ids, logits};
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Tensors, assert_close, fixtures};

const DATA: &str = "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128";
const TRAIN: &str = "max_steps = 8\nbatch_size = 2\nlearning_rate = 5e-3\nlogging_steps = 1\n\
                     eval_strategy = \"steps\"\neval_steps = 4\nsave_steps = 4\nsamples = 0";

#[test]
fn a_bf16_run_says_so_and_resumed_ends_at_the_same_bits() {
    let workshop = Workshop::new();
    for (method, file) in [
        ("lora", "adapter/adapter_model.safetensors"),
        ("full", "model/model.safetensors"),
    ] {
        let adapter = format!("method = \"{method}\"");
        workshop.recipe("b.toml", &adapter, DATA, TRAIN);
        let bf16 = ["--compute-dtype", "bf16"];
        let plan = workshop.run(&[&["plan", "b.toml"][..], &bf16].concat());
        assert!(plan.contains("compute    bf16: bf16 weights"), "{plan}");
        let whole = ["train", "b.toml", "--output", "whole", "--overwrite"];
        workshop.run(&[&whole[..], &bf16].concat());
        let result = fs::read(workshop.path("whole").join(file)).expect("a result");
        let report = fs::read_to_string(workshop.path("whole/report.html")).expect("a report");
        assert!(report.contains("bf16: bf16 weights"));
        let _ = fs::remove_dir_all(workshop.path("parts"));
        let from = workshop.path("whole/checkpoints/step-000004");
        let from = from.display().to_string();
        let parts = ["train", "b.toml", "--output", "parts", "--resume", &from];
        workshop.run(&[&parts[..], &bf16].concat());
        let resumed = fs::read(workshop.path("parts").join(file)).expect("a result");
        assert!(result == resumed, "{method}: the interruption shows");
    }
}

#[test]
fn a_gguf_file_is_rounded_as_it_is_loaded() {
    let path = fixtures().join("gguf/bias.gguf");
    let checkpoint = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let config = ArchConfig::from_json(checkpoint.config_json()).unwrap_or_else(|e| panic!("{e}"));
    let device = Device::flex();
    let golden = Tensors::open(fixtures().join("gguf/bias.safetensors"));
    let input = ModelInput::new(ids(&golden.rows("input_ids"), &device));
    for compute in [Compute::F32, Compute::Bf16] {
        let model = Model::load_for(&config, &checkpoint, &device, &compute.into())
            .unwrap_or_else(|e| panic!("{e}"));
        let held = model.head_weight().values().dtype();
        let kernels = CpuPath::chosen() != CpuPath::Reference;
        assert_eq!(held == DType::BF16, compute == Compute::Bf16 && kernels);
        let name = match model.head.linear() {
            Some(_) => "lm_head.weight",
            None => "model.embed_tokens.weight",
        };
        let stored = HostValues::F32(checkpoint.read_f32(name).unwrap_or_else(|e| panic!("{e}")));
        let want = match compute {
            Compute::F32 => stored,
            Compute::Bf16 => stored.rounded(),
        };
        let head = model.head_weight().dense().into_data();
        assert!(head.iter::<f32>().eq(want.into_f32()));
        // Weights off by 2⁻⁹ of themselves move logits of order one by hundredths, up to a tenth.
        let tolerance = match compute {
            Compute::F32 => 1e-5,
            Compute::Bf16 => 0.2,
        };
        let got = logits(&model, &input);
        assert_close("bias", &got, &golden.floats("logits").values, tolerance);
    }
}

//! Models written in bitsandbytes' format: what bitsandbytes would have written, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use enamel_kernels::quantized::formats::{
    Absmax, FloatKind, FourBitOptions, FourBitTensor, Int8Rows,
};
use enamel_kernels::{PackedRows, PackedWeight};
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::save::bitsandbytes::write_bitsandbytes;
use enamel_model::save::{SaveDtype, SaveOptions};
use enamel_model::{ArchConfig, Format};
use safetensors::{Dtype, SafeTensors};

use crate::cli::adapter::path;
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{fixtures, json};

type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a directory as they lie in its files.
fn stored(folder: &Path) -> Stored {
    let mut all = Stored::new();
    for entry in fs::read_dir(folder).expect("a directory") {
        let file = entry.expect("an entry").path();
        if file.extension().is_none_or(|end| end != "safetensors") {
            continue;
        }
        let bytes = fs::read(&file).expect("a file");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        all.extend(tensors.tensors().into_iter().map(|(name, view)| {
            let part = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name, part)
        }));
    }
    all
}

#[test]
fn int8_is_bit_for_bit_what_bitsandbytes_writes() {
    let workshop = Workshop::new();
    let dense = fixtures().join("bnb/dense");
    workshop.run(&[
        "quantize",
        path(&dense),
        "--output",
        "out",
        "--load-in-8bit",
    ]);
    let theirs = fixtures().join("bnb/int8");
    let (ours, golden) = (stored(&workshop.path("out")), stored(&theirs));
    let names = |all: &Stored| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&golden));
    for (name, tensor) in &golden {
        assert!(&ours[name] == tensor, "{name}");
    }
    let settings = |dir: &Path| json(&dir.join("config.json"))["quantization_config"].clone();
    assert_eq!(settings(&workshop.path("out")), settings(&theirs));
}

/// The 4-bit golden is of other weights, so here only what is beside them is compared.
#[test]
fn four_bits_have_the_tensors_and_settings_of_bitsandbytes() {
    let workshop = Workshop::new();
    let dense = fixtures().join("bnb/dense");
    for (kind, more) in [("nf4", &["--bnb-4bit-use-double-quant"][..]), ("fp4", &[])] {
        let mut arguments = vec![
            "quantize",
            path(&dense),
            "--output",
            kind,
            "--bnb-4bit-quant-type",
            kind,
            "--dtype",
            "f32",
        ];
        arguments.extend(more);
        workshop.run(&arguments);
        let theirs = fixtures().join("bnb").join(kind);
        let (ours, golden) = (stored(&workshop.path(kind)), stored(&theirs));
        let shapes = |all: &Stored| {
            let one = |(name, (dtype, shape, _)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| {
                // The length of the state depends on the digits of its offset.
                let shape = match name.contains("quant_state") {
                    true => Vec::new(),
                    false => shape.clone(),
                };
                (name.clone(), *dtype, shape)
            };
            all.iter().map(one).collect::<Vec<_>>()
        };
        assert_eq!(shapes(&ours), shapes(&golden), "{kind}");
        for (name, tensor) in golden
            .iter()
            .filter(|(name, _)| name.ends_with("quant_map"))
        {
            assert!(&ours[name] == tensor, "{name}");
        }
        let settings = |dir: &Path| json(&dir.join("config.json"))["quantization_config"].clone();
        assert_eq!(settings(&workshop.path(kind)), settings(&theirs));
    }
}

#[test]
fn what_is_written_reads_back_as_the_same_rows_in_any_sharding() {
    let workshop = Workshop::new();
    let source = Checkpoint::open(&fixtures().join("bnb/dense")).expect("a sound model");
    let config = ArchConfig::from_json(source.config_json()).expect("a sound configuration");
    let skip = ["down_proj".to_owned()];
    let four = |kind: &str, block, double| Format::FourBit {
        kind: enamel_kernels::quantized::formats::FourBit::from_name(kind).expect("a type"),
        block,
        double,
        compute: FloatKind::F32,
    };
    for (i, format) in [
        four("nf4", 64, false),
        four("nf4", 32, true),
        four("fp4", 128, true),
        Format::Int8 { threshold: 6.0 },
    ]
    .into_iter()
    .enumerate()
    {
        for (shard_bytes, files) in [(u64::MAX, 1), (3000, 11)] {
            let out = workshop.path(&format!("out-{i}-{files}"));
            let options = SaveOptions {
                shard_bytes,
                ..SaveOptions::new(SaveDtype::BF16)
            };
            let written = write_bitsandbytes(&out, &source, &config, format, &skip, &options)
                .expect("what can be written");
            assert_eq!((written.layers, written.skipped), (6, 1));
            let shards = written.saved.files.iter();
            let shards = shards.filter(|f| f.ends_with(".safetensors")).count();
            assert_eq!(shards > 1, files > 1);
            let read = Checkpoint::open(&out).expect("a sound checkpoint");
            assert_eq!(read.tensors().len(), source.tensors().len());
            for info in source.tensors() {
                let name = &info.name;
                let values = source.read_f32(name).expect("values");
                let packed = read.read_packed(name).expect("sound");
                let dense = !name.contains("_proj") || name.contains("down_proj");
                assert_eq!(packed.is_none(), dense, "{name}");
                let Some(packed) = packed else {
                    assert_eq!(read.read_f32(name).expect("values"), values, "{name}");
                    continue;
                };
                let wanted = match format {
                    Format::FourBit {
                        kind,
                        block,
                        double,
                        ..
                    } => {
                        let options = FourBitOptions {
                            kind,
                            block,
                            double,
                            dtype: FloatKind::Bf16,
                        };
                        let tensor = FourBitTensor::quantise(&values, &info.shape, options);
                        let tensor = tensor.expect("finite values");
                        let nested = matches!(tensor.absmax(), Absmax::Nested { .. });
                        assert_eq!(nested, double);
                        PackedRows::FourBit(tensor)
                    }
                    Format::Int8 { threshold } => PackedRows::Int8 {
                        // f16 holds small numbers of bf16 only rounded.
                        rows: Int8Rows::quantise(
                            &values
                                .iter()
                                .map(|v| FloatKind::F16.round(*v))
                                .collect::<Vec<_>>(),
                            [info.shape[0], info.shape[1]],
                        )
                        .expect("finite values"),
                        threshold,
                    },
                };
                assert_eq!(packed, wanted, "{name}");
            }
        }
    }
}

/// The weights were bf16, which none of these but one computes in.
#[test]
fn a_directory_made_dense_has_the_values_that_its_packed_products_read() {
    let workshop = Workshop::new();
    let source = Checkpoint::open(&fixtures().join("bnb/dense")).expect("a sound model");
    let config = ArchConfig::from_json(source.config_json()).expect("a sound configuration");
    let mut rounded = 0;
    for compute in [FloatKind::F32, FloatKind::Bf16, FloatKind::F16] {
        let out = workshop.path(&format!("{compute:?}"));
        let format = Format::FourBit {
            kind: enamel_kernels::quantized::formats::FourBit::Nf4,
            block: 64,
            double: false,
            compute,
        };
        let options = SaveOptions::new(SaveDtype::BF16);
        write_bitsandbytes(&out, &source, &config, format, &[], &options).expect("written");
        let read = Checkpoint::open(&out).expect("a sound checkpoint");
        assert_eq!(read.packed_compute(), compute);
        for name in read.packed().into_keys() {
            let rows = read.read_packed(&name).expect("sound").expect("packed");
            let device = burn::tensor::Device::flex();
            let packed = PackedWeight::new(rows, compute, &device).expect("a matrix");
            let (dense, packed) = (read.read_f32(&name).expect("values"), packed.values());
            assert!(dense == packed, "{name} in {compute:?}");
            let bf16 = dense.iter().filter(|v| FloatKind::Bf16.round(**v) == **v);
            rounded += usize::from(bf16.count() == dense.len());
        }
    }
    // In bf16 alone are they numbers of bf16.
    assert_eq!(rounded, 7);
}

#[test]
fn a_gguf_file_becomes_a_directory_that_answers() {
    let workshop = Workshop::new();
    let gguf = fixtures().join("gguf/untied.gguf");
    let said = workshop.run(&[
        "quantize",
        path(&gguf),
        "--output",
        "out",
        "--bnb-4bit-blocksize",
        "32",
        "--skip-modules",
        "k_proj,v_proj",
    ]);
    assert!(
        said.contains("nf4") && said.contains("left as they are"),
        "{said}"
    );
    let config = json(&workshop.path("out/config.json"));
    assert_eq!(
        config["quantization_config"]["llm_int8_skip_modules"],
        serde_json::json!(["k_proj", "v_proj", "lm_head"])
    );
    assert!(workshop.path("out/tokenizer.json").is_file());
    let answer = [
        "generate",
        "--model",
        "out",
        "--prompt",
        "1+1?",
        "--max-new-tokens",
        "2",
        "--device",
        "flex",
    ];
    workshop.run(&answer);
}

#[test]
fn what_cannot_be_quantised_is_refused_whole_and_leaves_nothing() {
    let workshop = Workshop::new();
    let dense = fixtures().join("bnb/dense");
    let refuse = |model: &Path, more: &[&str]| {
        let mut arguments = vec!["quantize", path(model), "--output", "out"];
        arguments.extend(more);
        workshop.fail(&arguments)
    };
    let text = refuse(
        &dense,
        &["--bnb-4bit-blocksize", "4096", "--skip-modules", "up_prj"],
    );
    // k_proj and v_proj have 2048 weights, q_proj 4096.
    for part in [
        "k_proj.weight",
        "v_proj.weight",
        "blocks of 4096",
        "did you mean up_proj?",
        // As it was written, which a recipe writes otherwise.
        "(--skip-modules)",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("q_proj.weight"), "{text}");
    let text = refuse(&dense, &["--bnb-4bit-blocksize", "48"]);
    assert!(text.contains("48 is not one of"), "{text}");
    let text = refuse(&dense, &["--skip-modules", "model.layers.0"]);
    assert!(text.contains("every linear layer is skipped"), "{text}");
    let text = refuse(&fixtures().join("bnb/nf4"), &[]);
    assert!(text.contains("quantised it already"), "{text}");
    let names = || -> Vec<_> {
        let entries = fs::read_dir(workshop.path(".")).expect("a directory");
        entries.map(|e| e.expect("an entry").file_name()).collect()
    };
    let left = names();
    assert!(
        left.iter()
            .all(|n| n != "out" && !n.to_string_lossy().starts_with(".saving")),
        "{left:?}"
    );
    let unknown = workshop.output(&[
        "quantize",
        path(&dense),
        "--output",
        "out",
        "--bnb-4bit-quant-type",
        "nf5",
    ]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nf4"));
}

#[test]
fn an_output_that_is_there_is_kept_unless_it_may_be_overwritten() {
    let workshop = Workshop::new();
    let dense = fixtures().join("bnb/dense");
    fs::create_dir(workshop.path("out")).expect("room on the disk");
    fs::write(workshop.path("out/mine.txt"), "x").expect("room on the disk");
    let arguments = ["quantize", path(&dense), "--output", "out", "--overwrite"];
    let text = workshop.fail(&arguments[..4]);
    assert!(text.contains("something already"), "{text}");
    assert!(workshop.path("out/mine.txt").is_file());
    // Nothing but a model is replaced.
    let text = workshop.fail(&arguments);
    assert!(text.contains("holds more"), "{text}");
    fs::rename(
        workshop.path("out/mine.txt"),
        workshop.path("out/config.json"),
    )
    .expect("ours");
    workshop.run(&arguments);
    assert!(Checkpoint::open(&workshop.path("out")).is_ok());
}

#[test]
fn the_plan_says_why_a_quantised_base_is_held_dense() {
    let workshop = Workshop::new();
    workshop.run(&[
        "quantize",
        "model",
        "--output",
        "packed",
        "--bnb-4bit-blocksize",
        "32",
    ]);
    fs::remove_dir_all(workshop.path("model")).expect("ours");
    fs::rename(workshop.path("packed"), workshop.path("model")).expect("ours");
    let data = "train = \"train.jsonl\"\nmax_length = 128";
    for (adapter, why) in [
        ("method = \"full\"", "full fine-tuning trains them"),
        ("init_lora_weights = \"pissa\"", "takes a part out of them"),
        (
            "target_modules = [\"q_proj\"]\nmodules_to_save = [\"down_proj\"]",
            "modules_to_save trains model.layers.0.mlp.down_proj",
        ),
    ] {
        workshop.recipe("recipe.toml", adapter, data, "max_steps = 1");
        let said = workshop.run(&["plan", "recipe.toml"]);
        assert!(
            said.contains("dense, though its files have it quantised") && said.contains(why),
            "{said}"
        );
    }
    workshop.recipe("recipe.toml", "r = 4", data, "max_steps = 1");
    let said = workshop.run(&["plan", "recipe.toml"]);
    assert!(!said.contains("though its files"), "{said}");
}

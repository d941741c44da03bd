//! `train.optim`: 8-bit and paged AdamW through `enamel train`, killed and resumed.

use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::cli::methods::DATA;
use crate::support::enamel_process::{Workshop, said, signal, wait_for};

/// Of each pair of factors, one of 1024 elements, which keeps f32, and one of 102400, large enough for moments
/// in 8 bits and in pages.
const ADAPTER: &str = "r = 32\nlora_dropout = 0.1\ntarget_modules = [\"gate_proj\"]";
const TRAIN: &str = "max_steps = 60\nbatch_size = 2\nlearning_rate = 5e-3\nlogging_steps = 1\n\
                     eval_strategy = \"steps\"\neval_steps = 20\nsave_steps = 5\nsamples = 0";
const ALL: [&str; 4] = [
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
];

/// The tiny model with a feed-forward part fifty times as wide.
fn workshop() -> Workshop {
    let workshop = Workshop::new();
    workshop.recipe("o.toml", ADAPTER, DATA, TRAIN);
    let (config, weights) = ("model/config.json", "model/model.safetensors");
    let read = |file: &str| fs::read(workshop.path(file)).expect("the tiny model");
    let mut json: Value = serde_json::from_slice(&read(config)).expect("JSON");
    json["intermediate_size"] = Value::from(3200);
    fs::write(workshop.path(config), json.to_string()).expect("room on the disk");

    let narrow = read(weights);
    let narrow = SafeTensors::deserialize(&narrow).expect("the tiny model");
    let widened = narrow.tensors().into_iter().map(|(name, view)| {
        let shape = view.shape().iter();
        let shape: Vec<usize> = shape.map(|n| if *n == 64 { 3200 } else { *n }).collect();
        // Rows or columns of it over and over, with signs that keep the sums small.
        let values = view.data().chunks(4).cycle().enumerate();
        let values = values.map(|(i, v)| {
            let v = f32::from_le_bytes(v.try_into().expect("four bytes"));
            if view.shape() != shape && i % 7 < 3 {
                -v
            } else {
                v
            }
        });
        let values: Vec<u8> = values
            .take(shape.iter().product())
            .flat_map(f32::to_le_bytes)
            .collect();
        (name, shape, values)
    });
    let widened: Vec<_> = widened.collect();
    let views = widened.iter().map(|(name, shape, values)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), values);
        (name.clone(), view.expect("whole tensors"))
    });
    let file = safetensors::serialize(views, None).expect("a file");
    fs::write(workshop.path(weights), file).expect("room on the disk");
    workshop
}

/// Names in a run directory that are nobody's to see.
fn hidden(workshop: &Workshop, run: &str) -> Vec<String> {
    let entries = fs::read_dir(workshop.path(run)).expect("a run directory");
    entries
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| name.starts_with('.'))
        .collect()
}

#[test]
fn each_optimizer_killed_and_resumed_ends_at_the_same_bits_paged_or_not() {
    let workshop = workshop();
    for optim in ALL {
        let set = format!("train.optim={optim}");
        let train = |run: &'static str, more: &'static str| {
            let mut arguments = vec!["train", "o.toml", "--output", run, "--set", &set];
            arguments.extend([more].iter().filter(|m| !m.is_empty()));
            arguments.into_iter().map(String::from).collect::<Vec<_>>()
        };
        let run = |arguments: &[String]| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            workshop.run(&arguments)
        };
        let whole = format!("whole-{optim}");
        run(&train("whole", "--overwrite"));
        fs::rename(workshop.path("whole"), workshop.path(&whole)).expect("room on the disk");

        let _ = fs::remove_dir_all(workshop.path("parts"));
        let arguments = train("parts", "");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = workshop
            .command(&arguments)
            .spawn()
            .expect("the binary runs");
        let seen = workshop.path("parts/checkpoints/step-000010");
        assert!(wait_for(&seen, &mut child), "{optim}: it ended before");
        signal(&child, "KILL");
        let output = child.wait_with_output().expect("a child of ours");
        assert!(!output.status.success(), "{}", said(&output));
        // As if it had been killed in the instant in which the paged file still has a name.
        let id = crate::runs::directory::id(&workshop, "parts");
        let paged = workshop.path(&format!("parts/.optimizer-{id}-x"));
        fs::write(paged, "x").expect("room on the disk");
        run(&train("parts", "--resume"));
        assert!(
            workshop.adapter(&whole) == workshop.adapter("parts"),
            "{optim}: the interruption shows"
        );
        assert_eq!(hidden(&workshop, "parts"), [""; 0], "{optim}");
    }
    let end = |optim: &str| workshop.adapter(&format!("whole-{optim}"));
    assert!(end("adamw_torch") == end("paged_adamw_32bit"));
    assert!(end("adamw_8bit") == end("paged_adamw_8bit"));
    assert!(end("adamw_torch") != end("adamw_8bit"));

    let size = |optim: &str| {
        let file = format!("whole-{optim}/checkpoints/step-000060/optimizer.bpk");
        fs::metadata(workshop.path(&file)).expect("a state").len() as f64
    };
    assert!(size("adamw_8bit") < 0.3 * size("adamw_torch"));

    let last = |optim: &str| {
        let valid = workshop.metrics(&format!("whole-{optim}"), "valid");
        let loss = |i: usize| valid[i]["loss"].as_f64().expect("a number");
        (loss(0), loss(valid.len() - 1))
    };
    let ((first, full), (_, eight)) = (last("adamw_torch"), last("adamw_8bit"));
    // 8-bit moments learn what f32 ones do: of what the loss falls, a tenth may differ.
    assert!(
        (full - eight).abs() < 0.1 * (first - full),
        "{first} {full} {eight}"
    );
}

#[test]
fn resuming_with_another_optimizer_names_both_and_changes_nothing() {
    let workshop = workshop();
    let short = ["--set", "train.max_steps=6"];
    let start = [
        "train",
        "o.toml",
        "--output",
        "run",
        "--set",
        "train.optim=adamw_bnb_8bit",
    ];
    workshop.run(&[&start[..], &short].concat());
    let lock = || fs::read_to_string(workshop.path("run/recipe.lock.toml")).expect("a lock");
    let before = lock();
    assert!(before.contains("optim = \"adamw_8bit\""), "{before}");
    // Of a run that has ended, and of one that was killed before its end.
    for file in ["recipe.lock.toml", "optimizer.bpk"] {
        for other in ["adamw_torch", "paged_adamw_8bit"] {
            let set = format!("train.optim={other}");
            let again = [
                "train", "o.toml", "--output", "run", "--resume", "--set", &set,
            ];
            let error = workshop.fail(&[&again[..], &short].concat());
            for part in ["\"adamw_8bit\"", &format!("\"{other}\""), file, "help:"] {
                assert!(error.contains(part), "{error}");
            }
        }
        let _ = fs::remove_file(workshop.path("run/summary.json"));
    }
    assert_eq!(lock(), before);
    let error = workshop.fail(&["plan", "o.toml", "--set", "train.optim=adafactor"]);
    assert!(
        error.contains("train.optim") && error.contains("`adamw_8bit`"),
        "{error}"
    );
}

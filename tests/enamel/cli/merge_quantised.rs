//! `enamel merge` of adapters that were trained on a quantised base.

use std::fs;

use crate::cli::adapter::{fixture, path};
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{
    Generation, Tensors, assert_close, json, largest_difference, stage_into,
};

/// The numbers of NF4 (table in appendix E of the QLoRA paper).
#[allow(clippy::excessive_precision)]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// Each value of a block of 64 becomes the nearest number times the block's largest magnitude.
fn nf4(values: &[f32]) -> Vec<f32> {
    let blocks = values.chunks(64).flat_map(|block| {
        let absmax = block.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        block.iter().map(move |x| {
            let distance = |number: &f32| (x / absmax - number).abs();
            let near = NF4
                .iter()
                .min_by(|a, b| distance(a).total_cmp(&distance(b)));
            near.expect("sixteen numbers") * absmax
        })
    });
    blocks.collect()
}

fn is_quantised(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

const FORMAT: &str = "load_in_4bit = true";

/// A short run on a base in NF4 in `run/`.
fn trained(workshop: &Workshop, run: &str, quantization: &str) -> String {
    let recipe = workshop.recipe(
        "recipe.toml",
        &format!("r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"\n[model.quantization]\n{quantization}"),
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 6\nbatch_size = 4\nlearning_rate = 5e-3",
    );
    workshop.run(&["train", path(&recipe), "--no-tui", "--output", run]);
    format!("{run}/adapter")
}

fn merge(workshop: &Workshop, output: &str, more: &[&str]) -> (Tensors, String) {
    let arguments = ["merge", "--output", output, "--device", "flex"];
    let said = workshop.run(&[&arguments, more].concat());
    let written = workshop.path(output).join("model.safetensors");
    (Tensors::open(written), said)
}

#[test]
fn merging_into_the_dequantised_base_adds_the_same_to_its_values() {
    let workshop = Workshop::new();
    let adapter = fixture("methods/loha/adapter");
    let common = ["--model", "model", "--adapter", path(&adapter)];
    let common = [&common[..], &["--no-check", "--load-in-4bit"]].concat();
    let with = |more: &[&'static str]| [&common[..], more].concat();
    let base = Tensors::open(workshop.path("model/model.safetensors"));
    let (dense, _) = merge(&workshop, "dense", &common);
    let (onto, said) = merge(&workshop, "onto", &with(&["--into", "dequantized"]));
    assert!(said.contains("into        dequantized\n"), "{said}");
    let (again, said) = merge(&workshop, "again", &with(&["--requantize"]));
    assert!(said.contains("into        dense, requantized\n"), "{said}");
    let mut changed = 0;
    for name in base.names() {
        let values = |from: &Tensors| from.floats(&name).values;
        let (w, dense) = (values(&base), values(&dense));
        let (onto, again) = (values(&onto), values(&again));
        if !is_quantised(&name) {
            assert_eq!((&onto, &again), (&dense, &dense), "{name}");
            continue;
        }
        let wanted: Vec<f32> = nf4(&w)
            .iter()
            .zip(w.iter().zip(&dense))
            .map(|(q, (w, merged))| q + (merged - w))
            .collect();
        changed += usize::from(largest_difference(&wanted, &dense).0 > 1e-3);
        // Values below 1, added and rounded three times.
        assert_close(&name, &onto, &wanted, 1e-6);
        assert_close(&name, &again, &nf4(&dense), 1e-6);
    }
    assert_eq!(changed, 14);
}

#[test]
fn a_run_on_a_quantised_base_merges_with_the_drift_of_every_choice() {
    let workshop = Workshop::new();
    let adapter = trained(&workshop, "run", FORMAT);
    let arguments = ["--adapter", adapter.as_str(), "--rows", "3"];
    let (_, said) = merge(&workshop, "merged", &arguments);
    assert!(said.contains("into        dense\n"), "{said}");
    assert!(said.contains("trained on  nf4 in blocks of 64"), "{said}");
    assert!(said.contains("3 validation rows of"), "{said}");
    let report = json(&workshop.path("merged/merge_report.json"));
    assert_eq!(report["chosen"]["base"], "dense");
    let drift = &report["logit_drift"];
    assert_eq!(drift["rows"], 3);
    let choices = drift["choices"].as_array().expect("choices");
    let of = |base: &str, requantized: bool, number: &str| {
        let choice = choices
            .iter()
            .find(|c| c["base"] == base && c["requantized"] == requantized);
        let choice = choice.unwrap_or_else(|| panic!("{base} {requantized} is missing"));
        choice[number].as_f64().expect("a number")
    };
    // What was trained, but for W + s·B·A being rounded once: logits are below 10.
    assert!(of("dequantized", false, "max_abs_logit_diff") < 1e-4);
    assert!(of("dequantized", false, "mean_kl") < 1e-8);
    for (base, requantized) in [("dense", false), ("dense", true), ("dequantized", true)] {
        assert!(of(base, requantized, "max_abs_logit_diff") > 1e-2, "{base}");
        assert!(of(base, requantized, "mean_kl") > 1e-6, "{base}");
        let (mean, max) = ("mean_abs_logit_diff", "max_abs_logit_diff");
        assert!(of(base, requantized, mean) < of(base, requantized, max));
        assert!(of(base, requantized, "same_argmax") <= 1.0);
    }
    // The same table before anything is written.
    let table = |said: &str| -> Vec<String> {
        let from = said.find("merge into").expect("a table");
        let lines = said[from..].lines().skip(1).take(4);
        lines.map(|line| line.replace('*', " ")).collect()
    };
    let compared = workshop.run(&[&["merge", "--compare-bases"], &arguments[..]].concat());
    assert_eq!(table(&compared), table(&said));
    assert!(!compared.contains("written"), "{compared}");
    // Data that have gone do not stand in the way.
    fs::remove_file(workshop.path("valid.jsonl")).expect("the rows");
    let (_, said) = merge(&workshop, "later", &arguments);
    assert!(said.contains("the built-in check row ("), "{said}");
    let bytes = |output: &str| fs::read(workshop.path(output).join("model.safetensors"));
    let (merged, later) = (bytes("merged"), bytes("later"));
    assert_eq!(merged.expect("a file"), later.expect("a file"));
}

#[test]
fn a_tied_head_int8_rows_and_bf16_results_keep_near_to_what_was_trained() {
    let workshop = Workshop::new();
    stage_into("tied", Generation::Five, &workshop.path("model"));
    let format = "load_in_8bit = true\nskip_modules = [\"down_proj\"]";
    let recipe = workshop.recipe(
        "recipe.toml",
        &format!("r = 4\nmodules_to_save = [\"embed_tokens\"]\n[model.quantization]\n{format}"),
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 6\nbatch_size = 4\nlearning_rate = 5e-3",
    );
    workshop.run(&["train", path(&recipe), "--no-tui"]);
    let more = ["--adapter", "run/adapter", "--into", "dequantized"];
    let (_, said) = merge(
        &workshop,
        "out",
        &[&more[..], &["--dtype", "bf16"]].concat(),
    );
    assert!(said.contains("trained on  int8 rows"), "{said}");
    let config = json(&workshop.path("out/config.json"));
    assert_eq!(config["tie_word_embeddings"], false);
    let report = json(&workshop.path("out/merge_report.json"));
    let choices = &report["logit_drift"]["choices"];
    let worst = |i: usize| choices[i]["mean_abs_logit_diff"].as_f64().expect("it");
    assert_eq!(choices[2]["base"], "dequantized");
    assert!(worst(2) < worst(0), "dequantized is nearer than dense");
}

#[test]
fn a_choice_that_needs_an_unknown_format_is_refused_with_all_reasons() {
    let workshop = Workshop::new();
    let alone = fixture("methods/loha/adapter");
    let want = ["--into", "dequantized", "--requantize", "--output", "out"];
    let refused = |more: &[&str]| {
        let said = workshop.fail(&[&["merge", "--model", "model"], &want[..], more].concat());
        assert!(!workshop.path("out").exists(), "nothing is written");
        said
    };
    let said = refused(&["--adapter", path(&alone)]);
    for words in [
        "--into dequantized and --requantize need",
        "there is no recipe.lock.toml beside the adapter",
        "--load-in-4bit",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let dense = trained(&workshop, "dense-run", "dequantize = false");
    let said = refused(&["--adapter", &dense]);
    assert!(said.contains("has no [model.quantization]"), "{said}");
    let four = trained(&workshop, "four-run", FORMAT);
    let said = refused(&["--adapter", &dense, "--adapter", &four]);
    assert!(said.contains("held differently"), "{said}");
    assert!(
        said.contains("dense-run") && said.contains("four-run"),
        "{said}"
    );
    let lock = workshop.path("four-run/recipe.lock.toml");
    fs::write(&lock, "seed = \"none\"\n").expect("room on the disk");
    let said = refused(&["--adapter", &four]);
    assert!(said.contains("recipe.lock.toml"), "{said}");
    // What needs no format goes on, and says what it could not read.
    let (_, said) = merge(
        &workshop,
        "plain",
        &["--model", "model", "--adapter", &four],
    );
    assert!(said.contains("note        "), "{said}");
}

//! Every architecture through the program: trained with every method, merged, used, planned for.

use std::fs;

use crate::support::enamel_process::Workshop;
use crate::support::goldens::{FAMILIES, Tensors, fixtures, json};

/// A workshop whose model is of another architecture; the tokenizer stays.
fn workshop(family: &str) -> Workshop {
    let workshop = Workshop::new();
    for file in ["config.json", "model.safetensors"] {
        let from = fixtures().join("families").join(family).join(file);
        fs::copy(from, workshop.path("model").join(file)).expect("room on the disk");
    }
    workshop
}

const METHODS: [&str; 9] = [
    "r = 2\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1",
    "r = 2\ntarget_modules = \"all-linear\"\nuse_dora = true",
    "method = \"loha\"\nr = 2\ntarget_modules = \"all-linear\"",
    "method = \"lokr\"\nr = 2\ntarget_modules = \"all-linear\"",
    "method = \"adalora\"\ninit_r = 4\ntarget_r = 2\ntarget_modules = \"all-linear\"",
    "method = \"vera\"\nr = 4\ntarget_modules = \"all-linear\"",
    "method = \"miss\"\nr = 5\ntarget_modules = \"all-linear\"",
    "method = \"miss\"\nr = 4\ninit_weights = \"bat\"\ntarget_modules = \"all-linear\"",
    // PEFT's own choice of modules for the type.
    "r = 2",
];

fn recipe(workshop: &Workshop, adapter: &str) {
    workshop.recipe(
        "recipe.toml",
        adapter,
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 64",
        "max_steps = 6\nbatch_size = 2\nlearning_rate = 1e-2\nsamples = 1\nmax_new_tokens = 4",
    );
}

#[test]
fn every_method_trains_and_merges_on_every_architecture() {
    for family in FAMILIES {
        for method in METHODS {
            let workshop = workshop(family);
            recipe(&workshop, method);
            let words = workshop.told(&["train", "recipe.toml"]);
            let losses = workshop.metrics("run", "valid");
            let loss = |at: usize| losses[at]["loss"].as_f64().expect("a loss");
            let learned = loss(losses.len() - 1) < loss(0);
            assert!(learned, "{family}, {method}: {losses:?}\n{words}");
            // Merging compares the adapted and the merged model's logits by itself.
            let merge = ["merge", "--model", "model", "--adapter", "run/adapter"];
            workshop.success(&[&merge[..], &["--output", "merged"]].concat());
            let answer = |more: &[&str]| {
                let ask = [
                    "generate",
                    "--prompt",
                    "2+3?",
                    "--max-new-tokens",
                    "6",
                    "--device",
                    "flex",
                ];
                workshop.run(&[&ask[..], more].concat())
            };
            let merged = answer(&["--model", "merged"]);
            let beside = answer(&["--model", "model", "--adapter", "run/adapter"]);
            assert_eq!(merged, beside, "{family}, {method}");
        }
    }
}

#[test]
fn all_of_a_model_may_be_trained() {
    for family in FAMILIES {
        let workshop = workshop(family);
        recipe(&workshop, "method = \"full\"");
        workshop.success(&["train", "recipe.toml"]);
        let ask = [
            "generate",
            "--prompt",
            "2+3?",
            "--max-new-tokens",
            "4",
            "--device",
            "flex",
        ];
        workshop.success(&[&ask[..], &["--model", "run/model"]].concat());
        let [before, after] = ["model", "run/model"]
            .map(|model| Tensors::open(workshop.path(model).join("model.safetensors")));
        assert_eq!(after.names(), before.names(), "{family}");
        // Biases of norms are trained and saved like all else.
        for name in before.names() {
            let moved = after.floats(&name).values != before.floats(&name).values;
            assert!(moved, "{family}: {name}");
        }
    }
}

/// GPT-2 has two tables, and its head is one of them.
#[test]
fn an_adapted_table_that_is_not_the_head_is_merged_by_its_own_name_and_unties_nothing() {
    let workshop = workshop("gpt2");
    recipe(&workshop, "r = 2\ntarget_modules = [\"wpe\"]");
    workshop.success(&["train", "recipe.toml"]);
    let merge = ["merge", "--model", "model", "--adapter", "run/adapter"];
    workshop.success(&[&merge[..], &["--output", "merged"]].concat());
    let [before, after] = ["model", "merged"]
        .map(|model| Tensors::open(workshop.path(model).join("model.safetensors")));
    assert_eq!(after.names(), before.names());
    for name in before.names() {
        let moved = after.floats(&name).values != before.floats(&name).values;
        assert_eq!(moved, name == "transformer.wpe.weight", "{name}");
    }
    let config = json(&workshop.path("merged/config.json"));
    assert_eq!(config["tie_word_embeddings"], true);
}

#[test]
fn default_targets_are_those_of_the_type() {
    for (family, wanted) in [
        ("qwen3", ["q_proj", "v_proj"].as_slice()),
        ("gpt2", &["c_attn"]),
    ] {
        let workshop = workshop(family);
        recipe(&workshop, "r = 2");
        workshop.success(&["train", "recipe.toml"]);
        let config = json(&workshop.path("run/adapter/adapter_config.json"));
        let names = config["target_modules"].as_array().expect("a list");
        let mut names: Vec<_> = names.iter().filter_map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, wanted, "{family}");
        assert_eq!(config["fan_in_fan_out"], family == "gpt2", "{family}");
    }
}

#[test]
fn a_base_may_be_quantised_whichever_way_its_files_have_it() {
    for family in FAMILIES {
        let first_loss = |format: &[&str]| {
            let workshop = workshop(family);
            recipe(&workshop, "r = 2\ntarget_modules = \"all-linear\"");
            workshop.success(&[&["train", "recipe.toml"], format].concat());
            let losses = workshop.metrics("run", "valid");
            losses[0]["loss"].as_f64().expect("a loss")
        };
        let dense = first_loss(&[]);
        for format in ["load_in_4bit", "load_in_8bit"] {
            let set = format!("model.quantization.{format}=true");
            let quantised = first_loss(&["--set", &set]);
            // Weights read the wrong way round would give another model.
            assert!(
                (quantised - dense).abs() < 0.3,
                "{family}, {format}: {quantised} for {dense}"
            );
        }
    }
}

#[test]
fn a_gguf_file_is_the_same_model() {
    for family in FAMILIES {
        let workshop = workshop(family);
        let ask = |model: &str| {
            workshop.run(&[
                "generate",
                "--prompt",
                "2+3?",
                "--max-new-tokens",
                "6",
                "--device",
                "flex",
                "--model",
                model,
            ])
        };
        workshop.success(&["export", "model", "--output", "m.gguf", "--outtype", "f32"]);
        assert_eq!(ask("m.gguf"), ask("model"), "{family}");
    }
}

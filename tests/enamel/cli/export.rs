//! `enamel export`: what is written is what was trained, and what cannot be written is refused.

use std::fs;

use enamel_model::checkpoint::{Checkpoint, TensorSource};

use crate::cli::adapter::{fixture, path};
use crate::support::enamel_process::Workshop;

fn floats(workshop: &Workshop, file: &str) -> Vec<(String, Vec<f32>)> {
    let checkpoint =
        Checkpoint::open(&workshop.path(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let mut names: Vec<String> = checkpoint
        .tensors()
        .iter()
        .map(|t| t.name.clone())
        .collect();
    names.sort();
    let read = |name: String| {
        let values = checkpoint
            .read_f32(&name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        (name, values)
    };
    names.into_iter().map(read).collect()
}

#[test]
fn an_exported_run_holds_the_weights_that_merge_writes() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    workshop.run(&["train", path(&recipe), "--set", "train.max_steps=4"]);
    workshop.run(&["merge", "--adapter", "run/adapter", "--output", "merged"]);
    let said = workshop.run(&["export", "run", "--outtype", "f32", "--output", "m.gguf"]);
    assert!(said.contains("14 modules merged"), "{said}");
    assert!(floats(&workshop, "m.gguf") == floats(&workshop, "merged"));
    let answer = |model: &str| {
        let prompt = ["--prompt", "2+2?", "--max-new-tokens", "8"];
        workshop.run(&[&["generate", "--model", model], &prompt[..]].concat())
    };
    assert_eq!(answer("m.gguf"), answer("merged"));
    // Through the file's blocks, which are read as they lie.
    workshop.run(&["export", "run", "--outtype", "q8_0", "--output", "q.gguf"]);
    answer("q.gguf");
}

#[test]
fn an_adapter_alone_holds_its_factors_in_the_order_of_the_rows_of_gguf() {
    let workshop = Workshop::new();
    let recipe = workshop.usual_recipe();
    workshop.run(&["train", path(&recipe), "--set", "train.max_steps=4"]);
    let said = workshop.run(&["export", "run", "--adapter-only", "--output", "l.gguf"]);
    assert!(said.contains("adapter on 14 modules, alpha 8"), "{said}");
    let file = fs::read(workshop.path("l.gguf")).expect("a file");
    let holds = |text: &str| file.windows(text.len()).any(|part| part == text.as_bytes());
    for text in [
        "adapter.lora.alpha",
        "blk.1.attn_q.weight.lora_a",
        "blk.0.ffn_down.weight.lora_b",
    ] {
        assert!(holds(text), "{text}");
    }
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_files_alone() {
    let workshop = Workshop::new();
    fs::write(workshop.path("there.gguf"), "mine").expect("room on the disk");
    let error = workshop.fail(&["export", "model", "--output", "there.gguf"]);
    assert!(
        error.contains("there.gguf") && error.contains("--overwrite"),
        "{error}"
    );
    let kept = fs::read_to_string(workshop.path("there.gguf")).expect("a file");
    assert_eq!(kept, "mine");
    let error = workshop.fail(&["export", "model", "--adapter-only"]);
    assert!(error.contains("adapter_config.json"), "{error}");
    let loha = fixture("methods/loha/adapter");
    let lora = ["export", path(&loha), "--model", "model", "--adapter-only"];
    let error = workshop.fail(&lora);
    assert!(error.contains("LOHA"), "{error}");
    assert!(error.contains("enamel adapter convert"), "{error}");
}

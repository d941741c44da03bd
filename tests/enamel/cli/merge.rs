//! `enamel merge` for every method, and with several adapters.

use std::fs;

use crate::cli::adapter::{fixture, path};
use crate::support::enamel_process::Workshop;
use crate::support::goldens::{Tensors, assert_close, largest_difference};

#[test]
fn merging_two_adapters_of_different_methods_adds_what_each_adds() {
    let workshop = Workshop::new();
    let base = Tensors::open(workshop.path("model/model.safetensors"));
    let (a, b) = (
        fixture("methods/loha/adapter"),
        fixture("methods/vera/adapter"),
    );
    let merge = |output: &str, more: &[&str]| {
        let mut arguments = vec![
            "merge", "--model", "model", "--output", output, "--device", "flex",
        ];
        arguments.extend(more);
        let said = workshop.run(&arguments);
        (
            Tensors::open(workshop.path(output).join("model.safetensors")),
            said,
        )
    };
    let (one, _) = merge("one", &["--adapter", path(&a)]);
    let (two, _) = merge("two", &["--adapter", path(&b)]);
    let (both, said) = merge(
        "both",
        &[
            "--adapter",
            path(&a),
            "--adapter",
            path(&b),
            "--weights",
            "0.5,2",
        ],
    );
    assert!(
        said.contains("2 adapters") && said.contains("adapted and merged"),
        "{said}"
    );
    let difference = |said: &str| -> f64 {
        let number = said
            .split("at most ")
            .nth(1)
            .and_then(|rest| rest.split(';').next());
        number.expect("a number").parse().expect("a number")
    };
    assert!(difference(&said) < 1e-4, "{said}");
    let mut changed = 0;
    for name in base.names() {
        let values = |from: &Tensors| from.floats(&name).values;
        let (base, one, two) = (values(&base), values(&one), values(&two));
        let sum: Vec<f32> = base
            .iter()
            .zip(&one)
            .zip(&two)
            .map(|((w, a), b)| w + 0.5 * (a - w) + 2.0 * (b - w))
            .collect();
        changed += usize::from(largest_difference(&sum, &base).0 > 1e-3);
        assert_close(&name, &values(&both), &sum, 1e-6);
    }
    assert!(changed > 3);
    // What multiplies is compared with what runs beside the base.
    let (c, d) = (
        fixture("methods/ia3/adapter"),
        fixture("methods/lora_dora/adapter"),
    );
    for (output, pair, more) in [
        ("times", [&a, &c], &["--weights", "0.5,2"][..]),
        ("lengths", [&d, &a], &[]),
        ("both-times", [&d, &c], &[]),
    ] {
        let adapters = ["--adapter", path(pair[0]), "--adapter", path(pair[1])];
        let (_, said) = merge(output, &[&adapters, more].concat());
        assert!(difference(&said) < 1e-4, "{output}: {said}");
    }
    let (_, said) = merge("scaled", &["--adapter", path(&d), "--weights", "0.5"]);
    assert!(
        said.contains("cannot run beside their base with these weights"),
        "{said}"
    );
    let (_, said) = merge("unchecked", &["--adapter", path(&a), "--no-check"]);
    assert!(said.contains("not checked (--no-check)"), "{said}");
    let same = fs::read(workshop.path("one/model.safetensors")).expect("a file");
    assert_eq!(
        fs::read(workshop.path("unchecked/model.safetensors")).expect("a file"),
        same
    );
}

#[test]
fn merging_gives_the_weights_that_peft_merges_for_every_method() {
    let workshop = Workshop::new();
    let mut seen = 0;
    for case in fs::read_dir(fixture("methods")).expect("fixtures") {
        let case = case.expect("an entry").path();
        let golden = case.join("merged.safetensors");
        if !golden.is_file() {
            continue;
        }
        let name = case
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let meta = crate::support::goldens::json(&case.join("meta.json"));
        let base = fixture("llama").join(meta["base"].as_str().expect("a base"));
        let adapter = case.join("adapter");
        let arguments = [
            "merge",
            "--model",
            path(&base),
            "--adapter",
            path(&adapter),
            "--output",
            &name,
            "--dtype",
            "f32",
        ];
        workshop.run(&arguments);
        let ours = Tensors::open(workshop.path(&name).join("model.safetensors"));
        let theirs = Tensors::open(golden);
        // Where the head shares the table, PEFT's merging changes both, and so what the model says; here the
        // head keeps what it had, as beside the adapter.
        let parted = |tensor: &str| tensor == "lm_head.weight" && name == "lora_embed_tied";
        for tensor in theirs
            .names()
            .iter()
            .filter(|tensor| ours.has(tensor) && !parted(tensor))
        {
            let (ours, theirs) = (ours.floats(tensor).values, theirs.floats(tensor).values);
            assert_close(&format!("{name} {tensor}"), &ours, &theirs, 5e-6);
        }
        seen += 1;
    }
    assert!(seen > 12, "{seen}");
}

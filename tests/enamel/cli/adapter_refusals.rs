//! What `enamel adapter` and `enamel merge` refuse, and that they write nothing then.

use std::fs;

use serde_json::json;

use crate::cli::adapter::{bring, fixture, path, rewrite, set};
use crate::support::enamel_process::Workshop;

#[test]
fn bad_input_is_refused_by_name_and_nothing_is_written() {
    let workshop = Workshop::new();
    let (a, b) = (fixture("methods/combine/a"), fixture("methods/combine/b"));
    let combine = |more: &[&str]| {
        let mut arguments = vec!["adapter", "combine", "--output", "out"];
        arguments.extend(more);
        let said = workshop.fail(&arguments);
        assert!(!workshop.path("out").exists(), "{said}");
        said
    };
    let pair = ["--adapter", path(&a), "--adapter", path(&b)];
    let with = |more: &[&str]| combine(&[&pair[..], more].concat());
    let said = with(&["--weights", "1,1", "--type", "mean"]);
    assert!(
        said.contains("\"mean\" is not known; choose one of cat, linear, svd"),
        "{said}"
    );
    let said = with(&["--weights", "1"]);
    assert!(
        said.contains("1 weights are given for 2 adapters"),
        "{said}"
    );
    let said = with(&["--weights", "1,1", "--type", "ties"]);
    assert!(said.contains("needs a density"), "{said}");
    let said = with(&["--weights", "1,1", "--majority-sign", "most"]);
    assert!(said.contains("choose total or frequency"), "{said}");
    let said = combine(&["--adapter", "nowhere", "--weights", "1"]);
    assert!(
        said.contains("nowhere/adapter_config.json: there is no such file"),
        "{said}"
    );

    let other = bring(&workshop, "methods/combine/b", "other");
    set(&other, "base_model_name_or_path", json!("another/model"));
    set(
        &bring(&workshop, "methods/combine/a", "one"),
        "base_model_name_or_path",
        json!("one/model"),
    );
    let said = combine(&["--adapter", "one", "--adapter", "other", "--weights", "1,1"]);
    assert!(
        said.contains("one is for one/model, other for another/model"),
        "{said}"
    );
    for (case, word) in [
        ("methods/loha/adapter", "is LoHa"),
        ("methods/lora_dora/adapter", "use_dora"),
        ("methods/lora_lora_bias/adapter", "lora_bias"),
        ("methods/lora_bias_all/adapter", "bias"),
        ("lora/modules_to_save/adapter", "modules_to_save"),
        (
            "methods/lora_trainable_tokens/adapter",
            "trainable_token_indices",
        ),
        ("methods/init_pissa/adapter", "init_lora_weights"),
    ] {
        let case = fixture(case);
        let said = combine(&["--adapter", path(&case), "--weights", "1"]);
        assert!(said.contains(word), "{word}: {said}");
    }

    let broken = bring(&workshop, "methods/combine/a", "broken");
    rewrite(&broken, |name, values| {
        if name.contains("lora_B") {
            values[0] = f32::INFINITY;
        }
    });
    let said = combine(&["--adapter", "broken", "--weights", "1"]);
    assert!(said.contains("not finite"), "{said}");
    let said = workshop.fail(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        "broken",
        "--output",
        "out",
    ]);
    assert!(
        said.contains("not finite") && !workshop.path("out").exists(),
        "{said}"
    );

    // Finite factors whose product is not.
    let huge = bring(&workshop, "methods/combine/a", "huge");
    rewrite(&huge, |_, values| values.fill(1e30));
    let said = workshop.fail(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        "huge",
        "--output",
        "out",
    ]);
    assert!(
        said.contains("proj.weight, merged, holds a value that is not finite"),
        "{said}"
    );
    assert!(
        said.contains("help:") && !workshop.path("out").exists(),
        "{said}"
    );
    let left: Vec<String> = fs::read_dir(workshop.path("."))
        .expect("the workshop")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");

    fs::create_dir(workshop.path("full")).expect("room on the disk");
    fs::write(workshop.path("full/mine"), b"mine").expect("room on the disk");
    let convert = ["adapter", "convert", path(&a), "--output", "full"];
    let both = [
        "adapter",
        "combine",
        "--adapter",
        path(&a),
        "--weights",
        "1",
        "--output",
        "full",
    ];
    let merge = [
        "merge",
        "--model",
        "model",
        "--adapter",
        path(&a),
        "--output",
        "full",
    ];
    for arguments in [&convert[..], &both, &merge] {
        let said = workshop.fail(arguments);
        assert!(
            said.contains("full: there is something already") && said.contains("help:"),
            "{said}"
        );
    }
    assert_eq!(
        fs::read_dir(workshop.path("full"))
            .expect("a directory")
            .count(),
        1
    );

    let arguments = [
        "merge",
        "--model",
        "model",
        "--adapter",
        path(&a),
        "--weights",
        "1,2",
        "--output",
        "out",
    ];
    let said = workshop.fail(&arguments);
    assert!(
        said.contains("2 weights are given for 1 adapters"),
        "{said}"
    );
    let saved = fixture("lora/modules_to_save/adapter");
    let arguments = [
        "merge",
        "--model",
        "model",
        "--adapter",
        path(&saved),
        "--adapter",
        path(&saved),
        "--output",
        "out",
    ];
    let said = workshop.fail(&arguments);
    assert!(
        said.contains("is trained whole by") && said.contains("cannot be added up"),
        "{said}"
    );
    // The workshop's model has no biases; the one that the adapter was made for has.
    let biased = fixture("methods/lora_lora_bias/adapter");
    let said = workshop.fail(&[
        "merge",
        "--model",
        "model",
        "--adapter",
        path(&biased),
        "--output",
        "out",
    ]);
    assert!(
        said.contains("biases of its own (lora_bias)") && said.contains("help:"),
        "{said}"
    );
    assert!(!workshop.path("out").exists());
    let dora = fixture("methods/lora_dora/adapter");
    let said = workshop.fail(&["adapter", "convert", path(&dora), "--output", "out"]);
    assert!(
        said.contains("depends on the base") && said.contains("--model"),
        "{said}"
    );
}

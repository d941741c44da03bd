//! Every adapter method through `enamel train`, `plan` and `compare`.

use std::fs;

use serde_json::{Value, json};

use crate::support::enamel_process::Workshop;

pub const DATA: &str = "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128";
pub const TRAIN: &str = "max_steps = 8\nbatch_size = 2\nlearning_rate = 5e-3\nlogging_steps = 1\n\
                     eval_strategy = \"steps\"\neval_steps = 4\nsave_steps = 4\nsamples = 0";
const ALL: &str = "target_modules = \"all-linear\"";

/// What a recipe says of each method, and extra training settings.
pub fn methods() -> Vec<(&'static str, String, &'static str)> {
    let all = |settings: &str| format!("{settings}\n{ALL}");
    vec![
        ("LoRA", all("r = 4\nlora_dropout = 0.1\nuse_rslora = true"), ""),
        (
            "LoRA, rows and modules",
            "r = 4\nbias = \"all\"\ntrainable_token_indices = [3, 5]\nmodules_to_save = [\"norm\"]".into(),
            "",
        ),
        (
            "LoRA on embedding and head",
            "r = 4\nlora_dropout = 0.1\ntarget_modules = [\"embed_tokens\", \"lm_head\", \"q_proj\"]".into(),
            "",
        ),
        ("LoRA+", all("r = 4"), "\nloraplus_lr_ratio = 8"),
        ("gaussian", all("r = 4\ninit_lora_weights = \"gaussian\""), ""),
        ("orthogonal", all("r = 4\ninit_lora_weights = \"orthogonal\""), ""),
        ("PiSSA", all("r = 4\ninit_lora_weights = \"pissa\""), ""),
        ("fast PiSSA", all("r = 4\ninit_lora_weights = \"pissa_niter_4\""), ""),
        ("OLoRA", all("r = 4\ninit_lora_weights = \"olora\""), ""),
        ("EVA", all("r = 4\ninit_lora_weights = \"eva\""), ""),
        ("DoRA", all("method = \"dora\"\nr = 4\nlora_dropout = 0.1"), ""),
        ("LoHa", all("method = \"loha\"\nr = 4\nrank_dropout = 0.1\nmodule_dropout = 0.2"), ""),
        ("LoKr", all("method = \"lokr\"\nr = 2\ndecompose_both = true\nrank_dropout = 0.1\nmodule_dropout = 0.2"), ""),
        (
            "AdaLoRA",
            all("method = \"adalora\"\ninit_r = 6\ntarget_r = 3\ntinit = 1\ntfinal = 2\nlora_dropout = 0.1"),
            "",
        ),
        ("VeRA", all("method = \"vera\"\nr = 8\nvera_dropout = 0.1"), ""),
        ("(IA)³", "method = \"ia3\"".into(), ""),
        ("MiSS", all("method = \"miss\"\nr = 12\nmiss_dropout = 0.1"), ""),
        ("MiSS, mini", all("method = \"miss\"\nr = 8\ninit_weights = \"mini\"\nmini_r = 4"), ""),
        ("MiSS, bat", all("method = \"miss\"\nr = 4\ninit_weights = \"bat\""), ""),
        ("head", "method = \"head\"\nmodules_to_save = [\"lm_head\"]".into(), ""),
        ("full", "method = \"full\"".into(), ""),
    ]
}

/// The result's weights, byte for byte.
pub fn weights(workshop: &Workshop, run: &str, name: &str) -> Vec<u8> {
    let file = match name {
        "full" => "model/model.safetensors",
        _ => "adapter/adapter_model.safetensors",
    };
    let path = workshop.path(run).join(file);
    fs::read(&path).unwrap_or_else(|e| panic!("{name}: {}: {e}", path.display()))
}

#[test]
fn every_method_trains_and_a_resumed_run_ends_at_the_same_bits() {
    let workshop = Workshop::new();
    for (name, adapter, train) in methods() {
        workshop.recipe("m.toml", &adapter, DATA, &format!("{TRAIN}{train}"));
        let whole = ["train", "m.toml", "--output", "whole", "--overwrite"];
        workshop.run(&whole);
        let result = weights(&workshop, "whole", name);
        for entry in workshop.metrics("whole", "train") {
            assert!(
                entry["loss"].as_f64().is_some_and(f64::is_finite),
                "{name}: {entry}"
            );
        }
        let valid = workshop.metrics("whole", "valid");
        assert_ne!(
            valid[0]["loss"], valid[2]["loss"],
            "{name}: nothing was learnt"
        );

        let _ = fs::remove_dir_all(workshop.path("parts"));
        let from = workshop.path("whole/checkpoints/step-000004");
        let from = from.display().to_string();
        workshop.run(&["train", "m.toml", "--output", "parts", "--resume", &from]);
        assert!(
            result == weights(&workshop, "parts", name),
            "{name}: the interruption shows"
        );
        let last = |run| {
            workshop
                .metrics(run, "valid")
                .pop()
                .map(|e| e["loss"].clone())
        };
        assert_eq!(last("whole"), last("parts"), "{name}");
    }
}

#[test]
fn experts_trained_here_are_mixed_by_x_lora_and_the_mixture_resumes_too() {
    let workshop = Workshop::new();
    workshop.recipe("expert.toml", &format!("r = 4\n{ALL}"), DATA, TRAIN);
    for (name, seed) in [("one", "seed=1"), ("two", "seed=2")] {
        workshop.run(&["train", "expert.toml", "--output", name, "--set", seed]);
    }
    let mixture = "method = \"xlora\"\nadapters = { one = \"one/adapter\", two = \"two/adapter\" }\n\
                   xlora_depth = 2\nxlora_size = 16\nlayerwise_scalings = true";
    workshop.recipe("x.toml", mixture, DATA, TRAIN);
    workshop.run(&["train", "x.toml", "--output", "whole"]);
    let before: Vec<_> = ["one", "two"].iter().map(|e| workshop.adapter(e)).collect();
    let from = workshop
        .path("whole/checkpoints/step-000004")
        .display()
        .to_string();
    workshop.run(&["train", "x.toml", "--output", "parts", "--resume", &from]);
    assert!(workshop.adapter("whole").0 == workshop.adapter("parts").0);
    // The experts are frozen.
    let after: Vec<_> = ["one", "two"].iter().map(|e| workshop.adapter(e)).collect();
    assert!(before == after);
    let answer = [
        "generate",
        "--model",
        "./model",
        "--adapter",
        "whole/adapter",
        "--prompt",
        "1 2 3",
        "--max-new-tokens",
        "4",
    ];
    workshop.run(&answer);
    let merge = [
        "merge",
        "--model",
        "./model",
        "--adapter",
        "whole/adapter",
        "--output",
        "merged",
    ];
    let error = workshop.fail(&merge);
    assert!(error.contains("anew for each token"), "{error}");
    assert!(!workshop.path("merged").exists());
    // An expert that has changed is another run.
    workshop.run(&[
        "train",
        "expert.toml",
        "--output",
        "one",
        "--overwrite",
        "--set",
        "seed=5",
    ]);
    let error = workshop.fail(&["train", "x.toml", "--output", "parts", "--resume", &from]);
    assert!(error.contains("another"), "{error}");
    workshop.recipe("none.toml", "method = \"xlora\"", DATA, TRAIN);
    let error = workshop.fail(&["plan", "none.toml"]);
    assert!(error.contains("adapter.adapters"), "{error}");
}

#[test]
fn adalora_stores_the_ranks_that_its_budget_left() {
    let workshop = Workshop::new();
    let adapter =
        format!("method = \"adalora\"\ninit_r = 6\ntarget_r = 3\ntinit = 1\ntfinal = 2\n{ALL}");
    workshop.recipe("a.toml", &adapter, DATA, TRAIN);
    workshop.run(&["train", "a.toml"]);
    let path = workshop.path("run/adapter/adapter_config.json");
    let config: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
    let pattern = config["rank_pattern"].as_object().expect("a table");
    let kept: usize = pattern
        .values()
        .map(|kept| {
            let kept = kept.as_array().expect("a list");
            assert_eq!(kept.len(), 6);
            kept.iter().filter(|k| **k == json!(true)).count()
        })
        .sum();
    assert_eq!(pattern.len(), 14);
    assert_eq!(kept, 14 * 3, "the budget was not spent to its end");
    let budgets = workshop.metrics("run", "budget");
    assert_eq!(
        budgets.last().expect("choices of ranks")["budget"],
        json!(42)
    );
    // The last validation saw what is stored.
    let stored = workshop.run(&["eval", "a.toml", "--adapter", "run/adapter"]);
    let valid = workshop
        .metrics("run", "valid")
        .pop()
        .expect("a validation");
    let shown = stored.split_whitespace().skip_while(|word| *word != "loss");
    let shown: Option<f64> = shown.into_iter().nth(1).and_then(|loss| loss.parse().ok());
    let seen = valid["loss"].as_f64().expect("a loss");
    // Six digits are shown, and products without the ranks that are zero are summed in another order.
    assert!(
        shown.is_some_and(|shown| (shown - seen).abs() < 2e-6),
        "{stored} without {seen}"
    );
}

#[test]
fn a_setting_of_another_method_is_an_error_and_an_override_displaces_it() {
    let workshop = Workshop::new();
    workshop.recipe(
        "wrong.toml",
        "method = \"adalora\"\nr = 4\nrank_dropout = 0.1\ndecompose_both = true",
        DATA,
        TRAIN,
    );
    let error = workshop.fail(&["plan", "wrong.toml"]);
    for part in [
        "adapter.r means nothing",
        "adapter.rank_dropout",
        "loha, lokr",
        "adapter.decompose_both",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    workshop.recipe("lora.toml", "r = 4\nlora_dropout = 0.1", DATA, TRAIN);
    let said = workshop.run(&["plan", "lora.toml", "--set", "adapter.method=full"]);
    assert!(
        said.contains("full fine-tuning") && said.contains("100.0000 %"),
        "{said}"
    );
    let error = workshop.fail(&["plan", "lora.toml", "--set", "adapter.method=lo-ha2"]);
    assert!(
        error.contains("lo-ha2") && error.contains("loha"),
        "{error}"
    );
    let error = workshop.fail(&["plan", "lora.toml", "--set", "adapter.method=head"]);
    assert!(error.contains("modules_to_save"), "{error}");
}

#[test]
fn plan_prints_the_published_counts() {
    let workshop = Workshop::new();
    let labels: serde_json::Map<String, Value> =
        (0..101).map(|i| (i.to_string(), json!("food"))).collect();
    let vit = json!({ "model_type": "vit", "id2label": labels });
    let llama = |hidden: usize,
                 inner: usize,
                 layers: usize,
                 heads: usize,
                 vocab: usize,
                 tied: bool| {
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": tied,
        })
    };
    for (name, config) in [
        ("vit.json", vit),
        ("8b.json", llama(4096, 14336, 32, 32, 128_256, false)),
        ("1b.json", llama(2048, 8192, 16, 32, 128_256, true)),
    ] {
        fs::write(workshop.path(name), config.to_string()).expect("room on the disk");
    }
    let food = [
        "adapter.target_modules=['query', 'value']",
        "adapter.modules_to_save=['classifier']",
    ];
    let cases: [(&str, Vec<&str>, &str); 8] = [
        (
            "vit.json",
            [&["adapter.r=16"][..], &food].concat(),
            "667,493",
        ),
        (
            "vit.json",
            [&["adapter.method=loha", "adapter.r=16"][..], &food].concat(),
            "1,257,317",
        ),
        (
            "vit.json",
            [&["adapter.method=lokr", "adapter.r=16"][..], &food].concat(),
            "116,069",
        ),
        (
            "vit.json",
            [&["adapter.method=adalora", "adapter.init_r=12"][..], &food].concat(),
            "520,325",
        ),
        // 32 layers of r·(in + out) over the seven: 2,621,440 for each unit of r.
        (
            "8b.json",
            vec!["adapter.r=8", "adapter.target_modules=all-linear"],
            "20,971,520",
        ),
        (
            "8b.json",
            vec!["adapter.r=16", "adapter.target_modules=all-linear"],
            "41,943,040",
        ),
        (
            "8b.json",
            vec!["adapter.r=64", "adapter.target_modules=all-linear"],
            "167,772,160",
        ),
        ("1b.json", vec!["adapter.r=8"], "851,968"),
    ];
    for (model, set, count) in cases {
        let path = workshop.path(model).display().to_string();
        let mut arguments = vec!["plan", "--model", &path];
        set.iter().for_each(|set| arguments.extend(["--set", set]));
        let said = workshop.run(&arguments);
        assert!(
            said.contains(&format!("trainable  {count} of")),
            "{set:?}: {said}"
        );
    }
}

#[test]
fn compare_trains_each_variant_once_and_prints_one_table() {
    let workshop = Workshop::new();
    let recipe = workshop.recipe("c.toml", "r = 4", DATA, TRAIN);
    let mut text = fs::read_to_string(&recipe).expect("the recipe");
    text.push_str(
        "[[compare]]\nname = \"LoRA\"\n[[compare]]\nname = \"(IA)³\"\nset = [\"adapter.method=ia3\"]\n",
    );
    fs::write(&recipe, &text).expect("room on the disk");
    let said = workshop.run(&["compare", "c.toml", "--output", "table"]);
    for part in ["| LoRA | ", "| (IA)³ | ", "validation loss"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let table = fs::read_to_string(workshop.path("table/compare.md")).expect("the table");
    assert!(said.contains(table.trim()), "{said}");
    let again = workshop.run(&["compare", "c.toml", "--output", "table"]);
    assert_eq!(again.matches("done before").count(), 2, "{again}");
    assert!(again.contains(table.trim()));
    // Another recipe is another comparison, which takes the place of this one only when asked.
    let other = [
        "compare", "c.toml", "--output", "table", "--set", "seed=9", "--only", "LoRA",
    ];
    let before = workshop.adapter("table/lora");
    let error = workshop.fail(&other);
    assert!(
        error.contains("seed is 9, and was 3") && error.contains("--overwrite"),
        "{error}"
    );
    assert!(workshop.adapter("table/lora") == before);
    let said = workshop.run(&[&other[..], &["--overwrite"]].concat());
    assert!(!said.contains("done before"), "{said}");
    assert!(workshop.adapter("table/lora") != before);
    let error = workshop.fail(&["compare", "c.toml", "--only", "LoHa"]);
    assert!(error.contains("there are LoRA, (IA)³"), "{error}");
    // The recipe itself is one like any other.
    workshop.run(&["plan", "c.toml"]);
    fs::write(&recipe, format!("{text}[[compare]]\nnome = \"x\"\n")).expect("room on the disk");
    let error = workshop.fail(&["compare", "c.toml"]);
    assert!(
        error.contains("[[compare]]") && error.contains("nome"),
        "{error}"
    );
}

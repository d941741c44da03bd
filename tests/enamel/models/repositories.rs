//! Repositories as people have them: what is not as transformers writes it today is read as transformers reads it,
//! or named.

use std::fs;
use std::path::Path;

use enamel_data::{Tokenizer, TokenizerFiles};
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::{ArchConfig, Model};
use serde_json::{Value, json};

use crate::support::devices::device;
use crate::support::enamel_process::{Workshop, said};
use crate::support::goldens::{Generation, fixtures, json as read_json, stage};

fn put(path: impl AsRef<Path>, text: impl AsRef<[u8]>) {
    fs::write(path, text).expect("room on the disk");
}

fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer, String> {
    let json = checkpoint.tokenizer_json().map_err(|e| e.to_string())?;
    let config = checkpoint.tokenizer_config();
    let (map, added) = (checkpoint.special_tokens_map(), checkpoint.added_tokens());
    let files = TokenizerFiles {
        tokenizer_json: &json,
        tokenizer_config: config.as_ref(),
        special_tokens_map: map.as_ref(),
        added_tokens: added.as_ref(),
        ..TokenizerFiles::default()
    };
    Tokenizer::from_files(&files).map_err(|e| e.to_string())
}

#[test]
fn a_sentence_piece_model_alone_is_read_as_transformers_reads_it() {
    let golden = read_json(&fixtures().join("data/sentencepiece.json"));
    let texts = golden["texts"].as_array().expect("texts");
    for case in golden["cases"].as_array().expect("cases") {
        let name = format!(
            "{} {} {}",
            case["model"], case["model_type"], case["config"]
        );
        let staged = stage("untied", Generation::Five);
        let at = |file: &str| staged.path().join(file);
        fs::remove_file(at("tokenizer.json")).expect("it was there");
        fs::remove_file(at("tokenizer_config.json")).expect("it was there");
        let model = case["model"].as_str().expect("a name");
        let from = fixtures().join(format!("data/pieces_{model}.model"));
        fs::copy(from, at("tokenizer.model")).expect("room on the disk");
        let mut config = read_json(&at("config.json"));
        config["model_type"] = case["model_type"].clone();
        put(at("config.json"), config.to_string());
        if !case["config"].is_null() {
            put(at("tokenizer_config.json"), case["config"].to_string());
        }
        let checkpoint = Checkpoint::open(staged.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(checkpoint.has_tokenizer(), "{name}");
        assert!(
            checkpoint
                .notes()
                .any(|note| note.contains("tokenizer.model")),
            "{name}"
        );
        let tokenizer = tokenizer(&checkpoint).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(json!(tokenizer.vocab_size()), case["size"], "{name}");
        let encode = |text: &Value, special| {
            let text = text.as_str().expect("a text");
            tokenizer
                .encode(text, special)
                .unwrap_or_else(|e| panic!("{name}: {text}: {e}"))
        };
        for (i, text) in texts.iter().enumerate() {
            let ids = encode(text, false);
            assert_eq!(json!(ids), case["ids"][i], "{name}: {text}");
            let decoded = tokenizer.decode(&ids, false).expect("a text");
            assert_eq!(json!(decoded), case["texts"][i], "{name}: {text}");
        }
        assert_eq!(json!(encode(&texts[0], true)), case["special"], "{name}");
        for (token, content) in case["named"].as_object().expect("names") {
            let named = tokenizer
                .special_tokens()
                .iter()
                .find(|(name, _)| name == token);
            assert_eq!(
                named.map(|(_, text)| json!(text)).as_ref(),
                Some(content),
                "{name}: {token}"
            );
        }
    }
}

#[test]
fn another_tokenizer_alone_is_named_with_a_way_to_convert_it() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    fs::remove_file(workshop.path("model/tokenizer.json")).expect("it was there");
    put(workshop.path("model/tokenizer.model"), "IQ== 0\nIg== 1\n");
    let said = workshop.fail(&["inspect", "recipe.toml"]);
    for part in [
        "train.jsonl:1",
        "tokenizer.model",
        "tiktoken",
        "help: convert it once",
        "save_pretrained",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(
        !said.contains("train.jsonl:2") && !said.contains("UNK"),
        "{said}"
    );
    fs::remove_file(workshop.path("model/tokenizer.model")).expect("it was there");
    let said = workshop.fail(&["generate", "--model", "./model", "--prompt", "hello"]);
    assert!(
        said.contains("comes without a tokenizer") && said.contains("tokenizer.json"),
        "{said}"
    );
}

/// The names that wrappers leave, and integers and masks: the same logits with a note.
#[test]
fn a_model_saved_without_its_head_or_in_a_wrapper_is_read_with_a_note() {
    let staged = stage("untied", Generation::Five);
    let path = staged.path().join("model.safetensors");
    let sound = fs::read(&path).expect("a fixture");
    let length = u64::from_le_bytes(sound[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&sound[8..8 + length]).expect("a header");
    let load = || {
        let checkpoint = Checkpoint::open(staged.path()).unwrap_or_else(|e| panic!("{e}"));
        let config = ArchConfig::from_json(checkpoint.config_json()).expect("a config");
        Model::load(&config, &checkpoint, &device("flex")).unwrap_or_else(|e| panic!("{e}"));
        let values = checkpoint.read_f32("model.norm.weight").expect("the norm");
        (values, checkpoint.notes().collect::<Vec<_>>().join("\n"))
    };
    let (norm, notes) = load();
    assert_eq!(notes, "");
    for rename in [
        |name: &str| format!("_orig_mod.{name}"),
        |name: &str| format!("module._orig_mod.{name}"),
        |name: &str| name.strip_prefix("model.").unwrap_or(name).to_owned(),
    ] {
        let renamed = header
            .as_object()
            .expect("tensors")
            .iter()
            .map(|(name, entry)| match name.as_str() {
                "__metadata__" => (name.clone(), entry.clone()),
                name => (rename(name), entry.clone()),
            });
        let mut header: serde_json::Map<String, Value> = renamed.collect();
        let data = sound.len() - 8 - length;
        let extra = json!({"dtype": "I64", "shape": [1, 2], "data_offsets": [data, data + 16]});
        header.insert("model.position_ids".to_owned(), extra);
        let text = Value::Object(header).to_string();
        let parts = [
            &(text.len() as u64).to_le_bytes(),
            text.as_bytes(),
            &sound[8 + length..],
            &[0; 16],
        ];
        put(&path, parts.concat());
        let (found, notes) = load();
        assert_eq!(found, norm);
        assert!(
            notes.contains("position_ids") && notes.contains("are read with"),
            "{notes}"
        );
    }
}

#[test]
fn hidden_files_are_no_data_and_notes_about_files_are_said() {
    let workshop = Workshop::new();
    fs::create_dir(workshop.path("data")).expect("room on the disk");
    fs::rename(
        workshop.path("train.jsonl"),
        workshop.path("data/train.jsonl"),
    )
    .expect("a file");
    for name in [
        "data/._train.jsonl",
        "data/.DS_Store",
        "model/._model.safetensors",
        "model/.DS_Store",
    ] {
        put(workshop.path(name), b"\0\x05\x16\x07");
    }
    fs::create_dir_all(workshop.path("data/.ipynb_checkpoints/x.jsonl")).expect("room on the disk");
    put(
        workshop.path("model/chat_template.jinja"),
        "\u{FEFF}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    );
    workshop.recipe(
        "recipe.toml",
        "r = 2",
        "train = \"./data\"\ntrain_on = \"all\"",
        "",
    );
    let said = workshop.told(&["inspect", "recipe.toml", "-n", "1"]);
    assert!(said.contains("data/train.jsonl:1"), "{said}");
    assert!(
        said.contains("note:") && said.contains("byte order mark"),
        "{said}"
    );
}

#[test]
fn a_tilde_is_the_home_directory_for_every_verb() {
    let workshop = Workshop::new();
    workshop.recipe("recipe.toml", "r = 2", "train = \"~/train.jsonl\"", "");
    let home = workshop.path("");
    let run = |arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        command.env("HOME", &home).current_dir("/");
        let output = command.output().expect("it starts");
        let said = said(&output);
        assert!(output.status.success(), "{arguments:?}: {said}");
        said
    };
    let set = ["--set", "model.base=~/model"];
    let said = run(&[&["inspect", "~/recipe.toml", "-n", "1"], &set[..]].concat());
    assert!(said.contains("train.jsonl:1"), "{said}");
    run(&["export", "~/model", "--output", "~/out.gguf"]);
    assert!(workshop.path("out.gguf").is_file());
    run(&["plan", "--model", "~/model"]);
}

#[test]
fn a_damaged_tokenizer_is_an_error_with_the_models_folder() {
    let workshop = Workshop::new();
    workshop.usual_recipe();
    let path = workshop.path("model/tokenizer.json");
    let mut json = read_json(&path);
    json["model"]["continuing_subword_prefix"] = "#########".into();
    put(&path, json.to_string());
    let said = workshop.fail(&["inspect", "recipe.toml"]);
    for part in [
        "model: tokenizer.json cannot be used",
        "damaged",
        "model.merges[0]",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    put(&path, "{\n \"version\": ,");
    let said = workshop.fail(&["inspect", "recipe.toml"]);
    assert!(
        said.contains("tokenizer.json") && said.contains("line 2 column"),
        "{said}"
    );
}

//! What one place knows is not named in others.

use std::fs;
use std::path::{Path, PathBuf};

/// Names of architectures, and of the models that they are called after.
const ARCHITECTURES: [&str; 10] = [
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt-2", "bert", "vit", "deit", "t5",
];

/// What has such a name in it and is something else: a program, a way of scaling rotations that transformers
/// calls so in every architecture's configuration, and models of the catalogue.
const OTHERS: [&str; 7] = [
    "llama.cpp",
    "llama_cpp",
    "llama-gguf-split",
    "llama3",
    "llama_3",
    "llama 3",
    "smollm2",
];

/// Files that name architectures all the same, with the reason; `ARCHITECTURE.md` says the same.
const EXCEPTIONS: [(&str, &str); 5] = [
    ("model/src/checkpoint/gguf/keys.rs", TOKENIZERS),
    ("model/src/checkpoint/gguf/mod.rs", TOKENIZERS),
    ("model/src/checkpoint/gguf/tokenizer.rs", TOKENIZERS),
    ("model/src/checkpoint/gguf/vocabulary.rs", TOKENIZERS),
    (
        "model/src/checkpoint/sentencepiece.rs",
        "transformers reads a tokenizer.model by the class that the model's family has",
    ),
];
const TOKENIZERS: &str = "llama.cpp calls its tokenizers after models";

#[test]
fn no_file_outside_arch_names_an_architecture() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let mut wrong = Vec::new();
    let mut excepted = Vec::new();
    for (file, text) in sources(&crates) {
        if file.starts_with("model/src/arch/") {
            continue;
        }
        let named = names_in(&text);
        if named.is_empty() {
            continue;
        }
        match EXCEPTIONS.iter().any(|(exception, _)| *exception == file) {
            true => excepted.push(file),
            false => wrong.push(format!("{file} names {}", named.join(", "))),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (file, _) in EXCEPTIONS {
        let is_one = excepted.iter().any(|other| other == file);
        assert!(is_one, "{file} is no exception any more");
    }
    let page = fs::read_to_string(crates.join("../ARCHITECTURE.md")).expect("the page is there");
    for (file, reason) in EXCEPTIONS {
        let folder = file.strip_prefix("model/src/").unwrap_or(file);
        let shown = page.contains(folder) || folder.starts_with("checkpoint/gguf/");
        assert!(shown, "ARCHITECTURE.md does not say of {folder}: {reason}");
    }
}

#[test]
fn names_are_found_in_code_and_not_in_comments_or_in_other_words() {
    let text = "// llama\nlet a = \"gpt2\"; // qwen3\nstruct MistralConfig;\n\
                let b = invite(\"llama.cpp\", \"https://x/bertha\"); let c = Vit;\n\
                #[cfg(test)]\nmod tests { const A: &str = \"t5\"; }\n";
    assert_eq!(names_in(text), ["mistral", "gpt2", "vit"]);
}

/// The names of architectures in a source file; comments and tests are left out.
fn names_in(text: &str) -> Vec<&'static str> {
    let code = text.split("\n#[cfg(test)]\n").next().unwrap_or(text);
    let code: Vec<&str> = code.lines().map(comment_cut).collect();
    let mut code = code.join("\n").to_lowercase();
    for other in OTHERS {
        code = code.replace(other, "");
    }
    // A short name is one as a word alone: `vit` is in `invite`.
    let is_named = |name: &str| match name.len() {
        ..=4 if name != "gpt2" => code
            .split(|c: char| !c.is_alphanumeric())
            .any(|word| word == name),
        _ => code.contains(name),
    };
    let names = ARCHITECTURES.into_iter();
    names.filter(|name| is_named(name)).collect()
}

/// A line without its comment; `//` behind a colon is part of an address.
fn comment_cut(line: &str) -> &str {
    let comment = line
        .match_indices("//")
        .find(|(at, _)| !line[..*at].ends_with(':'));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The sources of all crates by their path, tests left out.
fn sources(crates: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut left: Vec<PathBuf> = fs::read_dir(crates)
        .expect("the crates are there")
        .map(|entry| entry.expect("they can be listed").path().join("src"))
        .filter(|src| src.is_dir())
        .collect();
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).expect("sources are there") {
            let path = entry.expect("they can be listed").path();
            let name = path.strip_prefix(crates).expect("it lies there");
            let name = name.to_string_lossy().replace('\\', "/");
            let is_test = name.split('/').any(|part| {
                let part = part.trim_end_matches(".rs");
                part.ends_with("_tests")
                    || ["tests", "testing", "contracts", "hostile"].contains(&part)
            });
            if is_test {
                continue;
            }
            if path.is_dir() {
                left.push(path);
            } else if name.ends_with(".rs") {
                all.push((name, fs::read_to_string(&path).expect("it is text")));
            }
        }
    }
    all.sort();
    all
}

//! A method is named in its own files and in the lists, and nowhere else but for reasons that are written down.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What methods are called in code. Those of the whole model are words of everyday.
const NAMES: [&str; 9] = [
    "lora", "dora", "loha", "lokr", "adalora", "vera", "ia3", "miss", "xlora",
];

/// Where the methods and their lists are.
const HOME: &str = "adapter/src/methods/";

/// Files and folders that name methods (`*`: all of them) all the same, with the reason, which ARCHITECTURE.md gives
/// too.
const EXCEPTIONS: [(&str, &str, &str); 29] = [
    ("adapter/src/lib.rs", "*", "the crate's public names"),
    (
        "adapter/src/combine/",
        "lora",
        "what PEFT combines are LoRAs",
    ),
    (
        "adapter/src/config/",
        "lora",
        "PEFT's words for values of settings",
    ),
    (
        "adapter/src/files/compare.rs",
        "lora",
        "on an embedding there is LoRA alone",
    ),
    (
        "adapter/src/files/foreign/",
        "lora dora",
        "other programs' names of LoRA's parameters",
    ),
    (
        "adapter/src/files/store.rs",
        "lora",
        "mlx-lm's adapters are LoRAs",
    ),
    (
        "adapter/src/files/tied.rs",
        "lora",
        "LoRA's parameters have other names on an embedding than on the head that shares its weights",
    ),
    (
        "adapter/src/init/",
        "lora",
        "EVA and LoftQ are first values of a LoRA",
    ),
    (
        "adapter/src/layers/",
        "lora",
        "on an embedding there is LoRA alone",
    ),
    (
        "adapter/src/model/",
        "lora",
        "on an embedding there is LoRA alone",
    ),
    (
        "adapter/src/offline/",
        "lora",
        "a product of two factors stays two factors, as combining wants them",
    ),
    (
        "adapter/src/plan/",
        "lora",
        "PEFT's words for values of settings",
    ),
    ("cli/src/adapter.rs", "lora", "converting makes a LoRA"),
    (
        "cli/src/adapter_text.rs",
        "lora",
        "converting and combining make a LoRA",
    ),
    ("cli/src/bench.rs", "lora", "the method where none is named"),
    ("cli/src/export.rs", "lora", "an adapter in GGUF is a LoRA"),
    (
        "kernels/src/",
        "lora dora",
        "an operation is called after what it computes; other methods use it too",
    ),
    (
        "model/src/model.rs",
        "xlora",
        "a mixture of whole adapters is a part of the model",
    ),
    ("model/src/save.rs", "lora", "an adapter in GGUF is a LoRA"),
    ("model/src/save/", "lora", "an adapter in GGUF is a LoRA"),
    (
        "model/src/source/",
        "miss",
        "a word of English: what a cache or a download misses",
    ),
    (
        "train/src/commands/adapters/",
        "lora dora",
        "converting and combining make a LoRA",
    ),
    (
        "train/src/commands/bench/",
        "lora adalora ia3 vera miss",
        "ranks that compare, and the method where none is named",
    ),
    (
        "train/src/commands/export.rs",
        "lora",
        "an adapter in GGUF is a LoRA",
    ),
    (
        "train/src/commands/merge/",
        "lora",
        "a setting that it advises to leave out",
    ),
    (
        "train/src/inputs/",
        "lora",
        "EVA and LoftQ are first values of a LoRA",
    ),
    (
        "train/src/recipe/",
        "*",
        "it declares the settings of every method and makes configurations of them",
    ),
    (
        "train/src/run/",
        "lora",
        "LoRA+ has a learning rate for LoRA's B",
    ),
    (
        "train/src/training/",
        "lora",
        "LoRA+ has a learning rate for LoRA's B",
    ),
];

#[test]
fn no_file_names_a_method_without_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    for path in sources(&root) {
        let file = path.strip_prefix(&root).expect("it lies there");
        let file = file.to_string_lossy().replace('\\', "/");
        if file.starts_with(HOME) {
            continue;
        }
        let text = fs::read_to_string(&path).expect("it is text");
        for name in named(&text) {
            let excepted = EXCEPTIONS.iter().position(|(place, names, _)| {
                file.starts_with(place) && (*names == "*" || names.split(' ').any(|n| n == name))
            });
            match excepted {
                Some(exception) => {
                    used.insert((exception, name));
                }
                None => wrong.push(format!("crates/{file} names {name}")),
            }
        }
    }
    for (i, (place, names, _)) in EXCEPTIONS.iter().enumerate() {
        for name in names.split(' ').filter(|name| *name != "*") {
            if !used.iter().any(|(at, used)| *at == i && *used == name) {
                wrong.push(format!("{place} does not name {name} any more"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "ask the method (crates/adapter/src/methods/facts.rs), or say why not:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_reasons_are_in_the_architecture_page() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md");
    let page = fs::read_to_string(page).expect("the page is there");
    let mut missing = BTreeSet::new();
    for (place, _, reason) in EXCEPTIONS {
        let line = page.lines().find(|line| {
            line.starts_with("- ")
                && line.contains(&format!("`{place}`"))
                && line.ends_with(&format!(": {reason}."))
        });
        if line.is_none() {
            missing.insert(format!("- `{place}`: {reason}."));
        }
    }
    let missing: Vec<_> = missing.into_iter().collect();
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn names_are_found_in_identifiers_and_literals_and_not_in_comments() {
    let text = "//! LoRA\nuse a::LohaConfig;\nlet x = lora_linear(\"IA3\"); // vera\nfn kr_lokr2() {}\n\
                let url = \"https://dora\";\nconst XLORA: AdaLora = admissible::<Adoration>();\n\
                #[cfg(test)]\nmod tests { use vera::X; }\n";
    let found: Vec<&str> = named(text).into_iter().collect();
    assert_eq!(found, ["adalora", "dora", "ia3", "loha", "lora", "xlora"]);
}

/// Rust files that are no tests.
fn sources(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut left: Vec<PathBuf> = fs::read_dir(root)
        .expect("crates are there")
        .map(|entry| entry.expect("they can be listed").path().join("src"))
        .filter(|src| src.is_dir())
        .collect();
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).expect("sources are there") {
            let path = entry.expect("they can be listed").path();
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            if ["tests", "testing", "contracts"].contains(&stem.as_ref()) {
                continue;
            }
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// The methods that code and literals name; comments and tests are left out.
fn named(text: &str) -> BTreeSet<&'static str> {
    let code = text.split("\nmod tests {").next().unwrap_or_default();
    let mut found = BTreeSet::new();
    for line in code.lines() {
        let line = match line.find("//") {
            // In a literal it begins no comment: `https://`.
            Some(at) if !line[..at].ends_with(':') => &line[..at],
            _ => line,
        };
        for word in line.split(|c: char| !c.is_alphanumeric()) {
            let mut parts: Vec<String> = words(word);
            // `AdaLora` and `XLora` are one name.
            for pair in 0..parts.len().saturating_sub(1) {
                let joined = format!("{}{}", parts[pair], parts[pair + 1]);
                if NAMES.contains(&joined.as_str()) {
                    parts[pair] = joined;
                    parts[pair + 1].clear();
                }
            }
            parts.push(word.to_lowercase());
            found.extend(
                NAMES
                    .iter()
                    .copied()
                    .filter(|name| parts.iter().any(|p| p == name)),
            );
        }
    }
    found
}

/// The words of `CamelCase`, in small letters.
fn words(text: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut was_small = true;
    for c in text.chars() {
        if all.is_empty() || (c.is_uppercase() && was_small) {
            all.push(String::new());
        }
        was_small = !c.is_uppercase();
        if let Some(last) = all.last_mut() {
            last.extend(c.to_lowercase());
        }
    }
    all
}

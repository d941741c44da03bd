//! The folders of a crate stand above one another, and none imports one that stands above it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A crate's folders and files, from the top down.
struct Order {
    name: &'static str,
    rooms: &'static [&'static str],
    /// What goes up all the same, with the reason.
    exceptions: &'static [(&'static str, &'static str, &'static str)],
}

const ORDERS: [Order; 5] = [
    Order {
        name: "train",
        rooms: &[
            "commands",
            "run",
            "training",
            "run_dir",
            "memory",
            "signals",
            "optimizer",
            "inputs",
            "task",
            "base",
            "device",
            "recipe",
            "files",
            "error",
            "text",
        ],
        exceptions: &[],
    },
    Order {
        name: "adapter",
        rooms: &[
            "offline", "combine", "files", "init", "model", "layers", "methods", "plan", "base",
            "config", "linalg", "staging", "error",
        ],
        exceptions: &[
            (
                "methods/xlora/",
                "",
                "an X-LoRA is a mixture of whole adapters",
            ),
            (
                "methods/method.rs",
                "layers::adaptable",
                "a method of the whole model attaches itself to it",
            ),
            (
                "methods/any.rs",
                "layers::adaptable",
                "a method of the whole model attaches itself to it",
            ),
            (
                "methods/adalora/allocator.rs",
                "",
                "the allocator moves ranks between the layers of a model",
            ),
        ],
    },
    Order {
        name: "model",
        rooms: &[
            "save",
            "generation",
            "model",
            "cache",
            "quantization",
            "checkpoint",
            "arch",
            "nn",
            "error",
            "config",
            "heads",
            "source",
            "digest",
        ],
        exceptions: &[],
    },
    Order {
        name: "data",
        rooms: &[
            "inspect",
            "batch",
            "token_stream",
            "examples",
            "records",
            "masks",
            "tokenizer",
            "files",
            "error",
            "chat_template",
            "template_env",
            "jinja",
            "message",
        ],
        exceptions: &[],
    },
    Order {
        name: "kernels",
        rooms: &[
            "check",
            "dora_linear",
            "kron_linear",
            "khatri_rao",
            "lora_linear",
            "block_linear",
            "quantized_linear",
            "attention",
            "rope",
            "cross_entropy",
            "embedding",
            "add_rms_norm",
            "rms_norm",
            "layer_norm",
            "silu_mul",
            "gelu",
            "adamw",
            "recompute",
            "base_weight",
            "quantized",
            "cpu",
            "profile",
        ],
        exceptions: &[
            (
                "block_linear/reference.rs",
                "",
                "the definition in plain operations is made of simpler ones",
            ),
            (
                "cpu/gemm/",
                "base_weight",
                "products read a weight as it is held",
            ),
            (
                "cpu/gemm/",
                "quantized",
                "products read a weight as it is held",
            ),
            (
                "quantized/mod.rs",
                "quantized_linear::cube",
                "a packed weight keeps its copy on a CubeCL device",
            ),
        ],
    },
];

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates")
}

#[test]
fn no_folder_imports_one_that_stands_above_it() {
    let mut wrong = Vec::new();
    for order in &ORDERS {
        let sources = Sources::read(&crates().join(order.name).join("src"));
        let place = |room: &str| order.rooms.iter().position(|r| *r == room);
        let unplaced: Vec<_> = sources
            .rooms()
            .into_iter()
            .filter(|room| place(room).is_none())
            .collect();
        assert!(
            unplaced.is_empty(),
            "{}: say where these stand: {unplaced:?}",
            order.name
        );
        let mut used = BTreeSet::new();
        for (file, path) in sources.imports() {
            let (Some(from), Some(to)) = (place(room_of(&file)), place(&path[0])) else {
                continue;
            };
            if from <= to {
                continue;
            }
            let excepted = order
                .exceptions
                .iter()
                .position(|(f, to, _)| file.starts_with(f) && path.join("::").starts_with(to));
            match excepted {
                Some(exception) => {
                    used.insert(exception);
                }
                None => wrong.push(format!("{}/{file} imports {}", order.name, path.join("::"))),
            }
        }
        for (i, (file, ..)) in order.exceptions.iter().enumerate() {
            assert!(used.contains(&i), "{file} is no exception any more");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A library for any Burn model brings no training framework along.
#[test]
fn the_adapter_crate_asks_burn_for_std_and_autodiff_alone() {
    let line = |manifest: &Path, section: &str| {
        let text = fs::read_to_string(manifest).expect("manifests are there");
        let (_, section) = text.split_once(section).expect("it has this section");
        let mut lines = section.lines().take_while(|line| !line.starts_with('['));
        let line = lines.find(|line| line.starts_with("burn ") || line.starts_with("burn."));
        line.expect("it depends on Burn").to_owned()
    };
    let own = line(&crates().join("adapter/Cargo.toml"), "\n[dependencies]\n");
    assert_eq!(own, "burn.workspace = true");
    let all = line(
        &crates().join("../Cargo.toml"),
        "\n[workspace.dependencies]\n",
    );
    let asked = "default-features = false, features = [\"std\", \"autodiff\"] }";
    assert!(all.ends_with(asked), "{all}");
}

#[test]
fn imports_are_found_however_they_are_written() {
    let text = "use crate::a::{b::C, self};\n// crate::no::X\nuse super::d::E as F;\n\
                fn f() -> crate::g::H { super::super::i::j() }\n\
                #[cfg(test)]\nmod tests { use crate::k::L; }\n";
    let found: Vec<String> = paths_in(text).into_iter().collect();
    let wanted = [
        "crate::a",
        "crate::a::b::C",
        "crate::g::H",
        "super::d::E",
        "super::super::i::j",
    ];
    assert_eq!(found, wanted);
}

/// The folder or file of `src` that a file is in.
fn room_of(file: &str) -> &str {
    let first = file.split('/').next().unwrap_or(file);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// The sources of a crate, tests left out.
struct Sources {
    /// By path in `src`.
    files: BTreeMap<String, String>,
    /// Where the items lie that `lib.rs` gives out.
    given_out: BTreeMap<String, Vec<String>>,
}

impl Sources {
    fn read(src: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut left = vec![src.to_owned()];
        while let Some(folder) = left.pop() {
            for entry in fs::read_dir(&folder).expect("sources are there") {
                let path = entry.expect("they can be listed").path();
                let name = path.strip_prefix(src).expect("it lies there");
                let name = name.to_string_lossy().replace('\\', "/");
                let is_test = ["tests", "testing", "contracts"]
                    .iter()
                    .any(|test| name.split('/').any(|p| p.trim_end_matches(".rs") == *test));
                if is_test {
                    continue;
                }
                if path.is_dir() {
                    left.push(path);
                } else if name.ends_with(".rs") {
                    files.insert(name, fs::read_to_string(&path).expect("it is text"));
                }
            }
        }
        let library = files.remove("lib.rs").unwrap_or_default();
        let mut given_out = BTreeMap::new();
        for tree in statements(&library, "pub use ") {
            for path in flat(&tree) {
                let path = path.trim_start_matches("crate::");
                let parts: Vec<String> = path.split("::").map(str::to_owned).collect();
                if let (Some(name), true) = (parts.last().cloned(), parts.len() > 1) {
                    given_out.insert(name, parts);
                }
            }
        }
        Self { files, given_out }
    }

    fn rooms(&self) -> BTreeSet<&str> {
        self.files.keys().map(|file| room_of(file)).collect()
    }

    /// Every file with every path into another room that it names.
    fn imports(&self) -> Vec<(String, Vec<String>)> {
        let rooms = self.rooms();
        let mut all = Vec::new();
        for (file, text) in &self.files {
            let module = module_of(file);
            for path in paths_in(text) {
                let mut parts = absolute(&path, &module);
                let Some(first) = parts.first().cloned() else {
                    continue;
                };
                let is_item = !rooms.contains(first.as_str()) || parts.len() == 1;
                if let (true, Some(from)) = (is_item, self.given_out.get(&first)) {
                    parts.clone_from(from);
                }
                if rooms.contains(parts[0].as_str()) && parts[0] != room_of(file) {
                    all.push((file.clone(), parts));
                }
            }
        }
        all
    }
}

fn module_of(file: &str) -> Vec<String> {
    let mut parts: Vec<String> = file
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// A path from the crate's root.
fn absolute(path: &str, module: &[String]) -> Vec<String> {
    let mut parts = path.split("::").peekable();
    let mut base = module.to_vec();
    match parts.peek() {
        Some(&"crate") => {
            base.clear();
            parts.next();
        }
        _ => {
            while let Some(part) = parts.next_if(|part| ["self", "super"].contains(part)) {
                if part == "super" {
                    base.pop();
                }
            }
        }
    }
    base.into_iter().chain(parts.map(str::to_owned)).collect()
}

/// All paths of a source file that begin with `crate` or `super`, tests left out.
fn paths_in(text: &str) -> BTreeSet<String> {
    let code: Vec<&str> = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line))
        .collect();
    let code = code.join("\n");
    let code = code.split("\nmod tests {").next().unwrap_or("");
    let mut found = BTreeSet::new();
    let mut rest = String::new();
    let mut left = code;
    // Trees of imports first: what is in them is no path by itself.
    while let Some(at) = left.find("use ") {
        let (before, after) = left.split_at(at);
        rest.push_str(before);
        let end = after.find(';').unwrap_or(after.len());
        let (tree, behind) = after.split_at(end);
        let tree = tree.trim_start_matches("use ");
        if tree.starts_with("crate::") || tree.starts_with("super::") {
            found.extend(flat(tree));
        }
        left = behind;
    }
    rest.push_str(left);
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for word in rest.split(|c: char| !is_word(c)) {
        if word.starts_with("crate::") || word.starts_with("super::") {
            found.insert(word.trim_end_matches(':').to_owned());
        }
    }
    found
}

/// What stands between `start` and a semicolon, wherever a line begins so.
fn statements(text: &str, start: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut left = text;
    while let Some(at) = left.find(start) {
        let after = &left[at + start.len()..];
        let end = after.find(';').unwrap_or(after.len());
        all.push(after[..end].to_owned());
        left = &after[end..];
    }
    all
}

/// The paths of a tree of imports, without `as` and `self`.
fn flat(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree).trim();
        let path = path.trim_end_matches("::self").trim_end_matches("::*");
        return vec![path.to_owned()];
    };
    let (before, inner) = tree.split_at(open);
    let inner = inner.trim_start_matches('{');
    let inner = &inner[..inner.rfind('}').unwrap_or(inner.len())];
    let mut depth = 0;
    let parts = inner.split(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts
        .filter(|part| !part.trim().is_empty())
        .flat_map(|part| flat(&format!("{before}{}", part.trim())))
        .collect()
}

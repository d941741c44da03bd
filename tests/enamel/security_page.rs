//! SECURITY.md: each promise has a test.

use std::fs;
use std::path::Path;

/// The folder of the workspace.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// All source of the workspace in one text.
fn source() -> String {
    fn collect(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|e| e == "rs") {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut text = String::new();
    for dir in ["crates", "tests"] {
        collect(&root().join(dir), &mut text);
    }
    text
}

/// The points of the page that promise something, and the names of tests in each.
fn promises(page: &str) -> Vec<(String, Vec<String>)> {
    let mut promises: Vec<(String, Vec<String>)> = Vec::new();
    let (mut promising, mut within) = (false, false);
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            promising = ["In general", "Your own files"].contains(&heading);
            within = false;
        } else if line.starts_with("It cannot") {
            promising = true;
        } else if let Some(point) = line.strip_prefix("- ") {
            within = promising;
            if within {
                promises.push((point.to_owned(), Vec::new()));
            }
        } else if line.trim().is_empty() {
            within = false;
        }
        if let Some((_, tests)) = promises.last_mut().filter(|_| within) {
            let code = line.split('`').skip(1).step_by(2);
            // Four words and more: no setting has as many.
            tests.extend(
                code.filter(|name| name.matches('_').count() > 2)
                    .map(str::to_owned),
            );
        }
    }
    promises
}

#[test]
fn each_promise_names_a_test_that_exists() {
    let page = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let source = source();
    let promises = promises(&page);
    assert!(promises.len() > 15, "the page is no longer understood");
    let mut wrong = Vec::new();
    for (promise, tests) in &promises {
        if tests.is_empty() {
            wrong.push(format!("no test: {promise}"));
        }
        for test in tests {
            if !source.contains(&format!("#[test]\n    fn {test}()"))
                && !source.contains(&format!("#[test]\nfn {test}()"))
            {
                wrong.push(format!("no such test: {test}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

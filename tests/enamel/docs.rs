//! The documentation: links lead somewhere, the book has every chapter, and commands that pages show exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path};
use std::process::Command;

/// The folder of the workspace.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Every page of the repository by its path from the root.
fn pages() -> BTreeMap<String, String> {
    /// What builds and runs leave is nobody's documentation.
    const LEFT_ALONE: [&str; 4] = ["target", "runs", "shared", "fuzz-failures"];
    fn collect(dir: &Path, pages: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if path.is_dir() {
                if !name.starts_with('.') && !LEFT_ALONE.contains(&&*name) {
                    collect(&path, pages);
                }
            } else if name.ends_with(".md") {
                let short = path.strip_prefix(root()).unwrap().to_string_lossy();
                pages.insert(short.into_owned(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut pages = BTreeMap::new();
    collect(root(), &mut pages);
    assert!(pages.len() > 30, "the pages are no longer found");
    pages
}

/// `path` without `.` and `..`; none where it leads out of the repository.
fn normal(path: &Path) -> Option<String> {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            Component::ParentDir => drop(parts.pop()?),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

/// A page's lines with their numbers (from 1), and whether each is inside a block of code.
fn lines(page: &str) -> Vec<(usize, &str, bool)> {
    let mut fence = None;
    let mut all = Vec::new();
    let mut above_is_empty = true;
    for (i, line) in page.lines().enumerate() {
        let start = line.trim_start();
        let marks: String = start.chars().take_while(|c| "`~".contains(*c)).collect();
        let toggles = marks.len() >= 3 && fence.as_ref().is_none_or(|open| *open == marks);
        if toggles {
            fence = if fence.is_some() { None } else { Some(marks) };
        }
        // Four blanks are code where no list or paragraph goes on.
        let indented = line.starts_with("    ") && above_is_empty;
        all.push((i + 1, line, toggles || fence.is_some() || indented));
        above_is_empty = line.trim().is_empty() || indented;
    }
    all
}

/// A line of prose with what stands in backticks taken out.
fn without_code(line: &str) -> String {
    let parts = line.split('`').enumerate();
    parts
        .filter(|(i, _)| i % 2 == 0)
        .map(|(_, part)| part)
        .collect()
}

/// Where the links of a page lead: line and target.
fn links(page: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (number, line, is_code) in lines(page) {
        if is_code {
            continue;
        }
        let line = without_code(line);
        let mut left = line.as_str();
        while let Some(at) = left.find("](") {
            let behind = &left[at + 2..];
            let end = behind.find(')').unwrap_or(behind.len());
            all.push((number, behind[..end].trim().to_owned()));
            left = &behind[end..];
        }
    }
    all
}

/// The anchors of a page's headings, as GitHub and mdBook make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let headings = lines(page).into_iter().filter(|(_, line, is_code)| {
        let marks = line.chars().take_while(|c| *c == '#').count();
        !is_code && (1..=6).contains(&marks) && line[marks..].starts_with(' ')
    });
    let mut all = BTreeSet::new();
    for (_, line, _) in headings {
        let text = line.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
            _ => None,
        });
        let name: String = kept.collect();
        let before = seen.entry(name.clone()).or_default();
        all.insert(match *before {
            0 => name,
            n => format!("{name}-{n}"),
        });
        *before += 1;
    }
    all
}

/// What is wrong with the links of a page that is read at `place`.
fn broken(place: &str, page: &str, pages: &BTreeMap<String, String>, in_book: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (number, link) in links(page) {
        if ["http://", "https://", "mailto:"]
            .iter()
            .any(|s| link.starts_with(s))
        {
            continue;
        }
        let (file, anchor) = link
            .split_once('#')
            .map_or((&*link, None), |(f, a)| (f, Some(a)));
        let folder = Path::new(place).parent().unwrap_or(Path::new(""));
        let target = match file {
            "" => Some(place.to_owned()),
            file => normal(&folder.join(file)),
        };
        let mut complain = |what: &str| wrong.push(format!("{place}:{number}: {link}: {what}"));
        let Some(target) = target else {
            complain("leads out of the repository");
            continue;
        };
        if in_book && !target.starts_with("docs/") {
            complain("leads out of the book");
        }
        if target != place && !root().join(&target).exists() {
            complain("nothing is there");
            continue;
        }
        let there = if target == place {
            Some(page)
        } else {
            pages.get(&target).map(|p| &**p)
        };
        match (anchor, there) {
            (Some(anchor), Some(there)) if !anchors(there).contains(anchor) => {
                complain("no such heading");
            }
            (Some(_), None) => complain("only pages have headings"),
            _ => {}
        }
    }
    wrong
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let pages = pages();
    let mut wrong = Vec::new();
    let mut count = 0;
    for (place, page) in &pages {
        count += links(page).len();
        wrong.extend(broken(place, page, &pages, place.starts_with("docs/")));
    }
    assert!(count > 80, "the links are no longer found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_the_book_includes_reads_the_same_there() {
    let pages = pages();
    let mut wrong = Vec::new();
    let mut count = 0;
    for (place, page) in pages.iter().filter(|(place, _)| place.starts_with("docs/")) {
        for part in page.split("{{#include ").skip(1) {
            let file = part.split("}}").next().unwrap_or("").trim();
            let folder = Path::new(place).parent().unwrap();
            let included = normal(&folder.join(file)).unwrap();
            let Some(included) = pages.get(&included) else {
                wrong.push(format!("{place}: {file}: nothing is there"));
                continue;
            };
            count += 1;
            wrong.extend(broken(place, included, &pages, true));
        }
    }
    assert!(count > 0, "the includes are no longer found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_page_of_docs_stands_in_the_summary() {
    let pages = pages();
    let summary = &pages["docs/SUMMARY.md"];
    let listed: BTreeSet<String> = links(summary)
        .into_iter()
        .map(|(_, link)| format!("docs/{link}"))
        .collect();
    let there: BTreeSet<String> = pages
        .keys()
        .filter(|place| place.starts_with("docs/") && *place != "docs/SUMMARY.md")
        .cloned()
        .collect();
    let missing: Vec<_> = there.difference(&listed).collect();
    assert!(missing.is_empty(), "not in docs/SUMMARY.md: {missing:?}");
}

/// A command that a page shows: where, and its words.
struct Shown {
    place: String,
    words: Vec<String>,
}

/// The commands of this program in blocks of code and between backticks, the latter only where they have a verb.
fn shown(pages: &BTreeMap<String, String>) -> Vec<Shown> {
    let mut all = Vec::new();
    for (place, page) in pages {
        for (number, line, is_code) in lines(page) {
            let texts: Vec<&str> = match is_code {
                true => vec![line.trim().trim_start_matches("$ ")],
                false => line.split('`').skip(1).step_by(2).collect(),
            };
            for text in texts {
                let text = text.split(" #").next().unwrap_or(text);
                let text = text.split([';', '|', '>']).next().unwrap_or(text);
                let words: Vec<&str> = text.split_whitespace().collect();
                let own = match words.as_slice() {
                    ["cargo", "run", "--release", "--", own @ ..] => own,
                    ["enamel", own @ ..] if !own.is_empty() => own,
                    _ => continue,
                };
                all.push(Shown {
                    place: format!("{place}:{number}"),
                    words: own.iter().map(|word| (*word).to_owned()).collect(),
                });
            }
        }
    }
    all
}

/// The program's own help, by command.
#[derive(Default)]
struct Help(BTreeMap<Vec<String>, String>);

impl Help {
    /// What `--help` says of a command; none where there is no such command.
    fn of(&mut self, command: &[String]) -> &str {
        self.0.entry(command.to_vec()).or_insert_with(|| {
            let output = Command::new(env!("CARGO_BIN_EXE_enamel-under-test"))
                .args(command)
                .arg("--help")
                .output()
                .expect("the binary runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    /// The commands below one, as its help lists them.
    fn verbs(&mut self, command: &[String]) -> BTreeSet<String> {
        let help = self.of(command);
        let Some((_, list)) = help.split_once("Commands:\n") else {
            return BTreeSet::new();
        };
        let list = list.lines().take_while(|line| line.starts_with("  "));
        let named = list.filter(|line| !line.starts_with("   "));
        named
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect()
    }

    /// The options of a command, long and short.
    fn options(&mut self, command: &[String]) -> BTreeSet<String> {
        let lines = self.of(command).lines().map(str::trim_start);
        let lines = lines.filter(|line| line.starts_with('-'));
        let names = lines.flat_map(|line| {
            let named = line.split("  ").next().unwrap_or(line);
            named
                .split([' ', ',', '=', '['])
                .filter(|word| word.starts_with('-'))
        });
        names.map(str::to_owned).collect()
    }
}

/// A word without a value that is joined to it, as in `--set=a=b`, if it is an option.
fn option(word: &str) -> Option<&str> {
    let name = word.split('=').next().unwrap_or(word);
    let letter = name.trim_start_matches('-').chars().next()?;
    (name.starts_with('-') && letter.is_alphabetic()).then_some(name)
}

#[test]
fn commands_in_the_documentation_exist_with_their_options_and_files() {
    let pages = pages();
    let mut help = Help::default();
    let mut wrong = Vec::new();
    let shown = shown(&pages);
    assert!(shown.len() > 40, "the commands are no longer found");
    for Shown { place, words } in shown {
        // `COMMAND` and the like stand for any.
        if words[0].chars().all(|c| c.is_uppercase()) {
            continue;
        }
        let mut command = Vec::new();
        for word in &words {
            if !help.verbs(&command).contains(word) {
                break;
            }
            command.push(word.clone());
        }
        let text = words.join(" ");
        if command.is_empty() && option(&words[0]).is_none() {
            wrong.push(format!("{place}: enamel {text}: no such command"));
            continue;
        }
        if !help.verbs(&command).is_empty() && words.len() > command.len() {
            let next = &words[command.len()];
            if option(next).is_none() {
                wrong.push(format!("{place}: enamel {text}: no command {next}"));
            }
        }
        let options = help.options(&command);
        for word in &words[command.len()..] {
            match option(word) {
                Some(name) if !options.contains(name) => {
                    wrong.push(format!("{place}: enamel {text}: no option {name}"));
                }
                None if word.starts_with("datasets/") && !root().join(word).exists() => {
                    wrong.push(format!("{place}: enamel {text}: no file {word}"));
                }
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The pages' own rules, on text that breaks them.
#[test]
fn what_is_wrong_in_a_page_is_found() {
    let page = concat!(
        "# One Page's `name`\n\n## Twice\n\n## Twice\n\n",
        "[a](#one-pages-name) [b](#twice-1) `[c](#no)`\n\n    [d](#no)\n\n",
        "```sh\nenamel train x --resume  # goes on\n# [e](#no)\n```\n\n[f](#twice-2) [g](no.md)\n",
    );
    let pages = BTreeMap::from([("docs/x.md".to_owned(), page.to_owned())]);
    let wrong = broken("docs/x.md", page, &pages, true);
    let wanted = [
        "docs/x.md:16: #twice-2: no such heading",
        "docs/x.md:16: no.md: nothing is there",
    ];
    assert_eq!(wrong, wanted);
    let commands: Vec<_> = shown(&pages)
        .into_iter()
        .map(|s| s.words.join(" "))
        .collect();
    assert_eq!(commands, ["train x --resume"]);
}

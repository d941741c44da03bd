//! A run owns its directory: it touches nothing that is not its own, shares it with nobody, and loses nothing.

use std::collections::BTreeMap;
use std::fmt::{Debug, Formatter};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::Value;

use crate::support::enamel_process::{Workshop, said, signal, text, wait_for};
use crate::support::goldens::{copy, json};

/// The id in a run directory's marker.
pub fn id(workshop: &Workshop, run: &str) -> String {
    let text = fs::read_to_string(workshop.path(run).join("run.lock")).expect("a marker");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let mut ids = lines.filter_map(|marker| marker["enamel_run"].as_str().map(str::to_owned));
    ids.rfind(|id| !id.is_empty()).expect("an id")
}

/// What a file holds, which a failed assertion does not print.
#[derive(PartialEq)]
pub struct Content(pub Vec<u8>);

impl Debug for Content {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut hash = DefaultHasher::new();
        self.0.hash(&mut hash);
        write!(f, "{} bytes #{:x}", self.0.len(), hash.finish())
    }
}

/// What a marker says, whoever is or was at work and however often it has been written.
fn marker(text: &[u8]) -> Option<Vec<u8>> {
    let lines = text
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let mut last = lines.max_by_key(|line| line["written"].as_u64())?;
    for varying in ["write", "written", "owner"] {
        last.as_object_mut()?.shift_remove(varying)?;
    }
    Some(last.to_string().into_bytes())
}

/// Every file below a folder with its content; folders end in a slash.
pub fn everything(dir: &Path) -> BTreeMap<PathBuf, Content> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeMap<PathBuf, Content>) {
        for entry in fs::read_dir(dir).expect("a folder").flatten() {
            let path = entry.path();
            let name = path.strip_prefix(root).expect("below it").to_owned();
            if entry.file_type().expect("a type").is_dir() {
                found.insert(name.join(""), Content(Vec::new()));
                walk(root, &path, found);
            } else {
                let mut bytes = fs::read(&path).unwrap_or_default();
                if path.ends_with("run.lock") {
                    bytes = marker(&bytes).unwrap_or(bytes);
                }
                found.insert(name, Content(bytes));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// Names that begin with a dot, in a run directory and its checkpoints.
pub fn debris(workshop: &Workshop, run: &str) -> Vec<PathBuf> {
    let hidden = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with('.')
    };
    let all = everything(&workshop.path(run)).into_keys();
    all.filter(hidden).collect()
}

/// 40 steps, saved every 5, with dropout.
fn recipe(workshop: &Workshop) {
    workshop.recipe(
        "r.toml",
        "r = 4\nlora_alpha = 8\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1",
        "train = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 128",
        "max_steps = 40\nbatch_size = 2\ngradient_accumulation_steps = 4\nlearning_rate = 5e-3\nlogging_steps = 1\n\
         eval_strategy = \"steps\"\neval_steps = 10\nsave_steps = 5\nsave_total_limit = 3\nsamples = 1\n\
         max_new_tokens = 2",
    );
}

fn train<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "r.toml", "--output", run], more].concat()
}

/// Copies a folder with all in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).expect("room on the disk");
    for name in everything(from).into_keys() {
        match name.ends_with("") && from.join(&name).is_dir() {
            true => fs::create_dir(to.join(name)).expect("room on the disk"),
            false => copy(&from.join(&name), &to.join(&name)),
        }
    }
}

/// Starts a run and kills it once these files have been there, one after the other.
fn killed_after(workshop: &Workshop, arguments: &[&str], files: &[&str]) {
    let mut child = workshop
        .command(arguments)
        .spawn()
        .expect("the binary runs");
    let there = files
        .iter()
        .all(|file| wait_for(&workshop.path(file), &mut child));
    signal(&child, "KILL");
    let output = child.wait_with_output().expect("a child of ours");
    assert!(there && !output.status.success(), "{}", said(&output));
}

fn killed(workshop: &Workshop, arguments: &[&str], file: &str) {
    killed_after(workshop, arguments, &[file]);
}

fn steps(workshop: &Workshop, run: &str) -> Vec<u64> {
    let lines = workshop.metrics(run, "train").into_iter();
    lines.map(|e| e["step"].as_u64().expect("a step")).collect()
}

fn checkpoints(workshop: &Workshop, run: &str) -> Vec<String> {
    let entries = fs::read_dir(workshop.path(run).join("checkpoints")).expect("checkpoints");
    let names = entries.flatten().map(|e| e.file_name());
    let mut names: Vec<_> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn what_no_run_wrote_is_never_touched() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let foreign = [
        "checkpoints/my-thesis.txt",
        "adapter/adapter_model.safetensors",
        "summary.json",
        "metrics.jsonl",
        "report.html",
        "run.lock",
        "recipe.lock.toml",
        "former-lines/mine",
    ];
    for name in foreign {
        let home = workshop.path("home");
        fs::create_dir_all(home.join(name).parent().expect("a folder")).expect("room");
        fs::write(home.join(name), "mine").expect("room on the disk");
        fs::write(home.join("notes.txt"), "mine").expect("room on the disk");
        let before = everything(&home);
        for more in [
            &[][..],
            &["--overwrite"],
            &["--resume"],
            &["--set", "output.overwrite=true"],
        ] {
            let error = workshop.fail(&train("home", more));
            let part = name.split('/').next().expect("a name");
            assert!(
                error.contains(part) && error.contains("--output"),
                "{error}"
            );
            assert_eq!(everything(&home), before, "{name} {more:?}");
        }
        fs::remove_dir_all(home).expect("it was there");
    }
}

#[test]
fn a_project_folder_may_be_the_run_directory_and_keeps_its_own() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let model = everything(&workshop.path("model"));
    // The base in ./model is not in the way of an adapter.
    workshop.run(&train(".", &[]));
    assert!(workshop.path("adapter").is_dir());
    workshop.run(&train(".", &["--overwrite", "--set", "seed=4"]));
    assert_eq!(everything(&workshop.path("model")), model);
    // A run that trains the model whole would write there.
    workshop.recipe(
        "r.toml",
        "method = \"full\"",
        "train = \"train.jsonl\"",
        "max_steps = 1",
    );
    let before = everything(&workshop.path("adapter"));
    let error = workshop.fail(&train(".", &["--overwrite"]));
    assert!(error.contains("model"), "{error}");
    assert_eq!(everything(&workshop.path("model")), model);
    assert_eq!(everything(&workshop.path("adapter")), before);
}

#[test]
fn what_somebody_put_into_a_run_is_not_the_runs() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("run", &[]));
    let put = |name: &str| fs::write(workshop.path("run").join(name), "mine").expect("room");
    for name in [
        "adapter/notes.txt",
        "adapter/README.md",
        "checkpoints/step-000040/notes.txt",
    ] {
        let kept = fs::read(workshop.path("run").join(name)).ok();
        put(name);
        let before = everything(&workshop.path("run"));
        let error = workshop.fail(&train("run", &["--overwrite"]));
        assert!(
            error.contains(name.rsplit_once('/').expect("a folder").0),
            "{error}"
        );
        assert_eq!(everything(&workshop.path("run")), before, "{name}");
        match kept {
            Some(bytes) => fs::write(workshop.path("run").join(name), bytes).expect("room"),
            None => fs::remove_file(workshop.path("run").join(name)).expect("it was there"),
        }
    }
    // Beside the run's own things they are in nobody's way.
    put("checkpoints/notes.txt");
    put("notes.txt");
    workshop.run(&train(
        "run",
        &["--overwrite", "--set", "train.max_steps=10"],
    ));
    assert!(workshop.path("run/checkpoints/notes.txt").is_file());
    assert!(workshop.path("run/notes.txt").is_file());
    assert_eq!(
        checkpoints(&workshop, "run"),
        ["notes.txt", "step-000005", "step-000010"]
    );
}

#[test]
fn a_second_run_is_refused_while_the_first_lives() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let long = ["--set", "train.max_steps=4000"];
    let mut child = workshop
        .command(&train("run", &long))
        .spawn()
        .expect("the binary runs");
    assert!(wait_for(
        &workshop.path("run/checkpoints/step-000005"),
        &mut child
    ));
    for more in [&[][..], &["--resume"], &["--overwrite"]] {
        let error = workshop.fail(&train("run", &[&long[..], more].concat()));
        let process = format!("process {} on ", child.id());
        assert!(
            error.contains(&process) && error.contains("started"),
            "{error}"
        );
    }
    signal(&child, "KILL");
    child.wait().expect("a child of ours");
    // A dead owner's lock is nobody's.
    workshop.fail(&train("run", &long));
    let mut child = workshop
        .command(&train("run", &[&long[..], &["--resume"]].concat()))
        .spawn()
        .expect("the binary runs");
    assert!(wait_for(
        &workshop.path("run/checkpoints/step-000030"),
        &mut child
    ));
    signal(&child, "TERM");
    let output = child.wait_with_output().expect("a child of ours");
    assert_eq!(output.status.code(), Some(143), "{}", said(&output));
    let steps = steps(&workshop, "run");
    let wanted: Vec<u64> = (1..=steps.len() as u64).collect();
    assert_eq!(steps, wanted);
    assert_eq!(debris(&workshop, "run"), [""; 0].map(PathBuf::from));
}

/// How often two runs start at the same moment; `ENAMEL_TRIES=100` for the long form.
fn tries() -> usize {
    let given = std::env::var("ENAMEL_TRIES").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(8)
}

#[test]
fn of_two_runs_at_once_exactly_one_wins() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let short = ["--set", "train.max_steps=4", "--set", "train.samples=0"];
    let mut solo = BTreeMap::new();
    for seed in ["seed=3", "seed=4"] {
        workshop.run(&train(seed, &[&short[..], &["--set", seed]].concat()));
        solo.insert(seed, workshop.adapter(seed));
    }
    let spawn = |seed: &str| -> Child {
        let arguments = train("both", &short);
        let seed = ["--set", seed];
        let mut command = workshop.command(&[&arguments[..], &seed].concat());
        command.spawn().expect("the binary runs")
    };
    for number in 0..tries() {
        let _ = fs::remove_dir_all(workshop.path("both"));
        let children = ["seed=3", "seed=4"].map(|seed| (seed, spawn(seed)));
        let ended = children.map(|(seed, child)| {
            let output = child.wait_with_output().expect("a child of ours");
            (seed, output)
        });
        let winners: Vec<_> = ended
            .iter()
            .filter(|(_, output)| output.status.success())
            .map(|(seed, _)| *seed)
            .collect();
        let all = ended
            .each_ref()
            .map(|(seed, output)| format!("{seed}: {}", said(output)));
        assert_eq!(winners.len(), 1, "try {number}: {all:?}");
        let lock = fs::read_to_string(workshop.path("both/recipe.lock.toml")).expect("a lock");
        let wanted = winners[0].replace('=', " = ");
        assert!(
            lock.lines().any(|line| line == wanted),
            "try {number}: {lock}"
        );
        assert!(workshop.adapter("both") == solo[winners[0]], "try {number}");
        assert_eq!(steps(&workshop, "both"), [1, 2, 3, 4], "try {number}");
        let losses = |run| -> Vec<Value> {
            let lines = workshop.metrics(run, "train").into_iter();
            lines.map(|e| e["loss"].clone()).collect()
        };
        assert_eq!(losses("both"), losses(winners[0]), "try {number}");
        assert_eq!(debris(&workshop, "both"), [""; 0].map(PathBuf::from));
    }
}

#[test]
fn an_old_run_comes_back_when_the_new_one_fails_before_its_first_checkpoint() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("run", &[]));
    let before = everything(&workshop.path("run"));
    // Found before anything is touched: weights that are cut short.
    let weights = workshop.path("model/model.safetensors");
    let whole = fs::read(&weights).expect("the weights");
    fs::write(&weights, &whole[..whole.len() / 2]).expect("room on the disk");
    workshop.fail(&train("run", &["--overwrite"]));
    assert_eq!(everything(&workshop.path("run")), before);
    fs::write(&weights, &whole).expect("room on the disk");
    // Found in the middle of the first steps: a loss that is no number.
    let wild = [
        "--overwrite",
        "--set",
        "train.learning_rate=3e38",
        "--set",
        "train.max_grad_norm=0.0",
        "--set",
        "train.save_steps=40",
        "--set",
        "train.eval_steps=40",
    ];
    let output = workshop.output(&train("run", &wild));
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        text(&output.stdout).contains("is back"),
        "{}",
        said(&output)
    );
    assert_eq!(everything(&workshop.path("run")), before);
    // Killed there: whoever comes next puts it back.
    let long = [
        "--overwrite",
        "--set",
        "train.save_steps=4000",
        "--set",
        "train.max_steps=4000",
    ];
    let aside = format!("run/.replaced-{}", id(&workshop, "run"));
    killed(&workshop, &train("run", &long), &aside);
    let said = workshop.run(&train("run", &["--resume"]));
    assert!(
        said.contains("old one is back") && said.contains("is finished"),
        "{said}"
    );
    assert_eq!(everything(&workshop.path("run")), before);
    // And it goes when the new one has come to a checkpoint.
    workshop.run(&train("run", &["--overwrite", "--set", "seed=5"]));
    assert_eq!(steps(&workshop, "run").len(), 40);
    assert_eq!(debris(&workshop, "run"), [""; 0].map(PathBuf::from));
    let lock = fs::read_to_string(workshop.path("run/recipe.lock.toml")).expect("a lock");
    assert!(lock.contains("seed = 5"), "{lock}");
}

#[test]
fn a_run_is_not_made_of_what_it_replaces() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("run", &[]));
    let before = everything(&workshop.path("run"));
    let from = |name: &str| format!("init_from = {:?}", workshop.path(name));
    #[cfg(unix)]
    std::os::unix::fs::symlink(workshop.path("run"), workshop.path("link")).expect("a link");
    for name in [
        "run/adapter",
        "run/checkpoints/step-000035/adapter",
        "link/adapter",
    ] {
        workshop.recipe(
            "i.toml",
            &from(name),
            "train = \"train.jsonl\"",
            "max_steps = 2",
        );
        let again = ["train", "i.toml", "--output", "run", "--overwrite"];
        let error = workshop.fail(&again);
        assert!(error.contains("nothing was changed"), "{error}");
        assert_eq!(everything(&workshop.path("run")), before, "{name}");
    }
    workshop.run(&["train", "i.toml", "--output", "other"]);
}

#[test]
fn resuming_a_run_that_has_ended_changes_nothing() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let early = [
        "--set",
        "train.early_stopping_patience=1",
        "--set",
        "train.early_stopping_threshold=100",
        "--set",
        "train.load_best_model_at_end=false",
    ];
    for (run, more) in [("whole", &[][..]), ("early", &early)] {
        workshop.run(&train(run, more));
        let before = everything(&workshop.path(run));
        for _ in 0..2 {
            let said = workshop.run(&train(run, &[more, &["--resume"]].concat()));
            assert!(said.contains("is finished"), "{said}");
            assert_eq!(everything(&workshop.path(run)), before);
        }
        // Another recipe is compared here too.
        let other = [more, &["--resume", "--set", "train.learning_rate=1e-4"]].concat();
        let error = workshop.fail(&train(run, &other));
        assert!(error.contains("another recipe"), "{error}");
        // Checkpoints that were removed to save space make no difference.
        fs::remove_dir_all(workshop.path(run).join("checkpoints")).expect("checkpoints");
        let before = everything(&workshop.path(run));
        workshop.run(&train(run, &[more, &["--resume"]].concat()));
        let error = workshop.fail(&train(run, &other));
        assert!(error.contains("another recipe"), "{error}");
        assert_eq!(everything(&workshop.path(run)), before);
        // Without its summary it cannot be told; nothing is begun anew over it.
        fs::remove_file(workshop.path(run).join("summary.json")).expect("a summary");
        let before = everything(&workshop.path(run));
        let error = workshop.fail(&train(run, &[more, &["--resume"]].concat()));
        assert!(error.contains("no checkpoint"), "{error}");
        assert_eq!(everything(&workshop.path(run)), before);
    }
}

#[test]
fn resuming_starts_anew_only_where_nothing_is() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("absent", &["--resume"]));
    fs::create_dir(workshop.path("empty")).expect("room");
    workshop.run(&train("empty", &["--resume"]));
    assert!(workshop.adapter("absent") == workshop.adapter("empty"));
    fs::create_dir(workshop.path("other")).expect("room");
    fs::write(workshop.path("other/notes.txt"), "mine").expect("room");
    let error = workshop.fail(&train("other", &["--resume"]));
    assert!(error.contains("no run here"), "{error}");
    assert_eq!(everything(&workshop.path("other")).len(), 1);
    // A run that ended before its first checkpoint starts again, under the same recipe only.
    killed(
        &workshop,
        &train("early", &["--set", "train.save_steps=40"]),
        "early/metrics.jsonl",
    );
    let error = workshop.fail(&train("early", &["--resume", "--set", "seed=9"]));
    assert!(error.contains("another recipe"), "{error}");
    workshop.run(&train(
        "early",
        &["--resume", "--set", "train.save_steps=40"],
    ));
    assert!(workshop.adapter("absent") == workshop.adapter("early"));
    assert_eq!(steps(&workshop, "early"), (1..=40).collect::<Vec<_>>());
}

#[test]
fn going_on_from_an_older_checkpoint_begins_a_line_of_its_own() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("run", &["--set", "train.save_total_limit=10"]));
    let whole = workshop.adapter("run");
    let old = everything(&workshop.path("run"));
    let from = workshop
        .path("run/checkpoints/step-000015")
        .display()
        .to_string();
    killed_after(
        &workshop,
        &train(
            "run",
            &["--resume", &from, "--set", "train.save_total_limit=2"],
        ),
        &[
            "run/former-lines/000/checkpoints/step-000040",
            "run/checkpoints/step-000025",
        ],
    );
    // The former line is whole: what is of both stayed, the rest was set aside.
    let former = everything(&workshop.path("run/former-lines/000"));
    let now = everything(&workshop.path("run"));
    for (name, bytes) in &old {
        let kept = former.get(name).unwrap_or_else(|| &now[name]);
        let own = name.ends_with("run.lock") || name.ends_with("recipe.lock.toml");
        assert!(own || kept == bytes, "{}", name.display());
    }
    let names = checkpoints(&workshop, "run");
    let steps_of = names.iter().filter(|name| name.starts_with("step"));
    assert!(steps_of.clone().count() >= 4, "{names:?}");
    assert!(
        steps_of.max() < Some(&"step-000040".to_owned()),
        "{names:?}"
    );
    assert!(!workshop.path("run/adapter").exists());
    // What goes on is the new line, with its own checkpoints pruned and its own records.
    let said = workshop.run(&train(
        "run",
        &["--resume", "--set", "train.save_total_limit=2"],
    ));
    assert!(said.contains("resuming after step "), "{said}");
    assert!(
        !said.contains("after step 15;") && !said.contains("is finished"),
        "{said}"
    );
    assert_eq!(steps(&workshop, "run"), (1..=40).collect::<Vec<_>>());
    assert_eq!(
        checkpoints(&workshop, "run"),
        [
            "step-000005",
            "step-000010",
            "step-000015",
            "step-000035",
            "step-000040"
        ]
    );
    assert!(
        workshop.adapter("run") == whole,
        "the same steps give the same bits"
    );
    assert_eq!(debris(&workshop, "run"), [""; 0].map(PathBuf::from));
    // A checkpoint of a former line goes on elsewhere.
    let from = workshop.path("run/former-lines/000/checkpoints/step-000035");
    let from = from.display().to_string();
    let error = workshop.fail(&train("run", &["--resume", &from]));
    assert!(error.contains("--output"), "{error}");
    workshop.run(&train("elsewhere", &["--resume", &from]));
    assert!(workshop.adapter("elsewhere") == whole);
}

#[test]
fn the_newest_checkpoint_by_name_is_the_same_as_resuming() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("run", &[]));
    let before = everything(&workshop.path("run"));
    let from = workshop
        .path("run/checkpoints/step-000040")
        .display()
        .to_string();
    let said = workshop.run(&train("run", &["--resume", &from]));
    assert!(said.contains("is finished"), "{said}");
    assert_eq!(everything(&workshop.path("run")), before);
}

#[test]
fn a_best_checkpoint_that_is_gone_is_said_at_the_start() {
    let workshop = Workshop::new();
    recipe(&workshop);
    let best = [
        "--set",
        "train.load_best_model_at_end=true",
        "--set",
        "train.eval_steps=5",
    ];
    workshop.run(&train("run", &best));
    let summary = json(&workshop.path("run/summary.json"));
    // As if it had been killed at a checkpoint after the best one, which was then removed.
    for file in ["summary.json", "report.html"] {
        fs::remove_file(workshop.path("run").join(file)).expect("it was there");
    }
    fs::remove_dir_all(workshop.path("run/adapter")).expect("an adapter");
    let newest = checkpoints(&workshop, "run").pop().expect("a checkpoint");
    let state = workshop
        .path("run/checkpoints")
        .join(&newest)
        .join("state.json");
    let step = json(&state)["step"].as_u64();
    let at = summary["best"]["step"].as_u64().expect("a step");
    if Some(at) == step {
        // The best is the last: give it another.
        let mut state_json = json(&state);
        state_json["best"]["step"] = 20.into();
        without_hashes(&mut state_json);
        fs::write(&state, state_json.to_string()).expect("room");
        let _ = fs::remove_dir_all(workshop.path("run/checkpoints/step-000020"));
    } else {
        fs::remove_dir_all(workshop.path(&format!("run/checkpoints/step-{at:06}"))).expect("it");
    }
    let said = workshop.run(&train("run", &[&best[..], &["--resume"]].concat()));
    let place = said
        .find("best checkpoint")
        .unwrap_or_else(|| panic!("{said}"));
    assert!(Some(place) < said.find("steps  "), "{said}");
    assert!(workshop.path("run/adapter").is_dir());
}

#[test]
fn leftovers_of_kills_go_and_nothing_else() {
    let workshop = Workshop::new();
    recipe(&workshop);
    killed(&workshop, &train("run", &[]), "run/checkpoints/step-000010");
    let id = id(&workshop, "run");
    let mine = [
        ".saving-mine",
        ".writing-abcdef",
        "checkpoints/.saving-abcdef",
    ];
    for name in mine {
        fs::write(workshop.path("run").join(name), "mine").expect("room");
    }
    for name in [
        format!(".writing-{id}-x"),
        format!("checkpoints/.saving-{id}-y"),
    ] {
        fs::create_dir_all(workshop.path("run").join(name)).expect("room");
    }
    workshop.run(&train("run", &["--resume"]));
    let mut left = debris(&workshop, "run");
    left.sort();
    let mut mine = mine.map(PathBuf::from);
    mine.sort();
    assert_eq!(left, mine);
}

#[test]
fn a_run_whose_directory_is_removed_fails() {
    let workshop = Workshop::new();
    recipe(&workshop);
    for moved in [false, true] {
        let long = ["--set", "train.max_steps=4000"];
        let mut child = workshop
            .command(&train("run", &long))
            .spawn()
            .expect("the binary runs");
        assert!(wait_for(
            &workshop.path("run/checkpoints/step-000005"),
            &mut child
        ));
        let aside = workshop.path("aside");
        fs::rename(workshop.path("run"), &aside).expect("room");
        if !moved {
            // The run may be writing into it.
            while fs::remove_dir_all(&aside).is_err() {}
        }
        let output = child.wait_with_output().expect("a child of ours");
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(
            text(&output.stderr).contains("removed"),
            "{}",
            said(&output)
        );
        assert!(!workshop.path("run").exists(), "it came back");
    }
}

/// Makes a checkpoint's state look as older versions wrote it, which may be edited.
fn without_hashes(state: &mut Value) {
    let fields = state.as_object_mut().expect("fields");
    for name in ["files", "sha256"] {
        fields.shift_remove(name);
    }
}

/// Makes a run look as older versions left it.
fn without_marker(workshop: &Workshop, run: &str) {
    fs::remove_file(workshop.path(run).join("run.lock")).expect("a marker");
    for name in checkpoints(workshop, run) {
        let path = workshop
            .path(run)
            .join("checkpoints")
            .join(name)
            .join("state.json");
        let mut state = json(&path);
        without_hashes(&mut state);
        let fields = state.as_object_mut().expect("fields");
        fields.shift_remove("run");
        fields.shift_remove("line");
        fs::write(&path, state.to_string()).expect("room");
    }
}

#[test]
fn a_run_of_an_older_version_is_gone_on_with_and_replaced_when_asked() {
    let workshop = Workshop::new();
    recipe(&workshop);
    workshop.run(&train("whole", &[]));
    let mut child = workshop
        .command(&train("run", &[]))
        .spawn()
        .expect("the binary runs");
    assert!(wait_for(
        &workshop.path("run/checkpoints/step-000010"),
        &mut child
    ));
    signal(&child, "TERM");
    child.wait().expect("a child of ours");
    without_marker(&workshop, "run");
    let error = workshop.fail(&train("run", &[]));
    assert!(error.contains("there is a run here already"), "{error}");
    assert!(!workshop.path("run/run.lock").exists());
    workshop.run(&train("run", &["--resume"]));
    assert!(workshop.adapter("run") == workshop.adapter("whole"));
    assert_eq!(checkpoints(&workshop, "run").len(), 3);

    without_marker(&workshop, "whole");
    let before = everything(&workshop.path("whole"));
    workshop.run(&train("whole", &["--resume"]));
    assert_eq!(everything(&workshop.path("whole")), before);
    // With something that it did not write, it is not taken for one.
    fs::write(workshop.path("whole/adapter/notes.txt"), "mine").expect("room");
    let before = everything(&workshop.path("whole"));
    let error = workshop.fail(&train("whole", &["--overwrite"]));
    assert!(error.contains("adapter"), "{error}");
    assert_eq!(everything(&workshop.path("whole")), before);
    fs::remove_file(workshop.path("whole/adapter/notes.txt")).expect("it was there");
    workshop.run(&train(
        "whole",
        &["--overwrite", "--set", "train.max_steps=5"],
    ));
    assert_eq!(checkpoints(&workshop, "whole"), ["step-000005"]);
}

#[test]
fn a_copied_run_is_a_run() {
    let workshop = Workshop::new();
    recipe(&workshop);
    killed(&workshop, &train("run", &[]), "run/checkpoints/step-000010");
    copy_folder(&workshop.path("run"), &workshop.path("copy"));
    workshop.run(&train("copy", &["--resume"]));
    workshop.run(&train("run", &["--resume"]));
    assert!(workshop.adapter("run") == workshop.adapter("copy"));
    // A checkpoint of another run is foreign, whatever it is called.
    workshop.run(&train("other", &["--set", "seed=8"]));
    let step = "checkpoints/step-000040";
    fs::remove_dir_all(workshop.path("run").join(step)).expect("a checkpoint");
    copy_folder(
        &workshop.path("other").join(step),
        &workshop.path("run").join(step),
    );
    let error = workshop.fail(&train("run", &["--overwrite"]));
    assert!(error.contains("step-000040"), "{error}");
}

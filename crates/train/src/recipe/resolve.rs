//! From settings as written to settings as used: paths, defaults that depend on others, contradictions.

use std::path::{Path, PathBuf};

use enamel_model::source::expand_home;

use super::Recipe;
use super::adapter::{FORMS, InitWeights, misplaced};
use super::quantization;
use super::read::Origins;
use super::settings::{DataSettings, GradientCheckpointing, Schedule, Strategy, TrainSettings};
use super::task::TaskName;
use crate::error::recipe::{Origin, Problem};

/// Fills in `recipe` and appends what contradicts itself to `problems`.
pub(super) fn resolve(
    mut recipe: Recipe,
    path: &Path,
    origins: &Origins,
    problems: &mut Vec<Problem>,
) -> Recipe {
    // What could not be read has been reported, and stands at its default: no second complaint.
    let readable = problems.is_empty();
    let mut found = Findings {
        origins,
        list: Vec::new(),
    };
    resolve_paths(&mut recipe, path, &mut found);
    quantization::check(&mut recipe.model, &mut found);
    quantization::check_method(&mut recipe, &mut found);
    quantization::check_loftq(&mut recipe, &mut found);
    check_adapter(&mut recipe, &mut found);
    check_data(&mut recipe, &mut found);
    check_task(&mut recipe, &mut found);
    check_length(&mut recipe, &mut found);
    check_rhythm(&mut recipe, &mut found);
    if recipe.output.dir.is_none() {
        recipe.output.dir = Some(default_output(path));
    }
    if readable {
        problems.append(&mut found.list);
    }
    recipe
}

pub(super) struct Findings<'a> {
    origins: &'a Origins,
    list: Vec<Problem>,
}

impl Findings<'_> {
    /// A problem with the setting `name`, and what to do about it.
    pub(super) fn add(&mut self, name: &str, message: &str, help: &str) {
        self.list.push(Problem {
            origin: self.origins.blame(name),
            message: message.to_owned(),
            help: (!help.is_empty()).then(|| help.to_owned()),
        });
    }

    /// Whether the setting was given at all.
    pub(super) fn written(&self, name: &str) -> bool {
        self.origins.get(name).is_some()
    }

    /// Whether the file's `name` gives way to an override of `other`, which it excludes.
    pub(super) fn gives_way(&self, name: &str, other: &str) -> bool {
        let overridden = |name| matches!(self.origins.get(name), Some(Origin::Override(_)));
        overridden(other) && !overridden(name)
    }
}

/// Whether a model reference is a relative path, by its form alone: what lies on the disk must not
/// decide what a recipe means.
pub(super) fn is_path_reference(reference: &str) -> bool {
    !reference.starts_with("hf:")
        && (reference.starts_with(['.', '~'])
            || reference.contains(['/', '\\'])
            || reference.ends_with(".gguf"))
}

/// A model reference from the command line: paths are relative to the current directory.
pub(super) fn model_reference(reference: &str) -> String {
    match is_path_reference(reference) {
        true => {
            let path = Path::new(reference);
            // What a `~` does not stand for is said where the reference is opened.
            let path = expand_home(path).unwrap_or_else(|_| path.to_owned());
            tidy(&std::env::current_dir().unwrap_or_default().join(path))
                .display()
                .to_string()
        }
        false => reference.to_owned(),
    }
}

/// Makes the paths of a recipe absolute, the run directory's aside: a leading `~` is the home directory, and
/// what is relative is so to the recipe's folder, or to the current directory if the command line gave it.
fn resolve_paths(recipe: &mut Recipe, path: &Path, found: &mut Findings<'_>) {
    let here = std::env::current_dir().unwrap_or_default();
    let folder = here.join(path.parent().unwrap_or(Path::new("")));
    let origins = found.origins;
    let mut home = |name: &str, path: &Path| match expand_home(path) {
        Ok(path) => path,
        Err(error) => {
            found.add(name, &format!("{name}: {error}"), "");
            path.to_owned()
        }
    };
    if let Some(dir) = &mut recipe.output.dir {
        *dir = home("output.dir", dir);
    }
    let mut resolved = |name: &str, path: &Path| {
        let path = home(name, path);
        match origins.get(name) {
            Some(Origin::Override(_)) => tidy(&here.join(path)),
            _ => tidy(&folder.join(path)),
        }
    };
    for (name, paths) in [
        ("data.train", &mut recipe.data.train),
        ("data.valid", &mut recipe.data.valid),
    ] {
        for path in &mut paths.0 {
            *path = resolved(name, path);
        }
    }
    if is_path_reference(&recipe.model.base) {
        recipe.model.base = resolved("model.base", Path::new(&recipe.model.base))
            .display()
            .to_string();
    }
    if let Some(dir) = &mut recipe.adapter.init_from {
        *dir = resolved("adapter.init_from", dir);
    }
    for (_, dir) in &mut recipe.adapter.adapters.0 {
        *dir = resolved("adapter.adapters", dir);
    }
    if let Some(template) = &mut recipe.model.chat_template
        && !is_inline_template(template)
    {
        *template = resolved("model.chat_template", Path::new(template.as_str()))
            .display()
            .to_string();
    }
}

/// Jinja text, as opposed to the path of a template.
pub(super) fn is_inline_template(text: &str) -> bool {
    text.contains("{{") || text.contains("{%")
}

/// Removes `.` and resolves `..` where a name precedes it; the file need not exist.
fn tidy(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir
                if matches!(out.components().next_back(), Some(Component::Normal(_))) =>
            {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

fn default_output(path: &Path) -> PathBuf {
    let absolute = tidy(&std::env::current_dir().unwrap_or_default().join(path));
    let name = |part: Option<&std::ffi::OsStr>| part.map(|s| s.to_string_lossy().into_owned());
    let folder = name(absolute.parent().and_then(Path::file_name));
    let stem = name(path.file_stem()).unwrap_or_else(|| "run".to_owned());
    Path::new("runs").join(folder.map_or(stem.clone(), |folder| format!("{folder}-{stem}")))
}

fn check_adapter(recipe: &mut Recipe, found: &mut Findings<'_>) {
    let adapter = &mut recipe.adapter;
    for (name, owners) in misplaced(adapter) {
        let full = format!("adapter.{name}");
        if found.gives_way(&full, "adapter.method") {
            adapter.forget(name);
            continue;
        }
        found.add(
            &full,
            &format!(
                "adapter.{name} means nothing to method = {:?}; it is for {}",
                adapter.method,
                owners.join(", ")
            ),
            "remove it, or choose another method",
        );
    }
    match adapter.method.as_str() {
        "lora" | "dora" | "loha" | "lokr" | "vera" | "miss" => adapter.r = Some(adapter.rank()),
        "head" if adapter.modules_to_save.is_empty() && recipe.task == TaskName::CausalLm => found.add(
            "adapter.method",
            "adapter.method = \"head\" trains what adapter.modules_to_save names, and it names nothing",
            "set adapter.modules_to_save = [\"lm_head\"]",
        ),
        "xlora" if adapter.adapters.0.is_empty() => found.add(
            "adapter.method",
            "adapter.method = \"xlora\" mixes the experts that adapter.adapters names, and it names none",
            "set [adapter.adapters] to names and adapter directories",
        ),
        _ => {}
    }
    let named = match &adapter.init_weights {
        InitWeights::Named(name) => FORMS.iter().find(|(form, _)| form == name),
        InitWeights::Flag(_) => None,
    };
    // For a method without the setting, that was said above.
    let reads = ["loha", "lokr", "vera", "miss"].contains(&adapter.method.as_str());
    if let Some((form, owner)) = named
        && reads
        && *owner != adapter.method
    {
        found.add(
            "adapter.init_weights",
            &format!(
                "adapter.init_weights = {form:?} is for method = {owner:?}, not for {:?}",
                adapter.method
            ),
            "use true or false, or choose another method",
        );
    }
    if adapter.init_from.is_some() && ["full", "head", "xlora"].contains(&adapter.method.as_str()) {
        found.add(
            "adapter.init_from",
            &format!(
                "adapter.init_from does not go with method = {:?}",
                adapter.method
            ),
            "remove it",
        );
    }
    if adapter.method == "xlora" && recipe.train.gradient_checkpointing.0.is_some() {
        let name = "train.gradient_checkpointing";
        if found.gives_way(name, "adapter.method") {
            recipe.train.gradient_checkpointing = GradientCheckpointing::default();
        } else {
            found.add(
                name,
                "train.gradient_checkpointing does not go with adapter.method = \"xlora\", whose shares of \
                 the experts are computed outside the blocks",
                "remove train.gradient_checkpointing, or choose another adapter.method",
            );
        }
    }
    let lora = ["lora", "dora"].contains(&adapter.method.as_str());
    if recipe.train.loraplus_lr_ratio.is_some() && !lora {
        if found.gives_way("train.loraplus_lr_ratio", "adapter.method") {
            recipe.train.loraplus_lr_ratio = None;
            return;
        }
        found.add(
            "train.loraplus_lr_ratio",
            "train.loraplus_lr_ratio is about LoRA's B",
            "remove it, or use method = \"lora\"",
        );
    }
}

fn check_data(recipe: &mut Recipe, found: &mut Findings<'_>) {
    let data = &mut recipe.data;
    if found.gives_way("data.valid", "data.valid_fraction") {
        data.valid.0.clear();
    } else if found.gives_way("data.valid_fraction", "data.valid") {
        data.valid_fraction = 0.0;
    }
    if data.train.0.is_empty() {
        found.add(
            "data.train",
            "data.train: no training data",
            "set it to a JSONL file or a list of them",
        );
    }
    if !data.valid.0.is_empty() && data.valid_fraction > 0.0 {
        found.add(
            "data.valid_fraction",
            "data.valid and data.valid_fraction exclude each other",
            "remove one of them",
        );
    }
    if data.group_by_length && !data.shuffle {
        found.add(
            "data.group_by_length",
            "data.group_by_length reorders rows, which data.shuffle = false forbids",
            "remove one of them",
        );
    }
}

/// Settings that mean nothing to the recipe's task.
fn check_task(recipe: &mut Recipe, found: &mut Findings<'_>) {
    let (data, usual) = (&recipe.data, DataSettings::default());
    // A lock file has all settings written out: what counts is a value other than the default.
    let classifier = [
        ("data.text_columns", data.text_columns != usual.text_columns),
        ("data.label_column", data.label_column != usual.label_column),
        ("data.labels", data.labels != usual.labels),
    ];
    let language = [
        ("data.format", data.format != usual.format),
        ("data.train_on", data.train_on != usual.train_on),
        (
            "data.chat_template_kwargs",
            data.chat_template_kwargs != usual.chat_template_kwargs,
        ),
        ("model.chat_template", recipe.model.chat_template.is_some()),
        (
            "train.max_new_tokens",
            recipe.train.max_new_tokens != TrainSettings::default().max_new_tokens,
        ),
    ];
    let (foreign, other): (&[(&str, bool)], _) = match recipe.task {
        TaskName::CausalLm => (&classifier, TaskName::SeqCls),
        TaskName::SeqCls => (&language, TaskName::CausalLm),
    };
    for (name, _) in foreign.iter().filter(|(_, set)| *set) {
        found.add(
            name,
            &format!(
                "{name} means nothing to task = {:?}; it is for {:?}",
                recipe.task.name(),
                other.name()
            ),
            "remove it, or choose another task",
        );
    }
    if recipe.task != TaskName::CausalLm && recipe.adapter.method == "xlora" {
        found.add(
            "adapter.method",
            &format!(
                "adapter.method = \"xlora\" trains no head, and task = {:?} brings a new one",
                recipe.task.name()
            ),
            "choose another method",
        );
    }
}

fn check_length(recipe: &mut Recipe, found: &mut Findings<'_>) {
    let train = &mut recipe.train;
    if found.gives_way("train.epochs", "train.max_steps") {
        train.epochs = None;
    } else if found.gives_way("train.max_steps", "train.epochs") {
        train.max_steps = None;
    }
    if found.gives_way("train.warmup_steps", "train.warmup_ratio") {
        train.warmup_steps = 0;
    } else if found.gives_way("train.warmup_ratio", "train.warmup_steps") {
        train.warmup_ratio = 0.0;
    }
    match (train.epochs, train.max_steps) {
        (Some(_), Some(_)) => found.add(
            "train.max_steps",
            "train.epochs and train.max_steps exclude each other",
            "remove one of them",
        ),
        (None, None) => train.epochs = Some(3.0),
        _ => {}
    }
    if train.warmup_steps > 0 && train.warmup_ratio > 0.0 {
        found.add(
            "train.warmup_ratio",
            "train.warmup_steps and train.warmup_ratio exclude each other",
            "remove one of them",
        );
    }
    if let Some(steps) = train.max_steps
        && train.warmup_steps > steps
    {
        found.add(
            "train.warmup_steps",
            "train.warmup_steps is more than train.max_steps",
            "the highest learning rate would never be reached",
        );
    }
    if train.lr_scheduler_type == Schedule::Constant
        && (train.warmup_steps > 0 || train.warmup_ratio > 0.0)
    {
        found.add(
            "train.lr_scheduler_type",
            "train.lr_scheduler_type = \"constant\" has no warm-up",
            "use \"constant_with_warmup\"",
        );
    }
}

fn check_rhythm(recipe: &mut Recipe, found: &mut Findings<'_>) {
    let has_valid = !recipe.data.valid.0.is_empty() || recipe.data.valid_fraction > 0.0;
    let train = &mut recipe.train;
    for (strategy, steps, names) in [
        (
            &mut train.eval_strategy,
            &mut train.eval_steps,
            ["train.eval_strategy", "train.eval_steps"],
        ),
        (
            &mut train.save_strategy,
            &mut train.save_steps,
            ["train.save_strategy", "train.save_steps"],
        ),
    ] {
        if found.gives_way(names[0], names[1]) {
            *strategy = None;
        } else if found.gives_way(names[1], names[0]) && *strategy != Some(Strategy::Steps) {
            *steps = None;
        }
    }

    let eval = *train
        .eval_strategy
        .get_or_insert(match (train.eval_steps, has_valid) {
            (Some(_), _) => Strategy::Steps,
            (None, true) => Strategy::Epoch,
            (None, false) => Strategy::No,
        });
    if eval == Strategy::Steps {
        train.eval_steps.get_or_insert(train.logging_steps);
    } else if train.eval_steps.take().is_some() && found.written("train.eval_steps") {
        found.add(
            "train.eval_steps",
            "train.eval_steps needs train.eval_strategy = \"steps\"",
            "remove one of them",
        );
    }
    if eval != Strategy::No && !has_valid {
        found.add(
            if found.written("train.eval_strategy") {
                "train.eval_strategy"
            } else {
                "train.eval_steps"
            },
            "validation is asked for, and there is no validation data",
            "set data.valid or data.valid_fraction",
        );
    }

    let save = *train
        .save_strategy
        .get_or_insert(match (train.save_steps, eval) {
            (Some(_), _) => Strategy::Steps,
            (None, Strategy::No) => Strategy::Epoch,
            (None, eval) => eval,
        });
    if save == Strategy::Steps {
        train
            .save_steps
            .get_or_insert(train.eval_steps.unwrap_or(train.logging_steps));
    } else if train.save_steps.take().is_some() && found.written("train.save_steps") {
        found.add(
            "train.save_steps",
            "train.save_steps needs train.save_strategy = \"steps\"",
            "remove one of them",
        );
    }

    if train.load_best_model_at_end {
        let name = "train.load_best_model_at_end";
        if eval == Strategy::No {
            found.add(
                name,
                "train.load_best_model_at_end needs validation",
                "set data.valid or data.valid_fraction",
            );
        } else if eval != save {
            found.add(
                name,
                "train.load_best_model_at_end needs train.save_strategy and train.eval_strategy to be the same",
                "every saved checkpoint needs a validation loss",
            );
        } else if let (Some(eval), Some(save)) = (train.eval_steps, train.save_steps)
            && save % eval != 0
        {
            found.add(
                name,
                "train.load_best_model_at_end needs train.save_steps to be a multiple of train.eval_steps",
                "every saved checkpoint needs a validation loss",
            );
        }
    }
    if train.early_stopping_patience > 0 && eval == Strategy::No {
        found.add(
            "train.early_stopping_patience",
            "train.early_stopping_patience needs validation",
            "set data.valid or data.valid_fraction",
        );
    }
}

//! What a recipe accepts, what it refuses and how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use super::optim::Optim;
use super::*;

mod loftq;

const SMALL: &str = "[data]\ntrain = 'rows.jsonl'\n";

fn resolve(text: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
    RecipeFile::from_text(Path::new("/proj/set/r.toml"), text.to_owned())
        .with_overrides(overrides)
        .resolve()
}

fn problems(text: &str, overrides: &[&str]) -> String {
    match resolve(text, overrides) {
        Err(error) => error.to_string(),
        Ok(recipe) => panic!("accepted: {recipe:?}"),
    }
}

#[track_caller]
fn refuses(text: &str, parts: &[&str]) {
    let message = problems(text, &[]);
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in:\n{message}");
    }
}

#[test]
fn what_is_left_out_has_peft_and_transformers_defaults() {
    let recipe = resolve(SMALL, &[]).unwrap();
    assert_eq!(recipe.seed, 42);
    assert_eq!(recipe.adapter.r, Some(8));
    assert_eq!(recipe.adapter.lora_alpha, 8.0);
    assert_eq!(recipe.adapter.target_modules, None);
    assert_eq!(recipe.train.length(), Length::Epochs(3.0));
    assert_eq!(recipe.train.eval_cadence(), Cadence::Never);
    assert_eq!(recipe.train.save_cadence(), Cadence::Epoch);
    assert_eq!(recipe.train.adam_epsilon, 1e-8);
    assert_eq!(recipe.output_dir(), PathBuf::from("runs/set-r"));
}

#[test]
fn paths_are_relative_to_the_recipe_and_those_of_overrides_to_the_current_directory() {
    let text = "[model]\nbase = '../base'\n[data]\ntrain = ['a.jsonl', '/b.jsonl']\n";
    let recipe = resolve(text, &["data.valid=v.jsonl"]).unwrap();
    assert_eq!(recipe.model.base, "/proj/base");
    assert_eq!(
        recipe.data.train.0,
        ["/proj/set/a.jsonl", "/b.jsonl"].map(PathBuf::from)
    );
    assert_eq!(
        recipe.data.valid.0,
        [std::env::current_dir().unwrap().join("v.jsonl")]
    );
    for name in ["smollm2-135m-instruct", "hf:org/name@main"] {
        let recipe = resolve(&format!("[model]\nbase = '{name}'\n{SMALL}"), &[]).unwrap();
        assert_eq!(recipe.model.base, name);
    }
}

#[test]
fn a_tilde_is_the_home_directory_in_every_path() {
    let home = std::env::home_dir().unwrap();
    let text = "[model]\nbase = '~/base'\nchat_template = '~/t.jinja'\n[adapter]\ninit_from = '~/a'\n\
                [data]\ntrain = ['~/a.jsonl', './~/b.jsonl', '~old.jsonl']\n[output]\ndir = '~/run'\n";
    let recipe = resolve(text, &["data.valid=~/v.jsonl"]).unwrap();
    assert_eq!(Path::new(&recipe.model.base), home.join("base"));
    assert_eq!(
        recipe.model.chat_template,
        Some(home.join("t.jinja").display().to_string())
    );
    assert_eq!(recipe.adapter.init_from, Some(home.join("a")));
    let there = ["/proj/set/~/b.jsonl", "/proj/set/~old.jsonl"].map(PathBuf::from);
    assert_eq!(recipe.data.train.0[0], home.join("a.jsonl"));
    assert_eq!(recipe.data.train.0[1..], there);
    assert_eq!(recipe.data.valid.0, [home.join("v.jsonl")]);
    assert_eq!(recipe.output_dir(), home.join("run"));
    let there = Recipe::for_model::<&str>("~/base", &[]).unwrap();
    assert_eq!(Path::new(&there.model.base), home.join("base"));

    let text = "[model]\nbase = '~bob/base'\n[data]\ntrain = 'a'\n[output]\ndir = '~bob/run'\n";
    refuses(
        text,
        &[
            "r.toml:2: model.base: ~bob/base: only ~/ is expanded",
            "r.toml:6: output.dir: ~bob/run",
        ],
    );
}

#[test]
fn every_problem_is_reported_at_once_with_its_line() {
    refuses(
        "sead = 1\n[train]\nlerning_rate = 1\nbatch_size = 0\nepochs = 'three'\n[adaptor]\nr = 4\n",
        &[
            "5 problems",
            "r.toml:1: unknown setting `sead` above the first section (did you mean `seed`?)",
            "r.toml:3: unknown setting `lerning_rate` in [train] (did you mean `train.learning_rate`?)",
            "r.toml:4: train.batch_size: must be at least 1, not 0",
            "r.toml:5: train.epochs: invalid type: string \"three\", expected a number",
            "r.toml:6: unknown section [adaptor] (did you mean [adapter]?)",
        ],
    );
}

#[test]
fn a_setting_in_the_wrong_section_is_sent_to_the_right_one() {
    refuses(
        "[model]\nlearning_rate = 1e-4\n",
        &["did you mean `train.learning_rate`?"],
    );
    refuses(
        "[train]\nseed = 1\n",
        &["`seed` belongs above the first section"],
    );
    refuses(
        "[train]\nnum_train_epochs = 1\n",
        &["did you mean `train.epochs`?"],
    );
    refuses(
        "[adapter]\nzzz = 1\n",
        &["there are: method, r, lora_alpha"],
    );
}

#[test]
fn wrong_values_say_what_is_accepted() {
    refuses(
        "[train]\nlr_scheduler_type = 'cosin'\n",
        &["`cosin`", "`cosine`"],
    );
    refuses(
        "[adapter]\nmethod = 'prefix'\n",
        &["there is no method `prefix`", "lora, dora, loha"],
    );
    refuses(
        "[adapter]\nmethod = 'lara'\n",
        &["there is no method `lara`"],
    );
    refuses(
        "[adapter]\nlora_dropout = 1.0\n",
        &["at least 0 and below 1, not 1.0"],
    );
    refuses(
        "[adapter]\ntarget_modules = 3\n",
        &["a regular expression or a list of names"],
    );
    refuses("[train]\nlearning_rate = nan\n", &["greater than 0"]);
    refuses("[train]\nbatch_size = -1\n", &["train.batch_size", "-1"]);
    refuses(
        "seed = 18446744073709551615\n",
        &["at most 9223372036854775807"],
    );
    for wrong in [
        "'every:0'",
        "'every:-1'",
        "'every:+2'",
        "'every:'",
        "'twice'",
        "1",
        "-2",
    ] {
        refuses(
            &format!("{SMALL}[train]\ngradient_checkpointing = {wrong}\n"),
            &[
                "r.toml:4",
                "train.gradient_checkpointing",
                "true, false or \"every:N\"",
            ],
        );
    }
    refuses("[data]\ntrain = 'a\n", &["r.toml:2:"]);
}

#[test]
fn contradictions_are_refused() {
    let with = |more: &str| format!("{SMALL}{more}");
    let valid = |more: &str| format!("{SMALL}valid = 'v.jsonl'\n{more}");
    refuses("", &["data.train: no training data"]);
    refuses(
        &with("[train]\nepochs = 1\nmax_steps = 2\n"),
        &["r.toml:5", "exclude each other"],
    );
    refuses(
        &with("[train]\neval_steps = 5\n"),
        &["there is no validation data"],
    );
    refuses(
        &with("[train]\nload_best_model_at_end = true\n"),
        &["needs validation"],
    );
    refuses(
        &with("[train]\nearly_stopping_patience = 1\n"),
        &["needs validation"],
    );
    refuses(
        &valid("[train]\nload_best_model_at_end = true\neval_steps = 10\nsave_steps = 15\n"),
        &["multiple of train.eval_steps"],
    );
    refuses(
        &valid(
            "[train]\nload_best_model_at_end = true\neval_steps = 10\nsave_strategy = 'epoch'\n",
        ),
        &["to be the same"],
    );
    refuses(
        &valid("[train]\neval_strategy = 'epoch'\neval_steps = 10\n"),
        &["needs train.eval_strategy"],
    );
    refuses(
        &with("[train]\nlr_scheduler_type = 'constant'\nwarmup_steps = 1\n"),
        &["constant_with_warmup"],
    );
    refuses(
        &with(
            "[train]\ngradient_checkpointing = true\n[adapter]\nmethod = 'xlora'\n\
             [adapter.adapters]\na = 'a'\n",
        ),
        &[
            "r.toml:4",
            "train.gradient_checkpointing",
            "adapter.method = \"xlora\"",
        ],
    );
    refuses(
        &with("valid = 'v'\nvalid_fraction = 0.1\n"),
        &["exclude each other"],
    );
}

#[test]
fn rhythms_follow_each_other_where_they_are_left_out() {
    let recipe = resolve(
        &format!("{SMALL}valid_fraction = 0.1\n[train]\neval_steps = 7\n"),
        &[],
    )
    .unwrap();
    assert_eq!(recipe.train.eval_cadence(), Cadence::Steps(7));
    assert_eq!(recipe.train.save_cadence(), Cadence::Steps(7));
    let recipe = resolve(&format!("{SMALL}valid_fraction = 0.1\n"), &[]).unwrap();
    assert_eq!(recipe.train.eval_cadence(), Cadence::Epoch);
    let recipe = resolve(&format!("{SMALL}[train]\nsave_strategy = 'no'\n"), &[]).unwrap();
    assert_eq!(recipe.train.save_cadence(), Cadence::Never);
}

#[test]
fn warm_up_counts_steps_or_a_share_rounded_up() {
    let mut train = resolve(SMALL, &[]).unwrap().train;
    assert_eq!(train.warmup(100), 0);
    train.warmup_ratio = 0.03;
    assert_eq!(train.warmup(110), 4);
    train.warmup_steps = 9;
    assert_eq!(train.warmup(110), 9);
}

#[test]
fn overrides_take_toml_values_and_bare_words() {
    let recipe = resolve(
        SMALL,
        &[
            "train.learning_rate=1e-4",
            "seed = 7",
            "adapter.target_modules=all-linear",
            "adapter.modules_to_save=['lm_head']",
            "adapter.rank_pattern.q_proj=4",
            "adapter.rank_pattern.v_proj=2",
            "data.shuffle=false",
            "device=cuda:0",
        ],
    )
    .unwrap();
    assert_eq!(recipe.train.learning_rate, 1e-4);
    assert_eq!(recipe.seed, 7);
    assert_eq!(
        recipe.adapter.target_modules,
        Some(Modules::Pattern("all-linear".into()))
    );
    assert_eq!(recipe.adapter.modules_to_save, ["lm_head"]);
    // In the order in which they were given: of two that match, the first counts.
    let ranks: Vec<_> = recipe
        .adapter
        .rank_pattern
        .0
        .iter()
        .map(|(k, r)| (k.as_str(), *r))
        .collect();
    assert_eq!(ranks, [("q_proj", 4), ("v_proj", 2)]);
    assert!(!recipe.data.shuffle);
    assert_eq!(recipe.device, "cuda:0");
}

#[test]
fn blocks_are_computed_again_one_or_several_at_a_time_or_not_at_all() {
    let every = |text: &str| {
        let recipe = resolve(SMALL, &[&format!("train.gradient_checkpointing={text}")]).unwrap();
        recipe.train.gradient_checkpointing.0.map(|n| n.get())
    };
    assert_eq!(
        resolve(SMALL, &[]).unwrap().train.gradient_checkpointing.0,
        None
    );
    for (text, blocks) in [
        ("false", None),
        ("true", Some(1)),
        ("every:1", Some(1)),
        ("every:12", Some(12)),
    ] {
        assert_eq!(every(text), blocks, "{text}");
    }
}

#[test]
fn an_override_displaces_what_it_excludes() {
    let text = format!("{SMALL}valid = 'v'\n[train]\nepochs = 2\neval_steps = 5\n");
    let recipe = resolve(&text, &["train.max_steps=4", "train.eval_strategy=epoch"]).unwrap();
    assert_eq!(recipe.train.length(), Length::Steps(4));
    assert_eq!(recipe.train.eval_cadence(), Cadence::Epoch);
}

#[test]
fn errors_in_overrides_name_the_override() {
    let message = problems(SMALL, &["train.lr=1", "train.batch_size=many", "nonsense"]);
    for part in [
        "--set train.lr=1: unknown setting `lr` in [train] (did you mean `train.learning_rate`?)",
        "--set train.batch_size=many: train.batch_size: invalid type: string \"many\"",
        "--set nonsense: cannot be read (write it as section.name=value)",
    ] {
        assert!(message.contains(part), "{part:?} is not in:\n{message}");
    }
    // One override is one setting.
    problems(SMALL, &["seed=1\ndevice='x'\n[train]"]);
}

#[test]
fn a_lock_file_reads_back_as_the_same_recipe() {
    let text = "seed = 9223372036854775807\n[model]\nchat_template = '''{{ x }}\n\"\"\"'''\n\
        [adapter]\ntarget_modules = '.*\\.q_proj'\ninit_lora_weights = 'gaussian'\n\
        alpha_pattern = { q_proj = 3 }\nlayers_to_transform = [0, 2]\n\
        [data]\ntrain = 'a.jsonl'\nvalid = ['b.jsonl', 'ü c.jsonl']\n\
        [train]\nlearning_rate = 0.00012345678901234567\ngradient_checkpointing = 'every:3'\nsample_prompts = ['Who?', \"two\\nlines\"]\n\
        [output]\ndir = 'runs/x'\n";
    let recipe = resolve(text, &[]).unwrap();
    let info = LockInfo {
        enamel: "0.1.0".into(),
        burn: "0.22.1".into(),
        device: "flex".into(),
        platform: "linux-x86_64".into(),
        threads: 2,
        model_source: "a directory".into(),
        model_files: vec![FileHash {
            path: "/m/model.safetensors".into(),
            sha256: "ab".into(),
        }],
        ..LockInfo::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.lock.toml");
    write_lock(&path, "", &recipe, &info).unwrap();
    let file = RecipeFile::read(&path).unwrap();
    assert_eq!(file.resolve().unwrap(), recipe);
    assert_eq!(file.lock_info().unwrap(), Some(info.clone()));
    assert_eq!(
        RecipeFile::from_text(&path, SMALL.into())
            .lock_info()
            .unwrap(),
        None
    );

    let mut now = info.clone();
    assert!(info.changed_files(&now).is_empty());
    now.model_files[0].sha256 = "cd".into();
    now.data_files.push(FileHash {
        path: "/d".into(),
        sha256: "ef".into(),
    });
    assert_eq!(info.changed_files(&now).len(), 2);
}

#[test]
fn a_lock_of_another_shape_is_refused() {
    refuses(&format!("{SMALL}[lock]\nenamel = 1\n"), &["[lock]: "]);
}

#[test]
fn the_optimizer_has_transformers_names_and_is_written_by_one_of_them() {
    let of = |text: &str, set: &[&str]| {
        let file = RecipeFile::from_text(Path::new("r.toml"), text.to_owned());
        file.with_overrides(set).resolve().unwrap().train.optim
    };
    let data = "data.train = 'x.jsonl'\n";
    assert_eq!(of(data, &[]), Optim::AdamwTorch);
    let eight = format!("{data}[train]\noptim = \"adamw_bnb_8bit\"\n");
    assert_eq!(of(&eight, &[]), Optim::Adamw8bit);
    let paged = of(&eight, &["train.optim=paged_adamw"]);
    assert_eq!(paged, Optim::PagedAdamw32bit);
    let wrong = format!("{data}[train]\noptim = \"sgd\"\n");
    refuses(
        &wrong,
        &["3", "train.optim", "`sgd`", "`adamw_torch`, `adamw_8bit`, "],
    );
}

#[test]
fn the_reference_in_the_documentation_is_this_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipe.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("<!-- settings -->\n").unwrap();
    let (written, after) = rest.split_once("<!-- end of settings -->\n").unwrap();
    let now = format!("\n{}", reference());
    if std::env::var_os("ENAMEL_BLESS").is_some() {
        let text = format!("{before}<!-- settings -->\n{now}<!-- end of settings -->\n{after}");
        std::fs::write(&path, text).unwrap();
        return;
    }
    assert_eq!(written, now, "write it anew with ENAMEL_BLESS=1");
}

#[test]
fn every_recipe_that_is_shipped_resolves_and_its_files_are_there() {
    let datasets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets");
    let mut found = 0;
    for folder in std::fs::read_dir(datasets).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|e| e == "toml") {
                let recipe = Recipe::load::<&str>(&path, &[]).unwrap();
                for file in recipe.data.train.0.iter().chain(&recipe.data.valid.0) {
                    assert!(
                        file.is_file(),
                        "{} names {}",
                        path.display(),
                        file.display()
                    );
                }
                found += 1;
            }
        }
    }
    assert!(found > 0, "no recipe found");
}

#[test]
fn compute_dtype_is_f32_unless_the_recipe_or_an_override_says_bf16() {
    let of = |text: &str, set: &[&str]| {
        let file = RecipeFile::from_text(Path::new("r.toml"), text.to_owned());
        file.with_overrides(set)
            .resolve()
            .unwrap()
            .model
            .compute_dtype
    };
    let data = "data.train = 'x.jsonl'\n";
    assert_eq!(of(data, &[]), ComputeDtype::F32);
    let bf16 = format!("{data}[model]\ncompute_dtype = \"bf16\"\n");
    assert_eq!(of(&bf16, &[]), ComputeDtype::Bf16);
    assert_eq!(of(&bf16, &["model.compute_dtype=f32"]), ComputeDtype::F32);
}

#[test]
fn an_unknown_compute_dtype_is_refused_with_its_line() {
    let text = "data.train = 'x.jsonl'\n[model]\ncompute_dtype = \"f16\"\n";
    refuses(
        text,
        &["3", "model.compute_dtype", "`f16`", "`f32` or `bf16`"],
    );
}

#[test]
fn quantisation_is_read_from_its_table_and_from_overrides() {
    let text = "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\n\
                bnb_4bit_compute_dtype = 'bf16'\nllm_int8_skip_modules = ['down_proj']\n";
    let set = resolve(text, &["model.quantization.bnb_4bit_use_double_quant=true"])
        .unwrap()
        .model
        .quantization;
    assert!(set.load_in_4bit && set.bnb_4bit_use_double_quant && !set.load_in_8bit);
    assert_eq!(set.bnb_4bit_quant_type, FourBitType::Nf4);
    assert_eq!(set.bnb_4bit_compute_dtype, FourBitCompute::Bfloat16);
    assert_eq!(set.bnb_4bit_blocksize, 64);
    assert_eq!(set.skip_modules, ["down_proj"]);
    assert_eq!(set.llm_int8_skip_modules, None);
    let alone = resolve(SMALL, &["model.quantization.load_in_8bit=true"]).unwrap();
    assert!(alone.model.quantization.load_in_8bit);
}

#[test]
fn an_override_of_the_format_displaces_the_files() {
    let text = "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\n\
                bnb_4bit_quant_type = 'fp4'\nskip_modules = ['o_proj']\n";
    let of = |set: &str| resolve(text, &[set]).unwrap().model.quantization;
    let eight = of("model.quantization.load_in_8bit=true");
    let expected = QuantizationSettings {
        load_in_8bit: true,
        skip_modules: vec!["o_proj".to_owned()],
        ..QuantizationSettings::default()
    };
    assert_eq!(eight, expected);
    let none = of("model.quantization.load_in_4bit=false");
    assert_eq!(none, QuantizationSettings::default());
}

#[test]
fn a_quantised_recipe_survives_its_lock_file() {
    let text =
        format!("{SMALL}[model.quantization]\nload_in_4bit = true\nbnb_4bit_blocksize = 128\n");
    for text in [text.as_str(), SMALL] {
        let recipe = resolve(text, &[]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.lock.toml");
        write_lock(&path, "", &recipe, &LockInfo::default()).unwrap();
        assert_eq!(Recipe::load::<&str>(&path, &[]).unwrap(), recipe);
    }
}

#[test]
fn contradictory_quantisation_is_refused_with_all_its_lines() {
    refuses(
        "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\nload_in_8bit = true\n\
         dequantize = true\n",
        &["4: ", "exclude each other", "5: ", "holds the base dense"],
    );
    refuses(
        "data.train = 'x.jsonl'\n[model.quantization]\nbnb_4bit_quant_type = 'fp4'\nllm_int8_threshold = 5\n\
         skip_modules = ['q_proj']\n",
        &[
            "3: ",
            "bnb_4bit_quant_type means nothing without load_in_4bit",
            "4: ",
            "llm_int8_threshold means nothing without load_in_8bit",
            "5: ",
            "skip_modules means nothing",
        ],
    );
    refuses(
        "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\nbnb_4bit_quant_type = 'int4'\n\
         bnb_4bit_blocksize = 48\nbnb_4bit_compute_dtype = 'float64'\nbnb_4bit_quant_typ = 'nf4'\n\
         llm_int8_threshold = -1.0\nskip_modules = ['']\n",
        &[
            "there is no `int4`",
            "`nf4` or `fp4`",
            "one of 32, 64, 128, 256, 512, 1024, 2048 and 4096, not 48",
            "`float64`",
            "unknown setting `bnb_4bit_quant_typ` in [model.quantization]",
            "must be 0 or more",
            "must not hold an empty name",
        ],
    );
    refuses(
        "data.train = 'x.jsonl'\n[model]\nquantization = 4\n",
        &["3: ", "model.quantization", "table"],
    );
}

#[test]
fn a_method_that_changes_the_base_cannot_have_it_in_four_bits() {
    let four = "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\n[adapter]\n";
    refuses(
        &format!("{four}method = 'full'\n"),
        &[
            "5: ",
            "int4 weights cannot be trained",
            "choose adapter.method",
        ],
    );
    for start in ["pissa", "pissa_niter_4", "olora"] {
        refuses(
            &format!("{four}init_lora_weights = '{start}'\n"),
            &["5: ", start, "int4 weights cannot be changed", "gaussian"],
        );
    }
}

//! Recipes, locks and `--set`.

use std::path::Path;

use anyhow::Result;
use enamel_train::recipe::RecipeFile;

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::mutate;
use crate::random::Random;

/// Pieces of TOML, and values that mean something somewhere.
const WORDS: [&str; 72] = [
    "[train]",
    "[model]",
    "[adapter]",
    "[data]",
    "[output]",
    "[lock]",
    "[[compare]]",
    "[model.quantization]",
    "[adapter.loftq_config]",
    "\n",
    " = ",
    "=",
    "\"",
    "'",
    "'''",
    "\"\"\"",
    "[",
    "]",
    "{",
    "}",
    "[[",
    "]]",
    ",",
    "#",
    ".",
    "true",
    "false",
    "0",
    "1",
    "-1",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "1e308",
    "1e999",
    "nan",
    "-inf",
    "0x7fffffffffffffff",
    "1_0",
    "0.5",
    "1979-05-27T07:32:00Z",
    "\"lora\"",
    "\"dora\"",
    "\"loha\"",
    "\"lokr\"",
    "\"adalora\"",
    "\"vera\"",
    "\"ia3\"",
    "\"full\"",
    "\"head\"",
    "\"xlora\"",
    "\"all-linear\"",
    "\"pissa\"",
    "\"pissa_niter_4\"",
    "\"eva\"",
    "\"loftq\"",
    "\"steps\"",
    "\"epoch\"",
    "\"cosine\"",
    "\"adamw_8bit\"",
    "\"every:2\"",
    "\"every:0\"",
    "\"assistant\"",
    "\"last_assistant\"",
    "\"keep_end\"",
    "\"nf4\"",
    "\"\\u0000\"",
    "\"\\uD800\"",
    "\"~/x\"",
    "\"{{ x }}\"",
    "é",
    "\u{202e}",
];

const SEEDS: [&str; 5] = [
    "seed = 3\n[model]\nbase = \"./base\"\n[adapter]\nmethod = \"lora\"\nr = 8\nlora_alpha = 16\ntarget_modules = \"all-linear\"\n[data]\ntrain = \"train.jsonl\"\nvalid = \"valid.jsonl\"\nmax_length = 256\n[train]\nepochs = 2\nbatch_size = 4\nlearning_rate = 2e-4\nlr_scheduler_type = \"cosine\"\nwarmup_ratio = 0.1\neval_strategy = \"steps\"\neval_steps = 10\n[output]\ndir = \"out\"\n",
    "[model]\nbase = \"hf:org/name@main\"\nquantization = { load_in_4bit = true, bnb_4bit_quant_type = \"nf4\", bnb_4bit_use_double_quant = true }\n[adapter]\nmethod = \"dora\"\nr = 2\ntarget_modules = [\"q_proj\", \"v_proj\"]\nrank_pattern = { q_proj = 4 }\nmodules_to_save = [\"lm_head\"]\n[data]\ntrain = [\"a.jsonl\", \"b.jsonl\"]\nformat = \"messages\"\ntruncation = \"keep_start\"\ntrain_on = \"all\"\ntemplate_arguments = { enable_thinking = false }\n[train]\nmax_steps = 10\ngradient_checkpointing = \"every:2\"\noptim = \"adamw_8bit\"\nload_best_model_at_end = true\n",
    "[model]\nbase = \"smollm2-135m-instruct\"\n[adapter]\nmethod = \"adalora\"\ninit_r = 4\ntarget_r = 2\n[data]\ntrain = \"t.jsonl\"\n[train]\nmax_steps = 100\n[[compare]]\nname = \"one\"\nset = [\"adapter.method='lora'\", \"adapter.r=2\"]\n[[compare]]\nname = \"two\"\nset = [\"train.learning_rate=1e-3\"]\n",
    "[model]\nbase = \"base\"\nchat_template = \"{% for m in messages %}{{ m.content }}{% endfor %}\"\n[adapter]\nmethod = \"lokr\"\nr = 2\ndecompose_both = true\ninit_from = \"./adapter\"\n[data]\ntrain = \"t.jsonl\"\nvalid_fraction = 0.1\n[train]\nsave_strategy = \"epoch\"\nearly_stopping_patience = 2\nsample_prompts = [\"a\", \"b\"]\n",
    "seed = 1\ndevice = \"flex\"\n[model]\nbase = \"base\"\n[adapter]\nmethod = \"vera\"\n[data]\ntrain = [\"/t.jsonl\"]\n[lock]\nenamel = \"0.1.0\"\nburn = \"0.22.1\"\ndevice = \"flex\"\nplatform = \"linux-x86_64\"\nthreads = 2\nmodel_source = \"a local directory\"\ntemplate_time = 1700000000\n[[lock.model_files]]\npath = \"/base/config.json\"\nsha256 = \"00\"\n",
];

const SETS: [&str; 10] = [
    "train.learning_rate=1e-4",
    "adapter.r=0",
    "adapter.target_modules=['q_proj']",
    "model.base=./other",
    "data.max_length=none",
    "train.max_steps=9223372036854775807",
    "seed=-1",
    "output.dir=",
    "=",
    "a.b.c.d={x=[1,'y']}",
];

struct Recipes {
    words: Vec<&'static str>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    // Names of settings, from the reference that is printed for people.
    let reference: &'static str = Box::leak(enamel_train::recipe::reference().into_boxed_str());
    let quoted = reference.split('`').skip(1).step_by(2);
    let names = quoted.filter(|word| word.len() < 40 && !word.contains(char::is_whitespace));
    let mut words: Vec<&'static str> = names.collect();
    words.sort_unstable();
    words.dedup();
    words.extend(WORDS);
    words.extend(WORDS);
    Ok(Box::new(Recipes { words }))
}

impl Reader for Recipes {
    fn input(&self, random: &mut Random) -> Input {
        let mut text = random.pick(&SEEDS).as_bytes().to_vec();
        if !random.once_in(6) {
            for _ in 0..random.few() {
                line(random, &mut text, &self.words);
            }
        }
        let mut sets = Vec::new();
        while random.once_in(3) {
            let mut set = random.pick(&SETS).as_bytes().to_vec();
            if random.once_in(2) {
                mutate::text(random, &mut set, &self.words);
            }
            set.retain(|byte| *byte != b'\n');
            sets.extend(set);
            sets.push(b'\n');
        }
        Input(vec![
            Part::new("@recipe.toml", text),
            Part::new("@set", sets),
        ])
    }

    fn read(&mut self, input: &Input, _: &mut Folder) -> Result<bool> {
        // A file that is not UTF-8 is refused when it is read.
        let Ok(text) = String::from_utf8(input.part("@recipe.toml").to_vec()) else {
            return Ok(false);
        };
        let sets = input.text("@set");
        let sets: Vec<&str> = sets.lines().collect();
        let file = RecipeFile::from_text(Path::new("recipe.toml"), text).with_overrides(&sets);
        let _ = file.lock_info();
        let _ = file.variants();
        match file.resolve() {
            Ok(recipe) => {
                let _ = recipe.adapter.config(10);
                let _ = (
                    recipe.adapter.rank(),
                    recipe.data.train_spec(),
                    recipe.data.valid_spec(),
                );
                let train = &recipe.train;
                let _ = (
                    train.length(),
                    train.warmup(100),
                    train.eval_cadence(),
                    train.save_cadence(),
                );
                let _ = recipe.output_dir();
                Ok(true)
            }
            Err(error) => {
                let _ = error.to_string();
                Ok(false)
            }
        }
    }
}

/// A change that keeps most lines whole, or one that does not.
fn line(random: &mut Random, text: &mut Vec<u8>, words: &[&str]) {
    if random.once_in(3) {
        return mutate::text(random, text, words);
    }
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let mut lines: Vec<Vec<u8>> = lines.into_iter().map(<[u8]>::to_vec).collect();
    let at = random.below(lines.len());
    let other = random.below(lines.len());
    match random.below(5) {
        0 => {
            lines.remove(at);
        }
        1 => {
            let copy = lines[at].clone();
            lines.insert(other, copy);
        }
        2 => lines.swap(at, other),
        3 => lines.insert(
            at,
            format!("{} = {}", random.pick(words), random.pick(words)).into_bytes(),
        ),
        _ => {
            if let Some(equals) = lines[at].iter().position(|byte| *byte == b'=') {
                lines[at].truncate(equals + 1);
                lines[at].extend(random.pick(words).bytes());
            }
        }
    }
    *text = lines.join(&b'\n');
}

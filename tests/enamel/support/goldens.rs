//! Reads what `fixtures/make_fixtures.py` wrote, and says how far a result is from it.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

/// The folder of goldens.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Every tiny Llama, in the order of `fixtures/generate/llama.py`.
pub const LLAMAS: [&str; 13] = [
    "untied",
    "tied",
    "bias",
    "head_dim",
    "sharded",
    "bf16",
    "f16",
    "rope_theta",
    "rope_linear",
    "rope_dynamic",
    "rope_llama3",
    "rope_yarn",
    "rope_yarn_mscale",
];

/// A model of every architecture but Llama's, and a LoRA on it (`<name>_lora`), as in
/// `fixtures/generate/families.py`.
pub const FAMILIES: [&str; 2] = ["qwen3", "gpt2"];

/// Every LoRA case, as in `fixtures/generate/lora.py`.
pub const LORAS: [&str; 8] = [
    "all_linear",
    "tied",
    "bias",
    "llama3",
    "patterns",
    "modules_to_save",
    "layers",
    "exclude",
];

/// Every case of the other methods and of LoRA's options that is laid out like those of [`LORAS`], as in
/// `fixtures/generate/methods.py`.
pub const METHODS: [&str; 29] = [
    "lora_dora",
    "lora_dora_rslora_bias",
    "lora_lora_bias",
    "lora_bias_all",
    "lora_bias_lora_only",
    "lora_embed",
    "lora_embed_dora",
    "lora_embed_tied",
    "lora_embed_head",
    "lora_trainable_tokens",
    "lora_trainable_tokens_tied",
    "lora_plus",
    "lora_plus_embed",
    "loha",
    "loha_rank_pattern",
    "lokr",
    "lokr_small",
    "lokr_factor4",
    "lokr_both",
    "lokr_full",
    "adalora",
    "vera",
    "vera_noproj",
    "ia3",
    "ia3_bias",
    "head",
    "miss",
    "miss_mini",
    "miss_bat",
];

/// The folders beside them, each with tests of its own.
pub const OTHER_METHODS: [&str; 11] = [
    "adalora_run",
    "combine",
    "full",
    "init_eva",
    "init_olora",
    "init_orthogonal",
    "init_pissa",
    "init_pissa_niter_4",
    "init_pissa_rslora",
    "several",
    "xlora",
];

pub fn json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The tensors of one safetensors file.
pub struct Tensors {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// One f32 tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Floats {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Tensors {
    pub fn open(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path, bytes }
    }

    fn parsed(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap_or_else(|e| panic!("{}: {e}", self.path.display()))
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .parsed()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    pub fn has(&self, name: &str) -> bool {
        self.parsed().tensor(name).is_ok()
    }

    pub fn floats(&self, name: &str) -> Floats {
        let parsed = self.parsed();
        let view = parsed
            .tensor(name)
            .unwrap_or_else(|e| panic!("{}: {name}: {e}", self.path.display()));
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        let values = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        Floats {
            shape: view.shape().to_vec(),
            values,
        }
    }

    /// Bytes that are zero or one.
    pub fn flags(&self, name: &str) -> Vec<bool> {
        let parsed = self.parsed();
        let view = parsed
            .tensor(name)
            .unwrap_or_else(|e| panic!("{}: {name}: {e}", self.path.display()));
        assert_eq!(view.dtype(), Dtype::U8, "{name}");
        view.data().iter().map(|byte| *byte != 0).collect()
    }

    /// Rows of integers: `[batch, tokens]`.
    pub fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        let parsed = self.parsed();
        let view = parsed
            .tensor(name)
            .unwrap_or_else(|e| panic!("{}: {name}: {e}", self.path.display()));
        assert_eq!(view.dtype(), Dtype::I64, "{name}");
        let all: Vec<i64> = view
            .data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect();
        let width = *view.shape().last().expect("a golden of integers has axes");
        all.chunks(width).map(<[i64]>::to_vec).collect()
    }

    /// The only row, as token ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let rows = self.rows(name);
        assert_eq!(rows.len(), 1, "{name}");
        rows[0]
            .iter()
            .map(|id| u32::try_from(*id).expect("a token id"))
            .collect()
    }
}

/// The largest absolute difference, and where it is.
pub fn largest_difference(ours: &[f32], theirs: &[f32]) -> (f32, usize) {
    assert_eq!(ours.len(), theirs.len());
    let mut worst = (0.0, 0);
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let d = (a - b).abs();
        // NaN compares as false with everything, so it is asked for by itself.
        if d > worst.0 || d.is_nan() {
            worst = (d, i);
        }
        if d.is_nan() {
            break;
        }
    }
    worst
}

/// Panics unless every value is within `tolerance` of the golden.
pub fn assert_close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    let (worst, at) = largest_difference(ours, theirs);
    assert!(
        worst <= tolerance,
        "{what}: off by {worst:e} at {at} ({} here, {} in the golden), more than {tolerance:e}",
        ours[at],
        theirs[at]
    );
}

/// Panics unless every value is within `tolerance` of the golden's largest magnitude: for
/// gradients, whose single entries may cancel to nothing.
pub fn assert_close_to_largest(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    let largest = theirs.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "{what}: a golden of zeros proves nothing");
    assert_close(what, ours, theirs, tolerance * largest);
}

/// Which `config.json` a staged model gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// `rope_parameters`, `dtype`: transformers 5.
    Five,
    /// `rope_theta`, `rope_scaling`, `torch_dtype`: transformers 4.
    Four,
}

/// A copy of a tiny Llama as a Hugging Face directory; some cases share another's weights.
pub fn stage(case: &str, generation: Generation) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    stage_into(case, generation, dir.path());
    dir
}

/// The same into a directory that exists.
pub fn stage_into(case: &str, generation: Generation, to: &Path) {
    let from = fixtures().join("llama").join(case);
    let config = match generation {
        Generation::Five => "config.json",
        Generation::Four => "config.v4.json",
    };
    copy(&from.join(config), &to.join("config.json"));
    for name in [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        if from.join(name).is_file() {
            copy(&from.join(name), &to.join(name));
        }
    }
    let meta = json(&from.join("meta.json"));
    let weights = meta["weights"]
        .as_str()
        .expect("meta.json names the weights");
    let weights = fixtures().join("llama").join(weights);
    for entry in fs::read_dir(&weights)
        .expect("the folder of weights")
        .flatten()
    {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("model") {
            copy(&entry.path(), &to.join(name));
        }
    }
}

/// Copies a file; a copied fixture is writable whatever the checkout's mode is.
pub fn copy(from: &Path, to: &Path) {
    let bytes = fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    fs::write(to, bytes).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
}

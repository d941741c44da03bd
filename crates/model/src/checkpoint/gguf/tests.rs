//! GGUF headers, sound and damaged; built here byte by byte.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use super::*;

/// Writes GGUF version 3 the way the specification lays it out.
#[derive(Clone, Default)]
struct Writer {
    entries: Vec<Vec<u8>>,
    tensors: Vec<(Vec<u8>, usize)>,
}

fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes
}

impl Writer {
    fn entry(mut self, key: &str, ty: u32, value: &[u8]) -> Self {
        let mut bytes = text(key);
        bytes.extend(ty.to_le_bytes());
        bytes.extend(value);
        self.entries.push(bytes);
        self
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    fn float(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, &value.to_le_bytes())
    }

    fn string(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &text(value))
    }

    fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|v| text(v)));
        self.entry(key, 9, &bytes)
    }

    fn ints(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.entry(key, 9, &bytes)
    }

    /// A tensor of zeros with dimensions innermost first.
    fn tensor(mut self, name: &str, dims: &[u64], ty: u32, bytes: usize) -> Self {
        let offset: usize = self
            .tensors
            .iter()
            .map(|(_, n)| n.next_multiple_of(32))
            .sum();
        let mut info = text(name);
        info.extend((dims.len() as u32).to_le_bytes());
        info.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        info.extend(ty.to_le_bytes());
        info.extend((offset as u64).to_le_bytes());
        self.tensors.push((info, bytes));
        self
    }

    /// The file and the length of its header.
    fn bytes(&self) -> (Vec<u8>, usize) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        bytes.extend(self.entries.iter().flatten());
        bytes.extend(self.tensors.iter().flat_map(|(info, _)| info));
        let header = bytes.len();
        let data: usize = self
            .tensors
            .iter()
            .map(|(_, n)| n.next_multiple_of(32))
            .sum();
        bytes.resize(header.next_multiple_of(32) + data, 0);
        (bytes, header)
    }
}

const F32: u32 = 0;
const Q8_0: u32 = 8;

/// A model with one tensor of each kind that matters here, and a small vocabulary.
fn small() -> Writer {
    Writer::default()
        .string("general.architecture", "llama")
        .number("llama.embedding_length", 32)
        .number("llama.feed_forward_length", 32)
        .number("llama.block_count", 1)
        .number("llama.attention.head_count", 4)
        .number("llama.attention.head_count_kv", 2)
        .number("llama.context_length", 64)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &["<e>", "a", "b", "ab"])
        .ints("tokenizer.ggml.token_type", &[3, 1, 1, 1])
        .strings("tokenizer.ggml.merges", &["a b"])
        .number("tokenizer.ggml.eos_token_id", 0)
        .tensor("token_embd.weight", &[32, 4], Q8_0, 4 * 34)
        .tensor("blk.0.attn_q.weight", &[32, 32], Q8_0, 32 * 34)
        .tensor("blk.0.attn_k.weight", &[32, 16], F32, 16 * 32 * 4)
        .tensor("output_norm.weight", &[32], F32, 32 * 4)
}

struct Scratch {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        Self { _dir: dir, path }
    }

    fn open(&self, bytes: &[u8]) -> Result<(GgufFile, Vec<TensorInfo>, Value), CheckpointError> {
        std::fs::write(&self.path, bytes).unwrap();
        GgufFile::open(&self.path)
    }

    /// Opens and uses all that a run uses.
    fn use_all(&self, bytes: &[u8]) -> Result<(), CheckpointError> {
        std::fs::write(&self.path, bytes).unwrap();
        self.use_file()
    }

    fn use_file(&self) -> Result<(), CheckpointError> {
        let (file, infos, _) = GgufFile::open(&self.path)?;
        for (i, info) in infos.iter().enumerate() {
            let values = file.read_f32(i, info)?;
            assert_eq!(values.len(), info.shape.iter().product::<usize>());
        }
        file.tokenizer_config();
        file.generation_config();
        file.tokenizer_json().map(drop)
    }
}

#[test]
fn packed_matrices_have_the_bits_of_the_dequantised_ones() {
    let (mut bytes, header) = small().bytes();
    for (i, byte) in bytes[header.next_multiple_of(32)..].iter_mut().enumerate() {
        // Small numbers as scales too: the upper bytes of infinities and NaN's do not occur.
        *byte = (i * 31 % 101) as u8;
    }
    let scratch = Scratch::new();
    let (file, infos, _) = scratch.open(&bytes).unwrap();
    let mut packed = Vec::new();
    for (i, info) in infos.iter().enumerate() {
        if let Some(rows) = file.read_packed(i, info).unwrap() {
            assert_eq!(rows.shape(), info.shape[..]);
            let values = rows.kind().dequantise(rows.data());
            assert_eq!(values, file.read_f32(i, info).unwrap(), "{}", info.name);
            packed.push(info.name.as_str());
        }
    }
    let want = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ];
    assert_eq!(packed, want);
}

#[test]
fn a_sound_file_opens_under_hugging_face_names() {
    let (bytes, _) = small().bytes();
    let scratch = Scratch::new();
    let (file, infos, config) = scratch.open(&bytes).unwrap();
    let names: Vec<&str> = infos.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.norm.weight"
        ]
    );
    assert_eq!(infos[0].shape, [4, 32]);
    assert_eq!(config["vocab_size"], 4);
    assert_eq!(config["head_dim"], 8);
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(file.generation_config()["eos_token_id"], 0);
    let tokenizer: Value = serde_json::from_slice(&file.tokenizer_json().unwrap()).unwrap();
    assert_eq!(tokenizer["model"]["merges"][0][1], "b");
    assert_eq!(tokenizer["added_tokens"][0]["content"], "<e>");
    assert_eq!(
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"],
        "Digits"
    );
}

#[test]
fn no_cut_of_a_file_is_accepted() {
    let (bytes, _) = small().bytes();
    let scratch = Scratch::new();
    std::fs::write(&scratch.path, &bytes).unwrap();
    // Shortened in place: writing thousands of files anew takes a minute on some disks.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&scratch.path)
        .unwrap();
    for length in (0..bytes.len()).rev() {
        file.set_len(length as u64).unwrap();
        assert!(GgufFile::open(&scratch.path).is_err(), "cut at {length}");
    }
}

/// Every header byte, with each bit flipped and at the extremes: refused or usable, never a panic
/// and never an allocation that the file does not bear out (a count of 2^56 would abort the test).
#[test]
fn no_change_of_a_header_panics() {
    let (sound, header) = small().bytes();
    let scratch = Scratch::new();
    assert!(scratch.use_all(&sound).is_ok());
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open(&scratch.path)
        .unwrap();
    let mut put = |at: usize, value: u8| {
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[value]).unwrap();
    };
    for (at, &original) in sound[..header].iter().enumerate() {
        let bits = (0..8).map(|bit| original ^ 1 << bit);
        for value in bits.chain([0, 0x7F, 0x80, 0xFF]) {
            put(at, value);
            // Either answer is right; what counts is that there is one.
            let _ = scratch.use_file();
        }
        put(at, original);
    }
}

#[test]
fn faults_are_named() {
    let scratch = Scratch::new();
    let error = |writer: Writer| scratch.use_all(&writer.bytes().0).unwrap_err().to_string();
    let cases = [
        (
            small().tensor("output_norm.weight", &[32], F32, 128),
            "listed twice",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[31, 1], Q8_0, 34),
            "rows of 31",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[32, 0], Q8_0, 34),
            "impossible shape",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[1 << 40, 1 << 40], F32, 34),
            "impossible shape",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[1 << 40], F32, 34),
            "past the end",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[256], 10, 84),
            "type Q2_K",
        ),
        (
            small().tensor("blk.0.ffn_gate.weight", &[256], 99, 84),
            "type number 99",
        ),
        (
            small().tensor("blk.0.ffn_gate_exps.weight", &[32], F32, 128),
            "not of a model of architecture",
        ),
        (
            small().tensor("blk.1.attn_q.weight", &[32, 6], F32, 768),
            "4 heads cannot share",
        ),
        (small().number("llama.block_count", 1), "occurs twice"),
        (small().number("general.alignment", 48), "power of two"),
        (small().number("split.count", 2), "2 parts"),
        (small().number("llama.expert_count", 8), "8 experts"),
        (
            Writer::default().string("general.architecture", "gpt9"),
            "'gpt9'",
        ),
        (
            Writer::default().string("general.architecture", "llama"),
            "'llama.embedding_length' is missing",
        ),
    ];
    for (writer, wanted) in cases {
        let error = error(writer);
        assert!(error.contains(wanted), "{wanted}: {error}");
        assert!(error.contains("m.gguf"), "{error}");
    }
    let (mut bytes, _) = small().bytes();
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(
        scratch
            .open(&bytes)
            .unwrap_err()
            .to_string()
            .contains("big-endian")
    );
    bytes[4..8].copy_from_slice(&[9, 0, 0, 0]);
    assert!(
        scratch
            .open(&bytes)
            .unwrap_err()
            .to_string()
            .contains("version 9")
    );
}

/// llama.cpp refuses a file without these too; all are named at once, and so is what is of another kind.
#[test]
fn keys_that_must_be_there_are_asked_for_at_once() {
    let scratch = Scratch::new();
    let bare = Writer::default()
        .string("general.architecture", "llama")
        .number("llama.block_count", 0)
        .string("llama.context_length", "long")
        .ints("llama.attention.head_count_kv", &[2, 1])
        .string("llama.rope.freq_base", "1e4")
        .string("tokenizer.ggml.eos_token_id", "</s>");
    let error = scratch.open(&bare.bytes().0).unwrap_err().to_string();
    for wanted in [
        "'llama.embedding_length' is missing",
        "'llama.feed_forward_length' is missing",
        "'llama.block_count' is 0; it must be a whole number of at least 1",
        "'llama.attention.head_count' is missing",
        "'llama.context_length' is the text \"long\"; it must be a whole number",
        "'llama.attention.layer_norm_rms_epsilon' is missing; it must be a number",
        "'llama.attention.head_count_kv' is a list",
        "'llama.rope.freq_base' is the text \"1e4\"",
        "'tokenizer.ggml.eos_token_id' is the text \"</s>\"",
        "'token_embd.weight' is missing",
    ] {
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    let none = scratch.open(&Writer::default().bytes().0).unwrap_err();
    assert!(
        none.to_string()
            .contains("'general.architecture' is missing")
    );
    let far = small().number("tokenizer.ggml.bos_token_id", 9);
    let far = scratch.open(&far.bytes().0).unwrap_err().to_string();
    assert!(
        far.contains("bos_token_id' is 9, and the embedding has 4 rows"),
        "{far}"
    );
}

#[test]
fn a_number_for_each_layer_is_one_if_all_are_equal_and_no_token_is_none() {
    let mut writer = small();
    writer.entries.remove(5);
    let writer = writer
        .ints("llama.attention.head_count_kv", &[2, 2])
        .number("tokenizer.ggml.padding_token_id", u32::MAX);
    let (_, _, config) = Scratch::new().open(&writer.bytes().0).unwrap();
    assert_eq!(config["num_key_value_heads"], 2);
    assert!(config["pad_token_id"].is_null());
}

#[test]
fn tokenizers_that_cannot_be_built_say_why() {
    let scratch = Scratch::new();
    let base = || {
        let mut writer = small();
        // Without the tokenizer's entries.
        writer.entries.truncate(8);
        writer
    };
    let tokens = |writer: Writer| writer.strings("tokenizer.ggml.tokens", &["a", "b", "ab"]);
    let cases = [
        (
            base(),
            "without a tokenizer (tokenizer.ggml.model is missing)",
        ),
        (
            base().string("tokenizer.ggml.model", "none"),
            "tokenizer.ggml.model is 'none'",
        ),
        (tokens(base()), "'tokenizer.ggml.model' is missing"),
        (
            base().string("tokenizer.ggml.model", "gpt2"),
            "'tokenizer.ggml.tokens' is missing",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2"))
                .number("tokenizer.ggml.add_bos_token", 1)
                .number("tokenizer.ggml.pre", 7),
            "'tokenizer.ggml.add_bos_token' is 1; it must be true or false",
        ),
        (
            base()
                .string("tokenizer.ggml.model", "gpt2")
                .ints("tokenizer.ggml.tokens", &[1])
                .strings("tokenizer.ggml.merges", &["a b"]),
            "'tokenizer.ggml.tokens' is not a list of texts",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "t5")),
            "model is 't5'",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2")),
            "'tokenizer.ggml.merges' is missing",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2"))
                .strings("tokenizer.ggml.merges", &["a c"]),
            "\"c\"",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2"))
                .strings("tokenizer.ggml.merges", &["ab"]),
            "not two tokens",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2"))
                .strings("tokenizer.ggml.merges", &["a b"])
                .string("tokenizer.ggml.pre", "odd"),
            "pre is 'odd'",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "llama")),
            "scores",
        ),
        (
            base()
                .string("tokenizer.ggml.model", "gpt2")
                .strings("tokenizer.ggml.tokens", &["a", "a"])
                .strings("tokenizer.ggml.merges", &["a b"]),
            "has the ids 0 and 1",
        ),
        (
            tokens(base().string("tokenizer.ggml.model", "gpt2"))
                .strings("tokenizer.ggml.merges", &["a b"])
                .ints("tokenizer.ggml.token_type", &[1]),
            "not a list of 3",
        ),
    ];
    for (writer, wanted) in cases {
        let (file, _, _) = scratch.open(&writer.bytes().0).unwrap();
        let error = file.tokenizer_json().unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}

/// The model without a tokenizer's entries.
fn without_tokenizer() -> Writer {
    let mut writer = small();
    writer.entries.truncate(8);
    writer
}

fn tokenizer_of(writer: Writer) -> Value {
    let (file, _, _) = Scratch::new().open(&writer.bytes().0).unwrap();
    serde_json::from_slice(&file.tokenizer_json().unwrap()).unwrap()
}

/// SentencePiece joins the pair whose whole has the best score; every way to cut a piece counts,
/// and neither bytes nor control tokens take part.
#[test]
fn sentence_piece_merges_follow_the_scores() {
    let tokens = ["<unk>", "<s>", "<0x41>", "▁", "a", "b", "ab", "▁a", "▁ab"];
    let scores = [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -2.0, -1.0, -3.0f32];
    let mut floats = 6u32.to_le_bytes().to_vec();
    floats.extend((scores.len() as u64).to_le_bytes());
    floats.extend(scores.iter().flat_map(|s| s.to_le_bytes()));
    let writer = without_tokenizer()
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .ints("tokenizer.ggml.token_type", &[2, 3, 6, 1, 1, 1, 1, 1, 1])
        .entry("tokenizer.ggml.scores", 9, &floats)
        .number("tokenizer.ggml.bos_token_id", 1);
    let tokenizer = tokenizer_of(writer);
    assert_eq!(
        tokenizer["model"]["merges"],
        serde_json::json!([["▁", "a"], ["a", "b"], ["▁", "ab"], ["▁a", "b"]])
    );
    assert_eq!(tokenizer["model"]["byte_fallback"], true);
    assert_eq!(tokenizer["model"]["unk_token"], "<unk>");
    // llama.cpp's defaults for such a model: a beginning token and a leading space.
    let first = &tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"];
    assert_eq!(first, "<s>");
    let prepended = &tokenizer["normalizer"]["normalizers"][0]["prepend"];
    assert_eq!(prepended, "▁");
}

#[test]
fn each_pre_tokenizer_splits_digits_its_own_way() {
    let with = |pre: &str| {
        tokenizer_of(
            without_tokenizer()
                .string("tokenizer.ggml.model", "gpt2")
                .string("tokenizer.ggml.pre", pre)
                .strings("tokenizer.ggml.tokens", &["<s>", "a", "b", "ab"])
                .strings("tokenizer.ggml.merges", &["a b"])
                .number("tokenizer.ggml.bos_token_id", 0),
        )
    };
    let regex = |tokenizer: &Value| {
        let split = &tokenizer["pre_tokenizer"]["pretokenizers"][0];
        split["pattern"]["Regex"].as_str().unwrap().to_owned()
    };
    let llama = with("llama-bpe");
    assert!(regex(&llama).contains(r"\p{N}{1,3}|"));
    assert_eq!(llama["model"]["ignore_merges"], true);
    let first = &llama["post_processor"]["single"][0]["SpecialToken"]["id"];
    assert_eq!(first, "<s>");
    let qwen = with("qwen2");
    assert!(regex(&qwen).contains(r"|\p{N}|"));
    assert_eq!(qwen["normalizer"]["type"], "NFC");
    assert!(qwen["post_processor"].is_null());
    assert_eq!(with("default")["pre_tokenizer"]["type"], "ByteLevel");
}

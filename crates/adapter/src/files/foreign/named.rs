//! Files of other programs that lie where an adapter's should, by name.

use std::path::Path;

/// What the directory holds in place of an adapter's two files, and what to do about it.
pub(crate) fn what_is_there(dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort_unstable();
    names.iter().find_map(|name| known(name))
}

fn known(name: &str) -> Option<String> {
    let torchtune = name.starts_with("adapter_") && name.ends_with(".pt");
    let what = match name {
        "adapters.npz" => {
            "an old mlx-lm adapter; a newer mlx-lm writes adapters.safetensors, or makes a model of it with \
             mlx_lm.fuse"
        }
        "lit_model.pth.lora" | "lit_model.pth" => {
            "LitGPT's; merge it with `litgpt merge_lora` and convert the model with `litgpt convert_from_litgpt`"
        }
        "pytorch_lora_weights.safetensors" => "a LoRA of diffusers, for another kind of model",
        _ if torchtune => {
            "a torchtune adapter in its own words, a pickle file that can run any code as it is read; torchtune's \
             FullModelHFCheckpointer writes adapter_model.safetensors and adapter_config.json in PEFT's format \
             beside it"
        }
        "ggml-adapter-model.bin" | "ggml-adapter-model.gguf" => {
            "llama.cpp's; convert the adapter that it was made of"
        }
        "config.json" => "a model's configuration: this is a model's directory and no adapter's",
        _ => return None,
    };
    Some(format!("{} is there: {what}", crate::error::shown(name)))
}

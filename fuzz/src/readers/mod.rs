//! What is fuzzed: one file a reader, one line each in the list below.

mod adapter;
mod bitsandbytes;
mod checkpoint;
mod config;
mod gguf;
mod hub;
mod index;
mod pieces;
mod recipe;
mod rows;
mod safetensors;
mod template;
mod tokenizer;
mod wheel;

use anyhow::Result;

use crate::folder::{Folder, Input};
use crate::random::Random;

/// One kind of foreign input.
pub trait Reader {
    /// An input: a valid one with a few changes.
    fn input(&self, random: &mut Random) -> Input;
    /// Reads it as the program does; whether it was accepted. Panics are the caller's to catch.
    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool>;
}

/// Makes a reader's seeds, in a folder for its files.
pub type Make = fn(&mut Folder) -> Result<Box<dyn Reader>>;

/// All readers, in the order in which `all` takes them.
pub const READERS: &[(&str, Make)] = &[
    ("safetensors", safetensors::make),
    ("index", index::make),
    ("bitsandbytes", bitsandbytes::make),
    ("gguf", gguf::make),
    ("config", config::make),
    ("tokenizer", tokenizer::make),
    ("pieces", pieces::make),
    ("adapter", adapter::make),
    ("rows", rows::make),
    ("recipe", recipe::make),
    ("template", template::make),
    ("checkpoint", checkpoint::make),
    ("wheel", wheel::make),
    ("hub", hub::make),
];

/// The reader of that name, with the names there are where there is none.
pub fn find(name: &str) -> Result<Make> {
    let names = READERS.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let found = READERS.iter().find(|(own, _)| *own == name);
    match found {
        Some((_, make)) => Ok(*make),
        None => anyhow::bail!("no reader '{name}'; there are {} and all", names.join(", ")),
    }
}

//! The files of an input, in memory's file system; only what changed is written.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file of an input, or text that a reader takes beside its files. Names that start with `@` are no files.
pub struct Part {
    pub name: String,
    pub bytes: Vec<u8>,
}

impl Part {
    pub fn new(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        let name = name.to_owned();
        let bytes = bytes.into();
        Self { name, bytes }
    }
}

/// All parts of an input.
pub struct Input(pub Vec<Part>);

impl Input {
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|part| part.bytes.len()).sum()
    }

    /// The part of that name, empty where there is none.
    pub fn part(&self, name: &str) -> &[u8] {
        let part = self.0.iter().find(|part| part.name == name);
        part.map_or(&[], |part| &part.bytes)
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(self.part(name)).into_owned()
    }

    /// Writes all parts to a folder of their own, for people.
    pub fn keep(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        for part in &self.0 {
            let path = dir.join(&part.name);
            std::fs::write(&path, &part.bytes)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    /// Reads back what [`Self::keep`] wrote.
    pub fn kept(dir: &Path) -> Result<Self> {
        let mut parts = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            parts.push(Part::new(&name, std::fs::read(&path)?));
        }
        parts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self(parts))
    }
}

struct Written {
    file: File,
    bytes: Vec<u8>,
    /// Number of the input that had it last.
    round: u64,
}

/// A folder that one input after the other is written to.
pub struct Folder {
    path: PathBuf,
    written: HashMap<String, Written>,
    round: u64,
}

impl Folder {
    pub fn new(path: &Path) -> Self {
        let path = path.to_owned();
        let written = HashMap::new();
        Self {
            path,
            written,
            round: 0,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder hold the files of this input and no others.
    pub fn hold(&mut self, input: &Input) -> Result<()> {
        self.round += 1;
        for part in input.0.iter().filter(|part| !part.name.starts_with('@')) {
            match self.written.get_mut(&part.name) {
                Some(written) => {
                    written.round = self.round;
                    if written.bytes != part.bytes {
                        let old = written.bytes.len();
                        written.file.write_all_at(&part.bytes, 0)?;
                        if old != part.bytes.len() {
                            written.file.set_len(part.bytes.len() as u64)?;
                        }
                        written.bytes.clone_from(&part.bytes);
                    }
                }
                None => {
                    let path = self.path.join(&part.name);
                    let file = OpenOptions::new()
                        .write(true)
                        .create(true)
                        .truncate(true)
                        .open(&path)
                        .with_context(|| format!("creating {}", path.display()))?;
                    file.write_all_at(&part.bytes, 0)?;
                    let written = Written {
                        file,
                        bytes: part.bytes.clone(),
                        round: self.round,
                    };
                    self.written.insert(part.name.clone(), written);
                }
            }
        }
        if self.written.values().any(|w| w.round != self.round) {
            let gone: Vec<String> = (self.written.iter())
                .filter(|(_, written)| written.round != self.round)
                .map(|(name, _)| name.clone())
                .collect();
            for name in gone {
                self.forget(&name);
            }
        }
        Ok(())
    }

    /// Removes a file; a reader that replaces it asks for that afterwards.
    pub fn forget(&mut self, name: &str) {
        self.written.remove(name);
        // It may be gone already.
        let _ = std::fs::remove_file(self.path.join(name));
    }
}

//! Where a command may write: onto nothing that is there, unless it was asked to replace it, and never onto, into
//! or around what it reads.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Component, Path, PathBuf};

use enamel_adapter::staging::StagedFile;

use crate::error::TrainError;

/// What an option names for a command to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output<'a> {
    /// The place.
    pub path: &'a Path,
    /// The option that named it.
    pub option: &'static str,
    /// Whether `--overwrite` was given, where the command has it.
    pub overwrite: Option<bool>,
}

impl<'a> Output<'a> {
    /// What `--output` names, of a command that replaces nothing.
    pub fn new(path: &'a Path) -> Self {
        Self {
            path,
            option: "--output",
            overwrite: None,
        }
    }

    /// The same, of a command with `--overwrite`.
    pub fn replacing(path: &'a Path, overwrite: bool) -> Self {
        Self {
            overwrite: Some(overwrite),
            ..Self::new(path)
        }
    }

    /// Refuses a place where no file can be written. Called before the work, not after it.
    ///
    /// # Errors
    /// A folder or device of that name; a file, unless it is to be replaced.
    pub fn as_file(&self) -> Result<(), TrainError> {
        let Ok(kind) = fs::symlink_metadata(self.path) else {
            return Ok(());
        };
        let target = fs::metadata(self.path).unwrap_or(kind);
        if target.is_dir() {
            return Err(self.refused("it is a directory, and a file is to be written".into()));
        }
        if !target.is_file() && !target.is_symlink() {
            return Err(self.refused("it is no file but a device or a pipe".into()));
        }
        match self.overwrite {
            Some(true) => Ok(()),
            _ => Err(self.occupied()),
        }
    }

    /// Refuses a place where no folder can be written. Called before the work, not after it.
    ///
    /// # Errors
    /// A file; a folder that is not empty, unless it is to be replaced and `is_ours` finds nothing in it that this
    /// command would not write.
    pub fn as_folder(&self, is_ours: impl Fn(&Path) -> bool) -> Result<(), TrainError> {
        let Ok(kind) = fs::symlink_metadata(self.path) else {
            return Ok(());
        };
        let target = fs::metadata(self.path).unwrap_or(kind);
        if !target.is_dir() {
            return Err(self.refused("it is no directory, and one is to be written".into()));
        }
        let mut entries = fs::read_dir(self.path).map_err(TrainError::io(self.path, "reading"))?;
        if entries.next().is_none() {
            return Ok(());
        }
        match self.overwrite {
            Some(true) if is_ours(self.path) => Ok(()),
            Some(true) => Err(self.refused(
                "it holds more than what is to be replaced, and that is not removed".into(),
            )),
            _ => Err(self.occupied()),
        }
    }

    /// Refuses a place that is, lies in or holds one of `inputs`, whatever links lead there.
    ///
    /// # Errors
    /// That, with the input.
    pub fn apart_from<P: AsRef<Path>>(
        &self,
        inputs: impl IntoIterator<Item = P>,
    ) -> Result<(), TrainError> {
        let here = real(self.path);
        for input in inputs {
            let input = input.as_ref();
            for real in files(input) {
                let how = if here == real {
                    "it is read too"
                } else if here.starts_with(&real) {
                    "it lies in what is read"
                } else if real.starts_with(&here) {
                    "it holds what is read"
                } else {
                    continue;
                };
                let reason = match input == self.path {
                    true => how.to_owned(),
                    false => format!("{how}: {}", input.display()),
                };
                return Err(TrainError::Run {
                    path: self.path.to_owned(),
                    reason,
                    help: format!(
                        "nothing was changed; choose another {} beside it",
                        self.option
                    ),
                });
            }
        }
        Ok(())
    }

    /// Whether both are to be written at one place.
    pub fn is_same(&self, other: &Self) -> bool {
        real(self.path) == real(other.path)
    }

    fn occupied(&self) -> TrainError {
        self.refused("there is something already".into())
    }

    fn refused(&self, reason: String) -> TrainError {
        let help = match self.overwrite {
            Some(false) => format!(
                "choose another {}, or replace it with --overwrite",
                self.option
            ),
            _ => format!("choose another {}, or remove it", self.option),
        };
        TrainError::Run {
            path: self.path.to_owned(),
            reason,
            help,
        }
    }
}

/// An input without links, and what links in its folder lead to: a model in a hub's cache is a folder of such.
fn files(input: &Path) -> Vec<PathBuf> {
    let Ok(whole) = input.canonicalize() else {
        return Vec::new();
    };
    let entries = fs::read_dir(&whole).into_iter().flatten().flatten();
    let links = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    let targets = links.filter_map(|entry| entry.path().canonicalize().ok());
    let targets: Vec<PathBuf> = targets.collect();
    [vec![whole], targets].concat()
}

/// A path without links, of which the last parts need not be there.
fn real(path: &Path) -> PathBuf {
    let path = match std::path::absolute(path) {
        Ok(path) => path,
        Err(_) => path.to_owned(),
    };
    for there in path.ancestors() {
        if let (Ok(mut real), Ok(rest)) = (there.canonicalize(), path.strip_prefix(there)) {
            for part in rest.components() {
                // What is not there is no link, so its parent is what comes before it.
                match part {
                    Component::ParentDir => drop(real.pop()),
                    part => real.push(part),
                }
            }
            return real;
        }
    }
    path
}

/// A file that takes its name when it is complete.
pub(crate) struct NewFile {
    path: PathBuf,
    replace: bool,
    file: BufWriter<StagedFile>,
}

impl NewFile {
    pub fn create(path: &Path, replace: bool) -> Result<Self, TrainError> {
        let file = StagedFile::beside(path).map_err(TrainError::io(path, "creating it"))?;
        Ok(Self {
            path: path.to_owned(),
            replace,
            file: BufWriter::new(file),
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        self.file
            .write_all(bytes)
            .map_err(TrainError::io(&self.path, "writing it"))
    }

    pub fn finish(self) -> Result<(), TrainError> {
        let file = self
            .file
            .into_inner()
            .map_err(|e| TrainError::io(&self.path, "writing it")(e.into_error()))?;
        // Somebody may have made a file of the name meanwhile.
        file.finish(&self.path, self.replace)
            .map_err(TrainError::io(&self.path, "writing it"))?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Whether `output` is refused beside `input`.
    fn refused(output: &Path, input: &Path) -> bool {
        Output::new(output).apart_from([input]).is_err()
    }

    #[test]
    fn an_output_is_never_an_input_nor_in_it_nor_around_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/model/deep")).unwrap();
        fs::write(at("a/rows.jsonl"), "").unwrap();
        for (output, input, wanted) in [
            ("a/model", "a/model", true),
            ("a/model/x/y", "a/model", true),
            ("a", "a/model", true),
            ("a/model/deep/../../model/new", "a/model", true),
            ("a/rows.jsonl", "a/rows.jsonl", true),
            ("a/models", "a/model", false),
            ("a/model.gguf", "a/model", false),
            ("b/model", "a/model", false),
            ("a/scores.jsonl", "a/rows.jsonl", false),
            ("a/model", "absent", false),
        ] {
            assert_eq!(refused(&at(output), &at(input)), wanted, "{output} {input}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_hide_no_input() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["model", "blobs", "cached"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("blobs/0"), "").unwrap();
        symlink(at("blobs/0"), at("cached/model.safetensors")).unwrap();
        symlink(at("model"), at("link")).unwrap();
        symlink(at("nowhere"), at("dangling")).unwrap();
        assert!(refused(&at("link/new"), &at("model")));
        assert!(refused(&at("link"), &at("model")));
        assert!(refused(&at("model/new"), &at("link")));
        // What the link in the input's folder leads to is read.
        assert!(refused(&at("blobs/0"), &at("cached")));
        assert!(refused(&at("blobs"), &at("cached")));
        assert!(!refused(&at("blobs/1"), &at("cached")));
        assert!(!refused(&at("dangling"), &at("model")));
        // A link that leads nowhere is something that is there.
        Output::new(&at("dangling")).as_file().unwrap_err();
        Output::new(&at("dangling"))
            .as_folder(|_| true)
            .unwrap_err();
    }

    #[test]
    fn what_is_there_is_replaced_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let folder = dir.path().join("folder");
        let output = Output::replacing;
        output(&file, false).as_file().unwrap();
        output(&folder, false).as_folder(|_| false).unwrap();
        fs::write(&file, "").unwrap();
        fs::create_dir(&folder).unwrap();
        // An empty folder holds nothing to lose.
        output(&folder, false).as_folder(|_| false).unwrap();
        fs::write(folder.join("x"), "").unwrap();
        output(&file, false).as_file().unwrap_err();
        output(&file, true).as_file().unwrap();
        output(&folder, false).as_folder(|_| true).unwrap_err();
        output(&folder, true).as_folder(|_| true).unwrap();
        output(&folder, true).as_folder(|_| false).unwrap_err();
        output(&folder, true).as_file().unwrap_err();
        output(&file, true).as_folder(|_| true).unwrap_err();
        Output::new(&file).as_file().unwrap_err();
        #[cfg(unix)]
        Output::replacing(Path::new("/dev/null"), true)
            .as_file()
            .unwrap_err();
    }
}

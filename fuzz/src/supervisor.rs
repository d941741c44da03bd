//! Runs workers, ends those that hang, and goes on behind inputs that killed one.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::folder::Folder;
use crate::random::Random;
use crate::readers;
use crate::state::{Count, State};
use crate::worker::{self, Work};

/// How long an input may take, in seconds of the processor.
const HANG: f64 = 5.0;
/// How long it may take on a clock, where it waits for something that does not come.
const STUCK: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
/// Deaths after which a reader is given up.
const MOST_DEATHS: u64 = 200;

/// What came of a reader.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// The number behind the last input.
    pub reached: u64,
    pub inputs: u64,
    pub accepted: u64,
    pub panics: u64,
    pub aborts: u64,
    pub hangs: u64,
    pub memory: u64,
    /// The most bytes beyond twice the input.
    pub peak: u64,
    /// Seconds of the slowest input.
    pub slowest: f64,
    /// Seconds of the processor, all workers together.
    pub seconds: f64,
}

impl Outcome {
    pub fn failures(&self) -> u64 {
        self.panics + self.aborts + self.hangs + self.memory
    }

    /// Inputs that the reader said no to. One that took too much memory may have been accepted before.
    pub fn refused(&self) -> u64 {
        let other = self.accepted + self.panics + self.aborts + self.hangs;
        self.inputs.saturating_sub(other)
    }

    pub fn add(&mut self, other: &Self) {
        self.reached = self.reached.max(other.reached);
        self.inputs += other.inputs;
        self.accepted += other.accepted;
        self.panics += other.panics;
        self.aborts += other.aborts;
        self.hangs += other.hangs;
        self.memory += other.memory;
        self.peak = self.peak.max(other.peak);
        self.slowest = self.slowest.max(other.slowest);
        self.seconds += other.seconds;
    }
}

/// What to do with one reader.
#[derive(Clone)]
pub struct Task {
    pub reader: String,
    pub seed: u64,
    pub from: u64,
    pub count: u64,
    pub seconds: f64,
    pub jobs: u64,
    pub failures: PathBuf,
}

/// Runs a reader on all its inputs.
pub fn run(task: &Task) -> Result<Outcome> {
    // In memory's file system, where there is one.
    let shared = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("enamel-fuzz-");
    let room = match shared.is_dir() {
        true => builder.tempdir_in(shared)?,
        false => builder.tempdir()?,
    };
    let jobs = task.jobs.max(1);
    let lanes = (0..jobs).map(|lane| Lane {
        work: Work {
            reader: task.reader.clone(),
            seed: task.seed,
            from: task.from + lane,
            step: jobs,
            until: task.from.saturating_add(task.count),
            seconds: task.seconds,
            folder: room.path().join(format!("files-{lane}")),
            failures: task.failures.clone(),
            state: room.path().join(format!("state-{lane}")),
        },
    });
    let lanes: Vec<Lane> = lanes.collect();
    let outcomes = std::thread::scope(|scope| {
        let running: Vec<_> = lanes
            .iter()
            .map(|lane| scope.spawn(|| lane.run()))
            .collect();
        let joined = running.into_iter().map(|lane| match lane.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a supervisor's thread failed"),
        });
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut all = Outcome::default();
    outcomes.iter().for_each(|outcome| all.add(outcome));
    all.reached = task.from + all.inputs;
    Ok(all)
}

/// A worker and its successors.
struct Lane {
    work: Work,
}

/// Why a worker is no more.
enum End {
    Done,
    /// Its memory is worn: another goes on behind its last input.
    HandsOver,
    Hung,
    Died(ExitStatus),
}

impl Lane {
    fn run(&self) -> Result<Outcome> {
        let began = Instant::now();
        let mut all = Outcome::default();
        let mut work = self.work.clone();
        let state = State::create(&work.state)?;
        let mut deaths = 0;
        loop {
            work.seconds = (self.work.seconds - began.elapsed().as_secs_f64()).max(0.0);
            if work.from >= work.until || work.seconds <= 0.0 {
                break;
            }
            state.set(Count::Current, u64::MAX);
            state.set(Count::Refused, 0);
            let end = self.watch(&work, &state, &mut all)?;
            let number = state.get(Count::Current);
            match end {
                End::Done => break,
                End::HandsOver => {
                    work.from = number.saturating_add(work.step);
                    continue;
                }
                _ if number == u64::MAX => {
                    bail!("{}: the worker ended before its first input", work.reader)
                }
                End::Hung => {
                    all.hangs += 1;
                    println!("{} {number}: hangs", work.reader);
                }
                // The harness' own error, which it has told.
                End::Died(status) if status.code() == Some(1) => {
                    bail!("{}: the worker failed at input {number}", work.reader)
                }
                End::Died(status) => {
                    let refused = state.get(Count::Refused) == 1;
                    match refused {
                        true => all.memory += 1,
                        false => all.aborts += 1,
                    }
                    let signal = status.signal().unwrap_or_default();
                    let why = if refused { "memory" } else { "abort" };
                    println!("{} {number}: {why} (signal {signal})", work.reader);
                }
            }
            all.inputs += 1;
            self.keep(&work, number)?;
            work.from = number.saturating_add(work.step);
            deaths += 1;
            if deaths >= MOST_DEATHS {
                println!("{}: given up after {deaths} deaths", work.reader);
                break;
            }
        }
        all.inputs += state.get(Count::Inputs);
        all.accepted = state.get(Count::Accepted);
        all.panics = state.get(Count::Panics);
        all.memory += state.get(Count::Memory);
        all.peak = state.get(Count::Peak);
        all.slowest = state.get(Count::Slowest) as f64 / 1e6;
        Ok(all)
    }

    /// Starts a worker and waits for its end.
    fn watch(&self, work: &Work, state: &State, all: &mut Outcome) -> Result<End> {
        let mut child = start(work)?;
        let mut last = (u64::MAX, 0.0, Instant::now());
        let mut used = 0.0;
        let end = loop {
            if let Some(status) = child.try_wait()? {
                break match status.code() {
                    Some(0) => End::Done,
                    Some(code) if code == i32::from(worker::HANDS_OVER) => End::HandsOver,
                    _ => End::Died(status),
                };
            }
            used = processor_seconds(child.id()).unwrap_or(used);
            let number = state.get(Count::Current);
            if number != last.0 {
                last = (number, used, Instant::now());
            }
            // Before the first input a worker makes its seeds.
            let began = number != u64::MAX;
            if began && (used - last.1 > HANG || last.2.elapsed() > STUCK) {
                child.kill()?;
                child.wait()?;
                break End::Hung;
            }
            std::thread::sleep(POLL);
        };
        all.seconds += used;
        Ok(end)
    }

    /// Writes down an input that a worker died of: it follows from its number.
    fn keep(&self, work: &Work, number: u64) -> Result<()> {
        let dir = tempfile::tempdir()?;
        let reader = readers::find(&work.reader)?(&mut Folder::new(dir.path()))?;
        let input = reader.input(&mut Random::of_input(work.seed, number));
        input.keep(&work.kept(number))
    }
}

fn start(work: &Work) -> Result<Child> {
    let program = std::env::current_exe()?;
    Command::new(&program)
        .arg("worker")
        .arg(&work.reader)
        .args(["--seed", &work.seed.to_string()])
        .args(["--from", &work.from.to_string()])
        .args(["--step", &work.step.to_string()])
        .args(["--until", &work.until.to_string()])
        .args(["--seconds", &work.seconds.to_string()])
        .arg("--folder")
        .arg(&work.folder)
        .arg("--failures")
        .arg(&work.failures)
        .arg("--state")
        .arg(&work.state)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

/// Seconds that a process has computed, as Linux tells.
fn processor_seconds(process: u32) -> Option<f64> {
    /// `sysconf(_SC_CLK_TCK)` of every Linux there is.
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS)
}

/// Reads one input in this process, which shows all there is to see.
pub fn replay(reader: &str, input: &crate::folder::Input) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut seeds = worker::folder(&dir.path().join("files"))?;
    let mut made = readers::find(reader)?(&mut seeds)?;
    let began = Instant::now();
    let accepted = made.read(input, &mut seeds)?;
    let seconds = began.elapsed().as_secs_f64();
    let word = if accepted { "accepted" } else { "refused" };
    println!("{reader}: {word} in {seconds:.3} s");
    Ok(())
}

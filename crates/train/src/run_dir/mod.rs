//! The run directory: where a run starts, whether it may, and what it leaves.
//!
//! [`RunDir::claim`] locks it and looks at what lies there, [`RunDir::open`] decides where the run starts, and
//! [`RunDir::prepare`], once all inputs are opened and loaded, is the first to change anything. What was there
//! goes only when the new run has something to show (`Hold::settle`).

pub(crate) mod belongings;
pub(crate) mod checkpoint_check;
pub mod checkpoints;
pub mod fingerprint;
pub(crate) mod former;
pub mod ground;
pub(crate) mod hold;
pub(crate) mod lock;
pub mod results;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::TrainError;
use crate::recipe::{LockInfo, Recipe, write_lock};
use crate::run_dir::belongings::{MODEL, SUMMARY, Survey};
use crate::run_dir::checkpoint_check::{Offered, Sound};
use crate::run_dir::checkpoints::{ADAPTER, CHECKPOINTS, Checkpoints, RunState, step_of};
use crate::run_dir::fingerprint::{Started, fingerprint, other_run};
use crate::run_dir::former::Replaced;
use crate::run_dir::hold::Hold;
use crate::run_dir::lock::{RunLock, new_id};
use crate::run_dir::results::RunOutcome;
use crate::text::LogLine;

/// Name of the lock file.
pub(crate) use crate::run_dir::belongings::LOCK;

/// What `--resume` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// A new run.
    #[default]
    No,
    /// Go on from the newest checkpoint of the run directory; start if there is none.
    Latest,
    /// Go on from this checkpoint.
    From(PathBuf),
}

/// How a run begins, with what it moves out of its way.
#[derive(Debug)]
enum Begin {
    /// With the first step.
    Fresh,
    /// With the first step, in the place of an old run.
    Over,
    /// Where it was.
    Resumed,
    /// At an older checkpoint than the newest: another line begins.
    Line,
}

/// Where a run stands.
#[derive(Debug)]
pub enum Standing {
    /// There is something to do.
    ToTrain,
    /// It is finished, and this is what it came to.
    Finished(Box<RunOutcome>),
}

/// What is to be trained now, beside which a run that is there is held.
struct Now<'a> {
    recipe: &'a Recipe,
    lock: &'a LockInfo,
    fingerprint: &'a str,
}

/// A run directory that nobody else may use meanwhile.
#[derive(Debug)]
pub struct RunDir {
    /// The directory.
    pub path: PathBuf,
    /// Where the run stands.
    pub state: RunState,
    /// The checkpoint it goes on from.
    pub checkpoint: Option<PathBuf>,
    /// The lock and the old run.
    pub(crate) hold: Arc<Hold>,
    /// What a person has to know about the directory.
    pub(crate) notes: Vec<String>,
    survey: Survey,
    results: Vec<&'static str>,
    begin: Begin,
}

impl RunDir {
    /// Locks the recipe's output directory and refuses what can be refused before the inputs are opened.
    /// Leftovers of a killed run are removed, nothing else.
    ///
    /// # Errors
    /// When another run is at work there; when something lies there that no run has written, under a name that
    /// this one writes; when there is a run and neither resuming nor overwriting was asked for, or no run to
    /// resume.
    pub fn claim(recipe: &Recipe, resume: &Resume) -> Result<Self, TrainError> {
        let path = recipe.output_dir();
        let lock = RunLock::take(&path)?;
        let mut notes: Vec<String> = lock.note.clone().into_iter().collect();
        let marker = lock.marker();
        if !marker.id.is_empty() {
            notes.extend(former::recover(&path, &marker)?);
        }
        // What another adapter to start from has made of the recipe's method is not known yet.
        let results = match recipe.adapter.init_from {
            Some(_) => vec![ADAPTER, MODEL],
            None => vec![belongings::result_of(recipe)],
        };
        let survey = Survey::of(&path, &marker, &results);
        survey.refuse_foreign(&path)?;
        let occupied = !survey.own.is_empty();
        match resume {
            Resume::No if occupied && !recipe.output.overwrite => {
                return Err(TrainError::Run {
                    path,
                    reason: "there is a run here already".into(),
                    help: "go on with it (--resume), choose another directory (--output DIR), or replace it \
                           (--overwrite, or output.overwrite = true)"
                        .into(),
                });
            }
            Resume::Latest | Resume::From(_) if !survey.known && !belongings::is_empty(&path) => {
                return Err(TrainError::Run {
                    path,
                    reason: "there is no run here to go on with, but something else".into(),
                    help: "name the run's directory (--output DIR), or start one without --resume"
                        .into(),
                });
            }
            _ => {}
        }
        Ok(Self {
            state: RunState::default(),
            checkpoint: None,
            hold: Arc::new(Hold::new(&path, lock)),
            path,
            notes,
            survey,
            results,
            begin: Begin::Fresh,
        })
    }

    /// Decides where the run starts. Nothing is removed or written yet.
    ///
    /// # Errors
    /// When the checkpoint is damaged; when the run or checkpoint was made under another recipe, other files,
    /// another seed or another optimizer; when there is a result and nothing to go on from; when an input lies in
    /// what would be replaced.
    pub fn open(
        &mut self,
        recipe: &Recipe,
        lock: &LockInfo,
        resume: &Resume,
    ) -> Result<Standing, TrainError> {
        let fingerprint = fingerprint(recipe, lock)?;
        let now = Now {
            recipe,
            lock,
            fingerprint: &fingerprint,
        };
        self.state = RunState {
            seed: recipe.seed,
            fingerprint: fingerprint.clone(),
            ..RunState::default()
        };
        let newest = Checkpoints::new(&self.path, 1).latest();
        match resume {
            Resume::No if self.survey.own.is_empty() => {}
            Resume::No => self.begin = Begin::Over,
            Resume::Latest => {
                if let Some(outcome) = self.finished(&now)? {
                    return Ok(Standing::Finished(outcome));
                }
                match newest {
                    Some(newest) => self.go_on(newest, &now)?,
                    None => self.start_anew(&now)?,
                }
            }
            Resume::From(dir) => {
                self.refuse_a_strangers(dir)?;
                let newest = newest.is_some_and(|newest| same(&newest, dir));
                if newest && let Some(outcome) = self.finished(&now)? {
                    return Ok(Standing::Finished(outcome));
                }
                self.go_on(dir.clone(), &now)?;
            }
        }
        if matches!(self.begin, Begin::Over | Begin::Line) {
            self.refuse_own_inputs(recipe, lock)?;
        }
        Ok(Standing::ToTrain)
    }

    /// Refuses a checkpoint of a run of another length than `total`.
    ///
    /// # Errors
    /// That, with both lengths.
    pub fn check_length(&self, total: usize) -> Result<(), TrainError> {
        match &self.checkpoint {
            Some(checkpoint) if self.state.total_steps != total => Err(TrainError::Run {
                path: checkpoint.clone(),
                reason: format!(
                    "it is of a run of {} steps, and this one has {total}",
                    self.state.total_steps
                ),
                help: "resume with the recipe and the data that the run was started with".into(),
            }),
            _ => Ok(()),
        }
    }

    /// What the run came to, if it has ended.
    fn finished(&self, now: &Now<'_>) -> Result<Option<Box<RunOutcome>>, TrainError> {
        let (Some(result), true) = (self.survey.result(), self.survey.has(SUMMARY)) else {
            return Ok(None);
        };
        self.refuse_another_recipe(now)?;
        let path = self.path.join(SUMMARY);
        let bytes = fs::read(&path).map_err(TrainError::io(&path, "reading"))?;
        let mut outcome: RunOutcome =
            serde_json::from_slice(&bytes).map_err(|e| TrainError::Run {
                path,
                reason: format!(
                    "the run has ended, and its summary cannot be read ({e}); nothing was changed"
                ),
                help: "remove this file to have the end of the run written anew".into(),
            })?;
        // The directory may have moved since.
        let is_model = result == Path::new(MODEL);
        let place = self.path.join(result);
        outcome.dir.clone_from(&self.path);
        outcome.model = is_model.then(|| place.clone());
        outcome.adapter = (!is_model).then_some(place);
        outcome.checkpoint = Checkpoints::new(&self.path, 1).latest();
        Ok(Some(Box::new(outcome)))
    }

    /// Compares with the run that the directory's own files tell of.
    fn refuse_another_recipe(&self, now: &Now<'_>) -> Result<(), TrainError> {
        let newest = Checkpoints::new(&self.path, 1).latest();
        let state = newest.and_then(|newest| checkpoints::read_state(&newest).ok());
        let started = Started::of(&self.path);
        let known = state.is_some() || started.is_some();
        let (then, optim) = (started.as_ref().map(Started::optim), now.recipe.train.optim);
        let other_optim = then.filter(|then| *then != optim);
        let mut changes = started.map(|started| started.changes(now.recipe, now.lock));
        if let (Some(then), Some(changes)) = (other_optim, &mut changes) {
            changes.push(format!("train.optim is \"{optim}\", and was \"{then}\""));
        }
        let same = state.is_some_and(|state| state.fingerprint == now.fingerprint)
            && other_optim.is_none();
        match changes {
            _ if same => Ok(()),
            // An older version had fewer settings to hash.
            Some(changes) if changes.is_empty() => Ok(()),
            changes if known => Err(other_run(
                &self.path,
                &self.path,
                &changes.unwrap_or_default(),
            )),
            _ => Err(TrainError::Run {
                path: self.path.join(LOCK),
                reason: "it cannot be read, so whether the run here is of this recipe is not known"
                    .into(),
                help: "put the file back, or start a new run in another directory (--output DIR)"
                    .into(),
            }),
        }
    }

    /// There is nothing to go on from: a run that ended before its first checkpoint starts again.
    fn start_anew(&mut self, now: &Now<'_>) -> Result<(), TrainError> {
        if self.survey.own.is_empty() {
            return Ok(());
        }
        self.refuse_another_recipe(now)?;
        let ended = match (self.survey.result(), self.survey.has(SUMMARY)) {
            (None, false) => return Ok(()),
            (Some(result), _) => format!("{} is here", result.display()),
            (None, true) => format!("{SUMMARY} is here"),
        };
        Err(TrainError::Run {
            path: self.path.clone(),
            reason: format!(
                "{ended}, and no checkpoint to go on from: starting again would replace what the run has left"
            ),
            help: "nothing was changed; replace the run (--overwrite), or choose another directory (--output DIR)"
                .into(),
        })
    }

    /// A run does not go on from a checkpoint that lies elsewhere: its own would be lost.
    fn refuse_a_strangers(&self, dir: &Path) -> Result<(), TrainError> {
        let inside = dir
            .parent()
            .is_some_and(|parent| same(parent, &self.path.join(CHECKPOINTS)));
        if inside || self.survey.own.is_empty() {
            return Ok(());
        }
        Err(TrainError::Run {
            path: dir.to_owned(),
            reason: format!(
                "this checkpoint is none of the run in {}",
                self.path.display()
            ),
            help: "go on from it in another directory (--output DIR)".into(),
        })
    }

    fn go_on(&mut self, checkpoint: PathBuf, now: &Now<'_>) -> Result<(), TrainError> {
        self.read(&checkpoint, now)?;
        let later = |path: &PathBuf| {
            let step = path.file_name().and_then(step_of);
            step.is_some_and(|step| step > self.state.step)
        };
        let ended = self.survey.has(SUMMARY) && self.survey.result().is_some();
        self.begin = match ended || self.survey.own.iter().any(later) {
            true => Begin::Line,
            false => Begin::Resumed,
        };
        if now.recipe.train.load_best_model_at_end
            && let Some(best) = self.state.best.clone()
        {
            let kept = Checkpoints::new(&self.path, 1).path(best.step);
            if let Err(wrong) = checkpoint_check::examine(&kept) {
                self.notes.push(format!(
                    "the best checkpoint so far (validation loss {:.4} after step {}) is not there any more ({}): \
                     load_best_model_at_end keeps the best from here on, and the last where nothing is validated",
                    best.loss,
                    best.step,
                    match kept.exists() {
                        true => wrong.join("; "),
                        false => format!("no {}", kept.display()),
                    }
                ));
                self.state.best = None;
            }
        }
        self.checkpoint = Some(checkpoint);
        Ok(())
    }

    /// The state of a checkpoint that is what was written, by a run of this recipe.
    fn read(&mut self, checkpoint: &Path, now: &Now<'_>) -> Result<(), TrainError> {
        let others = Offered {
            run: &self.path,
            list: &Checkpoints::new(&self.path, 1).list(),
            fingerprint: now.fingerprint,
        };
        let Sound {
            mut state,
            unsealed,
        } = checkpoint_check::sound(checkpoint, &others)?;
        if state.fingerprint != now.fingerprint {
            let started = Started::find(checkpoint, &self.path);
            let changes = started.map(|started| started.changes(now.recipe, now.lock));
            // An older version had fewer settings to hash.
            let same = unsealed && changes.as_ref().is_some_and(Vec::is_empty);
            if !same {
                return Err(other_run(
                    checkpoint,
                    &self.path,
                    &changes.unwrap_or_default(),
                ));
            }
            state.fingerprint = now.fingerprint.to_owned();
        }
        checkpoints::check_optimizer(checkpoint, now.recipe.train.optim)?;
        if unsealed {
            self.notes.push(
                "the checkpoint is of an older version, which noted no hashes: whether it is whole cannot be told"
                    .to_owned(),
            );
        }
        self.state = state;
        Ok(())
    }

    /// A run cannot be made of what it replaces.
    fn refuse_own_inputs(&self, recipe: &Recipe, lock: &LockInfo) -> Result<(), TrainError> {
        let moved: Vec<PathBuf> = self
            .survey
            .own
            .iter()
            .filter(|own| own.as_path() != Path::new(LOCK))
            .filter_map(|own| self.path.join(own).canonicalize().ok())
            .collect();
        let groups = [
            &lock.model_files,
            &lock.tokenizer_files,
            &lock.data_files,
            &lock.init_files,
        ];
        let files = groups.into_iter().flatten().map(|file| &file.path);
        let experts = recipe.adapter.adapters.0.iter().map(|(_, dir)| dir);
        let all = files.chain(experts).chain(&recipe.adapter.init_from);
        let mut inside: Vec<String> = all
            .filter(|path| {
                let path = path.canonicalize();
                path.is_ok_and(|path| moved.iter().any(|moved| path.starts_with(moved)))
            })
            .map(|path| path.display().to_string())
            .collect();
        inside.sort();
        inside.dedup();
        if inside.is_empty() {
            return Ok(());
        }
        Err(TrainError::Run {
            path: self.path.clone(),
            reason: format!(
                "the run here is to be replaced, and the new one is made of it: it reads {}",
                inside.join(", ")
            ),
            help:
                "nothing was changed; choose another directory (--output DIR), or copy these first"
                    .into(),
        })
    }

    /// Makes the directory this run's: moves out of the way what it replaces, and writes the lock file.
    ///
    /// # Errors
    /// When something has changed since it was claimed, or the disk refuses.
    pub fn prepare(&mut self, recipe: &Recipe, lock: &LockInfo) -> Result<(), TrainError> {
        let hold = self.hold.clone();
        let _changing = hold.changing();
        self.hold.check()?;
        let marker = self.hold.lock().marker();
        let survey = Survey::of(&self.path, &marker, &self.results);
        survey.refuse_foreign(&self.path)?;
        if marker.id.is_empty() {
            let known = match survey.result() {
                Some(result) => vec![belongings::digest(&self.path.join(result))?],
                None => Vec::new(),
            };
            self.hold.lock().update(|marker| {
                marker.id = survey.unmarked.clone().unwrap_or_else(new_id);
                marker.adopted = survey.known;
                marker.results = known;
            })?;
        }
        let id = self.hold.id();
        match self.begin {
            Begin::Fresh | Begin::Resumed => {}
            Begin::Over => {
                self.hold
                    .replaces(Replaced::begin(&self.path, &id, &survey.own)?);
            }
            Begin::Line => {
                self.hold.lock().update(|marker| marker.line += 1)?;
                let step = self.state.step;
                let kept = former::set_aside_line(&self.path, marker.line, step, &survey.own)?;
                self.notes.push(format!(
                    "what the run had after step {step} is in {} now",
                    kept.display()
                ));
            }
        }
        self.state.run = id;
        self.state.line = self.hold.lock().marker().line;
        Ok(write_lock(
            &self.path.join(LOCK),
            &self.state.run,
            recipe,
            lock,
        )?)
    }

    /// Says what there is to know about the directory, but for the first `from` notes.
    pub fn tell(&self, from: usize, say: &LogLine) {
        let notes = self.notes.iter().skip(from);
        notes.for_each(|note| say(&format!("note     {note}")));
    }

    /// Puts the old run back if the new one has come to nothing, and says so.
    pub fn leave(&self, say: &LogLine) {
        let _changing = self.hold.changing();
        match self.hold.put_back() {
            None => {}
            Some(Ok(())) => say(&format!(
                "the run that was in {} is back: the new one has not come to a checkpoint",
                self.path.display()
            )),
            Some(Err(error)) => say(&format!(
                "the run that was in {} could not be put back: {error}",
                self.path.display()
            )),
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // For ends that nobody saw coming.
        let _ = self.hold.put_back();
    }
}

/// Whether two names stand for one folder.
fn same(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

//! A base model: found, opened, cross-checked, and only then loaded.

pub mod provenance;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::{AdapterConfig, MethodConfig, load_config, takes_head};
use enamel_data::{DataError, Tokenizer, TokenizerFiles};
use enamel_kernels::Compute;
use enamel_model::checkpoint::Checkpoint;
use enamel_model::source::{
    self, Catalogue, EntrySource, LocalModel, ModelRef, PullOptions, PullProgress,
};
use enamel_model::{ArchConfig, HeadConfig, Loading, Model};
use serde_json::Value;

use crate::error::TrainError;

/// A base model whose files are open and agree with each other. None of its weights are in memory.
pub struct OpenBase {
    /// Where it lies and where it came from.
    pub local: LocalModel,
    /// Its files.
    pub checkpoint: Checkpoint,
    /// Its shape.
    pub config: ArchConfig,
    /// Its tokenizer and chat template; one that refuses every text if it comes without.
    pub tokenizer: Tokenizer,
    /// Whether it comes with a tokenizer.
    pub has_tokenizer: bool,
    /// The shape that its files say, where [`Self::config`] gives a tied head a matrix of its own for an
    /// adapter's sake.
    pub tied: Option<ArchConfig>,
}

/// The same with its weights on a device.
pub struct LoadedBase {
    /// Its open files.
    pub open: OpenBase,
    /// The model, frozen, without an adapter.
    pub model: Model,
}

impl OpenBase {
    /// Finds the model that `reference` names, fetching it if it is not there, and opens its files.
    /// `chat_template` replaces the model's own.
    pub fn open(
        reference: &str,
        chat_template: Option<&str>,
        progress: &mut dyn PullProgress,
    ) -> Result<Self, TrainError> {
        let local = source::pull(
            &ModelRef::parse(reference)?,
            &PullOptions::from_env()?,
            progress,
        )?;
        let checkpoint = Checkpoint::open(&local.path)?;
        let config = ArchConfig::from_json(checkpoint.config_json())?;
        // Rows of token ids need no tokenizer, and small models for tests come without one.
        let has_tokenizer = checkpoint.has_tokenizer();
        let tokenizer = match has_tokenizer {
            true => tokenizer(&checkpoint, &config, chat_template)?,
            false => {
                let reason = checkpoint.tokenizer_json().err();
                let reason = reason.map_or_else(String::new, |error| error.to_string());
                Tokenizer::stand_in(config.vocab_size, &reason)?
            }
        };
        check_vocabulary(&local.path, &tokenizer, &config)?;
        let notes = tokenizer.notes().iter().map(String::as_str);
        let own = config.notes().iter().map(String::as_str);
        for note in checkpoint.notes().chain(own).chain(notes) {
            progress.note(&format!("note: {}: {note}", local.path.display()));
        }
        Ok(Self {
            local,
            checkpoint,
            config,
            tokenizer,
            has_tokenizer,
            tied: None,
        })
    }

    /// Gives the model another head than that of a language model. A base whose files name no padding token has the
    /// tokenizer's from then on.
    pub fn set_head(&mut self, head: HeadConfig) {
        if self.config.head != head {
            let padding = self.tokenizer.padding_id();
            self.config = self.config.with_head(head, Some(padding));
        }
    }

    /// Makes the base ready for these adapters: where one of them takes hold of a head that shares the
    /// embedding's weights (a target or a copy of its own), the head gets a matrix of its own that begins as
    /// the embedding's, as in PEFT; where none does, it shares them.
    ///
    /// # Errors
    /// An adapter on the head beside single rows of the embedding, which a tied head follows.
    pub fn for_adapters(&mut self, adapters: &[AdapterConfig]) -> Result<(), TrainError> {
        if let Some(tied) = self.tied.take() {
            self.config = tied;
        }
        if !self.config.ties_head() {
            return Ok(());
        }
        let untied = self.config.untied();
        let modules = untied.modules();
        if !adapters.iter().any(|adapter| takes_head(adapter, &modules)) {
            return Ok(());
        }
        if adapters
            .iter()
            .any(|adapter| adapter.token_indices().is_some())
        {
            return Err(TrainError::Mismatch(
                "trainable_token_indices trains rows of the embedding, which this model's lm_head shares and \
                 follows, and lm_head is to be adapted or saved by itself\n  \
                 help: choose one of the two"
                    .to_owned(),
            ));
        }
        self.checkpoint.show_head_apart(self.config.embedding());
        self.tied = Some(std::mem::replace(&mut self.config, untied));
        Ok(())
    }

    /// [`Self::for_adapters`] of the adapters in these directories.
    ///
    /// # Errors
    /// As there; a configuration that cannot be read.
    pub fn for_adapter_dirs(&mut self, dirs: &[PathBuf]) -> Result<(), TrainError> {
        let configs: Result<Vec<_>, _> = dirs.iter().map(|dir| load_config(dir)).collect();
        self.for_adapters(&configs?)
    }

    /// What an adapter's `base_model_name_or_path` should say for PEFT to find the same base: the
    /// hub's name where there is one, else where the model lies.
    pub fn name_for_peft(&self) -> Option<String> {
        let hub_name = match ModelRef::parse(&self.local.reference) {
            Ok(ModelRef::Hub(hub)) => Some(hub.repository),
            Ok(ModelRef::Catalogue(name)) => hub_repository(&name),
            _ => None,
        };
        Some(hub_name.unwrap_or_else(|| self.local.path.display().to_string()))
    }

    /// The commit that goes with [`Self::name_for_peft`], where it is known.
    pub fn revision_for_peft(&self) -> Option<String> {
        // A package's version is not a revision of the hub's repository.
        let is_commit =
            |text: &String| text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
        self.local.revision.clone().filter(is_commit)
    }

    /// What identifies its weights: see [`provenance::identity`].
    pub fn identity(&self) -> Option<String> {
        provenance::identity(&self.checkpoint.files())
    }

    /// The model on a device, frozen: its weights, read one tensor after the other, rounded if products are
    /// to be in bf16 and packed if they are to be quantised.
    ///
    /// # Errors
    /// Missing, unexpected and misshapen tensors, all at once.
    pub fn weights(&self, device: &Device, loading: &Loading) -> Result<Model, TrainError> {
        let (config, checkpoint) = (&self.config, &self.checkpoint);
        Ok(Model::load_for(config, checkpoint, device, loading)?)
    }

    /// The matrices that the files have in a quantised form, by their tensors' names.
    pub fn packed(&self) -> Packed {
        self.checkpoint.packed()
    }

    /// The files and the model together.
    ///
    /// # Errors
    /// As [`Self::weights`].
    pub fn load(self, device: &Device, loading: &Loading) -> Result<LoadedBase, TrainError> {
        let model = self.weights(device, loading)?;
        Ok(LoadedBase { open: self, model })
    }

    /// What becomes of a compute dtype with this model on a device, in words.
    pub fn computing(&self, compute: Compute, device: &Device) -> String {
        compute.on(device, self.checkpoint.is_bf16())
    }

    /// Refuses a model that cannot read text.
    pub(crate) fn require_tokenizer(&self) -> Result<(), TrainError> {
        match self.tokenizer.stands_in() {
            None => Ok(()),
            Some(reason) => Err(DataError::NoTokenizer {
                row: None,
                reason: reason.to_owned(),
            }
            .into()),
        }
    }

    /// The tokens at which an answer ends: the tokenizer's and those of `generation_config.json`.
    pub fn stop_ids(&self) -> Vec<u32> {
        stop_ids(
            &self.tokenizer,
            self.checkpoint.generation_config().as_ref(),
        )
    }
}

/// The tokenizer of a model's files, with `chat_template` instead of theirs if it is given.
fn tokenizer(
    checkpoint: &Checkpoint,
    config: &ArchConfig,
    chat_template: Option<&str>,
) -> Result<Tokenizer, TrainError> {
    let own_template = checkpoint.chat_template();
    let tokenizer = Tokenizer::from_files(&TokenizerFiles {
        tokenizer_json: &checkpoint.tokenizer_json()?,
        tokenizer_config: checkpoint.tokenizer_config().as_ref(),
        special_tokens_map: checkpoint.special_tokens_map().as_ref(),
        added_tokens: checkpoint.added_tokens().as_ref(),
        chat_template: chat_template.or(own_template.as_deref()),
        embedding_rows: Some(config.vocab_size),
    });
    tokenizer.map_err(|source| match source {
        // That one is the user's, not the model's.
        source @ DataError::Template(_) if chat_template.is_some() => source.into(),
        source => TrainError::Tokenizer {
            path: checkpoint.path().to_owned(),
            source,
        },
    })
}

/// The hub repository among a catalogue entry's sources.
fn hub_repository(name: &str) -> Option<String> {
    let catalogue = Catalogue::built_in().ok()?;
    catalogue
        .get(name)?
        .sources
        .iter()
        .find_map(|source| match source {
            EntrySource::Hub { repository, .. } => Some(repository.clone()),
            EntrySource::Wheel(_) => None,
        })
}

/// The reference to the base that an adapter's configuration names: a path that exists, a model of
/// the catalogue that has another source besides the hub, or a hub repository.
pub fn base_of(adapter: &Path) -> Result<String, TrainError> {
    let config = enamel_adapter::load_config(adapter)?;
    let name = config
        .base_model_name_or_path()
        .filter(|name| !name.is_empty())
        .map(str::to_owned);
    let name = name.ok_or_else(|| TrainError::Run {
        path: adapter.to_owned(),
        reason: "adapter_config.json does not name a base model".to_owned(),
        help: "give it with --model".to_owned(),
    })?;
    if Path::new(&name).exists() || ModelRef::parse(&name).is_ok() {
        return Ok(name);
    }
    let catalogue = Catalogue::built_in()?;
    let same = |entry: &&str| hub_repository(entry).as_deref() == Some(name.as_str());
    if let Some(entry) = catalogue.names().find(same) {
        return Ok(entry.to_owned());
    }
    let hub = match config.revision() {
        Some(revision) => format!("hf:{name}@{revision}"),
        None => format!("hf:{name}"),
    };
    // What is no hub name either was a path on another machine.
    ModelRef::parse(&hub)
        .map(|_| hub)
        .map_err(|_| TrainError::Run {
            path: adapter.to_owned(),
            reason: format!("its base model was at {name}, where there is nothing now"),
            help: "give it with --model".to_owned(),
        })
}

/// The embedding may have spare rows, as many models do; a token without a row is an error.
fn check_vocabulary(
    path: &Path,
    tokenizer: &Tokenizer,
    config: &ArchConfig,
) -> Result<(), TrainError> {
    let mut beyond = tokenizer.without_row();
    // Padding is masked, so another token does as well.
    beyond.retain(|(id, _)| Some(*id) != tokenizer.pad_id());
    let Some((id, token)) = beyond.first() else {
        return Ok(());
    };
    let more = match beyond.len() {
        1 => String::new(),
        n => format!(", and so of {} more", n - 1),
    };
    Err(TrainError::Mismatch(format!(
        "{}: the tokenizer has {} tokens, the embedding {} rows: there is none of token {id} ({token:?}){more}\n  \
         help: use the tokenizer that came with this model",
        path.display(),
        tokenizer.vocab_size(),
        config.vocab_size
    )))
}

fn stop_ids(tokenizer: &Tokenizer, generation_config: Option<&Value>) -> Vec<u32> {
    let mut ids = tokenizer.end_of_turn_ids().to_vec();
    let more: Vec<&Value> = match generation_config.and_then(|c| c.get("eos_token_id")) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
        None => Vec::new(),
    };
    for id in more
        .into_iter()
        .filter_map(Value::as_u64)
        .filter_map(|id| u32::try_from(id).ok())
    {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// Matrices that are quantised in the base's files, by their tensors' names.
pub type Packed = std::collections::HashMap<String, enamel_model::checkpoint::StoredPacked>;

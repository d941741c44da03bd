//! The arguments of the verbs that write text: which model, and how it chooses its words.

use std::path::PathBuf;

use anyhow::bail;
use enamel_adapter::load_config;
use enamel_model::{Loading, Sampling};
use enamel_train::base::provenance;
use enamel_train::base::{LoadedBase, OpenBase, base_of};
use enamel_train::inputs::loftq;
use enamel_train::recipe::{TaskName, TemplateArguments};
use enamel_train::task::{self, SequenceClassification};
use enamel_train::{Compute, device};

use crate::paths::path;
use crate::pull_progress::Bars;
use crate::quantization_args::QuantizationArgs;
use crate::terminal;

/// A base model, perhaps with an adapter.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Base model: a directory, a .gguf file, hf:org/name[@revision] or a catalogue name
    #[arg(long, value_name = "REF", required_unless_present = "adapter")]
    pub model: Option<String>,
    /// Adapter directory in PEFT's format; without --model, on the base that it names
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub adapter: Option<PathBuf>,
    /// Where to compute: auto, flex, ndarray, cuda, cuda:N, wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// What products with the base multiply: f32, or bf16 with sums in f32, the base rounded to bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub compute_dtype: Compute,
    /// Variables for the chat template, as JSON: '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = template_arguments,
          hide_default_value = true)]
    pub chat_template_kwargs: TemplateArguments,
    #[command(flatten)]
    pub quantization: QuantizationArgs,
}

fn template_arguments(text: &str) -> Result<TemplateArguments, String> {
    let arguments = serde_json::from_str::<serde_json::Map<_, _>>(text)
        .map_err(|error| format!("not a JSON object: {error}"))?;
    enamel_data::check_arguments(&arguments)?;
    Ok(TemplateArguments(arguments))
}

impl ModelArgs {
    /// A language model on its device, with the adapter if one is given.
    pub fn load(&self) -> anyhow::Result<LoadedBase> {
        if let Some(adapter) = &self.adapter
            && task::of_adapter(&load_config(adapter)?) == Some(TaskName::SeqCls)
        {
            bail!(
                "{} classifies texts (task_type = SEQ_CLS), it generates none\n  \
                 help: ask for classes with `enamel predict`",
                adapter.display()
            );
        }
        Ok(self.load_with(|_| Ok(()))?.0)
    }

    /// A classifier on its device.
    pub fn load_classifier(&self) -> anyhow::Result<(LoadedBase, SequenceClassification)> {
        self.load_with(|base| {
            let adapter = self.adapter.as_deref();
            Ok(SequenceClassification::of_trained(base, adapter)?)
        })
    }

    /// The model once `prepare` has seen its files.
    fn load_with<T>(
        &self,
        prepare: impl FnOnce(&mut OpenBase) -> anyhow::Result<T>,
    ) -> anyhow::Result<(LoadedBase, T)> {
        let (device, _) = device::open(self.device.parse()?)?;
        let reference = match (&self.model, &self.adapter) {
            (Some(reference), _) => reference.clone(),
            (None, Some(adapter)) => base_of(adapter)?,
            (None, None) => bail!("give a model with --model or an adapter with --adapter"),
        };
        let mut base = OpenBase::open(&reference, None, &mut Bars::default())?;
        base.tokenizer
            .set_template_arguments(self.chat_template_kwargs.0.clone());
        let prepared = prepare(&mut base)?;
        if let Some(adapter) = &self.adapter {
            base.for_adapter_dirs(std::slice::from_ref(adapter))?;
        }
        let loading = Loading {
            compute: self.compute_dtype,
            quantization: self.quantization.quantization(),
            seed: 0,
        };
        let mut base = base.load(&device, &loading)?;
        if let Some(adapter) = &self.adapter {
            let loaded = enamel_adapter::load_pretrained(&mut base.model, adapter, false)?;
            let mut notes = provenance::notes(adapter, Some(&base.open));
            notes.extend(loftq::beside_dense(&loaded.config, &base.model).map(str::to_owned));
            for note in notes {
                terminal::note(&note);
            }
        }
        Ok((base, prepared))
    }
}

/// How the next token is chosen.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// 0 takes the likeliest token every time; higher is more varied
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub temperature: f64,
    /// Choose among the K likeliest tokens only (needs --temperature)
    #[arg(long, value_name = "K", requires = "temperature")]
    pub top_k: Option<usize>,
    /// Choose among the likeliest tokens that reach probability P (needs --temperature)
    #[arg(
        long,
        value_name = "P",
        requires = "temperature",
        allow_negative_numbers = true
    )]
    pub top_p: Option<f64>,
    /// Decides the random choices: same seed, same text
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Stop after so many tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
}

impl SamplingArgs {
    /// As the library takes it.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            max_new_tokens: self.max_new_tokens,
        }
    }
}

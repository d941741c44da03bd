//! `enamel quantize`: a base written in bitsandbytes' format, for transformers and for ourselves.

use std::path::PathBuf;

use enamel_model::Format;
use enamel_model::save::bitsandbytes::{QuantisedModel, write_bitsandbytes};
use enamel_model::save::{SaveDtype, SaveOptions, is_only_a_model};
use enamel_model::source::PullProgress;

use crate::base::OpenBase;
use crate::commands::outputs::Output;
use crate::error::TrainError;

/// What to quantise, and where to.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// The model.
    pub model: String,
    /// The directory to write.
    pub output: PathBuf,
    /// What linear layers become.
    pub format: Format,
    /// Layers to leave as they are: names, their beginnings up to a dot, or their ends.
    pub skip_modules: Vec<String>,
    /// Element type of what stays dense; `None` for the model's own.
    pub dtype: Option<SaveDtype>,
    /// Whether a directory that holds a model and nothing else is replaced.
    pub overwrite: bool,
}

/// Quantises and writes, one tensor at a time.
///
/// # Errors
/// What [`write_bitsandbytes`] refuses; an output that is there already. Then nothing is written.
pub fn quantize(
    options: &QuantizeOptions,
    progress: &mut dyn PullProgress,
) -> Result<QuantisedModel, TrainError> {
    let output = Output::replacing(&options.output, options.overwrite);
    output.as_folder(|dir| is_only_a_model(dir, &[]))?;
    let base = OpenBase::open(&options.model, None, progress)?;
    output.apart_from([&base.local.path])?;
    let dtype = options
        .dtype
        .unwrap_or_else(|| SaveDtype::native(&base.checkpoint));
    let save = SaveOptions {
        overwrite: options.overwrite,
        ..SaveOptions::new(dtype)
    };
    let written = write_bitsandbytes(
        &options.output,
        &base.checkpoint,
        &base.config,
        options.format,
        &options.skip_modules,
        &save,
    )?;
    Ok(written)
}

//! LoftQ's start (`init_lora_weights = "loftq"`): reads the weights as they were before they were quantised,
//! layer by layer, while the adapter is attached; and what is to be known of an adapter that began so.

use std::time::Instant;

use enamel_adapter::init::loftq::start;
use enamel_adapter::{
    Adaptable, AdapterConfig, AdapterError, DEFAULT, InitLora, LoraConfig, SlotRef, attach_given,
};
use enamel_kernels::PackedRows;
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::{Format, Model};

use crate::error::TrainError;
use crate::recipe::NOT_QUANTISED;

/// The LoRA configuration that starts as LoftQ, if this is one.
pub fn config(adapter: &AdapterConfig) -> Option<&LoraConfig> {
    match adapter {
        AdapterConfig::Lora(config) if config.init_lora_weights == InitLora::Loftq => Some(config),
        _ => None,
    }
}

/// Attaches the adapter with factors that make up for what quantising `files` to `model` lost. Returns the
/// configuration to save: plain LoRA on the quantised base, as PEFT's `replace_lora_weights_loftq` leaves it,
/// with `loftq_config` to remember it by.
///
/// # Errors
/// Layers that are not quantised; weights that cannot be read.
pub fn attach(
    model: &mut Model,
    mut config: LoraConfig,
    files: &Checkpoint,
    (format, seed): (Option<Format>, u64),
    say: &dyn Fn(&str),
) -> Result<AdapterConfig, TrainError> {
    say("loftq    decomposing what quantising the adapted layers lost");
    let started = Instant::now();
    let start = start(model, &config, &|module| {
        let values = files.read_f32(&format!("{module}.weight"));
        values.map_err(|error| AdapterError::Start {
            module: module.to_owned(),
            reason: format!("its weight before it was quantised cannot be read: {error}"),
        })
    })?;
    attach_given(model, DEFAULT, &config, seed, Some(&start.given()))?;
    say(&format!(
        "loftq    {start} ({:.1} s)",
        started.elapsed().as_secs_f64()
    ));
    config.init_lora_weights = InitLora::Default;
    config.set_loftq(format.map_or(4, Format::bits));
    Ok(config.into())
}

/// Refuses LoftQ on a base that it cannot start from. The base is quantised to `format` while it is loaded,
/// `targets` are the adapted layers that are to be, and `stored` says whether the files have a module's weight in
/// one of bitsandbytes' formats.
///
/// # Errors
/// All that speaks against it.
pub(crate) fn check(
    config: &LoraConfig,
    format: Option<Format>,
    targets: &[&str],
    stored: &dyn Fn(&str) -> bool,
) -> Result<(), TrainError> {
    let problems = problems(config, format, targets, stored);
    if problems.is_empty() {
        return Ok(());
    }
    Err(TrainError::Mismatch(format!(
        "adapter.init_lora_weights = \"loftq\" cannot start on this base: {}\n  help: LoftQ is for a model that is \
         not quantised yet and load_in_4bit or load_in_8bit to quantise it; or choose another start",
        problems.join("; ")
    )))
}

/// One line each.
fn problems(
    config: &LoraConfig,
    format: Option<Format>,
    targets: &[&str],
    stored: &dyn Fn(&str) -> bool,
) -> Vec<String> {
    let Some(format) = format else {
        return vec![NOT_QUANTISED.to_owned()];
    };
    let mut problems = Vec::new();
    if let Some(bits) = config.loftq().and_then(|loftq| loftq.bits)
        && bits != format.bits()
    {
        problems.push(format!("loftq_bits is {bits}, and the base is {format}"));
    }
    if targets.is_empty() {
        problems.push("no layer that is adapted is quantised".to_owned());
    }
    let there: Vec<&str> = targets.iter().copied().filter(|m| stored(m)).collect();
    if let [first, rest @ ..] = there.as_slice() {
        let more = match rest.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        problems.push(format!(
            "bitsandbytes has quantised {first}{more} already in the base's files, so that what was lost by it is \
             not known; start from the model before it was quantised"
        ));
    }
    problems
}

/// Whether the adapter's base is the quantised model: it began as LoftQ.
pub fn began_so(adapter: &AdapterConfig) -> bool {
    matches!(adapter, AdapterConfig::Lora(config) if config.loftq().is_some())
}

/// What to say where an adapter that began as LoftQ is on a model of which nothing is in 4 or 8 bits of
/// bitsandbytes'.
pub fn beside_dense(adapter: &AdapterConfig, model: &Model) -> Option<&'static str> {
    if !began_so(adapter) {
        return None;
    }
    let mut quantised = false;
    model.for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Linear(linear) = slot
            && let Some(packed) = linear.weight.packed()
        {
            quantised |= !matches!(packed.rows(), PackedRows::Blocks(_));
        }
    });
    (!quantised).then_some(
        "the adapter began as LoftQ: it makes up for what its quantised base lost, and on a dense one that comes on \
         top. Load the base as in training (load_in_4bit or load_in_8bit)",
    )
}

//! `enamel merge`: adapters folded into their base, tensor by tensor, written as a model of its own and read
//! back.

mod check;
mod drift;
mod folding;
mod source;
mod trained;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_model::Quantization;
use enamel_model::save::{self, SaveDtype, SaveOptions};
use enamel_model::source::PullProgress;
use serde::Serialize;

pub(crate) use self::folding::Merging;
use crate::base::provenance;
use crate::base::{OpenBase, base_of};
use crate::commands::outputs::Output;
use crate::error::TrainError;
use crate::recipe::TaskName;
use crate::task::{self, SequenceClassification};

pub use drift::{ChoiceDrift, Drift, DriftReport};

/// The file beside merged weights that says how far they are from what was trained.
pub const REPORT: &str = "merge_report.json";

/// What an adapter that was trained on a quantised base is folded into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeBase {
    /// The weights in the base's files, as they were before they were quantised.
    #[default]
    Dense,
    /// The values that training computed with: quantised and dequantised.
    Dequantized,
}

impl MergeBase {
    /// `dense` or `dequantized`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Dequantized => "dequantized",
        }
    }
}

/// What becomes of the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// What is merged into.
    pub base: MergeBase,
    /// Whether the result is quantised again, and dequantised to be written.
    pub requantized: bool,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let again = if self.requantized {
            ", requantized"
        } else {
            ""
        };
        write!(f, "{}{again}", self.base.name())
    }
}

impl DriftReport {
    /// A line for each choice, the one that was `chosen` marked.
    pub fn table(&self, chosen: Option<Choice>) -> String {
        let mut out = format!(
            "  {:<24} {:>12} {:>12} {:>12} {:>12}\n",
            "merge into", "max |diff|", "mean |diff|", "mean KL", "same argmax"
        );
        for row in &self.choices {
            let mark = if chosen == Some(row.choice) { '*' } else { ' ' };
            let drift = row.drift;
            let _ = writeln!(
                out,
                "{mark} {:<24} {:>12.3e} {:>12.3e} {:>12.3e} {:>11.1}%",
                row.choice.to_string(),
                drift.max_abs_logit_diff,
                drift.mean_abs_logit_diff,
                drift.mean_kl,
                100.0 * drift.same_argmax,
            );
        }
        out
    }
}

/// What to merge, and where to.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// The base; `None` for the one that the first adapter names.
    pub model: Option<String>,
    /// The adapters' directories.
    pub adapters: Vec<PathBuf>,
    /// A weight for each adapter; none for 1 each.
    pub weights: Vec<f64>,
    /// The directory to write; it must not hold a model yet. `None` to compare the choices and write nothing.
    pub output: Option<PathBuf>,
    /// What to merge into; `None` for the dense base, or the dequantised one that an adapter belongs to which
    /// began as LoftQ.
    pub into: Option<MergeBase>,
    /// Whether to quantise the merged weights again, in the format that training had; written are the
    /// dequantised values.
    pub requantize: bool,
    /// How training held the base; `None` to take it from the run's lock file.
    pub quantization: Option<Quantization>,
    /// The most validation rows to compare logits on.
    pub rows: usize,
    /// Element type of the written weights; `None` for the base's own.
    pub dtype: Option<SaveDtype>,
    /// Whether to compare logits, for which whole models are loaded.
    pub check: bool,
}

/// What merging did to the numbers.
#[derive(Clone, Debug)]
pub struct MergeReport {
    /// The directory written, if one was.
    pub output: Option<PathBuf>,
    /// What was merged into.
    pub choice: Choice,
    /// The format that the base was quantised to while the adapter was trained, and how that is known.
    pub trained_on: Option<(String, String)>,
    /// What is to be known: lock files beside adapters that could not be read, LoftQ on a base that it is not for.
    pub notes: Vec<String>,
    /// How far each choice is from what was trained, if the base was quantised and logits were to be compared.
    pub drift: Option<DriftReport>,
    /// Its element type.
    pub dtype: SaveDtype,
    /// Modules that the adapters changed.
    pub modules: usize,
    /// Whether the head has become a matrix of its own.
    pub untied: bool,
    /// How logits compare, if they were to be compared.
    pub check: Option<MergeCheck>,
}

/// Logits of the base with its adapters, of the merged weights, and of what was written.
#[derive(Clone, Debug)]
pub struct MergeCheck {
    /// Positions of the probe at which logits were compared.
    pub positions: usize,
    /// Largest magnitude among the merged model's logits, to judge differences by.
    pub max_abs_logit: f64,
    /// Largest difference of logits between base + adapters and the weights merged in f32; none where
    /// weights other than 1 cannot be given to adapters that run beside their base.
    pub max_abs_logit_diff: Option<f64>,
    /// The same between base + adapters (or the weights merged in f32) and the files as written and read
    /// back: rounding to `dtype` is in it.
    pub max_abs_logit_diff_written: f64,
}

/// Merges, writes, reads back and compares. One tensor of the base at a time is in memory, unless logits
/// are compared.
///
/// # Errors
/// Adapters that do not fit the base or each other; a merged tensor that is not finite. Then nothing is
/// written.
pub fn merge(
    options: &MergeOptions,
    device: &Device,
    progress: &mut dyn PullProgress,
) -> Result<MergeReport, TrainError> {
    let output = options.output.as_deref().map(Output::new);
    if let Some(output) = &output {
        output.as_folder(|_| false)?;
        output.apart_from(&options.adapters)?;
    }
    let weights = weights(options)?;
    let first = options.adapters.first().ok_or_else(|| {
        TrainError::Mismatch("no adapter is given\n  help: name one with --adapter".to_owned())
    })?;
    let reference = match &options.model {
        Some(reference) => reference.clone(),
        None => base_of(first)?,
    };
    let (runs, unreadable) = trained::runs(&options.adapters);
    // Rows of a run have to be rendered as in it; a template that has gone matters to them alone.
    let template = runs.iter().flatten().next();
    let template = template.and_then(|run| run.recipe.model.chat_template_text().ok().flatten());
    let mut base = OpenBase::open(&reference, template.as_deref(), progress)?;
    if let Some(output) = &output {
        output.apart_from([&base.local.path])?;
    }
    set_head(&mut base, &options.adapters)?;
    base.for_adapter_dirs(&options.adapters)?;
    let dtype = options
        .dtype
        .unwrap_or_else(|| SaveDtype::native(&base.checkpoint));
    let mut merging = Merging::open(base, &options.adapters, weights, dtype, device)?;
    let belongs = merging.belongs_to();
    let choice = Choice {
        base: options.into.unwrap_or(belongs),
        requantized: options.requantize,
    };
    let mut wants = Vec::new();
    if choice.base == MergeBase::Dequantized {
        wants.extend(merging.needs_format(options.into.is_some()));
    }
    if options.requantize {
        wants.push("--requantize");
    }
    if options.output.is_none() {
        wants.push("--compare-bases");
    }
    let given = options.quantization.as_ref();
    let trained = trained::trained(wants, given, &merging, &runs, &unreadable)?;
    merging.trained = trained.as_ref().map(|trained| trained.loading.clone());
    let unknown =
        |reason: String| format!("how the base was held in training is not known: {reason}");
    let mut notes = provenance::notes_of_all(&options.adapters, Some(&merging.base));
    notes.extend(unreadable.into_iter().map(unknown));
    if choice.base != belongs && belongs == MergeBase::Dequantized {
        notes.push(format!(
            "{LOFTQ} makes up for what its quantised base lost, which the dense one has not lost"
        ));
    }
    let began = merging.adapters.iter();
    let began = began.filter(|(adapter, _)| crate::inputs::loftq::began_so(adapter.config()));
    if began.clone().count() > 1 {
        let sum: f64 = began.map(|(_, weight)| weight).sum();
        notes.push(format!(
            "each adapter that began as LoftQ makes up for what the base lost, here {sum} times; --weights that add \
             up to 1 do it once"
        ));
    }
    let drift = match &trained {
        Some(trained) if options.check || options.output.is_none() => drift::drift(
            &merging,
            trained,
            drift::rows(&merging, &runs, options.rows),
        )?,
        _ => None,
    };
    let mut check = None;
    if let Some(output) = &options.output {
        let mut save = SaveOptions::new(dtype).for_model(&merging.base.config);
        if let Some(drift) = &drift {
            // With the model or not at all: a run that ends in between leaves neither.
            save.extra.push((REPORT.to_owned(), report(choice, drift)?));
        }
        save::write_hf(
            output,
            &merging.tensors(),
            &mut |name| merging.values(name, choice).map_err(Into::into),
            &merging.base.checkpoint,
            &save,
        )
        .map_err(plainly)?;
        if options.check {
            check = Some(merging.check(output, choice.base)?);
        }
    }
    Ok(MergeReport {
        output: options.output.clone(),
        choice,
        trained_on: trained.and_then(|trained| {
            let format = trained.loading.quantization.format?;
            Some((format.to_string(), trained.known_from))
        }),
        notes,
        drift,
        dtype,
        modules: merging.changed(),
        untied: merging.unties(),
        check,
    })
}

/// Gives the base the head that its adapters were trained with.
///
/// # Errors
/// Adapters for several tasks, or for other classes.
fn set_head(base: &mut OpenBase, adapters: &[PathBuf]) -> Result<(), TrainError> {
    let mut heads = Vec::new();
    for adapter in adapters {
        let task = task::of_adapter(&enamel_adapter::load_config(adapter)?);
        let mut of_adapter = base.config.head.clone();
        if task == Some(TaskName::SeqCls) {
            SequenceClassification::of_trained(base, Some(adapter))?;
            of_adapter = base.config.head.clone();
        }
        heads.push((adapter, of_adapter));
    }
    let Some((first, head)) = heads.first() else {
        return Ok(());
    };
    match heads.iter().find(|(_, other)| other != head) {
        None => Ok(()),
        Some((other, _)) => Err(TrainError::Mismatch(format!(
            "{} and {} are for different heads\n  help: merge adapters of one task and one set of classes",
            first.display(),
            other.display()
        ))),
    }
}

fn report(chosen: Choice, drift: &DriftReport) -> Result<Vec<u8>, TrainError> {
    #[derive(Serialize)]
    struct Report<'a> {
        chosen: Choice,
        logit_drift: &'a DriftReport,
    }
    let report = Report {
        chosen,
        logit_drift: drift,
    };
    serde_json::to_vec_pretty(&report)
        .map_err(|e| TrainError::Framework(format!("writing the report: {e}")))
}

/// What an adapter is called that began as LoftQ.
const LOFTQ: &str = "an adapter that began as LoftQ";

/// How an adapter is to be merged that is to be exported: into the base that it belongs to.
///
/// # Errors
/// LoftQ on a base of which it is not known how it was quantised.
pub(crate) fn for_export(
    merging: &mut Merging<'_>,
    adapters: &[PathBuf],
) -> Result<Choice, TrainError> {
    let base = merging.belongs_to();
    if base == MergeBase::Dequantized {
        let (runs, unreadable) = trained::runs(adapters);
        let wants = merging.needs_format(false).into_iter().collect();
        let trained = trained::trained(wants, None, merging, &runs, &unreadable)?;
        merging.trained = trained.map(|trained| trained.loading);
    }
    Ok(Choice {
        base,
        requantized: false,
    })
}

/// Whether the run that trained the adapter had its base quantised.
pub(crate) fn trained_quantised(adapter: &Path) -> bool {
    let (runs, _) = trained::runs(&[adapter.to_owned()]);
    let quantised = |run: &trained::Run| {
        let quantization = Quantization::from(&run.recipe.model.quantization);
        quantization.format.is_some()
    };
    runs.iter().flatten().any(quantised)
}

/// An error of ours that came back through the writer, without its wrapping.
pub(crate) fn plainly(error: save::SaveError) -> TrainError {
    match error {
        save::SaveError::Read { name, source } => match source.downcast::<TrainError>() {
            Ok(own) => *own,
            Err(source) => save::SaveError::Read { name, source }.into(),
        },
        other => other.into(),
    }
}

fn weights(options: &MergeOptions) -> Result<Vec<f64>, TrainError> {
    let (given, adapters) = (options.weights.len(), options.adapters.len());
    if given == 0 {
        return Ok(vec![1.0; adapters]);
    }
    let mut problems = Vec::new();
    if given != adapters {
        problems.push(format!(
            "{given} weights are given for {adapters} adapters; give one for each"
        ));
    }
    let bad = options.weights.iter().filter(|w| !w.is_finite());
    problems.extend(bad.map(|w| format!("weight {w} is not a finite number")));
    match problems.is_empty() {
        true => Ok(options.weights.clone()),
        false => Err(TrainError::Mismatch(format!(
            "--weights: {}",
            problems.join("; ")
        ))),
    }
}

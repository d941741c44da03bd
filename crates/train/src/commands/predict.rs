//! `enamel predict`: the classes of texts.

use std::path::{Path, PathBuf};

use enamel_data::{ClassSpec, ClassifiedText, DataSpec, Note, Row, Rows, load_labelled};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::base::LoadedBase;
use crate::commands::outputs::{NewFile, Output};
use crate::error::TrainError;
use crate::task::sequence_classification::{Confusion, best};
use crate::task::{SequenceClassification, Tally};

/// The class of one text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Number of the row, from 0, skipped rows left out.
    pub row: usize,
    /// `file:line` it came from; none for a text that was given by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The likeliest class.
    pub label: String,
    /// Its probability.
    pub score: f64,
    /// The probability of each class.
    pub scores: Map<String, Value>,
    /// The class that the row has, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// What became of the rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PredictReport {
    /// Rows read.
    pub rows: usize,
    /// Rows that have a class themselves.
    pub labelled: usize,
    /// How the predictions and those compare.
    pub tally: Confusion,
}

/// Where predictions go.
#[derive(Clone, Debug)]
pub struct PredictFile {
    /// A line of JSON for each row.
    pub path: PathBuf,
    /// Whether a file that is there is replaced.
    pub overwrite: bool,
}

impl PredictFile {
    /// Refuses a file that is there and is not to be replaced, and one that is, lies in or holds one of `inputs`.
    /// Called before the work.
    ///
    /// # Errors
    /// That.
    pub fn check(&self, inputs: &[PathBuf]) -> Result<(), TrainError> {
        let output = Output::replacing(&self.path, self.overwrite);
        output.as_file()?;
        output.apart_from(inputs)
    }
}

/// Reads the rows of a file, with or without classes, whose numbers are those of `task`.
///
/// # Errors
/// All bad rows at once.
pub fn rows(
    path: &Path,
    columns: ClassSpec,
    base: &LoadedBase,
    task: &SequenceClassification,
) -> Result<(Vec<ClassifiedText>, Vec<Note>), TrainError> {
    let spec = DataSpec {
        paths: vec![path.to_owned()],
        ..DataSpec::default()
    };
    let columns = ClassSpec {
        optional: true,
        ..columns
    };
    let all = load_labelled(&spec, &columns, &base.open.tokenizer)?;
    let mut all: Rows<ClassifiedText> = task.classes().apply(all)?;
    all.note_positions(base.open.config.context_length());
    Ok((all.rows, all.notes))
}

/// A text that is given by itself.
///
/// # Errors
/// When the tokenizer refuses it.
pub fn text(
    text: &str,
    pair: Option<&str>,
    base: &LoadedBase,
) -> Result<ClassifiedText, TrainError> {
    let input_ids = base.open.tokenizer.encode_pair(text, pair)?;
    if input_ids.is_empty() {
        return Err(TrainError::Mismatch(
            "the tokenizer makes no token of the text\n  help: give a text that is not empty"
                .to_owned(),
        ));
    }
    Ok(ClassifiedText::unlabelled(input_ids))
}

/// Predicts the class of each row, `batch_size` at a time, in order.
///
/// # Errors
/// Logits that are not finite; a failing device; what `on_prediction` returns.
pub fn predict<E: From<TrainError>>(
    base: &LoadedBase,
    task: &SequenceClassification,
    rows: &[ClassifiedText],
    batch_size: usize,
    on_prediction: &mut dyn FnMut(&Prediction) -> Result<(), E>,
) -> Result<PredictReport, E> {
    let names = task.classes().names();
    let name = |class: usize| names.get(class).cloned().unwrap_or_default();
    let mut report = PredictReport::default();
    for batch in rows.chunks(batch_size.max(1)) {
        let texts: Vec<&Vec<u32>> = batch.iter().map(|row| &row.input_ids).collect();
        let probabilities = task.probabilities(&base.model, &texts)?;
        let mut tally = Confusion::new(names.len());
        for (row, probabilities) in batch.iter().zip(probabilities) {
            let (class, score) = best(&probabilities);
            let scores = names.iter().zip(&probabilities);
            let prediction = Prediction {
                row: report.rows,
                source: (!row.is_unplaced()).then(|| row.source().to_string()),
                label: name(class),
                score: f64::from(score),
                scores: scores
                    .map(|(name, p)| (name.clone(), json!(f64::from(*p))))
                    .collect(),
                reference: row.label.map(name),
            };
            report.rows += 1;
            if let Some(label) = row.label {
                report.labelled += 1;
                tally.note(label, class);
            }
            on_prediction(&prediction)?;
        }
        report.tally.add(&tally);
    }
    Ok(report)
}

/// The same into a file that takes its name when it is complete.
///
/// # Errors
/// As [`predict`]; a file that is there and is not to be replaced; a disk that refuses.
pub fn predict_to_file(
    base: &LoadedBase,
    task: &SequenceClassification,
    rows: &[ClassifiedText],
    batch_size: usize,
    file: &PredictFile,
) -> Result<PredictReport, TrainError> {
    file.check(&[])?;
    let mut out = NewFile::create(&file.path, file.overwrite)?;
    let report = predict(base, task, rows, batch_size, &mut |prediction| {
        let line = serde_json::to_vec(prediction)
            .map_err(|error| TrainError::Framework(format!("writing a prediction: {error}")))?;
        out.write(&line)?;
        out.write(b"\n")
    })?;
    out.finish()?;
    Ok(report)
}

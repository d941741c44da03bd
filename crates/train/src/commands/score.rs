//! `enamel score`: loss and log-probability of each token of given rows, and logits on request.

use std::path::PathBuf;

use burn::tensor::{Int, Tensor, TensorData, activation};
use enamel_data::{Example, collate};
use enamel_kernels::KeyMask;
use enamel_model::{Model, ModelInput};
use serde::Serialize;

use crate::commands::outputs::{NewFile, Output};
use crate::error::TrainError;

/// Rows of hidden states whose logits exist at once.
const CHUNK: usize = 256;

/// One line of the output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowScore {
    /// Number of the row, from 0, skipped rows left out.
    pub row: usize,
    /// `file:line` it came from.
    pub source: String,
    /// Mean negative log-likelihood over the trained tokens, in nats.
    pub loss: f64,
    /// Trained tokens; the first token of a row has nothing before it and never counts.
    pub trained_tokens: usize,
    /// Tokens of the row.
    pub tokens: usize,
    /// The tokens.
    pub input_ids: Vec<u32>,
    /// Log-probability of each token given those before it; `null` for the first.
    pub log_probs: Vec<Option<f64>>,
    /// Which tokens the loss counts.
    pub trained: Vec<bool>,
}

/// The totals.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScoreReport {
    /// Rows scored.
    pub rows: usize,
    /// Tokens, padding left out.
    pub tokens: usize,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// Mean negative log-likelihood over all trained tokens, in nats.
    pub loss: f64,
}

/// The files to write.
#[derive(Clone, Debug)]
pub struct ScoreFiles {
    /// A line of JSON for each row.
    pub scores: PathBuf,
    /// The logits, if they are asked for.
    pub logits: Option<PathBuf>,
    /// Whether files that are there are replaced.
    pub overwrite: bool,
}

impl ScoreFiles {
    /// Refuses files that are there and are not to be replaced, and those that are, lie in or hold one of
    /// `inputs`. Called before the work.
    ///
    /// # Errors
    /// That.
    pub fn check(&self, inputs: &[PathBuf]) -> Result<(), TrainError> {
        let scores = Output::replacing(&self.scores, self.overwrite);
        let logits = self.logits.as_deref().map(|path| Output {
            option: "--logits",
            ..Output::replacing(path, self.overwrite)
        });
        for output in [Some(scores), logits].into_iter().flatten() {
            output.as_file()?;
            output.apart_from(inputs)?;
        }
        match logits {
            Some(logits) if logits.is_same(&scores) => Err(TrainError::Run {
                path: self.scores.clone(),
                reason: "--output and --logits name the same file".into(),
                help: "give each a file of its own".into(),
            }),
            _ => Ok(()),
        }
    }
}

/// Scores `rows` in order, `batch_size` at a time, as the model stands. Rows of one batch are padded
/// on the right to the longest; padding is masked and never scored.
///
/// # Errors
/// A file that is there and is not to be replaced; a disk that refuses.
pub fn score(
    model: &Model,
    rows: &[Example],
    batch_size: usize,
    pad_id: u32,
    files: &ScoreFiles,
) -> Result<ScoreReport, TrainError> {
    files.check(&[])?;
    let replace = files.overwrite;
    let mut out = NewFile::create(&files.scores, replace)?;
    let mut logits = files
        .logits
        .as_deref()
        .map(|path| {
            let file = NewFile::create(path, replace)?;
            LogitsFile::create(file, rows, model.config().vocab_size)
        })
        .transpose()?;
    let mut report = ScoreReport::default();
    let mut loss_sum = 0.0;
    for (first, batch) in rows.chunks(batch_size.max(1)).enumerate() {
        let first = first * batch_size.max(1);
        for (i, score) in score_batch(model, batch, pad_id, logits.as_mut())?
            .into_iter()
            .enumerate()
        {
            let score = RowScore {
                row: first + i,
                ..score
            };
            report.rows += 1;
            report.tokens += score.tokens;
            report.trained_tokens += score.trained_tokens;
            loss_sum += score.loss * score.trained_tokens as f64;
            let line = serde_json::to_string(&score)
                .map_err(|error| TrainError::Framework(format!("writing a score: {error}")))?;
            out.write(line.as_bytes())?;
            out.write(b"\n")?;
        }
    }
    out.finish()?;
    if let Some(file) = logits {
        file.0.finish()?;
    }
    report.loss = loss_sum / report.trained_tokens.max(1) as f64;
    Ok(report)
}

fn score_batch(
    model: &Model,
    rows: &[Example],
    pad_id: u32,
    mut logits_file: Option<&mut LogitsFile>,
) -> Result<Vec<RowScore>, TrainError> {
    let references: Vec<&Example> = rows.iter().collect();
    let batch = collate(&references, pad_id, 1);
    let device = model.device();
    let ids = TensorData::new(batch.input_ids.clone(), [batch.batch, batch.len]);
    let padded = batch.attention_mask.iter().any(|real| !real);
    let hidden = model.forward_hidden(
        &ModelInput {
            input_ids: Tensor::<2, Int>::from_data(ids, &device),
            attention_mask: padded.then(|| KeyMask {
                valid: std::sync::Arc::new(batch.attention_mask.clone()),
                batch: batch.batch,
                keys: batch.len,
            }),
            seed: None,
        },
        None,
    );
    let [_, _, width] = hidden.dims();
    let mut scores = Vec::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let n = row.input_ids.len();
        let hidden = hidden
            .clone()
            .narrow(0, i, 1)
            .narrow(1, 0, n)
            .reshape([n, width]);
        let mut log_probs: Vec<Option<f64>> = vec![None];
        for start in (0..n).step_by(CHUNK) {
            let len = CHUNK.min(n - start);
            let logits = model.logits(hidden.clone().narrow(0, start, len));
            if let Some(file) = logits_file.as_deref_mut() {
                file.write(&read(logits.clone())?)?;
            }
            // Position t speaks of token t + 1; what the last one says of the next is not asked.
            let next: Vec<i64> = row.input_ids[start + 1..(start + len + 1).min(n)]
                .iter()
                .map(|id| i64::from(*id))
                .collect();
            if next.is_empty() {
                continue;
            }
            let count = next.len();
            let next = Tensor::<2, Int>::from_data(TensorData::new(next, [count, 1]), &device);
            let picked = activation::log_softmax(logits.narrow(0, 0, count), 1).gather(1, next);
            log_probs.extend(read(picked)?.into_iter().map(|x| Some(f64::from(x))));
        }
        scores.push(row_score(row, log_probs));
    }
    Ok(scores)
}

fn row_score(row: &Example, log_probs: Vec<Option<f64>>) -> RowScore {
    let trained: Vec<bool> = row
        .labels
        .iter()
        .enumerate()
        .map(|(t, label)| t > 0 && *label >= 0)
        .collect();
    let counted = log_probs
        .iter()
        .zip(&trained)
        .filter(|(_, trained)| **trained);
    let sum: f64 = counted.filter_map(|(log_prob, _)| *log_prob).sum();
    let trained_tokens = trained.iter().filter(|t| **t).count();
    RowScore {
        row: 0,
        source: row.source.to_string(),
        loss: -sum / trained_tokens.max(1) as f64,
        trained_tokens,
        tokens: row.input_ids.len(),
        input_ids: row.input_ids.clone(),
        log_probs,
        trained,
    }
}

fn read(tensor: Tensor<2>) -> Result<Vec<f32>, TrainError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Framework(format!("reading logits: {error}")))
}

/// A safetensors file whose tensors are written as they are computed: all sizes follow from the
/// rows, so the header can come first and no more than one chunk of logits is ever in memory.
struct LogitsFile(NewFile);

impl LogitsFile {
    /// Tensors `logits.<row>`, `[tokens, vocabulary]`, f32, in the order of the rows.
    fn create(mut file: NewFile, rows: &[Example], vocabulary: usize) -> Result<Self, TrainError> {
        let mut header = serde_json::Map::new();
        let mut offset = 0;
        for (i, row) in rows.iter().enumerate() {
            let tokens = row.input_ids.len();
            let end = offset + tokens * vocabulary * size_of::<f32>();
            header.insert(
                format!("logits.{i}"),
                serde_json::json!({
                    "dtype": "F32", "shape": [tokens, vocabulary], "data_offsets": [offset, end],
                }),
            );
            offset = end;
        }
        let mut header = serde_json::Value::Object(header).to_string();
        // The format aligns the data to eight bytes, with spaces.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(header.as_bytes())?;
        Ok(Self(file))
    }

    fn write(&mut self, values: &[f32]) -> Result<(), TrainError> {
        for value in values {
            self.0.write(&value.to_le_bytes())?;
        }
        Ok(())
    }
}

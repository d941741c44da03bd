//! Causal language modelling: each token predicts the next.

mod samples;

use burn::tensor::Tensor;
use enamel_data::{Batch, DataSpec, Example, Examples, collate, load_examples};
use enamel_kernels::{LossSpec, linear_cross_entropy_with};
use enamel_model::{HeadConfig, Model, ModelInput};

use super::{
    LossSettings, Measured, MetricSpec, Opened, Prompt, Source, Task, TaskBatch, hold_back, ids,
};
use crate::base::OpenBase;
use crate::error::TrainError;
use crate::recipe::{Recipe, TaskName, TrainSettings};

/// The task.
#[derive(Clone, Debug)]
pub struct CausalLm {
    /// The token that fills up short rows.
    pub pad_id: u32,
}

impl TaskBatch for Batch {
    fn count(&self) -> usize {
        self.trained_tokens
    }

    fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Task for CausalLm {
    type Row = Example;
    type Batch = Batch;
    type Tally = ();

    const NAME: TaskName = TaskName::CausalLm;
    const TASK_TYPE: &'static str = "CAUSAL_LM";
    const COUNTED: &'static str = "trained_tokens";
    const METRICS: &'static [MetricSpec<()>] = &[
        MetricSpec::LOSS,
        MetricSpec {
            key: "perplexity",
            label: "Perplexity",
            higher_is_better: false,
            in_training: true,
            logged_in_training: false,
            decimals: 3,
            of: |measured: &Measured<()>| measured.loss().exp(),
        },
    ];

    fn provisional_head() -> HeadConfig {
        HeadConfig::CausalLm
    }

    fn open(recipe: &Recipe, base: &OpenBase, source: Source) -> Result<Opened<Self>, TrainError> {
        let load = |spec: &DataSpec| -> Result<Examples, TrainError> {
            let mut rows = load_examples(spec, &base.tokenizer)?;
            rows.note_positions(base.config.context_length());
            Ok(rows)
        };
        let (train, valid) = match (recipe.data.valid_spec(), source) {
            (Some(spec), Source::Validation) => (Examples::default(), load(&spec)?),
            (Some(spec), Source::Both) => (load(&recipe.data.train_spec())?, load(&spec)?),
            (None, Source::Validation) if recipe.data.valid_fraction <= 0.0 => {
                (Examples::default(), Examples::default())
            }
            (None, _) => hold_back(load(&recipe.data.train_spec())?, recipe),
        };
        Ok(Opened {
            task: Self {
                pad_id: base.tokenizer.padding_id(),
            },
            train,
            valid,
            notes: Vec::new(),
        })
    }

    fn collate(&self, rows: &[&Example]) -> Batch {
        collate(rows, self.pad_id, 1)
    }

    /// transformers' trainer smooths its validation loss too; here that one says how likely the labels are,
    /// whatever the training.
    ///
    /// Rows are padded on the right and attention is causal, so no real token ever sees padding and
    /// no mask is needed; the labels leave padding out of the loss.
    fn loss(&self, model: &Model, batch: &Batch, settings: LossSettings) -> (Tensor<1>, ()) {
        (loss_sum(model, batch, settings), ())
    }

    fn prompts(
        &self,
        settings: &TrainSettings,
        rows: &[Example],
        base: &OpenBase,
    ) -> Result<Vec<Prompt>, TrainError> {
        samples::prompts(settings, rows, &base.tokenizer)
    }

    fn answers(
        &self,
        model: &Model,
        base: &OpenBase,
        prompts: &[Prompt],
        max_new_tokens: usize,
    ) -> Result<Vec<String>, TrainError> {
        samples::answers(model, base, prompts, max_new_tokens)
    }
}

/// Labels of the next token: position `t` of a row gets the label of token `t + 1`, the last one
/// none. Row-major, −100 where nothing is trained.
pub fn shifted_labels(batch: &Batch) -> Vec<i64> {
    let mut shifted = vec![-100; batch.labels.len()];
    for (from, to) in batch
        .labels
        .chunks(batch.len)
        .zip(shifted.chunks_mut(batch.len))
    {
        let n = from.len() - 1;
        to[..n].copy_from_slice(&from[1..]);
    }
    shifted
}

fn loss_sum(model: &Model, batch: &Batch, settings: LossSettings) -> Tensor<1> {
    let device = model.device();
    let input = ModelInput {
        seed: settings.seed,
        ..ModelInput::new(ids(
            batch.input_ids.clone(),
            [batch.batch, batch.len],
            &device,
        ))
    };
    let hidden = model.forward_hidden(&input, None);
    let [rows, len, width] = hidden.dims();
    let labels = shifted_labels(batch);
    let hidden = hidden.reshape([rows * len, width]);
    match model.head_as_one_product() {
        Some(head) => {
            let spec = LossSpec {
                label_smoothing: settings.label_smoothing,
                compute: head.compute(),
            };
            linear_cross_entropy_with(hidden, head.values(), &labels, spec)
        }
        None => loss_through_head(model, hidden, &labels, settings.label_smoothing),
    }
}

/// The same where the head does more than multiply (an adapter with a bias or with dropout is on it):
/// logits of all labelled rows at once.
fn loss_through_head(
    model: &Model,
    hidden: Tensor<2>,
    labels: &[i64],
    smoothing: f64,
) -> Tensor<1> {
    let device = hidden.device();
    let trained = labels.iter().enumerate().filter(|(_, label)| **label >= 0);
    let (places, labels): (Vec<i64>, Vec<i64>) =
        trained.map(|(place, label)| (place as i64, *label)).unzip();
    let places = super::indices(places, &device);
    let logits = model.logits(hidden.select(0, places));
    super::cross_entropy(logits, labels, smoothing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_one_to_the_left_within_each_row() {
        let batch = Batch {
            input_ids: vec![1, 2, 3, 4, 5, 0],
            labels: vec![7, 2, 3, -100, 5, -100],
            attention_mask: vec![true, true, true, true, true, false],
            batch: 2,
            len: 3,
            trained_tokens: 3,
            tokens: 5,
            rows: vec![0, 1],
        };
        assert_eq!(shifted_labels(&batch), [2, 3, -100, 5, -100, -100]);
    }
}

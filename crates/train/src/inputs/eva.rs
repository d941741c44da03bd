//! EVA's start (`init_lora_weights = "eva"`): shows the frozen base the training rows before the adapter is
//! attached.

use burn::tensor::Tensor;
use enamel_adapter::init::eva::{EvaStart, Observer};
use enamel_adapter::{AdapterConfig, DEFAULT, InitLora, LoraConfig, attach_given, plan, shapes};
use enamel_data::{Row, epoch_order};
use enamel_model::Model;
use enamel_model::ModelInput;

use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::recipe::Recipe;
use crate::task::{Task, ids};

/// Batches that are looked at, at most. PEFT goes on until all directions have settled, which takes some
/// tens of batches of usual size and has no end where directions are equally important.
const MOST_BATCHES: usize = 256;

/// The LoRA configuration whose first values are EVA's, if this is one.
pub fn config(adapter: &AdapterConfig) -> Option<&LoraConfig> {
    match adapter {
        AdapterConfig::Lora(config) if config.init_lora_weights == InitLora::Eva => Some(config),
        _ => None,
    }
}

/// Shows the recipe's training rows to the base and attaches the adapter with what that gives. Returns the
/// configuration with the ranks that came of it, which is the one to save.
///
/// # Errors
/// See [`start`].
pub fn attach<T: Task>(
    model: &mut Model,
    config: LoraConfig,
    inputs: &Inputs<T>,
    recipe: &Recipe,
    say: &dyn Fn(&str),
) -> Result<AdapterConfig, TrainError> {
    let rows = &inputs.train.rows;
    let order = epoch_order(rows.len(), recipe.seed, 0, recipe.data.shuffle);
    let rows: Vec<&T::Row> = order.iter().map(|i| &rows[*i]).collect();
    let pad_id = inputs.base.tokenizer.padding_id();
    let (config, start) = start(model, &rows, config, pad_id, recipe.train.batch_size, say)?;
    attach_given(model, DEFAULT, &config, recipe.seed, Some(&start.given()))?;
    Ok(config.into())
}

/// EVA's first values from `rows`, in their order and in batches of `batch_size`, over and over until all
/// directions have settled or `MOST_BATCHES` were seen. A batch in which fewer tokens count than
/// directions are looked for takes in further rows. `model` has no adapter in use and is left as it is.
///
/// # Errors
/// Settings of EVA's that are wrong, targets that do not fit, too few rows, inputs that are not finite.
pub fn start<R: Row>(
    model: &Model,
    rows: &[&R],
    config: LoraConfig,
    pad_id: u32,
    batch_size: usize,
    say: &dyn Fn(&str),
) -> Result<(LoraConfig, EvaStart), TrainError> {
    let plan = plan(&shapes(model), &config)?;
    let mut watched = model.clone();
    let mut observer = Observer::watch(&mut watched, &config, &plan)?;
    let masked = observer
        .settings()
        .use_label_mask
        .then_some(observer.settings().label_mask_value);
    let head = plan
        .targets
        .iter()
        .find(|t| t.name.rsplit('.').next() == Some("lm_head"));
    // A row that has one label for all of it is looked at whole.
    let counts = |row: &R, token: usize| match (masked, row.token_labels()) {
        (Some(none), Some(labels)) => labels.get(token).is_some_and(|label| *label != none),
        _ => true,
    };
    let of_row = |row: &R| {
        (0..row.tokens())
            .filter(|token| counts(row, *token))
            .count()
    };
    let batches = in_batches(rows, batch_size, observer.directions(), &of_row);
    if batches.is_empty() {
        return Err(TrainError::Mismatch(format!(
            "EVA looks for {} directions, but fewer tokens of the training rows count (have a label)\n  \
             help: lower adapter.r or adapter.eva_rho, or train on more rows",
            observer.directions()
        )));
    }
    say("eva      looking at the inputs of the adapted layers");
    for batch in batches.iter().cycle().take(MOST_BATCHES) {
        if observer.settled() {
            break;
        }
        let len = batch.iter().map(|row| row.tokens()).max().unwrap_or(0);
        let mut padded = Vec::with_capacity(batch.len() * len);
        let mut allowed = Vec::with_capacity(batch.len() * len);
        for row in batch {
            let start = padded.len();
            padded.extend(row.input_ids().iter().map(|id| i64::from(*id)));
            padded.resize(start + len, i64::from(pad_id));
            allowed.extend((0..row.tokens()).map(|token| counts(row, token)));
            allowed.resize(start + len, false);
        }
        let shape = [batch.len(), len];
        observer.see(&allowed, &mut |observer| {
            let hidden = run(&watched, padded.clone(), shape);
            if let Some(head) = head {
                observer.show(&head.name, hidden);
            }
        })?;
    }
    let (config, start) = observer.finish()?;
    say(&format!("eva      {start}"));
    Ok((config, start))
}

/// The hidden states of a batch `[rows · len, hidden]`. Rows are padded on the right and attention is
/// causal, so no token that counts sees padding.
fn run(model: &Model, padded: Vec<i64>, shape: [usize; 2]) -> Tensor<2> {
    let input = ModelInput::new(ids(padded, shape, &model.device()));
    let hidden = model.forward_hidden(&input, None);
    let [rows, len, width] = hidden.dims();
    hidden.reshape([rows * len, width])
}

/// Consecutive rows, `size` at a time or as many as it takes for `least` tokens to count. What is left at
/// the end joins the last batch if it is too little for one of its own.
fn in_batches<'a, R>(
    rows: &[&'a R],
    size: usize,
    least: usize,
    counts: &dyn Fn(&R) -> usize,
) -> Vec<Vec<&'a R>> {
    let mut batches = Vec::new();
    let (mut batch, mut tokens) = (Vec::new(), 0);
    for row in rows {
        batch.push(*row);
        tokens += counts(row);
        if batch.len() >= size && tokens >= least {
            batches.push(std::mem::take(&mut batch));
            tokens = 0;
        }
    }
    if tokens >= least && !batch.is_empty() {
        batches.push(batch);
    } else if let Some(last) = batches.last_mut() {
        last.append(&mut batch);
    }
    batches
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use burn::tensor::Device;
    use enamel_adapter::Targets;
    use enamel_data::{Example, RowRef};
    use enamel_model::ArchConfig;
    use serde_json::json;

    use super::*;

    fn row(ids: &[u32], untrained: usize) -> Example {
        let mut labels: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        labels[..untrained].fill(enamel_data::IGNORED);
        Example {
            input_ids: ids.to_vec(),
            labels,
            source: RowRef {
                file: Path::new("rows.jsonl").into(),
                line: 1,
            },
            index: 0,
        }
    }

    fn model() -> Model {
        let config = ArchConfig::from_json(&json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40,
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "hidden_act": "silu",
        }))
        .unwrap();
        Model::random(&config, 3, &Device::flex()).unwrap()
    }

    fn config(targets: &[&str]) -> LoraConfig {
        LoraConfig {
            r: 3,
            target_modules: Some(Targets::List(
                targets.iter().map(|t| (*t).to_string()).collect(),
            )),
            init_lora_weights: InitLora::Eva,
            ..LoraConfig::default()
        }
    }

    #[test]
    fn batches_take_in_rows_until_enough_tokens_count() {
        let rows = [5, 1, 1, 1, 4, 9, 2].map(|n| row(&vec![7; n], 0));
        let rows: Vec<&Example> = rows.iter().collect();
        let sizes = |size, least| {
            let batches = in_batches(&rows, size, least, &|row: &Example| row.input_ids.len());
            batches.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(2, 1), [2, 2, 2, 1]);
        assert_eq!(sizes(2, 6), [2, 3, 2]);
        assert_eq!(sizes(1, 6), [2, 3, 2]);
        assert_eq!(sizes(100, 6), [7]);
        assert!(sizes(2, 100).is_empty());
    }

    #[test]
    fn the_model_and_its_rows_decide_the_start_and_the_head_is_looked_at_too() {
        let model = model();
        let rows: Vec<Example> = (0..12_u32)
            .map(|i| {
                row(
                    &[i, 2 * i + 1, 39 - i, i + 20, 3 * i % 40, 5],
                    (i % 3) as usize,
                )
            })
            .collect();
        let rows: Vec<&Example> = rows.iter().collect();
        let said = RefCell::new(Vec::new());
        let say = |line: &str| said.borrow_mut().push(line.to_owned());
        let cfg = config(&["q_proj", "v_proj", "lm_head"]);
        let (adjusted, found) = start(&model, &rows, cfg.clone(), 0, 4, &say).unwrap();
        assert_eq!(found.ranks.len(), 5);
        assert_eq!(found.inputs, 3);
        assert_eq!(found.ranks.iter().map(|(_, r)| r).sum::<usize>(), 15);
        assert!(found.factors["lm_head"].len().is_multiple_of(16));
        assert!(said.borrow()[1].starts_with("eva      "), "{said:?}");
        let mut model = model;
        let given = found.given();
        let plan = attach_given(&mut model, DEFAULT, &adjusted, 1, Some(&given)).unwrap();
        let ranks: Vec<_> = plan.targets.iter().map(|t| (t.name.clone(), t.r)).collect();
        let wanted: Vec<_> = found
            .ranks
            .iter()
            .filter(|(_, r)| *r > 0)
            .cloned()
            .collect();
        assert_eq!(ranks, wanted);
    }

    #[test]
    fn too_few_tokens_are_refused() {
        let rows = [row(&[1, 2, 3], 1)];
        let rows: Vec<&Example> = rows.iter().collect();
        let error = start(&model(), &rows, config(&["q_proj"]), 0, 4, &|_| {}).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("6 directions") && text.contains("help:"),
            "{text}"
        );
    }
}

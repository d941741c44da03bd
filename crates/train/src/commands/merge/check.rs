//! Logits of the base with its adapters, of the weights merged in memory, and of the files as written.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::offline::{AdapterOnDisk, HostModule};
use enamel_adapter::{Frozen, Linear, ModuleShape, Slot};
use enamel_model::checkpoint::Checkpoint;
use enamel_model::{ArchConfig, Model, ModelInput};

use super::folding::Merging;
use super::source::Values;
use super::{MergeBase, MergeCheck};
use crate::error::TrainError;
use enamel_model::heads::{HEAD, Head};

/// Tokens of the text on which logits are compared.
const PROBE_TOKENS: usize = 48;

impl Merging<'_> {
    /// Compares logits: with the adapters beside the base, merged in f32, and as written.
    pub fn check(&self, output: &Path, base: MergeBase) -> Result<MergeCheck, TrainError> {
        let mut model = self.load(Values::Base(base))?;
        let adapted = match self.attach(&mut model)? {
            true => Some(probe_logits(&model)?),
            false => None,
        };
        enamel_adapter::detach(&mut model);
        self.put_into(&mut model, base)?;
        let merged = probe_logits(&model)?;
        let device = self.device;
        // Two models at once would double the memory.
        drop(model);
        let checkpoint = Checkpoint::open(output)?;
        let config = ArchConfig::from_json(checkpoint.config_json())?;
        let config = config.with_head(self.base.config.head.clone(), None);
        let written = probe_logits(&Model::load(&config, &checkpoint, device)?)?;
        let reference = adapted.as_ref().unwrap_or(&merged);
        Ok(MergeCheck {
            positions: PROBE_TOKENS,
            max_abs_logit: reference
                .iter()
                .fold(0.0, |max, x| f64::from(x.abs()).max(max)),
            max_abs_logit_diff: adapted
                .as_ref()
                .map(|adapted| max_difference(adapted, &merged)),
            max_abs_logit_diff_written: max_difference(reference, &written),
        })
    }

    /// Puts all adapters in use, unless they cannot be, with these weights.
    pub fn attach(&self, model: &mut Model) -> Result<bool, TrainError> {
        let mut names = Vec::new();
        let whole = |adapter: &AdapterOnDisk| adapter.trains_everything();
        if self.adapters.len() > 1 && self.adapters.iter().any(|(adapter, _)| whole(adapter)) {
            return Ok(false);
        }
        for (i, (adapter, weight)) in self.adapters.iter().enumerate() {
            let mut adapter = adapter.clone();
            if !adapter.weigh(*weight) {
                enamel_adapter::detach(model);
                return Ok(false);
            }
            let name = match self.adapters.len() {
                1 => enamel_adapter::DEFAULT.to_owned(),
                _ => format!("merged{i}"),
            };
            adapter.attach(model, &name)?;
            names.push(name);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if self.adapters.len() > 1 {
            enamel_adapter::set_active(model, &names)?;
        }
        Ok(true)
    }

    /// Replaces the base's weights by the merged ones.
    fn put_into(&self, model: &mut Model, base: MergeBase) -> Result<(), TrainError> {
        let mut failed = None;
        enamel_adapter::Adaptable::for_each_slot(model, &mut |name, slot| {
            let shape = self.modules.iter().find(|m| m.name == name);
            let (Some(shape), None) = (shape.filter(|m| self.touched(&m.name)), &failed) else {
                return;
            };
            match self.folded(shape, base) {
                Ok(merged) => put(slot, shape, merged, self.device),
                Err(error) => failed = Some(error),
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if self.unties
            && let Some(table) = self.table()
        {
            let data = TensorData::new(self.head()?, [table.shape[0], table.shape[1]]);
            let head = Tensor::from_data(data, self.device);
            model.head = Head::Lm(Some(Linear::new(HEAD, head, None)));
        }
        Ok(())
    }
}

fn put(slot: Slot<'_>, shape: &ModuleShape, merged: HostModule, device: &Device) {
    let name = &shape.name;
    let matrix = |values| {
        let data = TensorData::new(values, [shape.shape[0], shape.shape[1]]);
        Tensor::<2>::from_data(data, device)
    };
    let vector = |values: Vec<f32>| {
        let count = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [count]), device)
    };
    match slot {
        Slot::Linear(linear) => {
            *linear = Linear::new(name, matrix(merged.weight), merged.bias.map(vector));
        }
        Slot::Embedding(table) => {
            *table =
                enamel_adapter::Embedding::new(&format!("{name}.weight"), matrix(merged.weight));
        }
        Slot::Norm(norm) => *norm = whole(shape, merged, device),
        Slot::Conv(conv) => *conv = whole(shape, merged, device),
        Slot::Param(param) => *param = whole(shape, merged, device),
    }
}

/// A module that is used as a whole, with these values.
fn whole<const D: usize>(shape: &ModuleShape, values: HostModule, device: &Device) -> Frozen<D> {
    let sides: [usize; D] = std::array::from_fn(|i| shape.shape.get(i).copied().unwrap_or(1));
    let weight = Tensor::from_data(TensorData::new(values.weight, sides), device);
    let module = Frozen::new(&shape.weight_name(), weight);
    match values.bias {
        Some(bias) => {
            let data = TensorData::new(bias.clone(), [bias.len()]);
            module.with_bias(
                &format!("{}.bias", shape.name),
                Tensor::from_data(data, device),
            )
        }
        None => module,
    }
}

/// A fixed sequence that wanders through the whole vocabulary.
pub(super) fn probe(vocabulary: usize) -> Vec<u32> {
    // Steps of a golden section of the vocabulary spread the tokens evenly over it.
    (1..=PROBE_TOKENS)
        .map(|i| ((i as f64 * 0.618_033_988_749_895).fract() * vocabulary as f64) as u32)
        .collect()
}

/// Logits `[PROBE_TOKENS, vocabulary]`, row-major, of [`probe`].
fn probe_logits(model: &Model) -> Result<Vec<f32>, TrainError> {
    let ids: Vec<i64> = probe(model.config().vocab_size)
        .into_iter()
        .map(i64::from)
        .collect();
    let device = model.device();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, PROBE_TOKENS]), &device);
    let hidden = model.forward_hidden(&ModelInput::new(ids), None);
    let [_, tokens, width] = hidden.dims();
    model
        .logits(hidden.reshape([tokens, width]))
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Framework(format!("reading logits: {error}")))
}

fn max_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0.0, |max, (a, b)| {
        let difference = f64::from((a - b).abs());
        // `max` would swallow a NaN.
        if difference.is_nan() {
            f64::NAN
        } else {
            difference.max(max)
        }
    })
}

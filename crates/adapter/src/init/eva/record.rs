//! What probes write down as a model runs: who reads which input, and the directions of each.

use std::hash::{DefaultHasher, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::pca::Pca;
use crate::base::routing::index;
use crate::base::to_host;
use crate::error::{AdapterError, Result};
use crate::linalg::{LinalgError, Matrix};

/// Notes the input `[rows, in]` of a layer.
pub(super) fn see(record: &Mutex<Record>, layer: usize, x: &Tensor<2>) {
    let mut record = open(record);
    if record.failed.is_none()
        && let Err(error) = record.note(layer, x)
    {
        // A forward pass has no way to fail; `Observer::see` does.
        record.failed = Some(error);
    }
}

#[derive(Debug)]
pub(super) struct Record {
    pub stage: Stage,
    /// See [`Settings::tau`].
    pub tau: f64,
    /// Rows of the present batch that count, and how many it has.
    pub places: Vec<i64>,
    pub count: usize,
    pub layers: Vec<Layer>,
    pub inputs: Vec<Input>,
    /// Inputs that wait to be learned from: a few at a time, so that several threads have work.
    pub pending: Vec<(usize, Matrix)>,
    pub failed: Option<AdapterError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Finds out which layers have equal inputs.
    Comparing,
    /// Learns.
    Learning,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub name: String,
    pub r: usize,
    pub width: usize,
    /// The highest rank that it can have.
    pub limit: usize,
    pub hash: Option<u64>,
    /// Which of the inputs it reads, and whether it is the layer that shows it.
    pub input: usize,
    pub leads: bool,
}

/// One distinct input, of one layer or of several (the queries', keys' and values').
#[derive(Debug)]
pub(super) struct Input {
    pub pca: Pca,
    pub settled: Vec<bool>,
    /// How many directions the layer that shows it needs, as ranks are now.
    pub needed: usize,
    /// Whether the present pass is learned from.
    pub active: bool,
}

impl Input {
    /// Whether no further batch is needed.
    pub fn has_settled(&self) -> bool {
        self.settled
            .iter()
            .take(self.needed)
            .all(|settled| *settled)
    }
}

impl Record {
    fn note(&mut self, place: usize, x: &Tensor<2>) -> Result<()> {
        let Some(layer) = self.layers.get(place) else {
            return Ok(());
        };
        let learns = layer.leads
            && self
                .inputs
                .get(layer.input)
                .is_some_and(|input| input.active);
        if self.stage == Stage::Learning && !learns {
            return Ok(());
        }
        let [rows, width] = x.dims();
        if rows != self.count {
            let reason = format!(
                "EVA expects the inputs of {} tokens, not of {rows}",
                self.count
            );
            return Err(failed(layer, reason));
        }
        let x = if self.places.len() == rows {
            x.clone()
        } else {
            x.clone().select(0, index(self.places.clone(), &x.device()))
        };
        let values = to_host(&layer.name, x)?;
        match self.stage {
            Stage::Comparing => {
                let mut hash = DefaultHasher::new();
                hash.write_usize(width);
                hash.write(bytemuck::cast_slice(&values));
                self.layers[place].hash = Some(hash.finish());
                Ok(())
            }
            Stage::Learning => {
                let matrix = Matrix::new(self.places.len(), width, values);
                let matrix = matrix.map_err(|e| failed(layer, e.to_string()))?;
                let input = layer.input;
                let waits = self.pending.iter().any(|(other, _)| *other == input);
                if waits || self.pending.len() >= rayon::current_num_threads().min(8) {
                    self.learn()?;
                }
                self.pending.push((input, matrix));
                Ok(())
            }
        }
    }

    /// Learns from what is waiting. Every input is analysed on one thread, so that results do not depend
    /// on how many there are.
    pub fn learn(&mut self) -> Result<()> {
        let mut jobs = Vec::new();
        for (place, matrix) in self.pending.drain(..) {
            if let Some(input) = self.inputs.get_mut(place) {
                jobs.push((place, matrix, std::mem::take(&mut input.pca)));
            }
        }
        let learn = |(place, matrix, mut pca): (usize, Matrix, Pca)| {
            let cosines = pca.learn(&matrix);
            (place, pca, cosines)
        };
        let done: Vec<Learned> = jobs.into_par_iter().map(learn).collect();
        for (place, pca, cosines) in done {
            self.inputs[place].pca = pca;
            match cosines {
                Ok(None) => {}
                Ok(Some(cosines)) => {
                    let settled = cosines.iter().map(|cosine| *cosine >= self.tau).collect();
                    self.inputs[place].settled = settled;
                }
                Err(error) => {
                    let layer = self.layers.iter().find(|layer| layer.input == place);
                    return Err(AdapterError::Start {
                        module: layer.map_or_else(String::new, |layer| layer.name.clone()),
                        reason: format!("its inputs cannot be analysed: {error}"),
                    });
                }
            }
        }
        Ok(())
    }
}

/// An input, what is known of it, and the cosines of its directions with what they were.
type Learned = (
    usize,
    Pca,
    std::result::Result<Option<Vec<f64>>, LinalgError>,
);

pub(super) fn open(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn failed(layer: &Layer, reason: String) -> AdapterError {
    AdapterError::Start {
        module: layer.name.clone(),
        reason,
    }
}

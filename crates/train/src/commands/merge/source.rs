//! A base, or what merging makes of it, as a source that a model can be loaded from: nothing is written.

use std::cell::RefCell;

use enamel_model::Model;
use enamel_model::checkpoint::{CheckpointError, SourceDtype, TensorInfo, TensorSource};

use super::folding::Merging;
use super::{Choice, MergeBase};
use crate::error::TrainError;

/// Which values.
#[derive(Clone, Copy)]
pub(crate) enum Values {
    /// Those that are merged into.
    Base(MergeBase),
    /// Those that are written, rounded to the written element type.
    Written(Choice),
}

struct Source<'a, 'b> {
    merging: &'a Merging<'b>,
    values: Values,
    tensors: Vec<TensorInfo>,
    /// What went wrong while reading, which the trait's error has no place for.
    failed: RefCell<Option<TrainError>>,
}

impl Source<'_, '_> {
    fn values(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        match self.values {
            Values::Base(base) => self.merging.unfolded(name, base),
            Values::Written(choice) => {
                let kind = self.merging.dtype.kind();
                let mut values = self.merging.values(name, choice)?;
                values.iter_mut().for_each(|x| *x = kind.round(*x));
                Ok(values)
            }
        }
    }
}

impl TensorSource for Source<'_, '_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        self.values(name).map_err(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            CheckpointError::NoSuchTensor {
                name: name.to_owned(),
                nearest: None,
            }
        })
    }
}

impl Merging<'_> {
    /// A dense model of these values, with products in f32.
    pub fn load(&self, values: Values) -> Result<Model, TrainError> {
        let mut tensors = self.tensors();
        if let Values::Base(_) = values {
            // A head that merging gives weights of its own has none yet.
            tensors.retain(|(name, _)| self.is_in_base(name));
        }
        let infos = tensors.into_iter().map(|(name, shape)| TensorInfo {
            name,
            shape,
            dtype: SourceDtype::F32,
        });
        let source = Source {
            merging: self,
            values,
            tensors: infos.collect(),
            failed: RefCell::new(None),
        };
        let model = Model::load(&self.base.config, &source, self.device);
        match source.failed.into_inner() {
            Some(error) => Err(error),
            None => Ok(model?),
        }
    }
}

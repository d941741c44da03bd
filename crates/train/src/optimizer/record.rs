//! The optimizer's file: the record that Burn's own AdamW writes, so that either goes on where the other
//! stopped.
//!
//! A burnpack with the tensors `<id>.momentum.moment_1` and `<id>.momentum.moment_2` in the parameter's shape and
//! the numbers `<id>.momentum.time` and `<id>.__rank`, where `<id>` is the parameter's id in decimal.

use std::collections::HashMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Packed, Writer};
use enamel_kernels::Moments;

use super::{Optimizer, State};
use crate::error::TrainError;

const FIRST: &str = "momentum.moment_1";
const SECOND: &str = "momentum.moment_2";
const TIME: &str = "momentum.time";
const RANK: &str = "__rank";

impl Optimizer {
    /// Writes the moments and waits until they are on the disk. One tensor at a time is in memory twice.
    ///
    /// # Errors
    /// When the disk refuses, or a tensor cannot be read from its device.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        let mut tensors = Vec::with_capacity(2 * self.states.len());
        let mut numbers = Vec::with_capacity(2 * self.states.len());
        for (id, state) in &self.states {
            let id = id.val();
            let Moments { first, second } = &state.moments;
            for (name, tensor) in [(FIRST, first), (SECOND, second)] {
                tensors.push(packed(id, name, tensor.clone(), &state.shape));
            }
            numbers.push((format!("{id}.{TIME}"), Scalar::from(state.time)));
            let rank = state.shape.num_dims();
            numbers.push((format!("{id}.{RANK}"), Scalar::from(rank)));
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let writer = numbers
            .into_iter()
            .fold(Writer::new(tensors), |writer, (name, number)| {
                writer.with_scalar(&name, number)
            });
        writer.write_to_file(path).map_err(|e| {
            let failed = std::io::Error::other(e.to_string());
            TrainError::io(path, "writing")(failed)
        })
    }

    /// Reads the moments of `model`'s parameters, in place of those it has.
    ///
    /// # Errors
    /// When the file is missing, damaged, incomplete or of another model.
    pub fn load<M: Module>(&mut self, path: &Path, model: &M) -> Result<(), TrainError> {
        let refuse = |reason: String| TrainError::Run {
            path: path.to_path_buf(),
            reason,
            help: "resume from another checkpoint".into(),
        };
        let reader = Reader::from_file_exact(path)
            .map_err(|e| refuse(format!("not an optimizer's state: {e}")))?;
        let mut shapes = Shapes(HashMap::new());
        model.visit(&mut shapes);

        let mut times = HashMap::new();
        for (name, number) in reader.scalars() {
            if let Some((id, TIME)) = named(name) {
                let time = usize::try_from(*number)
                    .map_err(|e| refuse(format!("\"{name}\" is no number of steps: {e}")))?;
                times.insert(id, time);
            }
        }
        let tensors = reader
            .into_tensors()
            .map_err(|e| refuse(format!("damaged: {e}")))?;
        let mut moments: HashMap<(u64, &str), Tensor<1>> = HashMap::new();
        for tensor in tensors {
            let name = tensor.name.clone();
            let Some((id, kind @ (FIRST | SECOND))) = named(&name) else {
                return Err(refuse(format!("\"{name}\" is no moment of AdamW")));
            };
            let kind = if kind == FIRST { FIRST } else { SECOND };
            let Some((shape, device)) = shapes.0.get(&id.into()) else {
                return Err(refuse(format!(
                    "\"{name}\" belongs to a parameter that this model does not have"
                )));
            };
            if tensor.shape != *shape {
                return Err(refuse(format!(
                    "\"{name}\" has the shape {:?}, its parameter {:?}",
                    tensor.shape.as_slice(),
                    shape.as_slice()
                )));
            }
            let read = unpacked(tensor, device).map_err(|e| refuse(format!("\"{name}\": {e}")))?;
            moments.insert((id, kind), read);
        }
        let mut states = HashMap::with_capacity(times.len());
        for (id, time) in times {
            let (Some(first), Some(second), Some((shape, _))) = (
                moments.remove(&(id, FIRST)),
                moments.remove(&(id, SECOND)),
                shapes.0.remove(&id.into()),
            ) else {
                return Err(refuse(format!("a moment of parameter {id} is missing")));
            };
            let moments = Moments { first, second };
            let state = State {
                time,
                shape,
                moments,
            };
            states.insert(id.into(), state);
        }
        if let Some(((id, kind), _)) = moments.iter().next() {
            return Err(refuse(format!("\"{id}.{kind}\" has no number of steps")));
        }
        self.states = states;
        Ok(())
    }
}

/// Parameter and field of a name in the file.
fn named(name: &str) -> Option<(u64, &str)> {
    let (id, field) = name.split_once('.')?;
    Some((id.parse().ok()?, field))
}

/// A moment as the file has it, read from its device only when it is written.
fn packed(id: u64, name: &str, tensor: Tensor<1>, shape: &Shape) -> Packed {
    let dtype = tensor.dtype();
    Packed::deferred(
        format!("{id}.{name}"),
        dtype,
        shape.clone(),
        Some(id),
        shape.num_elements() * dtype.size(),
        move || {
            let data = tensor.clone().try_into_data();
            let data = data.map_err(|e| burn_pack::Error::IoError(format!("{e:?}")))?;
            Ok(data.into_bytes())
        },
    )
}

/// A moment in memory of its own: one that still referred to the file could not be overwritten in place.
fn unpacked(tensor: Packed, device: &Device) -> Result<Tensor<1>, String> {
    let (_, dtype, shape, _, bytes) = tensor.into_parts().map_err(|e| e.to_string())?;
    let length = [shape.num_elements()];
    if !dtype.is_float() {
        return Err(format!("{dtype:?} is no type of a moment"));
    }
    let data = TensorData::try_from_bytes(bytes, shape, dtype).map_err(|e| format!("{e:?}"))?;
    let data = data.try_cast(DType::F32).map_err(|e| format!("{e:?}"))?;
    let values = data.try_to_vec::<f32>().map_err(|e| format!("{e:?}"))?;
    let data = TensorData::new(values, length);
    Ok(Tensor::from_data(data, (device, dtype)))
}

/// Shape and plain device of every parameter.
struct Shapes(HashMap<ParamId, (Shape, Device)>);

impl ModuleVisitor for Shapes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let device = param.lazy_device().without_autodiff();
        self.0.insert(param.id, (param.lazy_shape(), device));
    }
}

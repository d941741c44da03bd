//! The optimizer's file: the record that Burn's own AdamW writes, so that either goes on where the other
//! stopped; and moments in 8 bits as the codes they are.
//!
//! A burnpack with the tensors `<id>.momentum.moment_1` and `<id>.momentum.moment_2` in the parameter's shape and
//! the numbers `<id>.momentum.time` and `<id>.__rank`, where `<id>` is the parameter's id in decimal. Of a
//! parameter with 8-bit moments, instead, bitsandbytes' `<id>.state1` and `<id>.state2` (codes, in the parameter's
//! shape) and `<id>.absmax1` and `<id>.absmax2` (a scale for each block). The metadata `optim` is the optimizer's
//! name in a recipe; without it, it is `adamw_torch`.

use std::collections::HashMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bytes, DType, Device, Int, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Packed, Writer};
use enamel_kernels::{Codes, HostMoments, MOMENT_BLOCK, Moments};

use super::pages::{Place, Room};
use super::{Held, Optim, Optimizer, State};
use crate::error::TrainError;

/// The two moments of a parameter in f32.
const MOMENTS: Moments<&str> = Moments {
    first: "momentum.moment_1",
    second: "momentum.moment_2",
};
/// Their codes in 8 bits.
const CODES: Moments<&str> = Moments {
    first: "state1",
    second: "state2",
};
/// The scales of those.
const SCALES: Moments<&str> = Moments {
    first: "absmax1",
    second: "absmax2",
};
const TIME: &str = "momentum.time";
const RANK: &str = "__rank";
const OPTIM: &str = "optim";

impl Optimizer {
    /// Writes the moments and waits until they are on the disk. One tensor at a time is in memory twice.
    ///
    /// # Errors
    /// When the disk refuses, or a tensor cannot be read from its device.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        let mut tensors = Vec::with_capacity(2 * self.states.len());
        let mut numbers = Vec::with_capacity(2 * self.states.len());
        for (id, state) in &self.states {
            let room = self.pages.as_ref().and_then(|pages| pages.get(*id));
            tensors.append(&mut state.packed(id.val(), room));
            let id = id.val();
            numbers.push((format!("{id}.{TIME}"), Scalar::from(state.time)));
            let rank = state.shape.num_dims();
            numbers.push((format!("{id}.{RANK}"), Scalar::from(rank)));
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let mut writer = Writer::new(tensors);
        if self.optim != Optim::AdamwTorch {
            writer = writer.with_metadata(OPTIM, self.optim.name());
        }
        let writer = numbers.into_iter().fold(writer, |writer, (name, number)| {
            writer.with_scalar(&name, number)
        });
        writer.write_to_file(path).map_err(|e| {
            let failed = std::io::Error::other(e.to_string());
            TrainError::io(path, "writing")(failed)
        })
    }

    /// Reads the moments of `model`'s parameters, in place of those it has; where that fails, it has none.
    ///
    /// # Errors
    /// When the file is missing, damaged, incomplete, of another model or of another optimizer.
    pub fn load<M: Module>(&mut self, path: &Path, model: &M) -> Result<(), TrainError> {
        self.states.clear();
        self.states = self.read(path, model).map_err(|refusal| refusal.of(path))?;
        Ok(())
    }

    fn read<M: Module>(
        &mut self,
        path: &Path,
        model: &M,
    ) -> Result<HashMap<ParamId, State>, Refusal> {
        let reader = opened(path)?;
        same_optim(&reader, self.optim)?;
        let mut shapes = Shapes(HashMap::new());
        model.visit(&mut shapes);

        let mut times = HashMap::new();
        for (name, number) in reader.scalars() {
            if let Some((id, TIME)) = named(name) {
                let time = usize::try_from(*number)
                    .map_err(|e| format!("\"{name}\" is no number of steps: {e}"))?;
                times.insert(id, time);
            }
        }
        let mut stored = Stored(HashMap::new());
        for tensor in reader.into_tensors().map_err(|e| format!("damaged: {e}"))? {
            stored.add(tensor, &shapes, self.optim)?;
        }
        let mut states = HashMap::with_capacity(times.len());
        for (id, time) in times {
            let Some((shape, device)) = shapes.0.remove(&id.into()) else {
                return Err(format!("a moment of parameter {id} is missing").into());
            };
            let pages = self.pages.as_mut();
            let room = pages.and_then(|pages| pages.get_mut(id.into()));
            let moments = if let Some(room) = room {
                stored.fill(id, room)?;
                Held::Paged
            } else if self.optim.is_8bit(shape.num_elements()) {
                let from = zip(stored.both(id, CODES)?, stored.both(id, SCALES)?);
                Held::EightBit(Box::new(Moments {
                    first: unpacked_codes(from.first, &device)?,
                    second: unpacked_codes(from.second, &device)?,
                }))
            } else {
                let Moments { first, second } = stored.both(id, MOMENTS)?;
                let (first, second) = (unpacked(first, &device)?, unpacked(second, &device)?);
                Held::F32(Box::new(Moments { first, second }))
            };
            let state = State {
                time,
                shape,
                moments,
            };
            states.insert(id.into(), state);
        }
        match stored.0.keys().next() {
            None => Ok(states),
            Some((id, kind)) => Err(format!("\"{id}.{kind}\" has no number of steps").into()),
        }
    }
}

/// Refuses the file at `path` if it is not the state of `optim`.
///
/// # Errors
/// That, naming both; or what else is wrong with the file.
pub(crate) fn check_optim(path: &Path, optim: Optim) -> Result<(), TrainError> {
    let checked = opened(path).and_then(|reader| same_optim(&reader, optim));
    checked.map_err(|refusal| refusal.of(path))
}

fn opened(path: &Path) -> Result<Reader, Refusal> {
    let reader = Reader::from_file_exact(path);
    Ok(reader.map_err(|e| format!("not an optimizer's state: {e}"))?)
}

fn same_optim(reader: &Reader, optim: Optim) -> Result<(), Refusal> {
    let written = reader.metadata().get(OPTIM);
    let theirs = written.map_or(Optim::default().name(), String::as_str);
    if theirs == optim.name() {
        return Ok(());
    }
    Err(Refusal {
        reason: format!(
            "this is the state of train.optim = \"{theirs}\", and the run has \"{optim}\""
        ),
        help: format!(
            "resume with train.optim = \"{theirs}\", or start a new run from the checkpoint's \
             adapter with adapter.init_from"
        ),
    })
}

/// Why a file is not read.
struct Refusal {
    reason: String,
    help: String,
}

impl Refusal {
    fn of(self, path: &Path) -> TrainError {
        TrainError::Run {
            path: path.to_path_buf(),
            reason: self.reason,
            help: self.help,
        }
    }
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self {
            reason,
            help: "resume from another checkpoint".into(),
        }
    }
}

impl State {
    /// The tensors of this state.
    fn packed(&self, id: u64, room: Option<&Room>) -> Vec<Packed> {
        let shape = &self.shape;
        let blocks = Shape::from([shape.num_elements().div_ceil(MOMENT_BLOCK)]);
        let all = match (&self.moments, room) {
            (Held::F32(m), _) => each(MOMENTS, m.as_ref().clone(), |name, moment| {
                vec![packed(id, name, moment, shape)]
            }),
            (Held::EightBit(m), _) => {
                let names = zip(CODES, SCALES);
                each(names, m.as_ref().clone(), |(codes, scales), moment| {
                    vec![
                        packed_codes(id, codes, moment.codes, shape),
                        packed(id, scales, moment.absmax, &blocks),
                    ]
                })
            }
            (Held::Paged, None) => Moments {
                first: Vec::new(),
                second: Vec::new(),
            },
            (Held::Paged, Some(room)) => match room.absmax() {
                None => each(MOMENTS, room.places(), |name, place| {
                    vec![paged(id, name, place, DType::F32, shape)]
                }),
                Some(absmax) => {
                    let moments = zip(room.places(), absmax.clone());
                    each(zip(CODES, SCALES), moments, |names, (place, absmax)| {
                        vec![
                            paged(id, names.0, place, DType::U8, shape),
                            Packed::new(
                                format!("{id}.{}", names.1),
                                DType::F32,
                                blocks.clone(),
                                Some(id),
                                Bytes::from_elems(absmax),
                            ),
                        ]
                    })
                }
            },
        };
        let Moments {
            mut first,
            mut second,
        } = all;
        first.append(&mut second);
        first
    }
}

fn zip<A, B>(a: Moments<A>, b: Moments<B>) -> Moments<(A, B)> {
    Moments {
        first: (a.first, b.first),
        second: (a.second, b.second),
    }
}

fn each<A, B, C>(a: Moments<A>, b: Moments<B>, mut f: impl FnMut(A, B) -> C) -> Moments<C> {
    zip(a, b).map(|(a, b)| f(a, b))
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

/// The same for codes, which are bytes in the file whatever their device holds them in.
fn packed_codes(id: u64, name: &str, codes: Tensor<1, Int>, shape: &Shape) -> Packed {
    Packed::deferred(
        format!("{id}.{name}"),
        DType::U8,
        shape.clone(),
        Some(id),
        shape.num_elements(),
        move || {
            let failed = |e: String| burn_pack::Error::IoError(e);
            let data = codes.clone().try_into_data();
            let data = data.map_err(|e| failed(format!("{e:?}")))?;
            let data = data.try_cast(DType::U8);
            Ok(data.map_err(|e| failed(format!("{e:?}")))?.into_bytes())
        },
    )
}

/// The same for what is paged.
fn paged(id: u64, name: &str, place: Place, dtype: DType, shape: &Shape) -> Packed {
    Packed::deferred(
        format!("{id}.{name}"),
        dtype,
        shape.clone(),
        Some(id),
        place.len(),
        move || {
            let read = place.read();
            read.map_err(|e| burn_pack::Error::IoError(format!("reading paged moments: {e}")))
        },
    )
}

/// The tensors of a file by parameter and field, not read yet.
struct Stored(HashMap<(u64, &'static str), Packed>);

impl Stored {
    /// Sorts in a tensor, if the parameter's moments have one of that name, shape and type.
    fn add(&mut self, tensor: Packed, shapes: &Shapes, optim: Optim) -> Result<(), String> {
        let name = &tensor.name;
        let known = |field: &str| {
            let all = [MOMENTS, CODES, SCALES].map(|m| [m.first, m.second]);
            all.into_iter().flatten().find(|known| *known == field)
        };
        let Some((id, Some(field))) = named(name).map(|(id, field)| (id, known(field))) else {
            return Err(format!("\"{name}\" is no moment of AdamW"));
        };
        let Some((shape, _)) = shapes.0.get(&id.into()) else {
            return Err(format!(
                "\"{name}\" belongs to a parameter that this model does not have"
            ));
        };
        let elements = shape.num_elements();
        let scales = [SCALES.first, SCALES.second].contains(&field);
        let eight_bit = optim.is_8bit(elements);
        if eight_bit == [MOMENTS.first, MOMENTS.second].contains(&field) {
            return Err(format!(
                "\"{name}\" does not go with {optim}, which holds the moments of a parameter of \
                 {elements} elements in {}",
                if eight_bit { "8 bits" } else { "f32" }
            ));
        }
        let want = match scales {
            true => Shape::from([elements.div_ceil(MOMENT_BLOCK)]),
            false => shape.clone(),
        };
        if tensor.shape != want {
            let whose = if scales {
                "its blocks"
            } else {
                "its parameter"
            };
            return Err(format!(
                "\"{name}\" has the shape {:?}, {whose} {:?}",
                tensor.shape.as_slice(),
                want.as_slice()
            ));
        }
        let fits = match (eight_bit, scales) {
            (false, _) => tensor.dtype.is_float(),
            (true, true) => tensor.dtype == DType::F32,
            (true, false) => tensor.dtype == DType::U8,
        };
        if !fits {
            let dtype = tensor.dtype;
            return Err(format!("\"{name}\": {dtype:?} is no type of a moment"));
        }
        self.0.insert((id, field), tensor);
        Ok(())
    }

    /// Two tensors of a parameter.
    fn both(&mut self, id: u64, fields: Moments<&'static str>) -> Result<Moments<Packed>, String> {
        let mut take = |field| {
            let found = self.0.remove(&(id, field));
            found.ok_or_else(|| {
                format!("a moment of parameter {id} is missing: there is no \"{id}.{field}\"")
            })
        };
        Ok(Moments {
            first: take(fields.first)?,
            second: take(fields.second)?,
        })
    }

    /// Reads the moments of a parameter into its pages.
    fn fill(&mut self, id: u64, room: &mut Room) -> Result<(), String> {
        match room.moments() {
            HostMoments::F32(to) => {
                let from = self.both(id, MOMENTS)?;
                for (from, to) in [(from.first, to.first), (from.second, to.second)] {
                    to.copy_from_slice(&floats(from)?);
                }
            }
            HostMoments::EightBit(to) => {
                let from = zip(self.both(id, CODES)?, self.both(id, SCALES)?);
                for ((codes, absmax), to) in [(from.first, to.first), (from.second, to.second)] {
                    to.codes.copy_from_slice(&code_bytes(codes)?);
                    to.absmax.copy_from_slice(&scales(absmax)?);
                }
            }
        }
        Ok(())
    }
}

fn data(tensor: Packed) -> Result<TensorData, String> {
    let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(|e| e.to_string())?;
    TensorData::try_from_bytes(bytes, shape, dtype).map_err(|e| format!("\"{name}\": {e:?}"))
}

/// The numbers of a moment in f32, or the scales of one in 8 bits.
fn floats(tensor: Packed) -> Result<Vec<f32>, String> {
    let data = data(tensor)?.try_cast(DType::F32);
    let values = data.map_err(|e| format!("{e:?}"))?.try_to_vec::<f32>();
    values.map_err(|e| format!("{e:?}"))
}

fn code_bytes(tensor: Packed) -> Result<Vec<u8>, String> {
    let codes = data(tensor)?.try_to_vec::<u8>();
    codes.map_err(|e| format!("{e:?}"))
}

/// Scales, which are the largest magnitudes of blocks.
fn scales(tensor: Packed) -> Result<Vec<f32>, String> {
    let name = tensor.name.clone();
    let scales = floats(tensor)?;
    match scales.iter().find(|s| **s < 0.0 || s.is_infinite()) {
        None => Ok(scales),
        Some(bad) => Err(format!("\"{name}\": {bad} is no scale of a block")),
    }
}

/// A moment in memory of its own: one that still referred to the file could not be overwritten in place.
fn unpacked(tensor: Packed, device: &Device) -> Result<Tensor<1>, String> {
    let dtype = tensor.dtype;
    let values = floats(tensor)?;
    let length = [values.len()];
    let data = TensorData::new(values, length);
    Ok(Tensor::from_data(data, (device, dtype)))
}

/// The same of a moment in 8 bits.
fn unpacked_codes(from: (Packed, Packed), device: &Device) -> Result<Codes, String> {
    let (codes, absmax) = (code_bytes(from.0)?, scales(from.1)?);
    let (elements, blocks) = ([codes.len()], [absmax.len()]);
    let codes = TensorData::new(codes, elements);
    let absmax = TensorData::new(absmax, blocks);
    Ok(Codes {
        codes: Tensor::from_data(codes, (device, Codes::dtype(device))),
        absmax: Tensor::from_data(absmax, (device, DType::F32)),
    })
}

/// Shape and plain device of every parameter.
struct Shapes(HashMap<ParamId, (Shape, Device)>);

impl ModuleVisitor for Shapes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let device = param.lazy_device().without_autodiff();
        self.0.insert(param.id, (param.lazy_shape(), device));
    }
}

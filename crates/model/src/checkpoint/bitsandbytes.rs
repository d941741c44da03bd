//! Weights that bitsandbytes quantised: which tensors of a directory belong together, and what they stand for.

use std::collections::BTreeMap;
use std::path::Path;

use enamel_kernels::PackedRows;
use enamel_kernels::quantized::formats::{
    Absmax, DynamicBlocks, FloatKind, FourBitTensor, Int8Rows, OUTLIER_THRESHOLD, QuantError,
    QuantState,
};
use serde_json::Value;

use super::safetensors::SafetensorsSet;
use super::{CheckpointError, SourceDtype, TensorInfo};
use crate::error::Problems;

/// What `quantization_config` says that reading depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    /// `llm_int8_threshold`.
    threshold: f32,
    /// `bnb_4bit_compute_dtype`, f32 where it is missing.
    compute: FloatKind,
}

impl Settings {
    /// From `config.json`; `None` for a model that is not quantised.
    ///
    /// # Errors
    /// Another method than bitsandbytes', by name; a threshold that is no number.
    pub(crate) fn of(config: &Value, path: &Path) -> Result<Option<Self>, CheckpointError> {
        let settings = match config.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(map)) if map.is_empty() => return Ok(None),
            Some(Value::Object(map)) => map,
            Some(_) => {
                let problem = "`quantization_config` is not a JSON object";
                return Err(CheckpointError::malformed(path, problem));
            }
        };
        let is = |key: &str| settings.get(key).and_then(Value::as_bool) == Some(true);
        // Written by transformers before it had `quant_method`.
        let old = is("load_in_4bit") || is("load_in_8bit");
        let method = settings.get("quant_method").and_then(Value::as_str);
        match method {
            Some("bitsandbytes" | "bitsandbytes_4bit" | "bitsandbytes_8bit") => {}
            None if old => {}
            other => {
                let other = other.unwrap_or("none");
                return Err(CheckpointError::unsupported(
                    path,
                    format!(
                        "its `quantization_config` has the quant_method '{other}'; only 'bitsandbytes' is read. \
                         Take the model as it was before it was quantised"
                    ),
                ));
            }
        }
        let threshold = match settings.get("llm_int8_threshold") {
            None | Some(Value::Null) => Some(OUTLIER_THRESHOLD),
            Some(value) => value.as_f64().map(|t| t as f32),
        };
        let compute = settings.get("bnb_4bit_compute_dtype");
        let compute = compute.and_then(|name| FloatKind::from_name(name.as_str()?).ok());
        match threshold.filter(|t| t.is_finite() && *t >= 0.0) {
            Some(threshold) => Ok(Some(Self {
                threshold,
                compute: compute.unwrap_or(FloatKind::F32),
            })),
            None => Err(CheckpointError::malformed(
                path,
                "`llm_int8_threshold` must be a number of at least zero",
            )),
        }
    }
}

/// Where a tensor of the model comes from; numbers are those of the stored tensors.
#[derive(Debug)]
enum Origin {
    Plain(usize),
    FourBit {
        codes: usize,
        absmax: usize,
        /// `nested_absmax` and `nested_quant_map`.
        nested: Option<(usize, usize)>,
        state: QuantState,
    },
    Int8 {
        codes: usize,
        scales: usize,
        shape: [usize; 2],
    },
}

/// The tensors that lie beside a quantised weight.
#[derive(Debug, Default)]
struct Companions {
    absmax: Option<usize>,
    quant_map: Option<usize>,
    nested_absmax: Option<usize>,
    nested_quant_map: Option<usize>,
    states: Vec<(String, usize)>,
    scb: Option<usize>,
    weight_format: Option<usize>,
}

impl Companions {
    /// For the name of such a tensor: the weight that it belongs to, and which part of it it is.
    fn split(name: &str) -> Option<(String, &str)> {
        for (ending, part) in [(".SCB", "SCB"), (".weight_format", "weight_format")] {
            if let Some(module) = name.strip_suffix(ending) {
                return Some((format!("{module}.weight"), part));
            }
        }
        let (module, part) = name.rsplit_once(".weight.")?;
        let known = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];
        (known.contains(&part) || part.starts_with("quant_state."))
            .then(|| (format!("{module}.weight"), part))
    }

    fn put(&mut self, part: &str, index: usize) {
        match part {
            "absmax" => self.absmax = Some(index),
            "quant_map" => self.quant_map = Some(index),
            "nested_absmax" => self.nested_absmax = Some(index),
            "nested_quant_map" => self.nested_quant_map = Some(index),
            "SCB" => self.scb = Some(index),
            "weight_format" => self.weight_format = Some(index),
            state => self.states.push((state.to_owned(), index)),
        }
    }

    fn is_int8(&self) -> bool {
        self.scb.is_some() || self.weight_format.is_some()
    }

    fn is_four_bit(&self) -> bool {
        let tables = [self.absmax, self.quant_map, self.nested_absmax];
        tables.iter().any(Option::is_some)
            || self.nested_quant_map.is_some()
            || !self.states.is_empty()
    }
}

/// The model's tensors of a directory whose linear layers are quantised.
#[derive(Debug)]
pub(crate) struct Quantised {
    stored: Vec<TensorInfo>,
    origins: Vec<Origin>,
    settings: Settings,
}

impl Quantised {
    /// Puts together what belongs together, and lists the tensors that the model has.
    ///
    /// # Errors
    /// Everything that is missing, left over or does not fit, all at once, by tensor and file.
    pub(crate) fn gather(
        dir: &Path,
        set: &SafetensorsSet,
        stored: Vec<TensorInfo>,
        settings: Settings,
    ) -> Result<(Self, Vec<TensorInfo>), CheckpointError> {
        let mut groups: BTreeMap<String, Companions> = BTreeMap::new();
        let mut heads: Vec<(usize, &TensorInfo)> = Vec::new();
        for (index, info) in stored.iter().enumerate() {
            match Companions::split(&info.name) {
                Some((weight, part)) => groups.entry(weight).or_default().put(part, index),
                None => heads.push((index, info)),
            }
        }
        let parts = Parts {
            set,
            stored: &stored,
        };
        let mut problems = Problems::default();
        let (mut origins, mut infos) = (Vec::new(), Vec::new());
        for (index, info) in heads {
            let found = match groups.remove(&info.name) {
                Some(group) => parts.put_together(index, &group),
                None if info.dtype == SourceDtype::Quantised => Err(vec![
                    "its quant_state (4-bit) or SCB (int8) is missing".to_owned(),
                ]),
                None => Ok((Origin::Plain(index), info.shape.clone())),
            };
            match found {
                Ok((origin, shape)) => {
                    let dtype = match origin {
                        Origin::Plain(_) => info.dtype,
                        _ => SourceDtype::Quantised,
                    };
                    infos.push(TensorInfo {
                        name: info.name.clone(),
                        shape,
                        dtype,
                    });
                    origins.push(origin);
                }
                Err(all) => {
                    for problem in all {
                        problems.push(format!(
                            "tensor '{}' in {}: {problem}",
                            info.name,
                            set.file_of(index)
                        ));
                    }
                }
            }
        }
        for (weight, group) in groups {
            let firsts = [
                group.absmax,
                group.quant_map,
                group.scb,
                group.weight_format,
            ];
            let first = firsts.into_iter().flatten().next();
            let first = first.or(group.states.first().map(|(_, index)| *index));
            let file =
                first.map_or_else(String::new, |index| format!(" in {}", set.file_of(index)));
            problems.push(format!(
                "tensor '{weight}' is missing, but what belongs to it lies{file}"
            ));
        }
        problems.into_malformed(dir)?;
        let all = Self {
            stored,
            origins,
            settings,
        };
        Ok((all, infos))
    }

    /// The stored tensor that is the model's tensor number `index`, unless that is quantised.
    pub(crate) fn plain(&self, index: usize) -> Option<(usize, &TensorInfo)> {
        match self.origins.get(index)? {
            Origin::Plain(at) => Some((*at, self.stored.get(*at)?)),
            _ => None,
        }
    }

    /// What 4-bit weights are rounded to when they are read.
    pub(crate) fn compute(&self) -> FloatKind {
        self.settings.compute
    }

    /// Bytes of the model's tensor number `index` in memory, if it is quantised: codes, scales and what those
    /// are quantised with.
    pub(crate) fn bytes(&self, index: usize) -> Option<usize> {
        let float = size_of::<f32>();
        let numbers = |at: &usize| {
            let info = self.stored.get(*at);
            info.map_or(0, |info| info.shape.iter().product::<usize>())
        };
        // Of sizes that were compared with the file's.
        let floats = |count: usize| count.saturating_mul(float);
        match self.origins.get(index)? {
            Origin::Plain(_) => None,
            Origin::FourBit {
                codes,
                absmax,
                nested,
                ..
            } => Some(match nested {
                Some((scales, map)) => {
                    let inner = numbers(scales).saturating_add(numbers(map));
                    let bytes = numbers(codes).saturating_add(numbers(absmax));
                    bytes.saturating_add(floats(inner.saturating_add(1)))
                }
                None => numbers(codes).saturating_add(floats(numbers(absmax))),
            }),
            Origin::Int8 { codes, scales, .. } => {
                Some(numbers(codes).saturating_add(floats(numbers(scales))))
            }
        }
    }

    /// The rows of the model's tensor number `index`, if it is quantised.
    pub(crate) fn rows(
        &self,
        set: &SafetensorsSet,
        index: usize,
    ) -> Result<Option<PackedRows>, CheckpointError> {
        let parts = Parts {
            set,
            stored: &self.stored,
        };
        let rows = match self.origins.get(index) {
            None | Some(Origin::Plain(_)) => return Ok(None),
            Some(Origin::FourBit {
                codes,
                absmax,
                nested,
                state,
            }) => {
                let scales = match (nested, state.nested) {
                    (Some((scale, map)), Some(inner)) => {
                        let blocks = DynamicBlocks::from_parts(
                            parts.bytes(*absmax)?,
                            parts.floats(*scale)?,
                            parts.floats(*map)?,
                            inner.block,
                        );
                        Absmax::Nested {
                            blocks: blocks.map_err(|e| parts.broken(*absmax, &e))?,
                            offset: inner.offset,
                        }
                    }
                    _ => Absmax::Plain(parts.floats(*absmax)?),
                };
                FourBitTensor::from_parts(state, parts.bytes(*codes)?, Some(scales))
                    .map(PackedRows::FourBit)
                    .map_err(|e| parts.broken(*codes, &e))?
            }
            Some(Origin::Int8 {
                codes,
                scales,
                shape,
            }) => {
                let values = parts.bytes(*codes)?.into_iter().map(u8::cast_signed);
                let rows =
                    Int8Rows::from_parts(*shape, values.collect(), Some(parts.floats(*scales)?));
                PackedRows::Int8 {
                    rows: rows.map_err(|e| parts.broken(*codes, &e))?,
                    threshold: self.settings.threshold,
                }
            }
        };
        Ok(Some(rows))
    }
}

/// Stored tensors by number.
struct Parts<'a> {
    set: &'a SafetensorsSet,
    stored: &'a [TensorInfo],
}

impl Parts<'_> {
    fn info(&self, index: usize) -> Result<&TensorInfo, CheckpointError> {
        self.stored
            .get(index)
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                name: format!("number {index}"),
                nearest: None,
            })
    }

    fn bytes(&self, index: usize) -> Result<Vec<u8>, CheckpointError> {
        self.set.read_bytes(index, self.info(index)?)
    }

    fn floats(&self, index: usize) -> Result<Vec<f32>, CheckpointError> {
        self.set.read_f32(index, self.info(index)?)
    }

    fn broken(&self, index: usize, error: &QuantError) -> CheckpointError {
        let name = self.stored.get(index).map_or("", |info| info.name.as_str());
        let file = self.set.file_of(index);
        CheckpointError::malformed(Path::new(&file), format!("tensor '{name}': {error}"))
    }

    /// What a weight and its companions are together, and the model's shape of it.
    fn put_together(
        &self,
        weight: usize,
        group: &Companions,
    ) -> Result<(Origin, Vec<usize>), Vec<String>> {
        match (group.is_four_bit(), group.is_int8()) {
            (true, true) => Err(vec![
                "it has the parts of a 4-bit and of an int8 weight beside it".to_owned(),
            ]),
            (_, true) => self.int8(weight, group),
            _ => self.four_bit(weight, group),
        }
    }

    fn four_bit(
        &self,
        codes: usize,
        group: &Companions,
    ) -> Result<(Origin, Vec<usize>), Vec<String>> {
        let mut problems = Vec::new();
        let state = match group.states.as_slice() {
            [(key, index)] => self.state(key, *index).map_err(|e| problems.push(e)).ok(),
            [] => {
                problems.push(QuantError::Missing("quant_state").to_string());
                None
            }
            _ => {
                problems.push("it has several quant_states".to_owned());
                None
            }
        };
        if group.absmax.is_none() {
            problems.push(QuantError::Missing("absmax").to_string());
        }
        if group.quant_map.is_none() {
            problems.push(QuantError::Missing("quant_map").to_string());
        }
        let Some(state) = state else {
            return Err(problems);
        };
        if let Some(Err(problem)) = group.quant_map.map(|map| self.check_map(map, &state)) {
            problems.push(problem);
        }
        if state.shape.len() != 2 {
            problems.push(QuantError::NotMatrix(state.shape.clone()).to_string());
        }
        let length = state
            .shape
            .iter()
            .try_fold(1_usize, |n, &d| n.checked_mul(d));
        let Some(length) = length else {
            problems.push(QuantError::TooLarge(state.shape.clone()).to_string());
            return Err(problems);
        };
        let blocks = length.div_ceil(state.block);
        let width = if state.nested.is_some() { 1 } else { 4 };
        let mut sized = vec![("its 4-bit codes", Some(codes), length.div_ceil(2))];
        sized.push(("absmax", group.absmax, blocks.saturating_mul(width)));
        let nested = match state.nested {
            Some(inner) => {
                let scales = blocks.div_ceil(inner.block).saturating_mul(4);
                sized.push(("nested_absmax", group.nested_absmax, scales));
                sized.push(("nested_quant_map", group.nested_quant_map, 1024));
                for (what, index) in [
                    ("nested_absmax", group.nested_absmax),
                    ("nested_quant_map", group.nested_quant_map),
                ] {
                    if index.is_none() {
                        problems.push(QuantError::Missing(what).to_string());
                    }
                }
                group.nested_absmax.zip(group.nested_quant_map)
            }
            None => {
                if group.nested_absmax.or(group.nested_quant_map).is_some() {
                    problems.push(
                        "it has nested scales, but its quant_state does not speak of them".into(),
                    );
                }
                None
            }
        };
        for (what, index, bytes) in sized {
            self.check_size(what, index, bytes, &state.shape, &mut problems);
        }
        let floats = match state.nested {
            Some(_) => [group.nested_absmax, group.nested_quant_map],
            None => [group.absmax, None],
        };
        self.check_floats(&floats, &mut problems);
        match group.absmax.filter(|_| problems.is_empty()) {
            Some(absmax) => {
                let shape = state.shape.clone();
                let origin = Origin::FourBit {
                    codes,
                    absmax,
                    nested,
                    state,
                };
                Ok((origin, shape))
            }
            None => Err(problems),
        }
    }

    fn state(&self, key: &str, index: usize) -> Result<QuantState, String> {
        let bytes = self.bytes(index).map_err(|e| e.to_string())?;
        let state = QuantState::parse(&bytes).map_err(|e| e.to_string())?;
        if key != state.key() {
            return Err(format!(
                "its `{key}` speaks of the type '{}'; save the checkpoint again with bitsandbytes",
                state.kind.name()
            ));
        }
        Ok(state)
    }

    /// Refuses another table than the type's: codes would mean other numbers.
    fn check_map(&self, index: usize, state: &QuantState) -> Result<(), String> {
        let kind = state.kind;
        let map = self.floats(index).map_err(|e| e.to_string())?;
        let table = kind.table();
        // Releases of bitsandbytes differ in the last digits of a number.
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6;
        if map.len() == table.len() && map.iter().zip(table).all(same) {
            return Ok(());
        }
        Err(format!(
            "its quant_map is not the table of {}; only bitsandbytes' own tables are read",
            kind.name()
        ))
    }

    fn int8(&self, codes: usize, group: &Companions) -> Result<(Origin, Vec<usize>), Vec<String>> {
        let mut problems = Vec::new();
        let shape = self.stored.get(codes).map_or(&[][..], |info| &info.shape);
        let &[rows, columns] = shape else {
            return Err(vec![QuantError::NotMatrix(shape.to_vec()).to_string()]);
        };
        self.check_size(
            "its int8 codes",
            Some(codes),
            rows.saturating_mul(columns),
            shape,
            &mut problems,
        );
        self.check_size(
            "SCB",
            group.scb,
            rows.saturating_mul(4),
            shape,
            &mut problems,
        );
        self.check_floats(&[group.scb], &mut problems);
        // Other numbers are layouts for particular GPUs, which old releases wrote.
        if let Some(format) = group.weight_format {
            match self.bytes(format) {
                Ok(bytes) if bytes.iter().all(|b| *b == 0) => {}
                Ok(bytes) => problems.push(format!(
                    "its weight_format is {bytes:?}; only 0 (row by row) is read"
                )),
                Err(error) => problems.push(error.to_string()),
            }
        }
        let Some(scales) = group.scb else {
            problems.push(QuantError::Missing("SCB").to_string());
            return Err(problems);
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        let shape = [rows, columns];
        let origin = Origin::Int8 {
            codes,
            scales,
            shape,
        };
        Ok((origin, shape.to_vec()))
    }

    fn check_size(
        &self,
        what: &str,
        index: Option<usize>,
        expected: usize,
        shape: &[usize],
        problems: &mut Vec<String>,
    ) {
        let found = index.map(|index| self.set.size_of(index));
        if let Some(found) = found.filter(|found| *found != expected) {
            problems.push(format!(
                "{what}: the shape {shape:?} needs {expected} bytes, but {found} are there"
            ));
        }
    }

    fn check_floats(&self, parts: &[Option<usize>], problems: &mut Vec<String>) {
        let infos = parts.iter().flatten().filter_map(|i| self.stored.get(*i));
        for info in infos.filter(|info| info.dtype != SourceDtype::F32) {
            problems.push(format!("'{}' is not F32", info.name));
        }
    }
}

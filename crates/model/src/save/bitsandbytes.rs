//! Writing a model whose linear layers are quantised, as bitsandbytes and transformers write one.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use burn::tensor::Device;
use enamel_kernels::quant::{Absmax, FloatKind, FourBitTensor, Int8Rows, OUTLIER_THRESHOLD};
use enamel_kernels::{Compute, PackedRows};
use serde_json::{Map, Value, json};

use super::{
    SaveDtype, SaveError, SaveOptions, SavedModel, header_text, io, is_occupied, move_into_place,
    saved_config, write_json, write_side_files, write_values,
};
use crate::causal_lm::{CausalLm, LoadError};
use crate::checkpoint::{Checkpoint, TensorSource};
use crate::config::LlamaConfig;
use crate::loading::{Format, Quantization};

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedQuantised {
    /// Files and bytes.
    pub saved: SavedModel,
    /// Matrices that are quantised.
    pub quantised: usize,
    /// Their bytes, scales included.
    pub quantised_bytes: u64,
    /// Tensors that are as they were.
    pub dense: usize,
}

/// Quantises the linear layers of `source` one by one and writes a directory that transformers loads with
/// bitsandbytes: codes, scales and `quantization_config`. What is not quantised has the type of `options`.
///
/// # Errors
/// Without a format there is nothing to do; else as [`write_hf`](super::write_hf) and
/// [`CausalLm::load_for`]. Then nothing is written.
pub fn write_bitsandbytes(
    dir: &Path,
    source: &Checkpoint,
    quantization: &Quantization,
    options: &SaveOptions,
) -> Result<SavedQuantised, SaveError> {
    let occupied = is_occupied(dir)?;
    if occupied && !options.overwrite {
        return Err(SaveError::Exists(dir.to_owned()));
    }
    let config = LlamaConfig::from_json(source.config_json())?;
    let (config, embedding) = CausalLm::fit(&config, source).map_err(SaveError::from_load)?;
    quantization
        .check(&config.modules())
        .map_err(SaveError::from_load)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(io(parent))?;
    let temporary = tempfile::Builder::new()
        .prefix(".saving-")
        .tempdir_in(parent)
        .map_err(io(parent))?;
    let at = temporary.path();

    let mut shards = Shards::new(at, options);
    let mut saved = SavedQuantised {
        saved: SavedModel {
            files: Vec::new(),
            tensor_bytes: 0,
        },
        quantised: 0,
        quantised_bytes: 0,
        dense: 0,
    };
    let mut tensors = Vec::new();
    for module in config.modules() {
        let weight = format!("{}.weight", module.name);
        tensors.push((weight.clone(), module.shape.clone()));
        let linear = module.kind == enamel_adapter::ModuleKind::Linear;
        // No device plays a part: packed rows stay in the host's memory.
        let packed = match linear {
            true => quantization
                .pack(source, &module.name, Compute::F32, &Device::flex())
                .map_err(SaveError::from_load)?,
            false => None,
        };
        match packed.as_ref().map(|packed| packed.rows()) {
            Some(PackedRows::FourBit(tensor)) => {
                saved.quantised += 1;
                saved.quantised_bytes += tensor.bytes() as u64;
                shards.four_bit(&weight, tensor)?;
            }
            Some(PackedRows::Int8 { rows, .. }) => {
                saved.quantised += 1;
                saved.quantised_bytes += rows.bytes() as u64;
                shards.int8(&module.name, rows)?;
            }
            Some(PackedRows::Blocks(_)) | None => {
                let stored = match module.kind {
                    enamel_adapter::ModuleKind::Embedding => embedding,
                    _ => weight.as_str(),
                };
                saved.dense += 1;
                shards.dense(&weight, &module.shape, &source.read_f32(stored)?)?;
            }
        }
        if module.bias {
            let name = format!("{}.bias", module.name);
            let shape = [module.shape.first().copied().unwrap_or(0)];
            shards.dense(&name, &shape, &source.read_f32(&name)?)?;
        }
    }
    (saved.saved.files, saved.saved.tensor_bytes) = shards.finish()?;
    let mut json = saved_config(source.config_json(), &tensors, options.dtype);
    if let Some(map) = json.as_object_mut() {
        map.insert("quantization_config".into(), settings(quantization));
    }
    write_json(&at.join("config.json"), &json)?;
    saved.saved.files.push("config.json".to_owned());
    saved.saved.files.extend(write_side_files(at, source)?);
    move_into_place(temporary, dir, occupied)?;
    Ok(saved)
}

/// `quantization_config`, with the keys that transformers 5 writes.
fn settings(quantization: &Quantization) -> Value {
    let four = matches!(quantization.format, Some(Format::FourBit { .. }));
    let (kind, double, compute, threshold) = match quantization.format {
        Some(Format::FourBit {
            kind,
            double,
            compute,
            ..
        }) => (kind.name(), double, compute, OUTLIER_THRESHOLD),
        Some(Format::Int8 { threshold }) => ("fp4", false, FloatKind::F32, threshold),
        None => ("fp4", false, FloatKind::F32, OUTLIER_THRESHOLD),
    };
    // What transformers leaves dense unasked, the head, is not in the list it writes.
    let skip = match quantization.skip_modules.is_empty() {
        true => Value::Null,
        false => {
            let head = ["lm_head".to_owned()];
            let all = quantization.skip_modules.iter().chain(&head);
            all.cloned().collect()
        }
    };
    json!({
        "_load_in_4bit": four,
        "_load_in_8bit": !four,
        "bnb_4bit_compute_dtype": compute.name(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": threshold,
        "load_in_4bit": four,
        "load_in_8bit": !four,
        "quant_method": "bitsandbytes",
    })
}

impl SaveError {
    fn from_load(error: LoadError) -> Self {
        Self::Load(Box::new(error))
    }
}

/// Files of tensors whose sizes are known only once they are made: data first, and the header, which stands in
/// front, when a file is full.
struct Shards<'a> {
    dir: &'a Path,
    limit: u64,
    dtype: SaveDtype,
    /// The data so far, their headers' entries and their length.
    open: Option<(BufWriter<File>, Map<String, Value>, u64)>,
    /// Headers and data files of those that are full.
    full: Vec<(Map<String, Value>, File)>,
    total: u64,
}

impl<'a> Shards<'a> {
    fn new(dir: &'a Path, options: &SaveOptions) -> Self {
        Self {
            dir,
            limit: options.shard_bytes,
            dtype: options.dtype,
            open: None,
            full: Vec::new(),
            total: 0,
        }
    }

    /// Room for `bytes` more of one tensor and its companions.
    fn room(&mut self, bytes: u64) -> Result<(), SaveError> {
        if matches!(&self.open, Some((.., at)) if *at > 0 && at + bytes > self.limit) {
            self.close()?;
        }
        if self.open.is_none() {
            let file = tempfile::tempfile_in(self.dir).map_err(io(self.dir))?;
            self.open = Some((BufWriter::with_capacity(1 << 20, file), Map::new(), 0));
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), SaveError> {
        if let Some((out, header, _)) = self.open.take() {
            let file = out.into_inner().map_err(|e| io(self.dir)(e.into_error()))?;
            self.full.push((header, file));
        }
        Ok(())
    }

    /// One tensor of the file that is open; `fill` writes it.
    fn put(
        &mut self,
        name: &str,
        dtype: &str,
        shape: &[usize],
        bytes: u64,
        fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        let Some((out, header, at)) = &mut self.open else {
            return Ok(());
        };
        fill(out)?;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [*at, *at + bytes]});
        header.insert(name.to_owned(), entry);
        *at += bytes;
        self.total += bytes;
        Ok(())
    }

    fn bytes(
        &mut self,
        name: &str,
        dtype: &str,
        shape: &[usize],
        data: &[u8],
    ) -> Result<(), SaveError> {
        let dir = self.dir;
        self.put(name, dtype, shape, data.len() as u64, |out| {
            out.write_all(data).map_err(io(dir))
        })
    }

    fn floats(&mut self, name: &str, values: &[f32]) -> Result<(), SaveError> {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(name, "F32", &[values.len()], &data)
    }

    fn dense(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<(), SaveError> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(SaveError::WrongLength {
                name: name.to_owned(),
                shape: shape.to_vec(),
                found: values.len(),
            });
        }
        let (dir, dtype) = (self.dir, self.dtype);
        let bytes = values.len() as u64 * dtype.bytes();
        self.room(bytes)?;
        self.put(name, dtype.safetensors_name(), shape, bytes, |out| {
            write_values(out, name, values, dtype, dir)
        })
    }

    fn four_bit(&mut self, name: &str, tensor: &FourBitTensor) -> Result<(), SaveError> {
        self.room(tensor.bytes() as u64)?;
        let codes = tensor.codes();
        self.bytes(name, "U8", &[codes.len(), 1], codes)?;
        match tensor.absmax() {
            Absmax::Plain(scales) => self.floats(&format!("{name}.absmax"), scales)?,
            Absmax::Nested { blocks, .. } => {
                let scales = &blocks.codes;
                self.bytes(&format!("{name}.absmax"), "U8", &[scales.len()], scales)?;
                self.floats(&format!("{name}.nested_absmax"), &blocks.absmax)?;
                self.floats(&format!("{name}.nested_quant_map"), &blocks.map)?;
            }
        }
        self.floats(&format!("{name}.quant_map"), tensor.kind().table())?;
        let state = tensor.state();
        let text = state.to_json();
        self.bytes(
            &format!("{name}.{}", state.key()),
            "U8",
            &[text.len()],
            &text,
        )
    }

    fn int8(&mut self, module: &str, rows: &Int8Rows) -> Result<(), SaveError> {
        self.room(rows.bytes() as u64)?;
        let codes: Vec<u8> = rows.codes().iter().map(|c| c.cast_unsigned()).collect();
        self.bytes(&format!("{module}.weight"), "I8", &rows.shape(), &codes)?;
        self.floats(&format!("{module}.SCB"), rows.absmax())?;
        self.bytes(&format!("{module}.weight_format"), "U8", &[], &[0])
    }

    /// Writes the files with their headers, and the index where there are several.
    fn finish(mut self) -> Result<(Vec<String>, u64), SaveError> {
        self.close()?;
        let count = self.full.len();
        let (mut files, mut weight_map) = (Vec::new(), Map::new());
        for (number, (mut header, mut data)) in self.full.into_iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            for tensor in header.keys() {
                weight_map.insert(tensor.clone(), name.clone().into());
            }
            header.insert("__metadata__".into(), json!({"format": "pt"}));
            let text = header_text(header);
            let path = self.dir.join(&name);
            let mut out = File::create(&path).map_err(io(&path))?;
            data.seek(SeekFrom::Start(0)).map_err(io(&path))?;
            out.write_all(&(text.len() as u64).to_le_bytes())
                .and_then(|()| out.write_all(&text))
                .and_then(|()| std::io::copy(&mut data, &mut out))
                .and_then(|_| out.sync_all())
                .map_err(io(&path))?;
            files.push(name);
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": self.total}, "weight_map": weight_map});
            let name = "model.safetensors.index.json";
            write_json(&self.dir.join(name), &index)?;
            files.push(name.to_owned());
        }
        Ok((files, self.total))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

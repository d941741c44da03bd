//! Writing a model as a directory whose linear layers bitsandbytes has quantised, tensor by tensor: what
//! transformers saves of a model that was loaded with a `BitsAndBytesConfig`.

use std::path::Path;

use enamel_adapter::{ModuleKind, ModuleShape};
use enamel_kernels::PackedRows;
use enamel_kernels::quantized::formats::{
    Absmax, BLOCK_SIZES, FloatKind, NESTED_BLOCK, NestedState, QuantState,
};
use serde_json::{Value, json};

use super::shard::{Group, Part, PartType, Shard};
use super::{
    SaveDtype, SaveError, SaveOptions, SavedModel, saved_config, write_directory, write_values,
};
use crate::arch::ArchConfig;
use crate::checkpoint::{Checkpoint, TensorSource};
use crate::model::{Model, StoredNames};
use crate::quantization::{Format, Quantization};

/// What was quantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantisedModel {
    /// The files.
    pub saved: SavedModel,
    /// Linear layers that were quantised.
    pub layers: usize,
    /// Linear layers that were left as they are, without `lm_head`.
    pub skipped: usize,
}

/// How the tensors of a model are written: each in `options.dtype`, but for the linear layers that are quantised.
struct Writing<'a> {
    source: &'a Checkpoint,
    /// Under which names the source has its weights.
    stored: StoredNames,
    modules: Vec<ModuleShape>,
    format: Format,
    skip: Quantization,
    dtype: SaveDtype,
}

/// Quantises the linear layers of `source` but for `lm_head` and `skip_modules`, and writes the model to `dir`
/// with a `quantization_config`. One tensor at a time is in memory; `dir` appears when it is complete.
///
/// # Errors
/// A model that is quantised by bitsandbytes already; all `skip_modules` that name nothing; all layers that are no whole
/// number of blocks; a directory that holds something, unless it may be overwritten. Then nothing is written.
pub fn write_bitsandbytes(
    dir: &Path,
    source: &Checkpoint,
    config: &ArchConfig,
    format: Format,
    skip_modules: &[String],
    options: &SaveOptions,
) -> Result<QuantisedModel, SaveError> {
    let (config, stored) = Model::fit(config, source)?;
    let writing = Writing {
        source,
        stored,
        modules: config.modules(),
        format,
        skip: Quantization {
            format: Some(format),
            skip_modules: skip_modules.to_vec(),
            dequantize: false,
        },
        dtype: options.dtype,
    };
    writing.check()?;
    let groups: Vec<Group> = writing
        .modules
        .iter()
        .flat_map(|module| writing.groups(module))
        .collect();
    let tensors: Vec<_> = writing
        .modules
        .iter()
        .flat_map(ModuleShape::tensors)
        .collect();
    let mut json = saved_config(source.config_json(), &tensors, options.dtype);
    if let Some(map) = json.as_object_mut() {
        let settings = quantization_config(format, skip_modules);
        map.insert("quantization_config".into(), settings);
    }
    let mut fill = |group: &Group, shard: &mut Shard| writing.fill(group, shard);
    let saved = write_directory(dir, &groups, &mut fill, &json, source, options)?;
    let linear = writing
        .modules
        .iter()
        .filter(|m| m.kind == ModuleKind::Linear);
    let (packed, dense): (Vec<_>, Vec<_>) = linear.partition(|m| writing.packs(m));
    Ok(QuantisedModel {
        saved,
        layers: packed.len(),
        skipped: dense.len(),
    })
}

impl Writing<'_> {
    fn packs(&self, module: &ModuleShape) -> bool {
        module.kind == ModuleKind::Linear && !self.skip.skips(&module.name)
    }

    /// Finds before the work what would stop it.
    fn check(&self) -> Result<(), SaveError> {
        let mut problems = Vec::new();
        if self.source.packed().values().any(|p| p.bitsandbytes) {
            problems.push(
                "bitsandbytes has quantised it already; take the model as it was before".to_owned(),
            );
        }
        if self.modules.iter().any(|module| module.transposed) {
            problems.push(
                "its layers lie transposed in their files (Conv1D), which is not written quantised; quantise it while it \
                 is loaded (--load-in-4bit)"
                    .to_owned(),
            );
        }
        if let Err(error) = self.skip.check(&self.modules) {
            problems.push(error.to_string());
        }
        if let Format::FourBit { block, .. } = self.format {
            if BLOCK_SIZES.contains(&block) {
                let odd = self.modules.iter().filter(|module| {
                    self.packs(module) && module.shape.iter().product::<usize>() % block != 0
                });
                problems.extend(odd.map(|module| {
                    format!(
                        "{}.weight of shape {:?} is no whole number of blocks of {block} values; choose a smaller \
                         block size, or skip the layer",
                        module.name, module.shape
                    )
                }));
            } else {
                problems.push(format!(
                    "the block size {block} is not one of {BLOCK_SIZES:?}"
                ));
            }
        }
        if !self.modules.iter().any(|module| self.packs(module)) {
            problems.push("every linear layer is skipped, which leaves nothing to do".to_owned());
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(SaveError::Quantise(problems)),
        }
    }

    fn groups(&self, module: &ModuleShape) -> Vec<Group> {
        let dense = |(name, shape): (String, Vec<usize>)| {
            let packs = self.packs(module) && name.ends_with(".weight");
            match packs {
                true => packed_group(&module.name, &shape, self.format, self.float_kind()),
                false => Group::dense(&name, &shape, self.dtype.part()),
            }
        };
        module.tensors().into_iter().map(dense).collect()
    }

    fn fill(&self, group: &Group, shard: &mut Shard) -> Result<(), SaveError> {
        let weight = group.name.strip_suffix(".weight");
        let module = weight.and_then(|name| self.modules.iter().find(|m| m.name == name));
        let name = match module {
            Some(module) => self.stored.weight(&module.name),
            None => group.name.clone(),
        };
        let mut values = self.source.read_f32(&name)?;
        let Some(module) = module.filter(|module| self.packs(module)) else {
            return write_values(shard, &group.name, &values, self.dtype);
        };
        let &[rows, columns] = module.shape.as_slice() else {
            return Err(SaveError::WrongLength {
                name: group.name.clone(),
                shape: module.shape.clone(),
                found: values.len(),
            });
        };
        let kind = self.float_kind();
        let packed = self
            .format
            .quantise(&group.name, &mut values, [rows, columns], kind)?;
        drop(values);
        put_rows(shard, &module.name, &packed)
    }

    fn float_kind(&self) -> FloatKind {
        match self.dtype {
            SaveDtype::F32 => FloatKind::F32,
            SaveDtype::F16 => FloatKind::F16,
            SaveDtype::BF16 => FloatKind::Bf16,
        }
    }
}

/// The tensors that bitsandbytes has for a linear layer's weight.
fn packed_group(module: &str, shape: &[usize], format: Format, dtype: FloatKind) -> Group {
    let weight = format!("{module}.weight");
    let part = |name: String, dtype, shape: &[usize]| Part {
        name,
        dtype,
        shape: shape.to_vec(),
        open: false,
    };
    let count: usize = shape.iter().product();
    let parts = match format {
        Format::Int8 { .. } => vec![
            part(weight.clone(), PartType::I8, shape),
            part(
                format!("{module}.SCB"),
                PartType::F32,
                shape.get(..1).unwrap_or(&[]),
            ),
            part(format!("{module}.weight_format"), PartType::U8, &[]),
        ],
        Format::FourBit {
            kind,
            block,
            double,
            ..
        } => {
            let scales = count.div_ceil(block);
            let named = |what: &str| format!("{weight}.{what}");
            let mut parts = vec![
                part(weight.clone(), PartType::U8, &[count.div_ceil(2), 1]),
                part(
                    named("absmax"),
                    if double { PartType::U8 } else { PartType::F32 },
                    &[scales],
                ),
                part(named("quant_map"), PartType::F32, &[16]),
            ];
            if double {
                let nested = [scales.div_ceil(NESTED_BLOCK)];
                parts.push(part(named("nested_absmax"), PartType::F32, &nested));
                parts.push(part(named("nested_quant_map"), PartType::F32, &[256]));
            }
            let state = QuantState {
                kind,
                block,
                dtype,
                shape: shape.to_vec(),
                nested: double.then_some(NestedState {
                    block: NESTED_BLOCK,
                    offset: 0.0,
                }),
            };
            parts.push(Part {
                name: named(&state.key()),
                dtype: PartType::U8,
                shape: vec![state.to_json().len() + OFFSET_SLACK],
                open: true,
            });
            parts
        }
    };
    Group {
        name: weight,
        parts,
    }
}

/// What the text of an offset may have more than "0.0": a sign, seventeen digits, a point and an exponent.
const OFFSET_SLACK: usize = 24;

fn put_rows(shard: &mut Shard, module: &str, rows: &PackedRows) -> Result<(), SaveError> {
    let weight = format!("{module}.weight");
    match rows {
        PackedRows::Int8 { rows, .. } => {
            let codes: Vec<u8> = rows
                .codes()
                .iter()
                .map(|code| code.cast_unsigned())
                .collect();
            shard.put(&weight, &codes)?;
            shard.put(&format!("{module}.SCB"), &floats(rows.absmax()))?;
            // 0: row by row.
            shard.put(&format!("{module}.weight_format"), &[0])
        }
        PackedRows::FourBit(tensor) => {
            let named = |what: &str| format!("{weight}.{what}");
            shard.put(&weight, tensor.codes())?;
            match tensor.absmax() {
                Absmax::Plain(scales) => shard.put(&named("absmax"), &floats(scales))?,
                Absmax::Nested { blocks, .. } => {
                    shard.put(&named("absmax"), &blocks.codes)?;
                    shard.put(&named("nested_absmax"), &floats(&blocks.absmax))?;
                    shard.put(&named("nested_quant_map"), &floats(&blocks.map))?;
                }
            }
            shard.put(&named("quant_map"), &floats(tensor.kind().table()))?;
            let state = tensor.state();
            shard.put(&named(&state.key()), &state.to_json())
        }
        PackedRows::Blocks(_) => Err(SaveError::Quantise(vec![format!(
            "{weight} is in blocks of GGUF"
        )])),
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// `BitsAndBytesConfig.to_dict()`, with transformers' defaults for what the format has no use for.
fn quantization_config(format: Format, skip_modules: &[String]) -> Value {
    let (four, kind, double, compute, threshold) = match format {
        Format::FourBit {
            kind,
            double,
            compute,
            ..
        } => (true, kind.name(), double, compute, 6.0),
        Format::Int8 { threshold } => (false, "fp4", false, FloatKind::F32, threshold),
    };
    // A list of one's own takes the place of the one that transformers finds, in which the head is.
    let skipped = match skip_modules {
        [] => Value::Null,
        names => {
            let head = "lm_head".to_owned();
            let own = !names.contains(&head);
            names.iter().chain(own.then_some(&head)).cloned().collect()
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
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": f64::from(threshold),
        "load_in_4bit": four,
        "load_in_8bit": !four,
        "quant_method": "bitsandbytes",
    })
}

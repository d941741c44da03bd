//! How a model's weights are held once they are read: what products multiply, and which linear layers are
//! quantised on the way in.

use burn::tensor::Device;
use enamel_adapter::{ModuleKind, ModuleShape};
use enamel_kernels::quantized::formats::{
    FloatKind, FourBit, FourBitOptions, FourBitTensor, Int8Rows, NESTED_BLOCK, QuantError,
};
use enamel_kernels::{Compute, HostValues, PackedRows, PackedWeight};

use crate::checkpoint::{SourceDtype, TensorSource};
use crate::error::LoadError;
use crate::heads::is_head;

/// How to hold what is loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loading {
    /// What products round their factors to.
    pub compute: Compute,
    /// What becomes of linear layers.
    pub quantization: Quantization,
    /// Decides the first values of a head that the files do not have.
    pub seed: u64,
}

impl Loading {
    /// The values of a linear layer's weight, row-major in f32, as its products read them once it is packed:
    /// quantised and dequantised. `None` where it is not packed. With the module's name goes whether its weight is
    /// stored as `[in, out]`.
    ///
    /// # Errors
    /// Values that the file does not give, or that the format cannot hold.
    pub fn dequantised(
        &self,
        source: &dyn TensorSource,
        module: (&str, bool),
        device: &Device,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        let packed = self
            .quantization
            .pack(source, module, self.compute, device)?;
        Ok(packed.map(|weight| weight.values()))
    }
}

impl From<Compute> for Loading {
    fn from(compute: Compute) -> Self {
        Self {
            compute,
            ..Self::default()
        }
    }
}

/// What becomes of the linear layers, as `BitsAndBytesConfig` says it; embedding, norms, biases and `lm_head`
/// are never quantised.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantization {
    /// What to quantise them to.
    pub format: Option<Format>,
    /// Layers to leave dense: names, their beginnings up to a dot, or their ends.
    pub skip_modules: Vec<String>,
    /// Hold dense what the file has quantised.
    pub dequantize: bool,
}

/// A format that weights are quantised to while they are loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    /// bitsandbytes' 4 bits.
    FourBit {
        /// What codes stand for.
        kind: FourBit,
        /// Weights that share a scale.
        block: usize,
        /// Whether scales are quantised too.
        double: bool,
        /// What a weight is rounded to when it is read.
        compute: FloatKind,
    },
    /// LLM.int8().
    Int8 {
        /// The magnitude from which inputs are multiplied in floating point.
        threshold: f32,
    },
}

impl Format {
    /// Its name: `nf4`, `fp4` or `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::FourBit { kind, .. } => kind.name(),
            Self::Int8 { .. } => "int8",
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u64 {
        match self {
            Self::FourBit { .. } => 4,
            Self::Int8 { .. } => 8,
        }
    }

    /// Bytes that a matrix of so many rows and columns takes in it.
    pub fn bytes(self, [rows, columns]: [usize; 2]) -> usize {
        let values = rows * columns;
        let float = size_of::<f32>();
        match self {
            Self::FourBit { block, double, .. } => {
                let scales = values.div_ceil(block);
                let nested = scales + (scales.div_ceil(NESTED_BLOCK) + 256) * float + float;
                values.div_ceil(2) + if double { nested } else { scales * float }
            }
            Self::Int8 { .. } => values + rows * float,
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::FourBit {
                kind,
                block,
                double,
                compute,
            } => write!(
                f,
                "{} in blocks of {block}{}, read as {}",
                kind.name(),
                if double { ", scales quantised too" } else { "" },
                compute.name()
            ),
            Self::Int8 { threshold } => write!(f, "int8 rows, outliers from {threshold}"),
        }
    }
}

impl Quantization {
    /// Every weight dense, whatever the file has.
    pub fn dense() -> Self {
        Self {
            dequantize: true,
            ..Self::default()
        }
    }

    /// How many of the modules' weights are quantised while loading, and the bytes that they take then.
    pub fn packed_bytes(&self, modules: &[ModuleShape]) -> (usize, usize) {
        let Some(format) = self.format else {
            return (0, 0);
        };
        let packed = modules
            .iter()
            .filter(|module| module.kind == ModuleKind::Linear && !self.skips(&module.name));
        packed.fold((0, 0), |(weights, bytes), module| match *module.shape {
            [rows, columns] => (
                weights + rows * columns,
                bytes + format.bytes([rows, columns]),
            ),
            _ => (weights, bytes),
        })
    }

    /// Whether the linear layer `module` is left dense.
    pub fn skips(&self, module: &str) -> bool {
        is_head(module) || self.skip_modules.iter().any(|name| names(name, module))
    }

    /// Refuses `skip_modules` that name no linear layer of the model.
    ///
    /// # Errors
    /// All of them, each with the nearest name there is.
    pub fn check(&self, modules: &[ModuleShape]) -> Result<(), LoadError> {
        let linear = || {
            let linear = modules
                .iter()
                .filter(|module| matches!(module.kind, ModuleKind::Linear | ModuleKind::Head));
            linear.map(|module| module.name.as_str())
        };
        let strange = self
            .skip_modules
            .iter()
            .filter(|name| !linear().any(|module| names(name, module)))
            .map(|name| (name.clone(), nearest(name, linear())));
        let strange: Vec<_> = strange.collect();
        match strange.is_empty() {
            true => Ok(()),
            false => Err(LoadError::SkipModules(strange)),
        }
    }

    /// The weight of a linear layer as it is to be held, if that is packed: as the file has it, or quantised
    /// from the values in it, which are stored as `[in, out]` if `transposed`.
    pub(crate) fn pack(
        &self,
        source: &dyn TensorSource,
        (module, transposed): (&str, bool),
        compute: Compute,
        device: &Device,
    ) -> Result<Option<PackedWeight>, LoadError> {
        let is_bitsandbytes =
            |rows: &PackedRows| matches!(rows, PackedRows::FourBit(_) | PackedRows::Int8 { .. });
        if transposed {
            let name = format!("{module}.weight");
            if source
                .read_packed(&name)?
                .is_some_and(|rows| is_bitsandbytes(&rows))
            {
                return Err(LoadError::TransposedPacked { name });
            }
        }
        if self.skips(module) || self.dequantize {
            return Ok(None);
        }
        let name = format!("{module}.weight");
        let wrong = |source| LoadError::Quantise {
            name: name.clone(),
            source,
        };
        if let Some(rows) = source.read_packed(&name)? {
            let made_by_bitsandbytes = is_bitsandbytes(&rows);
            // What is asked for by name wins over a GGUF file's blocks, not over the same kind of codes.
            if made_by_bitsandbytes || self.format.is_none() {
                let read_as = match (&rows, self.format) {
                    (PackedRows::FourBit(_), Some(Format::FourBit { compute, .. })) => compute,
                    (PackedRows::FourBit(_), None) => source.packed_compute(),
                    _ => FloatKind::F32,
                };
                return PackedWeight::new(rows, read_as, device)
                    .map(Some)
                    .map_err(wrong);
            }
        }
        let Some(format) = self.format else {
            return Ok(None);
        };
        let info = source.tensors().iter().find(|info| info.name == name);
        let Some(info) = info else {
            return Ok(None);
        };
        let dtype = match (compute, info.dtype) {
            (Compute::Bf16, _) | (_, SourceDtype::BF16) => FloatKind::Bf16,
            (_, SourceDtype::F16) => FloatKind::F16,
            (_, SourceDtype::F32 | SourceDtype::Quantised) => FloatKind::F32,
        };
        let (mut shape, mut values) = (info.shape.clone(), source.read_f32(&name)?);
        if transposed && let [_, out] = shape.as_slice() {
            values = HostValues::F32(values).transposed(*out).into_f32();
            shape.reverse();
        }
        format.pack(&name, &shape, values, dtype, device).map(Some)
    }

    /// What becomes of new values of the linear layer `module`, row-major of `shape` and stored as `dtype`,
    /// when they are quantised again and dequantised. They stay as they are where the layer is left dense.
    ///
    /// # Errors
    /// Values that the format cannot hold.
    pub fn requantised(
        &self,
        module: &str,
        shape: &[usize],
        values: Vec<f32>,
        dtype: FloatKind,
        device: &Device,
    ) -> Result<Vec<f32>, LoadError> {
        let Some(format) = self.format.filter(|_| !self.skips(module)) else {
            return Ok(values);
        };
        let name = format!("{module}.weight");
        Ok(format.pack(&name, shape, values, dtype, device)?.values())
    }
}

impl Format {
    /// The values of the tensor `name`, row-major, packed for a device; see [`Self::quantise`].
    fn pack(
        self,
        name: &str,
        shape: &[usize],
        mut values: Vec<f32>,
        dtype: FloatKind,
        device: &Device,
    ) -> Result<PackedWeight, LoadError> {
        let wrong = |source| LoadError::Quantise {
            name: name.to_owned(),
            source,
        };
        let &[out, width] = shape else {
            return Err(wrong(QuantError::NotMatrix(shape.to_vec())));
        };
        let read_as = match self {
            Self::FourBit { compute, .. } => compute,
            Self::Int8 { .. } => FloatKind::F32,
        };
        let rows = self.quantise(name, &mut values, [out, width], dtype)?;
        PackedWeight::new(rows, read_as, device).map_err(wrong)
    }

    /// Quantises the values of the tensor `name`, after rounding them to `dtype`, the type that the weight has.
    ///
    /// # Errors
    /// A matrix that is no whole number of blocks; values that are not finite.
    pub(crate) fn quantise(
        self,
        name: &str,
        values: &mut [f32],
        shape: [usize; 2],
        dtype: FloatKind,
    ) -> Result<PackedRows, LoadError> {
        let wrong = |source| LoadError::Quantise {
            name: name.to_owned(),
            source,
        };
        round(values, dtype);
        match self {
            Self::FourBit {
                kind,
                block,
                double,
                ..
            } => {
                if !values.len().is_multiple_of(block) {
                    return Err(LoadError::Blocks {
                        name: name.to_owned(),
                        shape,
                        block,
                    });
                }
                let options = FourBitOptions {
                    kind,
                    block,
                    double,
                    dtype,
                };
                let tensor = FourBitTensor::quantise(values, &shape, options);
                Ok(PackedRows::FourBit(tensor.map_err(wrong)?))
            }
            Self::Int8 { threshold } => {
                // bitsandbytes casts to half precision before it takes a row's largest magnitude.
                round(values, FloatKind::F16);
                let rows = Int8Rows::quantise(values, shape).map_err(wrong)?;
                Ok(PackedRows::Int8 { rows, threshold })
            }
        }
    }
}

fn round(values: &mut [f32], kind: FloatKind) {
    if kind != FloatKind::F32 {
        for value in values {
            *value = kind.round(*value);
        }
    }
}

/// As transformers matches `llm_int8_skip_modules`: the whole name, its beginning up to a dot, or its end.
fn names(pattern: &str, module: &str) -> bool {
    let rest = module.strip_prefix(pattern);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || pattern.ends_with('.'))
        || module.ends_with(pattern)
}

/// The module, or the last part of one, that is most like `name`.
fn nearest<'a>(name: &str, modules: impl Iterator<Item = &'a str>) -> Option<String> {
    modules
        .flat_map(|module| [module, module.rsplit('.').next().unwrap_or(module)])
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use enamel_adapter::{Adaptable, SlotRef};
    use serde_json::json;

    use super::*;
    use crate::testing::{MemorySource, devices, distance, ids, tiny_config, values};
    use crate::{Model, ModelInput};

    const NF4: Format = Format::FourBit {
        kind: FourBit::Nf4,
        block: 32,
        double: true,
        compute: FloatKind::F32,
    };

    fn config() -> crate::ArchConfig {
        tiny_config(json!({"intermediate_size": 32, "attention_bias": true}))
    }

    fn source() -> MemorySource {
        MemorySource::of(&Model::random(&config(), 1, &Device::flex()).unwrap())
    }

    fn load(
        source: &MemorySource,
        device: &Device,
        format: Format,
        skip: &[&str],
    ) -> Result<Model, LoadError> {
        let loading = Loading {
            quantization: Quantization {
                format: Some(format),
                skip_modules: skip.iter().map(|name| (*name).to_owned()).collect(),
                dequantize: false,
            },
            ..Loading::default()
        };
        Model::load_for(&config(), source, device, &loading)
    }

    #[test]
    fn linear_layers_are_packed_and_head_and_skipped_ones_are_not() {
        let skip = ["down_proj", "model.layers.1"];
        for format in [NF4, Format::Int8 { threshold: 6.0 }] {
            let model = load(&source(), &Device::flex(), format, &skip).unwrap();
            let (mut packed, mut bytes) = (0, 0);
            model.for_each_slot_ref(&mut |name, slot| {
                let SlotRef::Linear(linear) = slot else {
                    return;
                };
                let dense = name.ends_with("down_proj") || name.contains("layers.1.");
                assert_eq!(
                    linear.weight.packed().is_none(),
                    dense || name == "lm_head",
                    "{name}"
                );
                if let Some(weight) = linear.weight.packed() {
                    assert_eq!(weight.rows().name(), format.name());
                    packed += weight.dims().iter().product::<usize>();
                    bytes += weight.bytes();
                }
            });
            let quantization = Quantization {
                format: Some(format),
                skip_modules: skip.map(str::to_owned).to_vec(),
                dequantize: false,
            };
            let counted = quantization.packed_bytes(&config().modules());
            assert_eq!(counted, (packed, bytes), "what the plan says");
        }
    }

    #[test]
    fn a_packed_model_computes_what_the_dense_one_of_its_values_does() {
        for device in devices() {
            let packed = load(&source(), &device, NF4, &[]).unwrap();
            let dense = Model::load(&config(), &MemorySource::of(&packed), &device).unwrap();
            let logits = |model: &Model| {
                let input = ModelInput::new(ids(&[&[1, 2, 3, 4, 5]], &device));
                values(model.logits(model.forward_hidden(&input, None).reshape([5, 16])))
            };
            // Both add the same products, in another order.
            let gap = distance(&logits(&packed), &logits(&dense));
            assert!(gap < 1e-5, "{gap}");
        }
    }

    #[test]
    fn values_that_were_quantised_stay_as_they_are_when_they_are_again() {
        let (source, device) = (source(), Device::flex());
        let (module, shape) = ("model.layers.0.mlp.up_proj", [32, 16]);
        let four_bit = Format::FourBit {
            kind: FourBit::Nf4,
            block: 32,
            double: false,
            compute: FloatKind::F32,
        };
        let mut loading = Loading::default();
        let values = loading
            .dequantised(&source, (module, false), &device)
            .unwrap();
        assert_eq!(values, None, "nothing is to be packed");
        loading.quantization.format = Some(four_bit);
        let once = loading
            .dequantised(&source, (module, false), &device)
            .unwrap();
        let once = once.unwrap();
        assert_ne!(once, source.read_f32(&format!("{module}.weight")).unwrap());
        let again = |loading: &Loading| {
            let quantization = &loading.quantization;
            quantization.requantised(module, &shape, once.clone(), FloatKind::F32, &device)
        };
        // Every block has its largest magnitude and sixteen of its numbers already.
        assert_eq!(again(&loading).unwrap(), once);
        let odd = vec![0.3; 512];
        loading.quantization.skip_modules.push("up_proj".to_owned());
        let quantization = &loading.quantization;
        let kept = quantization.requantised(module, &shape, odd.clone(), FloatKind::F32, &device);
        assert_eq!(kept.unwrap(), odd, "a skipped layer");
    }

    #[test]
    fn names_that_no_layer_has_are_refused_with_the_nearest() {
        let error = load(
            &source(),
            &Device::flex(),
            NF4,
            &["down_prj", "lm_head", "zzz"],
        );
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("down_prj (did you mean down_proj?)"),
            "{text}"
        );
        assert!(text.contains("zzz (no linear"), "{text}");
        assert!(!text.contains("lm_head ("), "{text}");
    }

    #[test]
    fn a_weight_that_is_no_whole_number_of_blocks_is_refused_by_name() {
        let format = Format::FourBit {
            kind: FourBit::Fp4,
            block: 4096,
            double: false,
            compute: FloatKind::F32,
        };
        let text = load(&source(), &Device::flex(), format, &[])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("model.layers.0.self_attn.q_proj.weight"),
            "{text}"
        );
        assert!(
            text.contains("blocks of 4096") && text.contains("help:"),
            "{text}"
        );
    }

    #[test]
    fn a_weight_with_a_number_that_is_none_is_refused_by_name() {
        let mut source = source();
        let name = "model.layers.1.mlp.up_proj.weight";
        source.put(name, &[32, 16], vec![f32::NAN; 512]);
        let text = load(&source, &Device::flex(), NF4, &[])
            .unwrap_err()
            .to_string();
        assert!(text.contains(name) && text.contains("help:"), "{text}");
    }
}

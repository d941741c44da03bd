//! The `quant_state` of a bitsandbytes checkpoint: JSON beside a 4-bit weight's tensors.

use serde_json::{Map, Value};

use super::{BLOCK_SIZES, FloatKind, FourBit, QuantError};

/// What a checkpoint says of a 4-bit weight, in the tensor `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), whose
/// bytes are JSON.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// `quant_type`.
    pub kind: FourBit,
    /// `blocksize`.
    pub block: usize,
    /// `dtype`: of the weight before it was quantised.
    pub dtype: FloatKind,
    /// `shape`: of the weight before.
    pub shape: Vec<usize>,
    /// Present if the scales are quantised.
    pub nested: Option<NestedState>,
}

/// What it says of quantised scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedState {
    /// `nested_blocksize`.
    pub block: usize,
    /// `nested_offset`: the scales' mean.
    pub offset: f32,
}

impl QuantState {
    /// Reads the tensor's bytes. Fails where they are no JSON object, a key is missing or of another kind, or a
    /// name or block size is not one of bitsandbytes'.
    pub fn parse(bytes: &[u8]) -> Result<Self, QuantError> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| QuantError::State(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(QuantError::State("it is not a JSON object".to_string()));
        };
        let kind = FourBit::from_name(text(&map, "quant_type")?)?;
        let block = size(&map, "blocksize")?;
        if !BLOCK_SIZES.contains(&block) {
            return Err(QuantError::BlockSize(block));
        }
        let dtype = FloatKind::from_name(text(&map, "dtype")?)?;
        let dims = get(&map, "shape")?.as_array();
        let shape = dims.and_then(|dims| dims.iter().map(as_size).collect());
        let shape = shape.ok_or_else(|| wrong("shape", "a list of sizes"))?;
        let nested = if map.keys().any(|key| key.starts_with("nested_")) {
            let inner = text(&map, "nested_dtype")?;
            if inner != FloatKind::F32.name() {
                return Err(wrong("nested_dtype", "\"float32\""));
            }
            let block = size(&map, "nested_blocksize")?;
            if block == 0 {
                return Err(wrong("nested_blocksize", "above zero"));
            }
            let offset = get(&map, "nested_offset")?.as_f64();
            let offset = offset.map(|o| o as f32).filter(|o| o.is_finite());
            let offset = offset.ok_or_else(|| wrong("nested_offset", "a number that f32 holds"))?;
            Some(NestedState { block, offset })
        } else {
            None
        };
        Ok(Self {
            kind,
            block,
            dtype,
            shape,
            nested,
        })
    }

    /// The bytes bitsandbytes writes for it: Python's spacing, its order of keys and its way with numbers.
    pub fn to_json(&self) -> Vec<u8> {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut out = format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": [{}]",
            self.kind.name(),
            self.block,
            self.dtype.name(),
            shape.join(", ")
        );
        if let Some(nested) = self.nested {
            out += &format!(
                ", \"nested_blocksize\": {}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
                nested.block,
                python_float(f64::from(nested.offset))
            );
        }
        out.push('}');
        out.into_bytes()
    }

    /// What follows the weight's name in the key of the tensor.
    pub fn key(&self) -> String {
        format!("quant_state.bitsandbytes__{}", self.kind.name())
    }
}

/// A number as Python's `repr` has it: both write the fewest digits, but their exponents look different.
fn python_float(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

fn get<'a>(map: &'a Map<String, Value>, key: &str) -> Result<&'a Value, QuantError> {
    map.get(key)
        .ok_or_else(|| QuantError::State(format!("it has no `{key}`")))
}

fn text<'a>(map: &'a Map<String, Value>, key: &str) -> Result<&'a str, QuantError> {
    let text = get(map, key)?.as_str();
    text.ok_or_else(|| wrong(key, "text"))
}

fn size(map: &Map<String, Value>, key: &str) -> Result<usize, QuantError> {
    as_size(get(map, key)?).ok_or_else(|| wrong(key, "a size"))
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn wrong(key: &str, must: &str) -> QuantError {
    QuantError::State(format!("its `{key}` must be {must}"))
}

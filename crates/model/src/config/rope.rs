//! Rotary position embedding: its settings and the cosine and sine tables.
//!
//! The formulas are those of transformers' `modeling_rope_utils.py`, step by step in f32 as there,
//! so that the angles agree to the last bits.
// Sums of sizes that have been checked, and of positions.
#![allow(clippy::arithmetic_side_effects)]

use std::f32::consts::PI;

use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Map, Value};

use crate::config::Reader;

/// How positions are stretched beyond the length the model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// A base that grows with the sequence once it is longer than `max_position_embeddings` (NTK).
    Dynamic {
        /// Steepness of the growth.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a linear blend between (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original: usize,
    },
    /// A blend by dimension, and a factor on cosine and sine (YaRN, arXiv 2309.00071).
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Whether the blend's ends are rounded to whole dimensions.
        truncate: bool,
        /// Context length of pretraining.
        original: usize,
    },
}

/// The rotary settings of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling.
    pub scaling: RopeScaling,
    /// `max_position_embeddings`, from which dynamic scaling starts.
    pub max_positions: usize,
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self {
            theta: 10_000.0,
            scaling: RopeScaling::Default,
            max_positions: 2048,
        }
    }
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4); `theta` is the base where
    /// neither says one.
    pub(crate) fn from_config(
        config: &Map<String, Value>,
        max_positions: usize,
        theta: f64,
    ) -> Result<Self, Vec<String>> {
        let empty = Map::new();
        let mut outer = Reader {
            map: config,
            prefix: "",
            problems: Vec::new(),
        };
        let theta = outer.number("rope_theta", Some(theta));
        let mut key = "rope_scaling";
        let mut map = &empty;
        // A non-empty `rope_scaling` wins, as in transformers.
        for (name, prefix) in [
            ("rope_parameters", "rope_parameters."),
            ("rope_scaling", "rope_scaling."),
        ] {
            match outer.get(name) {
                Some(Value::Object(found)) if !found.is_empty() => (key, map) = (prefix, found),
                None | Some(Value::Object(_)) => {}
                Some(other) => outer.problem(name, format_args!("must be an object, not {other}")),
            }
        }
        let mut read = Reader {
            map,
            prefix: key,
            problems: outer.problems,
        };
        let theta = read.number("rope_theta", Some(theta));
        for rotary in [
            config.get("partial_rotary_factor"),
            map.get("partial_rotary_factor"),
        ] {
            if rotary.is_some_and(|v| !v.is_null() && v.as_f64() != Some(1.0)) {
                read.problem("partial_rotary_factor", "other than 1 is not supported");
            }
        }
        let kind = match read.get("rope_type").or_else(|| read.get("type")) {
            None => "default",
            Some(Value::String(kind)) => kind,
            Some(_) => "not a name",
        };
        let original = |read: &mut Reader<'_>| {
            let default = Some(max_positions);
            let inner = read.size("original_max_position_embeddings", default);
            // The outer key, where a model has one, takes precedence there too.
            match config
                .get("original_max_position_embeddings")
                .and_then(Value::as_u64)
            {
                Some(n) if n > 0 => n as usize,
                _ => inner,
            }
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: read.number("factor", None),
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: read.number("factor", None),
            },
            "llama3" => RopeScaling::Llama3 {
                factor: read.number("factor", None),
                low_freq_factor: read.number("low_freq_factor", None),
                high_freq_factor: read.number("high_freq_factor", None),
                original: original(&mut read),
            },
            "yarn" => {
                let original = original(&mut read);
                let factor = read.number("factor", Some(max_positions as f64 / original as f64));
                let nonzero = |key| {
                    read.get(key)
                        .and_then(Value::as_f64)
                        .filter(|value| *value != 0.0)
                };
                let attention_factor = match (nonzero("mscale"), nonzero("mscale_all_dim")) {
                    (Some(a), Some(b)) => yarn_mscale(factor, a) / yarn_mscale(factor, b),
                    _ => yarn_mscale(factor, 1.0),
                };
                let (fast, slow) = (nonzero("beta_fast"), nonzero("beta_slow"));
                RopeScaling::Yarn {
                    factor,
                    attention_factor: read.number("attention_factor", Some(attention_factor)),
                    beta_fast: fast.unwrap_or(32.0),
                    beta_slow: slow.unwrap_or(1.0),
                    truncate: read.flag("truncate", true),
                    original,
                }
            }
            other => {
                let what = format_args!(
                    "'{other}' is not supported; supported are default, linear, dynamic, llama3, yarn"
                );
                read.problem("rope_type", what);
                RopeScaling::Default
            }
        };
        if read.problems.is_empty() {
            Ok(Self {
                theta,
                scaling,
                max_positions,
            })
        } else {
            Err(read.problems)
        }
    }

    /// How many tokens the model was made for: `max_position_embeddings`, and where positions are stretched beyond
    /// it, as far as they are. Llama 3.1's files count that in already, YaRN's with its own original length may
    /// or may not.
    pub fn context_length(&self) -> usize {
        let times = |length: usize, factor: f64| (length as f64 * factor.max(1.0)) as usize;
        match self.scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => self.max_positions,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                times(self.max_positions, factor)
            }
            RopeScaling::Yarn {
                factor, original, ..
            } => times(original, factor).max(self.max_positions),
        }
    }

    /// The angle per position of each pair of dimensions, for a sequence of `length` tokens
    /// (which matters to dynamic scaling only), and the factor on cosine and sine.
    pub fn frequencies(&self, head_dim: usize, length: usize) -> (Vec<f32>, f32) {
        let dim = head_dim as f32;
        let theta = self.theta as f32;
        let exponents: Vec<f32> = (0..head_dim / 2).map(|i| (2 * i) as f32 / dim).collect();
        let inverse = |base: f32| exponents.iter().map(move |e| 1.0 / base.powf(*e));
        match self.scaling {
            RopeScaling::Default => (inverse(theta).collect(), 1.0),
            RopeScaling::Linear { factor } => {
                (inverse(theta).map(|f| f / factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { .. } if length <= self.max_positions => {
                (inverse(theta).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor } => {
                let longer = factor as f32 * length as f32 / self.max_positions as f32;
                let growth = (longer - (factor - 1.0) as f32).powf(dim / (dim - 2.0));
                (inverse(theta * growth).collect(), 1.0)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => {
                let original = original as f32;
                let (factor, low, high) = (
                    factor as f32,
                    low_freq_factor as f32,
                    high_freq_factor as f32,
                );
                let scaled = inverse(theta).map(|f| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength > original / low {
                        f / factor
                    } else if wavelength < original / high {
                        f
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original,
            } => {
                let dim_of = |rotations: f64| {
                    head_dim as f64
                        * (original as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dim_of(beta_fast), dim_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001; // as the reference does, against 0 / 0
                }
                let blended = exponents.iter().enumerate().map(|(i, e)| {
                    let base = theta.powf(*e);
                    let (kept, stretched) = (1.0 / base, 1.0 / (factor as f32 * base));
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let keep = 1.0 - ramp;
                    stretched * (1.0 - keep) + kept * keep
                });
                (blended.collect(), attention_factor as f32)
            }
        }
    }

    /// Cosine and sine for positions `offset .. offset + tokens`, each `[tokens, head_dim / 2]`.
    pub fn tables(
        &self,
        head_dim: usize,
        offset: usize,
        tokens: usize,
        device: &Device,
    ) -> (Tensor<2>, Tensor<2>) {
        let (frequencies, factor) = self.frequencies(head_dim, offset + tokens);
        let half = frequencies.len();
        let (cos, sin): (Vec<f32>, Vec<f32>) = (offset..offset + tokens)
            .flat_map(|p| frequencies.iter().map(move |f| p as f32 * f))
            .map(|angle| (angle.cos() * factor, angle.sin() * factor))
            .unzip();
        let table = |values| Tensor::from_data(TensorData::new(values, [tokens, half]), device);
        (table(cos), table(sin))
    }
}

/// YaRN's recommended factor on cosine and sine (equation 22 of the paper).
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rope(parameters: Value) -> Result<RopeConfig, Vec<String>> {
        let config = json!({ "rope_parameters": parameters });
        RopeConfig::from_config(config.as_object().unwrap(), 64, 10_000.0)
    }

    #[test]
    fn dynamic_scaling_starts_beyond_the_trained_length() {
        let dynamic = rope(json!({"rope_type": "dynamic", "factor": 2.0})).unwrap();
        let plain = RopeConfig {
            scaling: RopeScaling::Default,
            ..dynamic.clone()
        };
        assert_eq!(dynamic.frequencies(16, 64), plain.frequencies(16, 64));
        let (longer, _) = dynamic.frequencies(16, 65);
        let (trained, _) = plain.frequencies(16, 65);
        assert_eq!(longer[0], trained[0]);
        assert!(longer[1..].iter().zip(&trained[1..]).all(|(a, b)| a < b));
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaled = rope(
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        )
        .unwrap();
        let plain = RopeConfig {
            scaling: RopeScaling::Default,
            ..scaled.clone()
        };
        let ((a, _), (b, _)) = (scaled.frequencies(16, 1), plain.frequencies(16, 1));
        assert_eq!(a[0], b[0]);
        assert_eq!(a[7], b[7] / 8.0);
    }

    #[test]
    fn yarn_scales_cosines_by_its_attention_factor() {
        let yarn = rope(json!({"rope_type": "yarn", "factor": 4.0})).unwrap();
        let (_, factor) = yarn.frequencies(16, 1);
        assert_eq!(factor, (0.1 * 4f64.ln() + 1.0) as f32);
        let (cos, sin) = yarn.tables(16, 0, 1, &Device::flex());
        assert_eq!(cos.into_data().try_to_vec::<f32>().unwrap(), [factor; 8]);
        assert_eq!(sin.into_data().try_to_vec::<f32>().unwrap(), [0.0; 8]);
    }

    #[test]
    fn missing_and_unsupported_settings_are_named() {
        let problems = rope(json!({"rope_type": "llama3", "factor": 8.0})).unwrap_err();
        assert_eq!(
            problems,
            [
                "`rope_parameters.low_freq_factor` is missing",
                "`rope_parameters.high_freq_factor` is missing"
            ]
        );
        let problems = rope(json!({"rope_type": "longrope"})).unwrap_err();
        assert!(
            problems[0].contains("'longrope' is not supported"),
            "{problems:?}"
        );
        let problems = rope(json!({"partial_rotary_factor": 0.5})).unwrap_err();
        assert!(
            problems[0].contains("partial_rotary_factor"),
            "{problems:?}"
        );
    }

    #[test]
    fn later_positions_equal_the_tail_of_earlier_tables() {
        let plain = RopeConfig::default();
        let device = Device::flex();
        let (all, _) = plain.tables(8, 0, 10, &device);
        let (tail, _) = plain.tables(8, 7, 3, &device);
        let all = all.narrow(0, 7, 3).into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(all, tail.into_data().try_to_vec::<f32>().unwrap());
    }
}

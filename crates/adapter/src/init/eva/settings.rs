//! EVA's settings.

use serde::Deserialize;

use crate::error::{AdapterError, Result};
use crate::methods::lora::config::LoraConfig;

/// EVA's settings: `eva_config` in PEFT's file, with PEFT's defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// How many times its rank a module may get as ranks move; 1 leaves them alone.
    pub rho: f64,
    /// A direction has settled once the cosine with what it was a batch ago is at least this.
    pub tau: f64,
    /// Look only at tokens with a label.
    pub use_label_mask: bool,
    /// The label of tokens without one.
    pub label_mask_value: i64,
    /// Divide each direction by the root of its singular value. PEFT 0.21 does so once for every layer
    /// that shares the input; here it is done once.
    pub whiten: bool,
    /// Let alpha move with the rank, so that the scale stays.
    pub adjust_scaling_factors: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
        }
    }
}

impl Settings {
    /// Those of a configuration.
    ///
    /// # Errors
    /// Values of the wrong type or out of range, all at once.
    pub fn of(config: &LoraConfig) -> Result<Self> {
        let fail = |problems: Vec<String>| AdapterError::Config {
            origin: "adapter configuration".into(),
            problems,
        };
        let settings: Self = match config.other.get("eva_config") {
            None | Some(serde_json::Value::Null) => Self::default(),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|e| fail(vec![format!("eva_config = {value}: {e}")]))?,
        };
        let mut problems = Vec::new();
        if !(settings.rho >= 1.0 && settings.rho.is_finite()) {
            problems.push(format!(
                "eva_config.rho = {}: must be at least 1",
                settings.rho
            ));
        }
        if !(0.0..=1.0).contains(&settings.tau) {
            problems.push(format!(
                "eva_config.tau = {}: must lie between 0 and 1",
                settings.tau
            ));
        }
        if problems.is_empty() {
            Ok(settings)
        } else {
            Err(fail(problems))
        }
    }
}

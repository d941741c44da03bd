//! `train.optim`: how many bits a moment takes, and whether moments are paged.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An AdamW, by its name in transformers' `TrainingArguments.optim`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Optim {
    /// Moments in f32.
    #[default]
    #[serde(rename = "adamw_torch")]
    AdamwTorch,
    /// bitsandbytes' 8-bit AdamW.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    Adamw8bit,
    /// Moments in f32, those of large parameters paged.
    #[serde(rename = "paged_adamw_32bit", alias = "paged_adamw")]
    PagedAdamw32bit,
    /// 8-bit AdamW, the codes of large parameters paged.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}

/// Elements from which a parameter has 8-bit moments: bitsandbytes' `min_8bit_size`.
pub const MIN_8BIT_SIZE: usize = 4096;

/// Elements from which a parameter's moments are paged, as in bitsandbytes.
pub const MIN_PAGED_SIZE: usize = 100_000;

impl Optim {
    /// All of them, the default first.
    pub const ALL: [Self; 4] = [
        Self::AdamwTorch,
        Self::Adamw8bit,
        Self::PagedAdamw32bit,
        Self::PagedAdamw8bit,
    ];

    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamwTorch => "adamw_torch",
            Self::Adamw8bit => "adamw_8bit",
            Self::PagedAdamw32bit => "paged_adamw_32bit",
            Self::PagedAdamw8bit => "paged_adamw_8bit",
        }
    }

    /// Whether a parameter of `elements` elements has 8-bit moments.
    pub fn is_8bit(self, elements: usize) -> bool {
        matches!(self, Self::Adamw8bit | Self::PagedAdamw8bit) && elements >= MIN_8BIT_SIZE
    }

    /// Whether the moments of a parameter of `elements` elements are paged.
    pub fn is_paged(self, elements: usize) -> bool {
        matches!(self, Self::PagedAdamw32bit | Self::PagedAdamw8bit) && elements >= MIN_PAGED_SIZE
    }
}

impl FromStr for Optim {
    type Err = String;

    /// A name as a recipe has it, those that are understood and never written among them.
    ///
    /// # Errors
    /// The names there are.
    fn from_str(name: &str) -> Result<Self, String> {
        let read = serde_json::from_value(serde_json::Value::from(name));
        read.map_err(|_| format!("it is one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl fmt::Display for Optim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Optim;

    fn read(name: &str) -> Result<Optim, String> {
        name.parse()
    }

    #[test]
    fn other_names_of_the_same_are_understood_and_never_written() {
        for optim in Optim::ALL {
            assert_eq!(read(optim.name()), Ok(optim));
            assert_eq!(serde_json::to_value(optim).unwrap(), optim.name());
        }
        assert_eq!(read("adamw_bnb_8bit"), Ok(Optim::Adamw8bit));
        assert_eq!(read("paged_adamw"), Ok(Optim::PagedAdamw32bit));
        let error = read("adafactor").unwrap_err();
        assert!(error.contains("paged_adamw_8bit"), "{error}");
    }
}

//! The optimizers by what their state takes.

/// How AdamW holds its two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optim {
    /// In f32.
    #[default]
    AdamwTorch,
    /// In 8 bits, with f32 for small tensors.
    Adamw8bit,
    /// In f32, those of large tensors in a file.
    PagedAdamw32bit,
    /// In 8 bits, those of large tensors in a file.
    PagedAdamw8bit,
}

impl Optim {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamwTorch => "adamw_torch",
            Self::Adamw8bit => "adamw_8bit",
            Self::PagedAdamw32bit => "paged_adamw_32bit",
            Self::PagedAdamw8bit => "paged_adamw_8bit",
        }
    }
}

/// Bytes of an optimizer's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OptimizerBytes {
    /// In memory for as long as training lasts.
    pub resident: usize,
    /// In a file.
    pub paged: usize,
}

/// Bytes of the moments of parameters with so many elements each.
pub fn state_bytes(optim: Optim, counts: impl IntoIterator<Item = usize>) -> OptimizerBytes {
    let mut sum = OptimizerBytes::default();
    for n in counts {
        let eight = matches!(optim, Optim::Adamw8bit | Optim::PagedAdamw8bit) && n >= 4096;
        let paged = matches!(optim, Optim::PagedAdamw32bit | Optim::PagedAdamw8bit) && n >= 100_000;
        let (moments, scales) = match eight {
            true => (2 * n, 2 * n.div_ceil(256) * 4),
            false => (8 * n, 0),
        };
        sum.resident += scales;
        if paged {
            sum.paged += moments;
        } else {
            sum.resident += moments;
        }
    }
    sum
}

//! The bytes of an optimizer's state, from the sizes of the parameters alone.

use enamel_kernels::MOMENT_BLOCK;

use super::Optim;

/// Bytes of the moments of all parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OptimizerBytes {
    /// Held in memory for as long as training lasts, beside the parameters.
    pub resident: usize,
    /// Held in a file, and in memory only while a step passes over them.
    pub paged: usize,
}

impl OptimizerBytes {
    /// Those of one parameter.
    fn of(optim: Optim, elements: usize) -> Self {
        // Codes are paged, their scales are not: as in bitsandbytes.
        let (moments, scales) = match optim.is_8bit(elements) {
            true => (
                2 * elements,
                2 * elements.div_ceil(MOMENT_BLOCK) * size_of::<f32>(),
            ),
            false => (2 * elements * size_of::<f32>(), 0),
        };
        match optim.is_paged(elements) {
            true => Self {
                resident: scales,
                paged: moments,
            },
            false => Self {
                resident: moments + scales,
                paged: 0,
            },
        }
    }

    /// Both together.
    pub fn total(self) -> usize {
        self.resident + self.paged
    }
}

/// Bytes that the moments of parameters take whose elements are as many as `element_counts` says, one
/// number a trained tensor.
pub fn state_bytes(
    optim: Optim,
    element_counts: impl IntoIterator<Item = usize>,
) -> OptimizerBytes {
    let each = element_counts.into_iter();
    each.fold(OptimizerBytes::default(), |sum, elements| {
        let one = OptimizerBytes::of(optim, elements);
        OptimizerBytes {
            resident: sum.resident + one.resident,
            paged: sum.paged + one.paged,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_parameters_keep_f32_and_only_large_ones_are_paged() {
        let sizes = [4095, 4096, 99_999, 100_000];
        let bytes = |optim| state_bytes(optim, sizes);
        let all = 8 * (4095 + 4096 + 99_999 + 100_000);
        assert_eq!(bytes(Optim::AdamwTorch).resident, all);
        assert_eq!(bytes(Optim::AdamwTorch).paged, 0);
        let eight = bytes(Optim::Adamw8bit);
        // 16, 391 and 391 blocks, the last ones not full.
        let scales = 8 * (16 + 391 + 391);
        assert_eq!(
            eight.resident,
            8 * 4095 + 2 * (4096 + 99_999 + 100_000) + scales
        );
        assert_eq!(eight.paged, 0);
        let paged = bytes(Optim::PagedAdamw32bit);
        assert_eq!((paged.resident, paged.paged), (all - 800_000, 800_000));
        let paged = bytes(Optim::PagedAdamw8bit);
        assert_eq!(
            (paged.resident, paged.paged),
            (eight.resident - 200_000, 200_000)
        );
        assert_eq!(paged.total(), eight.total());
    }
}

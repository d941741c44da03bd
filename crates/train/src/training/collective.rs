//! What processes that train together tell each other. One process alone has nothing to tell.
//!
//! Between the gradients of a step and clipping stands one call, [`Collective::sum`]; numbers that are reported are
//! sums over all processes too, and a wish to stop on one is a wish of all.

use std::fmt::Debug;

use burn::optim::GradientsParams;

use crate::error::TrainError;

/// The processes of a run, as one of them sees them. All of them make the same calls in the same order.
pub trait Collective: Debug + Send + Sync {
    /// This process's number, from 0. The first one writes what a run leaves.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn world_size(&self) -> usize;

    /// The sum of everybody's gradients, added up in the order of the ranks: the same bits everywhere, and the same
    /// each time.
    ///
    /// # Errors
    /// When another process is gone.
    fn sum(&self, gradients: GradientsParams) -> Result<GradientsParams, TrainError>;

    /// The sums of everybody's numbers, place by place, in the order of the ranks.
    ///
    /// # Errors
    /// When another process is gone.
    fn sum_numbers(&self, numbers: &mut [f64]) -> Result<(), TrainError>;

    /// Whether it holds anywhere.
    ///
    /// # Errors
    /// When another process is gone.
    fn any(&self, here: bool) -> Result<bool, TrainError>;
}

/// One process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn sum(&self, gradients: GradientsParams) -> Result<GradientsParams, TrainError> {
        Ok(gradients)
    }

    fn sum_numbers(&self, _: &mut [f64]) -> Result<(), TrainError> {
        Ok(())
    }

    fn any(&self, here: bool) -> Result<bool, TrainError> {
        Ok(here)
    }
}

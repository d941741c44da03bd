//! Learning-rate schedules with transformers' names and values (`optimization.py`, `get_scheduler`).

use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};

use crate::recipe::Schedule as LrSchedulerType;

/// A schedule over optimizer steps: step `k` (from 0) uses `base · λ(k)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape of the curve.
    pub kind: LrSchedulerType,
    /// Peak learning rate.
    pub base: f64,
    /// Steps of linear warm-up from 0.
    pub warmup: usize,
    /// Optimizer steps of the whole run.
    pub total: usize,
    step: usize,
}

impl Schedule {
    /// A schedule standing at step 0.
    pub fn new(kind: LrSchedulerType, base: f64, warmup: usize, total: usize) -> Self {
        Self {
            kind,
            base,
            warmup,
            total,
            step: 0,
        }
    }

    /// The same schedule, with `step` steps behind it.
    pub fn starting_at(mut self, step: usize) -> Self {
        self.step = step;
        self
    }

    /// The learning rate of optimizer step `step`, counted from 0.
    ///
    /// `λ = step / warmup` while warming up; then 1 (constant), `(total − step) / (total − warmup)`
    /// (linear) or `½ (1 + cos(π · progress))` (cosine).
    pub fn at(&self, step: usize) -> f64 {
        let warmed = matches!(self.kind, LrSchedulerType::Constant) || step >= self.warmup;
        if !warmed {
            return self.base * step as f64 / self.warmup.max(1) as f64;
        }
        let span = self.total.saturating_sub(self.warmup).max(1) as f64;
        let factor = match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
            LrSchedulerType::Linear => self.total.saturating_sub(step) as f64 / span,
            LrSchedulerType::Cosine => {
                let progress = (step - self.warmup) as f64 / span;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        };
        self.base * factor
    }
}

impl LrScheduler for Schedule {
    fn step(&mut self) -> f64 {
        self.step += 1;
        self.at(self.step - 1)
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar("step", self.step as u64)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        if let Some(step) = record.scalar::<u64>("step") {
            self.step = usize::try_from(step).unwrap_or(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: LrSchedulerType, warmup: usize, total: usize) -> Vec<f64> {
        let mut s = Schedule::new(kind, 1.0, warmup, total);
        (0..total).map(|_| s.step()).collect()
    }

    fn check(kind: LrSchedulerType, warmup: usize, expected: &[f64]) {
        let got = rates(kind, warmup, expected.len());
        for (g, e) in got.iter().zip(expected) {
            assert!(
                (g - e).abs() < 1e-12,
                "{kind:?}: {got:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn curves_follow_the_formula() {
        check(
            LrSchedulerType::Linear,
            2,
            &[0.0, 0.5, 1.0, 0.75, 0.5, 0.25],
        );
        check(LrSchedulerType::Constant, 2, &[1.0, 1.0, 1.0]);
        check(
            LrSchedulerType::ConstantWithWarmup,
            2,
            &[0.0, 0.5, 1.0, 1.0],
        );
        check(
            LrSchedulerType::Cosine,
            0,
            &[1.0, 0.853_553_390_593_273_7, 0.5, 0.146_446_609_406_726_3],
        );
    }

    #[test]
    fn a_restored_schedule_goes_on_where_it_stood() {
        let mut whole = Schedule::new(LrSchedulerType::Cosine, 3e-4, 3, 20);
        for _ in 0..7 {
            whole.step();
        }
        let mut rest = Schedule::new(LrSchedulerType::Cosine, 3e-4, 3, 20);
        rest.load_record(whole.to_record());
        for _ in 0..13 {
            assert_eq!(whole.step().to_bits(), rest.step().to_bits());
        }
    }
}

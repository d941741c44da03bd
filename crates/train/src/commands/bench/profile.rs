//! Where the time of a training step goes: the kernels' own counts against the whole step.

use enamel_kernels::profile::{Profile, Totals};
use serde::Serialize;

/// One profiled step.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// The method.
    pub method: String,
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub tokens: usize,
    /// Seconds of the step.
    pub seconds: f64,
    /// Fused operations, the longest first.
    pub ops: Vec<OpFigures>,
    /// Seconds that no operation accounts for: Burn's own operations, autodiff, allocation.
    pub other_seconds: f64,
    /// Matrix products, the longest first; they are inside the operations.
    pub products: Vec<OpFigures>,
    /// The products together.
    pub product_seconds: f64,
    /// Their floating-point operations.
    pub product_flops: u64,
    /// The speed of a large product on this machine, measured in the same run, in operations a
    /// second; none where the step reports no products.
    pub machine_product_speed: Option<f64>,
    /// Operations of the products over the time of the whole step, as a share of that speed.
    pub share_of_product_speed: Option<f64>,
    /// Seconds of the step beyond its products.
    pub seconds_beyond_products: f64,
    /// Calls that no kernel took.
    pub fallbacks: Vec<FallbackFigures>,
    /// Page faults during the step, where the system counts them.
    pub page_faults: Option<u64>,
    /// Most resident memory during the step, in bytes; as for a timed step.
    pub peak_memory: u64,
}

/// One operation or product over all its calls in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpFigures {
    /// Its name.
    pub op: String,
    /// Calls.
    pub calls: u64,
    /// Seconds of all calls.
    pub seconds: f64,
    /// Of the step's time.
    pub share: f64,
    /// Bytes of operands and results a second, in 10⁹.
    pub gb_per_second: f64,
    /// Floating-point operations a second, in 10⁹.
    pub gflop_per_second: f64,
}

/// An operation that went to plain Burn operations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FallbackFigures {
    /// The operation.
    pub op: String,
    /// Why no kernel took it.
    pub reason: String,
    /// How often.
    pub calls: u64,
}

/// The step that was profiled.
pub(super) struct Measured {
    pub(super) method: String,
    pub(super) rows: usize,
    pub(super) tokens: usize,
    pub(super) seconds: f64,
    pub(super) page_faults: Option<u64>,
    pub(super) peak_memory: u64,
}

impl StepProfile {
    /// `machine_speed` is asked for the speed of a large product if there are products to compare.
    pub(super) fn new(
        step: Measured,
        profile: &Profile,
        machine_speed: impl FnOnce() -> f64,
    ) -> Self {
        let seconds = step.seconds;
        let rows = |table: &std::collections::BTreeMap<&'static str, Totals>| {
            let mut rows: Vec<_> = table
                .iter()
                .map(|(op, totals)| OpFigures::new(op, totals, seconds))
                .collect();
            rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then(a.op.cmp(&b.op)));
            rows
        };
        let sum = |table: &[OpFigures]| table.iter().fold(0.0, |sum, row| sum + row.seconds);
        let (ops, products) = (rows(&profile.ops), rows(&profile.products));
        let product_flops: u64 = profile.products.values().map(|t| t.flops).sum();
        let product_seconds = sum(&products);
        let machine_product_speed = (product_flops > 0).then(machine_speed);
        let fallbacks = profile.fallbacks.iter();
        Self {
            method: step.method,
            rows: step.rows,
            tokens: step.tokens,
            seconds,
            other_seconds: (seconds - sum(&ops)).max(0.0),
            product_seconds,
            product_flops,
            machine_product_speed,
            share_of_product_speed: machine_product_speed
                .map(|speed| product_flops as f64 / seconds / speed),
            seconds_beyond_products: seconds - product_seconds,
            fallbacks: fallbacks
                .map(|((op, reason), calls)| FallbackFigures {
                    op: (*op).to_owned(),
                    reason: reason.clone(),
                    calls: *calls,
                })
                .collect(),
            page_faults: step.page_faults,
            peak_memory: step.peak_memory,
            ops,
            products,
        }
    }

    /// The share of the step that no operation accounts for.
    pub fn other_share(&self) -> f64 {
        self.other_seconds / self.seconds
    }

    /// How many times as long as its products the step takes; none without products.
    pub fn times_its_products(&self) -> Option<f64> {
        (self.product_seconds > 0.0).then(|| self.seconds / self.product_seconds)
    }
}

impl OpFigures {
    fn new(op: &str, totals: &Totals, step: f64) -> Self {
        let rate = |count: u64| match totals.seconds > 0.0 {
            true => count as f64 / totals.seconds / 1e9,
            false => 0.0,
        };
        Self {
            op: op.to_owned(),
            calls: totals.calls,
            seconds: totals.seconds,
            share: totals.seconds / step,
            gb_per_second: rate(totals.bytes),
            gflop_per_second: rate(totals.flops),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(calls: u64, seconds: f64, flops: u64, bytes: u64) -> Totals {
        Totals {
            calls,
            seconds,
            flops,
            bytes,
        }
    }

    fn measured(seconds: f64) -> Measured {
        Measured {
            method: "lora".into(),
            rows: 4,
            tokens: 256,
            seconds,
            page_faults: Some(7),
            peak_memory: 1,
        }
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    #[test]
    fn shares_rates_and_the_rest_of_a_step_add_up() {
        let mut profile = Profile::default();
        let ops = &mut profile.ops;
        ops.insert("norm", totals(2, 0.5, 1_000_000_000, 4_000_000_000));
        ops.insert("linear", totals(3, 1.0, 300_000_000_000, 2_000_000_000));
        let products = &mut profile.products;
        products.insert("x·wᵀ", totals(3, 0.6, 240_000_000_000, 0));
        products.insert("g·w", totals(3, 0.2, 80_000_000_000, 0));
        profile.fallbacks.insert(("attention", "a mask".into()), 5);
        let step = StepProfile::new(measured(2.0), &profile, || 400e9);

        let names: Vec<_> = step.ops.iter().map(|row| row.op.as_str()).collect();
        assert_eq!(names, ["linear", "norm"], "the longest first");
        assert!(near(step.ops[0].share, 0.5) && near(step.ops[1].share, 0.25));
        assert!(near(step.ops[0].gflop_per_second, 300.0));
        assert!(near(step.ops[1].gb_per_second, 8.0));
        assert!(near(step.other_seconds, 0.5) && near(step.other_share(), 0.25));
        let shares: f64 = step.ops.iter().map(|row| row.share).sum();
        assert!(near(shares + step.other_share(), 1.0));

        // 320 GFLOP in 2 s are 160 a second, of 400.
        assert_eq!(step.product_flops, 320_000_000_000);
        assert_eq!(
            step.share_of_product_speed.map(|s| near(s, 0.4)),
            Some(true)
        );
        assert!(near(step.seconds_beyond_products, 1.2));
        assert_eq!(step.times_its_products().map(|t| near(t, 2.5)), Some(true));
        assert_eq!(step.fallbacks.len(), 1);
        assert_eq!(step.fallbacks[0].calls, 5);
    }

    #[test]
    fn a_step_without_products_claims_no_share_of_their_speed() {
        let unasked = || unreachable!("nothing to compare with");
        let step = StepProfile::new(measured(2.0), &Profile::default(), unasked);
        assert_eq!(step.share_of_product_speed, None);
        assert_eq!(step.times_its_products(), None);
        assert!(near(step.other_share(), 1.0));
    }

    #[test]
    fn operations_that_overlap_leave_no_negative_rest() {
        let mut profile = Profile::default();
        profile.ops.insert("one", totals(1, 3.0, 0, 0));
        let step = StepProfile::new(measured(2.0), &profile, || 1.0);
        assert!(near(step.other_seconds, 0.0));
    }
}

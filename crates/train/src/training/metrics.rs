//! The figures on burn-train's dashboard.

use std::marker::PhantomData;
use std::sync::Arc;

use burn::tensor::TensorReadError;
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry,
};

use crate::task::{Measured, MetricSpec, Tally};
use crate::text::duration_text;
use crate::training::train_step::StepOutput;

/// A figure of a training step that every task has.
pub trait Figure: Clone + Send + Sync + 'static {
    /// Name on the dashboard.
    const NAME: &'static str;
    /// Unit, empty for none.
    const UNIT: &'static str;
    /// Whether more is better.
    const HIGHER_IS_BETTER: bool;
    /// How a value is written.
    fn text(value: f64) -> String;
}

macro_rules! figure {
    ($(#[$doc:meta])* $name:ident, $label:literal, $unit:literal, $higher:literal, $text:expr) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name;
        impl Figure for $name {
            const NAME: &'static str = $label;
            const UNIT: &'static str = $unit;
            const HIGHER_IS_BETTER: bool = $higher;
            fn text(value: f64) -> String { ($text)(value) }
        }
    };
}

figure!(/** Learning rate of the step. */
    LearningRate, "Learning rate", "", true, |v: f64| format!("{v:.3e}"));
figure!(/** Global gradient norm before clipping. */
    GradNorm, "Gradient norm", "", false, |v: f64| format!("{v:.4}"));
figure!(/** Real (not padding) tokens a second. */
    TokensPerSecond, "Tokens/s", "", true, |v: f64| format!("{v:.0}"));
figure!(/** Resident memory of the process. */
    Memory, "Memory (MiB)", "MiB", false, |v: f64| format!("{v:.0}"));

/// A value and what it weighs in a window's mean.
pub struct Sample<F> {
    value: f64,
    weight: f64,
    figure: PhantomData<F>,
}

impl<F> Sample<F> {
    fn new(value: f64, weight: f64) -> Self {
        Self {
            value,
            weight,
            figure: PhantomData,
        }
    }
}

macro_rules! adapt {
    ($figure:ty, $item:ident => $value:expr, $weight:expr) => {
        impl<Y> Adaptor<Sample<$figure>> for StepOutput<Y> {
            fn adapt(&self) -> Sample<$figure> {
                let $item = self;
                Sample::new($value, $weight)
            }
        }
    };
}

adapt!(LearningRate, o => o.learning_rate, 1.0);
adapt!(GradNorm, o => o.grad_norm, 1.0);
adapt!(TokensPerSecond, o => o.tokens as f64 / o.seconds.max(1e-9), o.seconds);
adapt!(Memory, o => o.memory as f64 / f64::from(1u32 << 20), 1.0);

/// A figure's weighted mean over a window of steps, and its last value.
#[derive(Clone)]
pub struct Scalar<F> {
    name: Arc<String>,
    sum: f64,
    weight: f64,
    last: f64,
    figure: PhantomData<F>,
}

impl<F: Figure> Scalar<F> {
    /// An empty window.
    pub fn new() -> Self {
        Self {
            name: Arc::new(F::NAME.to_string()),
            sum: 0.0,
            weight: 0.0,
            last: f64::NAN,
            figure: PhantomData,
        }
    }

    fn mean(&self) -> f64 {
        self.sum / self.weight
    }

    fn entry(&self) -> SerializedEntry {
        let unit = if F::UNIT.is_empty() {
            String::new()
        } else {
            format!(" {}", F::UNIT)
        };
        let text = format!("{}{unit}", F::text(self.last));
        entry(&text, self.last, &F::text(self.mean()))
    }
}

/// A value as text, with the mean of its window.
fn entry(text: &str, value: f64, mean: &str) -> SerializedEntry {
    let text = format!("{text} (window mean {mean})");
    SerializedEntry::new(text, NumericEntry::Value(value).serialize())
}

fn finite(value: f64) -> Option<NumericEntry> {
    value.is_finite().then_some(NumericEntry::Value(value))
}

impl<F: Figure> Default for Scalar<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: Figure> Metric for Scalar<F> {
    type Input = Sample<F>;

    fn name(&self) -> Arc<String> {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: (!F::UNIT.is_empty()).then(|| F::UNIT.to_string()),
            higher_is_better: F::HIGHER_IS_BETTER,
        }
        .into()
    }

    fn update(
        &mut self,
        item: &Sample<F>,
        _: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        self.last = item.value;
        self.sum += item.value * item.weight;
        self.weight += item.weight;
        Ok(self.entry())
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.entry())
    }

    fn clear(&mut self) {
        *self = Self::new();
    }
}

impl<F: Figure> Numeric for Scalar<F> {
    fn value(&self) -> Option<NumericEntry> {
        finite(self.last)
    }

    fn running_value(&self) -> Option<NumericEntry> {
        finite(self.mean())
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Value(self.mean())
    }
}

/// A task's metric over a window, and that of the last step or batch.
#[derive(Clone)]
pub struct TaskMetric<Y: 'static> {
    spec: &'static MetricSpec<Y>,
    name: Arc<String>,
    window: Measured<Y>,
    last: f64,
}

impl<Y: Tally> TaskMetric<Y> {
    /// An empty window.
    pub fn new(spec: &'static MetricSpec<Y>) -> Self {
        Self {
            spec,
            name: Arc::new(spec.label.to_owned()),
            window: Measured::default(),
            last: f64::NAN,
        }
    }

    /// That of the window: NaN while it is empty.
    fn value_of_window(&self) -> f64 {
        match self.window.count {
            0 => f64::NAN,
            _ => (self.spec.of)(&self.window),
        }
    }

    fn entry(&self) -> SerializedEntry {
        let window = self.spec.text(self.value_of_window());
        entry(&self.spec.text(self.last), self.last, &window)
    }
}

impl<Y: Tally> Adaptor<Measured<Y>> for Measured<Y> {
    fn adapt(&self) -> Self {
        self.clone()
    }
}

impl<Y: Tally> Adaptor<Measured<Y>> for StepOutput<Y> {
    fn adapt(&self) -> Measured<Y> {
        self.measured.clone()
    }
}

impl<Y: Tally> Metric for TaskMetric<Y> {
    type Input = Measured<Y>;

    fn name(&self) -> Arc<String> {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: None,
            higher_is_better: self.spec.higher_is_better,
        }
        .into()
    }

    fn update(
        &mut self,
        item: &Measured<Y>,
        _: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        self.last = (self.spec.of)(item);
        self.window.add(item);
        Ok(self.entry())
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.entry())
    }

    fn clear(&mut self) {
        *self = Self::new(self.spec);
    }
}

impl<Y: Tally> Numeric for TaskMetric<Y> {
    fn value(&self) -> Option<NumericEntry> {
        finite(self.last)
    }

    fn running_value(&self) -> Option<NumericEntry> {
        finite(self.value_of_window())
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Value(self.value_of_window())
    }
}

/// Where the run stands, in words: burn-train's own bar knows nothing of validation or resumption.
#[derive(Clone)]
pub struct Progress {
    name: Arc<String>,
    text: String,
}

impl Progress {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Progress".to_string()),
            text: String::new(),
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

/// A step's place in the run.
pub struct Place {
    step: usize,
    total: usize,
    eta_seconds: f64,
}

impl<Y> Adaptor<Place> for StepOutput<Y> {
    fn adapt(&self) -> Place {
        Place {
            step: self.step,
            total: self.total_steps,
            eta_seconds: self.eta_seconds,
        }
    }
}

impl Metric for Progress {
    type Input = Place;

    fn name(&self) -> Arc<String> {
        self.name.clone()
    }

    fn update(
        &mut self,
        item: &Place,
        _: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let left = duration_text(item.eta_seconds);
        self.text = format!("step {} of {}, {left} left", item.step, item.total);
        self.compute()
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(SerializedEntry::new(self.text.clone(), self.text.clone()))
    }

    fn clear(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{CausalLm, Task};

    #[test]
    fn a_window_weighs_tokens_and_perplexity_is_exp_of_the_mean() {
        let perplexity = &CausalLm::METRICS[1];
        let mut metric = TaskMetric::new(perplexity);
        for (value, count) in [(1.0, 30), (3.0, 10)] {
            metric.window.add(&Measured {
                loss_sum: value * count as f64,
                count,
                tally: (),
            });
        }
        assert!((metric.final_value().current() - 1.5f64.exp()).abs() < 1e-12);
    }
}

//! The figures on burn-train's dashboard.

use std::marker::PhantomData;
use std::sync::Arc;

use burn::tensor::TensorReadError;
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry,
};

use crate::text::duration_text;
use crate::training::train_step::{EvalOutput, StepOutput};

/// What sets one figure apart from another.
pub trait MetricSpec: Clone + Send + Sync + 'static {
    /// Name on the dashboard; training and validation share a plot by it.
    const NAME: &'static str;
    /// Unit, empty for none.
    const UNIT: &'static str;
    /// Whether more is better.
    const HIGHER_IS_BETTER: bool;
    /// The figure of a window from its weighted mean.
    fn of_mean(mean: f64) -> f64 {
        mean
    }
    /// How a value is written.
    fn text(value: f64) -> String;
}

macro_rules! figure {
    ($(#[$doc:meta])* $name:ident, $label:literal, $unit:literal, $higher:literal, $text:expr $(, mean: $mean:expr)?) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name;
        impl MetricSpec for $name {
            const NAME: &'static str = $label;
            const UNIT: &'static str = $unit;
            const HIGHER_IS_BETTER: bool = $higher;
            $(fn of_mean(mean: f64) -> f64 { ($mean)(mean) })?
            fn text(value: f64) -> String { ($text)(value) }
        }
    };
}

figure!(/** Mean negative log-likelihood of the trained tokens. */
    Loss, "Loss", "", false, |v: f64| format!("{v:.4}"));
figure!(/** `exp` of the mean loss. */
    Perplexity, "Perplexity", "", false, |v: f64| format!("{v:.3}"), mean: f64::exp);
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
    ($from:ty, $figure:ty, $item:ident => $value:expr, $weight:expr) => {
        impl Adaptor<Sample<$figure>> for $from {
            fn adapt(&self) -> Sample<$figure> {
                let $item = self;
                Sample::new($value, $weight)
            }
        }
    };
}

adapt!(StepOutput, Loss, o => o.loss, o.trained_tokens as f64);
adapt!(StepOutput, Perplexity, o => o.loss, o.trained_tokens as f64);
adapt!(StepOutput, LearningRate, o => o.learning_rate, 1.0);
adapt!(StepOutput, GradNorm, o => o.grad_norm, 1.0);
adapt!(StepOutput, TokensPerSecond, o => o.tokens as f64 / o.seconds.max(1e-9), o.seconds);
adapt!(StepOutput, Memory, o => o.memory as f64 / f64::from(1u32 << 20), 1.0);
adapt!(EvalOutput, Loss, o => o.loss_sum / o.trained_tokens.max(1) as f64, o.trained_tokens as f64);
adapt!(EvalOutput, Perplexity, o => o.loss_sum / o.trained_tokens.max(1) as f64, o.trained_tokens as f64);

/// A figure's weighted mean over a window of steps, and its last value.
#[derive(Clone)]
pub struct Scalar<F> {
    name: Arc<String>,
    sum: f64,
    weight: f64,
    last: f64,
    figure: PhantomData<F>,
}

impl<F: MetricSpec> Scalar<F> {
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
        F::of_mean(self.sum / self.weight)
    }

    fn entry(&self) -> SerializedEntry {
        let unit = if F::UNIT.is_empty() {
            String::new()
        } else {
            format!(" {}", F::UNIT)
        };
        let text = format!(
            "{}{unit} (window mean {})",
            F::text(self.last),
            F::text(self.mean())
        );
        SerializedEntry::new(text, NumericEntry::Value(self.last).serialize())
    }
}

impl<F: MetricSpec> Default for Scalar<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: MetricSpec> Metric for Scalar<F> {
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
        self.last = F::of_mean(item.value);
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

impl<F: MetricSpec> Numeric for Scalar<F> {
    fn value(&self) -> Option<NumericEntry> {
        self.last
            .is_finite()
            .then_some(NumericEntry::Value(self.last))
    }

    fn running_value(&self) -> Option<NumericEntry> {
        let mean = self.mean();
        mean.is_finite().then_some(NumericEntry::Value(mean))
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Value(self.mean())
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

impl Adaptor<Place> for StepOutput {
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

    #[test]
    fn a_window_weighs_tokens_and_perplexity_is_exp_of_the_mean() {
        let mut metric = Scalar::<Perplexity>::new();
        for (value, weight) in [(1.0, 30.0), (3.0, 10.0)] {
            metric.last = value;
            metric.sum += value * weight;
            metric.weight += weight;
        }
        assert!((metric.final_value().current() - 1.5f64.exp()).abs() < 1e-12);
    }
}

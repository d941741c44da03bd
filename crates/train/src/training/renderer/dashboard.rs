//! burn-train's dashboard, told the progress of the run as a whole.
//!
//! Between two validations lies one "epoch" for burn-train, whose bar then counts epochs of equal
//! length. The last one may be shorter and a resumed run starts in the middle, so the bar and the
//! time left would be wrong; here they count optimizer steps.

use std::error::Error;

use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::MetricDefinition;
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining,
};
use burn::train::{Interrupter, LearnerSummary};

use crate::signals::terminal;

/// The dashboard of one run.
pub struct Dashboard {
    tui: TuiMetricsRendererWrapper,
    /// Steps done before this process started.
    resumed_at: usize,
    total_steps: usize,
    step: usize,
    training: bool,
    /// Goes last: by then the dashboard has given the terminal back.
    _terminal: Taken,
}

/// The terminal is the dashboard's as long as this lives.
struct Taken;

impl Taken {
    fn begin() -> Self {
        terminal::dashboard_begins();
        Self
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        terminal::dashboard_ends();
    }
}

impl Dashboard {
    /// Takes over the terminal. `resumed_at` steps of `total_steps` are done already.
    pub fn new(interrupter: Interrupter, resumed_at: usize, total_steps: usize) -> Self {
        let taken = Taken::begin();
        Self {
            tui: TuiMetricsRendererWrapper::new(interrupter, None),
            resumed_at,
            total_steps,
            step: resumed_at,
            training: true,
            _terminal: taken,
        }
    }
}

impl TrainingProgressLogger for Dashboard {
    fn start(&mut self, _: usize, _: usize, _: Option<usize>, label: Option<&str>) {
        let steps = self.total_steps - self.resumed_at;
        let label = match (label, self.resumed_at) {
            (label, 0) => label.map(str::to_string),
            (label, n) => Some(format!(
                "{} (resumed at step {n})",
                label.unwrap_or_default()
            )),
        };
        TrainingProgressLogger::start(&mut self.tui, 1, 1, Some(steps), label.as_deref());
    }

    fn update_epoch(&mut self, _: usize) {}

    fn start_split(&mut self, split: &str, total_items: usize) {
        self.training = split == "train";
        if self.training {
            self.tui
                .start_split(split, self.total_steps - self.resumed_at);
            self.tui.update_split(self.step - self.resumed_at);
        } else {
            self.tui.start_split(split, total_items);
        }
    }

    fn update_split(&mut self, items_processed: usize) {
        terminal::each_step();
        if self.training {
            self.step = items_processed;
            self.tui.update_split(self.step - self.resumed_at);
        } else {
            self.tui.update_split(items_processed);
        }
    }

    fn end_split(&mut self) {
        // burn-train would start its count of steps again.
        if !self.training {
            self.tui.end_split();
        }
    }

    fn end(&mut self) {
        TrainingProgressLogger::end(&mut self.tui);
    }

    // burn-train counts these anew in each window; "Items" has the step of the run.
    fn log_event_training(&mut self, _: String) {}
}

impl EvaluationProgressLogger for Dashboard {
    fn start_global_progress(&mut self, total_tests: usize) {
        self.tui.start_global_progress(total_tests);
    }

    fn start_test(&mut self, name: &str, total_items: usize) {
        self.tui.start_test(name, total_items);
    }

    fn update_test_progress(&mut self, items_processed: usize) {
        self.tui.update_test_progress(items_processed);
    }

    fn end_test(&mut self) {
        self.tui.end_test();
    }

    fn end_global_progress(&mut self) {
        self.tui.end_global_progress();
    }

    fn log_event_evaluation(&mut self, event: String) {
        self.tui.log_event_evaluation(event);
    }
}

impl MetricsRendererTraining for Dashboard {
    fn update_train(&mut self, state: MetricState) {
        self.tui.update_train(state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.tui.update_valid(state);
    }

    fn on_train_end(&mut self, summary: Option<LearnerSummary>) -> Result<(), Box<dyn Error>> {
        self.tui.on_train_end(summary)
    }
}

impl MetricsRendererEvaluation for Dashboard {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        self.tui.update_test(name, state);
    }
}

impl MetricsRenderer for Dashboard {
    fn manual_close(&mut self) {
        self.tui.manual_close();
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.tui.register_metric(definition);
    }
}

//! Progress of fetching a base model, on standard error.

use std::io::Write;

use enamel_model::source::PullProgress;
use enamel_train::shown;
use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal;

/// A bar a file on a terminal, a line a file elsewhere.
#[derive(Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
}

impl PullProgress for Bars {
    fn note(&mut self, text: &str) {
        let _ = writeln!(terminal::err(), "{text}");
    }

    fn start(&mut self, file: &str, total: Option<u64>) {
        if !terminal::err_is_terminal() {
            let size = total.map_or_else(String::new, |bytes| {
                format!(" ({:.1} MiB)", bytes as f64 / 1048576.0)
            });
            let _ = writeln!(terminal::err(), "fetching {file}{size}");
            return;
        }
        let (bar, template) = match total {
            Some(bytes) => (
                ProgressBar::new(bytes),
                "{msg}  {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{spinner} {msg}  {binary_bytes}",
            ),
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_message(shown(file).into_owned());
        self.bar = Some(bar);
    }

    fn advance(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

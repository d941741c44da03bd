//! `enamel predict`: the classes of texts.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use enamel_data::ClassSpec;
use enamel_train::commands::predict::{
    PredictFile, PredictReport, predict, predict_to_file, rows, text,
};

use crate::paths::path;
use crate::sampling_args::ModelArgs;
use crate::{Outcome, terminal};

/// Arguments of `enamel predict`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows with a text, or two, and perhaps a class to compare with
    #[arg(value_name = "ROWS.jsonl", value_parser = path(), required_unless_present = "text")]
    input: Option<PathBuf>,
    /// A text by itself, instead of rows
    #[arg(long, value_name = "TEXT", conflicts_with = "input")]
    text: Option<String>,
    /// The second of a pair of texts
    #[arg(long, value_name = "TEXT", requires = "text")]
    text_pair: Option<String>,
    /// One JSON line a row (on standard output without it)
    #[arg(long, value_name = "PREDICTIONS.jsonl", value_parser = path())]
    output: Option<PathBuf>,
    /// Replace the file if it is there
    #[arg(long, requires = "output")]
    overwrite: bool,
    /// The column of the text; twice for a pair
    #[arg(long, value_name = "NAME")]
    text_column: Vec<String>,
    /// The column of the class
    #[arg(long, value_name = "NAME", default_value = "label")]
    label_column: String,
    /// Rows a forward pass; shorter ones are padded
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let file = self.output.map(|path| PredictFile {
            path,
            overwrite: self.overwrite,
        });
        if let Some(file) = &file {
            let inputs: Vec<PathBuf> = [&self.input, &self.model.adapter]
                .into_iter()
                .flatten()
                .cloned()
                .collect();
            file.check(&inputs)?;
        }
        let (base, task) = self.model.load_classifier()?;
        if let Some(file) = &file {
            file.check(std::slice::from_ref(&base.open.local.path))?;
        }
        let rows = match (&self.input, &self.text) {
            (Some(input), _) => {
                let columns = ClassSpec {
                    text_columns: self.text_column,
                    label_column: self.label_column,
                    optional: true,
                };
                let (rows, notes) = rows(input, columns, &base, &task)?;
                for note in notes {
                    terminal::note(&note.to_string());
                }
                rows
            }
            (None, Some(given)) => vec![text(given, self.text_pair.as_deref(), &base)?],
            (None, None) => bail!("give rows, or a text with --text"),
        };
        let batch = self.batch_size as usize;
        let report = match file {
            Some(file) => predict_to_file(&base, &task, &rows, batch, &file)?,
            None => {
                let mut out = terminal::out();
                predict::<anyhow::Error>(&base, &task, &rows, batch, &mut |prediction| {
                    writeln!(out, "{}", serde_json::to_string(prediction)?)?;
                    Ok(())
                })?
            }
        };
        if let Some(words) = comparison(&report) {
            terminal::note(&words);
        }
        Ok(Outcome::Done)
    }
}

/// How the predictions compare with the classes that rows have themselves.
fn comparison(report: &PredictReport) -> Option<String> {
    (report.labelled > 0).then(|| {
        format!(
            "{} of {} rows have a class: accuracy {:.4}, F1 {:.4} (mean over the classes)",
            report.labelled,
            report.rows,
            report.tally.accuracy(),
            report.tally.macro_f1()
        )
    })
}

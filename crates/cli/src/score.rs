//! `enamel score`: loss and log-probability of each token of given rows.

use std::io::Write;
use std::path::PathBuf;

use enamel_data::{DataSpec, load_examples};
use enamel_train::commands::score::{ScoreFiles, score};

use crate::paths::path;
use crate::sampling_args::ModelArgs;
use crate::{Outcome, terminal};

/// Arguments of `enamel score`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows in any format that trains: messages, prompt and completion, text, input_ids
    #[arg(long, value_name = "ROWS.jsonl", value_parser = path())]
    input: PathBuf,
    /// One JSON line a row: loss, and log_probs of its tokens
    #[arg(long, value_name = "SCORES.jsonl", value_parser = path())]
    output: PathBuf,
    /// Logits too: one f32 tensor `logits.<row>` [tokens, vocabulary] a row
    #[arg(long, value_name = "OUT.safetensors", value_parser = path())]
    logits: Option<PathBuf>,
    /// Replace the files if they are there
    #[arg(long)]
    overwrite: bool,
    /// Rows a forward pass; shorter ones are padded
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let files = ScoreFiles {
            scores: self.output,
            logits: self.logits,
            overwrite: self.overwrite,
        };
        let mut inputs = vec![self.input.clone()];
        inputs.extend(self.model.adapter.clone());
        files.check(&inputs)?;
        let base = self.model.load()?;
        files.check(std::slice::from_ref(&base.open.local.path))?;
        let spec = DataSpec {
            paths: vec![self.input],
            template_arguments: self.model.chat_template_kwargs.0,
            ..DataSpec::default()
        };
        let mut examples = load_examples(&spec, &base.open.tokenizer)?;
        examples.note_positions(base.open.config.context_length());
        for note in &examples.notes {
            terminal::note(&note.to_string());
        }
        let rows = examples.rows;
        let report = score(
            &base.model,
            &rows,
            self.batch_size as usize,
            base.open.tokenizer.padding_id(),
            &files,
        )?;
        writeln!(
            terminal::out(),
            "{} rows, {} tokens ({} trained), loss {:.6}",
            report.rows,
            report.tokens,
            report.trained_tokens,
            report.loss
        )?;
        Ok(Outcome::Done)
    }
}

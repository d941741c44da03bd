//! `enamel generate`: one answer, written as it comes.

use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;

use anyhow::{Context, bail};
use enamel_data::Message;
use enamel_train::commands::chat;
use enamel_train::commands::chat::End;

use crate::{Outcome, terminal};
use crate::sampling_args::{ModelArgs, SamplingArgs};

/// Arguments of `enamel generate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to answer; without it, standard input
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it stands, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Say at the end how many tokens a second it was (on standard error)
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let prompt = match self.prompt {
            Some(prompt) => prompt,
            None => read_stdin()?,
        };
        if prompt.is_empty() {
            bail!("the prompt is empty\n  help: give one with --prompt or on standard input");
        }
        let base = self.model.load()?;
        let sampling = self.sampling.sampling();
        let mut out = terminal::answer_out();
        let mut failure = None;
        let mut write = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush())
        {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        };
        // A base model without a template can only continue.
        let reply = if self.raw || base.open.tokenizer.chat_template().is_none() {
            chat::complete(&base, &prompt, &sampling, &mut write)?
        } else {
            let mut messages: Vec<_> = self
                .system
                .iter()
                .map(|text| Message::system(text))
                .collect();
            messages.push(Message::user(&prompt));
            chat::answer(&base, &messages, &sampling, &mut write)?
        };
        if let Some(error) = failure {
            return Err(error.into());
        }
        writeln!(out)?;
        if let End::Context(context) = reply.end {
            terminal::note(&format!(
                "the answer was cut at the end of the model's context, {context} tokens"
            ));
        }
        if self.stats {
            // Nobody left to read is no reason to fail.
            let _ = writeln!(
                terminal::err(),
                "{} prompt tokens, {} new tokens in {:.2} s ({:.1} tokens/s)",
                reply.prompt_tokens,
                reply.tokens,
                reply.seconds,
                reply.tokens as f64 / reply.seconds.max(f64::EPSILON)
            );
        }
        Ok(Outcome::Done)
    }
}

fn read_stdin() -> anyhow::Result<String> {
    let mut stdin = std::io::stdin().lock();
    if stdin.is_terminal() {
        let _ = writeln!(
            terminal::err(),
            "reading the prompt from standard input; end it with Ctrl-D"
        );
    }
    let mut text = String::new();
    stdin
        .read_to_string(&mut text)
        .context("cannot read standard input as UTF-8")?;
    // `echo` and heredocs end in a line break that nobody means.
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

//! `enamel chat`: a conversation at the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;

use anyhow::bail;
use enamel_train::commands::chat::{End, Session};

use crate::{Outcome, terminal};
use crate::sampling_args::{ModelArgs, SamplingArgs};

/// Arguments of `enamel chat`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let base = self.model.load()?;
        if base.open.tokenizer.chat_template().is_none() {
            bail!(
                "this model has no chat template, so it cannot hold a conversation\n  \
                 help: enamel generate --raw continues a text"
            );
        }
        let sampling = self.sampling.sampling();
        let mut session = Session::new(base, self.system);
        let mut input = std::io::stdin().lock();
        let interactive = input.is_terminal();
        let mut out = terminal::out();
        if interactive {
            writeln!(out, "/reset forgets the conversation, /exit ends it")?;
        }
        let mut line = String::new();
        loop {
            if interactive {
                write!(out, "\n> ")?;
                out.flush()?;
            }
            line.clear();
            if input.read_line(&mut line)? == 0 {
                break;
            }
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => break,
                "/reset" => {
                    session.reset();
                    writeln!(out, "(forgotten)")?;
                    continue;
                }
                command if command.starts_with('/') => {
                    writeln!(out, "there is no {command}; there are /reset and /exit")?;
                    continue;
                }
                question => {
                    let mut failure = None;
                    let reply = session.ask(question, &sampling, &mut |text| match out
                        .write_all(text.as_bytes())
                        .and_then(|()| out.flush())
                    {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(error) => {
                            failure = Some(error);
                            ControlFlow::Break(())
                        }
                    })?;
                    if let Some(error) = failure {
                        return Err(error.into());
                    }
                    writeln!(out)?;
                    if let End::Context(context) = reply.end {
                        writeln!(
                            out,
                            "(cut at the end of the model's context, {context} tokens; /reset makes room)"
                        )?;
                    }
                }
            }
        }
        Ok(Outcome::Done)
    }
}

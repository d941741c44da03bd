//! `enamel pull`: fetches a base model into the cache.

use std::io::Write;

use enamel_model::source::{self, ModelRef, PullOptions};

use crate::{Outcome, terminal};
use crate::pull_progress::Bars;

/// Arguments of `enamel pull`.
#[derive(clap::Args)]
pub struct Args {
    /// A catalogue name, hf:org/name[@revision], or a path
    #[arg(value_name = "REF")]
    model: String,
}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let reference = ModelRef::parse(&self.model)?;
        let local = source::pull(&reference, &PullOptions::from_env()?, &mut Bars::default())?;
        let mut out = terminal::out();
        writeln!(out, "{}", local.source_note)?;
        writeln!(out, "{}", local.path.display())?;
        Ok(Outcome::Done)
    }
}

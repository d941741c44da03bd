//! `enamel devices`: what can compute.

use std::io::Write;

use enamel_train::device;

use crate::Outcome;

/// Arguments of `enamel devices`.
#[derive(clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{:<10} {:<11} {:>10}  note",
            "device", "state", "memory"
        )?;
        for device in device::list() {
            let state = match (device.compiled, device.present) {
                (_, true) => "present",
                (true, false) => "absent",
                (false, false) => "not built",
            };
            let memory = device.memory.map_or_else(|| "-".to_owned(), gibibytes);
            writeln!(
                out,
                "{:<10} {state:<11} {memory:>10}  {}",
                device.name, device.note
            )?;
        }
        Ok(Outcome::Done)
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

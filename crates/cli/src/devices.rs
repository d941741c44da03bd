//! `enamel devices`: what can compute.

use std::io::Write;

use enamel_train::device::{self, CPU_VARIABLE, CpuInfo};

use crate::{Outcome, terminal};

/// Arguments of `enamel devices`.
#[derive(clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut out = terminal::out();
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
        writeln!(out)?;
        cpu(&mut out, &device::cpu())?;
        Ok(Outcome::Done)
    }
}

/// The CPU path in use, those there are, and how it multiplies bf16.
fn cpu(out: &mut impl Write, cpu: &CpuInfo) -> std::io::Result<()> {
    match &cpu.path {
        Ok(path) => {
            let why = match cpu.asked {
                true => format!("{CPU_VARIABLE} asks for it"),
                false => format!("the best here; {CPU_VARIABLE} is not set"),
            };
            writeln!(out, "CPU path   {path} ({why})")?;
            writeln!(out, "available  {}", cpu.available.join(", "))?;
            let bf16 = cpu
                .bf16_products
                .unwrap_or("none: bf16 weights are multiplied in f32");
            writeln!(out, "bf16       {bf16}")
        }
        Err(absent) => writeln!(out, "CPU path   none: {absent}"),
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

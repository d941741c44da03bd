//! Errors as a person reads them: what happened, why, and what to do.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use enamel_train::shown;
use owo_colors::OwoColorize;

use crate::terminal;

/// Prints the error and its causes to stderr and yields the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    // Whoever read our output (`enamel inspect … | head`) has seen enough.
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let text = render(error, terminal::colour_err());
    // Nobody left to read: the exit code says it.
    let _ = writeln!(terminal::coloured_err(), "{text}");
    ExitCode::FAILURE
}

fn render(error: &anyhow::Error, colour: bool) -> String {
    let label = |text: &str| match colour {
        true if text == "help" => format!("{}", text.green().bold()),
        true => format!("{}", text.red().bold()),
        false => text.to_owned(),
    };
    let mut said = String::new();
    let mut out = String::new();
    for (i, cause) in error.chain().enumerate() {
        let text = shown(&cause.to_string()).into_owned();
        // Many errors quote their source; saying it twice helps nobody.
        if i > 0 && said.contains(text.trim()) {
            continue;
        }
        let lead = if i == 0 {
            label("error")
        } else {
            format!("  {}", label("caused by"))
        };
        for (j, line) in text.trim_end().lines().enumerate() {
            match line.trim_start().strip_prefix("help:") {
                _ if j == 0 => out.push_str(&format!("{lead}: {line}\n")),
                Some(help) => out.push_str(&format!("  {}:{help}\n", label("help"))),
                None => out.push_str(&format!("{line}\n")),
            }
        }
        said.push_str(&text);
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::render;

    #[test]
    fn causes_follow_unless_they_were_said() {
        let error = anyhow!("no such file").context("cannot read x: no such file");
        assert_eq!(render(&error, false), "error: cannot read x: no such file");
        let error = anyhow!("disk full").context("cannot write x\n  help: free some space");
        assert_eq!(
            render(&error, false),
            "error: cannot write x\n  help: free some space\n  caused by: disk full"
        );
    }

    #[test]
    fn what_others_wrote_moves_no_cursor() {
        let error = anyhow!("unknown key \"\x1b]0;gotcha\x07\"").context("row 1\x1b[2J");
        assert_eq!(
            render(&error, false),
            "error: row 1\\u001b[2J\n  caused by: unknown key \"\\u001b]0;gotcha\\u0007\""
        );
    }
}

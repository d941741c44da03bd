//! What `enamel adapter` prints.

use std::io::{Result, Write};

use enamel_train::bytes_text;
use enamel_train::commands::adapters::{
    AdapterDiff, AdapterReport, Combined, Converted, KindReport, Listed,
};
use enamel_train::commands::plan::layer_pattern;
use serde_json::Value;

fn thousands(count: usize) -> String {
    enamel_train::thousands(count as u64)
}

/// Columns as wide as their widest entry; the last one is as long as it is.
fn table(out: &mut impl Write, rows: &[Vec<String>]) -> Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| {
        rows.iter()
            .filter_map(|r| r.get(i))
            .map(|c| c.chars().count())
            .max()
    };
    for row in rows {
        let mut line = String::new();
        for (i, cell) in row.iter().enumerate() {
            line.push_str(cell);
            if i + 1 < columns {
                let more = width(i).unwrap_or(0) - cell.chars().count();
                line.push_str(&" ".repeat(more + 2));
            }
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn rank_alpha(r: Option<usize>, alpha: Option<f64>) -> String {
    match (r, alpha) {
        (Some(r), Some(alpha)) => format!("{r}/{alpha}"),
        (Some(r), None) => format!("{r}"),
        _ => "–".to_owned(),
    }
}

fn bytes(count: u64) -> String {
    bytes_text(usize::try_from(count).unwrap_or(usize::MAX))
}

fn share(error: f64) -> String {
    format!("{:.3} %", error * 100.0)
}

pub fn list(out: &mut impl Write, found: &[Listed]) -> Result<()> {
    let mut rows = vec![row([
        "adapter",
        "method",
        "r/alpha",
        "parameters",
        "on disk",
        "base",
    ])];
    for one in found {
        rows.push(vec![
            one.name.clone(),
            one.method.clone(),
            rank_alpha(one.r, one.alpha),
            thousands(one.parameters),
            bytes(one.bytes),
            one.base.clone().unwrap_or_else(|| "?".to_owned()),
        ]);
    }
    table(out, &rows)?;
    for one in found {
        if let Some(problem) = &one.problem {
            writeln!(out, "problem: {}: {problem}", one.name)?;
        }
    }
    Ok(())
}

pub fn inspect(out: &mut impl Write, report: &AdapterReport) -> Result<()> {
    let name = &report.method;
    writeln!(out, "{}", report.dir.display())?;
    writeln!(out, "method      {name} ({})", report.peft_type)?;
    if report.r.is_some() {
        writeln!(out, "r/alpha     {}", rank_alpha(report.r, report.alpha))?;
    }
    let revision = report
        .revision
        .as_ref()
        .map_or(String::new(), |r| format!(" at {r}"));
    let base = report.base.as_deref().unwrap_or("not named");
    writeln!(out, "base        {base}{revision}")?;
    writeln!(out, "targets     {}", targets(&report.targets))?;
    writeln!(
        out,
        "trained     {} parameters; {} tensors ({}), {} on disk",
        thousands(report.parameters),
        report.tensors,
        report.dtypes.join(", "),
        bytes(report.bytes)
    )?;
    if !report.settings.is_empty() {
        writeln!(out, "\nsettings that are not PEFT's defaults")?;
        let mut rows = Vec::new();
        for s in &report.settings {
            rows.push(vec![
                format!("  {}", s.key),
                s.value.to_string(),
                format!("(default {})", s.default),
            ]);
        }
        table(out, &rows)?;
    }
    notes(out, &report.notes)?;
    if !report.kinds.is_empty() {
        writeln!(out)?;
        kinds(out, &report.kinds, report.delta_norm)?;
    }
    if let Some(reason) = &report.no_norms {
        writeln!(out, "no norms: {reason}")?;
    }
    if report.untrained {
        writeln!(
            out,
            "untrained: what it adds is zero everywhere, as before the first step"
        )?;
    } else {
        some(out, "all zero", &report.zero)?;
    }
    for problem in &report.problems {
        writeln!(out, "problem: {problem}")?;
    }
    Ok(())
}

fn kinds(out: &mut impl Write, kinds: &[KindReport], total: Option<f64>) -> Result<()> {
    let mut rows = vec![row([
        "modules",
        "of kind",
        "trained",
        "shape",
        "rank",
        "parameters",
        "norm of what is added",
    ])];
    let norm = |norm: Option<f64>| norm.map_or(String::new(), |n| format!("{n:.4}"));
    for kind in kinds {
        let ranks: Vec<String> = kind.ranks.iter().map(usize::to_string).collect();
        let ranks = match ranks.as_slice() {
            [low, .., high] if ranks.len() > 3 => format!("{low} to {high}"),
            few => few.join(", "),
        };
        rows.push(vec![
            kind.modules.to_string(),
            kind.kind.clone(),
            kind.how.clone(),
            kind.shapes.join(", "),
            ranks,
            thousands(kind.parameters),
            norm(kind.delta_norm),
        ]);
    }
    if total.is_some() && kinds.len() > 1 {
        rows.push(vec![
            kinds.iter().map(|k| k.modules).sum::<usize>().to_string(),
            "all".to_owned(),
            String::new(),
            String::new(),
            String::new(),
            thousands(kinds.iter().map(|k| k.parameters).sum()),
            norm(total),
        ]);
    }
    table(out, &rows)
}

/// A few lines of many.
fn some(out: &mut impl Write, what: &str, lines: &[String]) -> Result<()> {
    const SHOWN: usize = 8;
    for line in lines.iter().take(SHOWN) {
        writeln!(out, "{what}: {line}")?;
    }
    if lines.len() > SHOWN {
        writeln!(
            out,
            "{what}: and {} more (--json has all)",
            lines.len() - SHOWN
        )?;
    }
    Ok(())
}

pub fn diff(out: &mut impl Write, report: &AdapterDiff) -> Result<()> {
    notes(out, &report.notes)?;
    if report.same {
        return writeln!(out, "the same settings and the same values");
    }
    if report.settings.is_empty() {
        writeln!(out, "settings    the same")?;
    } else {
        let mut rows = vec![row(["setting", "first", "second"])];
        for s in &report.settings {
            rows.push(vec![
                s.key.clone(),
                s.first.to_string(),
                s.second.to_string(),
            ]);
        }
        table(out, &rows)?;
    }
    some(out, "only in the first", &report.only_first)?;
    some(out, "only in the second", &report.only_second)?;
    some(out, "other shape", &report.shapes)?;
    if let Some(reason) = &report.not_compared {
        return writeln!(out, "what they add is not compared: {reason}");
    }
    let Some(total) = &report.total else {
        return writeln!(out, "no module is adapted by both");
    };
    writeln!(out, "\nwhat both add to the weights (Frobenius norms)")?;
    let mut rows = vec![row([
        "modules",
        "of kind",
        "first",
        "second",
        "difference",
        "cosine",
        "largest entry",
    ])];
    let all = (report.kinds.len() > 1).then_some(total);
    for kind in report.kinds.iter().chain(all) {
        rows.push(vec![
            kind.modules.to_string(),
            kind.kind.clone(),
            format!("{:.4}", kind.norm_first),
            format!("{:.4}", kind.norm_second),
            format!("{:.4}", kind.norm_difference),
            kind.cosine.map_or("–".to_owned(), |c| format!("{c:.4}")),
            format!("{:.3e}", kind.max_difference),
        ]);
    }
    table(out, &rows)
}

fn notes(out: &mut impl Write, notes: &[String]) -> Result<()> {
    notes
        .iter()
        .try_for_each(|note| writeln!(out, "note        {note}"))
}

pub fn combined(out: &mut impl Write, report: &Combined) -> Result<()> {
    notes(out, &report.notes)?;
    writeln!(
        out,
        "combined    {} modules, {}, r = lora_alpha = {}",
        report.modules, report.kind, report.r
    )?;
    if report.partial > 0 {
        writeln!(
            out,
            "            {} of them are adapted by some of the adapters only",
            report.partial
        )?;
    }
    writeln!(out, "written     {}", report.output.display())?;
    writeln!(
        out,
        "difference  from the weighted sum of what they add: {}",
        share(report.error)
    )?;
    let rows = report
        .errors
        .iter()
        .map(|(kind, error)| vec![format!("            {kind}"), share(*error)]);
    table(out, &rows.collect::<Vec<_>>())
}

pub fn converted(out: &mut impl Write, report: &Converted) -> Result<()> {
    notes(out, &report.notes)?;
    let modules: usize = report.kinds.iter().map(|k| k.modules).sum();
    writeln!(
        out,
        "converted   {modules} modules from {} to LoRA",
        report.from
    )?;
    if report.kept > 0 {
        writeln!(
            out,
            "            {} tensors trained whole are kept as they are",
            report.kept
        )?;
    }
    let [before, after] = report.parameters.map(thousands);
    writeln!(out, "parameters  {before} before, {after} after")?;
    writeln!(out, "written     {}", report.output.display())?;
    writeln!(out, "lost        {} of what it added", share(report.error))?;
    let mut rows = vec![row(["            modules", "of kind", "rank", "lost"])];
    for kind in &report.kinds {
        let [low, high] = kind.ranks;
        rows.push(vec![
            format!("            {}", kind.modules),
            kind.kind.clone(),
            if low == high {
                low.to_string()
            } else {
                format!("{low} to {high}")
            },
            share(kind.error),
        ]);
    }
    table(out, &rows)
}

/// `target_modules` as it stands, but whole names by pattern: each layer's own would fill pages.
fn targets(value: &Value) -> String {
    let Some(names) = value.as_array() else {
        return value.to_string();
    };
    let mut counted: Vec<(String, usize)> = Vec::new();
    for name in names.iter().filter_map(Value::as_str) {
        let pattern = layer_pattern(name);
        match counted.iter_mut().find(|(known, _)| *known == pattern) {
            Some((_, count)) => *count += 1,
            None => counted.push((pattern, 1)),
        }
    }
    let shown = counted.into_iter().map(|(pattern, count)| match count {
        1 => pattern,
        _ => format!("{pattern} ×{count}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}

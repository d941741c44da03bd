//! The tables of `enamel bench`.

use std::io::{Result, Write};

use enamel_train::commands::bench::{
    DecodeFigures, FirstStep, OpFigures, StepFigures, StepProfile,
};
use enamel_train::thousands;

/// The line above the timed steps.
pub fn header(out: &mut impl Write) -> Result<()> {
    writeln!(
        out,
        "{:<8} {:<8} {:>10} {:>10} {:>9} {:>12} {:>12} {:>10}",
        "method", "step", "seconds", "tokens/s", "relative", "trained", "peak memory", "estimated"
    )
}

pub fn step(out: &mut impl Write, step: &StepFigures) -> Result<()> {
    writeln!(
        out,
        "{:<8} {:<8} {:>10.3} {:>10.1} {:>9.2} {:>12} {:>12} {:>10}",
        step.method,
        format!("{}×{}", step.rows, step.tokens),
        step.seconds,
        step.tokens_per_second,
        step.relative,
        thousands(step.trainable as u64),
        gibibytes(step.peak_memory),
        gibibytes(step.estimated_memory)
    )
}

pub fn profile(out: &mut impl Write, step: &StepProfile) -> Result<()> {
    let faults = match step.page_faults {
        Some(count) => format!("{} page faults, ", thousands(count)),
        None => String::new(),
    };
    writeln!(
        out,
        "\nprofile of {} {}×{}: a step of {:.3} s, {faults}{}",
        step.method,
        step.rows,
        step.tokens,
        step.seconds,
        gibibytes(step.peak_memory)
    )?;
    table(out, "operation", &step.ops)?;
    let other = OpFigures {
        op: "other: Burn operations, autodiff, allocation".to_owned(),
        calls: 0,
        seconds: step.other_seconds,
        share: step.other_share(),
        gb_per_second: 0.0,
        gflop_per_second: 0.0,
    };
    row(out, &other)?;
    if !step.products.is_empty() {
        table(out, "matrix product, within the operations", &step.products)?;
    }
    if let (Some(share), Some(speed)) = (step.share_of_product_speed, step.machine_product_speed) {
        writeln!(
            out,
            "the step reaches {:.0} GFLOP/s in products, {:.0}% of the {:.0} measured here",
            step.product_flops as f64 / step.seconds / 1e9,
            100.0 * share,
            speed / 1e9
        )?;
    }
    if let Some(times) = step.times_its_products() {
        writeln!(
            out,
            "it takes {:.3} s longer than its products, {times:.2} times their {:.3} s",
            step.seconds_beyond_products, step.product_seconds
        )?;
    }
    if !step.fallbacks.is_empty() {
        writeln!(out, "fell back to plain Burn operations:")?;
    }
    for fallback in &step.fallbacks {
        writeln!(
            out,
            "  {} × {}: {}",
            fallback.calls, fallback.op, fallback.reason
        )?;
    }
    writeln!(out)
}

fn table(out: &mut impl Write, name: &str, rows: &[OpFigures]) -> Result<()> {
    writeln!(
        out,
        "{name:<45} {:>6} {:>9} {:>6} {:>7} {:>9}",
        "calls", "seconds", "share", "GB/s", "GFLOP/s"
    )?;
    rows.iter().try_for_each(|figures| row(out, figures))
}

/// A count or rate of zero was not counted.
fn row(out: &mut impl Write, figures: &OpFigures) -> Result<()> {
    let counted = |value: f64| match value > 0.0 {
        true => format!("{value:.1}"),
        false => "-".to_owned(),
    };
    let calls = match figures.calls {
        0 => "-".to_owned(),
        calls => calls.to_string(),
    };
    writeln!(
        out,
        "{:<45} {calls:>6} {:>9.4} {:>5.1}% {:>7} {:>9}",
        figures.op,
        figures.seconds,
        100.0 * figures.share,
        counted(figures.gb_per_second),
        counted(figures.gflop_per_second)
    )
}

pub fn decode(out: &mut impl Write, decode: &DecodeFigures) -> Result<()> {
    let variant = match decode.variant.as_str() {
        "base" => "the base".to_owned(),
        method => format!("an unmerged {method} adapter"),
    };
    writeln!(
        out,
        "decoding with {variant}: first token of a prompt of {} after {:.2} s, then {:.1} tokens/s, {}",
        decode.prompt,
        decode.first_token_seconds,
        decode.tokens_per_second,
        gibibytes(decode.peak_memory)
    )?;
    writeln!(
        out,
        "  {:.0} MB of weights a token at {:.1} GB/s allow {:.1} tokens/s: {:.0}% reached",
        decode.weight_bytes as f64 / 1e6,
        decode.read_bandwidth / 1e9,
        decode.read_bandwidth / decode.weight_bytes as f64,
        100.0 * decode.share_of_bandwidth
    )
}

pub fn first_step(out: &mut impl Write, first: &FirstStep) -> Result<()> {
    writeln!(
        out,
        "first {} step, {}×{}, {:.2} s after the process began, {}",
        first.method,
        first.rows,
        first.tokens,
        first.seconds,
        gibibytes(first.peak_memory)
    )?;
    writeln!(
        out,
        "  {:.2} s to open the model, {:.2} to load it, {:.2} to attach the adapter, {:.2} for the step",
        first.opened,
        first.loaded - first.opened,
        first.attached - first.loaded,
        first.seconds - first.attached
    )
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use enamel_train::commands::bench::FallbackFigures;

    use super::*;

    fn said(write: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn figures(op: &str, seconds: f64) -> OpFigures {
        OpFigures {
            op: op.to_owned(),
            calls: 30,
            seconds,
            share: seconds / 2.0,
            gb_per_second: 0.0,
            gflop_per_second: 120.0,
        }
    }

    #[test]
    fn a_profile_names_operations_rest_products_and_fallbacks() {
        let text = said(|out| {
            let step = StepProfile {
                method: "lora".into(),
                rows: 4,
                tokens: 256,
                seconds: 2.0,
                ops: vec![figures("attention backward", 1.5)],
                other_seconds: 0.5,
                products: vec![figures("x·wᵀ", 1.0)],
                product_seconds: 1.0,
                product_flops: 120_000_000_000,
                machine_product_speed: Some(300e9),
                share_of_product_speed: Some(0.2),
                seconds_beyond_products: 1.0,
                fallbacks: vec![FallbackFigures {
                    op: "rope".into(),
                    reason: "f16 tensors".into(),
                    calls: 60,
                }],
                page_faults: Some(12345),
                peak_memory: 1 << 30,
            };
            profile(out, &step)
        });
        for part in [
            "lora 4×256: a step of 2.000 s, 12,345 page faults, 1.00 GiB",
            "attention backward                                30    1.5000  75.0%       -     120.0",
            "other: Burn operations, autodiff, allocation       -    0.5000  25.0%       -         -",
            "60 GFLOP/s in products, 20% of the 300 measured here",
            "1.000 s longer than its products, 2.00 times their 1.000 s",
            "60 × rope: f16 tensors",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
    }

    #[test]
    fn decoding_is_set_against_memory() {
        let text = said(|out| {
            let figures = DecodeFigures {
                variant: "lora".into(),
                prompt: 128,
                first_token_seconds: 0.4,
                tokens_per_second: 30.0,
                weight_bytes: 500_000_000,
                read_bandwidth: 25e9,
                share_of_bandwidth: 0.6,
                peak_memory: 1 << 29,
            };
            decode(out, &figures)
        });
        assert!(text.contains("an unmerged lora adapter"), "{text}");
        assert!(
            text.contains(
                "500 MB of weights a token at 25.0 GB/s allow 50.0 tokens/s: 60% reached"
            ),
            "{text}"
        );
    }
}

//! The Jinja environment chat templates run in: what transformers adds to Jinja, and nothing else.

use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

/// Marks the start of a `{% generation %}` block in a marked rendering (a Unicode noncharacter).
pub(crate) const BLOCK_START: char = '\u{FDD0}';
/// Marks the end of a `{% generation %}` block in a marked rendering.
pub(crate) const BLOCK_END: char = '\u{FDD1}';
/// The context variable that asks for marks.
pub(crate) const MARK_VARIABLE: &str = "__enamel_mark_generation";
/// The name templates are registered under; it has no extension, so nothing is escaped.
pub(crate) const TEMPLATE_NAME: &str = "chat_template";

/// What a template said through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// An environment with `source` as its only template.
///
/// `now` is the time `strftime_now` shows, in seconds since the Unix epoch, UTC.
pub(crate) fn environment(source: &str, now: i64) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", tojson);
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(
                Error::new(ErrorKind::InvalidOperation, "raised by the template")
                    .with_source(Raised(message)),
            )
        },
    );
    env.add_function("strftime_now", move |format: String| strftime(&format, now));
    env.add_function("__enamel_generation", generation_block);
    env.add_template_owned(TEMPLATE_NAME, rewrite_generation_blocks(source).0)?;
    Ok(env)
}

/// `{% generation %}` … `{% endgeneration %}` written as the call blocks transformers' own extension
/// makes of them, so that whitespace control stays the template's; true where there were any.
pub(crate) fn rewrite_generation_blocks(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some((inner, close)) = tag
            .get(2..)
            .and_then(|body| body.find("%}").map(|at| (&body[..at], at + 2)))
        else {
            out.push_str(tag);
            return (out, found);
        };
        let bare = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        let left = &inner[..inner.len() - bare.len()];
        let name = bare.strip_suffix(['-', '+']).unwrap_or(bare);
        let right = &bare[name.len()..];
        match name.trim() {
            "generation" => {
                found = true;
                let _ = write!(out, "{{%{left} call __enamel_generation() {right}%}}");
            }
            "endgeneration" => {
                let _ = write!(out, "{{%{left} endcall {right}%}}");
            }
            _ => out.push_str(&tag[..close + 2]),
        }
        rest = &tag[close + 2..];
    }
    out.push_str(rest);
    (out, found)
}

fn generation_block(state: &mut State, kwargs: Kwargs) -> Result<Value, Error> {
    let caller: Value = kwargs.get("caller")?;
    let marked = state
        .lookup(MARK_VARIABLE)
        .is_some_and(|value| value.is_true());
    let body = caller.call(state, &[])?;
    Ok(if marked {
        Value::from(format!("{BLOCK_START}{body}{BLOCK_END}"))
    } else {
        body
    })
}

/// A JSON value as a template value, object keys in their own order.
pub(crate) fn to_template_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::from(s.as_str()),
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(to_template_value).collect::<Vec<_>>())
        }
        serde_json::Value::Object(map) => Value::from_pairs(
            map.iter()
                .map(|(key, value)| (key.as_str(), to_template_value(value))),
        ),
    }
}

/// The options of Python's `json.dumps` that transformers' `tojson` passes on.
struct JsonLayout {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

/// transformers' `tojson`: `json.dumps(x, ensure_ascii=False, …)`, without HTML escapes.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent_value: Option<Value> = kwargs.get("indent")?;
    let indent = match indent_value {
        Some(v) if v.is_none() || v.is_undefined() => None,
        Some(v) => Some(match v.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(v.as_usize().unwrap_or(0)),
        }),
        None => None,
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let layout = JsonLayout {
        // Python's default: no space after the comma at the end of an indented line.
        item_separator: match &separators {
            Some(s) => s.first().cloned().unwrap_or_default(),
            None if indent.is_some() => ",".to_owned(),
            None => ", ".to_owned(),
        },
        key_separator: match &separators {
            Some(s) => s.get(1).cloned().unwrap_or_default(),
            None => ": ".to_owned(),
        },
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, &layout, 0)?;
    Ok(Value::from(out))
}

fn write_json(
    out: &mut String,
    value: &Value,
    layout: &JsonLayout,
    depth: usize,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
        ValueKind::String => {
            write_json_string(out, value.as_str().unwrap_or_default(), layout.ensure_ascii)
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(out, ['[', ']'], items.len(), layout, depth, |out, i| {
                write_json(out, &items[i], layout, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if layout.sort_keys {
                keys.sort();
            }
            write_items(out, ['{', '}'], keys.len(), layout, depth, |out, i| {
                write_json_string(out, &keys[i].to_string(), layout.ensure_ascii);
                out.push_str(&layout.key_separator);
                write_json(out, &value.get_item(&keys[i])?, layout, depth + 1)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{kind} is not JSON serializable"),
            ));
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    [open, close]: [char; 2],
    count: usize,
    layout: &JsonLayout,
    depth: usize,
    mut item: impl FnMut(&mut String, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let newline = |out: &mut String, depth: usize| {
        if let Some(indent) = &layout.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(open);
    for i in 0..count {
        if i > 0 {
            out.push_str(&layout.item_separator);
        }
        newline(out, depth + 1);
        item(out, i)?;
    }
    if count > 0 {
        newline(out, depth);
    }
    out.push(close);
    Ok(())
}

fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr` of a float: the shortest digits that read back, exponent form outside
/// 1e-4 ≤ |x| < 1e16.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let magnitude = x.abs();
    if x != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(e) => ('-', e),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let mut text = format!("{x}");
    if !text.contains('.') {
        text.push_str(".0");
    }
    text
}

/// Python's `strftime` for the directives chat templates use; an unknown directive stays as written.
pub(crate) fn strftime(format: &str, unix_seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
    ];
    let days = unix_seconds.div_euclid(86_400);
    let seconds = unix_seconds.rem_euclid(86_400);
    let (year, month, day) = civil_from_days(days);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let day_of_year = days - days_from_civil(year, 1, 1) + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            let _ = write!(out, "{value:0width$}");
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(day_of_year, 3),
            Some('e') => {
                let _ = write!(out, "{day:>2}");
            }
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => {
                let _ = write!(out, "{year:04}-{month:02}-{day:02}");
            }
            Some('T') => {
                let _ = write!(out, "{hour:02}:{minute:02}:{second:02}");
            }
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                if !padded {
                    out.push('-');
                }
                out.extend(other);
            }
        }
    }
    out
}

/// (year, month, day) of a day count since 1970-01-01, proleptic Gregorian. Eras of 400 years that
/// start on 1 March put the leap day last (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// The inverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strftime_agrees_with_python() {
        // datetime.utcfromtimestamp(t).strftime(...) in CPython 3.12.
        assert_eq!(strftime("%d %b %Y", 1_709_164_800), "29 Feb 2024");
        assert_eq!(
            strftime("%A, %-d %B %y (%j) %%", 0),
            "Thursday, 1 January 70 (001) %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %I %p", 1_735_689_599),
            "2024-12-31 23:59:59 11 PM"
        );
        assert_eq!(strftime("%F %T %Q", -1), "1969-12-31 23:59:59 %Q");
    }

    #[test]
    fn days_round_trip_over_leap_years() {
        for days in (-200_000..200_000).step_by(97) {
            let (y, m, d) = civil_from_days(days);
            assert_eq!(days_from_civil(y, m, d), days);
        }
    }

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (123456.75, "123456.75"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
        ];
        for (x, expected) in cases {
            assert_eq!(python_float(x), expected);
        }
    }

    #[test]
    fn generation_tags_become_call_blocks_and_others_stay() {
        let (text, found) = rewrite_generation_blocks(
            "{%- generation -%}a{% endgeneration %}{% if x %}{{ y }}{% endif %}{% unclosed",
        );
        assert!(found);
        assert_eq!(
            text,
            "{%- call __enamel_generation() -%}a{% endcall %}{% if x %}{{ y }}{% endif %}{% unclosed"
        );
        assert!(!rewrite_generation_blocks("{% set generation = 1 %}").1);
    }
}

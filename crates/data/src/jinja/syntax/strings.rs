//! Literals: Python's string escapes and numbers.

pub(super) enum Number {
    Int(i128),
    Float(f64),
}

/// The string literal at the start of `text`: its value and its length in bytes. `None` where it
/// does not end; the inner error says which escape is wrong.
pub(super) fn literal(text: &str) -> Option<Result<(String, usize), String>> {
    let mut chars = text.char_indices();
    let (_, quote) = chars.next()?;
    let mut out = String::new();
    loop {
        let (at, c) = chars.next()?;
        if c == quote {
            return Some(Ok((out, at.checked_add(1)?)));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        let (_, escaped) = chars.next()?;
        match escaped {
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'v' => out.push('\u{b}'),
            '\n' => {}
            '\\' | '\'' | '"' => out.push(escaped),
            'x' | 'u' | 'U' => {
                let digits = match escaped {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let mut code = 0_u32;
                for _ in 0..digits {
                    let digit = chars.clone().next().and_then(|(_, c)| c.to_digit(16));
                    let Some(digit) = digit else {
                        return Some(Err(format!("the escape \\{escaped} wants {digits} digits")));
                    };
                    chars.next();
                    code = code.wrapping_mul(16).wrapping_add(digit);
                }
                match char::from_u32(code) {
                    Some(c) => out.push(c),
                    None => return Some(Err(format!("\\{escaped}{code:x} is no character"))),
                }
            }
            '0'..='7' => {
                let mut code = escaped.to_digit(8)?;
                for _ in 0..2 {
                    let Some(digit) = chars.clone().next().and_then(|(_, c)| c.to_digit(8)) else {
                        break;
                    };
                    chars.next();
                    code = code.checked_mul(8)?.checked_add(digit)?;
                }
                out.extend(char::from_u32(code));
            }
            other => {
                out.push('\\');
                out.push(other);
            }
        }
    }
}

/// Length of a run of digits with single underscores between them.
fn digits(text: &str, radix: u32) -> usize {
    let mut length = 0_usize;
    let mut underscore = false;
    for c in text.chars() {
        if c.is_digit(radix) {
            length = length
                .saturating_add(1)
                .saturating_add(usize::from(underscore));
            underscore = false;
        } else if c == '_' && length > 0 && !underscore {
            underscore = true;
        } else {
            break;
        }
    }
    length
}

/// The number at the start of `text` and its length; behind a dot it is an integer. `None` where an
/// integer does not fit.
pub(super) fn number(text: &str, after_dot: bool) -> Option<(Number, usize)> {
    for (prefix, radix) in [
        ("0x", 16),
        ("0X", 16),
        ("0o", 8),
        ("0O", 8),
        ("0b", 2),
        ("0B", 2),
    ] {
        if let Some(tail) = text.strip_prefix(prefix) {
            let tail_digits = tail.strip_prefix('_').unwrap_or(tail);
            let skipped = tail.len().checked_sub(tail_digits.len())?;
            let count = digits(tail_digits, radix);
            if count > 0 {
                let plain = tail_digits.get(..count)?.replace('_', "");
                let length = count.checked_add(skipped)?.checked_add(2)?;
                return Some((
                    Number::Int(i128::from_str_radix(&plain, radix).ok()?),
                    length,
                ));
            }
        }
    }
    let whole = digits(text, 10);
    let mut length = whole;
    if !after_dot {
        let fraction = text
            .get(whole..)?
            .strip_prefix('.')
            .map_or(0, |t| digits(t, 10));
        if fraction > 0 {
            length = length.checked_add(fraction)?.checked_add(1)?;
        }
        if let Some(tail) = text.get(length..)?.strip_prefix(['e', 'E']) {
            let unsigned = tail.strip_prefix(['+', '-']).unwrap_or(tail);
            let count = digits(unsigned, 10);
            if count > 0 {
                let sign = tail.len().checked_sub(unsigned.len())?;
                length = length
                    .checked_add(count)?
                    .checked_add(sign)?
                    .checked_add(1)?;
            }
        }
    }
    let plain = text.get(..length)?.replace('_', "");
    if length > whole {
        return Some((Number::Float(plain.parse().ok()?), length));
    }
    if plain.starts_with('0') {
        // Python has no octal numbers with a leading zero: only the zeros are one.
        let zeros = plain
            .len()
            .checked_sub(plain.trim_start_matches('0').len())?;
        return Some((Number::Int(0), zeros));
    }
    Some((Number::Int(plain.parse().ok()?), length))
}

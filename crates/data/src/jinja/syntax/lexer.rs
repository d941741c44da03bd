//! Tokens of a template, as Jinja2's lexer cuts them under `trim_blocks` and `lstrip_blocks`.

use super::strings;
use crate::jinja::error::{Error, Kind, Result};
use crate::jinja::values::is_space;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Data(String),
    /// `{{`
    VariableBegin,
    /// `}}`
    VariableEnd,
    /// `{%`
    BlockBegin,
    /// `%}`
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    End,
}

const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

fn error(message: impl Into<String>, line: u32) -> Error {
    Error::new(Kind::Syntax, message).at(line)
}

/// The tokens of `source` with their lines. Line ends of every kind become `\n`, and one at the end
/// of the source is dropped.
pub(super) fn tokens(source: &str) -> Result<Vec<(Token, u32)>> {
    let text = source.replace("\r\n", "\n").replace('\r', "\n");
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let mut lexer = Lexer {
        rest: text,
        line: 1,
        line_starting: true,
        tokens: Vec::new(),
    };
    lexer.template()?;
    let line = lexer.line;
    lexer.tokens.push((Token::End, line));
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    rest: &'s str,
    line: u32,
    /// Whether the last tag ended with a line end.
    line_starting: bool,
    tokens: Vec<(Token, u32)>,
}

/// What ends a tag: the text taken, or nothing where the tag does not end here. The sign decides
/// about the whitespace behind it.
fn tag_end<'s>(rest: &'s str, end: &str, trims_newline: bool) -> Option<&'s str> {
    let after_space = |prefix: usize| {
        let tail = rest.get(prefix..)?;
        let kept = tail.trim_start_matches(is_space);
        rest.get(..rest.len().checked_sub(kept.len())?)
    };
    if let Some(tail) = rest.strip_prefix('-')
        && tail.starts_with(end)
    {
        return after_space(end.len().checked_add(1)?);
    }
    if trims_newline
        && let Some(tail) = rest.strip_prefix('+')
        && tail.starts_with(end)
    {
        return rest.get(..end.len().checked_add(1)?);
    }
    let tail = rest.strip_prefix(end)?;
    let newline = usize::from(trims_newline && tail.starts_with('\n'));
    rest.get(..end.len().checked_add(newline)?)
}

fn sign(rest: &str) -> Option<char> {
    rest.chars().next().filter(|c| matches!(c, '-' | '+'))
}

/// `{% raw %}` or `{% endraw %}` at the start of `rest`: its sign and its length.
fn raw_tag(rest: &str, name: &str) -> Option<(Option<char>, usize)> {
    let inner = rest.strip_prefix("{%")?;
    let sign = sign(inner);
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.trim_start_matches(is_space).strip_prefix(name)?;
    let inner = inner.trim_start_matches(is_space);
    let ends = if name == "raw" {
        match inner.strip_prefix("%}") {
            Some(_) => "%}",
            None => tag_end(inner, "%}", false)?,
        }
    } else {
        tag_end(inner, "%}", true)?
    };
    let left = inner.len().checked_sub(ends.len())?;
    Some((sign, rest.len().checked_sub(left)?))
}

impl<'s> Lexer<'s> {
    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Takes `bytes` of the rest.
    fn take(&mut self, bytes: usize) -> &'s str {
        let (taken, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        self.rest = rest;
        let lines = taken.bytes().filter(|b| *b == b'\n').count();
        self.line = self.line.saturating_add(lines as u32);
        taken
    }

    /// Text before a tag, shortened as the tag's sign (or its absence) says.
    fn data(&mut self, text: &'s str, sign: Option<char>, strips_line: bool) {
        let kept = match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if strips_line => {
                let line = text.rfind('\n').map_or(0, |at| at.saturating_add(1));
                let blank = text.get(line..).unwrap_or("").chars().all(is_space);
                match text.get(..line) {
                    Some(before) if blank && (line > 0 || self.line_starting) => before,
                    _ => text,
                }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.push(Token::Data(kept.to_owned()));
        }
    }

    fn template(&mut self) -> Result<()> {
        while let Some(at) = next_tag(self.rest) {
            let tail = self.rest.get(at..).unwrap_or("");
            if let Some((sign, length)) = raw_tag(tail, "raw") {
                let text = self.take(at);
                self.data(text, sign, true);
                let tag = self.take(length);
                self.line_starting = tag.ends_with('\n');
                self.raw()?;
                continue;
            }
            let kind = tail.get(..2).unwrap_or("");
            let sign = sign(tail.get(2..).unwrap_or(""));
            let text = self.take(at);
            self.data(text, sign, kind != "{{");
            self.take(2_usize.saturating_add(usize::from(sign.is_some())));
            self.line_starting = false;
            match kind {
                "{#" => self.comment()?,
                "{{" => {
                    self.push(Token::VariableBegin);
                    self.inside("}}", Token::VariableEnd)?;
                }
                _ => {
                    self.push(Token::BlockBegin);
                    self.inside("%}", Token::BlockEnd)?;
                }
            }
        }
        let text = self.take(self.rest.len());
        if !text.is_empty() {
            self.push(Token::Data(text.to_owned()));
        }
        Ok(())
    }

    fn comment(&mut self) -> Result<()> {
        let mut at = 0_usize;
        while let Some(c) = self.rest.get(at..).and_then(|tail| tail.chars().next()) {
            let tail = self.rest.get(at..).unwrap_or("");
            if let Some(end) = tag_end(tail, "#}", true) {
                let taken = self.take(at.saturating_add(end.len()));
                self.line_starting = taken.ends_with('\n');
                return Ok(());
            }
            at = at.saturating_add(c.len_utf8());
        }
        if self.rest.is_empty() {
            return Ok(()); // nothing follows, which Jinja2 lets pass
        }
        Err(error("a comment has no end (#})", self.line))
    }

    fn raw(&mut self) -> Result<()> {
        let mut from = 0_usize;
        while let Some(found) = self.rest.get(from..).and_then(|tail| tail.find("{%")) {
            let at = from.saturating_add(found);
            if let Some((sign, length)) = raw_tag(self.rest.get(at..).unwrap_or(""), "endraw") {
                let text = self.take(at);
                self.data(text, sign, true);
                let tag = self.take(length);
                self.line_starting = tag.ends_with('\n');
                return Ok(());
            }
            from = at.saturating_add(2);
        }
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(error("a raw block has no end ({% endraw %})", self.line))
    }

    /// The tokens of a tag up to its end. An end inside brackets is none.
    fn inside(&mut self, end: &str, end_token: Token) -> Result<()> {
        let mut open: Vec<&'static str> = Vec::new();
        let mut after_dot = false;
        loop {
            if open.is_empty()
                && let Some(taken) = tag_end(self.rest, end, end == "%}")
            {
                self.push(end_token);
                let taken = self.take(taken.len());
                self.line_starting = taken.ends_with('\n');
                return Ok(());
            }
            let Some(c) = self.rest.chars().next() else {
                return Ok(()); // the parser says what is missing
            };
            if is_space(c) {
                let kept = self.rest.trim_start_matches(is_space).len();
                self.take(self.rest.len().saturating_sub(kept));
                after_dot = false;
            } else if c.is_ascii_digit() {
                self.number(after_dot)?;
                after_dot = false;
            } else if c.is_alphanumeric() || c == '_' {
                let kept = self
                    .rest
                    .trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
                let name = self
                    .rest
                    .get(..self.rest.len().saturating_sub(kept.len()))
                    .unwrap_or("");
                if c.is_numeric() {
                    return Err(error(format!("{name:?} is no name"), self.line));
                }
                self.push(Token::Name(name.to_owned()));
                self.take(name.len());
                after_dot = false;
            } else if matches!(c, '"' | '\'') {
                let (text, length) = strings::literal(self.rest)
                    .ok_or_else(|| error("a string has no end", self.line))?
                    .map_err(|message| error(message, self.line))?;
                self.push(Token::Str(text));
                self.take(length);
                after_dot = false;
            } else {
                let operator = OPERATORS
                    .into_iter()
                    .find(|op| self.rest.starts_with(op))
                    .ok_or_else(|| error(format!("unexpected character {c:?}"), self.line))?;
                match operator {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(operator) => {
                        return Err(error(format!("unexpected {operator:?}"), self.line));
                    }
                    _ => {}
                }
                self.push(Token::Op(operator));
                self.take(operator.len());
                after_dot = operator == ".";
            }
        }
    }

    fn number(&mut self, after_dot: bool) -> Result<()> {
        let (token, length) = strings::number(self.rest, after_dot)
            .ok_or_else(|| error("an integer is too large", self.line))?;
        self.push(match token {
            strings::Number::Int(i) => Token::Int(i),
            strings::Number::Float(x) => Token::Float(x),
        });
        self.take(length);
        Ok(())
    }
}

/// Where the next tag begins.
fn next_tag(text: &str) -> Option<usize> {
    let mut from = 0_usize;
    while let Some(found) = text.get(from..)?.find('{') {
        let at = from.checked_add(found)?;
        let next = text.as_bytes().get(at.checked_add(1)?)?;
        if matches!(next, b'%' | b'{' | b'#') {
            return Some(at);
        }
        from = at.checked_add(1)?;
    }
    None
}

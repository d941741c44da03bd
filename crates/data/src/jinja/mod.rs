//! A Jinja for chat templates: Jinja2's language and Python's values as far as templates of models
//! use them, with a budget.
//!
//! Templates are programs that come with downloaded models, and their text is what a model is trained
//! on: so every difference from Jinja2 is other training text, and every operation without a limit is
//! a way to stop the machine. Values are counted as they are made ([`meter`]), recursion is counted
//! in the parser and in the interpreter, and numbers that Python would let grow are errors.

mod error;
mod interpret;
mod library;
mod meter;
mod syntax;
#[cfg(test)]
mod tests;
mod values;

use std::ops::Range;

use serde_json::Value as Json;

pub(crate) use error::{Error, Kind};
use interpret::{Marks, Settings};
use meter::Limits;
use syntax::ast::Ast;
use values::Value;

/// Stack of the thread that takes what goes deeper than the caller's stack may hold.
const LARGE_STACK: usize = 256 << 20;
/// How deep the parser goes on the caller's own stack; each level of it is a dozen calls.
const PARSER_LEVELS: u32 = 32;
/// How deep the interpreter goes on the caller's own stack.
const OWN_LEVELS: u32 = 100;
/// How deep the interpreter goes on the large stack: what blocks, expressions and calls allow.
const MOST_LEVELS: u32 = 20_000;

/// A template that parses.
#[derive(Debug)]
pub(crate) struct Template {
    ast: Ast,
}

/// What a rendering gives: the text, and where the `{% generation %}` blocks are in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rendering {
    pub(crate) text: String,
    /// Byte ranges of outermost blocks, in order; none where they cannot be told.
    pub(crate) spans: Vec<Range<usize>>,
}

/// Marks the start of a block in a rendering with marks (a Unicode noncharacter).
const BLOCK_START: char = '\u{FDD0}';
/// Marks the end of a block in a rendering with marks.
const BLOCK_END: char = '\u{FDD1}';

impl Template {
    /// Parses `source`.
    ///
    /// # Errors
    /// Where it is no Jinja, too long or nested too deeply.
    pub(crate) fn parse(source: &str) -> Result<Self, Error> {
        let ast = match syntax::parse(source, PARSER_LEVELS) {
            Err(error) if error.kind() == Kind::Depth => {
                on_large_stack(|| syntax::parse(source, MOST_LEVELS))?
            }
            parsed => parsed?,
        };
        Ok(Self { ast })
    }

    /// Whether there are `{% generation %}` blocks.
    pub(crate) fn has_generation_blocks(&self) -> bool {
        self.ast.has_generation
    }

    /// Renders with `context` as variables; `now` is what `strftime_now` shows, in Unix seconds.
    ///
    /// # Errors
    /// What the template raised, did wrong, or wanted too much of.
    pub(crate) fn render(&self, context: &[(&str, &Json)], now: i64) -> Result<Rendering, Error> {
        let (text, generations) = self.run(context, now, Marks::Record)?;
        if !generations.captured {
            return Ok(Rendering {
                text,
                spans: generations.spans,
            });
        }
        let mut rendering = Rendering {
            text,
            spans: Vec::new(),
        };
        if rendering.text.contains([BLOCK_START, BLOCK_END]) {
            return Ok(rendering);
        }
        // A block inside a macro or a set block: only marks in its text can find it again.
        let (marked, _) = self.run(context, now, Marks::Write(BLOCK_START, BLOCK_END))?;
        if let Some((plain, spans)) = unmarked(&marked)
            && plain == rendering.text
        {
            rendering.spans = spans;
        }
        Ok(rendering)
    }

    fn run(
        &self,
        context: &[(&str, &Json)],
        now: i64,
        marks: Marks,
    ) -> Result<(String, interpret::Generations), Error> {
        match self.run_here(context, now, marks, OWN_LEVELS) {
            Err(error) if error.kind() == Kind::Depth => {
                on_large_stack(|| self.run_here(context, now, marks, MOST_LEVELS))
            }
            done => done,
        }
    }

    fn run_here(
        &self,
        context: &[(&str, &Json)],
        now: i64,
        marks: Marks,
        levels: u32,
    ) -> Result<(String, interpret::Generations), Error> {
        let bytes = context.iter().map(|(_, json)| size_of_json(json)).sum();
        let limits = Limits::for_input(bytes);
        meter::start(limits);
        let mut values = Vec::with_capacity(context.len());
        for (name, json) in context {
            values.push((*name, Value::from_json(json)?));
        }
        let settings = Settings {
            context: &values,
            now,
            marks,
            output: limits.output,
            levels,
        };
        interpret::render(&self.ast, &settings)
    }
}

/// Runs `work` on a thread with a stack for deep recursion.
fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let failed = |detail: &str| {
        Error::new(
            Kind::Runtime,
            format!("the template nests deeply, and a thread for it {detail}"),
        )
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(LARGE_STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| failed(&format!("could not be started: {error}")))?;
        thread.join().map_err(|_| failed("ended early"))?
    })
}

/// What a JSON value holds, in bytes: the measure of the budget.
fn size_of_json(json: &Json) -> usize {
    let own = size_of::<Value>();
    own.saturating_add(match json {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(size_of_json).sum(),
        Json::Object(map) => map
            .iter()
            .map(|(key, value)| key.len().saturating_add(size_of_json(value)))
            .sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    })
}

/// Text without marks, and what was between them; nothing where they do not match.
fn unmarked(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut open) = (Vec::new(), Vec::new());
    for c in marked.chars() {
        match c {
            BLOCK_START => open.push(text.len()),
            BLOCK_END => {
                let start = open.pop()?;
                if open.is_empty() {
                    spans.push(start..text.len());
                }
            }
            c => text.push(c),
        }
    }
    open.is_empty().then_some((text, spans))
}

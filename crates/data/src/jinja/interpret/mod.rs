//! Rendering: a walk over the syntax tree.

mod calls;
mod expressions;
mod statements;

pub(crate) use expressions::compare;

use std::cell::RefCell;
use std::rc::Rc;

use super::error::{Error, Kind, Result};
use super::library::Calls;
use super::meter::{Builder, CALL_DEPTH, Held, spend};
use super::syntax::ast::{Ast, Const, Symbol};
use super::values::{Object, Value};

/// Names that are as much work to look through as one step.
const NAMES_PER_STEP: usize = 16;

/// Variables of one block and where to look further.
#[derive(Debug, Default)]
pub(crate) struct Scope {
    variables: RefCell<Vec<(Symbol, Value)>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    fn inside(parent: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self {
            variables: RefCell::default(),
            parent: Some(Rc::clone(parent)),
        })
    }

    fn set(&self, symbol: Symbol, value: Value) {
        let mut variables = self.variables.borrow_mut();
        match variables.iter_mut().find(|(own, _)| *own == symbol) {
            Some((_, old)) => *old = value,
            None => variables.push((symbol, value)),
        }
    }

    fn get(&self, symbol: Symbol) -> Result<Option<Value>> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            let variables = here.variables.borrow();
            let place = variables.iter().position(|(own, _)| *own == symbol);
            let looked_at = place.unwrap_or(variables.len());
            spend((looked_at / NAMES_PER_STEP) as u64)?;
            if let Some((_, value)) = place.and_then(|at| variables.get(at)) {
                return Ok(Some(value.clone()));
            }
            scope = here.parent.as_deref();
        }
        Ok(None)
    }
}

/// What a rendering gave besides its text.
#[derive(Debug, Default)]
pub(crate) struct Generations {
    /// Byte ranges of outermost blocks whose text went straight to the output.
    pub(crate) spans: Vec<std::ops::Range<usize>>,
    /// Whether a block's text was captured on its way, so that only marks can find it.
    pub(crate) captured: bool,
}

/// How a rendering treats `{% generation %}` blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marks {
    /// Records where their text goes.
    Record,
    /// Writes a mark before and after it.
    Write(char, char),
}

/// What a rendering is given.
pub(crate) struct Settings<'s> {
    pub(crate) context: &'s [(&'s str, Value)],
    /// Seconds since the Unix epoch, for `strftime_now`.
    pub(crate) now: i64,
    pub(crate) marks: Marks,
    /// The longest output, in bytes.
    pub(crate) output: usize,
    /// How deep the interpreter may recurse on this thread's stack.
    pub(crate) levels: u32,
}

/// What a namespace or a scope holds besides its values, in bytes.
const KEPT_BYTES: usize = 256;

pub(super) struct Interpreter<'t> {
    ast: &'t Ast,
    constants: Vec<Value>,
    /// The output, and above it the text being captured.
    out: Vec<Builder>,
    output_limit: usize,
    /// The text a filter block or set block filters.
    filtered: Option<Value>,
    levels: u32,
    levels_limit: u32,
    calls: u32,
    /// Namespaces and scopes that may be part of a cycle, to be emptied at the end.
    namespaces: Vec<Rc<Object>>,
    cyclic_scopes: Vec<Rc<Scope>>,
    /// What those two lists keep alive.
    kept: Held,
    marks: Marks,
    generations: Generations,
    open_generations: u32,
    now: i64,
}

/// Renders `ast`.
///
/// # Errors
/// What the template did wrong, or wanted too much of.
pub(crate) fn render(ast: &Ast, settings: &Settings<'_>) -> Result<(String, Generations)> {
    let mut constants = Vec::with_capacity(ast.consts.len());
    for constant in &ast.consts {
        constants.push(match constant {
            Const::None => Value::None,
            Const::Bool(b) => Value::Bool(*b),
            Const::Int(i) => Value::Int(*i),
            Const::Float(x) => Value::Float(*x),
            Const::Str(text) => Value::text(text.as_str())?,
        });
    }
    let mut interpreter = Interpreter {
        ast,
        constants,
        out: vec![Builder::new()],
        output_limit: settings.output,
        filtered: None,
        levels: 0,
        levels_limit: settings.levels,
        calls: 0,
        namespaces: Vec::new(),
        cyclic_scopes: Vec::new(),
        kept: Held::default(),
        marks: settings.marks,
        generations: Generations::default(),
        open_generations: 0,
        now: settings.now,
    };
    let root = Rc::new(Scope::default());
    for (symbol, name) in ast.names.iter().enumerate() {
        let given = settings.context.iter().rev().find(|(own, _)| own == name);
        let value = match given {
            Some((_, value)) => Some(value.clone()),
            None => super::library::global(name),
        };
        if let Some(value) = value {
            root.set(symbol as Symbol, value);
        }
    }
    // Assignments make variables of the template's own, beside those it was given.
    let top = Scope::inside(&root);
    interpreter.run(&ast.body, &top)?;
    let text = match interpreter.out.first_mut() {
        Some(out) => std::mem::take(out).finish().0,
        None => String::new(),
    };
    let generations = std::mem::take(&mut interpreter.generations);
    Ok((text, generations))
}

impl Drop for Interpreter<'_> {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            if let Object::Namespace(namespace) = namespace.as_ref() {
                let attributes = std::mem::take(&mut *namespace.0.borrow_mut());
                drop(attributes);
            }
        }
        for scope in &self.cyclic_scopes {
            let variables = std::mem::take(&mut *scope.variables.borrow_mut());
            drop(variables);
        }
    }
}

impl Interpreter<'_> {
    /// One level deeper in the interpreter's own recursion.
    fn enter(&mut self) -> Result<()> {
        spend(1)?;
        self.levels = self.levels.saturating_add(1);
        if self.levels > self.levels_limit {
            return Err(Error::new(
                Kind::Depth,
                format!(
                    "the template goes more than {} levels deep",
                    self.levels_limit
                ),
            ));
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.levels = self.levels.saturating_sub(1);
    }

    fn enter_call(&mut self) -> Result<()> {
        self.calls = self.calls.saturating_add(1);
        if self.calls > CALL_DEPTH {
            return Err(Error::new(
                Kind::Budget,
                format!("macros or loops call each other more than {CALL_DEPTH} levels deep"),
            ));
        }
        Ok(())
    }

    fn leave_call(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }

    /// Where text goes now.
    fn out(&mut self) -> &mut Builder {
        if self.out.is_empty() {
            self.out.push(Builder::new());
        }
        let last = self.out.len().saturating_sub(1);
        // There is always one: see above.
        #[allow(clippy::indexing_slicing, reason = "the stack of outputs is not empty")]
        &mut self.out[last]
    }

    /// Checks the output's length after something was written.
    fn written(&self) -> Result<()> {
        match self.out.as_slice() {
            [out] if out.len() > self.output_limit => Err(Error::new(
                Kind::Budget,
                format!(
                    "the template writes more than {} MiB, the most for a conversation of this size",
                    self.output_limit >> 20_u32
                ),
            )),
            _ => Ok(()),
        }
    }

    fn name(&self, symbol: Symbol) -> &str {
        let name = self.ast.names.get(symbol as usize);
        name.map_or("", String::as_str)
    }

    /// Takes what a library function made that outlives its call.
    fn keep(&mut self, calls: Calls) -> Result<Value> {
        match calls {
            Calls::Value(value) => Ok(value),
            Calls::Namespace(namespace) => {
                self.kept.grow(KEPT_BYTES)?;
                self.namespaces.push(Rc::clone(&namespace));
                Ok(Value::Object(namespace))
            }
        }
    }

    /// Notes a scope that a value is about to hold. Such scopes are emptied at the end, one after the
    /// other: chains of them would else be freed by recursion, and cycles never.
    fn keep_scope(&mut self, scope: &Rc<Scope>) -> Result<()> {
        let known = self
            .cyclic_scopes
            .last()
            .is_some_and(|last| Rc::ptr_eq(last, scope));
        if !known {
            self.kept.grow(KEPT_BYTES)?;
            self.cyclic_scopes.push(Rc::clone(scope));
        }
        Ok(())
    }
}

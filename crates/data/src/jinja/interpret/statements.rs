//! Statements.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::{Interpreter, Marks, NAMES_PER_STEP, Scope};
use crate::jinja::error::{Error, Kind, Result, type_error, value_error};
use crate::jinja::library::Args;
use crate::jinja::meter::{Builder, spend, spend_bytes};
use crate::jinja::syntax::ast::{CALLER, Expr, Extra, KWARGS, LOOP, Stmt, Target, VARARGS};
use crate::jinja::values::{LoopState, Object, Seq, SeqKind, Value, text_of};

/// What follows a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

impl<'t> Interpreter<'t> {
    pub(super) fn run(&mut self, body: &'t [Stmt], scope: &Rc<Scope>) -> Result<Flow> {
        self.enter()?;
        for statement in body {
            match self.statement(statement, scope)? {
                Flow::Next => {}
                other => {
                    self.leave();
                    return Ok(other);
                }
            }
        }
        self.leave();
        Ok(Flow::Next)
    }

    fn statement(&mut self, statement: &'t Stmt, scope: &Rc<Scope>) -> Result<Flow> {
        match statement {
            Stmt::Text(text) => {
                self.out().push_str(text)?;
                self.written()?;
            }
            Stmt::Emit(expr) => {
                let value = self.eval(expr, scope)?;
                text_of(self.out(), &value).map_err(|e| e.at(expr.line))?;
                self.written().map_err(|e| e.at(expr.line))?;
            }
            Stmt::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.is_true() {
                        return self.run(body, scope);
                    }
                }
                return self.run(otherwise, scope);
            }
            Stmt::For(number) => self.for_loop(*number, scope)?,
            Stmt::Set(target, expr) => {
                let value = self.eval(expr, scope)?;
                self.assign(target, value, scope)
                    .map_err(|e| e.at(expr.line))?;
            }
            Stmt::Macro(symbol, number) => {
                self.keep_scope(scope)?;
                let object = Object::Macro(*number, Rc::clone(scope));
                scope.set(*symbol, Value::object(object));
            }
            Stmt::Break => return Ok(Flow::Break),
            Stmt::Continue => return Ok(Flow::Continue),
            Stmt::Scope(body) => return self.run(body, &Scope::inside(scope)),
            Stmt::SetBlock(..)
            | Stmt::CallBlock(..)
            | Stmt::Filter(..)
            | Stmt::With(..)
            | Stmt::Generation(..)
            | Stmt::Refused(..) => return self.rare_statement(statement, scope),
        }
        Ok(Flow::Next)
    }

    /// The statements with more in them, apart so that the usual ones need little stack.
    #[inline(never)]
    fn rare_statement(&mut self, statement: &'t Stmt, scope: &Rc<Scope>) -> Result<Flow> {
        match statement {
            Stmt::SetBlock(target, filter, body) => {
                let (text, flow) = self.capture(body, &Scope::inside(scope))?;
                if flow == Flow::Next {
                    let value = self.filter_text(filter.as_ref(), text, scope)?;
                    self.assign(target, value, scope)?;
                }
                return Ok(flow);
            }
            Stmt::Filter(filter, body) => {
                let (text, flow) = self.capture(body, &Scope::inside(scope))?;
                if flow == Flow::Next {
                    let value = self.filter_text(Some(filter), text, scope)?;
                    text_of(self.out(), &value)?;
                    self.written()?;
                }
                return Ok(flow);
            }
            Stmt::CallBlock(call, number) => {
                self.keep_scope(scope)?;
                let caller = Value::object(Object::Macro(*number, Rc::clone(scope)));
                let value = self.call_expression(call, scope, Some(caller))?;
                text_of(self.out(), &value)?;
                self.written()?;
            }
            Stmt::With(assignments, body) => {
                let inner = Scope::inside(scope);
                for (target, expr) in assignments {
                    let value = self.eval(expr, scope)?;
                    self.assign(target, value, &inner)?;
                }
                return self.run(body, &inner);
            }
            Stmt::Generation(body, takes) => self.generation(body, *takes, scope)?,
            Stmt::Refused(name, line) => {
                let message = format!(
                    "chat templates cannot use {name}: a template is one text, there are no others"
                );
                return Err(Error::new(Kind::Security, message).at(*line));
            }
            _ => {}
        }
        Ok(Flow::Next)
    }

    fn generation(&mut self, body: &'t [Stmt], takes: Extra, scope: &Rc<Scope>) -> Result<()> {
        let inner = Scope::inside(scope);
        if takes.caller {
            inner.set(CALLER, Value::undefined("No caller defined"));
        }
        if takes.varargs {
            inner.set(VARARGS, Value::tuple(Vec::new())?);
        }
        if takes.kwargs {
            inner.set(KWARGS, Args::dict_of(Vec::new())?);
        }
        let start = self.out().len();
        match self.marks {
            Marks::Write(open, close) => {
                self.out().push(open)?;
                self.run(body, &inner)?;
                self.out().push(close)?;
            }
            Marks::Record => {
                self.open_generations = self.open_generations.saturating_add(1);
                self.run(body, &inner)?;
                self.open_generations = self.open_generations.saturating_sub(1);
                if self.open_generations > 0 {
                    return Ok(());
                }
                let end = self.out().len();
                match self.out.len() {
                    1 => self.generations.spans.push(start..end),
                    _ => self.generations.captured = true,
                }
            }
        }
        Ok(())
    }

    /// What `body` writes.
    fn capture(&mut self, body: &'t [Stmt], scope: &Rc<Scope>) -> Result<(Value, Flow)> {
        self.out.push(Builder::new());
        let flow = self.run(body, scope)?;
        let text = self.out.pop().unwrap_or_default();
        Ok((Value::built(text), flow))
    }

    fn filter_text(
        &mut self,
        filter: Option<&'t Expr>,
        text: Value,
        scope: &Rc<Scope>,
    ) -> Result<Value> {
        let Some(filter) = filter else {
            return Ok(text);
        };
        let outer = self.filtered.replace(text);
        let filtered = self.eval(filter, scope);
        self.filtered = outer;
        filtered
    }

    pub(super) fn assign(
        &mut self,
        target: &'t Target,
        value: Value,
        scope: &Rc<Scope>,
    ) -> Result<()> {
        match target {
            Target::Name(symbol) => {
                spend((scope.len() / NAMES_PER_STEP) as u64)?;
                scope.set(*symbol, value);
            }
            Target::Attr(symbol, name) => {
                let owner = scope.get(*symbol)?;
                let Some(Value::Object(object)) = &owner else {
                    return self.not_a_namespace(*symbol);
                };
                let Object::Namespace(namespace) = object.as_ref() else {
                    return self.not_a_namespace(*symbol);
                };
                if name.starts_with('_') {
                    return Err(Error::new(
                        Kind::Security,
                        format!(
                            "a namespace's attributes cannot begin with an underscore ({name})"
                        ),
                    ));
                }
                let mut attributes = namespace.0.borrow_mut();
                spend((attributes.len() / NAMES_PER_STEP) as u64)?;
                match attributes.iter_mut().find(|(own, _)| own == name) {
                    Some((_, old)) => *old = value,
                    None => attributes.push((name.clone(), value)),
                }
            }
            Target::Tuple(targets) => {
                let items = value.items()?;
                if items.len() != targets.len() {
                    let (wanted, given) = (targets.len(), items.len());
                    return value_error(match given > wanted {
                        true => format!("too many values to unpack (expected {wanted})"),
                        false => {
                            format!("not enough values to unpack (expected {wanted}, got {given})")
                        }
                    });
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item, scope)?;
                }
            }
        }
        Ok(())
    }

    fn not_a_namespace<T>(&self, symbol: u32) -> Result<T> {
        Err(Error::new(
            Kind::Runtime,
            format!(
                "{:?} is no namespace, so its attributes cannot be set",
                self.name(symbol)
            ),
        ))
    }

    fn for_loop(&mut self, number: usize, scope: &Rc<Scope>) -> Result<()> {
        let Some(definition) = self.ast.loops.get(number) else {
            return Ok(());
        };
        let value = self.eval(&definition.iter, scope)?;
        self.run_loop(number, &value, scope, 0)
            .map_err(|e| e.at(definition.line))
    }

    /// Runs a loop over `value`'s items, in `scope`, at a depth of recursion.
    fn run_loop(
        &mut self,
        number: usize,
        value: &Value,
        scope: &Rc<Scope>,
        depth0: i128,
    ) -> Result<()> {
        let ast = self.ast;
        let Some(definition) = ast.loops.get(number) else {
            return Ok(());
        };
        let items = self.loop_items(definition, value, scope)?;
        // As Jinja2: the else part runs unless the body was gone through to its end once.
        let mut completed = false;
        if definition.recursive {
            self.keep_scope(scope)?;
        }
        let state = Rc::new(Object::Loop(LoopState {
            items: Rc::clone(&items),
            at: Cell::new(0),
            depth0,
            recursive: definition.recursive.then(|| (number, Rc::clone(scope))),
            last_changed: RefCell::new(None),
        }));
        for (at, item) in items.items.iter().enumerate() {
            if let Object::Loop(state) = state.as_ref() {
                state.at.set(at);
            }
            let inner = Scope::inside(scope);
            inner.set(LOOP, Value::Object(Rc::clone(&state)));
            self.assign(&definition.target, item.clone(), &inner)?;
            match self.run(&definition.body, &inner)? {
                Flow::Next => completed = true,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        if !completed {
            self.run(&definition.otherwise, &Scope::inside(scope))?;
        }
        Ok(())
    }

    /// The items a loop goes through: all of them, or those its condition lets pass.
    fn loop_items(
        &mut self,
        definition: &'t crate::jinja::syntax::ast::Loop,
        value: &Value,
        scope: &Rc<Scope>,
    ) -> Result<Rc<Seq>> {
        let Some(filter) = &definition.filter else {
            if let Value::Seq(seq) = value {
                return Ok(Rc::clone(seq));
            }
            return Ok(Rc::new(Seq::new(value.items()?, SeqKind::List)?));
        };
        let mut passing = Vec::new();
        for item in value.items()? {
            let inner = Scope::inside(scope);
            self.assign(&definition.target, item.clone(), &inner)?;
            if self.eval(filter, &inner)?.is_true() {
                passing.push(item);
            }
        }
        Ok(Rc::new(Seq::new(passing, SeqKind::List)?))
    }

    /// `loop(items)` in a recursive loop: what the loop writes for them.
    pub(super) fn call_loop(&mut self, state: &LoopState, args: &Args) -> Result<Value> {
        let Some((number, scope)) = &state.recursive else {
            return type_error("only a loop marked recursive can be called");
        };
        let [items] = args.bind("loop", ["iterable"])?;
        let items = items.unwrap_or(Value::None);
        let depth = state.depth0.saturating_add(1);
        self.enter_call()?;
        self.out.push(Builder::new());
        self.run_loop(*number, &items, scope, depth)?;
        self.leave_call();
        let text = self.out.pop().unwrap_or_default();
        Ok(Value::built(text))
    }

    /// Calls a macro: what it writes.
    pub(super) fn call_macro(
        &mut self,
        number: usize,
        scope: &Rc<Scope>,
        mut args: Args,
    ) -> Result<Value> {
        let ast = self.ast;
        let Some(definition) = ast.macros.get(number) else {
            return type_error("the macro is gone");
        };
        let name = &definition.name;
        let inner = Scope::inside(scope);
        let count = definition.arguments.len();
        let extra = match args.positional.len() > count {
            true => args.positional.split_off(count),
            false => Vec::new(),
        };
        let given = args.positional.len();
        // Each argument is looked for among those before it.
        spend((count.saturating_mul(count) / NAMES_PER_STEP) as u64)?;
        let mut explicit_caller = false;
        for (at, (symbol, argument)) in definition.arguments.iter().enumerate() {
            explicit_caller = explicit_caller || argument == "caller";
            let positional = args.positional.get(at).cloned();
            let value = match positional {
                Some(value) => Some(value),
                None => args.take_named(argument),
            };
            if let Some(value) = value {
                inner.set(*symbol, value);
            }
        }
        // Defaults are worked out in the macro's scope, where earlier arguments are known.
        let first_default = count.saturating_sub(definition.defaults.len());
        for (at, (symbol, argument)) in definition.arguments.iter().enumerate().skip(given) {
            if inner.has(*symbol) {
                continue;
            }
            let default = at.checked_sub(first_default);
            let value = match default.and_then(|at| definition.defaults.get(at)) {
                Some(default) => self.eval(default, &inner)?,
                None => Value::undefined(&format!("parameter '{argument}' was not provided")),
            };
            inner.set(*symbol, value);
        }
        if definition.takes.caller && !explicit_caller {
            let caller = args.take_named("caller");
            let caller = caller.unwrap_or_else(|| Value::undefined("No caller defined"));
            inner.set(CALLER, caller);
        }
        if definition.takes.kwargs {
            let rest = std::mem::take(&mut args.named);
            inner.set(KWARGS, Args::dict_of(rest)?);
        } else if let Some((keyword, _)) = args.named.first() {
            return type_error(format!(
                "macro '{name}' takes no keyword argument '{keyword}'"
            ));
        }
        if definition.takes.varargs {
            inner.set(VARARGS, Value::tuple(extra)?);
        } else if !extra.is_empty() {
            return type_error(format!(
                "macro '{name}' takes not more than {count} argument(s)"
            ));
        }
        self.enter_call()?;
        let (text, _) = self.capture(&definition.body, &inner)?;
        self.leave_call();
        spend_bytes(text.as_str().map_or(0, str::len))?;
        Ok(text)
    }
}

impl Scope {
    fn len(&self) -> usize {
        self.variables.borrow().len()
    }

    /// Whether this scope itself has the variable.
    fn has(&self, symbol: u32) -> bool {
        let variables = self.variables.borrow();
        variables.iter().any(|(own, _)| *own == symbol)
    }
}

//! Expressions.

use std::cmp::Ordering;
use std::rc::Rc;

use super::{Interpreter, NAMES_PER_STEP, Scope};
use crate::jinja::error::{Result, type_error};
use crate::jinja::library::{self, Args};
use crate::jinja::meter::spend;
use crate::jinja::syntax::ast::{Arguments, Binary, Comparison, Expr, ExprKind, Symbol, Unary};
use crate::jinja::values::{
    DictBuilder, Object, Value, add, arithmetic, compare_order, concat, contains, equal, negative,
    positive,
};

impl<'t> Interpreter<'t> {
    pub(super) fn eval(&mut self, expr: &'t Expr, scope: &Rc<Scope>) -> Result<Value> {
        self.enter().map_err(|e| e.at(expr.line))?;
        let value = match &expr.kind {
            ExprKind::Const(number) => {
                let constant = self.constants.get(*number);
                Ok(constant.cloned().unwrap_or(Value::None))
            }
            ExprKind::Name(symbol) => self.variable(*symbol, scope),
            ExprKind::Attr(inner, name) => {
                let owner = self.eval(inner, scope)?;
                library::attribute(&owner, name)
            }
            ExprKind::Item(inner, key) => {
                let owner = self.eval(inner, scope)?;
                let key = self.eval(key, scope)?;
                library::item(&owner, &key)
            }
            ExprKind::And(pair) => {
                let [left, right] = pair.as_ref();
                let left = self.eval(left, scope)?;
                match left.is_true() {
                    true => self.eval(right, scope),
                    false => Ok(left),
                }
            }
            ExprKind::Or(pair) => {
                let [left, right] = pair.as_ref();
                let left = self.eval(left, scope)?;
                match left.is_true() {
                    true => Ok(left),
                    false => self.eval(right, scope),
                }
            }
            ExprKind::Unary(op, inner) => {
                let value = self.eval(inner, scope)?;
                match op {
                    Unary::Not => Ok(Value::Bool(!value.is_true())),
                    Unary::Minus => negative(&value),
                    Unary::Plus => positive(&value),
                }
            }
            ExprKind::Binary(op, pair) => {
                let [left, right] = pair.as_ref();
                let left = self.eval(left, scope)?;
                let right = self.eval(right, scope)?;
                match op {
                    Binary::Add => add(&left, &right),
                    op => arithmetic(*op, &left, &right),
                }
            }
            ExprKind::Call(..) => self.call_expression(expr, scope, None),
            ExprKind::Filter(inner, name, arguments) => {
                self.filter(inner.as_deref(), name, arguments, scope)
            }
            ExprKind::Test(inner, name, arguments) => self.test(inner, name, arguments, scope),
            ExprKind::Compare(first, rest) => self.comparison(first, rest, scope),
            _ => self.composed(&expr.kind, scope),
        };
        self.leave();
        value.map_err(|e| e.at(expr.line))
    }

    fn variable(&mut self, symbol: Symbol, scope: &Rc<Scope>) -> Result<Value> {
        match scope.get(symbol)? {
            Some(value) => Ok(value),
            None => Ok(Value::undefined(&format!(
                "'{}' is undefined",
                self.name(symbol)
            ))),
        }
    }

    /// Expressions made of a list of others.
    #[inline(never)]
    fn composed(&mut self, kind: &'t ExprKind, scope: &Rc<Scope>) -> Result<Value> {
        match kind {
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items, scope)?),
            ExprKind::List(items) => Value::list(self.eval_all(items, scope)?),
            ExprKind::Concat(items) => {
                let values = self.eval_all(items, scope)?;
                concat(&values)
            }
            ExprKind::Dict(entries) => {
                let mut dict = DictBuilder::default();
                for (key, value) in entries {
                    let key = self.eval(key, scope)?;
                    dict.insert(key, self.eval(value, scope)?)?;
                }
                dict.finish()
            }
            ExprKind::Slice(parts) => {
                let mut values = [Value::None, Value::None, Value::None];
                for (part, value) in parts.iter().zip(&mut values) {
                    if let Some(part) = part {
                        *value = self.eval(part, scope)?;
                    }
                }
                Value::nesting_object(Object::Slice(values))
            }
            ExprKind::Conditional(pair, otherwise) => {
                let [test, then] = pair.as_ref();
                if self.eval(test, scope)?.is_true() {
                    return self.eval(then, scope);
                }
                match otherwise {
                    Some(otherwise) => self.eval(otherwise, scope),
                    None => Ok(Value::undefined(
                        "the inline if-expression evaluated to false and no else section was defined.",
                    )),
                }
            }
            _ => Ok(Value::None),
        }
    }

    fn eval_all(&mut self, exprs: &'t [Expr], scope: &Rc<Scope>) -> Result<Vec<Value>> {
        exprs.iter().map(|expr| self.eval(expr, scope)).collect()
    }

    fn comparison(
        &mut self,
        first: &'t Expr,
        rest: &'t [(Comparison, Expr)],
        scope: &Rc<Scope>,
    ) -> Result<Value> {
        let mut left = self.eval(first, scope)?;
        for (comparison, operand) in rest {
            let right = self.eval(operand, scope)?;
            if !compare(*comparison, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    #[inline(never)]
    fn arguments(&mut self, arguments: &'t Arguments, scope: &Rc<Scope>) -> Result<Args> {
        let mut args = Args {
            positional: self.eval_all(&arguments.positional, scope)?,
            named: Vec::new(),
        };
        for (name, expr) in &arguments.named {
            let value = self.eval(expr, scope)?;
            args.add_named(name, value)?;
            spend((args.named.len() / NAMES_PER_STEP) as u64)?;
        }
        if let Some(star) = &arguments.star {
            args.positional.extend(self.eval(star, scope)?.items()?);
        }
        if let Some(expr) = &arguments.double_star {
            let Value::Dict(dict) = self.eval(expr, scope)? else {
                return type_error("argument after ** must be a mapping");
            };
            for (key, value) in dict.entries() {
                let Some(name) = key.as_str() else {
                    return type_error("keywords must be strings");
                };
                args.add_named(name, value.clone())?;
                spend((args.named.len() / NAMES_PER_STEP) as u64)?;
            }
        }
        Ok(args)
    }

    fn filter(
        &mut self,
        inner: Option<&'t Expr>,
        name: &str,
        arguments: &'t Arguments,
        scope: &Rc<Scope>,
    ) -> Result<Value> {
        let value = match inner {
            Some(inner) => self.eval(inner, scope)?,
            None => self.filtered.clone().unwrap_or(Value::None),
        };
        let args = self.arguments(arguments, scope)?;
        library::filter(name, &value, args)
    }

    fn test(
        &mut self,
        inner: &'t Expr,
        name: &str,
        arguments: &'t Arguments,
        scope: &Rc<Scope>,
    ) -> Result<Value> {
        let value = self.eval(inner, scope)?;
        let args = self.arguments(arguments, scope)?;
        Ok(Value::Bool(library::test(name, &value, args)?))
    }

    /// A call; `caller` is the body of a call block.
    #[inline(never)]
    pub(super) fn call_expression(
        &mut self,
        expr: &'t Expr,
        scope: &Rc<Scope>,
        caller: Option<Value>,
    ) -> Result<Value> {
        let ExprKind::Call(callee, arguments) = &expr.kind else {
            return type_error("a call block wants a call");
        };
        let callee = self.eval(callee, scope)?;
        let mut args = self.arguments(arguments, scope)?;
        if let Some(caller) = caller {
            args.add_named("caller", caller)?;
        }
        self.call(&callee, args).map_err(|e| e.at(expr.line))
    }
}

pub(crate) fn compare(comparison: Comparison, a: &Value, b: &Value) -> Result<bool> {
    match comparison {
        Comparison::Eq => return equal(a, b),
        Comparison::Ne => return Ok(!equal(a, b)?),
        Comparison::In => return contains(b, a),
        Comparison::NotIn => return Ok(!contains(b, a)?),
        _ => {}
    }
    let order = compare_order(a, b)?;
    Ok(match comparison {
        Comparison::Lt => order == Some(Ordering::Less),
        Comparison::Le => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        Comparison::Gt => order == Some(Ordering::Greater),
        _ => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
    })
}

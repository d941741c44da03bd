//! The parser's expressions, in Jinja2's order of precedence.

use super::ast::{Arguments, Binary, Comparison, Const, Expr, ExprKind, Unary};
use super::lexer::Token;
use super::statements::Parser;
use crate::jinja::error::{Error, Kind, Result};
use crate::jinja::library;
use crate::jinja::meter::EXPRESSION_DEPTH;

impl Parser {
    pub(super) fn expression(&mut self) -> Result<Expr> {
        self.nested(Self::conditional)
    }

    /// Goes one level deeper in the parser's own recursion.
    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.nesting = self.nesting.saturating_add(1);
        self.check_levels()?;
        if self.nesting > EXPRESSION_DEPTH {
            return Err(Error::new(
                Kind::Budget,
                format!("an expression is nested more than {EXPRESSION_DEPTH} levels deep"),
            )
            .at(self.line()));
        }
        let parsed = parse(self)?;
        self.nesting = self.nesting.saturating_sub(1);
        Ok(parsed)
    }

    fn conditional(&mut self) -> Result<Expr> {
        let unknown = self.unknown.len();
        let mut line = self.line();
        let mut expr = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let otherwise = match self.skip_name("else") {
                true => Some(Box::new(self.nested(Self::conditional)?)),
                false => None,
            };
            let kind = ExprKind::Conditional(Box::new([test, expr]), otherwise);
            expr = self.make(kind, line)?;
            line = self.line();
            self.unknown.truncate(unknown);
        }
        Ok(expr)
    }

    fn or(&mut self) -> Result<Expr> {
        let mut left = self.and()?;
        while self.skip_name("or") {
            let pair = Box::new([left, self.and()?]);
            left = self.make(ExprKind::Or(pair), self.line())?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let mut left = self.not()?;
        while self.skip_name("and") {
            let pair = Box::new([left, self.not()?]);
            left = self.make(ExprKind::And(pair), self.line())?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if self.skip_name("not") {
            let inner = Box::new(self.nested(Self::not)?);
            return self.make(ExprKind::Unary(Unary::Not, inner), line);
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Token::Op("==") => Comparison::Eq,
                Token::Op("!=") => Comparison::Ne,
                Token::Op("<") => Comparison::Lt,
                Token::Op("<=") => Comparison::Le,
                Token::Op(">") => Comparison::Gt,
                Token::Op(">=") => Comparison::Ge,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not"
                        && matches!(self.peek_second(), Token::Name(n) if n == "in") =>
                {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        self.make(ExprKind::Compare(Box::new(first), rest), line)
    }

    fn sum(&mut self) -> Result<Expr> {
        let mut left = self.concat()?;
        loop {
            let op = match self.peek() {
                Token::Op("+") => Binary::Add,
                Token::Op("-") => Binary::Sub,
                _ => return Ok(left),
            };
            self.next();
            let pair = Box::new([left, self.concat()?]);
            left = self.make(ExprKind::Binary(op, pair), self.line())?;
        }
    }

    fn concat(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_op("~") {
            items.push(self.product()?);
        }
        self.make(ExprKind::Concat(items), line)
    }

    fn product(&mut self) -> Result<Expr> {
        let mut left = self.power()?;
        loop {
            let op = match self.peek() {
                Token::Op("*") => Binary::Mul,
                Token::Op("/") => Binary::Div,
                Token::Op("//") => Binary::FloorDiv,
                Token::Op("%") => Binary::Rem,
                _ => return Ok(left),
            };
            self.next();
            let pair = Box::new([left, self.power()?]);
            left = self.make(ExprKind::Binary(op, pair), self.line())?;
        }
    }

    /// Jinja2's `**` groups to the left, unlike Python's.
    fn power(&mut self) -> Result<Expr> {
        let mut left = self.unary(true)?;
        while self.skip_op("**") {
            let pair = Box::new([left, self.unary(true)?]);
            left = self.make(ExprKind::Binary(Binary::Pow, pair), self.line())?;
        }
        Ok(left)
    }

    fn unary(&mut self, with_filter: bool) -> Result<Expr> {
        let line = self.line();
        let op = match self.peek() {
            Token::Op("-") => Some(Unary::Minus),
            Token::Op("+") => Some(Unary::Plus),
            _ => None,
        };
        let expr = match op {
            Some(op) => {
                self.next();
                let inner = Box::new(self.nested(|parser| parser.unary(false))?);
                self.make(ExprKind::Unary(op, inner), line)?
            }
            None => self.primary()?,
        };
        let expr = self.postfix(expr)?;
        if with_filter {
            return self.filters_and_tests(expr);
        }
        Ok(expr)
    }

    fn primary(&mut self) -> Result<Expr> {
        let line = self.line();
        let kind = match self.peek() {
            Token::Name(_) => {
                let name = self.name()?;
                match name.as_str() {
                    "true" | "True" => self.constant(Const::Bool(true)),
                    "false" | "False" => self.constant(Const::Bool(false)),
                    "none" | "None" => self.constant(Const::None),
                    name => ExprKind::Name(self.symbol(name)),
                }
            }
            Token::Str(_) => {
                let mut text = String::new();
                while matches!(self.peek(), Token::Str(_)) {
                    if let Token::Str(part) = self.next() {
                        text.push_str(&part);
                    }
                }
                self.constant(Const::Str(text))
            }
            Token::Int(i) => {
                let value = Const::Int(*i);
                self.next();
                self.constant(value)
            }
            Token::Float(x) => {
                let value = Const::Float(*x);
                self.next();
                self.constant(value)
            }
            Token::Op("(") => {
                self.next();
                let inner = self.nested(|parser| parser.parenthesised())?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Token::Op("[") => {
                self.next();
                let mut items = Vec::new();
                while !self.is_op("]") {
                    items.push(self.expression()?);
                    if !self.skip_op(",") {
                        break;
                    }
                }
                self.expect_op("]")?;
                ExprKind::List(items)
            }
            Token::Op("{") => {
                self.next();
                let mut items = Vec::new();
                while !self.is_op("}") {
                    let key = self.expression()?;
                    self.expect_op(":")?;
                    items.push((key, self.expression()?));
                    if !self.skip_op(",") {
                        break;
                    }
                }
                self.expect_op("}")?;
                ExprKind::Dict(items)
            }
            _ => return self.unexpected("an expression"),
        };
        self.make(kind, line)
    }

    fn parenthesised(&mut self) -> Result<Expr> {
        if self.is_op(")") {
            return self.make(ExprKind::Tuple(Vec::new()), self.line());
        }
        self.tuple(true, &[])
    }

    /// Expressions with commas between them, which make a tuple; one without a comma is itself.
    pub(super) fn tuple(&mut self, with_conditional: bool, ends: &[&str]) -> Result<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        while !self.is_tuple_end(ends) {
            items.push(match with_conditional {
                true => self.expression()?,
                false => self.nested(Self::or)?,
            });
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple {
            return match items.pop() {
                Some(item) => Ok(item),
                None => self.unexpected("an expression"),
            };
        }
        self.make(ExprKind::Tuple(items), line)
    }

    fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            let line = self.line();
            if self.skip_op(".") {
                let kind = match self.peek() {
                    Token::Name(_) => ExprKind::Attr(Box::new(expr), self.name()?),
                    Token::Int(i) => {
                        let index = Const::Int(*i);
                        self.next();
                        let index = self.constant(index);
                        let index = self.make(index, line)?;
                        ExprKind::Item(Box::new(expr), Box::new(index))
                    }
                    _ => return self.unexpected("a name or a number"),
                };
                expr = self.make(kind, line)?;
            } else if self.skip_op("[") {
                let mut keys = Vec::new();
                while !self.is_op("]") {
                    if !keys.is_empty() {
                        self.expect_op(",")?;
                    }
                    keys.push(self.subscript()?);
                }
                self.expect_op("]")?;
                let key = match (keys.len(), keys.pop()) {
                    (1, Some(key)) => key,
                    (_, last) => {
                        keys.extend(last);
                        self.make(ExprKind::Tuple(keys), line)?
                    }
                };
                expr = self.make(ExprKind::Item(Box::new(expr), Box::new(key)), line)?;
            } else if self.is_op("(") {
                expr = self.call(expr)?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn call(&mut self, callee: Expr) -> Result<Expr> {
        let line = self.line();
        let arguments = self.arguments()?;
        self.make(ExprKind::Call(Box::new(callee), Box::new(arguments)), line)
    }

    fn subscript(&mut self) -> Result<Expr> {
        let line = self.line();
        let start = match self.is_op(":") {
            true => None,
            false => Some(Box::new(self.expression()?)),
        };
        if !self.skip_op(":") {
            return match start {
                Some(key) => Ok(*key),
                None => self.unexpected("an expression"),
            };
        }
        let mut parts = [start, None, None];
        if !self.is_op(":") && !self.is_op("]") && !self.is_op(",") {
            parts[1] = Some(Box::new(self.expression()?));
        }
        if self.skip_op(":") && !self.is_op("]") && !self.is_op(",") {
            parts[2] = Some(Box::new(self.expression()?));
        }
        self.make(ExprKind::Slice(parts), line)
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let is_keyword = matches!(self.peek(), Token::Name(_))
                && matches!(self.peek_second(), Token::Op("="));
            let no_stars = arguments.star.is_none() && arguments.double_star.is_none();
            let allowed = if self.skip_op("*") {
                arguments.star = Some(self.expression()?);
                no_stars
            } else if self.skip_op("**") {
                let before = arguments.double_star.replace(self.expression()?);
                before.is_none()
            } else if is_keyword {
                let name = self.name()?;
                self.expect_op("=")?;
                arguments.named.push((name, self.expression()?));
                arguments.double_star.is_none()
            } else {
                arguments.positional.push(self.expression()?);
                no_stars && arguments.named.is_empty()
            };
            if !allowed {
                return self.error("the arguments of a call are in the wrong order");
            }
        }
        self.expect_op(")")?;
        Ok(arguments)
    }

    fn filters_and_tests(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            if self.is_op("|") {
                expr = match self.filters(Some(expr), false)? {
                    Some(expr) => expr,
                    None => return self.unexpected("a filter"),
                };
            } else if self.is_name("is") {
                expr = self.test(expr)?;
            } else if self.is_op("(") {
                expr = self.call(expr)?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn dotted_name(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.skip_op(".") {
            name.push('.');
            name.push_str(&self.name()?);
        }
        Ok(name)
    }

    fn optional_arguments(&mut self) -> Result<Arguments> {
        match self.is_op("(") {
            true => self.arguments(),
            false => Ok(Arguments::default()),
        }
    }

    /// Filters one after the other; where `inline`, the first has no bar before it.
    pub(super) fn filters(&mut self, inner: Option<Expr>, inline: bool) -> Result<Option<Expr>> {
        let mut expr = inner;
        let mut bar = !inline;
        while !bar || self.skip_op("|") {
            bar = true;
            let line = self.line();
            let name = self.dotted_name()?;
            if !library::is_filter(&name) {
                let message = format!("there is no filter {name:?}");
                self.unknown
                    .push(Error::new(Kind::Syntax, message).at(line));
            }
            let arguments = Box::new(self.optional_arguments()?);
            let kind = ExprKind::Filter(expr.map(Box::new), name, arguments);
            expr = Some(self.make(kind, line)?);
        }
        Ok(expr)
    }

    fn test(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.next();
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        if !library::is_test(&name) {
            let message = format!("there is no test {name:?}");
            self.unknown
                .push(Error::new(Kind::Syntax, message).at(line));
        }
        let arguments = match self.peek() {
            Token::Op("(") => self.arguments()?,
            Token::Name(name) if matches!(name.as_str(), "else" | "or" | "and") => {
                Arguments::default()
            }
            Token::Name(name) if name == "is" => {
                return self.error("tests cannot be chained with is");
            }
            Token::Name(_)
            | Token::Str(_)
            | Token::Int(_)
            | Token::Float(_)
            | Token::Op("[" | "{") => {
                let argument = self.primary()?;
                let argument = self.postfix(argument)?;
                Arguments {
                    positional: vec![argument],
                    ..Arguments::default()
                }
            }
            _ => Arguments::default(),
        };
        let kind = ExprKind::Test(Box::new(value), name, Box::new(arguments));
        let test = self.make(kind, line)?;
        match negated {
            true => self.make(ExprKind::Unary(Unary::Not, Box::new(test)), line),
            false => Ok(test),
        }
    }
}

//! The parser's statements, after Jinja2's grammar.

use std::collections::HashMap;

use super::ast::{
    Ast, CALLER, Const, Expr, ExprKind, Extra, KWARGS, Loop, Macro, OWN_NAMES, Stmt, Symbol,
    Target, VARARGS,
};
use super::lexer::{Token, tokens};
use super::walk::reads_name;
use crate::jinja::error::{Error, Kind, Result};
use crate::jinja::meter::{BLOCK_DEPTH, EXPRESSION_DEPTH, SOURCE_BYTES};

/// Parses `source`.
///
/// # Errors
/// Where it is no Jinja, longer than [`SOURCE_BYTES`] or nested too deeply; [`Kind::Depth`] where it
/// nests deeper than `levels`, what this thread's stack is known to hold.
pub(crate) fn parse(source: &str, levels: u32) -> Result<Ast> {
    if source.len() > SOURCE_BYTES {
        return Err(Error::new(
            Kind::Budget,
            format!(
                "the template has {} bytes, and {SOURCE_BYTES} are the most",
                source.len()
            ),
        ));
    }
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        line: 1,
        ast: Ast {
            body: Vec::new(),
            consts: Vec::new(),
            names: Vec::new(),
            loops: Vec::new(),
            macros: Vec::new(),
            has_generation: false,
        },
        symbols: HashMap::new(),
        blocks: 0,
        nesting: 0,
        levels,
        loops: 0,
        unknown: Vec::new(),
        block_names: Vec::new(),
    };
    for name in OWN_NAMES {
        parser.symbol(name);
    }
    let (body, _) = parser.body(&[])?;
    if let Some(error) = parser.unknown.into_iter().next() {
        return Err(error);
    }
    parser.ast.body = body;
    Ok(parser.ast)
}

pub(super) struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    /// The line of the current token.
    line: u32,
    pub(super) ast: Ast,
    symbols: HashMap<String, Symbol>,
    blocks: u32,
    /// How deep the parser itself is in expressions.
    pub(super) nesting: u32,
    /// How deep blocks and expressions together may go on this stack.
    levels: u32,
    /// Loops around the current statement, in the same macro.
    loops: u32,
    /// Filters and tests that do not exist: an error unless a condition guards them.
    pub(super) unknown: Vec<Error>,
    block_names: Vec<String>,
}

impl Parser {
    pub(super) fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(Kind::Syntax, message).at(self.line))
    }

    pub(super) fn line(&self) -> u32 {
        self.line
    }

    pub(super) fn peek(&self) -> &Token {
        self.tokens
            .get(self.at)
            .map_or(&Token::End, |(token, _)| token)
    }

    pub(super) fn peek_second(&self) -> &Token {
        let next = self.tokens.get(self.at.saturating_add(1));
        next.map_or(&Token::End, |(token, _)| token)
    }

    pub(super) fn next(&mut self) -> Token {
        let token = match self.tokens.get_mut(self.at) {
            Some((token, _)) => std::mem::replace(token, Token::End),
            None => Token::End,
        };
        if self.at < self.tokens.len() {
            self.at = self.at.saturating_add(1);
        }
        if let Some((_, line)) = self.tokens.get(self.at) {
            self.line = *line;
        }
        token
    }

    pub(super) fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Token::Op(o) if *o == op)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(n) if n == name)
    }

    pub(super) fn skip_op(&mut self, op: &str) -> bool {
        let found = self.is_op(op);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn unexpected<T>(&self, wanted: &str) -> Result<T> {
        let found = match self.peek() {
            Token::Data(_) => "text".to_owned(),
            Token::VariableBegin => "{{".to_owned(),
            Token::VariableEnd => "}}".to_owned(),
            Token::BlockBegin => "{%".to_owned(),
            Token::BlockEnd => "%}".to_owned(),
            Token::Name(name) => format!("{name:?}"),
            Token::Str(_) => "a string".to_owned(),
            Token::Int(_) | Token::Float(_) => "a number".to_owned(),
            Token::Op(op) => format!("{op:?}"),
            Token::End => "the end of the template".to_owned(),
        };
        self.error(format!("expected {wanted}, found {found}"))
    }

    pub(super) fn expect_op(&mut self, op: &str) -> Result<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.unexpected(&format!("{op:?}"))
    }

    fn expect_name(&mut self, name: &str) -> Result<()> {
        if self.skip_name(name) {
            return Ok(());
        }
        self.unexpected(&format!("{name:?}"))
    }

    pub(super) fn name(&mut self) -> Result<String> {
        if !matches!(self.peek(), Token::Name(_)) {
            return self.unexpected("a name");
        }
        match self.next() {
            Token::Name(name) => Ok(name),
            _ => Ok(String::new()),
        }
    }

    pub(super) fn symbol(&mut self, name: &str) -> Symbol {
        if let Some(symbol) = self.symbols.get(name) {
            return *symbol;
        }
        let symbol = self.ast.names.len() as Symbol;
        self.ast.names.push(name.to_owned());
        self.symbols.insert(name.to_owned(), symbol);
        symbol
    }

    pub(super) fn constant(&mut self, value: Const) -> ExprKind {
        self.ast.consts.push(value);
        ExprKind::Const(self.ast.consts.len().saturating_sub(1))
    }

    /// An expression, unless that makes the tree too deep.
    pub(super) fn make(&self, kind: ExprKind, line: u32) -> Result<Expr> {
        let depth = kind.children_depth().saturating_add(1);
        if depth > EXPRESSION_DEPTH {
            return Err(Error::new(
                Kind::Budget,
                format!("an expression is nested more than {EXPRESSION_DEPTH} levels deep"),
            )
            .at(line));
        }
        Ok(Expr { kind, line, depth })
    }

    pub(super) fn check_levels(&self) -> Result<()> {
        if self.nesting.saturating_add(self.blocks) > self.levels {
            let message = format!("the template nests more than {} levels deep", self.levels);
            return Err(Error::new(Kind::Depth, message).at(self.line));
        }
        Ok(())
    }

    fn end_of_tag(&mut self) -> Result<()> {
        match self.peek() {
            Token::BlockEnd => {
                self.next();
                Ok(())
            }
            _ => self.unexpected("%}"),
        }
    }

    /// Statements until a tag named one of `ends`; which one is taken, its tag's end is not.
    fn body(&mut self, ends: &[&'static str]) -> Result<(Vec<Stmt>, &'static str)> {
        self.blocks = self.blocks.saturating_add(1);
        self.check_levels()?;
        if self.blocks > BLOCK_DEPTH {
            return Err(Error::new(
                Kind::Budget,
                format!("blocks are nested more than {BLOCK_DEPTH} levels deep"),
            )
            .at(self.line));
        }
        let mut body = Vec::new();
        let end = loop {
            match self.peek() {
                Token::Data(_) => {
                    if let Token::Data(text) = self.next() {
                        body.push(Stmt::Text(text));
                    }
                }
                Token::VariableBegin => {
                    self.next();
                    let value = self.tuple(true, &[])?;
                    if !matches!(self.peek(), Token::VariableEnd) {
                        return self.unexpected("}}");
                    }
                    self.next();
                    body.push(Stmt::Emit(value));
                }
                Token::BlockBegin => {
                    self.next();
                    let Token::Name(name) = self.peek() else {
                        return self.unexpected("a statement's name");
                    };
                    if let Some(end) = ends.iter().find(|end| *end == name) {
                        self.next();
                        break *end;
                    }
                    self.statement(&mut body)?;
                    self.end_of_tag()?;
                }
                Token::End if ends.is_empty() => break "",
                _ => return self.unexpected(&format!("{{% {} %}}", ends.join(" %} or {% "))),
            }
        };
        self.blocks = self.blocks.saturating_sub(1);
        Ok((body, end))
    }

    /// The body of a tag that has been read up to its end, and the end tag's name.
    fn block(&mut self, ends: &[&'static str]) -> Result<(Vec<Stmt>, &'static str)> {
        self.skip_op(":");
        self.end_of_tag()?;
        self.body(ends)
    }

    /// A body that is a function of its own in Jinja2's code: loops around it cannot be left from it.
    fn function_body(&mut self, end: &'static str) -> Result<Vec<Stmt>> {
        let loops = std::mem::take(&mut self.loops);
        let (body, _) = self.block(&[end])?;
        self.loops = loops;
        Ok(body)
    }

    fn statement(&mut self, body: &mut Vec<Stmt>) -> Result<()> {
        let line = self.line;
        let name = self.name()?;
        let statement = match name.as_str() {
            "for" => self.for_loop(line)?,
            "if" => self.if_branches()?,
            "set" => self.set()?,
            "macro" => {
                let name = self.name()?;
                let symbol = self.symbol(&name);
                let (arguments, defaults) = self.signature()?;
                let body = self.function_body("endmacro")?;
                Stmt::Macro(symbol, self.add_macro(name, arguments, defaults, body))
            }
            "call" => {
                let (arguments, defaults) = if self.is_op("(") {
                    self.signature()?
                } else {
                    Default::default()
                };
                let call = self.expression()?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return self.error("a call block wants a call");
                }
                let body = self.function_body("endcall")?;
                let number = self.add_macro("caller".to_owned(), arguments, defaults, body);
                Stmt::CallBlock(call, number)
            }
            "generation" => {
                self.ast.has_generation = true;
                let body = self.function_body("endgeneration")?;
                let takes = self.extra(&body, &[]);
                Stmt::Generation(body, takes)
            }
            "filter" => {
                let filter = self.filters(None, true)?;
                let (body, _) = self.block(&["endfilter"])?;
                match filter {
                    Some(filter) => Stmt::Filter(filter, body),
                    None => return self.error("a filter block wants a filter"),
                }
            }
            "with" => {
                let mut assignments = Vec::new();
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    if !assignments.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(false, &[])?;
                    self.expect_op("=")?;
                    assignments.push((target, self.expression()?));
                }
                let (body, _) = self.block(&["endwith"])?;
                Stmt::With(assignments, body)
            }
            "autoescape" => {
                let line = self.line;
                self.expression()?;
                self.block(&["endautoescape"])?;
                Stmt::Refused("autoescape", line)
            }
            "block" => {
                let name = self.name()?;
                if self.block_names.contains(&name) {
                    return self.error(format!("block {name:?} defined twice"));
                }
                self.block_names.push(name.clone());
                self.skip_name("scoped");
                self.skip_name("required");
                let (body, _) = self.block(&["endblock"])?;
                self.skip_name(&name);
                Stmt::Scope(body)
            }
            "print" => {
                let mut first = true;
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    if !first {
                        self.expect_op(",")?;
                    }
                    first = false;
                    body.push(Stmt::Emit(self.expression()?));
                }
                return Ok(());
            }
            "break" | "continue" if self.loops == 0 => {
                return self.error(format!("{name} outside of a loop"));
            }
            "break" => Stmt::Break,
            "continue" => Stmt::Continue,
            "include" | "import" | "from" | "extends" => {
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    self.next();
                }
                let name = match name.as_str() {
                    "include" => "include",
                    "extends" => "extends",
                    _ => "import",
                };
                Stmt::Refused(name, line)
            }
            other => {
                return Err(
                    Error::new(Kind::Syntax, format!("there is no statement {other:?}")).at(line),
                );
            }
        };
        body.push(statement);
        Ok(())
    }

    fn for_loop(&mut self, line: u32) -> Result<Stmt> {
        let target = self.target(false, &["in"])?;
        self.expect_name("in")?;
        let iter = self.tuple(false, &["recursive"])?;
        let filter = match self.skip_name("if") {
            true => Some(self.expression()?),
            false => None,
        };
        let recursive = self.skip_name("recursive");
        let outer = self.loops;
        self.loops = if recursive {
            1
        } else {
            outer.saturating_add(1)
        };
        let (body, end) = self.block(&["endfor", "else"])?;
        self.loops = outer;
        let mut otherwise = Vec::new();
        if end == "else" {
            (otherwise, _) = self.block(&["endfor"])?;
        }
        self.ast.loops.push(Loop {
            target,
            iter,
            filter,
            recursive,
            body,
            otherwise,
            line,
        });
        Ok(Stmt::For(self.ast.loops.len().saturating_sub(1)))
    }

    fn if_branches(&mut self) -> Result<Stmt> {
        let unknown = self.unknown.len();
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            let (body, end) = self.block(&["elif", "else", "endif"])?;
            branches.push((test, body));
            if end == "else" {
                (otherwise, _) = self.block(&["endif"])?;
            }
            if end != "elif" {
                break;
            }
        }
        self.unknown.truncate(unknown);
        Ok(Stmt::If(branches, otherwise))
    }

    fn set(&mut self) -> Result<Stmt> {
        let target = self.target(true, &[])?;
        if self.skip_op("=") {
            return Ok(Stmt::Set(target, self.tuple(true, &[])?));
        }
        let filter = self.filters(None, false)?;
        let (body, _) = self.block(&["endset"])?;
        Ok(Stmt::SetBlock(target, filter, body))
    }

    /// What is assigned to: names, tuples of them and, where `attributes`, a namespace's.
    fn target(&mut self, attributes: bool, ends: &[&str]) -> Result<Target> {
        let mut targets = Vec::new();
        let mut tuple = false;
        while !(self.is_tuple_end(ends) || tuple && self.is_op("=")) {
            targets.push(self.single_target(attributes)?);
            if !self.skip_op(",") {
                break;
            }
            tuple = true;
        }
        match (tuple, targets.pop()) {
            (false, Some(target)) => Ok(target),
            (_, None) => self.unexpected("a name"),
            (true, Some(last)) => {
                targets.push(last);
                Ok(Target::Tuple(targets))
            }
        }
    }

    fn single_target(&mut self, attributes: bool) -> Result<Target> {
        if self.skip_op("(") {
            self.nesting = self.nesting.saturating_add(1);
            self.check_levels()?;
            if self.nesting > EXPRESSION_DEPTH {
                return self.error("an assignment is nested too deeply");
            }
            let target = self.target(attributes, &[])?;
            self.nesting = self.nesting.saturating_sub(1);
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if matches!(
            name.as_str(),
            "true" | "false" | "none" | "True" | "False" | "None"
        ) {
            return self.error(format!("{name} cannot be assigned to"));
        }
        let symbol = self.symbol(&name);
        if attributes && self.skip_op(".") {
            return Ok(Target::Attr(symbol, self.name()?));
        }
        Ok(Target::Name(symbol))
    }

    #[allow(
        clippy::type_complexity,
        reason = "arguments and defaults, used at once"
    )]
    fn signature(&mut self) -> Result<(Vec<(Symbol, String)>, Vec<Expr>)> {
        let (mut arguments, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !arguments.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            if self.skip_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.error("an argument without a default follows one with a default");
            }
            arguments.push((self.symbol(&name), name));
        }
        self.expect_op(")")?;
        Ok((arguments, defaults))
    }

    /// What a macro's body asks for besides its arguments.
    fn extra(&self, body: &[Stmt], arguments: &[(Symbol, String)]) -> Extra {
        let reads = |symbol: Symbol| {
            let is_argument = arguments.iter().any(|(own, _)| *own == symbol);
            !is_argument && reads_name(body, symbol, &self.ast)
        };
        Extra {
            caller: reads(CALLER),
            varargs: reads(VARARGS),
            kwargs: reads(KWARGS),
        }
    }

    fn add_macro(
        &mut self,
        name: String,
        arguments: Vec<(Symbol, String)>,
        defaults: Vec<Expr>,
        body: Vec<Stmt>,
    ) -> usize {
        let takes = self.extra(&body, &arguments);
        self.ast.macros.push(Macro {
            name,
            arguments,
            defaults,
            body,
            takes,
        });
        self.ast.macros.len().saturating_sub(1)
    }

    /// Whether a tuple's list of expressions ends here.
    pub(super) fn is_tuple_end(&self, ends: &[&str]) -> bool {
        match self.peek() {
            Token::VariableEnd | Token::BlockEnd | Token::Op(")") => true,
            Token::Name(name) => ends.contains(&name.as_str()),
            _ => false,
        }
    }
}

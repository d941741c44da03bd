//! Questions about expressions and statements that need all of what is below them.

use super::ast::{Ast, Expr, ExprKind, Stmt, Symbol};

impl ExprKind {
    pub(super) fn children_depth(&self) -> u32 {
        let mut depth = 0;
        self.each_child(&mut |child| depth = depth.max(child.depth));
        depth
    }

    /// Calls `visit` with each expression right below this one.
    fn each_child<'e>(&'e self, visit: &mut impl FnMut(&'e Expr)) {
        let arguments = match self {
            Self::Const(_) | Self::Name(_) => return,
            Self::Tuple(items) | Self::List(items) | Self::Concat(items) => {
                return items.iter().for_each(visit);
            }
            Self::Dict(items) => {
                return items.iter().for_each(|(key, value)| {
                    visit(key);
                    visit(value);
                });
            }
            Self::Attr(inner, _) | Self::Unary(_, inner) => return visit(inner),
            Self::Item(inner, key) => {
                visit(inner);
                return visit(key);
            }
            Self::Slice(parts) => return parts.iter().flatten().for_each(|part| visit(part)),
            Self::Binary(_, pair) | Self::And(pair) | Self::Or(pair) => {
                return pair.iter().for_each(visit);
            }
            Self::Compare(first, rest) => {
                visit(first);
                return rest.iter().for_each(|(_, operand)| visit(operand));
            }
            Self::Conditional(pair, otherwise) => {
                pair.iter().for_each(&mut *visit);
                return otherwise.iter().for_each(|e| visit(e));
            }
            Self::Call(inner, arguments) | Self::Test(inner, _, arguments) => {
                visit(inner);
                arguments
            }
            Self::Filter(inner, _, arguments) => {
                inner.iter().for_each(|e| visit(e));
                arguments
            }
        };
        arguments.positional.iter().for_each(&mut *visit);
        arguments.named.iter().for_each(|(_, value)| visit(value));
        arguments.star.iter().for_each(&mut *visit);
        arguments.double_star.iter().for_each(visit);
    }

    fn reads(&self, symbol: Symbol) -> bool {
        if matches!(self, Self::Name(s) if *s == symbol) {
            return true;
        }
        let mut found = false;
        self.each_child(&mut |child| found = found || child.kind.reads(symbol));
        found
    }
}

/// Whether `body` reads the variable, outside of macros of its own. Depths are bounded by the parser.
pub(super) fn reads_name(body: &[Stmt], symbol: Symbol, ast: &Ast) -> bool {
    let within = |body: &[Stmt]| reads_name(body, symbol, ast);
    body.iter().any(|statement| match statement {
        Stmt::Text(_) | Stmt::Break | Stmt::Continue | Stmt::Refused(..) => false,
        // A macro or a call block of its own may still read what is around it.
        Stmt::Macro(_, number) => ast
            .macros
            .get(*number)
            .is_some_and(|m| within(&m.body) || m.defaults.iter().any(|d| d.kind.reads(symbol))),
        Stmt::CallBlock(call, number) => {
            call.kind.reads(symbol) || ast.macros.get(*number).is_some_and(|m| within(&m.body))
        }
        Stmt::Emit(value) => value.kind.reads(symbol),
        Stmt::For(number) => ast.loops.get(*number).is_some_and(|l| {
            l.iter.kind.reads(symbol)
                || l.filter.as_ref().is_some_and(|f| f.kind.reads(symbol))
                || within(&l.body)
                || within(&l.otherwise)
        }),
        Stmt::If(branches, otherwise) => {
            branches
                .iter()
                .any(|(test, body)| test.kind.reads(symbol) || within(body))
                || within(otherwise)
        }
        Stmt::Set(_, value) => value.kind.reads(symbol),
        Stmt::SetBlock(_, filter, body) => {
            filter.as_ref().is_some_and(|f| f.kind.reads(symbol)) || within(body)
        }
        Stmt::Filter(filter, body) => filter.kind.reads(symbol) || within(body),
        Stmt::With(assignments, body) => {
            assignments
                .iter()
                .any(|(_, value)| value.kind.reads(symbol))
                || within(body)
        }
        Stmt::Scope(body) | Stmt::Generation(body, _) => within(body),
    })
}

//! A parsed template: no lifetimes, names and constants by number, so that threads can share it.

/// The number of a variable's name.
pub(crate) type Symbol = u32;

/// The names the interpreter itself assigns to, which every template has first.
pub(crate) const OWN_NAMES: [&str; 4] = ["loop", "caller", "varargs", "kwargs"];
pub(crate) const LOOP: Symbol = 0;
pub(crate) const CALLER: Symbol = 1;
pub(crate) const VARARGS: Symbol = 2;
pub(crate) const KWARGS: Symbol = 3;

#[derive(Debug)]
pub(crate) enum Const {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(String),
}

#[derive(Debug)]
pub(crate) struct Expr {
    pub(crate) kind: ExprKind,
    pub(crate) line: u32,
    /// Levels of expressions below this one, and one.
    pub(crate) depth: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unary {
    Not,
    Minus,
    Plus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub(crate) enum ExprKind {
    Const(usize),
    Name(Symbol),
    Tuple(Vec<Expr>),
    List(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    /// start, stop, step
    Slice([Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Box<Arguments>),
    /// What is filtered (nothing: the text of the block), the filter, its arguments.
    Filter(Option<Box<Expr>>, String, Box<Arguments>),
    Test(Box<Expr>, String, Box<Arguments>),
    Unary(Unary, Box<Expr>),
    Binary(Binary, Box<[Expr; 2]>),
    Concat(Vec<Expr>),
    And(Box<[Expr; 2]>),
    Or(Box<[Expr; 2]>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// test, then, otherwise
    Conditional(Box<[Expr; 2]>, Option<Box<Expr>>),
}

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) positional: Vec<Expr>,
    pub(crate) named: Vec<(String, Expr)>,
    pub(crate) star: Option<Expr>,
    pub(crate) double_star: Option<Expr>,
}

#[derive(Debug)]
pub(crate) enum Target {
    Name(Symbol),
    /// An attribute of a namespace.
    Attr(Symbol, String),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(crate) struct Loop {
    pub(crate) target: Target,
    pub(crate) iter: Expr,
    pub(crate) filter: Option<Expr>,
    pub(crate) recursive: bool,
    pub(crate) body: Vec<Stmt>,
    pub(crate) otherwise: Vec<Stmt>,
    pub(crate) line: u32,
}

#[derive(Debug)]
pub(crate) struct Macro {
    pub(crate) name: String,
    pub(crate) arguments: Vec<(Symbol, String)>,
    /// Of the last arguments.
    pub(crate) defaults: Vec<Expr>,
    pub(crate) body: Vec<Stmt>,
    /// Whether the body reads `caller`, `varargs`, `kwargs`, and may so be given them.
    pub(crate) takes: Extra,
}

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Extra {
    pub(crate) caller: bool,
    pub(crate) varargs: bool,
    pub(crate) kwargs: bool,
}

#[derive(Debug)]
pub(crate) enum Stmt {
    Text(String),
    Emit(Expr),
    For(usize),
    /// Branches, and what is done where none is taken.
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    Set(Target, Expr),
    SetBlock(Target, Option<Expr>, Vec<Stmt>),
    Macro(Symbol, usize),
    /// The call, and the macro its `caller` is.
    CallBlock(Expr, usize),
    Filter(Expr, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Scope(Vec<Stmt>),
    /// A generation block is the body of a call in Jinja2, and has what its body asks of that call.
    Generation(Vec<Stmt>, Extra),
    Break,
    Continue,
    /// A statement chat templates cannot use, and its line.
    Refused(&'static str, u32),
}

/// A parsed template.
#[derive(Debug)]
pub(crate) struct Ast {
    pub(crate) body: Vec<Stmt>,
    pub(crate) consts: Vec<Const>,
    pub(crate) names: Vec<String>,
    pub(crate) loops: Vec<Loop>,
    pub(crate) macros: Vec<Macro>,
    pub(crate) has_generation: bool,
}

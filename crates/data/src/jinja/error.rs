//! What can go wrong with a template.

use std::fmt;

/// The sort of failure, named as Python and Jinja name theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The source is no Jinja.
    Syntax,
    /// An undefined value was used.
    Undefined,
    /// An operation on a value of the wrong type.
    Type,
    /// A value that the operation cannot take.
    Value,
    /// A division by zero.
    ZeroDivision,
    /// A number that is too large.
    Overflow,
    /// Something a chat template may not do.
    Security,
    /// Anything else at run time.
    Runtime,
    /// The template's own `raise_exception`.
    Raised,
    /// The template wants more than a rendering may use.
    Budget,
    /// The nesting goes past this stack; a larger one may hold it.
    Depth,
}

/// A failure, with its line in the template where that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Error(Box<Inner>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inner {
    kind: Kind,
    message: String,
    line: Option<u32>,
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            line: None,
        }))
    }

    /// The error at `line`, unless a line is known already.
    pub(crate) fn at(mut self, line: u32) -> Self {
        self.0.line.get_or_insert(line);
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The message alone: what `raise_exception` was given.
    pub(crate) fn into_message(self) -> String {
        self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        match self.0.line {
            Some(line) => write!(f, " (template line {line})"),
            None => Ok(()),
        }
    }
}

pub(crate) fn type_error<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Kind::Type, message))
}

pub(crate) fn value_error<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Kind::Value, message))
}

pub(crate) fn budget_error<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Kind::Budget, message))
}

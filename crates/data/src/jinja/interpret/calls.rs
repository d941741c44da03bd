//! Calls.

use super::Interpreter;
use crate::jinja::error::{Result, type_error};
use crate::jinja::library::{self, Args};
use crate::jinja::values::{Object, Value};

impl Interpreter<'_> {
    pub(super) fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        callee.defined()?;
        let Value::Object(object) = callee else {
            return type_error(format!("'{}' object is not callable", callee.type_name()));
        };
        match object.as_ref() {
            Object::Macro(number, scope) => self.call_macro(*number, scope, args),
            Object::Loop(state) => self.call_loop(state, &args),
            Object::Function(name) => {
                let made = library::function(name, args, self.now)?;
                self.keep(made)
            }
            Object::Method(owner, name) => library::method(owner, name, args),
            Object::Cycler(items, at) => {
                let [] = args.bind("next", [])?;
                let item = items.get(at.get()).cloned().unwrap_or(Value::None);
                let next = at.get().saturating_add(1);
                at.set(if next >= items.len() { 0 } else { next });
                Ok(item)
            }
            Object::Joiner(separator, used) => {
                let [] = args.bind("joiner", [])?;
                match used.replace(true) {
                    true => Ok(separator.clone()),
                    false => Value::text(""),
                }
            }
            Object::Namespace(_) | Object::Slice(_) => {
                type_error(format!("'{}' object is not callable", callee.type_name()))
            }
        }
    }
}

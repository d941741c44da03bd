//! Choosing among the adapters that a model carries.

use std::sync::Arc;

use crate::base::routing::{DEFAULT, Routing};
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, SlotRef, UseOfPart, model_part};

/// Puts the named adapters in use, added up; none of them for the base alone.
///
/// # Errors
/// A name that no adapter has; two adapters that train the same module, bias or row whole; adapters that
/// are merged into the base.
pub fn set_active<M: Adaptable>(model: &mut M, names: &[&str]) -> Result<()> {
    require(model, names)?;
    refuse_merged(model)?;
    let mut problems = Vec::new();
    if let Some(part) = model_part(model)
        && names.contains(&DEFAULT)
        && names.len() > 1
    {
        problems.push(part.refusal(UseOfPart::BesideOthers));
    }
    problems.extend(conflicts(model, names));
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    route(model, &Routing::Active(Arc::from(each_once(names))));
    Ok(())
}

/// Gives each row of a batch an adapter of its own, or none. It holds for batches of just as many rows.
///
/// # Errors
/// A name that no adapter has; an adapter that trains a norm whole, or rows of a table that is the head
/// too, which the rows of a batch cannot differ in; adapters that are merged into the base.
pub fn set_rows<M: Adaptable>(model: &mut M, rows: &[Option<&str>]) -> Result<()> {
    let names: Vec<&str> = rows.iter().copied().flatten().collect();
    require(model, &names)?;
    refuse_merged(model)?;
    let mut problems = Vec::new();
    if let Some(part) = model_part(model)
        && names.contains(&DEFAULT)
    {
        problems.push(part.refusal(UseOfPart::InRows));
    }
    let mut has_head = false;
    model.for_each_slot_ref(&mut |module, _| has_head |= model.is_head(module));
    model.for_each_slot_ref(&mut |module, slot| {
        let asked = |name: &str| names.contains(&name);
        match slot {
            SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => {
                let whole = slot.adapters().into_iter().filter(|name| asked(name));
                problems.extend(whole.map(|name| {
                    format!(
                        "{name} trains {module} whole; the rows of a batch cannot differ in that"
                    )
                }));
            }
            SlotRef::Embedding(table) if !has_head => {
                let tokens = table.parts.iter().filter(|p| p.tokens.is_some() && asked(&p.name));
                problems.extend(tokens.map(|part| {
                    format!(
                        "{} trains rows of {module}, which is the model's head too; the rows of a batch cannot \
                         differ in that",
                        part.name
                    )
                }));
            }
            _ => {}
        }
    });
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    let rows: Vec<Option<String>> = rows.iter().map(|row| row.map(String::from)).collect();
    route(model, &Routing::Rows(Arc::from(rows)));
    Ok(())
}

/// What two of these adapters train in one place whole, so that they cannot be in use together.
pub(crate) fn conflicts<M: Adaptable>(model: &M, names: &[&str]) -> Vec<String> {
    let mut problems = Vec::new();
    let asked = |name: &str| names.contains(&name);
    model.for_each_slot_ref(&mut |module, slot| {
        let mut refuse = |what: &str, by: Vec<&str>| {
            let by: Vec<&str> = by.into_iter().filter(|name| asked(name)).collect();
            if by.len() > 1 {
                problems.push(format!(
                    "{module}{what} is trained whole by {}",
                    by.join(" and ")
                ));
            }
        };
        match slot {
            SlotRef::Linear(linear) => {
                let copies = linear.parts.iter().filter(|p| p.saved.is_some());
                refuse("", copies.map(|p| p.name.as_str()).collect());
                let biases = linear.parts.iter().filter(|p| p.bias.is_some());
                refuse(".bias", biases.map(|p| p.name.as_str()).collect());
            }
            SlotRef::Embedding(table) => {
                let copies = table.parts.iter().filter(|p| p.saved.is_some());
                refuse("", copies.map(|p| p.name.as_str()).collect());
                let mut rows: Vec<(usize, &str)> = Vec::new();
                for part in table.parts.iter().filter(|p| asked(&p.name)) {
                    for row in part.tokens.iter().flat_map(|tokens| &tokens.indices) {
                        match rows.iter().find(|(other, _)| other == row) {
                            Some((_, by)) => refuse(&format!(" row {row}"), vec![by, &part.name]),
                            None => rows.push((*row, &part.name)),
                        }
                    }
                }
            }
            SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => refuse("", slot.adapters()),
        }
    });
    problems
}

/// Names without those that were there before: an adapter is in use or not.
pub(crate) fn each_once(names: &[&str]) -> Vec<String> {
    let mut once: Vec<String> = Vec::new();
    for name in names {
        if !once.iter().any(|n| n == name) {
            once.push((*name).to_string());
        }
    }
    once
}

/// The routing that all modules share.
pub fn routing<M: Adaptable>(model: &M) -> Routing {
    let mut found = None;
    model.for_each_slot_ref(&mut |_, slot| {
        found.get_or_insert_with(|| slot.routing().clone());
    });
    found.unwrap_or_default()
}

/// Sets it, unchecked.
pub(crate) fn route<M: Adaptable>(model: &mut M, routing: &Routing) {
    model.for_each_slot(&mut |_, mut slot| slot.route(routing));
}

/// The names of the adapters that the model carries, in the order in which its modules show them.
pub fn adapters<M: Adaptable>(model: &M) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    model.for_each_slot_ref(&mut |_, slot| {
        for name in slot.adapters() {
            if !names.iter().any(|n| n == name) {
                names.push(name.to_string());
            }
        }
    });
    names.extend(model_part(model).map(|_| DEFAULT.to_string()));
    names
}

fn require<M: Adaptable>(model: &M, names: &[&str]) -> Result<()> {
    let have = adapters(model);
    let missing = names.iter().filter(|name| !have.iter().any(|h| h == *name));
    let problems: Vec<String> = missing
        .map(|name| match have.as_slice() {
            [] => format!("there is no adapter {name:?}; the model carries none"),
            have => format!(
                "there is no adapter {name:?}; there are {}",
                have.join(", ")
            ),
        })
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(AdapterError::Choice { problems })
}

pub(crate) fn refuse_merged<M: Adaptable>(model: &M) -> Result<()> {
    let mut merged = false;
    model.for_each_slot_ref(&mut |_, slot| merged |= slot.is_merged());
    if !merged {
        return Ok(());
    }
    Err(AdapterError::Choice {
        problems: vec!["adapters are merged into the base; unmerge them first".into()],
    })
}

/// Removes one adapter. Others stay in use; where it was the only one in use, the base is.
///
/// # Errors
/// No adapter of this name; adapters that are merged into the base.
pub fn delete<M: Adaptable>(model: &mut M, name: &str) -> Result<()> {
    require(model, &[name])?;
    refuse_merged(model)?;
    if let Some(part) = model_part(model)
        && part.members().iter().any(|member| member == name)
    {
        return Err(AdapterError::Choice {
            problems: vec![part.refusal(UseOfPart::Without(name))],
        });
    }
    let left = match routing(model) {
        Routing::Active(names) => names.iter().filter(|n| *n != name).cloned().collect(),
        _ => Vec::new(),
    };
    model.for_each_slot(&mut |_, mut slot| slot.remove(Some(name)));
    if let Some(part) = model.model_part_mut().filter(|_| name == DEFAULT) {
        part.remove();
    }
    route(model, &Routing::Active(Arc::from(left)));
    Ok(())
}

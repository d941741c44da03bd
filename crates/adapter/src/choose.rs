//! Choosing among the adapters that a model carries.

use std::sync::Arc;

use crate::error::{AdapterError, Result};
use crate::routing::Routing;
use crate::slot::{Adaptable, SlotRef};

/// Puts the named adapters in use, added up; none of them for the base alone.
///
/// # Errors
/// A name that no adapter has; two adapters that train the same module whole; adapters that are merged
/// into the base.
pub fn set_active<M: Adaptable>(model: &mut M, names: &[&str]) -> Result<()> {
    require(model, names)?;
    refuse_merged(model)?;
    let mut problems = Vec::new();
    model.for_each_slot_ref(&mut |module, slot| {
        let whole: Vec<&str> = match &slot {
            SlotRef::Linear(l) => {
                let whole = l.parts.iter().filter(|p| p.saved.is_some());
                whole.map(|p| p.name.as_str()).collect()
            }
            SlotRef::Embedding(e) => {
                let whole = e.parts.iter().filter(|p| p.saved.is_some());
                whole.map(|p| p.name.as_str()).collect()
            }
            SlotRef::Norm(n) => n.parts.iter().map(|p| p.name.as_str()).collect(),
        };
        let whole: Vec<&str> = whole.into_iter().filter(|n| names.contains(n)).collect();
        if whole.len() > 1 {
            problems.push(format!("{module} is trained whole by {}", whole.join(" and ")));
        }
    });
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    let names: Vec<String> = names.iter().map(|name| (*name).to_string()).collect();
    route(model, &Routing::Active(Arc::from(names)));
    Ok(())
}

/// Gives each row of a batch an adapter of its own, or none. It holds for batches of just as many rows.
///
/// # Errors
/// A name that no adapter has; an adapter that trains a norm whole, which rows cannot differ in;
/// adapters that are merged into the base.
pub fn set_rows<M: Adaptable>(model: &mut M, rows: &[Option<&str>]) -> Result<()> {
    let names: Vec<&str> = rows.iter().copied().flatten().collect();
    require(model, &names)?;
    refuse_merged(model)?;
    let mut problems = Vec::new();
    model.for_each_slot_ref(&mut |module, slot| {
        if let SlotRef::Norm(norm) = slot {
            let whole = norm.parts.iter().filter(|p| names.contains(&p.name.as_str()));
            problems.extend(whole.map(|part| {
                format!(
                    "{} trains {module} whole; the rows of a batch cannot differ in a norm",
                    part.name
                )
            }));
        }
    });
    if !problems.is_empty() {
        return Err(AdapterError::Choice { problems });
    }
    let rows: Vec<Option<String>> = rows.iter().map(|row| row.map(String::from)).collect();
    route(model, &Routing::Rows(Arc::from(rows)));
    Ok(())
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
    names
}

fn require<M: Adaptable>(model: &M, names: &[&str]) -> Result<()> {
    let have = adapters(model);
    let missing = names.iter().filter(|name| !have.iter().any(|h| h == *name));
    let problems: Vec<String> = missing
        .map(|name| match have.as_slice() {
            [] => format!("there is no adapter {name:?}; the model carries none"),
            have => format!("there is no adapter {name:?}; there are {}", have.join(", ")),
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
    let left = match routing(model) {
        Routing::Active(names) => names.iter().filter(|n| *n != name).cloned().collect(),
        _ => Vec::new(),
    };
    model.for_each_slot(&mut |_, mut slot| slot.remove(Some(name)));
    route(model, &Routing::Active(Arc::from(left)));
    Ok(())
}

//! Which of a layer's adapters a forward pass uses.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::methods::xlora::Gates;

/// The name of an adapter that is given none, as in PEFT.
pub const DEFAULT: &str = "default";

/// Which adapters are in use.
#[derive(Clone, Debug)]
pub enum Routing {
    /// These, added up; none of them: the base alone.
    Active(Arc<[String]>),
    /// One of its own, or none, for each row of the batch.
    Rows(Arc<[Option<String>]>),
    /// All that the gates know, each token in its own mixture (X-LoRA).
    Gated(Arc<Gates>),
}

impl Default for Routing {
    fn default() -> Self {
        Self::Active(Arc::from([]))
    }
}

impl Routing {
    /// The routing to one adapter.
    pub fn to(name: &str) -> Self {
        Self::Active(Arc::from([name.to_string()]))
    }

    /// Every adapter it names, each once.
    pub fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        let mut add = |name| {
            if !names.contains(&name) {
                names.push(name);
            }
        };
        match self {
            Self::Active(active) => active.iter().map(String::as_str).for_each(&mut add),
            Self::Rows(rows) => rows.iter().flatten().map(String::as_str).for_each(&mut add),
            Self::Gated(gates) => gates.names.iter().map(String::as_str).for_each(&mut add),
        }
        names
    }
}

/// The rows of a batch that share an adapter, and where they stand.
pub(crate) struct Group<'a> {
    pub name: Option<&'a str>,
    /// Indices into the flattened rows, rising.
    pub places: Vec<i64>,
}

/// Splits `count` flattened rows (tokens) by the adapter of the batch row they belong to.
pub(crate) fn groups(rows: &[Option<String>], count: usize) -> Vec<Group<'_>> {
    let each = count / rows.len().max(1);
    let mut groups: Vec<Group<'_>> = Vec::new();
    for (i, name) in rows.iter().enumerate() {
        let places = (i * each) as i64..((i + 1) * each) as i64;
        match groups.iter_mut().find(|g| g.name == name.as_deref()) {
            Some(group) => group.places.extend(places),
            None => groups.push(Group {
                name: name.as_deref(),
                places: places.collect(),
            }),
        }
    }
    groups
}

/// Puts results that were computed group by group back into the order of the rows.
pub(crate) fn reunite(groups: &[Group<'_>], parts: Vec<Tensor<2>>, device: &Device) -> Tensor<2> {
    let order: Vec<i64> = groups.iter().flat_map(|g| g.places.clone()).collect();
    let mut back = vec![0_i64; order.len()];
    for (at, place) in order.iter().enumerate() {
        back[*place as usize] = at as i64;
    }
    Tensor::cat(parts, 0).select(0, index(back, device))
}

/// A vector of row numbers on a device.
pub(crate) fn index(places: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let count = places.len();
    Tensor::from_data(TensorData::new(places, [count]), device)
}

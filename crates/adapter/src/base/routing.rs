//! Which of a layer's adapters a forward pass uses.

use std::sync::Arc;

use crate::error::{AdapterError, Result};
use burn::tensor::{Device, Int, Tensor, TensorData};

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

/// How much of each expert each token gets, in every adapted layer.
#[derive(Clone, Debug)]
pub struct Gates {
    /// The experts, in the order of the last axis.
    pub names: Arc<[String]>,
    /// `[tokens, layers, experts]`; one layer stands for all.
    pub values: Tensor<3>,
}

impl Gates {
    /// The share of `expert` for each token in one layer, `[tokens, 1]`.
    pub(crate) fn share(&self, layer: usize, expert: usize) -> Tensor<2> {
        let [tokens, layers, _] = self.values.dims();
        let layer = layer.min(layers - 1);
        self.values
            .clone()
            .slice([0..tokens, layer..layer + 1, expert..expert + 1])
            .reshape([tokens, 1])
    }
}

/// A name that may stand for an adapter: it becomes a folder's name and, in PEFT, part of a key.
///
/// # Errors
/// A name that would leave the folder, hide in it, or split a key.
pub fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.contains(['/', '\\', '\0', ':']) {
        "it would name another folder"
    } else if name.contains('.') {
        "PEFT's keys are split at dots"
    } else if name.chars().any(char::is_control) {
        "it holds control characters"
    } else {
        return Ok(());
    };
    Err(AdapterError::Choice {
        problems: vec![format!("{name:?} cannot be an adapter's name: {reason}")],
    })
}

//! What of the base is trained along.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::fields::{PeftValue, through_serde};

/// Which biases of the base are trained along (`bias`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None of them.
    #[default]
    None,
    /// Those of all modules that have one.
    All,
    /// Those of the adapted modules.
    LoraOnly,
}

/// Tokens of which single embedding rows are trained (`trainable_token_indices`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the input embedding.
    Input(Vec<usize>),
    /// Rows of the embeddings of these names.
    Named(std::collections::BTreeMap<String, Vec<usize>>),
}

impl TokenIndices {
    /// The tokens for the embedding called `module`, if it is meant.
    pub fn for_module(&self, module: &str) -> Option<&[usize]> {
        let ends = |name: &str| {
            module == name
                || module
                    .strip_suffix(name)
                    .is_some_and(|head| head.ends_with('.'))
        };
        let list = match self {
            Self::Input(list) => ends("embed_tokens").then_some(list),
            Self::Named(map) => map
                .iter()
                .find(|(name, _)| ends(name))
                .map(|(_, list)| list),
        };
        list.map(Vec::as_slice)
    }
}

through_serde!(Bias, TokenIndices);

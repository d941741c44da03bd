//! `task`: what a model is trained for.

use serde::{Deserialize, Serialize};

/// The tasks, under PEFT's names in lower case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskName {
    /// Each token predicts the next.
    #[default]
    CausalLm,
    /// A text's class.
    SeqCls,
}

impl TaskName {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::CausalLm, Self::SeqCls];

    /// The name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "causal_lm",
            Self::SeqCls => "seq_cls",
        }
    }
}

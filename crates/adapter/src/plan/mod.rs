//! What an adapter would be on a model: which modules, which ranks, how many parameters.

pub mod target;

use crate::config::Bias;

/// PEFT's prefix of every name in an adapter's file.
pub(crate) const PREFIX: &str = "base_model.model.";

/// One adapted module.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetPlan {
    /// Full name.
    pub name: String,
    /// Whether it is an embedding table; else it is a linear layer.
    pub embedding: bool,
    /// Rank.
    pub r: usize,
    /// Alpha.
    pub alpha: f64,
    /// The factor in front of the update.
    pub scale: f64,
    /// Width of the input; of an embedding, its rows.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Elements of its adapter.
    pub params: usize,
}

impl TargetPlan {
    /// The key in PEFT's file of the parameter that is called `parameter` after the module's name.
    pub fn key(&self, parameter: &str) -> String {
        format!("{PREFIX}{}.{parameter}", self.name)
    }
}

/// One module of which a full copy is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedPlan {
    /// Full name.
    pub name: String,
    /// Shape of its weight.
    pub shape: Vec<usize>,
    /// Whether it has a bias.
    pub bias: bool,
    /// Elements of the copy.
    pub params: usize,
}

/// One bias of the base that is trained along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BiasPlan {
    /// Full name of the module.
    pub name: String,
    /// Its key in PEFT's file.
    pub key: String,
    /// Elements.
    pub len: usize,
}

/// Single trained rows of an embedding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokensPlan {
    /// Full name of the embedding.
    pub name: String,
    /// Its key in PEFT's file.
    pub key: String,
    /// The rows, in PEFT's order: as they were given.
    pub indices: Vec<usize>,
    /// Width of a row.
    pub width: usize,
}

/// The whole adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterPlan {
    /// The adapted modules, in the model's order.
    pub targets: Vec<TargetPlan>,
    /// The modules trained whole, in the model's order.
    pub saved: Vec<SavedPlan>,
    /// Biases trained along.
    pub biases: Vec<BiasPlan>,
    /// Single embedding rows.
    pub tokens: Vec<TokensPlan>,
    /// Whether the head, which shares the embedding's weights, follows what is done to the embedding.
    pub tied: bool,
    /// Frozen tensors that all targets share, under their key in PEFT's file.
    pub shared: Vec<(&'static str, [usize; 2])>,
    /// Elements that are trained.
    pub trainable: usize,
    /// Elements of the base and the adapter together. As in PEFT, a module trained whole counts
    /// twice: its base stays.
    pub total: usize,
}

impl AdapterPlan {
    /// Trained elements in percent of all.
    pub fn percent(&self) -> f64 {
        self.trainable as f64 / self.total.max(1) as f64 * 100.0
    }
}

/// Whether `bias` trains that of a module that is a target or not.
pub(crate) fn trains_bias(bias: Bias, is_target: bool) -> bool {
    match bias {
        Bias::None => false,
        Bias::All => true,
        Bias::LoraOnly => is_target,
    }
}

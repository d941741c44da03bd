//! What a method says of itself to whoever reads, lists, weighs, plans or counts adapters without knowing one.

use std::collections::BTreeMap;
use std::path::Path;

use super::MethodConfig;

/// The facts of a method. What could be wrong without a word if it were forgotten has no default here.
pub trait MethodFacts: MethodConfig + Sized {
    /// What parameters are called after the module's name in PEFT's files, in every form of the method.
    const KEYS: &'static [&'static str];
    /// Whole keys of the frozen tensors that all modules share.
    const SHARED_KEYS: &'static [&'static str] = &[];
    /// Names that some of [`Self::KEYS`] have in a `state_dict()`, with an end that PEFT's files leave out.
    const LONGER_KEYS: &'static [&'static str] = &[];

    /// The base's module, as far as the shapes of its parameters tell: a side that they do not tell stands at the
    /// least it can be. `None` where these are not the method's parameters.
    fn base_of(own: &OwnShapes<'_>) -> Option<BaseShape>;
    /// Whether an adapter's own tensors tell how wide its modules' inputs are.
    fn input_width(&self) -> InputWidth;

    /// What it is called.
    fn label(&self) -> &'static str;
    /// Settings that a line about the adapter names, as in PEFT's file.
    fn headline(&self) -> &'static [&'static str];
    /// What such a line says besides, in words.
    fn remarks(&self) -> Vec<&'static str> {
        Vec::new()
    }
    /// Settings that have a line each on the model card, where they hold something.
    fn card_settings(&self) -> &'static [&'static str];
    /// What the model card says of using it.
    fn card_note(&self) -> Option<String> {
        None
    }
    /// Its rank, as the configuration gives it for all modules.
    fn rank(&self) -> Option<usize>;

    /// Why there are no weights of its own for a single module.
    fn no_weights(&self) -> Option<&'static str>;
    /// How its part is made larger or smaller.
    fn weighing(&self) -> Weighing;
    /// Why the base's weights are needed to say what it adds to them. `has_start` says whether it is known what the
    /// parameters started from ([`MethodConfig::subtracts_initial`]).
    fn needs_base(&self, has_start: bool) -> Option<&'static str>;
    /// A and B, where what it adds to a weight is `scale · B · A` and nothing else: their names, for an embedding
    /// or a linear layer.
    fn factor_keys(&self, _embedding: bool) -> Option<[&'static str; 2]> {
        None
    }
    /// Its parameter that is added to a layer's bias.
    fn bias_key(&self) -> Option<&'static str> {
        None
    }
    /// Why what its parameters started from cannot be worked out again from the base.
    fn start_is_lost(&self) -> Option<String> {
        None
    }
    /// The adapter with what its parameters started from (by key) written into it: one that any program loads on the
    /// untouched base. Only for those that [`MethodConfig::subtracts_initial`].
    fn with_start(self, tensors: Tensors, _start: BTreeMap<String, Vec<f32>>) -> (Self, Tensors) {
        (self, tensors)
    }

    /// The same configuration, read from the files in `dir`: where it names other directories that lie there.
    fn located(self, _dir: &Path) -> Self {
        self
    }
    /// The adapters that it is made of: name and directory.
    fn members(&self) -> &[(String, String)] {
        &[]
    }

    /// What the operation of a layer with this adapter keeps from the forward to the backward pass.
    fn keeps(&self, layer: &LayerSize<'_>) -> Kept;
    /// Whether elements of the layers' inputs are dropped in training.
    fn drops_inputs(&self) -> bool;
}

/// Tensors on the host: key in PEFT's file, shape, values (row-major).
pub type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// How an adapter's part is multiplied by a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighing {
    /// Of each target, one or more of these parameters are there, and its part is linear in each of them.
    Factor {
        /// The parameters' names.
        keys: &'static [&'static str],
        /// Where they do nothing: 0, or 1 for one that multiplies.
        neutral: f64,
    },
    /// No parameter is a factor of all that the adapter does.
    None,
}

/// Whether an adapter's tensors tell how wide the inputs of its modules are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputWidth {
    /// Each module's own do, or what it adds takes the base anyway ([`MethodFacts::needs_base`]).
    Told,
    /// The shared ones do, which are as wide as the widest module.
    Shared,
    /// They do not.
    Untold,
}

/// A module of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseShape {
    /// A linear layer: outputs and inputs.
    Linear(usize, usize),
    /// An embedding: rows and width.
    Embedding(usize, usize),
}

/// The shapes of one module's parameters by their names, and those of the shared tensors.
#[derive(Clone, Debug, Default)]
pub struct OwnShapes<'a> {
    /// The module's own.
    pub own: BTreeMap<&'a str, &'a [usize]>,
    /// Whole keys and shapes of what all modules share.
    pub shared: &'a [(&'a str, &'a [usize])],
}

impl OwnShapes<'_> {
    /// The length of one axis of one parameter.
    pub fn side(&self, key: &str, axis: usize) -> Option<usize> {
        self.own.get(key).and_then(|shape| shape.get(axis)).copied()
    }

    /// Outputs from the rows of `b`, inputs from the columns of `a`, 1 for what is not there; `None` without both.
    pub fn pair(&self, b: &str, a: &str) -> Option<(usize, usize)> {
        let known = self.own.contains_key(b) || self.own.contains_key(a);
        known.then(|| (self.side(b, 0).unwrap_or(1), self.side(a, 1).unwrap_or(1)))
    }

    /// The length of one axis of a shared tensor.
    pub fn shared_side(&self, key: &str, axis: usize) -> Option<usize> {
        let (_, shape) = self.shared.iter().find(|(name, _)| *name == key)?;
        shape.get(axis).copied()
    }
}

/// A linear layer as the memory of a step sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerSize<'a> {
    /// Full name.
    pub name: &'a str,
    /// Columns of its input.
    pub input: usize,
    /// Columns of its output.
    pub out: usize,
    /// Rank of the adapter beside it.
    pub rank: usize,
    /// Rows of its input in one pass.
    pub rows: usize,
    /// Whether the base's layer is trained too, or its bias.
    pub whole: bool,
    /// Whether the base's weight is held in another form than f32, so that its values are a copy.
    pub widened: bool,
    /// Whether this crate's kernels compute, which make masks anew in the backward pass; plain Burn operations
    /// keep them.
    pub kernels: bool,
}

/// What one linear layer's operation keeps besides what its block keeps anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Numbers for each row of the input.
    pub row: usize,
    /// Numbers however many rows there are.
    pub fixed: usize,
    /// Whether the layer's input is kept.
    pub input: bool,
    /// Whether the layer can be part of a fused operation.
    pub fuses: bool,
}

impl LayerSize<'_> {
    /// Numbers in `[out, rank]` and `[rank, in]`.
    pub fn factors(&self) -> usize {
        self.rank * (self.input + self.out)
    }
}

impl Kept {
    /// A low-rank operation's: its input, `x·Aᵀ`, and `fixed` numbers of factors that are made anew in each pass.
    pub fn low_rank(layer: &LayerSize<'_>, fixed: usize) -> Self {
        Self {
            row: layer.rank,
            fixed,
            input: true,
            fuses: false,
        }
    }

    /// The input with some of it dropped, and the mask, besides `low` numbers a row: the base's product reads the
    /// whole input, and keeps nothing.
    pub fn dropped(layer: &LayerSize<'_>, low: usize, fixed: usize) -> Self {
        Self {
            row: 2 * layer.input + low,
            fixed,
            input: false,
            fuses: false,
        }
    }

    /// The input and nothing else.
    pub const INPUT: Self = Self {
        row: 0,
        fixed: 0,
        input: true,
        fuses: false,
    };
}

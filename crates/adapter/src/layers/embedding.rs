//! The embedding table that adapters attach to.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use enamel_kernels::BaseWeight;

use crate::base::base_param::{BaseParam, rows_of};
use crate::base::routing::Gates;
use crate::base::routing::{Routing, groups, index, reunite};
use crate::methods::lora::embedding::LoraEmbedding;
use crate::methods::tokens::TrainableTokens;

/// A frozen table `[vocabulary, hidden]` and any number of adapters beside it.
#[derive(Module, Debug)]
pub struct Embedding {
    /// The base table. Never trained, unless all of the base is.
    pub weight: BaseParam,
    /// What each adapter that touches the table does to it.
    pub parts: Vec<EmbeddingPart>,
    /// The base as it was, while adapters are merged into it.
    pub(crate) unmerged: Option<BaseParam>,
    #[module(skip)]
    pub(crate) routing: Routing,
    #[module(skip)]
    pub(crate) enabled: bool,
    #[module(skip)]
    pub(crate) trains_base: bool,
    /// Place among the layers that X-LoRA's experts adapt.
    #[module(skip)]
    pub(crate) place: usize,
}

/// What one adapter does to one embedding: one of the three.
#[derive(Module, Debug)]
pub struct EmbeddingPart {
    /// The adapter's name.
    #[module(skip)]
    pub name: String,
    /// Whether a head that shares this table follows its factors or its copy too.
    #[module(skip)]
    pub tied: bool,
    /// Low-rank factors, when the table is a target.
    pub lora: Option<LoraEmbedding>,
    /// The trained copy, when `modules_to_save` names the table.
    pub saved: Option<Param<Tensor<2>>>,
    /// Single trained rows, when `trainable_token_indices` names some.
    pub tokens: Option<TrainableTokens>,
}

impl Embedding {
    /// Wraps a loaded table; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: impl Into<BaseWeight>) -> Self {
        Self {
            weight: BaseParam::new(name, weight.into()),
            parts: Vec::new(),
            unmerged: None,
            routing: Routing::default(),
            enabled: true,
            trains_base: false,
            place: 0,
        }
    }

    /// Token ids `[batch, tokens]` to their vectors `[batch, tokens, hidden]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        match &self.routing {
            Routing::Active(names) if self.in_force() => self.through(ids, names),
            Routing::Rows(rows) if self.in_force() => {
                let device = self.weight.device();
                let width = self.weight.dims()[1];
                let groups = groups(rows, batch);
                let results = groups.iter().map(|group| {
                    let ids = ids.clone().select(0, index(group.places.clone(), &device));
                    let names: Vec<String> = group.name.map(String::from).into_iter().collect();
                    let count = group.places.len();
                    self.through(ids, &names).reshape([count, tokens * width])
                });
                let results = results.collect();
                reunite(&groups, results, &device).reshape([batch, tokens, width])
            }
            Routing::Gated(gates) if self.in_force() => self.mixed(ids, gates),
            _ => rows_of(&self.weight.get(), ids),
        }
    }

    /// Each token with its own shares of the experts.
    fn mixed(&self, ids: Tensor<2, Int>, gates: &Gates) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        let mut y = rows_of(&self.weight.get(), ids.clone());
        for (i, name) in gates.names.iter().enumerate() {
            if let Some(lora) = self.part(name).and_then(|part| part.lora.as_ref()) {
                let share = gates.share(self.place, i).reshape([batch, tokens, 1]);
                y = y + lora.contribution(ids.clone()) * share;
            }
        }
        y
    }

    fn in_force(&self) -> bool {
        self.enabled && self.unmerged.is_none()
    }

    fn through(&self, ids: Tensor<2, Int>, names: &[String]) -> Tensor<3> {
        let adapters = self.parts_of(names).filter_map(|part| part.lora.as_ref());
        let together = adapters.clone().count() > 1;
        if together && adapters.clone().any(|lora| lora.magnitude.is_some()) {
            // Lengths are of all that came before, in the order of the names.
            return rows_of(&self.folded(names), ids);
        }
        let table = self.table_for(names);
        let y = rows_of(&table, ids.clone());
        adapters.fold(y, |y, lora| lora.forward(ids.clone(), y, &table))
    }

    /// The table with what adapters train of it whole: a copy, or single rows.
    fn table_for(&self, names: &[String]) -> BaseWeight {
        self.parts_of(names).fold(self.weight.get(), |table, part| {
            let table = match &part.saved {
                Some(saved) => BaseWeight::new(saved.val(), table.compute()),
                None => table,
            };
            match &part.tokens {
                Some(tokens) => table.map(|table| tokens.replace(table)),
                None => table,
            }
        })
    }

    fn parts_of<'a>(
        &'a self,
        names: &'a [String],
    ) -> impl Iterator<Item = &'a EmbeddingPart> + Clone {
        names.iter().filter_map(|name| self.part(name))
    }

    /// What the adapter called `name` does here.
    pub fn part(&self, name: &str) -> Option<&EmbeddingPart> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// The table with the named adapters folded in, `[vocabulary, hidden]`.
    pub fn folded(&self, names: &[String]) -> BaseWeight {
        let table = self.table_for(names);
        let adapters = self.parts_of(names).filter_map(|part| part.lora.as_ref());
        adapters.fold(table, |table, lora| table.map(|table| lora.merged(table)))
    }

    /// The matrix of a head that shares this table, `[vocabulary, hidden]`. As in PEFT, it follows the
    /// rows that `trainable_token_indices` trains, and low-rank factors or a trained copy only where
    /// `ensure_weight_tying` says so.
    pub fn head_weight(&self) -> BaseWeight {
        let Routing::Active(names) = &self.routing else {
            return self.weight.get();
        };
        if !self.in_force() {
            return self.weight.get();
        }
        self.parts_of(names).fold(self.weight.get(), |table, part| {
            let table = match part.saved.as_ref().filter(|_| part.tied) {
                Some(saved) => BaseWeight::new(saved.val(), table.compute()),
                None => table,
            };
            let table = match &part.tokens {
                Some(tokens) => table.map(|table| tokens.replace(table)),
                None => table,
            };
            match part.lora.as_ref().filter(|_| part.tied) {
                Some(lora) => table.map(|table| lora.merged(table)),
                None => table,
            }
        })
    }
}

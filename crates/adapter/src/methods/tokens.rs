//! Single trained rows of an embedding (`trainable_token_indices`), as PEFT's `TrainableTokensLayer`.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use crate::base::routing::index;

/// The rows, which replace those of the table.
#[derive(Module, Debug)]
pub struct TrainableTokens {
    /// The new rows, `[count, hidden]`. PEFT calls them a delta; they are whole rows.
    pub delta: Param<Tensor<2>>,
    /// Which rows of the table they replace.
    #[module(skip)]
    pub indices: Vec<usize>,
}

impl TrainableTokens {
    /// Rows that start as the table's own.
    pub(crate) fn from_table(
        id: ParamId,
        indices: &[usize],
        table: Tensor<2>,
        trainable: bool,
    ) -> Self {
        let rows = indices.iter().map(|i| *i as i64).collect();
        let device = table.device();
        let value = table.detach().select(0, index(rows, &device));
        Self {
            delta: Param::initialized(id, value.detach()).set_require_grad(trainable),
            indices: indices.to_vec(),
        }
    }

    /// The table with these rows in it, `[vocabulary, hidden]`; gradients reach the rows alone.
    pub fn replace(&self, table: Tensor<2>) -> Tensor<2> {
        let places: Vec<i64> = self.indices.iter().map(|i| *i as i64).collect();
        let places: Tensor<1, Int> = index(places, &table.device());
        // The difference is exact to a rounding; the row itself must come out to the bit where nothing
        // was trained, so the old row is taken off first and the new one put on zero.
        let old = table.clone().select(0, places.clone());
        let cleared = table.select_assign(0, places.clone(), -old, IndexingUpdateOp::Add);
        cleared.select_assign(0, places, self.delta.val(), IndexingUpdateOp::Add)
    }
}

//! Rows of an embedding table.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::{Int, Tensor};

use crate::cpu::storage::OnFlex;

/// Row `ids[b, t]` of a `table` `[vocabulary, hidden]`, as `[batch, tokens, hidden]`. Ids are below `vocabulary`.
///
/// The table's gradient is as large as the table. On Flex the rows' gradients are added to what it already has of
/// one, from an output head that shares it, so that there is never a second table of gradients.
pub fn embedding(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    // Without a gradient Burn's own operation has nothing to add.
    if table.is_tracked() && table.on_flex() {
        cpu::embedding(table, ids)
    } else {
        reference::embedding(table, ids)
    }
}

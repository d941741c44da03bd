//! Rows of an embedding table by Burn's own operation.

use burn::tensor::{Int, Tensor};

pub(super) fn embedding(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    burn::tensor::module::embedding(table, ids)
}

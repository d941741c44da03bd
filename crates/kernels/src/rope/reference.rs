//! RoPE in plain Burn operations.

use burn::tensor::Tensor;

pub(crate) fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let [_, tokens, _, _] = x.dims();
    let [positions, half] = cos.dims();
    // One row for all of the batch, or one each.
    let rows = if positions == tokens {
        1
    } else {
        positions / tokens.max(1)
    };
    let cos = cos.reshape([rows, tokens, 1, half]);
    let sin = sin.reshape([rows, tokens, 1, half]);
    let x1 = x.clone().narrow(3, 0, half);
    let x2 = x.narrow(3, half, half);
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x2 * cos + x1 * sin;
    Tensor::cat(vec![y1, y2], 3)
}

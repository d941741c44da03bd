//! The linear map with a Kronecker product in plain Burn operations.

use burn::tensor::Tensor;

pub(super) fn kron_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    w1: Tensor<2>,
    w2: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    x.clone().matmul(w.transpose()) + part(x, w1, w2, scale)
}

/// `scale · x · kron(w1, w2)ᵀ`.
pub(super) fn part(x: Tensor<2>, w1: Tensor<2>, w2: Tensor<2>, scale: f64) -> Tensor<2> {
    let [rows, _] = x.dims();
    let ([l, m], [k, n]) = (w1.dims(), w2.dims());
    // [rows, m, k], then every row's [m, k] multiplied from the left.
    let right = x.reshape([rows * m, n]).matmul(w2.transpose());
    let left = w1.unsqueeze::<3>().expand([rows, l, m]);
    let adapter = left.matmul(right.reshape([rows, m, k]));
    adapter.reshape([rows, l * k]).mul_scalar(scale)
}

pub(super) fn kron(w1: Tensor<2>, w2: Tensor<2>) -> Tensor<2> {
    let ([l, m], [k, n]) = (w1.dims(), w2.dims());
    let product = w1.reshape([l, 1, m, 1]) * w2.reshape([1, k, 1, n]);
    product.reshape([l * k, m * n])
}

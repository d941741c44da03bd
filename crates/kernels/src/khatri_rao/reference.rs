//! Khatri-Rao products in plain Burn operations.

use burn::tensor::Tensor;

pub(super) fn rows(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let ([n, l], [_, k]) = (a.dims(), b.dims());
    let product: Tensor<3> = a.unsqueeze_dim::<3>(2) * b.unsqueeze_dim(1);
    product.reshape([n, l * k])
}

pub(super) fn columns(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let ([l, n], [k, _]) = (a.dims(), b.dims());
    let product: Tensor<3> = a.unsqueeze_dim::<3>(1) * b.unsqueeze_dim(0);
    product.reshape([l * k, n])
}

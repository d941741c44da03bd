//! Products of rows or columns by pairs: the two factors of a LoHa update, of which the elementwise
//! product of two low-rank products is the product: `(A·B) ∘ (C·D) = (A ∗ C)·(B ∗ D)`.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// Every row's numbers by pairs (the face-splitting product, a row-wise Khatri-Rao product):
/// `result[i, p·k + q] = a[i, p] · b[i, q]`.
///
/// # Shapes
/// - a: `[n, l]`, b: `[n, k]`, result: `[n, l·k]`
///
/// # Panics
/// If the two differ in their number of rows.
pub fn khatri_rao_rows(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    assert!(
        a.dims()[0] == b.dims()[0],
        "khatri_rao_rows: {:?} and {:?} must have as many rows",
        a.dims(),
        b.dims(),
    );
    if a.on_flex() && b.on_flex() {
        cpu::khatri_rao(a, b, Pairs::Rows)
    } else {
        note_fallback("khatri_rao", &[&a, &b]);
        reference::rows(a, b)
    }
}

/// Every column's numbers by pairs (the column-wise Khatri-Rao product):
/// `result[p·k + q, j] = a[p, j] · b[q, j]`.
///
/// # Shapes
/// - a: `[l, n]`, b: `[k, n]`, result: `[l·k, n]`
///
/// # Panics
/// If the two differ in their number of columns.
pub fn khatri_rao_columns(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    assert!(
        a.dims()[1] == b.dims()[1],
        "khatri_rao_columns: {:?} and {:?} must have as many columns",
        a.dims(),
        b.dims(),
    );
    if a.on_flex() && b.on_flex() {
        cpu::khatri_rao(a, b, Pairs::Columns)
    } else {
        note_fallback("khatri_rao", &[&a, &b]);
        reference::columns(a, b)
    }
}

/// Whose numbers are multiplied by pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// Those of each row.
    Rows,
    /// Those of each column.
    Columns,
}

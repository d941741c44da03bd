//! Between llama.cpp's row order and Hugging Face's.

/// Undoes llama.cpp's reordering of the rows of q and k, whatever a row is made of.
///
/// Its converter interleaves the two halves of every head (row `2i` of the file is row `i`, row
/// `2i + 1` is row `i + D/2`), because ggml's rotary embedding turns neighbouring pairs where
/// Hugging Face turns pairs half a head apart.
pub(crate) fn unpermute<T: Copy>(values: &[T], rows: usize, heads: usize) -> Option<Vec<T>> {
    let columns = values.len().checked_div(rows)?;
    let head_dim = rows.checked_div(heads)?;
    if columns == 0 || !head_dim.is_multiple_of(2) || head_dim.checked_mul(heads) != Some(rows) {
        return None;
    }
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim.checked_mul(columns)?) {
        for side in 0..2 {
            let rows = head.chunks_exact(columns).skip(side).step_by(2);
            rows.for_each(|row| out.extend_from_slice(row));
        }
    }
    Some(out)
}

/// llama.cpp's order of the rows of q and k: what [`unpermute`] undoes.
pub(crate) fn permute(values: &[f32], rows: usize, heads: usize) -> Option<Vec<f32>> {
    let columns = values.len().checked_div(rows)?;
    let head_dim = rows.checked_div(heads)?;
    if columns == 0 || !head_dim.is_multiple_of(2) || head_dim.checked_mul(heads) != Some(rows) {
        return None;
    }
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim.checked_mul(columns)?) {
        let (first, second) = head.split_at_checked(head.len() / 2)?;
        for (a, b) in first
            .chunks_exact(columns)
            .zip(second.chunks_exact(columns))
        {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_inverts_the_converters_permutation() {
        // The converter: reshape(heads, 2, D/2, columns), swap axes 1 and 2.
        let (heads, half, columns) = (3, 4, 2);
        let original: Vec<f32> = (0..heads * 2 * half * columns).map(|x| x as f32).collect();
        let mut permuted = vec![0.0; original.len()];
        for head in 0..heads {
            for side in 0..2 {
                for i in 0..half {
                    for c in 0..columns {
                        let from = ((head * 2 + side) * half + i) * columns + c;
                        let to = ((head * half + i) * 2 + side) * columns + c;
                        permuted[to] = original[from];
                    }
                }
            }
        }
        assert_eq!(
            permute(&original, heads * 2 * half, heads).as_deref(),
            Some(permuted.as_slice())
        );
        assert_eq!(permute(&original, heads * 2 * half, 5), None);
        assert_eq!(
            unpermute(&permuted, heads * 2 * half, heads),
            Some(original)
        );
        assert_eq!(unpermute(&permuted, heads * 2 * half, 5), None);
    }
}

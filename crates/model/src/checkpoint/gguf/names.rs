//! From llama.cpp's tensor names and row order to Hugging Face's.

/// The Hugging Face name of a GGUF tensor of a Llama model.
pub(crate) fn hugging_face(name: &str) -> Option<String> {
    let top = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(top) = top {
        return Some(top.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    // Only the plain decimal spelling, so that no two names can mean the same tensor.
    let number: u32 = layer.parse().ok()?;
    if number.to_string() != layer || !matches!(kind, "weight" | "bias") {
        return None;
    }
    let module = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{number}.{module}.{kind}"))
}

/// Which of llama.cpp's row orders a projection has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permuted {
    /// Rows are ordered for the query heads.
    Query,
    /// Rows are ordered for the key heads.
    Key,
}

/// Whether a tensor (by its Hugging Face name) has its rows permuted in the file.
pub(crate) fn permutation(name: &str) -> Option<Permuted> {
    if name.contains(".self_attn.q_proj.") {
        Some(Permuted::Query)
    } else if name.contains(".self_attn.k_proj.") {
        Some(Permuted::Key)
    } else {
        None
    }
}

/// Undoes llama.cpp's reordering of the rows of q and k, whatever a row is made of.
///
/// Its converter interleaves the two halves of every head (row `2i` of the file is row `i`, row
/// `2i + 1` is row `i + D/2`), because ggml's rotary embedding turns neighbouring pairs where
/// Hugging Face turns pairs half a head apart.
pub(crate) fn unpermute<T: Copy>(values: &[T], rows: usize, heads: usize) -> Option<Vec<T>> {
    let columns = values.len().checked_div(rows)?;
    let head_dim = rows.checked_div(heads)?;
    if columns == 0 || head_dim % 2 != 0 || head_dim * heads != rows {
        return None;
    }
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for side in 0..2 {
            for i in 0..half {
                let row = 2 * i + side;
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_one_to_one() {
        let cases = [
            ("token_embd.weight", Some("model.embed_tokens.weight")),
            (
                "blk.12.attn_q.weight",
                Some("model.layers.12.self_attn.q_proj.weight"),
            ),
            (
                "blk.0.ffn_down.bias",
                Some("model.layers.0.mlp.down_proj.bias"),
            ),
            ("blk.00.ffn_down.bias", None),
            ("blk.0.ffn_gate_exps.weight", None),
            ("blk.x.attn_q.weight", None),
            ("blk.0.attn_q", None),
        ];
        for (gguf, hf) in cases {
            assert_eq!(hugging_face(gguf).as_deref(), hf, "{gguf}");
        }
    }

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
            unpermute(&permuted, heads * 2 * half, heads),
            Some(original)
        );
        assert_eq!(unpermute(&permuted, heads * 2 * half, 5), None);
    }
}

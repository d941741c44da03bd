//! Between llama.cpp's tensor names and row order and Hugging Face's.

/// llama.cpp's and Hugging Face's names of what stands outside the blocks; each has a weight alone.
const TOP: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

/// The same within a block.
const BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a GGUF tensor of a Llama model.
pub(crate) fn hugging_face(name: &str) -> Option<String> {
    let (part, kind) = name.rsplit_once('.')?;
    if let Some((_, top)) = TOP.iter().find(|(gguf, _)| *gguf == part) {
        return (kind == "weight").then(|| format!("{top}.weight"));
    }
    let (number, part) = part.strip_prefix("blk.")?.split_once('.')?;
    let (number, kind) = (layer(number)?, weight_or_bias(kind)?);
    let (_, module) = BLOCK.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{number}.{module}.{kind}"))
}

/// The GGUF name of a tensor that Hugging Face calls `name`: the way back from [`hugging_face`].
pub(crate) fn llama_cpp(name: &str) -> Option<String> {
    let (part, kind) = name.rsplit_once('.')?;
    if let Some((top, _)) = TOP.iter().find(|(_, hf)| *hf == part) {
        return (kind == "weight").then(|| format!("{top}.weight"));
    }
    let (number, part) = part.strip_prefix("model.layers.")?.split_once('.')?;
    let (number, kind) = (layer(number)?, weight_or_bias(kind)?);
    let (module, _) = BLOCK.iter().find(|(_, hf)| *hf == part)?;
    Some(format!("blk.{number}.{module}.{kind}"))
}

/// Only the plain decimal spelling, so that no two names can mean the same tensor.
fn layer(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn weight_or_bias(kind: &str) -> Option<&str> {
    matches!(kind, "weight" | "bias").then_some(kind)
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
            if let Some(hf) = hf {
                assert_eq!(llama_cpp(hf).as_deref(), Some(gguf), "{hf}");
            }
        }
        for hf in [
            "model.layers.0.mlp.gate.weight",
            "model.norm.bias",
            "model.layers.01.mlp.up_proj.weight",
            "model.layers.1.mlp.up_proj.lora_A",
        ] {
            assert_eq!(llama_cpp(hf), None, "{hf}");
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

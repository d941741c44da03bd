//! LoftQ's settings: what they go with, and what displaces them.

use super::*;

#[test]
fn loftq_goes_with_a_quantised_base_and_has_its_bits() {
    let four = "data.train = 'x.jsonl'\n[model.quantization]\nload_in_4bit = true\n[adapter]\n";
    let loftq = |recipe: &Recipe| {
        let loftq = recipe.adapter.loftq_config.unwrap();
        (loftq.loftq_bits, loftq.loftq_iter)
    };
    let start = format!("{four}init_lora_weights = 'loftq'\n");
    let recipe = resolve(&start, &[]).unwrap();
    assert_eq!(loftq(&recipe), (Some(4), Some(1)));
    let written = format!("{start}loftq_config = {{ loftq_bits = 4, loftq_iter = 1 }}\n");
    assert_eq!(resolve(&written, &[]).unwrap().adapter, recipe.adapter);
    // An override of the format, or of the start, takes LoftQ's settings along.
    let eight = resolve(&written, &["model.quantization.load_in_8bit=true"]).unwrap();
    assert_eq!(loftq(&eight), (Some(8), Some(1)));
    let other = resolve(&written, &["adapter.init_lora_weights=true"]).unwrap();
    assert_eq!(other.adapter.loftq_config, None);
    refuses(
        "data.train = 'x.jsonl'\n[adapter]\ninit_lora_weights = 'loftq'\n",
        &[
            "3: ",
            "nothing is quantised",
            "load_in_4bit or load_in_8bit",
        ],
    );
    refuses(
        &format!("{start}loftq_config = {{ loftq_bits = 8 }}\n"),
        &["6: ", "loftq_bits is 8", "in 4 bits"],
    );
    refuses(
        &format!("{start}loftq_config = {{ loftq_iter = 5 }}\n"),
        &[
            "6: ",
            "loftq_iter = 5",
            "use 1, where the base is the quantised model",
        ],
    );
    refuses(
        &format!("{start}loftq_config = {{ loftq_iters = 1 }}\n"),
        &["6: ", "loftq_iters", "loftq_iter"],
    );
    refuses(
        &format!("{four}loftq_config = {{ loftq_bits = 4 }}\n"),
        &["5: ", "means nothing without adapter.init_lora_weights"],
    );
    refuses(
        &format!("{four}method = 'ia3'\ninit_lora_weights = 'loftq'\n"),
        &["6: ", "adapter.init_lora_weights means nothing to method"],
    );
}

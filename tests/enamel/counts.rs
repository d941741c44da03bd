//! Parameter counts of full-size shapes, without their weights.

use enamel_adapter::plan;

use crate::goldens::{fixtures, json};
use crate::matching::{lora, modules};

#[test]
fn counts_are_pefts() {
    let golden = json(&fixtures().join("counts.json"));
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 9);
    for case in cases {
        let shape = case["shape"].as_str().expect("a shape's name");
        let modules = modules(&golden["shapes"][shape]);
        let config = lora(&case["config"]).expect("valid options");
        let plan = plan(&modules, &config).unwrap_or_else(|e| panic!("{shape}: {e}"));
        assert_eq!(
            Some(plan.trainable as u64),
            case["trainable"].as_u64(),
            "{shape} {}",
            case["config"]
        );
        assert_eq!(
            Some(plan.total as u64),
            case["total"].as_u64(),
            "{shape} {}",
            case["config"]
        );
    }
}

#[test]
fn the_published_numbers() {
    // SmolLM2-135M r=16 on all seven; Llama-3-8B on q_proj and v_proj with r=8 and r=16.
    let golden = json(&fixtures().join("counts.json"));
    for (index, expected) in [(0, 4_884_480), (3, 3_407_872), (4, 6_815_744)] {
        assert_eq!(golden["cases"][index]["trainable"], expected);
    }
}

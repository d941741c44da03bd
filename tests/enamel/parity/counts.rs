//! Parameter counts of full-size shapes, without their weights.

use enamel_adapter::{ModuleKind, ModuleShape, plan};

use crate::parity::matching::{adapter, lora, modules};
use crate::support::goldens::{fixtures, json};

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

/// PEFT counts the ranks that AdaLoRA keeps as parameters; the goldens have its numbers without them too.
fn golden_counts(case: &serde_json::Value) -> (usize, usize) {
    let number = |key: &str| case[key].as_u64().expect("a count") as usize;
    (
        number("trainable_without_ranks"),
        number("total_without_ranks"),
    )
}

#[test]
fn counts_of_every_method_are_pefts() {
    let golden = json(&fixtures().join("counts.json"));
    let cases = golden["methods"].as_array().expect("cases");
    assert!(cases.len() >= 26);
    for case in cases {
        let shape = case["shape"].as_str().expect("a shape's name");
        let kind = case["peft_type"].as_str().expect("a method");
        let what = format!("{shape}, {kind}, {}", case["config"]);
        let config = adapter(kind, &case["config"]).unwrap_or_else(|e| panic!("{what}: {e}"));
        let plan = plan(&modules(&golden["shapes"][shape]), &config)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((plan.trainable, plan.total), golden_counts(case), "{what}");
    }
}

#[test]
fn counts_on_a_vision_transformer_are_the_published_ones() {
    // ViT-base/16 with 101 classes, from PEFT's documentation; only the linear modules are listed.
    let golden = json(&fixtures().join("counts.json"));
    let vit = &golden["vit"];
    let linear: Vec<ModuleShape> = vit["modules"]
        .as_array()
        .expect("modules")
        .iter()
        .map(|module| ModuleShape {
            name: module["name"].as_str().expect("a name").to_owned(),
            kind: ModuleKind::Linear,
            shape: module["shape"]
                .as_array()
                .expect("a shape")
                .iter()
                .map(|n| n.as_u64().expect("a size") as usize)
                .collect(),
            bias: true,
            transposed: false,
        })
        .collect();
    let elements = |m: &ModuleShape| m.shape.iter().product::<usize>() + m.shape[0];
    let other = vit["total"].as_u64().expect("a total") as usize
        - linear.iter().map(elements).sum::<usize>();
    let published = [
        ("LORA", 667_493),
        ("LOHA", 1_257_317),
        ("LOKR", 116_069),
        ("ADALORA", 520_325),
    ];
    let cases = vit["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), published.len());
    for (case, (kind, trainable)) in cases.iter().zip(published) {
        assert_eq!(case["peft_type"], kind);
        let config = adapter(kind, &case["config"]).unwrap_or_else(|e| panic!("{kind}: {e}"));
        let plan = plan(&linear, &config).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(plan.trainable, trainable, "{kind}");
        assert_eq!(
            (plan.trainable, plan.total + other),
            golden_counts(case),
            "{kind}"
        );
    }
}

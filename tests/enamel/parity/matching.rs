//! Which modules an adapter takes hold of: the same as PEFT, config by config.

use enamel_adapter::{AdapterConfig, LoraConfig, ModuleShape, plan};
use enamel_model::ArchConfig;
use serde_json::Value;

use crate::support::goldens::{fixtures, json};

pub fn modules(config: &Value) -> Vec<ModuleShape> {
    ArchConfig::from_json(config)
        .unwrap_or_else(|e| panic!("{e}"))
        .modules()
}

/// `adapter_config.json` with these options, read as the file would be.
pub fn lora(options: &Value) -> Result<LoraConfig, String> {
    let mut full = options.clone();
    full["peft_type"] = "LORA".into();
    LoraConfig::from_json(&full, "golden").map_err(|e| e.to_string())
}

/// The same of any method.
pub fn adapter(kind: &str, options: &Value) -> Result<AdapterConfig, String> {
    let mut full = options.clone();
    full["peft_type"] = kind.into();
    AdapterConfig::from_json(&full, "golden").map_err(|e| e.to_string())
}

/// What PEFT lets pass and is refused here: an entry without effect is a mistake.
const STRICTER: [&str; 5] = [
    "one of two matches",
    "exclude nothing that exists",
    "rank that matches nothing",
    "rank behind one that always matches",
    "saved that is not there",
];

#[test]
fn every_config_matches_as_in_peft() {
    let modules = modules(&json(&fixtures().join("llama/untied/config.json")));
    let cases = json(&fixtures().join("matching.json"));
    let cases = cases.as_object().expect("an object of cases");
    assert!(cases.len() >= 40);
    let mut wrong = Vec::new();
    for (name, case) in cases {
        let found = lora(&case["config"])
            .and_then(|config| plan(&modules, &config).map_err(|e| e.to_string()));
        match found {
            Err(_) if case.get("error").is_some() => {}
            Err(_) if STRICTER.contains(&name.as_str()) => {}
            Err(error) => wrong.push(format!("{name}: refused ({error}), PEFT takes it")),
            Ok(_) if case.get("error").is_some() => {
                wrong.push(format!("{name}: taken, PEFT refuses: {}", case["error"]));
            }
            Ok(_) if STRICTER.contains(&name.as_str()) => {
                wrong.push(format!("{name}: taken, with an entry that matches nothing"));
            }
            Ok(plan) => {
                let ours: Vec<_> = plan
                    .targets
                    .iter()
                    .map(|t| (t.name.clone(), t.r, t.scale.to_string()))
                    .collect();
                let theirs: Vec<_> = case["targets"]
                    .as_array()
                    .expect("targets")
                    .iter()
                    .map(|t| {
                        let r = t["r"].as_u64().expect("a rank") as usize;
                        (
                            text(&t["name"]),
                            r,
                            t["scaling"].as_f64().expect("a scale").to_string(),
                        )
                    })
                    .collect();
                if sorted(ours.clone()) != sorted(theirs.clone()) {
                    wrong.push(format!("{name}: targets {ours:?}, PEFT's {theirs:?}"));
                }
                let saved: Vec<_> = plan.saved.iter().map(|s| s.name.clone()).collect();
                let theirs: Vec<_> = case["saved"]
                    .as_array()
                    .expect("saved")
                    .iter()
                    .map(text)
                    .collect();
                if sorted(saved.clone()) != sorted(theirs.clone()) {
                    wrong.push(format!("{name}: saves {saved:?}, PEFT {theirs:?}"));
                }
                for (key, ours) in [("trainable", plan.trainable), ("total", plan.total)] {
                    if Some(ours as u64) != case[key].as_u64() {
                        wrong.push(format!("{name}: {key} {ours}, PEFT's {}", case[key]));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_pattern_that_matches_nothing_names_what_is_near() {
    let modules = modules(&json(&fixtures().join("llama/untied/config.json")));
    let config = lora(&serde_json::json!({ "target_modules": ["q_prog"] })).expect("valid options");
    let error = plan(&modules, &config)
        .expect_err("no module is called q_prog")
        .to_string();
    assert!(
        error.contains("q_prog") && error.contains("q_proj"),
        "{error}"
    );
}

fn text(value: &Value) -> String {
    value.as_str().expect("a name").to_owned()
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort();
    list
}

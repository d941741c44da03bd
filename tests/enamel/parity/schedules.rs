//! Learning rates step by step, as transformers' schedulers give them.

use enamel_train::recipe::Schedule as Kind;
use enamel_train::training::lr_schedule::Schedule;

use crate::support::goldens::{fixtures, json};

#[test]
fn rates_are_transformers() {
    let cases = json(&fixtures().join("schedules.json"));
    let cases = cases.as_array().expect("a list");
    assert_eq!(cases.len(), 13);
    for case in cases {
        let kind: Kind = serde_json::from_value(case["schedule"].clone()).expect("a schedule");
        let number = |key: &str| case[key].as_u64().expect("a number") as usize;
        let schedule = Schedule::new(kind, 1.0, number("warmup_steps"), number("total_steps"));
        for (step, rate) in case["learning_rates"]
            .as_array()
            .expect("rates")
            .iter()
            .enumerate()
        {
            let theirs = rate.as_f64().expect("a rate");
            let ours = schedule.at(step);
            // Both are f64 throughout; a cosine may differ in the last place.
            assert!((ours - theirs).abs() < 1e-12, "{case}, step {step}: {ours}");
        }
    }
}

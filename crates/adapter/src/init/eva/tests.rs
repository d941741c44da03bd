use burn::tensor::{Device, Tensor, TensorData};
use serde_json::json;

use super::*;
use crate::linalg::random::{gaussian, rng};
use crate::testing::{HIDDEN, Tiny, ids};
use crate::{InitLora, Linear, SlotRef, attach_given, export_trainable, plan, shapes};

const WIDTH: usize = 12;

/// Three layers: two read one input, the third another.
#[derive(burn::module::Module, Debug)]
struct Three {
    layers: Vec<Linear>,
}

const NAMES: [&str; 3] = ["block.q_proj", "block.k_proj", "block.o_proj"];

impl Adaptable for Three {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        for (name, layer) in NAMES.iter().zip(&mut self.layers) {
            f(name, Slot::Linear(layer));
        }
    }
    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        for (name, layer) in NAMES.iter().zip(&self.layers) {
            f(name, SlotRef::Linear(layer));
        }
    }
}

impl Three {
    fn new() -> Self {
        let ones = || Tensor::ones([WIDTH, WIDTH], &Device::flex());
        let layer = |name: &&str| Linear::new(name, ones(), None);
        Self {
            layers: NAMES.iter().map(layer).collect(),
        }
    }

    fn run(&self, x: &Tensor<2>, y: &Tensor<2>) {
        self.layers[0].forward(x.clone());
        self.layers[1].forward(x.clone());
        self.layers[2].forward(y.clone());
    }
}

fn config(r: usize, eva: serde_json::Value) -> LoraConfig {
    let mut config = LoraConfig {
        r,
        lora_alpha: 8.0,
        target_modules: Some(Targets::AllLinear),
        init_lora_weights: InitLora::Eva,
        ..LoraConfig::default()
    };
    config.other.insert("eva_config".into(), eva);
    config
}

/// Rows that vary along columns `from`, `from + 1`, … with these deviations, and hardly otherwise.
fn planted(rows: usize, from: usize, deviations: &[f64], salt: u64) -> Vec<f32> {
    let mut draw = rng(salt, "planted");
    let mut values = gaussian(&mut draw, rows * WIDTH, 0.01);
    for row in values.chunks_mut(WIDTH) {
        for (j, deviation) in deviations.iter().enumerate() {
            row[from + j] += gaussian(&mut draw, 1, *deviation)[0] + 1.0;
        }
    }
    values
}

fn tensor(values: Vec<f32>) -> Tensor<2> {
    let rows = values.len() / WIDTH;
    Tensor::from_data(TensorData::new(values, [rows, WIDTH]), &Device::flex())
}

/// `batches` of 40 rows, of which every fourth does not count and is nonsense.
fn observed(config: &LoraConfig, batches: u64) -> (LoraConfig, EvaStart) {
    let mut model = Three::new();
    let plan = plan(&shapes(&model), config).unwrap();
    let mut observer = Observer::watch(&mut model, config, &plan).unwrap();
    let allowed: Vec<bool> = (0..40).map(|i| i % 4 != 3).collect();
    for batch in 0..batches {
        let with_nonsense = |mut values: Vec<f32>| {
            for (row, _) in values
                .chunks_mut(WIDTH)
                .zip(&allowed)
                .filter(|(_, ok)| !**ok)
            {
                row.fill(100.0 * (batch as f32 + 1.0));
            }
            tensor(values)
        };
        let x = with_nonsense(planted(40, 2, &[3.0, 1.5, 0.8, 0.4], batch));
        let y = with_nonsense(planted(40, 7, &[1.0, 0.02], 100 + batch));
        observer.see(&allowed, &mut |_| model.run(&x, &y)).unwrap();
    }
    observer.finish().unwrap()
}

#[test]
fn planted_directions_are_found_in_order_and_padding_is_not_looked_at() {
    let (_, start) = observed(&config(2, json!({ "rho": 1.0 })), 6);
    for (module, first) in NAMES.iter().zip([2, 2, 7]) {
        let a = &start.factors[*module];
        assert_eq!(a.len(), 2 * WIDTH);
        for (k, row) in a.chunks(WIDTH).enumerate() {
            let length: f32 = row.iter().map(|v| v * v).sum();
            assert!((length - 1.0).abs() < 1e-5);
            // Positive where it is largest.
            assert!(row[first + k] > 0.95, "{module}, {k}: {row:?}");
        }
    }
    assert_eq!(start.factors[NAMES[0]], start.factors[NAMES[1]]);
    assert_eq!((start.inputs, start.batches, start.tokens), (2, 6, 180));
    assert_eq!(start.settled, 2);
    let text = start.to_string();
    assert_eq!(
        text,
        "180 tokens in 6 batches seen, 2 of 2 inputs settled; ranks 2 to 2"
    );
}

#[test]
fn ranks_move_to_where_inputs_vary_in_few_directions() {
    // Shares: about 0.75, 0.19, 0.05, 0.01 for the two layers with one input, and 0.998, 0.001, … for
    // the third. A budget of 6: 0.998, 2 × 0.75, 2 × 0.19, and one of 0.05.
    let (adjusted, start) = observed(&config(2, json!({ "rho": 2.0 })), 6);
    let ranks: Vec<usize> = start.ranks.iter().map(|(_, r)| *r).collect();
    assert_eq!(ranks, [3, 2, 1]);
    assert_eq!(
        adjusted.rank_pattern,
        [
            ("block.q_proj".to_string(), 3),
            ("block.o_proj".to_string(), 1)
        ]
    );
    assert_eq!(
        adjusted.alpha_pattern,
        [
            ("block.q_proj".to_string(), 12.0),
            ("block.o_proj".to_string(), 4.0)
        ]
    );
    assert_eq!(start.factors["block.q_proj"].len(), 3 * WIDTH);
    assert_eq!(start.shares["block.o_proj"].len(), 4);
    assert_eq!(adjusted.target_modules, Some(Targets::AllLinear));

    let fixed = json!({ "rho": 2.0, "adjust_scaling_factors": false });
    let (kept, _) = observed(&config(2, fixed), 6);
    assert_eq!(kept.rank_pattern, adjusted.rank_pattern);
    assert_eq!(kept.alpha_pattern, []);
}

#[test]
fn a_module_that_loses_all_its_ranks_is_no_target_any_more() {
    // The third layer's only share is the largest of all; with its input shown to it alone, the two
    // others would keep theirs, so the narrow one is made to lose.
    let cfg = config(1, json!({ "rho": 3.0 }));
    let mut model = Three::new();
    let plan_before = plan(&shapes(&model), &cfg).unwrap();
    let mut observer = Observer::watch(&mut model, &cfg, &plan_before).unwrap();
    let allowed = [true; 40];
    for batch in 0..4 {
        let x = tensor(planted(40, 2, &[1.0, 0.9], batch));
        let y = tensor(planted(40, 0, &[0.1; WIDTH], 50 + batch));
        observer.see(&allowed, &mut |_| model.run(&x, &y)).unwrap();
    }
    let (adjusted, start) = observer.finish().unwrap();
    let ranks: Vec<usize> = start.ranks.iter().map(|(_, r)| *r).collect();
    assert_eq!(ranks, [2, 1, 0]);
    assert!(!start.factors.contains_key("block.o_proj"));
    let left = ["block.q_proj", "block.k_proj"].map(String::from).to_vec();
    assert_eq!(adjusted.target_modules, Some(Targets::List(left)));
    assert!(
        start
            .to_string()
            .ends_with("ranks 0 to 2, one module left out")
    );
    let mut model = Three::new();
    let plan = attach_given(&mut model, "default", &adjusted, 1, Some(&start.given())).unwrap();
    assert_eq!(plan.targets.len(), 2);
    assert_eq!((plan.targets[0].r, plan.targets[0].scale), (2, 8.0));
}

#[test]
fn whitening_divides_by_the_root_of_the_singular_value() {
    let (_, plain) = observed(&config(2, json!({ "rho": 1.0 })), 3);
    let (_, white) = observed(&config(2, json!({ "rho": 1.0, "whiten": true })), 3);
    let length = |start: &EvaStart, k: usize| {
        let row = &start.factors["block.q_proj"][k * WIDTH..(k + 1) * WIDTH];
        row.iter().map(|v| v * v).sum::<f32>().sqrt()
    };
    // A singular value is about the deviation times the root of the number of rows.
    let rows = white.learned["block.q_proj"] as f32;
    for (k, deviation) in [3.0, 1.5].into_iter().enumerate() {
        let s = (length(&plain, k) / length(&white, k)).powi(2);
        assert!((s / (deviation * rows.sqrt()) - 1.0).abs() < 0.25, "{s}");
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let cfg = config(2, json!({ "rho": 2.0 }));
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| observed(&cfg, 4))
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn the_adapter_starts_from_what_was_found_and_changes_nothing_at_first() {
    let cfg = config(4, json!({}));
    let mut model = Tiny::new(&Device::flex());
    let base = model.logits();
    let mut watched = model.clone();
    let before = plan(&shapes(&model), &cfg).unwrap();
    let mut observer = Observer::watch(&mut watched, &cfg, &before).unwrap();
    assert_eq!(observer.directions(), 8);
    let allowed = [true; 10];
    let ids = ids(&Device::flex());
    observer
        .see(&allowed, &mut |_| drop(watched.forward(ids.clone())))
        .unwrap();
    assert!(!observer.settled());
    observer
        .see(&allowed, &mut |_| drop(watched.forward(ids.clone())))
        .unwrap();
    let (adjusted, start) = observer.finish().unwrap();
    assert_eq!(start.ranks.len(), 14);
    assert_eq!(start.ranks.iter().map(|(_, r)| r).sum::<usize>(), 14 * 4);
    // Queries, keys, values, gates and the way up read one input in this model.
    assert_eq!(start.inputs, 6);
    attach_given(&mut model, "default", &adjusted, 7, Some(&start.given())).unwrap();
    assert_eq!(model.logits(), base);
    let state = export_trainable(&model).unwrap();
    let (key, shape, values) = &state[0];
    assert!(key.ends_with("q_proj.lora_A.weight"), "{key}");
    assert_eq!(shape, &[start.ranks[0].1, HIDDEN]);
    assert_eq!(values, &start.factors["model.layers.0.self_attn.q_proj"]);
}

#[test]
fn what_cannot_work_is_said_with_its_reason() {
    let error = Settings::of(&config(2, json!({ "rho": 0.5, "tau": 2.0 }))).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("rho = 0.5") && text.contains("tau = 2"),
        "{text}"
    );
    assert!(Settings::of(&config(2, json!({ "rho": "much" }))).is_err());
    assert_eq!(
        Settings::of(&LoraConfig::default()).unwrap(),
        Settings::default()
    );

    let cfg = config(4, json!({}));
    let mut model = Three::new();
    let plan = plan(&shapes(&model), &cfg).unwrap();
    let mut observer = Observer::watch(&mut model, &cfg, &plan).unwrap();
    let error = observer
        .see(&[true; 9], &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("block.q_proj") && error.contains("not run"),
        "{error}"
    );

    let x = tensor(planted(9, 0, &[1.0], 1));
    let mut observer = Observer::watch(&mut model, &cfg, &plan).unwrap();
    let error = observer
        .see(&[true; 5], &mut |_| model.run(&x, &x))
        .unwrap_err()
        .to_string();
    assert!(error.contains("5 tokens, not of 9"), "{error}");

    // Eight directions are looked for, but no batch has as many rows.
    let x = tensor(planted(7, 0, &[1.0], 1));
    let mut observer = Observer::watch(&mut model, &cfg, &plan).unwrap();
    observer
        .see(&[true; 7], &mut |_| model.run(&x, &x))
        .unwrap();
    let error = observer.finish().unwrap_err().to_string();
    assert!(error.contains("at least 8 tokens"), "{error}");

    let mut values = planted(9, 0, &[1.0], 1);
    values[13] = f32::NAN;
    let x = tensor(values);
    let mut observer = Observer::watch(&mut model, &cfg, &plan).unwrap();
    let error = observer
        .see(&[true; 9], &mut |_| model.run(&x, &x))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("block.q_proj") && error.contains("NaN"),
        "{error}"
    );
}

//! What a method says of itself must be so.

use burn::tensor::Device;
use tempfile::TempDir;

use super::cases;
use crate::base::module_shape::{ModuleKind, ModuleShape};
use crate::layers::adaptable::SlotRef;
use crate::methods::facts::{BaseShape, InputWidth, OwnShapes, Weighing};
use crate::model::attach::shapes;
use crate::offline::{AdapterOnDisk, HostModule};
use crate::testing::{Tiny, difference};
use crate::{Adaptable, AdapterConfig, MethodConfig, SaveMeta, plan, save_pretrained};

/// Every name that a parameter has is listed, so that a key of a file can be taken apart; and the names say of
/// which module, and how wide it is.
#[test]
fn the_keys_of_every_parameter_are_known_and_tell_of_the_base() {
    let modules = shapes(&Tiny::new(&Device::flex()));
    for case in cases() {
        let plan = plan(&modules, &case.config).unwrap();
        for target in &plan.targets {
            let parameters = case.config.parameters(target);
            for (own, _) in &parameters {
                let known = AdapterConfig::all_keys().any(|key| key == *own);
                assert!(known, "{}: {own}", case.name);
                let key = target.key(own);
                let split = crate::files::infer_modules::split(&key);
                assert_eq!(split, Some((target.name.as_str(), *own)), "{}", case.name);
            }
            let shared: Vec<(&str, &[usize])> = plan
                .shared
                .iter()
                .map(|(key, shape)| (*key, shape.as_slice()))
                .collect();
            let own = OwnShapes {
                own: parameters
                    .iter()
                    .map(|(name, shape)| (*name, shape.as_slice()))
                    .collect(),
                shared: &shared,
            };
            let sides = (target.out_features, target.in_features);
            match case.config.base_of(&own) {
                Some(BaseShape::Embedding(rows, width)) => {
                    assert_eq!((width, rows), sides, "{}: {}", case.name, target.name);
                }
                Some(BaseShape::Linear(out, width)) => {
                    // A rank that is gone leaves no trace of one side, and (IA)³ never has both.
                    let told = case.config.input_width() == InputWidth::Told;
                    let whole = told && case.config.needs_base(true).is_none() && target.r > 0;
                    // What repeats over the outputs tells after how many.
                    let repeats = case.config.input_width() == InputWidth::Untold
                        && sides.0.is_multiple_of(out);
                    assert!(
                        out == sides.0 || out == 1 || repeats,
                        "{}: {}",
                        case.name,
                        target.name
                    );
                    assert!(
                        !whole || width == sides.1,
                        "{}: {} is {width} wide",
                        case.name,
                        target.name
                    );
                }
                None => panic!("{}: {} is not told", case.name, target.name),
            }
        }
        for (key, _) in &plan.shared {
            assert!(
                case.config.shared_keys().contains(key),
                "{}: {key}",
                case.name
            );
        }
    }
}

/// `weigh` says that it has made the adapter's part so many times as large, or that it has not.
#[test]
fn what_is_weighed_adds_so_many_times_as_much() {
    let device = Device::flex();
    let mut weighed = Vec::new();
    for case in cases() {
        let model = case.adapted(&device);
        let dir = TempDir::new().unwrap();
        save_pretrained(&model, &case.config, &SaveMeta::default(), dir.path()).unwrap();
        let modules = shapes(&model);
        let plain = AdapterOnDisk::read(dir.path(), &modules, None).unwrap();
        for weight in [0.0, 0.7, -2.0] {
            let mut other = plain.clone();
            if !other.weigh(weight) {
                assert_eq!(plain.rest().len(), other.rest().len());
                continue;
            }
            weighed.push(case.name);
            let mut seen = 0;
            Tiny::new(&device).for_each_slot_ref(&mut |name, slot| {
                let shape = modules.iter().find(|m| m.name == name).unwrap();
                let base = on_host(slot);
                let of =
                    |adapter: &AdapterOnDisk| adapter.folded(shape, &base, &base, &device).unwrap();
                let (once, times) = (of(&plain), of(&other));
                if once == base {
                    return;
                }
                seen += 1;
                let wanted = expected(&base, &once, weight as f32);
                let largest = once
                    .weight
                    .iter()
                    .fold(0.0_f32, |most, v| most.max(v.abs()));
                let apart = difference(&times.weight, &wanted.weight);
                // Sums and differences of values of this size, rounded to f32 a few times.
                assert!(
                    apart <= 4e-6 * largest * (1.0 + weight.abs() as f32),
                    "{} × {weight}, {name} ({}): {apart}",
                    case.name,
                    kind(shape)
                );
                if let (Some(times), Some(wanted)) = (&times.bias, &wanted.bias) {
                    let largest = wanted.iter().fold(1.0_f32, |most, v| most.max(v.abs()));
                    assert!(difference(times, wanted) <= 4e-6 * largest, "{}", case.name);
                }
            });
            assert!(seen > 0, "{}: changes nothing", case.name);
        }
    }
    // Of each method with a factor some form can be weighed whole.
    for case in cases() {
        let has_factor = matches!(case.config.weighing(), Weighing::Factor { .. });
        let kin = |name: &&str| {
            let other = cases().into_iter().find(|c| c.name == *name).unwrap();
            other.config.peft_type() == case.config.peft_type()
        };
        assert!(!has_factor || weighed.iter().any(kin), "{}", case.name);
    }
}

fn kind(shape: &ModuleShape) -> &'static str {
    match shape.kind {
        ModuleKind::Embedding => "a table",
        _ => "a layer",
    }
}

/// `base + weight · (once − base)`.
fn expected(base: &HostModule, once: &HostModule, weight: f32) -> HostModule {
    let line = |base: &[f32], once: &[f32]| {
        let pairs = base.iter().zip(once);
        pairs
            .map(|(b, o)| b + weight * (o - b))
            .collect::<Vec<f32>>()
    };
    let zero = vec![
        0.0;
        base.bias
            .as_ref()
            .or(once.bias.as_ref())
            .map_or(0, Vec::len)
    ];
    let of = |module: &HostModule| module.bias.clone().unwrap_or_else(|| zero.clone());
    HostModule {
        weight: line(&base.weight, &once.weight),
        bias: once.bias.as_ref().map(|_| line(&of(base), &of(once))),
    }
}

fn on_host(slot: SlotRef<'_>) -> HostModule {
    fn values<const D: usize>(tensor: burn::tensor::Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec().unwrap()
    }
    match slot {
        SlotRef::Linear(linear) => HostModule {
            weight: values(linear.weight.dense()),
            bias: linear.bias.as_ref().map(|bias| values(bias.val())),
        },
        SlotRef::Embedding(table) => HostModule {
            weight: values(table.weight.dense()),
            bias: None,
        },
        SlotRef::Conv(_) | SlotRef::Param(_) => unreachable!("the test model has none"),
        SlotRef::Norm(norm) => HostModule {
            weight: values(norm.weight.val()),
            bias: norm.bias.as_ref().map(|bias| values(bias.val())),
        },
    }
}

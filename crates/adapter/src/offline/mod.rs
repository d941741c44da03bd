//! An adapter without its model: what its two files say, and what it makes of one module at a time.
//!
//! Every number comes from the methods' own definitions: a module is built alone, the adapter is attached
//! to it, and it is folded.

pub mod inspect;
mod one_module;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::Device;

use self::one_module::{Module, OneModule};
use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::base::routing::DEFAULT;
use crate::base::to_host;
use crate::combine::LoraFactors;
use crate::error::{AdapterError, Result};
use crate::files::infer_modules::module_of;
use crate::files::store::load_config;
use crate::files::{Checked, install_checked, read_checked};
use crate::layers::adaptable::Adaptable;
use crate::linalg::{LinalgError, Matrix};
use crate::methods::AdapterConfig;
use crate::methods::facts::Weighing;
use crate::model::trainable::HostTensor;
use crate::plan::{AdapterPlan, PREFIX, TargetPlan};

/// Reads the base's weight of the named module, row-major.
pub type ReadBase<'a> = dyn Fn(&str) -> Option<Vec<f32>> + 'a;

/// An adapter in memory, checked against the modules of a model that need not be loaded.
#[derive(Clone, Debug)]
pub struct AdapterOnDisk {
    config: AdapterConfig,
    checked: Checked,
}

/// Weight and bias of one module on the host, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct HostModule {
    /// `[out, in]`, `[vocabulary, hidden]` or `[hidden]`.
    pub weight: Vec<f32>,
    /// `[out]`
    pub bias: Option<Vec<f32>>,
}

impl AdapterOnDisk {
    /// Reads a directory for a model of these modules; everything that does not fit comes in one error.
    /// `base` reads the base's weight of the named module: PEFT stores some weights of the base along,
    /// and they have to be this base's. Without it they are taken for granted.
    ///
    /// # Errors
    /// As [`load_pretrained`](crate::load_pretrained); a method that has no weights of its own for a module (X-LoRA).
    pub fn read(dir: &Path, modules: &[ModuleShape], base: Option<&ReadBase<'_>>) -> Result<Self> {
        let config = load_config(dir)?;
        if let Some(reason) = config.no_weights() {
            return Err(AdapterError::Choice {
                problems: vec![format!(
                    "{}: {} {reason}; use it with generate, chat or score as it is",
                    dir.display(),
                    config.peft_type()
                )],
            });
        }
        let is_base = |module: &str, stored: &crate::files::store::Stored| match base {
            None => true,
            Some(base) => match (base(module), &stored.values) {
                (Some(base), Some(values)) => stored.is_rounded(&base, values),
                _ => false,
            },
        };
        let checked = read_checked(modules, &is_base, &config, dir)?;
        Ok(Self { config, checked })
    }

    /// Its configuration, as in the file.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// What it would be on the model.
    pub fn plan(&self) -> &AdapterPlan {
        &self.checked.plan
    }

    /// Whether it changes anything of the module.
    pub fn touches(&self, module: &str) -> bool {
        let plan = &self.checked.plan;
        self.trains_everything()
            || plan.targets.iter().any(|t| t.name == module)
            || plan.saved.iter().any(|s| s.name == module)
            || plan.biases.iter().any(|b| b.name == module)
            || plan.tokens.iter().any(|t| t.name == module)
    }

    /// Whether it is a whole base of its own.
    pub fn trains_everything(&self) -> bool {
        crate::methods::MethodConfig::trains_everything(&self.config)
    }

    /// Keys, shapes and values of what it trains besides its deltas: copies, biases, single rows.
    pub fn rest(&self) -> Vec<HostTensor> {
        let plan = &self.checked.plan;
        let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for saved in &plan.saved {
            shapes.insert(
                format!("{PREFIX}{}.weight", saved.name),
                saved.shape.clone(),
            );
            if saved.bias {
                shapes.insert(
                    format!("{PREFIX}{}.bias", saved.name),
                    saved.shape[..1].to_vec(),
                );
            }
        }
        shapes.extend(plan.biases.iter().map(|b| (b.key.clone(), vec![b.len])));
        shapes.extend(
            plan.tokens
                .iter()
                .map(|t| (t.key.clone(), vec![t.indices.len(), t.width])),
        );
        let values = |key: &str| self.checked.values.get(key).cloned().unwrap_or_default();
        shapes
            .into_iter()
            .map(|(key, shape)| (key.clone(), shape, values(&key)))
            .collect()
    }

    /// Targets to which it gives a bias of their own (`lora_bias`).
    pub fn own_biases(&self) -> Vec<&str> {
        let Some(key) = self.config.bias_key() else {
            return Vec::new();
        };
        let targets = self.checked.plan.targets.iter();
        let own = targets.filter(|t| self.checked.values.contains_key(&t.key(key)));
        own.map(|t| t.name.as_str()).collect()
    }

    /// Attaches it as `name` to a model that has all its modules, or some of them.
    ///
    /// # Errors
    /// An adapter of that name that is there already.
    pub fn attach<M: Adaptable>(&self, model: &mut M, name: &str) -> Result<()> {
        let mut modules = Vec::new();
        model.for_each_slot_ref(&mut |module, _| modules.push(module.to_string()));
        let here = |name: &str| modules.iter().any(|m| m == name);
        let all = &self.checked.plan;
        let plan = AdapterPlan {
            targets: all
                .targets
                .iter()
                .filter(|t| here(&t.name))
                .cloned()
                .collect(),
            saved: all
                .saved
                .iter()
                .filter(|s| here(&s.name))
                .cloned()
                .collect(),
            biases: all
                .biases
                .iter()
                .filter(|b| here(&b.name))
                .cloned()
                .collect(),
            tokens: all
                .tokens
                .iter()
                .filter(|t| here(&t.name))
                .cloned()
                .collect(),
            ..all.clone()
        };
        let part = |values: &HashMap<String, Vec<f32>>| {
            let own = values
                .iter()
                .filter(|(key, _)| module_of(key).is_some_and(&here));
            own.map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        let checked = Checked {
            plan,
            values: part(&self.checked.values),
            shared: self.checked.shared.clone(),
            origin: self.checked.origin.as_ref().map(part),
        };
        install_checked(model, name, &self.config, checked, false)
    }

    /// `onto` with this adapter folded in: the base's module, or that with other adapters in it already.
    ///
    /// # Errors
    /// A device that does not give the values back.
    pub fn folded(
        &self,
        shape: &ModuleShape,
        base: &HostModule,
        onto: &HostModule,
        device: &Device,
    ) -> Result<HostModule> {
        if !self.touches(&shape.name) {
            return Ok(onto.clone());
        }
        self.on_one(shape, base, onto, device)?.folded()
    }

    /// A model of one module with this adapter. What began with a part of the base is worked out on the base,
    /// so that comes first.
    fn on_one(
        &self,
        shape: &ModuleShape,
        base: &HostModule,
        onto: &HostModule,
        device: &Device,
    ) -> Result<OneModule> {
        let mut module = OneModule::new(shape, base, device);
        self.attach(&mut module, DEFAULT)?;
        if !self.trains_everything() && !std::ptr::eq(base, onto) {
            module.rebase(OneModule::new(shape, onto, device));
        }
        Ok(module)
    }

    /// The matrix of a head that shares this embedding, which follows single trained rows alone.
    ///
    /// # Errors
    /// A module that is not an embedding; as [`Self::folded`].
    pub fn folded_head(
        &self,
        shape: &ModuleShape,
        base: &HostModule,
        onto: &HostModule,
        device: &Device,
    ) -> Result<Vec<f32>> {
        let module = self.on_one(shape, base, onto, device)?;
        match module.module {
            Module::Embedding(table) if !table.trains_base => {
                to_host(&shape.name, table.head_weight().dense())
            }
            Module::Embedding(table) => to_host(&shape.name, table.weight.dense()),
            _ => Err(AdapterError::NoAdapter),
        }
    }

    /// Makes the adapter's part `weight` times as large, where one of its parameters is a factor of all
    /// of it. False, and nothing is changed, where none is.
    pub fn weigh(&mut self, weight: f64) -> bool {
        if weight == 1.0 {
            return true;
        }
        let Checked { plan, values, .. } = &mut self.checked;
        let whole = !plan.saved.is_empty() || !plan.biases.is_empty() || !plan.tokens.is_empty();
        let Weighing::Factor { keys, neutral } = self.config.weighing() else {
            return false;
        };
        let factors_of = |target: &TargetPlan| keys.iter().map(|key| target.key(key)).collect();
        let factors: Vec<Vec<String>> = plan.targets.iter().map(factors_of).collect();
        let is_there = |factors: &Vec<String>| factors.iter().any(|key| values.contains_key(key));
        // A target without its factor would stay as large as it is.
        if whole || !factors.iter().all(is_there) {
            return false;
        }
        for key in factors.into_iter().flatten() {
            for value in values.get_mut(&key).into_iter().flatten() {
                *value = (neutral + weight * (f64::from(*value) - neutral)) as f32;
            }
        }
        true
    }

    /// What the adapter adds to one target's weight, or why the base is needed to say. Of an embedding,
    /// the transpose, `[hidden, vocabulary]`.
    ///
    /// # Errors
    /// A module that is not a target; a method for which the base decides ([`Self::needs_base`]).
    pub fn delta(&self, module: &str, device: &Device) -> Result<Delta> {
        let Some(target) = self.checked.plan.targets.iter().find(|t| t.name == module) else {
            return Err(no_delta(module, "it is no target of the adapter"));
        };
        if let Some(reason) = self.needs_base() {
            return Err(no_delta(module, reason));
        }
        if let Some(names) = self.config.factor_keys(target.embedding) {
            return self.factors(target, names);
        }
        let shape = ModuleShape {
            name: module.to_string(),
            kind: ModuleKind::Linear,
            shape: vec![target.out_features, target.in_features],
            bias: false,
            transposed: false,
        };
        let zero = HostModule {
            weight: vec![0.0; target.out_features * target.in_features],
            bias: None,
        };
        let delta = self.folded(&shape, &zero, &zero, device)?.weight;
        let delta = Matrix::new(target.out_features, target.in_features, delta);
        Ok(Delta::Dense(
            delta.map_err(|e| no_delta(module, &e.to_string()))?,
        ))
    }

    /// The factors of a target, together with what they started from where that was taken from the base:
    /// `B·A − B₀·A₀ = [B, −B₀]·[A; A₀]`.
    fn factors(&self, target: &TargetPlan, names: [&str; 2]) -> Result<Delta> {
        let pair =
            |from: &HashMap<String, Vec<f32>>| -> std::result::Result<[Matrix; 2], LinalgError> {
                let get = |name: &str| from.get(&target.key(name)).cloned().unwrap_or_default();
                Ok([
                    Matrix::new(target.r, target.in_features, get(names[0]))?,
                    Matrix::new(target.out_features, target.r, get(names[1]))?,
                ])
            };
        let both = || -> std::result::Result<[Matrix; 2], LinalgError> {
            let [a, b] = pair(&self.checked.values)?;
            let Some(origin) = &self.checked.origin else {
                return Ok([a, b]);
            };
            let [a0, b0] = pair(origin)?;
            Ok([
                Matrix::stack_rows(&[&a, &a0])?,
                Matrix::stack_cols(&[&b, &b0.scaled(-1.0)])?,
            ])
        };
        let [a, b] = both().map_err(|e| no_delta(&target.name, &e.to_string()))?;
        Ok(Delta::Factors(LoraFactors {
            a,
            b,
            scale: target.scale,
        }))
    }

    /// Why the base is needed to say what the adapter adds to a weight; nothing where it is not.
    pub fn needs_base(&self) -> Option<&'static str> {
        self.config.needs_base(self.checked.origin.is_some())
    }
}

/// What an adapter adds to a weight.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// `scale · b · a`
    Factors(LoraFactors),
    /// All of it, `[out, in]`.
    Dense(Matrix),
}

impl Delta {
    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Factors(f) => (f.b.rows(), f.a.cols()),
            Self::Dense(m) => (m.rows(), m.cols()),
        }
    }

    /// The Frobenius norm.
    ///
    /// # Errors
    /// Values that are not finite.
    pub fn norm(&self) -> std::result::Result<f64, LinalgError> {
        match self {
            Self::Factors(f) => crate::combine::norm(f),
            Self::Dense(m) => m.check_finite().map(|()| m.frobenius()),
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// Factors that do not go together.
    pub fn dense(&self) -> std::result::Result<Matrix, LinalgError> {
        match self {
            Self::Factors(f) => f.delta(),
            Self::Dense(m) => Ok(m.clone()),
        }
    }
}

fn no_delta(module: &str, reason: &str) -> AdapterError {
    AdapterError::Start {
        module: module.to_string(),
        reason: reason.to_string(),
    }
}

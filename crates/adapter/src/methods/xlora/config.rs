//! X-LoRA's configuration, and the experts it names.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::files;
use crate::base::module_shape::ModuleShape;
use crate::config::fields::{PeftValue, peft_config};
use crate::config::{Bias, Pattern, Purpose, SaveMeta, probability};
use crate::error::{AdapterError, Result};
use crate::files::store::{CONFIG, load_config};
use crate::layers::adaptable::Adaptable;
use crate::methods::facts::{
    BaseShape, InputWidth, Kept, LayerSize, MethodFacts, OwnShapes, Weighing,
};
use crate::methods::lora::config::LoraConfig;
use crate::methods::{
    Adapter, AdapterConfig, InitContext, LoadedAdapter, MethodConfig, Parameters, Placement,
};
use crate::plan::target::Selection;
use crate::plan::{AdapterPlan, TargetPlan};

peft_config! {
    /// PEFT's `XLoraConfig`. It has no modules of its own: the experts have.
    pub struct XLoraConfig in "XLORA" {
        /// Width of the hidden states that the classifier reads; `None` stands for the model's.
        hidden_size: Option<usize> = None;
        /// The experts: name and directory. As in PEFT they are called "0", "1", … once they are
        /// attached.
        adapters: Pattern<String> = Vec::new();
        /// Softmax over the experts.
        enable_softmax: bool = true;
        /// Softmax over the experts that `top_k_lora` leaves.
        enable_softmax_topk: bool = false;
        /// A mixture of its own for each adapted layer; else one for all.
        layerwise_scalings: bool = false;
        /// Linear layers of the classifier.
        xlora_depth: usize = 1;
        /// Width between them.
        xlora_size: usize = 2048;
        /// Probability with which a value between them is dropped in training.
        xlora_dropout_p: f64 = 0.2;
        /// Train the experts along with the classifier.
        use_trainable_adapters: bool = false;
        /// What the logits are divided by before the softmax.
        softmax_temperature: f64 = 1.0;
        /// Only so many experts count for a token.
        top_k_lora: Option<usize> = None;
        /// How much of each expert is in the first pass, whose hidden states the classifier reads.
        scaling_pass_value: f64 = 0.0;
        /// Factor in front of the mixture, in both passes.
        global_scaling_weight: f64 = 1.0;
    }
    written {}
    refused {}
}

/// An expert, found and read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Expert {
    /// What its adapter is called on the model: its number.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: LoraConfig,
}

impl XLoraConfig {
    /// The entries of `adapters` in the classifier's order. PEFT writes its tables sorted as text, with
    /// "10" before "2"; where the names are the experts' numbers, those decide.
    pub(crate) fn ordered(&self) -> Vec<&(String, String)> {
        let mut entries: Vec<_> = self.adapters.iter().collect();
        let number = |name: &str| name.parse::<usize>().ok().filter(|n| n.to_string() == name);
        let numbers: HashSet<_> = entries
            .iter()
            .filter_map(|(name, _)| number(name))
            .collect();
        if numbers.len() == entries.len() && numbers.iter().all(|n| *n < entries.len()) {
            entries.sort_by_key(|(name, _)| number(name));
        }
        entries
    }

    /// Reads the configurations of all experts.
    ///
    /// # Errors
    /// Everything that is wrong with any of them.
    pub(crate) fn experts(&self) -> Result<Vec<Expert>> {
        let mut problems = Vec::new();
        let mut experts = Vec::new();
        for (i, (name, path)) in self.ordered().into_iter().enumerate() {
            match expert(Path::new(path)) {
                Ok(config) => experts.push(Expert {
                    name: i.to_string(),
                    dir: PathBuf::from(path),
                    config,
                }),
                Err(reasons) => {
                    let at = format!("adapters.{name:?} = {path:?}");
                    problems.extend(reasons.into_iter().map(|r| format!("{at}: {r}")));
                }
            }
        }
        if problems.is_empty() {
            return Ok(experts);
        }
        Err(AdapterError::Config {
            origin: "X-LoRA".into(),
            problems,
        })
    }

    /// How many experts there are.
    pub(crate) fn count(&self) -> usize {
        self.adapters.len()
    }
}

/// The configuration of the expert in `dir`, or all that keeps it from being one.
fn expert(dir: &Path) -> std::result::Result<LoraConfig, Vec<String>> {
    if dir.as_os_str().is_empty() {
        return Err(vec!["no directory is named".into()]);
    }
    if !dir.join(CONFIG).is_file() {
        let what = if dir.is_dir() {
            format!("the directory has no {CONFIG}")
        } else {
            "there is no such directory, neither beside the X-LoRA adapter nor in the working \
             directory; an adapter from elsewhere must be downloaded first"
                .into()
        };
        return Err(vec![what]);
    }
    let config = load_config(dir).map_err(|error| vec![error.to_string()])?;
    let AdapterConfig::Lora(config) = config else {
        return Err(vec![format!(
            "an expert must be a LoRA, and this is {}",
            config.peft_type()
        )]);
    };
    // What PEFT could not mix either, or would mix wrongly: such a file would mean something else there.
    let refused = [
        (config.use_dora, "use_dora: DoRA cannot be mixed"),
        (
            config.lora_bias,
            "lora_bias: a bias behind B would not be mixed",
        ),
        (
            config.bias != Bias::None,
            "bias: an expert cannot train the base's biases",
        ),
        (
            config
                .modules_to_save
                .as_ref()
                .is_some_and(|m| !m.is_empty()),
            "modules_to_save: an expert cannot train modules whole",
        ),
        (
            config.trainable_token_indices.is_some(),
            "trainable_token_indices: an expert cannot train rows of the embedding",
        ),
        (
            config.init_lora_weights.subtracts_initial(),
            "init_lora_weights: it took a part of the base's weights; write it again as plain LoRA",
        ),
    ];
    let reasons: Vec<String> = refused
        .iter()
        .filter(|(refused, _)| *refused)
        .map(|(_, why)| (*why).to_string())
        .collect();
    if reasons.is_empty() {
        Ok(config)
    } else {
        Err(reasons)
    }
}

impl MethodConfig for XLoraConfig {
    fn selection(&self) -> Selection<'_> {
        Selection::NOTHING
    }

    fn problems(&self, _: Purpose) -> Vec<String> {
        let mut problems = Vec::new();
        let mut refuse = |bad: bool, key: &str, value: Value, why: &str| {
            if bad {
                problems.push(format!("{key} = {value}: {why}"));
            }
        };
        let count = self.count();
        refuse(
            count == 0,
            "adapters",
            json!({}),
            "X-LoRA needs at least one expert",
        );
        let mut seen = HashSet::new();
        for (name, _) in &self.adapters {
            let twice = !seen.insert(name);
            refuse(twice, "adapters", json!(name), "there are two of this name");
        }
        let least = "must be at least 1";
        refuse(self.hidden_size == Some(0), "hidden_size", json!(0), least);
        refuse(self.xlora_depth == 0, "xlora_depth", json!(0), least);
        let hidden = self.xlora_depth > 1;
        refuse(
            hidden && self.xlora_size == 0,
            "xlora_size",
            json!(0),
            least,
        );
        if let Some(k) = self.top_k_lora {
            let why = format!("must be at least 1 and at most the number of experts, {count}");
            refuse(k == 0 || k > count, "top_k_lora", json!(k), &why);
        }
        let temperature = self.softmax_temperature;
        refuse(
            !(temperature.is_finite() && temperature > 0.0),
            "softmax_temperature",
            temperature.write(),
            "must be a positive number",
        );
        for (key, value) in [
            ("scaling_pass_value", self.scaling_pass_value),
            ("global_scaling_weight", self.global_scaling_weight),
        ] {
            refuse(
                !value.is_finite(),
                key,
                value.write(),
                "must be a finite number",
            );
        }
        problems.extend(probability("xlora_dropout_p", self.xlora_dropout_p));
        problems.extend(self.refused());
        problems
    }

    fn scale(&self, _: usize, _: f64) -> f64 {
        1.0
    }

    fn parameters(&self, _: &TargetPlan) -> Parameters {
        Vec::new()
    }

    fn initial(&self, target: &TargetPlan, _: &InitContext<'_>) -> Result<Vec<Vec<f32>>> {
        Err(AdapterError::Start {
            module: target.name.clone(),
            reason: "X-LoRA's layers come from its experts".into(),
        })
    }

    fn build(&self, target: &TargetPlan, _: Vec<Vec<f32>>, place: &Placement<'_>) -> Adapter {
        // Never asked for: no module is a target of its own.
        crate::methods::ia3::neutral(target, place)
    }

    fn is_of_model(&self) -> bool {
        true
    }

    fn plan_of_model(&self, modules: &[ModuleShape]) -> Option<Result<AdapterPlan>> {
        Some(files::plan(modules, self))
    }

    fn attach_to_model<M: Adaptable>(
        &self,
        model: &mut M,
        name: &str,
        seed: u64,
    ) -> Option<Result<AdapterPlan>> {
        Some(files::attach(model, name, self, seed))
    }

    fn load_to_model<M: Adaptable>(
        &self,
        model: &mut M,
        name: &str,
        dir: &Path,
        trainable: bool,
    ) -> Option<Result<LoadedAdapter>> {
        Some(files::load(model, name, self.clone(), dir, trainable))
    }

    fn save_from_model<M: Adaptable>(
        &self,
        model: &M,
        meta: &SaveMeta,
        dir: &Path,
    ) -> Option<Result<()>> {
        Some(files::save(model, self, meta, dir))
    }
}

impl MethodFacts for XLoraConfig {
    // The classifier belongs to no module.
    const KEYS: &'static [&'static str] = &[];

    fn base_of(_: &OwnShapes<'_>) -> Option<BaseShape> {
        None
    }

    fn input_width(&self) -> InputWidth {
        // It has no modules.
        InputWidth::Told
    }

    fn label(&self) -> &'static str {
        "X-LoRA"
    }

    fn headline(&self) -> &'static [&'static str] {
        &["xlora_depth", "xlora_size", "layerwise_scalings"]
    }

    fn card_settings(&self) -> &'static [&'static str] {
        &[
            "adapters",
            "layerwise_scalings",
            "xlora_depth",
            "top_k_lora",
            "use_trainable_adapters",
        ]
    }

    fn rank(&self) -> Option<usize> {
        None
    }

    fn no_weights(&self) -> Option<&'static str> {
        Some("mixes adapters anew for each token, so no weights stand for it")
    }

    fn weighing(&self) -> Weighing {
        Weighing::None
    }

    fn needs_base(&self, _: bool) -> Option<&'static str> {
        self.no_weights()
    }

    /// The directories that lie beside `dir` are made absolute or relative to the working directory; others are left
    /// to mean the working directory.
    fn located(mut self, dir: &Path) -> Self {
        for (_, path) in &mut self.adapters {
            let beside = dir.join(&*path);
            if !path.is_empty() && beside.join(CONFIG).is_file() {
                *path = beside.display().to_string();
            }
        }
        self
    }

    fn members(&self) -> &[(String, String)] {
        &self.adapters
    }

    fn keeps(&self, layer: &LayerSize<'_>) -> Kept {
        // Each expert's `x·Aᵀ` and its output, before its share.
        Kept {
            row: self.count().max(1) * (layer.rank + layer.out),
            ..Kept::INPUT
        }
    }

    fn drops_inputs(&self) -> bool {
        false
    }
}

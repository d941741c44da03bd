//! Adapters folded into their base, one tensor at a time.

use std::path::PathBuf;

use burn::tensor::Device;
use enamel_adapter::files::infer_modules::kind_of;
use enamel_adapter::offline::{AdapterOnDisk, HostModule};
use enamel_adapter::{ModuleKind, ModuleShape};
use enamel_model::StoredNames;
use enamel_model::checkpoint::TensorSource;
use enamel_model::heads::HEAD;
use enamel_model::save::SaveDtype;
use enamel_model::{Loading, Model};

use super::{Choice, LOFTQ, MergeBase};
use crate::base::OpenBase;
use crate::error::TrainError;
use crate::inputs::loftq;

/// A base on disk and the adapters that are folded into it, one after the other: `W ← W + w·(fold(W) − W)`.
/// That is the weighted sum of what they add, but for methods that multiply what is there ((IA)³, DoRA); with
/// weights of 1 it is what they compute when they are in use together.
pub(crate) struct Merging<'a> {
    pub base: OpenBase,
    pub modules: Vec<ModuleShape>,
    /// Under which names the files have its weights.
    stored: StoredNames,
    pub adapters: Vec<(AdapterOnDisk, f64)>,
    /// How training had the base, where it had it quantised.
    pub trained: Option<Loading>,
    /// The element type that is written.
    pub dtype: SaveDtype,
    /// Whether a head that shared the embedding's weights needs its own from now on, for what is done to the
    /// embedding alone.
    pub(super) unties: bool,
    /// Whether the head is the adapters' alone: the base's files have none such.
    new_head: bool,
    pub device: &'a Device,
}

impl<'a> Merging<'a> {
    pub fn open(
        mut base: OpenBase,
        dirs: &[PathBuf],
        weights: Vec<f64>,
        dtype: SaveDtype,
        device: &'a Device,
    ) -> Result<Self, TrainError> {
        let (config, stored) = Model::fit(&base.config, &base.checkpoint)?;
        let modules = config.modules();
        let read = |module: &str| {
            let shape = modules.iter().find(|m| m.name == module)?;
            stored.read(&base.checkpoint, shape).ok()
        };
        let mut adapters = Vec::new();
        for (dir, weight) in dirs.iter().zip(weights) {
            adapters.push((AdapterOnDisk::read(dir, &modules, Some(&read))?, weight));
        }
        refuse_conflicts(&base, &modules, dirs, &adapters)?;
        let has_head = modules.iter().any(|m| m.kind == ModuleKind::Head);
        // A head follows single rows that are trained, and nothing else of what is done to the table.
        let parts = |name: &str| {
            adapters.iter().any(|(adapter, _)| {
                let plan = adapter.plan();
                let takes = plan.targets.iter().any(|t| t.name == name)
                    || plan.saved.iter().any(|s| s.name == name);
                takes && !plan.tied
            })
        };
        let mut tables = modules.iter().filter(|m| stored.is_tied_table(&m.name));
        let unties = !has_head && tables.any(|m| parts(&m.name));
        let new_head = base.config.head.is_new();
        // What merging makes has it.
        base.config = base.config.with_stored_head();
        Ok(Self {
            new_head,
            base,
            modules,
            stored,
            adapters,
            trained: None,
            dtype,
            unties,
            device,
        })
    }

    /// What the adapters belong to: the dequantised base if one of them began as LoftQ, else the dense one.
    pub fn belongs_to(&self) -> MergeBase {
        let mut configs = self.adapters.iter().map(|(adapter, _)| adapter.config());
        match configs.any(loftq::began_so) {
            true => MergeBase::Dequantized,
            false => MergeBase::Dense,
        }
    }

    /// What merging into the dequantised base is called, `asked` for or for LoftQ's sake, if it takes the format
    /// that the base had in training.
    pub fn needs_format(&self, asked: bool) -> Option<&'static str> {
        let stored = self.base.packed();
        match asked {
            // What the file itself has quantised is the same, dense and dequantised.
            true => stored.is_empty().then_some("--into dequantized"),
            // But GGUF's blocks can be quantised once more, and LoftQ is for what comes of it.
            false => (!stored.values().any(|stored| stored.bitsandbytes)).then_some(LOFTQ),
        }
    }

    pub fn touched(&self, module: &str) -> bool {
        self.adapters
            .iter()
            .any(|(adapter, _)| adapter.touches(module))
    }

    /// Whether a head that shared the embedding's weights has its own from now on.
    pub fn unties(&self) -> bool {
        self.unties || self.base.tied.is_some()
    }

    /// How many modules the adapters change.
    pub fn changed(&self) -> usize {
        let names = self.modules.iter().map(|m| &m.name);
        names.filter(|name| self.touched(name)).count()
    }

    /// Names and shapes of all tensors to write, in the model's order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors: Vec<_> = self.modules.iter().flat_map(ModuleShape::tensors).collect();
        if self.unties
            && let Some(table) = self.table()
        {
            tensors.push((format!("{HEAD}.weight"), table.shape.clone()));
        }
        tensors
    }

    pub fn table(&self) -> Option<&ModuleShape> {
        self.modules
            .iter()
            .find(|m| self.stored.is_tied_table(&m.name))
    }

    /// The values of one of [`Self::tensors`] as a choice has them.
    pub fn values(&self, tensor: &str, choice: Choice) -> Result<Vec<f32>, TrainError> {
        let (module, is_bias) = match (tensor.strip_suffix(".weight"), tensor.strip_suffix(".bias"))
        {
            (Some(module), _) => (module, false),
            (None, Some(module)) => (module, true),
            (None, None) => (tensor, false),
        };
        let shape = self.modules.iter().find(|m| m.name == module);
        let Some(shape) = shape else {
            return self.head();
        };
        let values = match (self.touched(module), is_bias) {
            (false, true) => return Ok(self.base.checkpoint.read_f32(tensor)?),
            (false, false) => Some(self.weight(shape, choice.base)?),
            (true, true) => self.folded(shape, choice.base)?.bias,
            (true, false) => Some(self.folded(shape, choice.base)?.weight),
        };
        let values = values.ok_or_else(|| {
            TrainError::Framework(format!("{tensor} is not in the merged module"))
        })?;
        let values = match &self.trained {
            Some(Loading { quantization, .. })
                if choice.requantized && !is_bias && shape.kind == ModuleKind::Linear =>
            {
                let dtype = self.dtype.kind();
                quantization.requantised(module, &shape.shape, values, dtype, self.device)?
            }
            _ => values,
        };
        match is_bias {
            true => Ok(values),
            false => Ok(shape.to_stored(values)),
        }
    }

    /// Whether a tensor of [`Self::tensors`] is the base's, not made by merging.
    pub fn is_in_base(&self, tensor: &str) -> bool {
        let module = tensor.rsplit_once('.').map_or(tensor, |(module, _)| module);
        self.modules.iter().any(|m| m.name == module)
    }

    /// The values of one of [`Self::tensors`] before any adapter.
    pub fn unfolded(&self, tensor: &str, base: MergeBase) -> Result<Vec<f32>, TrainError> {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        match self.modules.iter().find(|m| m.name == module) {
            Some(shape) => Ok(shape.to_stored(self.weight(shape, base)?)),
            None => Ok(self.base.checkpoint.read_f32(tensor)?),
        }
    }

    /// A module's weight before any adapter.
    fn weight(&self, shape: &ModuleShape, base: MergeBase) -> Result<Vec<f32>, TrainError> {
        let files = &self.base.checkpoint;
        if let (MergeBase::Dequantized, ModuleKind::Linear, Some(trained)) =
            (base, shape.kind, &self.trained)
            && let Some(values) =
                trained.dequantised(files, (&shape.name, shape.transposed), self.device)?
        {
            return Ok(values);
        }
        if self.new_head && shape.name == self.base.config.head_module() {
            // Whatever it began as, the adapter's copy stands for it.
            return Ok(vec![0.0; shape.shape.iter().product()]);
        }
        Ok(self.stored.read(files, shape)?)
    }

    fn read(&self, shape: &ModuleShape, base: MergeBase) -> Result<HostModule, TrainError> {
        let files = &self.base.checkpoint;
        let bias = || files.read_f32(&format!("{}.bias", shape.name));
        Ok(HostModule {
            weight: self.weight(shape, base)?,
            bias: shape.bias.then(bias).transpose()?,
        })
    }

    /// A module with all adapters in it.
    pub fn folded(&self, shape: &ModuleShape, base: MergeBase) -> Result<HostModule, TrainError> {
        let base = self.read(shape, base)?;
        let mut touching: Vec<_> = self
            .adapters
            .iter()
            .filter(|(adapter, _)| adapter.touches(&shape.name))
            .collect();
        // A copy trained whole stands for the base, whatever adapters are beside it.
        let whole =
            |adapter: &AdapterOnDisk| adapter.plan().saved.iter().any(|s| s.name == shape.name);
        touching.sort_by_key(|(adapter, _)| !whole(adapter));
        let mut merged: Option<HostModule> = None;
        for (adapter, weight) in touching {
            let onto = merged.as_ref().unwrap_or(&base);
            let mut next = adapter.folded(shape, &base, onto, self.device)?;
            towards(&mut next.weight, &onto.weight, *weight);
            if let (Some(next), Some(onto)) = (&mut next.bias, &onto.bias) {
                towards(next, onto, *weight);
            }
            merged = Some(next);
        }
        let merged = merged.unwrap_or(base);
        finite(&format!("{}.weight", shape.name), &merged.weight)?;
        if let Some(bias) = &merged.bias {
            finite(&format!("{}.bias", shape.name), bias)?;
        }
        Ok(merged)
    }

    /// The head that used to share the embedding's weights.
    pub fn head(&self) -> Result<Vec<f32>, TrainError> {
        let Some(table) = self.table() else {
            return Err(TrainError::Framework(
                "the model has no embedding".to_owned(),
            ));
        };
        let base = self.read(table, MergeBase::Dense)?;
        let mut head = base.clone();
        for (adapter, weight) in self.adapters.iter().filter(|(a, _)| a.touches(&table.name)) {
            let mut next = adapter.folded_head(table, &base, &head, self.device)?;
            towards(&mut next, &head.weight, *weight);
            head.weight = next;
        }
        finite(&format!("{HEAD}.weight"), &head.weight)?;
        Ok(head.weight)
    }
}

/// What cannot be merged, all of it, before anything is written.
fn refuse_conflicts(
    base: &OpenBase,
    modules: &[ModuleShape],
    dirs: &[PathBuf],
    adapters: &[(AdapterOnDisk, f64)],
) -> Result<(), TrainError> {
    for (dir, (adapter, _)) in dirs.iter().zip(adapters) {
        let has_bias = |name: &str| modules.iter().any(|m| m.name == name && m.bias);
        let mut without: Vec<&str> = adapter
            .own_biases()
            .into_iter()
            .filter(|name| !has_bias(name))
            .map(kind_of)
            .collect();
        without.sort_unstable();
        without.dedup();
        if !without.is_empty() {
            return Err(TrainError::Run {
                path: dir.clone(),
                reason: format!(
                    "the adapter has biases of its own (lora_bias) for {}, and config.json of {} has no place for a \
                     bias there, so a merged model would lose them",
                    without.join(", "),
                    base.local.path.display()
                ),
                help: "use the adapter beside its base, or train it without lora_bias".to_owned(),
            });
        }
    }
    let mut problems = Vec::new();
    for module in modules {
        let whole = |adapter: &AdapterOnDisk| {
            adapter.trains_everything()
                || adapter.plan().saved.iter().any(|s| s.name == module.name)
        };
        let twice: Vec<String> = dirs
            .iter()
            .zip(adapters)
            .filter(|(_, (adapter, _))| whole(adapter))
            .map(|(dir, _)| dir.display().to_string())
            .collect();
        if twice.len() > 1 {
            problems.push(format!(
                "{} is trained whole by {}",
                module.name,
                twice.join(" and by ")
            ));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    problems.truncate(8);
    Err(TrainError::Mismatch(format!(
        "these adapters cannot be added up: {}\n  help: merge one of them alone, or leave one out",
        problems.join("; ")
    )))
}

/// `values` become `from + weight·(values − from)`.
fn towards(values: &mut [f32], from: &[f32], weight: f64) {
    if weight == 1.0 {
        return;
    }
    for (value, from) in values.iter_mut().zip(from) {
        let from = f64::from(*from);
        *value = (from + weight * (f64::from(*value) - from)) as f32;
    }
}

fn finite(tensor: &str, values: &[f32]) -> Result<(), TrainError> {
    if values.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(TrainError::Mismatch(format!(
        "{tensor}, merged, holds a value that is not finite; nothing was written\n  help: look at the adapters \
         with `enamel adapter inspect`, or choose smaller --weights"
    )))
}

//! The estimate of a recipe's run, and whether there is room for it.

use std::fmt;

use burn::tensor::Device;
use enamel_adapter::{AdapterConfig, AdapterPlan, MethodConfig};
use enamel_model::{ArchConfig, Quantization};

use super::{
    ERROR, Footprint, Kind, ModelSizes, Proposal, Room, Settings, Weights, estimate, fit, room,
};
use crate::base::Packed;
use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::recipe::{CheckMemory, Recipe};
use crate::task::Task;
use crate::text::bytes_text;
use enamel_data::Row;
use enamel_kernels::Compute;

/// A recipe's memory and the device's.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// The model and the adapter.
    pub model: ModelSizes,
    /// The settings.
    pub settings: Settings,
    /// Bytes by part.
    pub footprint: Footprint,
    /// The device's name, or what was asked for if it is not there.
    pub device: String,
    /// What there is; none where the device does not tell or is not there.
    pub room: Option<Room>,
}

impl Estimate {
    /// Of a run whose inputs are open: its longest row counts.
    pub fn of_inputs<T: Task>(recipe: &Recipe, inputs: &Inputs<T>) -> Self {
        let kind = Kind::of(&inputs.device);
        let rows = &inputs.train.rows;
        let longest = rows.iter().map(T::Row::tokens).max();
        let mut settings = of_recipe(recipe, kind);
        settings.length = longest.unwrap_or(settings.length);
        settings.batch = settings.batch.min(rows.len().max(1));
        settings.weights = match weight_bytes(inputs) {
            2 => Weights::Bf16,
            _ => Weights::F32,
        };
        settings.quantization = inputs.quantization.clone();
        let mut model = ModelSizes::new(&inputs.base.config, &inputs.adapter, &inputs.plan);
        model.packed = inputs.base.packed();
        Self::new(model, settings, inputs.device_name.clone())
    }

    /// Of a model of which only the configuration is there: rows are as long as `max_length`. `bf16` says
    /// whether its file has matrices in bf16, `packed` which it has quantised; `device` is none where the recipe's is not there.
    pub fn of_config(
        recipe: &Recipe,
        (config, adapter, plan): (&ArchConfig, &AdapterConfig, &AdapterPlan),
        (bf16, packed): (bool, Packed),
        device: Option<(&Device, String)>,
    ) -> Self {
        let (kind, name) = match device {
            Some((device, name)) => (Kind::of(device), name),
            None => (Kind::Gpu, recipe.device.clone()),
        };
        let mut settings = of_recipe(recipe, kind);
        let wanted = bf16
            || enamel_kernels::Compute::from(recipe.model.compute_dtype)
                != enamel_kernels::Compute::F32;
        if wanted && kind == Kind::Kernels {
            settings.weights = Weights::Bf16;
        }
        let mut model = ModelSizes::new(config, adapter, plan);
        model.packed = packed;
        Self::new(model, settings, name)
    }

    fn new(model: ModelSizes, settings: Settings, device: String) -> Self {
        Self {
            footprint: estimate(&model, &settings),
            room: room(settings.kind, &device),
            model,
            settings,
            device,
        }
    }

    /// Settings that fit `bytes`.
    pub fn fit(&self, bytes: usize) -> Proposal {
        fit(&self.model, &self.settings, bytes)
    }

    /// Whether there is room; none where the room is not known.
    pub fn fits(&self) -> Option<bool> {
        let room = self.room.as_ref()?;
        Some(self.footprint.peak() <= room.bytes)
    }

    /// Refuses, or says, what will not fit. An estimate that is over by no more than its error is said.
    ///
    /// # Errors
    /// The table, and what to change.
    pub fn check(&self, policy: CheckMemory, say: &dyn Fn(&str)) -> Result<(), TrainError> {
        let Some(room) = self.room.as_ref().filter(|_| self.fits() == Some(false)) else {
            return Ok(());
        };
        let least = self.footprint.peak() as f64 / (1.0 + ERROR);
        if policy == CheckMemory::Error && least > room.bytes as f64 {
            return Err(TrainError::Memory(format!(
                "this run would not fit into memory\n{self}\n{}",
                self.advice(
                    room.bytes,
                    "or try it all the same with train.check_memory = \"warn\""
                )
            )));
        }
        say(&format!(
            "memory   {} estimated, {} there ({}): it may not be enough",
            bytes_text(self.footprint.peak()),
            bytes_text(room.bytes),
            room.source
        ));
        Ok(())
    }

    /// What to say when memory runs out all the same; `otherwise` is a last line.
    pub fn out_of_memory(&self, otherwise: &str) -> String {
        // It was not enough, whatever was estimated.
        let less = self.footprint.peak() / 4 * 3;
        let room = self.room.as_ref().map_or(less, |room| room.bytes.min(less));
        format!("out of memory\n{self}\n{}", self.advice(room, otherwise))
    }

    fn advice(&self, bytes: usize, otherwise: &str) -> String {
        let proposal = self.fit(bytes);
        let lines = proposal.to_string().replace('\n', "\n    ");
        let head = match (proposal.changes.is_empty(), proposal.fits()) {
            (true, _) => {
                return format!("  help: no setting takes less; use a smaller model, {otherwise}");
            }
            (false, true) => "these settings take",
            (false, false) => "no settings are enough; the least are these, with",
        };
        format!(
            "  help: {head} {}:\n    {lines}\n  {otherwise}",
            bytes_text(proposal.footprint.peak())
        )
    }
}

/// What a recipe says, before its data are known.
fn of_recipe(recipe: &Recipe, kind: Kind) -> Settings {
    let train = &recipe.train;
    Settings {
        batch: train.batch_size,
        accumulation: train.gradient_accumulation_steps,
        length: recipe.data.max_length,
        every: train.gradient_checkpointing.0,
        optim: train.optim,
        weights: Weights::F32,
        quantization: Quantization::from(&recipe.model.quantization),
        threads: rayon::current_num_threads(),
        kind,
    }
}

impl fmt::Display for Estimate {
    /// The table, line by line behind a margin, and whether it fits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings {
            batch,
            length,
            accumulation,
            ..
        } = &self.settings;
        write!(
            f,
            "memory     at most {batch} × {length} tokens a forward pass"
        )?;
        if *accumulation > 1 {
            write!(f, ", {accumulation} of them a step")?;
        }
        if self.settings.kind != Kind::Kernels {
            write!(f, "; for this device a rough count")?;
        }
        for line in self.footprint.to_string().lines() {
            write!(f, "\n           {line}")?;
        }
        let Some(room) = &self.room else {
            return Ok(());
        };
        let verdict = match self.fits() {
            Some(true) => "fits",
            _ => "does not fit",
        };
        write!(
            f,
            "\n           {verdict} {}: {} ({})",
            self.device,
            bytes_text(room.bytes),
            room.source
        )
    }
}

/// Bytes that one weight of the base takes: two where matrices are held in bf16.
pub(crate) fn weight_bytes<T: Task>(inputs: &Inputs<T>) -> usize {
    let bf16 = inputs.compute == Compute::Bf16 || inputs.base.checkpoint.is_bf16();
    // A trained base is f32, whatever it was loaded in.
    let frozen = !inputs.adapter.trains_everything();
    match bf16 && frozen && enamel_kernels::holds_bf16(&inputs.device) {
        true => 2,
        false => size_of::<f32>(),
    }
}

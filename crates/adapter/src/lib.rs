//! Adapters (LoRA and its relatives) for linear layers of any Burn model, in PEFT's file format.
//!
//! A model shows its layers by name through [`Adaptable`], built from [`Linear`] and [`Frozen`]. Then
//! [`plan`](plan()) says what a configuration would do to it, [`attach`](attach()) does it,
//! [`load_pretrained`] and [`save_pretrained`] read and write PEFT's directory, and [`merge`](merge())
//! folds the adapter into the base. After attaching, `model.train()` (Burn's) makes the adapter's
//! parameters, and nothing else, receive gradients.

pub mod attach;
pub mod config;
pub mod error;
pub mod frozen;
pub mod linear;
pub mod merge;
pub mod methods;
pub mod model_card;
pub mod peft_dir;
pub mod plan;
pub mod slot;
pub mod target;
pub mod trainable;

#[cfg(test)]
mod testing;

pub use attach::{attach, detach, set_enabled, shapes};
pub use config::{InitLora, LoraConfig, Purpose, Targets};
pub use error::AdapterError;
pub use frozen::Frozen;
pub use linear::{Linear, SavedLinear};
pub use merge::{merge, merged_weight};
pub use methods::{Adapter, ParamMut, ParamRef};
pub use model_card::SaveMeta;
pub use peft_dir::{LoadedAdapter, load_config, load_pretrained, save_pretrained};
pub use plan::{AdapterPlan, SavedPlan, TargetPlan, plan, plan_for_load};
pub use slot::{Adaptable, ModuleKind, ModuleShape, Slot, SlotRef};
pub use trainable::{
    HostTensor, export_gradients, export_trainable, for_each_trainable, for_each_trainable_mut,
    import_trainable, trainable,
};

//! Adapters (LoRA and its relatives) for linear layers and embeddings of any Burn model, in PEFT's file
//! format.
//!
//! A model shows its layers by name through [`Adaptable`], built from [`Linear`], [`Embedding`] and
//! [`Frozen`]. Then [`plan`](plan()) says what a configuration would do to it, [`attach`](attach()) does
//! it, [`load_pretrained`] and [`save_pretrained`] read and write PEFT's directory, and
//! [`merge`](merge()) folds the adapter into the base. After attaching, `model.train()` (Burn's) makes the
//! adapter's parameters, and nothing else, receive gradients.
//!
//! A model carries any number of adapters, each under a name ([`attach_as`], [`load_pretrained_as`]);
//! [`set_active`] and [`set_rows`] choose among them.

pub mod allocator;
pub mod attach;
pub mod base_param;
pub mod choose;
pub mod combine;
pub mod config;
pub mod embedding;
pub mod error;
pub mod eva;
mod exact_json;
pub mod facts;
mod foreign;
pub mod frozen;
pub mod host;
pub mod infer;
pub mod linalg;
pub mod linear;
pub mod loftq;
pub mod merge;
mod mersenne;
pub mod methods;
pub mod model_card;
pub mod peft_dir;
pub mod plan;
mod random;
pub mod routing;
pub mod slot;
pub mod staging;
pub mod store;
pub mod target;
pub mod trainable;
pub mod xlora;

#[cfg(test)]
mod contracts;
#[cfg(test)]
mod testing;

pub use allocator::RankAllocator;
pub use attach::{attach, attach_as, attach_given, detach, set_enabled, shapes};
pub use base_param::BaseParam;
pub use choose::{adapters, delete, routing, set_active, set_rows};
pub use config::{Bias, InitLora, Loftq, LoraConfig, Purpose, Targets, TokenIndices};
pub use embedding::Embedding;
pub use error::AdapterError;
pub use eva::EvaStart;
pub use exact_json::exact_json;
pub use frozen::Frozen;
pub use linear::{Base, Linear, SavedLinear};
pub use loftq::LoftqStart;
pub use merge::{merge, merge_adapters, merged_weight, unmerge};
pub use methods::adalora::AdaLoraConfig;
pub use methods::full::FullConfig;
pub use methods::ia3::Ia3Config;
pub use methods::loha::LohaConfig;
pub use methods::lokr::{InitLokr, LokrConfig};
pub use methods::vera::VeraConfig;
pub use methods::{Adapter, AdapterConfig, GivenFactors, MethodConfig, ParamMut, ParamRef};
pub use model_card::{SaveMeta, as_markdown_text};
pub use peft_dir::{
    LoadedAdapter, SaveForm, hotswap, load_pretrained, load_pretrained_as, save_pretrained,
    save_pretrained_as,
};
pub use plan::{AdapterPlan, SavedPlan, TargetPlan, plan, plan_for_load, takes_head};
pub use routing::{DEFAULT, Routing};
pub use slot::{Adaptable, ModuleKind, ModuleShape, Slot, SlotRef};
pub use store::{AdapterFile, base_identity, check_name, load_config, notes};
pub use trainable::{
    HostTensor, export_gradients, export_params_of, export_trainable, for_each_param_of,
    for_each_param_of_mut, for_each_trainable, for_each_trainable_mut, import_trainable, trainable,
};
pub use xlora::{Gates, XLora, XLoraConfig};

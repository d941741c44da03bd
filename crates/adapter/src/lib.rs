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

pub mod base;
pub mod combine;
pub mod config;
pub mod error;
pub mod files;
pub mod init;
pub mod layers;
pub mod linalg;
pub mod methods;
pub mod model;
pub mod offline;
pub mod plan;
pub mod staging;

#[cfg(test)]
mod contracts;
#[cfg(test)]
mod testing;

pub use crate::base::Base;
pub use crate::base::base_param::BaseParam;
pub use crate::base::module_shape::ModuleKind;
pub use crate::base::module_shape::ModuleShape;
pub use crate::base::routing::Gates;
pub use crate::base::routing::check_name;
pub use crate::base::routing::{DEFAULT, Routing};
pub use crate::files::exact_json::exact_json;
pub use crate::files::model_card::as_markdown_text;
pub use crate::files::store::{AdapterFile, base_identity, load_config, made, notes};
pub use crate::files::{
    SaveForm, hotswap, load_pretrained, load_pretrained_as, save_pretrained, save_pretrained_as,
};
pub use crate::init::eva::EvaStart;
pub use crate::init::loftq::LoftqStart;
pub use crate::layers::adaptable::{Adaptable, ModelPart, Slot, SlotRef, UseOfPart};
pub use crate::layers::embedding::Embedding;
pub use crate::layers::frozen::Frozen;
pub use crate::layers::linear::{Linear, SavedLinear};
pub use crate::layers::slots::Slots;
pub use crate::methods::adalora::allocator::{RankAllocator, regularization};
pub use crate::methods::xlora::{XLora, XLoraConfig};
pub use crate::model::active::{adapters, delete, routing, set_active, set_rows};
pub use crate::model::attach::{attach, attach_as, attach_given, detach, set_enabled, shapes};
pub use crate::model::merge::{merge, merge_adapters, merged_weight, unmerge};
pub use crate::model::plan::{plan, plan_for_load, takes_head};
pub use crate::model::trainable::{
    HostTensor, export_gradients, export_params_of, export_trainable, for_each_param_of,
    for_each_param_of_mut, for_each_trainable, for_each_trainable_mut, import_trainable, trainable,
};
pub use crate::plan::AdapterPlan;
pub use crate::plan::SavedPlan;
pub use crate::plan::TargetPlan;
pub use crate::plan::target::Tie;
pub use config::{Bias, Made, Purpose, SaveMeta, Targets, TokenIndices};
pub use error::AdapterError;
pub use methods::adalora::AdaLoraConfig;
pub use methods::full::FullConfig;
pub use methods::ia3::Ia3Config;
pub use methods::loha::LohaConfig;
pub use methods::lokr::{InitLokr, LokrConfig};
pub use methods::lora::config::{InitLora, Loftq, LoraConfig};
pub use methods::miss::{InitMiss, MissConfig};
pub use methods::vera::VeraConfig;
pub use methods::{
    Adapter, AdapterConfig, InitFactors, LoadedAdapter, MethodConfig, ParamMut, ParamRef,
};

/// The README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

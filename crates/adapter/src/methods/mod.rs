//! The adapter methods: one file each, one line each in the lists at the end of this one.
//!
//! A method's file holds its parameters with [`Method`] (what they compute, what they make of the weight
//! when they are folded in, what they are called in PEFT's file) and its configuration with
//! [`MethodConfig`] (which modules, how many parameters, how they start). Matching, counting, attaching,
//! merging, storing and the directory format ask for nothing else.

#[macro_use]
mod lists;

pub mod adalora;
mod dropout;
pub mod facts;
pub mod full;
pub mod ia3;
pub mod loha;
pub mod lokr;
pub mod lora;
mod method;
pub mod miss;
mod params;
pub mod tokens;
pub mod vera;
pub mod xlora;

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_kernels::LowRank;
use serde_json::Value;

use facts::MethodFacts;

pub(crate) use dropout::{at_work, drawn, dropping};
pub(crate) use method::adapter_param_id;
pub use method::{
    InitContext, InitFactors, InitFactorsFor, LoadedAdapter, Method, MethodConfig, Parameters,
    Placement,
};
pub use params::{ParamMut, ParamRef};

use crate::base::Base;
use crate::config::{Targets, object_of};
use crate::error::{AdapterError, Result};

methods! {
    Lora(lora::Lora),
    Loha(loha::Loha),
    Lokr(lokr::Lokr),
    AdaLora(adalora::AdaLora),
    Vera(vera::Vera),
    Ia3(ia3::Ia3),
    Miss(miss::Miss),
}

configs! { $
    Lora(lora::config::LoraConfig),
    Loha(loha::LohaConfig),
    Lokr(lokr::LokrConfig),
    AdaLora(adalora::AdaLoraConfig),
    Vera(vera::VeraConfig),
    Ia3(ia3::Ia3Config),
    Miss(miss::MissConfig),
    Full(full::FullConfig) whole,
    XLora(xlora::XLoraConfig) untargeted,
}

// Behind the lists, whose macro it uses.
mod any;

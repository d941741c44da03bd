//! Numbers against PEFT, transformers and TRL.

pub(crate) mod bf16;
pub(crate) mod bitsandbytes;
pub(crate) mod classification;
pub(crate) mod counts;
pub(crate) mod families;
pub(crate) mod generate;
pub(crate) mod inits;
pub(crate) mod llama;
pub(crate) mod lora;
pub(crate) mod matching;
pub(crate) mod methods;
pub(crate) mod optim;
pub(crate) mod schedules;
pub(crate) mod text;
pub(crate) mod trainer;

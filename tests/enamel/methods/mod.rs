//! Adapter methods against PEFT, from the first values to the merged model.

pub(crate) mod adalora;
pub(crate) mod combine;
pub(crate) mod eva;
pub(crate) mod foreign;
pub(crate) mod loftq;
pub(crate) mod peft_files;
pub(crate) mod tied;
pub(crate) mod xlora;

//! The verbs, as somebody calls them.

pub(crate) mod adapter;
pub(crate) mod adapter_refusals;
pub(crate) mod adapters_in_use;
pub(crate) mod classification;
pub(crate) mod export;
pub(crate) mod families;
pub(crate) mod merge;
pub(crate) mod merge_quantised;
pub(crate) mod methods;
pub(crate) mod outputs;
pub(crate) mod pull;
pub(crate) mod quantize;
pub(crate) mod rows;
pub(crate) mod terminal;
pub(crate) mod train;

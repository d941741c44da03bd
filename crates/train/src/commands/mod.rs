//! The verbs, but for `train`, which is [`run`](crate::run): one file or folder each.

pub mod adapters;
pub mod bench;
pub mod chat;
pub mod compare;
pub mod eval;
pub mod export;
pub mod inspect;
pub mod merge;
pub(crate) mod outputs;
pub mod plan;
pub mod predict;
pub mod quantize;
pub mod score;

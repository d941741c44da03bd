//! Adapters (LoRA and its relatives) for linear layers of any Burn model, in PEFT's file format.

pub mod frozen;
pub mod linear;
pub mod slot;

pub use frozen::Frozen;
pub use linear::Linear;
pub use slot::{Adaptable, ModuleKind, ModuleShape, Slot, SlotRef};

//! The loop: rows into steps, steps into gradients, gradients into parameters, and what is measured on the way.

pub mod collective;
pub mod data_loader;
pub mod grad_clipping;
pub(crate) mod lora_plus;
pub mod lr_schedule;
pub mod metrics;
pub mod metrics_log;
pub(crate) mod renderer;
pub mod train_step;
pub mod training_loop;

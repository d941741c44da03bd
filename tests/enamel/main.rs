//! Tests across crates: parity with the reference stack, file formats, end to end.
//!
//! Goldens come from `tests/fixtures/make_fixtures.py`; its README gives the tolerances' reasons.

mod adalora;
mod adapted;
mod bf16;
mod checkpoint_errors;
mod cli_adapter;
mod cli_adapter_refusals;
mod cli_checkpoints;
#[cfg(unix)]
mod cli_disk_full;
mod cli_export;
mod cli_merge;
mod cli_merge_quantised;
mod cli_methods;
mod cli_outputs;
mod cli_pull;
mod cli_rows;
mod cli_run_directory;
#[cfg(unix)]
mod cli_signals;
mod cli_terminal;
mod cli_train;
mod cli_use;
mod combine;
mod counts;
mod curves;
mod devices;
mod enamel_process;
mod eva;
mod foreign;
mod generate;
mod gguf;
mod goldens;
mod gradient_checkpointing;
mod inits;
mod loftq;
mod matching;
mod memory;
mod optim;
mod parity_bitsandbytes;
mod parity_llama;
mod parity_lora;
mod parity_methods;
mod parity_trainer;
mod peft_files;
#[cfg(unix)]
mod pseudo_terminal;
mod quantised;
mod quantize;
mod repositories;
mod schedules;
mod security_page;
mod several;
mod smollm2;
mod text;
mod tied;
mod xlora;

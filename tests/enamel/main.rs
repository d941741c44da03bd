//! Tests across crates: parity with the reference stack, file formats, end to end.
//!
//! Goldens come from `tests/fixtures/make_fixtures.py`; its README gives the tolerances' reasons.

mod checkpoint_errors;
mod cli_train;
mod cli_use;
mod counts;
mod devices;
mod enamel_process;
mod generate;
mod gguf;
mod goldens;
mod matching;
mod parity_llama;
mod parity_lora;
mod parity_trainer;
mod peft_files;
mod schedules;
mod smollm2;
mod text;

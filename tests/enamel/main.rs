//! Tests across crates: parity with the reference stack, file formats, end to end.
//!
//! Goldens come from `tests/fixtures/make_fixtures.py`; its README gives the tolerances' reasons.

mod cli;
mod docs;
mod method_names;
mod methods;
mod models;
mod names;
mod parity;
mod rooms;
mod runs;
mod security_page;
mod support;

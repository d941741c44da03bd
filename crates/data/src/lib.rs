//! Data for fine-tuning: tokenizer, chat templates, record formats, loss masks and batches.
//!
//! From files to batches in four steps: [`Tokenizer::from_parts`] reads a model's tokenizer and chat
//! template, [`load_examples`] reads rows and decides for every token whether it is trained,
//! [`epoch_order`] orders them, and [`collate`] pads some of them into a [`Batch`]. Everything stays
//! in host memory as plain vectors; this crate knows no tensor library.

// Bytes of others are read here: no index, cut or sum that could panic.
#![cfg_attr(
    not(test),
    deny(
        clippy::string_slice,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod batch;
mod chat_template;
mod error;
mod examples;
mod files;
mod inspect;
mod jinja;
mod masks;
mod message;
mod records;
#[cfg(test)]
mod testing;
mod token_stream;
mod tokenizer;

pub use batch::{Batch, collate, epoch_order, group_by_length, split_rows};
pub use chat_template::{ChatTemplate, RenderOptions, TemplateError, render};
pub use error::{BAD_ROWS_SHOWN, BadReason, BadRow, DataError, RowRef};
pub use examples::{
    ClassLabel, ClassSpec, Classes, ClassifiedText, DataFile, DataSpec, Example, Examples,
    LabelledText, Note, OnBadRow, Row, Rows, Truncation, load_examples, load_labelled,
};
pub use inspect::spans;
pub use masks::{IGNORED, TrainOn};
pub use message::Message;
pub use records::{RecordFormat, Remark, check_arguments};
pub use token_stream::TokenStream;
pub use tokenizer::{Encoded, Tokenizer, TokenizerFiles};

/// The README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

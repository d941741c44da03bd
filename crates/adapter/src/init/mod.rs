//! What an adapter starts from where that is more than a draw of numbers, and the draws.

pub mod eva;
pub mod loftq;

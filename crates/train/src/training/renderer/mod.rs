//! What a person sees while it trains: burn-train's dashboard on a terminal, lines elsewhere.

mod dashboard;
mod lines;

pub use dashboard::Dashboard;
pub use lines::Lines;

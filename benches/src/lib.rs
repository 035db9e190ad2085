//! What the benchmarks share: every figure is taken beside the least that the same work could cost.
//!
//! Criterion runs both sides and gives its own statistics of each. The ratio comes from rounds that alternate between the
//! sides, because a neighbour that takes the processor for a second would otherwise spoil one side only.

mod machine;
mod pair;

pub use machine::describe_machine;
pub use pair::{Pair, Unit, nanos};

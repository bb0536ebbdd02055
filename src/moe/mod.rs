//! Mixture of experts: router, expert store, policies, planner.

pub mod policy;
mod reader;
mod router;
mod store;

pub use reader::{Reader, Source};
pub use router::{Gating, Pick, Router};
pub use store::{ExpertStore, Fetch, FetchError, LayerParts, Part, Ready, StoreLayout, StoreStats};

//! Mixture of experts: router, expert store, policies, planner.

pub mod heat;
pub mod planner;
pub mod policy;
mod reader;
pub mod recorder;
pub mod replay;
mod router;
mod store;
pub mod trace;

pub use reader::{Reader, Source};
pub use router::{Gating, Pick, Router};
pub use store::{ExpertStore, Fetch, FetchError, LayerParts, Part, Ready, StoreLayout, StoreStats};

//! Mixture of experts: router, expert store, policies, planner.

mod lookahead;
pub mod policy;
mod router;
mod source;
mod store;

pub use router::{Gating, Pick, Router};
pub use source::{DiskSource, IoMode, Source};
pub use store::{
    ExpertStore, Fetch, FetchError, LayerParts, Part, Ready, StoreLayout, StoreOptions, StoreStats, room_for,
};

//! Mixture of experts: router, expert store, policies, planner.

pub mod heat;
mod lookahead;
mod lossy;
pub mod planner;
pub mod policy;
pub mod recorder;
pub mod replay;
mod router;
mod source;
mod store;
pub mod trace;

pub use lossy::{Losses, Lossy};
pub use router::{Gating, Pick, Router};
pub use source::{DiskSource, IoMode, Source};
pub use store::{
    ExpertStore, Fetch, FetchError, LayerParts, Part, Ready, StoreLayout, StoreOptions, StoreStats, room_for,
};

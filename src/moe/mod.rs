//! Mixture of experts: router, expert store, policies, planner.

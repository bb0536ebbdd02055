//! Families of models: configuration, weights and forward pass of each.

//! Number formats of weights in a file.

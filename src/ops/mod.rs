//! Operations over slices, on the CPU.

//! The expert store as the engine has it, on loom's locks and threads: `tests/store.rs` runs it through the orders in which its
//! threads can meet. What the store uses of other rooms and what isn't about threads stands in here, as small as it can be.

#![allow(unsafe_code)] // in the files of the engine that are included

pub mod cpu;
pub mod moe;

/// What the store uses of the operations: weights are packed as they are.
pub mod ops {
    /// Matrices.
    pub mod matmul {
        use crate::{cpu::Isa, quant::Format};

        /// Rows of a group.
        pub const MAX_LANES: usize = 16;

        /// A matrix.
        #[derive(Clone, Copy)]
        pub struct Packed<'a>(pub &'a [u8]);

        impl<'a> Packed<'a> {
            /// Its bytes.
            pub fn new(_: &Format, _: Isa, _: usize, _: usize, data: &'a [u8]) -> Self {
                Packed(data)
            }
        }

        /// Copies them. Half of them are there when another thread has its turn.
        pub fn pack(_: &Format, _: Isa, _: usize, _: usize, rows: &[u8], packed: &mut [u8]) {
            let half = rows.len() / 2;
            packed[..half].copy_from_slice(&rows[..half]);
            loom::thread::yield_now();
            packed[half..].copy_from_slice(&rows[half..]);
        }
    }
}

/// What the store uses of the formats.
pub mod quant {
    /// A number format.
    #[derive(Debug)]
    pub struct Format;
}

//! Plain Rust compiled for an instruction set: loops that the compiler vectorises well enough, with [`Lanes`] for what it doesn't.

use super::lanes::{self, Lanes};
use crate::cpu::Isa;

/// Something to do with the instructions of one set.
pub(super) trait Task {
    /// What comes of it.
    type Out;
    /// Must be `#[inline(always)]`.
    fn run<L: Lanes>(self, lanes: L) -> Self::Out;
}

/// Runs a task with the instructions of `isa`.
pub(super) fn run_on<T: Task>(isa: Isa, task: T) -> T::Out {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<T: Task>(task: T) -> T::Out {
            // SAFETY: the function has the features.
            task.run(unsafe { lanes::Avx2::new() })
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
        fn avx512<T: Task>(task: T) -> T::Out {
            // SAFETY: as above.
            task.run(unsafe { lanes::Avx512::new() })
        }
        assert!(isa.is_available());
        match isa {
            // SAFETY: the processor has the instruction set.
            Isa::Avx512Vnni | Isa::Avx512Amx => return unsafe { avx512(task) },
            // SAFETY: as above.
            Isa::Avx2 | Isa::AvxVnni => return unsafe { avx2(task) },
            _ => {}
        }
    }
    #[cfg(target_arch = "aarch64")]
    if isa != Isa::Scalar {
        return task.run(lanes::Neon);
    }
    let _ = isa;
    task.run(lanes::Plain)
}

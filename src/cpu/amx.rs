//! AMX: whether the processor has its tiles and the kernel lets this process use them.

#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Whether this process can multiply bytes in tiles (AMX-TILE and AMX-INT8). Asks the kernel for permission, once, for all threads
/// that are there or come. No other system than Linux is asked.
pub(super) fn is_available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| processor_has_it() && kernel_permits())
}

/// The instructions, a kernel that saves the tiles, and tiles of the size that the kernels are written for.
#[cfg(target_os = "linux")]
fn processor_has_it() -> bool {
    use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    #[target_feature(enable = "xsave")]
    fn saved_states() -> u64 {
        // SAFETY: the processor has the instruction, and the kernel allows it: the caller has asked for OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    const OSXSAVE: u32 = 1 << 27;
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    const TILE_STATES: u64 = 1 << 17 | 1 << 18;

    if __cpuid(0).eax < 0x1d
        || __cpuid(1).ecx & OSXSAVE == 0
        || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8
    {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction is there.
    if unsafe { saved_states() } & TILE_STATES != TILE_STATES {
        return false;
    }
    // Palette 1: eight tiles of up to 16 rows of 64 bytes.
    let palette = __cpuid_count(0x1d, 1);
    __cpuid_count(0x1d, 0).eax >= 1 && palette.ebx == 8 << 16 | 64 && palette.ecx & 0xffff == 16
}

/// Linux hands out the tiles' 8 KiB a thread only to processes that have asked. A kernel that knows no AMX (before 5.16) says no.
#[cfg(target_os = "linux")]
fn kernel_permits() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that takes two numbers, and grants a permission or does nothing.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn processor_has_it() -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn kernel_permits() -> bool {
    false
}

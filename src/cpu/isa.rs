//! Instruction sets: what the processor has, and which one the kernels use.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: what every processor has. Slow; the kernels' shape without their instructions.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// The same with AVX-VNNI: four byte products a lane in one instruction.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL and VNNI: 16 lanes, four byte products a lane in one instruction.
    Avx512Vnni,
    /// The same with AMX for 8-bit integers, on Linux: 16 rows times 16 tokens in one instruction.
    Avx512Amx,
    /// arm64's base: 4 lanes.
    Neon,
    /// arm64 with dotprod: 4 lanes, four byte products a lane in one instruction.
    NeonDot,
    /// The same with i8mm: 2 rows times 2 tokens, eight bytes each, in one instruction.
    NeonI8mm,
}

/// `ONCALL_ISA` asks for what isn't there.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error("ONCALL_ISA={0}: no such instruction set; this machine has {list}", list = names(&Isa::available()))]
    Unknown(String),
    /// A name that this processor lacks.
    #[error("ONCALL_ISA={0}: this processor doesn't have it; it has {list}", list = names(&Isa::available()))]
    Unavailable(Isa),
}

impl Isa {
    /// All of them, the slowest first.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512Vnni,
        Self::Avx512Amx,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
    ];

    /// The instruction set of this process: the fastest that the processor has, or the one that the
    /// environment variable `ONCALL_ISA` names. Decided once.
    ///
    /// # Errors
    /// `ONCALL_ISA` names an instruction set that doesn't exist or that the processor lacks.
    pub fn get() -> Result<Self, IsaError> {
        static ISA: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        ISA.get_or_init(|| match std::env::var_os("ONCALL_ISA") {
            Some(name) if !name.is_empty() => Self::parse(&name.to_string_lossy()),
            _ => Ok(Self::best()),
        })
        .clone()
    }

    /// The fastest that the processor has.
    pub fn best() -> Self {
        Self::available()[Self::available().len() - 1]
    }

    /// Those that the processor has, the slowest first; never empty.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|i| i.is_available()).collect()
    }

    /// Whether the processor has it, and the kernel where that counts: AMX takes the kernel's permission, which is asked for here.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => Self::Avx512Vnni.is_available() && super::amx::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => Self::NeonDot.is_available() && std::arch::is_aarch64_feature_detected!("i8mm"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The name that `ONCALL_ISA` knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Amx => "avx512amx",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::NeonI8mm => "neoni8mm",
        }
    }

    fn parse(name: &str) -> Result<Self, IsaError> {
        let isa = Self::ALL
            .into_iter()
            .find(|i| i.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| IsaError::Unknown(name.to_owned()))?;
        if isa.is_available() { Ok(isa) } else { Err(IsaError::Unavailable(isa)) }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn names(isas: &[Isa]) -> String {
    isas.iter().map(|i| i.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_or_refused_with_the_reason() {
        for isa in Isa::ALL {
            match Isa::parse(isa.name()) {
                Ok(found) => assert_eq!(found, isa),
                Err(IsaError::Unavailable(lacking)) => {
                    assert_eq!(lacking, isa);
                    assert!(!isa.is_available());
                }
                Err(e) => panic!("{e}"),
            }
        }
        let error = Isa::parse("mmx").unwrap_err().to_string();
        assert!(error.contains("mmx") && error.contains("scalar"), "{error}");
    }

    /// A runner that must cover an instruction set says so: `ONCALL_TEST_ISAS=avx2,avx512vnni`.
    /// Without it, kernels that the processor can't run would go untested in silence.
    #[test]
    fn the_runner_has_the_instruction_sets_that_it_promises() {
        let promised = std::env::var("ONCALL_TEST_ISAS").unwrap_or_default();
        for name in promised.split(',').filter(|n| !n.is_empty()) {
            Isa::parse(name).expect("promised by ONCALL_TEST_ISAS");
        }
    }
}

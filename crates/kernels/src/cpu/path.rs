//! Which instructions the CPU kernels use, chosen once a process: the best of the machine, or what the
//! environment variable `ENAMEL_CPU` names.

use std::sync::OnceLock;

/// Names the best path to use: for comparing, and for chasing a fault.
pub const CPU_VARIABLE: &str = "ENAMEL_CPU";

/// A rung of the ladder; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuPath {
    /// Plain Burn operations, nothing of this crate's own.
    Reference,
    /// Fused loops in the target's baseline instructions (NEON on 64-bit Arm).
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, VL, BW, DQ, CD.
    Avx512,
    /// AVX-512 with its bf16 dot product.
    Avx512Bf16,
    /// AVX-512 with the bf16 tiles of AMX.
    Amx,
}

impl CpuPath {
    /// All paths, the plainest first.
    pub const ALL: [Self; 6] = [
        Self::Reference,
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// Its name in `ENAMEL_CPU` and in `enamel devices`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// The paths this machine has, the plainest first.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<CpuPath>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let has = |path: &Self| match path {
                Self::Reference | Self::Portable => true,
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::avx2(),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::avx512(),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => x86::avx512() && x86::avx512_bf16(),
                #[cfg(target_arch = "x86_64")]
                Self::Amx => x86::avx512() && x86::amx(),
                #[cfg(not(target_arch = "x86_64"))]
                _ => false,
            };
            Self::ALL.iter().copied().filter(has).collect()
        })
    }

    /// What the environment asks for: `None` where it asks for nothing, the text where no path is called
    /// that or this machine has no such path.
    pub fn asked() -> Option<Result<Self, String>> {
        let text = std::env::var_os(CPU_VARIABLE).filter(|t| !t.is_empty())?;
        let text = text.to_string_lossy().into_owned();
        let path = Self::available().iter().find(|p| p.name() == text);
        Some(path.copied().ok_or(text))
    }

    /// The instructions that multiply bf16 on this path; `None` where such weights are widened and
    /// multiplied in f32.
    pub fn bf16_products(self) -> Option<&'static str> {
        match self {
            Self::Amx | Self::Avx512Bf16 => Some(self.name()),
            Self::Reference | Self::Portable | Self::Avx2 | Self::Avx512 => None,
        }
    }

    /// The last of the available paths, but for one: Intel's cores do half as many bf16 multiplications a
    /// cycle in AVX-512 as f32 ones (81 against 149 Gflop/s, measured on one core), AMD's twice as many.
    fn fastest() -> Self {
        let slow = |path: &Self| *path == Self::Avx512Bf16 && intel();
        let mut paths = Self::available().iter().rev().filter(|p| !slow(p));
        paths.next().copied().unwrap_or(Self::Portable)
    }

    /// The path in use. What the environment asks for in vain counts as nothing here: whoever starts a
    /// computation checks [`Self::asked`] first.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<CpuPath> = OnceLock::new();
        *CHOSEN.get_or_init(|| match Self::asked() {
            Some(Ok(path)) => path,
            _ => Self::fastest(),
        })
    }
}

/// Whether the processor is Intel's.
fn intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // "GenuineIntel" begins so.
        std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::is_x86_feature_detected as has;

    pub(super) fn avx2() -> bool {
        has!("avx2") && has!("fma") && has!("f16c")
    }

    pub(super) fn avx512() -> bool {
        avx2()
            && has!("avx512f")
            && has!("avx512vl")
            && has!("avx512bw")
            && has!("avx512dq")
            && has!("avx512cd")
    }

    pub(super) fn avx512_bf16() -> bool {
        has!("avx512bf16")
    }

    /// Tiles and their bf16 product. CPUID's leaf 7 counts: on some virtual machines the table of
    /// palettes (leaf 0x1D) reads zero although the tiles work. Linux hands the tile registers out on
    /// request only.
    pub(super) fn amx() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let leaves = std::arch::x86_64::__cpuid(0).eax;
        if leaves < 7 {
            return false;
        }
        let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
        edx & AMX_BF16 != 0 && edx & AMX_TILE != 0 && permitted()
    }

    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: asks for a permission and touches no memory.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
}

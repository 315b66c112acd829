//! The architecture of a GPU, and what it can do.

use std::fmt;

/// Compute capability of a GPU, with the feature set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    major: u32,
    minor: u32,
}

impl Arch {
    /// Ampere (A100).
    pub const SM_80: Self = Self { major: 8, minor: 0 };
    /// Hopper (H100, H200): the tuned target.
    pub const SM_90: Self = Self { major: 9, minor: 0 };

    /// The architecture of a compute capability.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Reads NVRTC's name of an architecture, such as `sm_86` or `sm_90a`.
    ///
    /// The feature suffix may be left out; it follows from the capability.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let number: u32 = name.strip_prefix("sm_")?.trim_end_matches('a').parse().ok()?;
        (number >= 10).then_some(Self { major: number / 10, minor: number % 10 })
    }

    /// Major number of the compute capability.
    #[must_use]
    pub const fn major(self) -> u32 {
        self.major
    }

    /// Minor number of the compute capability.
    #[must_use]
    pub const fn minor(self) -> u32 {
        self.minor
    }

    /// Whether this workspace's kernels run there at all.
    #[must_use]
    pub const fn is_supported(self) -> bool {
        self.major >= 8
    }

    /// Whether `wgmma` exists: Hopper only.
    #[must_use]
    pub const fn has_wgmma(self) -> bool {
        self.major == 9
    }

    /// Shared memory that a block can ask for, for compiling without a device; a device says it itself.
    #[must_use]
    pub const fn smem_bytes(self) -> usize {
        match (self.major, self.minor) {
            (8, 0 | 7) => 163 << 10,
            (8, _) | (12.., _) => 99 << 10,
            _ => 227 << 10,
        }
    }

    /// Whether bulk copies, mbarriers with transaction counts, clusters and programmatic dependent launch exist.
    #[must_use]
    pub const fn has_tma(self) -> bool {
        self.major >= 9
    }
}

/// NVRTC's name, with the feature suffix where there is one: code for `sm_90a` runs on compute capability 9.0
/// only, which is exactly what a cubin for the device at hand should do.
impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.major >= 9 { "a" } else { "" };
        write!(f, "sm_{}{}{suffix}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::Arch;

    #[test]
    fn names_round_trip() {
        for name in ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"] {
            assert_eq!(Arch::parse(name).map(|a| a.to_string()).as_deref(), Some(name));
        }
        assert_eq!(Arch::parse("sm_90"), Some(Arch::SM_90));
        for name in ["", "90", "sm_", "sm_x", "compute_90", "sm_9"] {
            assert_eq!(Arch::parse(name), None, "{name}");
        }
    }
}

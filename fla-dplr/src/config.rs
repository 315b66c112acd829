//! Launch tables: which constants a kernel is compiled with for which shape.

/// Constants of `recurrent_fwd` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdConfig {
    /// Lanes side by side over V, each with 4 columns of the state; the other lanes of the warp lie over K.
    pub(crate) lanes_v: i32,
    /// Warps of a block.
    pub(crate) warps: i32,
    /// Whether the vectors of the next token are loaded while those of this one are used.
    pub(crate) prefetch: bool,
}

impl RecurrentFwdConfig {
    /// The choice for heads of `k` key channels.
    ///
    /// A lane holds `4 * k / (32 / lanes_v)` numbers of the state. Beyond 64 of them, and with the next token's
    /// vectors beyond 32, they do not fit the registers.
    pub(crate) const fn new(k: usize) -> Self {
        Self { lanes_v: if k <= 128 { 4 } else { 2 }, warps: 4, prefetch: k <= 64 }
    }
}

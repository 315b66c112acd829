//! The elementwise functions around the recurrence, and channel mixing; each a plan for both directions.

mod rows;
mod sums;

mod addcmul;
mod channel_mixing;
mod gate_output_correction;
mod k_update;
mod kk_norm;
mod kk_norm_k_update;
mod token_shift;
mod token_shift_addcmul;

use fla_core::cudarc::driver::{DevicePtr, DevicePtrMut};
use fla_core::{Error, SeqLens, Unit, check_len};

pub use self::addcmul::{
    FusedAddcmul, FusedAddcmulBwd, FusedAddcmulBwdInputs, FusedAddcmulBwdOutputs, FusedAddcmulBwdResult,
    FusedAddcmulInputs, FusedAddcmulOutputs, FusedAddcmulResult, fused_addcmul, fused_addcmul_bwd,
};
pub use self::channel_mixing::{
    ChannelMixingShape, FusedChannelMixing, FusedChannelMixingBwd, FusedChannelMixingBwdInputs,
    FusedChannelMixingBwdOutputs, FusedChannelMixingBwdResult, FusedChannelMixingInputs,
    FusedChannelMixingOutputs, FusedChannelMixingResult, fused_channel_mixing, fused_channel_mixing_bwd,
};
pub use self::gate_output_correction::{
    FusedGateOutputCorrection, FusedGateOutputCorrectionBwd, FusedGateOutputCorrectionBwdInputs,
    FusedGateOutputCorrectionBwdOutputs, FusedGateOutputCorrectionBwdResult, FusedGateOutputCorrectionInputs,
    FusedGateOutputCorrectionOutputs, fused_gate_output_correction, fused_gate_output_correction_bwd,
};
pub use self::k_update::{
    FusedKUpdate, FusedKUpdateBwd, FusedKUpdateBwdInputs, FusedKUpdateBwdOutputs, FusedKUpdateBwdResult,
    FusedKUpdateInputs, FusedKUpdateOutputs, fused_k_update, fused_k_update_bwd,
};
pub use self::kk_norm::{
    FusedKkNorm, FusedKkNormBwd, FusedKkNormBwdInputs, FusedKkNormBwdOutputs, FusedKkNormBwdResult,
    FusedKkNormInputs, FusedKkNormOutputs, fused_kk_norm, fused_kk_norm_bwd,
};
pub use self::kk_norm_k_update::{
    FusedKkNormKUpdate, FusedKkNormKUpdateBwd, FusedKkNormKUpdateBwdInputs, FusedKkNormKUpdateBwdOutputs,
    FusedKkNormKUpdateBwdResult, FusedKkNormKUpdateInputs, FusedKkNormKUpdateOutputs,
    FusedKkNormKUpdateResult, fused_kk_norm_k_update, fused_kk_norm_k_update_bwd,
};
pub use self::token_shift::{
    FusedTokenShift, FusedTokenShiftBwd, FusedTokenShiftBwdInputs, FusedTokenShiftBwdOutputs,
    FusedTokenShiftBwdResult, FusedTokenShiftInputs, FusedTokenShiftOutputs, FusedTokenShiftResult,
    fused_token_shift, fused_token_shift_bwd,
};
pub use self::token_shift_addcmul::{
    FusedTokenShiftAddcmul, FusedTokenShiftAddcmulBwd, FusedTokenShiftAddcmulBwdInputs,
    FusedTokenShiftAddcmulBwdOutputs, FusedTokenShiftAddcmulBwdResult, FusedTokenShiftAddcmulInputs,
    FusedTokenShiftAddcmulOutputs, FusedTokenShiftAddcmulResult, fused_token_shift_addcmul,
    fused_token_shift_addcmul_bwd,
};

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<FusedTokenShiftAddcmulBwd<f32>>();
const _: () = is_shareable::<FusedChannelMixingBwd<f32>>();

/// Dims of a function that sees all channels of a token alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelShape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Channels of a token, D.
    pub d: usize,
}

impl ChannelShape {
    /// Elements of a `[B, T, D]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn len(&self) -> usize {
        tokens(&self.seqs).saturating_mul(self.d)
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of a `[N, D]` tensor.
    #[must_use]
    pub fn cache_len(&self) -> usize {
        self.seqs.n().saturating_mul(self.d)
    }
}

/// Dims of a function that sums over the channels of a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Heads.
    pub h: usize,
    /// Channels of a head, of keys and values alike.
    pub k: usize,
}

impl HeadShape {
    /// Elements of a `[B, T, H, K]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn len(&self) -> usize {
        tokens(&self.seqs).saturating_mul(self.parameter_len())
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of a `[H, K]` tensor.
    #[must_use]
    pub fn parameter_len(&self) -> usize {
        self.h.saturating_mul(self.k)
    }
}

/// The mixes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixes {
    /// r, w, k, v and a.
    Five,
    /// These and g, the output gate's.
    Six,
}

impl Mixes {
    fn of<T>(xg: Option<&dyn DevicePtr<T>>) -> Self {
        if xg.is_some() { Self::Six } else { Self::Five }
    }

    fn count(self) -> i32 {
        match self {
            Self::Five => 5,
            Self::Six => 6,
        }
    }
}

fn tokens(seqs: &SeqLens) -> usize {
    seqs.b().saturating_mul(seqs.t())
}

/// Checks tensors of the same dims; those without a length are absent.
fn check_lens(dims: &'static str, wanted: usize, got: &[(&'static str, Option<usize>)]) -> Result<(), Error> {
    got.iter()
        .filter_map(|(name, len)| len.map(|len| (*name, len)))
        .try_for_each(|(name, len)| check_len(name, dims, wanted, len))
}

/// Tensors of the sixth mix are there exactly when the plan has it.
fn check_sixth(mixes: i32, got: &[(&'static str, bool)]) -> Result<(), Error> {
    let (wanted, text) = if mixes == 6 {
        (true, "must be given, since the plan has six mixes")
    } else {
        (false, "must be absent, since the plan has five mixes")
    };
    match got.iter().find(|(_, given)| *given != wanted) {
        None => Ok(()),
        Some((tensor, _)) => Err(Error::Presence { tensor, wanted: text }),
    }
}

/// An optional output for a shorter time; a match, because only a plain `&mut dyn` may shorten the lifetime inside it.
fn reborrow<'a, T>(tensor: &'a mut Option<&mut dyn DevicePtrMut<T>>) -> Option<&'a mut dyn DevicePtrMut<T>> {
    match tensor {
        Some(tensor) => Some(&mut **tensor),
        None => None,
    }
}

/// The kernels of this module; none differs by architecture.
pub(crate) fn units() -> Vec<Unit> {
    let mut out = Vec::new();
    out.extend(addcmul::units());
    out.extend(token_shift_addcmul::units());
    out.extend(token_shift::units());
    out.extend(k_update::units());
    out.extend(kk_norm::units());
    out.extend(kk_norm_k_update::units());
    out.extend(gate_output_correction::units());
    out.extend(channel_mixing::units());
    out.push(sums::unit());
    out
}

#[cfg(test)]
mod tests {
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;
    use fla_core::{Arch, Element, SeqLens, Unit};
    use half::bf16;

    use super::{
        ChannelShape, HeadShape, addcmul, gate_output_correction, k_update, kk_norm, kk_norm_k_update,
    };
    use super::{token_shift, token_shift_addcmul};

    /// The kernels of all functions for rows and heads that end anywhere within an access.
    fn all_units<T: Element>() -> Vec<Unit> {
        let seqs = SeqLens::dense(1, 1);
        let mut out = Vec::new();
        for d in [64, 60, 30, 33] {
            let shape = ChannelShape { seqs: seqs.clone(), d };
            out.extend(k_update::units_of::<T>(&shape));
            out.extend(token_shift::units_of::<T>(&shape));
            for mixes in [5, 6] {
                out.extend(addcmul::units_of::<T>(&shape, mixes));
            }
            for mixes in [1, 5, 6] {
                out.extend(token_shift_addcmul::units_of::<T>(&shape, mixes));
            }
        }
        for k in [1, 6, 33, 60, 64, 100, 128, 255, 256] {
            let shape = HeadShape { seqs: seqs.clone(), h: 1, k };
            out.extend(kk_norm::units_of::<T>(&shape));
            out.extend(kk_norm_k_update::units_of::<T>(&shape));
            out.extend(gate_output_correction::units_of::<T>(&shape));
        }
        out
    }

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element>() -> Vec<String> {
        let units = all_units::<T>();
        units.iter().filter_map(|unit| compile(unit, Arch::SM_90).err()).map(|e| e.to_string()).collect()
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(failures::<f32>);
            let mut all = failures::<bf16>();
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}

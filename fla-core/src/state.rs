//! Where a pass finds the states of its sequences and where it leaves them.

use std::collections::HashMap;
use std::mem::offset_of;

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use half::bf16;

use crate::{Binder, Device, Element, Error, Field, Params, Ptr, PtrMut, check_len};

/// A type that states are stored in: `f32` or [`bf16`]. Whatever it is, a state is f32 while a kernel works on it.
///
/// f16 is none: a state grows with its sequence, and f16 ends at 65504.
pub trait StateElement: Element {}

impl StateElement for f32 {}
impl StateElement for bf16 {}

/// Whether the states at the starts of chunks go from the forward to the backward pass: memory or time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedStates {
    /// They do not: the backward pass computes them once more, into its workspace.
    Recomputed,
    /// The forward pass writes them and the backward pass reads them.
    Kept,
}

/// Where the state after the last token of each sequence goes.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub enum FinalState<'a, S> {
    /// Nowhere.
    Dropped,
    /// Into a tensor of its own with a state for each sequence.
    New(&'a mut dyn DevicePtrMut<S>),
    /// Over the initial states, which are read from here.
    InPlace(&'a mut dyn DevicePtrMut<S>),
    /// Into a pool that many requests share, which the initial states are read from.
    Pool(StatePool<'a, S>),
}

impl<S> FinalState<'_, S> {
    /// The same for a shorter time, as for a struct whose other tensors do not live as long.
    pub fn reborrow(&mut self) -> FinalState<'_, S> {
        match self {
            Self::Dropped => FinalState::Dropped,
            Self::New(state) => FinalState::New(&mut **state),
            Self::InPlace(state) => FinalState::InPlace(&mut **state),
            Self::Pool(StatePool { states, slots, accepted }) => {
                FinalState::Pool(StatePool { states: &mut **states, slots: *slots, accepted: *accepted })
            }
        }
    }
}

impl<'a, S> From<Option<&'a mut dyn DevicePtrMut<S>>> for FinalState<'a, S> {
    fn from(state: Option<&'a mut dyn DevicePtrMut<S>>) -> Self {
        state.map_or(Self::Dropped, Self::New)
    }
}

/// A pool of states, and which of them each sequence has. All of it is read on the device, so a captured graph follows
/// whatever is written there before it is replayed.
///
/// Row n of `slots` are the slots of sequence n, M of them. The sequence starts from the slot in column
/// `accepted[n] - 1`, or 0, and the state after its token number i goes to the slot in column `min(i, M - 1)`. So with
/// M = 1 a slot is updated in place; and with as many columns as a call has tokens every state is kept, and a server
/// that accepts only some of a call's drafted tokens says so in the next call's `accepted`.
///
/// A slot that is negative or not in the pool is padding: it is neither read nor written. The same holds for a slot that
/// an earlier sequence of the call has already; [`Device::upload_slots`] finds both on the host, where they are errors.
/// A sequence that starts from padding, or whose `accepted` is not from 1 to M, is skipped: its outputs are zeros.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct StatePool<'a, S> {
    /// The states: `[S, H, K, V]` for any number S of slots.
    pub states: &'a mut dyn DevicePtrMut<S>,
    /// Numbers of slots: `[N, M]`, M at least 1.
    pub slots: &'a dyn DevicePtr<i32>,
    /// How many of the last call's tokens were accepted, from 1 to M, when M is above 1: `[N]`.
    pub accepted: Option<&'a dyn DevicePtr<i32>>,
}

/// What the state of one sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDims {
    /// A matrix for each head: `[H, K, V]`.
    Matrix,
    /// A matrix for each value head: `[HV, K, V]`.
    ValueHeads,
    /// The same by columns: `[HV, V, K]`.
    ValueHeadsByColumn,
    /// Three numbers for each channel: `[3, 1, C]`.
    Channels,
}

impl StateDims {
    /// The dims of the states of all sequences, as errors name them.
    #[must_use]
    pub const fn whole(self) -> &'static str {
        match self {
            Self::Matrix => "[N, H, K, V]",
            Self::ValueHeads => "[N, HV, K, V]",
            Self::ValueHeadsByColumn => "[N, HV, V, K]",
            Self::Channels => "[N, 3, 1, C]",
        }
    }

    const fn pool(self) -> &'static str {
        match self {
            Self::Matrix => "[S, H, K, V]",
            Self::ValueHeads => "[S, HV, K, V]",
            Self::ValueHeadsByColumn => "[S, HV, V, K]",
            Self::Channels => "[S, 3, 1, C]",
        }
    }

    const fn tokens(self) -> &'static str {
        match self {
            Self::Matrix => "[B, T, H, K, V]",
            Self::ValueHeads => "[B, T, HV, K, V]",
            Self::ValueHeadsByColumn => "[B, T, HV, V, K]",
            Self::Channels => "[B, T, 3, 1, C]",
        }
    }
}

/// What a pass knows of its states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    /// Sequences, `N`.
    pub n: usize,
    /// Rows of tokens, `B * T`.
    pub rows: usize,
    /// Elements of the state of one sequence.
    pub elems: usize,
    /// The dims of it.
    pub dims: StateDims,
}

/// The states of a call, checked: twin of `fla::States<State>`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct States<S> {
    initial: Ptr<S>,
    last: PtrMut<S>,
    tokens: PtrMut<S>,
    slots: Ptr<i32>,
    accepted: Ptr<i32>,
    pool_len: i64,
    m: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<S: StateElement> Params for States<S> {
    const CUDA_TYPE: &'static str = "fla::States<Cfg::State>";
    const FIELDS: &'static [Field] = &[
        Field::new("initial", "const Cfg::State*", offset_of!(Self, initial)),
        Field::new("last", "Cfg::State*", offset_of!(Self, last)),
        Field::new("tokens", "Cfg::State*", offset_of!(Self, tokens)),
        Field::new("slots", "const fla::i32*", offset_of!(Self, slots)),
        Field::new("accepted", "const fla::i32*", offset_of!(Self, accepted)),
        Field::new("pool_len", "fla::i64", offset_of!(Self, pool_len)),
        Field::new("m", "fla::i32", offset_of!(Self, m)),
    ];
}

/// The tensors of a call that hold states.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct StateTensors<'a, 'b, S> {
    /// States to start from.
    pub initial_state: Option<&'a dyn DevicePtr<S>>,
    /// Where the last states go.
    pub final_state: &'a mut FinalState<'b, S>,
    /// Where the state after every token goes, when wanted.
    pub token_states: Option<&'a mut (dyn DevicePtrMut<S> + 'b)>,
}

impl<'a, S: StateElement> StateTensors<'a, '_, S> {
    /// Checks every length, and that no state is given twice.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Presence`], which name the tensor.
    pub fn check(&self, shape: &StateShape) -> Result<(), Error> {
        let StateShape { n, rows, elems, dims } = *shape;
        let states = n.saturating_mul(elems);
        if let Some(state) = self.initial_state {
            check_len("initial_state", dims.whole(), states, state.len())?;
            if matches!(self.final_state, FinalState::InPlace(_) | FinalState::Pool(_)) {
                let wanted = "must be absent, since `final_state` holds the states to start from";
                return Err(Error::Presence { tensor: "initial_state", wanted });
            }
        }
        if let Some(tokens) = &self.token_states {
            check_len("token_states", dims.tokens(), rows.saturating_mul(elems), tokens.len())?;
        }
        match &self.final_state {
            FinalState::Dropped => Ok(()),
            FinalState::New(state) | FinalState::InPlace(state) => {
                check_len("final_state", dims.whole(), states, state.len())
            }
            FinalState::Pool(pool) => {
                let len = pool.states.len();
                check_len("final_state", dims.pool(), len - len % elems.max(1), len)?;
                let (slots, m) = (pool.slots.len(), pool.columns(n));
                check_len("slots", "[N, M]", n.saturating_mul(m), slots)?;
                if let Some(accepted) = pool.accepted {
                    check_len("accepted", "[N]", n, accepted.len())?;
                }
                i32::try_from(m).map(drop).map_err(|_| Error::Dim {
                    dim: "M",
                    wanted: format!("at most {}", i32::MAX),
                    got: m,
                })
            }
        }
    }

    /// The states as kernels take them; [`StateTensors::check`] comes first.
    pub fn bind(self, bind: &mut Binder<'a>, shape: &StateShape) -> States<S> {
        let mut states = States {
            initial: bind.read_opt("initial_state", self.initial_state),
            last: PtrMut::NULL,
            tokens: bind.write_opt("token_states", self.token_states),
            slots: Ptr::NULL,
            accepted: Ptr::NULL,
            pool_len: 0,
            m: 1,
        };
        match self.final_state {
            FinalState::Dropped => {}
            FinalState::New(state) => states.last = bind.write("final_state", &mut **state),
            FinalState::InPlace(state) => {
                states.last = bind.write("final_state", &mut **state);
                states.initial = states.last.as_const();
            }
            FinalState::Pool(pool) => {
                // `check` has seen that both fit.
                states.pool_len = (pool.states.len() / shape.elems.max(1)) as i64;
                states.m = pool.columns(shape.n) as i32;
                states.last = bind.write("final_state", &mut *pool.states);
                states.initial = states.last.as_const();
                states.slots = bind.read("slots", pool.slots);
                states.accepted = bind.read_opt("accepted", pool.accepted);
            }
        }
        states
    }
}

impl<S> StatePool<'_, S> {
    /// Slots of a sequence, `M`.
    fn columns(&self, n: usize) -> usize {
        (self.slots.len() / n.max(1)).max(1)
    }
}

/// Checks a table of slots `[N, M]`, for servers that make it on the host.
///
/// # Errors
///
/// [`Error::Slots`] when a slot is not in the pool of `pool_len` states, -1 for padding apart, or when two sequences
/// have the same one.
pub fn check_slots(slots: &[i32], n: usize, pool_len: usize) -> Result<(), Error> {
    let error = |reason| Err(Error::Slots { reason });
    if n == 0 || slots.is_empty() || !slots.len().is_multiple_of(n) {
        let whole = n == 0 && slots.is_empty();
        let reason = format!("it is [N, M] with N = {n} sequences, but holds {} slots", slots.len());
        return if whole { Ok(()) } else { error(reason) };
    }
    let m = slots.len() / n;
    let mut owners = HashMap::new();
    for (i, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot != -1) {
        let (i_n, column) = (i / m, i % m);
        if !usize::try_from(*slot).is_ok_and(|slot| slot < pool_len) {
            return error(format!(
                "column {column} of sequence {i_n} is {slot}, which is not in the pool of {pool_len} states"
            ));
        }
        let owner = *owners.entry(*slot).or_insert(i_n);
        if owner != i_n {
            return error(format!("the sequences {owner} and {i_n} both have slot {slot}"));
        }
    }
    Ok(())
}

impl Device {
    /// A table of slots `[N, M]` on the device, after [`check_slots`].
    ///
    /// # Errors
    ///
    /// [`Error::Slots`]; [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn upload_slots(&self, slots: &[i32], n: usize, pool_len: usize) -> Result<CudaSlice<i32>, Error> {
        check_slots(slots, n, pool_len)?;
        self.upload("the upload of slots", slots)
    }
}

#[cfg(test)]
mod tests {
    use super::check_slots;

    #[test]
    fn slots_are_checked_on_the_host() {
        let reason = |slots: &[i32], n| check_slots(slots, n, 4).expect_err("must be refused").to_string();
        for (slots, n, text) in [
            (&[0, 4][..], 2, "column 0 of sequence 1 is 4, which is not in the pool of 4 states"),
            (&[0, 1, 2, -2], 2, "column 1 of sequence 1 is -2, which is not in the pool"),
            (&[3, 1, 2, 3], 2, "the sequences 0 and 1 both have slot 3"),
            (&[0, 1, 2], 2, "it is [N, M] with N = 2 sequences, but holds 3 slots"),
            (&[], 2, "with N = 2 sequences, but holds 0 slots"),
        ] {
            assert!(reason(slots, n).contains(text), "{}", reason(slots, n));
        }
        // Padding may be repeated, and so may a slot within its own sequence.
        for (slots, n) in [(&[-1, 2, -1][..], 3), (&[1, 1, 0, 2], 2), (&[], 0)] {
            assert!(check_slots(slots, n, 4).is_ok());
        }
    }
}

//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType, StateStream, StateTile};

use crate::gates::{BetaForm, ChannelGates, Forms};

/// Constants of `recurrent_fwd` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdConfig {
    /// Lanes side by side over V, each with 16 bytes of a row of the state; the other lanes of the warp lie over K.
    pub(crate) lanes_v: usize,
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Whether the vectors of the next token are loaded while those of this one are used.
    pub(crate) prefetch: bool,
    /// Whether states leave nothing in the caches.
    pub(crate) states_pass: bool,
}

/// How many rows of 4 columns of the state a lane holds, or half as many of 8 columns where the state is bf16: many keep
/// much of the state under way at once, few spread a small state over more multiprocessors.
///
/// One token, H = HV = 32, K = V = 128, bf16 vectors, in place, H200, microseconds by graph replay over rotating buffers,
/// the best over the warps of a block, with and without the hints of `Cfg::STATES_PASS`:
///
/// | rows | B = 1 | B = 8 | B = 32 | B = 64 | B = 256 |
/// |------|-------|-------|--------|--------|---------|
/// | 8    |  3.24 |  12.5 |        |        |         |
/// | 16   |  3.25 |  10.6 |   37.2 |   73.2 |     297 |
/// | 32   |  3.94 |  10.2 |   37.1 |   71.6 |     279 |
///
/// The same with a bf16 state, of which a lane has 8 columns:
///
/// | rows | B = 1 | B = 8 | B = 32 | B = 64 | B = 256 |
/// |------|-------|-------|--------|--------|---------|
/// | 4    |  3.73 |  14.5 |        |        |         |
/// | 8    |  3.11 |  7.15 |   24.0 |   44.9 |     168 |
/// | 16   |  3.31 |  6.79 |   22.0 |   39.3 |     145 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    Few = 8,
    Some = 16,
    Many = 32,
}

/// What a kernel is compiled for: everything but the choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdVariant {
    pub(crate) arch: Arch,
    pub(crate) dtype: DType,
    /// What states are stored as.
    pub(crate) state: DType,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// Every sequence has exactly one token.
    pub(crate) one_token: bool,
    pub(crate) forms: Forms,
}

impl RecurrentFwdVariant {
    /// How a state is cut.
    pub(crate) const fn tile(&self) -> StateTile {
        StateTile { dtype: self.dtype, state: self.state, k: self.k, v: self.v }
    }

    /// The choice for `states` states on `sm_count` multiprocessors.
    pub(crate) fn choose(&self, states: usize, sm_count: u32) -> RecurrentFwdConfig {
        let rows = match self.tile().load(states, sm_count) {
            _ if !self.one_token && self.k > 64 => Rows::Some,
            0..4 => Rows::Few,
            4..12 if self.k < 128 => Rows::Some,
            _ if self.holds_many_rows() => Rows::Many,
            _ => Rows::Some,
        };
        self.with_rows(rows)
    }

    /// Whether registers hold 32 rows: there is no loop over tokens beside them, vectors are of 16 bits, and the heads are
    /// of the sizes for which the compiler keeps them all. Others spill.
    fn holds_many_rows(&self) -> bool {
        let Forms { channel_gates, beta, .. } = self.forms;
        let is_per_head = channel_gates == ChannelGates::None && beta != BetaForm::PerChannel;
        let is_for_all = self.forms.is_plain() && (self.k == 64 || self.k == 256);
        self.one_token
            && !self.forms.is_value_major()
            && self.dtype != DType::F32
            && self.k == self.v
            && (is_for_all || (is_per_head && self.k == 128))
    }

    /// Whether one token of very many states streams: in bf16 at B = 256, K = V = 128 it took 142 us on an H200 so, and 146
    /// with the other kernel; 42.6 and 39.4 us at B = 64.
    fn streams_one_token(&self) -> bool {
        let is_plain = self.forms.is_plain() && self.dtype != DType::F32;
        is_plain && self.state == DType::Bf16 && self.k == 128 && self.v == 128
    }

    /// Every choice that there is, for compiling ahead.
    pub(crate) fn all(&self) -> impl Iterator<Item = RecurrentFwdConfig> {
        let rows: &[Rows] = match (self.one_token, self.k > 64) {
            (true, _) if self.holds_many_rows() => &[Rows::Few, Rows::Some, Rows::Many],
            (true, _) | (false, false) => &[Rows::Few, Rows::Some],
            (false, true) => &[Rows::Some],
        };
        rows.iter().map(|rows| self.with_rows(*rows))
    }

    fn with_rows(&self, rows: Rows) -> RecurrentFwdConfig {
        let lanes_v = self.tile().lanes_v(rows as usize);
        // With many rows a block covers 64 columns, so that it reads 256 bytes of each row of an f32 state.
        let warps = match rows {
            Rows::Many => (64 / self.tile().cols() / lanes_v).max(1),
            Rows::Few if self.k >= 128 => 2,
            Rows::Few | Rows::Some => 1,
        };
        let prefetch = !self.one_token && rows == Rows::Few;
        // Beside many rows only the plain operator has the registers. It gains: 275 us against 277 at B = 256 and 35.9
        // against 36.9 at B = 32 (f32), 19.9 against 22.8 at B = 32 (bf16), K = V = 128, H = 32, on an H200.
        let states_pass = (rows != Rows::Many || self.forms.is_plain()) && !self.forms.is_value_major();
        RecurrentFwdConfig { lanes_v, warps, prefetch, states_pass }
    }
}

/// Constants of `recurrent_fwd_sm90`, which streams many states through shared memory.
///
/// It loads the vectors of all tokens together with the state, so that a few tokens cost little more than one: four tokens
/// at B = 256, H = 32, K = V = 128 took 306 us on an H200 and 399 us with the other kernel, one token 279 us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdStream {
    /// Most tokens of a sequence.
    pub(crate) tokens: usize,
    /// Groups and their states.
    pub(crate) groups: StateStream,
}

impl RecurrentFwdStream {
    /// Most tokens of a call: more would leave too little shared memory for states.
    const MAX_TOKENS: usize = 8;

    /// The choice for sequences of `t` tokens, where the device and the shape allow it.
    pub(crate) fn new(variant: &RecurrentFwdVariant, t: usize, smem_bytes: usize) -> Option<Self> {
        // Copies bring rows of states [K, V].
        let is_possible = variant.arch.has_tma() && !variant.forms.is_value_major();
        if !is_possible || !(1..=Self::MAX_TOKENS).contains(&t) {
            return None;
        }
        let tokens = t.next_power_of_two();
        if t == 1 && variant.streams_one_token() {
            let groups = StateStream { lanes_v: 4, warps: 4, groups: 1, slots: 6 };
            return Some(Self { tokens, groups }).filter(|choice| choice.smem_bytes(variant) <= smem_bytes);
        }
        // One token of a larger state is faster with the other kernel.
        let max_warps = if t == 1 { 2 } else { 8 };
        let groups = StateStream::new(&variant.tile(), vector_bytes(variant, tokens), max_warps, smem_bytes)?;
        let choice = Self { tokens, groups };
        let wide = choice.widened(variant).filter(|wide| wide.smem_bytes(variant) <= smem_bytes);
        Some(wide.unwrap_or(choice))
    }

    /// Twice the groups of half as many warps, each with twice the rows, for large states in bf16: two and four tokens at
    /// B = 256, K = V = 128 took 162 and 244 us so on an H200, and 207 and 315 us with 8 warps and 8 rows. Only the plain
    /// operator has the registers.
    fn widened(&self, variant: &RecurrentFwdVariant) -> Option<Self> {
        let StateStream { lanes_v, warps, groups, .. } = self.groups;
        let is_plain = variant.forms.is_plain() && variant.dtype != DType::F32;
        (is_plain && variant.state == DType::Bf16 && variant.k == 128 && warps == 8).then_some(Self {
            groups: StateStream { lanes_v: 2 * lanes_v, warps: warps / 2, groups: 2 * groups, slots: 3 },
            ..*self
        })
    }

    /// Size of the kernel's shared memory.
    pub(crate) fn smem_bytes(&self, variant: &RecurrentFwdVariant) -> usize {
        self.groups.smem_bytes(&variant.tile(), vector_bytes(variant, self.tokens))
    }

    /// Blocks of the launch: one for each multiprocessor, or none where the other kernel is faster.
    pub(crate) fn blocks(&self, variant: &RecurrentFwdVariant, states: usize, sm_count: u32) -> Option<u32> {
        let is_faster = match variant.tile().load(states, sm_count) {
            load if self.tokens == 1 && variant.streams_one_token() => load >= 96,
            load if self.tokens == 1 => (12..24).contains(&load),
            _ => states >= sm_count as usize * self.groups.groups,
        };
        is_faster.then_some(sm_count)
    }
}

/// Bytes of the vectors of `tokens` tokens; what the options leave out has 16.
fn vector_bytes(variant: &RecurrentFwdVariant, tokens: usize) -> usize {
    let RecurrentFwdVariant { dtype, k, v, forms, .. } = variant;
    let given = |given: bool, bytes: usize| if given { tokens * bytes } else { 16 };
    tokens * (2 * k + v) * dtype.bytes()
        + given(forms.beta == BetaForm::PerChannel, v * dtype.bytes())
        + given(forms.rows(), k * size_of::<f32>())
        + given(forms.columns(), v * size_of::<f32>())
}

#[cfg(test)]
mod tests {
    use super::{RecurrentFwdStream, RecurrentFwdVariant};
    use crate::gates::{BetaForm, BetaMap, ChannelGates, Forms, GateForm, QkNorm, StateLayout};
    use fla_core::{Arch, DType};

    const BASE: RecurrentFwdVariant = RecurrentFwdVariant {
        arch: Arch::SM_90,
        dtype: DType::Bf16,
        state: DType::F32,
        k: 128,
        v: 128,
        one_token: true,
        forms: Forms {
            gate: GateForm::Log,
            channel_gates: ChannelGates::None,
            beta: BetaForm::PerHead,
            beta_map: BetaMap::AsGiven,
            qk_norm: QkNorm::AsGiven,
            state_layout: StateLayout::KeyMajor,
        },
    };

    #[test]
    fn small_batches_are_spread_and_large_ones_keep_more_under_way() {
        let lanes_v = |b: usize| BASE.choose(b * 32, 132).lanes_v;
        assert_eq!([1, 8, 32, 256].map(lanes_v), [2, 8, 8, 8]);
    }

    #[test]
    fn every_choice_of_a_plan_can_be_compiled_ahead() {
        for k in [1, 7, 32, 60, 64, 100, 128, 200, 256] {
            for one_token in [true, false] {
                let forms = Forms { state_layout: StateLayout::ValueMajor, ..BASE.forms };
                let variant = RecurrentFwdVariant { k, one_token, ..BASE };
                for variant in [variant, RecurrentFwdVariant { forms, ..variant }] {
                    for states in [1, 100, 1000, 10_000, 100_000, usize::MAX] {
                        let config = variant.choose(states, 132);
                        assert!(variant.all().any(|other| other == config), "K = {k}: {config:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn states_stream_where_lanes_cover_them() {
        let stream = |k, v, t| RecurrentFwdStream::new(&RecurrentFwdVariant { k, v, ..BASE }, t, 227 << 10);
        for (k, v) in [(64, 64), (128, 128), (64, 128), (128, 64), (32, 32)] {
            assert!(stream(k, v, 4).is_some(), "{k} {v}");
        }
        for (k, v, t) in [(64, 64, 9), (64, 64, 0), (60, 60, 2), (256, 256, 2), (1, 1, 1)] {
            assert_eq!(stream(k, v, t), None, "{k} {v} {t}");
        }
        let forms = Forms { state_layout: StateLayout::ValueMajor, ..BASE.forms };
        let by_columns = RecurrentFwdVariant { forms, ..BASE };
        assert_eq!(RecurrentFwdStream::new(&by_columns, 4, 227 << 10), None);
    }
}

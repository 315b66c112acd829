//! The recurrent forward pass: a fused loop over tokens that keeps the state on chip.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, FinalState, Grid, Kernel, Params, Ptr, PtrMut, Source,
    StateElement, StateShape, StateStream, StateTensors, StateTile, States, Unit, check_len,
};
use half::{bf16, f16};

use crate::Shape;
use crate::config::{RecurrentFwdConfig, RecurrentFwdStream, RecurrentFwdVariant};
use crate::gates::{
    Beta, BetaForm, BetaMap, ChannelGates, Forms, Gate, GateForm, GateTensors, QkNorm, StateLayout,
};

/// Largest K and V: a warp holds whole columns of the state in registers.
pub(crate) const MAX_K: usize = 256;
pub(crate) const MAX_V: usize = 512;

const SOURCE: Source =
    Source { name: "fla/gated_delta/recurrent_fwd.cu", text: include_str!("../kernels/recurrent_fwd.cu") };
const SOURCE_SM90: Source = Source {
    name: "fla/gated_delta/recurrent_fwd_sm90.cu",
    text: include_str!("../kernels/recurrent_fwd_sm90.cu"),
};
pub(crate) const HEADERS: &[Source] = &[Source {
    name: "fla/gated_delta/recurrent_fwd.cuh",
    text: include_str!("../kernels/recurrent_fwd.cuh"),
}];

/// What has no safe default, and what may be changed. What is not asked for is not compiled in.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// Which scalar decay; [`GateForm::Log`] unless changed.
    pub gate: GateForm,
    /// Which decays for each channel; [`ChannelGates::None`] unless changed.
    pub channel_gates: ChannelGates,
    /// Which write strength; [`BetaForm::PerHead`] unless changed.
    pub beta: BetaForm,
    /// What is done to the write strength first; [`BetaMap::AsGiven`] unless changed.
    pub beta_map: BetaMap,
    /// What is done to queries and keys first; [`QkNorm::AsGiven`] unless changed.
    pub qk_norm: QkNorm,
    /// How states lie, those of pools and gradients too; [`StateLayout::KeyMajor`] unless changed.
    pub state_layout: StateLayout,
}

impl RecurrentFwdOptions {
    /// The options with this factor of the output, a log decay and a strength for each value head, both as given.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self {
            scale,
            gate: GateForm::Log,
            channel_gates: ChannelGates::None,
            beta: BetaForm::PerHead,
            beta_map: BetaMap::AsGiven,
            qk_norm: QkNorm::AsGiven,
            state_layout: StateLayout::KeyMajor,
        }
    }

    /// Changes the scalar decay.
    #[must_use]
    pub const fn with_gate(mut self, gate: GateForm) -> Self {
        self.gate = gate;
        self
    }

    /// Changes the decays for each channel.
    #[must_use]
    pub const fn with_channel_gates(mut self, channel_gates: ChannelGates) -> Self {
        self.channel_gates = channel_gates;
        self
    }

    /// Changes the write strength.
    #[must_use]
    pub const fn with_beta(mut self, beta: BetaForm) -> Self {
        self.beta = beta;
        self
    }

    /// Changes what is done to the write strength first.
    #[must_use]
    pub const fn with_beta_map(mut self, beta_map: BetaMap) -> Self {
        self.beta_map = beta_map;
        self
    }

    /// Changes what is done to queries and keys first.
    #[must_use]
    pub const fn with_qk_norm(mut self, qk_norm: QkNorm) -> Self {
        self.qk_norm = qk_norm;
        self
    }

    /// Changes how states lie.
    #[must_use]
    pub const fn with_state_layout(mut self, state_layout: StateLayout) -> Self {
        self.state_layout = state_layout;
        self
    }

    /// The factor of the output and everything that is compiled in, checked.
    pub(crate) fn checked(&self) -> Result<(f32, Forms), Error> {
        let Self { scale, gate, channel_gates, beta, beta_map, qk_norm, state_layout } = *self;
        if !scale.is_finite() {
            return Err(Error::Option { option: "scale", wanted: "finite", got: scale.to_string() });
        }
        let forms = Forms { gate, channel_gates, beta, beta_map, qk_norm, state_layout };
        forms.check()?;
        Ok((scale, forms))
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdInputs<'a, T, S = f32> {
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys, of unit length unless they are normalised inside: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, HV, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Scalar decay of each value head.
    pub g: Gate<'a, T>,
    /// Log decay of each row of the state, natural base, at most 0: `[B, T, HV, K]`.
    pub gk: Option<&'a dyn DevicePtr<f32>>,
    /// Log decay of each column of the state, natural base, at most 0: `[B, T, HV, V]`.
    pub gv: Option<&'a dyn DevicePtr<f32>>,
    /// Write strength.
    pub beta: Beta<'a, T>,
    /// State before the first token of each sequence: `[N, HV, K, V]`. Zero when absent, unless
    /// [`RecurrentFwdOutputs::final_state`] holds the states.
    pub initial_state: Option<&'a dyn DevicePtr<S>>,
    /// Offsets of the sequences, for [`SeqLens::packed_on_device`](fla_core::SeqLens::packed_on_device) only: `[N + 1]`.
    pub cu_seqlens: Option<&'a dyn DevicePtr<i64>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdOutputs<'a, T, S = f32> {
    /// Outputs: `[B, T, HV, V]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence: `[N, HV, K, V]`, or slots of a pool `[S, HV, K, V]`.
    pub final_state: FinalState<'a, S>,
    /// State after every token, when wanted: `[B, T, HV, K, V]`.
    pub token_states: Option<&'a mut dyn DevicePtrMut<S>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct RecurrentFwdResult<T> {
    /// Outputs: `[B, T, HV, V]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, HV, K, V]`.
    pub final_state: CudaSlice<f32>,
}

/// The recurrent forward pass of the gated delta rule, made once for a shape and run many times.
///
/// ```text
/// S  <- diag(e^{g_t + gk_t}) S diag(e^{gv_t})
/// d_t = beta_t (v_t - S^T k_t)
/// S  <- S + k_t d_t^T                            o_t = scale S^T q_t
/// ```
///
/// | tensor               | shape              | dtype | meaning                                            |
/// |----------------------|--------------------|-------|----------------------------------------------------|
/// | `q`, `k`             | `[B, T, H, K]`     | `T`   | queries and keys; value head j reads `j H / HV`    |
/// | `v`                  | `[B, T, HV, V]`    | `T`   | values                                             |
/// | `g` (log decay)      | `[B, T, HV]`       | f32   | natural base, at most 0; or absent                 |
/// | `g` (logits)         | `[B, T, HV]`       | `T`   | in its place: `-exp(a_log) softplus(g + dt_bias)`  |
/// | `a_log`, `dt_bias`   | `[HV]`             | f32   | with logits; `dt_bias` is optional                 |
/// | `gk`                 | `[B, T, HV, K]`    | f32   | optional: log decay of rows                        |
/// | `gv`                 | `[B, T, HV, V]`    | f32   | optional: log decay of columns                     |
/// | `beta`               | `[B, T, HV]`, or with `V` | `T` | write strength, or its logits; 1 when absent  |
/// | `initial_state`      | `[N, HV, K, V]`    | `S`   | optional; zero when absent                         |
/// | `cu_seqlens`         | `[N + 1]`          | i64   | only where the host does not know the lengths      |
/// | `o` (out)            | `[B, T, HV, V]`    | `T`   | outputs                                            |
/// | `final_state` (out)  | `[N, HV, K, V]`    | `S`   | optional: new, in place, or in a pool `[S, ..]`    |
/// | `token_states` (out) | `[B, T, HV, K, V]` | `S`   | optional: the state after every token              |
///
/// `T` is f32, bf16 or f16 and `S` f32 or bf16; K is at most 256 and V at most 512, any size, and HV a multiple of
/// H. A sequence without tokens hands its state through. With [`StateLayout::ValueMajor`] K and V change places in
/// every state. Which gates and strengths there are, and whether queries and keys are normalised, is said in
/// [`RecurrentFwdOptions`] and compiled in. Values are not checked: above 0 a log decay lets the state grow, and
/// keys longer than 1 can make it explode, which is computed as asked. A server passes its pool of states with
/// [`FinalState::Pool`], and captures the call in a graph.
///
/// # Numerics
///
/// Everything is widened to f32, the state too, which is rounded to `S` where it is stored; `o` is rounded once. Norms,
/// gates and sigmoids are f32. The error against the float64 recurrence stays under the rows `gated_delta, recurrent_fwd`
/// of `fla_reference::tolerance`. Sums are taken in a fixed order: the same inputs give the same bits.
///
/// A decay is one f32 number, off by up to 6e-8 of itself where it is slow. A gate that stays the same is off alike at every
/// token, so what the state still holds of a token n steps back can be off by n times that.
///
/// # Source
///
/// Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464. Negative
/// eigenvalues: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", arXiv:2411.12537.
#[derive(Debug)]
pub struct RecurrentFwd<T, S = f32> {
    kernel: Kernel<RecurrentFwdParams<T, S>>,
    shape: Shape,
    forms: Forms,
    cu_seqlens: Option<CudaSlice<i64>>,
    scale: f32,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
    /// What runs instead when states go to a pool or are kept after tokens: one token that streams waits for each slot.
    keeping: Option<(Kernel<RecurrentFwdParams<T, S>>, Grid)>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentFwd<bf16>>();

impl<T: Element, S: StateElement> RecurrentFwd<T, S> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, HV, K or V is 0 or too large, or HV is no multiple of H; [`Error::Option`] when `scale` is
    /// not finite, or a map is asked for of strengths that are 1; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let (scale, forms) = options.checked()?;
        let one_token = shape.seqs.is_dense() && shape.seqs.t() == 1;
        let variant = RecurrentFwdVariant {
            arch: device.arch(),
            dtype: T::DTYPE,
            state: S::DTYPE,
            k: shape.k,
            v: shape.v,
            one_token,
            forms,
        };
        let states = shape.seqs.n().saturating_mul(shape.hv);
        let stream = stream_launch(&variant, shape, device);
        let config = variant.choose(states, device.sm_count());
        tracing::debug!(?variant, ?config, ?stream, "gated_delta recurrent_fwd");
        let direct = || -> Result<_, Error> {
            let grid = variant.tile().grid("N * HV", states, config.lanes_v, config.warps)?;
            Ok((device.kernel(&unit::<T, S>(&variant, &config))?, grid))
        };
        let (kernel, grid, keeping) = match stream {
            Some((config, blocks)) => {
                let (kernel, grid) =
                    if one_token { direct().map(|(k, grid)| (Some(k), grid))? } else { (None, None) };
                let streaming = device.kernel(&unit_sm90::<T, S>(&variant, &config))?;
                (streaming, Some(Grid::x(blocks)), kernel.zip(grid))
            }
            None => {
                let (kernel, grid) = direct()?;
                (kernel, grid, None)
            }
        };
        let cu_seqlens = shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?;
        Ok(Self { kernel, shape: shape.clone(), forms, cu_seqlens, scale, grid, keeping })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`], [`Error::Align`] and [`Error::Presence`], which name the tensor; [`Error::Context`] when the
    /// stream belongs to another context; [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentFwdInputs<'_, T, S>,
        y: &mut RecurrentFwdOutputs<'_, T, S>,
    ) -> Result<(), Error> {
        let Shape { seqs, h, hv, .. } = &self.shape;
        check_len("q", "[B, T, H, K]", self.shape.qk_len(), x.q.len())?;
        check_len("k", "[B, T, H, K]", self.shape.qk_len(), x.k.len())?;
        check_len("v", "[B, T, HV, V]", self.shape.v_len(), x.v.len())?;
        check_len("o", "[B, T, HV, V]", self.shape.v_len(), y.o.len())?;
        let gates = GateTensors { g: x.g, gk: x.gk, gv: x.gv, beta: x.beta };
        gates.check(&self.forms, &self.shape)?;
        seqs.check_cu_seqlens(x.cu_seqlens.map(DeviceSlice::len))?;
        let state_shape = StateShape { dims: self.forms.state_layout.dims(), ..self.shape.state_shape() };
        let keeps = matches!(y.final_state, FinalState::Pool(_)) || y.token_states.is_some();
        let states = StateTensors {
            initial_state: x.initial_state,
            final_state: &mut y.final_state,
            token_states: y.token_states.as_deref_mut(),
        };
        states.check(&state_shape)?;
        let Some(grid) = self.grid else { return Ok(()) };
        let (kernel, grid) = match &self.keeping {
            Some((kernel, grid)) if keeps => (kernel, *grid),
            _ => (&self.kernel, grid),
        };
        let (g, raw) = match x.g {
            Gate::None => (None, None),
            Gate::Log(g) => (Some(g), None),
            Gate::Raw { g, a_log, dt_bias } => (None, Some((g, a_log, dt_bias))),
        };
        kernel.launch(stream, grid, |bind| RecurrentFwdParams {
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            g: bind.read_opt("g", g),
            g_logit: bind.read_opt("g", raw.map(|(g, ..)| g)),
            a_log: bind.read_opt("a_log", raw.map(|(_, a_log, _)| a_log)),
            dt_bias: bind.read_opt("dt_bias", raw.and_then(|(.., dt_bias)| dt_bias)),
            gk: bind.read_opt("gk", x.gk),
            gv: bind.read_opt("gv", x.gv),
            beta: match x.beta {
                Beta::One => Ptr::NULL,
                Beta::PerHead(beta) | Beta::PerChannel(beta) => bind.read("beta", beta),
            },
            cu_seqlens: match x.cu_seqlens {
                Some(offsets) => bind.read("cu_seqlens", offsets),
                None => bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
            },
            o: bind.write("o", &mut *y.o),
            states: states.bind(bind, &state_shape),
            n: seqs.n() as i64,
            t: seqs.t() as i64,
            // `new` has checked that H and HV fit.
            h: *h as i32,
            hv: *hv as i32,
            scale: self.scale,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `q`.
///
/// The compiled kernel comes from the device's cache, so a second call costs no compilation; but for decoding
/// keep a [`RecurrentFwd`], which allocates nothing and takes states of every type.
///
/// # Errors
///
/// As [`RecurrentFwd::new`] and [`RecurrentFwd::run`].
pub fn recurrent_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &RecurrentFwdInputs<'_, T>,
    options: &RecurrentFwdOptions,
) -> Result<RecurrentFwdResult<T>, Error> {
    let plan = RecurrentFwd::<T>::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.q.stream().clone();
    let mut y = RecurrentFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
    };
    let final_state = FinalState::New(&mut y.final_state);
    plan.run(&stream, x, &mut RecurrentFwdOutputs { o: &mut y.o, final_state, token_states: None })?;
    Ok(y)
}

/// Whether the states stream through shared memory, and with how many blocks.
fn stream_launch(
    variant: &RecurrentFwdVariant,
    shape: &Shape,
    device: &Device,
) -> Option<(RecurrentFwdStream, u32)> {
    if !shape.seqs.is_dense() {
        return None;
    }
    let config = RecurrentFwdStream::new(variant, shape.seqs.t(), device.smem_bytes() as usize)?;
    let states = shape.seqs.n().saturating_mul(shape.hv);
    // The kernel counts states in 31 bits; more fall to the other kernel, which refuses them by name.
    let blocks =
        config.blocks(variant, states, device.sm_count()).filter(|_| i32::try_from(states).is_ok())?;
    Some((config, blocks))
}

/// Every option at once, and none.
pub(crate) const FORMS: [Forms; 4] = [
    Forms {
        gate: GateForm::Log,
        channel_gates: ChannelGates::None,
        beta: BetaForm::PerHead,
        beta_map: BetaMap::AsGiven,
        qk_norm: QkNorm::AsGiven,
        state_layout: StateLayout::KeyMajor,
    },
    // What a layer of the model decodes with.
    Forms {
        gate: GateForm::Raw,
        channel_gates: ChannelGates::None,
        beta: BetaForm::PerHead,
        beta_map: BetaMap::Sigmoid,
        qk_norm: QkNorm::L2,
        state_layout: StateLayout::KeyMajor,
    },
    Forms {
        gate: GateForm::Raw,
        channel_gates: ChannelGates::RowsAndColumns,
        beta: BetaForm::PerChannel,
        beta_map: BetaMap::TwiceSigmoid,
        qk_norm: QkNorm::L2,
        state_layout: StateLayout::KeyMajor,
    },
    Forms {
        gate: GateForm::None,
        channel_gates: ChannelGates::None,
        beta: BetaForm::One,
        beta_map: BetaMap::AsGiven,
        qk_norm: QkNorm::AsGiven,
        state_layout: StateLayout::KeyMajor,
    },
];

/// What a layer of the model decodes with, from states by columns.
pub(crate) const VALUE_MAJOR: Forms = Forms { state_layout: StateLayout::ValueMajor, ..FORMS[1] };

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for one_token in [true, false] {
        let variant = |(k, v), forms| {
            let (dtype, state) = (DType::F32, DType::F32);
            RecurrentFwdVariant { arch, dtype, state, k, v, one_token, forms }
        };
        for head in [(64, 64), (128, 128)] {
            for forms in [FORMS[0], FORMS[1]] {
                out.extend(all_units::<bf16, f32>(&variant(head, forms)));
                out.extend(all_units::<bf16, bf16>(&variant(head, forms)));
            }
            out.extend(all_units::<f32, f32>(&variant(head, FORMS[0])));
            out.extend(all_units::<f16, f32>(&variant(head, FORMS[0])));
        }
        for forms in [FORMS[2], FORMS[3]] {
            out.extend(all_units::<bf16, f32>(&variant((64, 64), forms)));
        }
        for head in [(256, 512), (60, 100), (33, 65)] {
            out.extend(all_units::<bf16, f32>(&variant(head, FORMS[1])));
        }
        for head in [(64, 64), (128, 128)] {
            out.extend(all_units::<bf16, f32>(&variant(head, VALUE_MAJOR)));
            out.extend(all_units::<bf16, bf16>(&variant(head, VALUE_MAJOR)));
        }
    }
    out
}

fn all_units<T: Element, S: StateElement>(variant: &RecurrentFwdVariant) -> impl Iterator<Item = Unit> {
    let variant = RecurrentFwdVariant { dtype: T::DTYPE, state: S::DTYPE, ..*variant };
    // The shared memory that a block can ask for on sm_90, sm_100 and sm_120.
    let smem_bytes = if variant.arch.major() >= 12 { 99 << 10 } else { 227 << 10 };
    let tokens: &[usize] = if variant.one_token { &[1] } else { &[2, 4, 8] };
    let stream = tokens.iter().filter_map(move |t| RecurrentFwdStream::new(&variant, *t, smem_bytes));
    let stream: Vec<Unit> = stream.map(|config| unit_sm90::<T, S>(&variant, &config)).collect();
    let direct: Vec<Unit> = variant.all().map(|config| unit::<T, S>(&variant, &config)).collect();
    direct.into_iter().chain(stream)
}

fn unit<T: Element, S: StateElement>(variant: &RecurrentFwdVariant, config: &RecurrentFwdConfig) -> Unit {
    let unit = Unit::new::<RecurrentFwdParams<T, S>>(
        "gated_delta",
        "recurrent_fwd",
        SOURCE,
        config.warps as u32 * 32,
    );
    // All of these are below 2^31: `new` has checked K and V.
    with_forms(unit, &variant.tile(), &variant.forms)
        .with("LANES_V", config.lanes_v as i32)
        .with("WARPS", config.warps as i32)
        .with("ONE_TOKEN", variant.one_token)
        .with("PREFETCH", config.prefetch)
        .with("STATES_PASS", config.states_pass)
}

fn unit_sm90<T: Element, S: StateElement>(
    variant: &RecurrentFwdVariant,
    config: &RecurrentFwdStream,
) -> Unit {
    let StateStream { lanes_v, warps, groups, slots } = config.groups;
    let unit = Unit::new::<RecurrentFwdParams<T, S>>(
        "gated_delta",
        "recurrent_fwd",
        SOURCE_SM90,
        config.groups.threads(),
    );
    with_forms(unit, &variant.tile(), &variant.forms)
        .with_smem_bytes(config.smem_bytes(variant) as u32)
        .with("TOKENS", config.tokens as i32)
        .with("LANES_V", lanes_v as i32)
        .with("WARPS", warps as i32)
        .with("GROUPS", groups as i32)
        .with("SLOTS", slots as i32)
}

/// Adds the constants that every pass has.
pub(crate) fn with_forms(unit: Unit, tile: &StateTile, forms: &Forms) -> Unit {
    let Forms { gate, beta, beta_map, qk_norm, .. } = *forms;
    unit.with_headers(HEADERS)
        .with("Element", tile.dtype)
        .with("State", tile.state)
        .with("K", tile.k as i32)
        .with("V", tile.v as i32)
        .with("LOG_GATE", gate == GateForm::Log)
        .with("RAW_GATE", gate == GateForm::Raw)
        .with("ROW_GATES", forms.rows())
        .with("COLUMN_GATES", forms.columns())
        .with("HEAD_BETA", beta == BetaForm::PerHead)
        .with("CHANNEL_BETA", beta == BetaForm::PerChannel)
        .with("SIGMOID_BETA", beta_map != BetaMap::AsGiven)
        .with("TWICE_BETA", beta_map == BetaMap::TwiceSigmoid)
        .with("NORMALISE_QK", qk_norm == QkNorm::L2)
        .with("VALUE_MAJOR", forms.is_value_major())
}

/// Twin of `fla::gated_delta::RecurrentFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentFwdParams<T, S> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    g: Ptr<f32>,
    g_logit: Ptr<T>,
    a_log: Ptr<f32>,
    dt_bias: Ptr<f32>,
    gk: Ptr<f32>,
    gv: Ptr<f32>,
    beta: Ptr<T>,
    cu_seqlens: Ptr<i64>,
    o: PtrMut<T>,
    states: States<S>,
    n: i64,
    t: i64,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element, S: StateElement> Params for RecurrentFwdParams<T, S> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::RecurrentFwdParams<Cfg::Element, Cfg::State>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("g", "const float*", offset_of!(Self, g)),
        Field::new("g_logit", "const Cfg::Element*", offset_of!(Self, g_logit)),
        Field::new("a_log", "const float*", offset_of!(Self, a_log)),
        Field::new("dt_bias", "const float*", offset_of!(Self, dt_bias)),
        Field::new("gk", "const float*", offset_of!(Self, gk)),
        Field::new("gv", "const float*", offset_of!(Self, gv)),
        Field::new("beta", "const Cfg::Element*", offset_of!(Self, beta)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::nested::<States<S>>("states", offset_of!(Self, states)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{
        Arch, Element, FORMS, Forms, RecurrentFwdVariant, StateElement, StateLayout, VALUE_MAJOR, all_units,
        bf16,
    };
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element, S: StateElement>(heads: &[(usize, usize)]) -> Vec<String> {
        let mut failures = Vec::new();
        for (i, &(k, v)) in heads.iter().enumerate() {
            for one_token in [true, false] {
                // Every option where rows end in the middle and where they do not, the usual ones everywhere.
                let forms = if i < 3 { &FORMS[..] } else { &FORMS[1..2] };
                let everything = Forms { state_layout: StateLayout::ValueMajor, ..FORMS[2] };
                for forms in forms.iter().chain([&VALUE_MAJOR, &everything]) {
                    let variant = RecurrentFwdVariant {
                        arch: Arch::SM_90,
                        dtype: T::DTYPE,
                        state: S::DTYPE,
                        k,
                        v,
                        one_token,
                        forms: *forms,
                    };
                    let units = all_units::<T, S>(&variant);
                    failures.extend(
                        units.filter_map(|unit| compile(&unit, Arch::SM_90).err()).map(|e| e.to_string()),
                    );
                }
            }
        }
        failures
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        // Heads whose rows end anywhere: within an access, within a lane, within a warp.
        const HEADS: &[(usize, usize)] =
            &[(128, 128), (65, 63), (255, 512), (1, 1), (33, 64), (100, 72), (256, 256)];
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures::<f32, f32>(HEADS));
            let mut all = failures::<bf16, f32>(HEADS);
            all.extend(failures::<bf16, bf16>(HEADS));
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}

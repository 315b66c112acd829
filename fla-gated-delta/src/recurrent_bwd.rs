//! The recurrent backward pass: gradients token by token, with any decay exact.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, Source,
    StateTile, Unit, WalkBack, Workspace, check_len,
};
use half::{bf16, f16};

use crate::Shape;
use crate::gates::{Beta, BetaForm, Forms, Gate, GateForm, GateTensors};
use crate::recurrent_fwd::{FORMS, MAX_K, MAX_V, RecurrentFwdOptions, VALUE_MAJOR, with_forms};

const SOURCE: Source =
    Source { name: "fla/gated_delta/recurrent_bwd.cu", text: include_str!("../kernels/recurrent_bwd.cu") };
const SOURCE_OUTPUT: Source = Source {
    name: "fla/gated_delta/recurrent_bwd_output.cu",
    text: include_str!("../kernels/recurrent_bwd_output.cu"),
};

/// Warps of a block of the output stage.
const OUTPUT_WARPS: usize = 8;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdInputs<'a, T> {
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, HV, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Scalar decay of each value head.
    pub g: Gate<'a, T>,
    /// Log decay of each row of the state: `[B, T, HV, K]`.
    pub gk: Option<&'a dyn DevicePtr<f32>>,
    /// Log decay of each column of the state: `[B, T, HV, V]`.
    pub gv: Option<&'a dyn DevicePtr<f32>>,
    /// Write strength.
    pub beta: Beta<'a, T>,
    /// State that the forward pass has started from, or zero when absent: `[N, HV, K, V]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Gradient of the outputs: `[B, T, HV, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, HV, K, V]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// Gradients of what the scalar decay is made of; the same variant as that of [`Gate`].
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub enum GateGrads<'a, T> {
    /// There is no scalar decay.
    None,
    /// Of the log decay: `[B, T, HV]`.
    Log(&'a mut dyn DevicePtrMut<f32>),
    /// Of logits and parameters.
    Raw {
        /// Gradient of the logits: `[B, T, HV]`.
        dg: &'a mut dyn DevicePtrMut<T>,
        /// Gradient of `a_log`, when wanted: `[HV]`.
        d_a_log: Option<&'a mut dyn DevicePtrMut<f32>>,
        /// Gradient of `dt_bias`, when wanted, at zero where there was none: `[HV]`.
        d_dt_bias: Option<&'a mut dyn DevicePtrMut<f32>>,
    },
}

/// What the pass writes, whole: gradients with respect to the inputs as they were given, before any map or norm.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdOutputs<'a, T> {
    /// Gradient of `q`, summed over the value heads of its group: `[B, T, H, K]`.
    pub dq: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`, summed over the value heads of its group: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, HV, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradients of `g` and what it is made of.
    pub dg: GateGrads<'a, T>,
    /// Gradient of `gk`, there when that is: `[B, T, HV, K]`.
    pub dgk: Option<&'a mut dyn DevicePtrMut<f32>>,
    /// Gradient of `gv`, there when that is: `[B, T, HV, V]`.
    pub dgv: Option<&'a mut dyn DevicePtrMut<f32>>,
    /// Gradient of `beta`, there when that is, and of its shape.
    pub dbeta: Option<&'a mut dyn DevicePtrMut<T>>,
    /// Gradient of the initial state, when wanted: `[N, HV, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns; gradients of what was absent are absent.
#[derive(Debug)]
pub struct RecurrentBwdResult<T> {
    /// Gradient of `q`: `[B, T, H, K]`.
    pub dq: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, HV, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of log decays: `[B, T, HV]`.
    pub dg: Option<CudaSlice<f32>>,
    /// Gradient of logits: `[B, T, HV]`.
    pub dg_logits: Option<CudaSlice<T>>,
    /// Gradient of `a_log`: `[HV]`.
    pub d_a_log: Option<CudaSlice<f32>>,
    /// Gradient of `dt_bias`: `[HV]`.
    pub d_dt_bias: Option<CudaSlice<f32>>,
    /// Gradient of `gk`: `[B, T, HV, K]`.
    pub dgk: Option<CudaSlice<f32>>,
    /// Gradient of `gv`: `[B, T, HV, V]`.
    pub dgv: Option<CudaSlice<f32>>,
    /// Gradient of `beta`, of its shape.
    pub dbeta: Option<CudaSlice<T>>,
    /// Gradient of the initial state: `[N, HV, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// The recurrent backward pass of the gated delta rule, made once for a shape and run many times.
///
/// With `D_t` the decayed state that a token reads, `miss_t = v_t - D_t^T k_t`, and from the last token to the first:
///
/// ```text
/// dS_t += scale q_t d_o_t^T           dq_t = scale S_t d_o_t
/// dd_t = dS_t^T k_t                   dv_t = beta_t dd_t            dbeta_t = miss_t dd_t
/// dk_t = dS_t (beta_t miss_t) - D_t dv_t
/// dD_t = dS_t - k_t dv_t^T
/// dgk_t = sum_v D_t dD_t              dgv_t = sum_k D_t dD_t        dg_t = sum_kv D_t dD_t
/// dS_{t-1} = diag(e^{g_t + gk_t}) dD_t diag(e^{gv_t})
/// ```
///
/// Gradients then pass through the norm, the map of the strength and the gate, as far as the options ask for them.
///
/// | tensor                           | shape           | dtype | meaning                                          |
/// |----------------------------------|-----------------|-------|--------------------------------------------------|
/// | inputs of the forward pass       |                 |       | as in [`RecurrentFwd`](crate::RecurrentFwd)      |
/// | `d_o`                            | `[B, T, HV, V]` | `T`   | gradient of the outputs                          |
/// | `d_final_state`                  | `[N, HV, K, V]` | f32   | optional; zero when absent                       |
/// | `dq`, `dk` (out)                 | `[B, T, H, K]`  | `T`   | summed over the value heads that share them      |
/// | `dv` (out)                       | `[B, T, HV, V]` | `T`   |                                                  |
/// | `dg`, `dgk`, `dgv` (out)         | like the gates  | f32   | of log decays, where there are some              |
/// | `dg` of logits (out)             | `[B, T, HV]`    | `T`   |                                                  |
/// | `d_a_log`, `d_dt_bias` (out)     | `[HV]`          | f32   | optional, with logits: sums over all tokens      |
/// | `dbeta` (out)                    | like `beta`     | `T`   | where there is one                               |
/// | `d_initial_state` (out)          | `[N, HV, K, V]` | f32   | optional                                         |
///
/// `T`, K, V and HV are as in the forward pass, and states are f32, `[N, HV, V, K]` where
/// the options say so. Lengths have to be known to the host.
///
/// Nothing of the forward pass has to be kept: a block walks forward once more, keeps about the root of T states, and
/// walks every segment between them again on its way back. The pass is for exact gradients of short sequences and few
/// heads; long ones belong to a chunk pass.
///
/// # Numerics
///
/// Everything is widened to f32. Gradients of decays are products of the state and its gradient at that token, and no
/// differences of larger sums, so they are as exact as the others under any decay. Sums are taken in a fixed order, those
/// of `d_a_log` and `d_dt_bias` too: the same inputs give the same bits. The error against the float64 recurrence stays
/// under the rows `gated_delta, recurrent_bwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464; the gradients
/// are the transpose of the recurrence, step by step.
#[derive(Debug)]
pub struct RecurrentBwd<T> {
    kernel: Kernel<RecurrentBwdParams<T>>,
    /// For a raw gate.
    output: Option<GateOfLogits<T>>,
    shape: Shape,
    forms: Forms,
    cu_seqlens: Option<CudaSlice<i64>>,
    scale: f32,
    walk: WalkBack,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentBwd<bf16>>();

impl<T: Element> RecurrentBwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// As [`RecurrentFwd::new`](crate::RecurrentFwd::new); [`Error::SeqLens`] when only the device knows the lengths.
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let (scale, forms) = options.checked()?;
        // A block takes the value heads of a query head in turn, whose gradients they share.
        let heads = shape.seqs.n().saturating_mul(shape.h);
        let tile = StateTile { dtype: T::DTYPE, state: DType::F32, k: shape.k, v: shape.v };
        let walk = WalkBack::new(&tile, &shape.seqs, heads, device.sm_count())?;
        tracing::debug!(?tile, ?forms, ?walk, "gated_delta recurrent_bwd");
        let kernel = device.kernel(&unit::<T>(&tile, &walk, &forms))?;
        let output = (forms.gate == GateForm::Raw).then(|| GateOfLogits::new(device)).transpose()?;
        let cu_seqlens = shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?;
        Ok(Self { kernel, output, shape: shape.clone(), forms, cu_seqlens, scale, walk })
    }

    /// Bytes of the workspace that a run needs: for every block about twice the root of the longest sequence in states.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        Workspace::bytes(&self.workspace_lens().map(|len| len.saturating_mul(size_of::<f32>())))
    }

    /// Numbers of the parts of the workspace: states, sums of `dq` and `dk`, sums of `dbeta`, gradients of log decays.
    fn workspace_lens(&self) -> [usize; 4] {
        let Shape { h, hv, .. } = self.shape;
        let qk_partial =
            if self.walk.parts > 1 || hv > h { self.shape.qk_len().saturating_mul(2) } else { 0 };
        let head_len = self.shape.head_len();
        let beta_partial =
            if self.forms.beta == BetaForm::PerHead { self.walk.partial_len(1, head_len) } else { 0 };
        let dg = if self.forms.gate == GateForm::Raw { head_len } else { 0 };
        [self.walk.scratch_len(), qk_partial, beta_partial, dg]
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`], [`Error::Align`] and [`Error::Presence`], which name the tensor; [`Error::Context`] when the
    /// stream belongs to another context; [`Error::Driver`] when a launch is refused. Unless it is the second launch,
    /// that of a raw gate, nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentBwdInputs<'_, T>,
        dx: &mut RecurrentBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        self.check(x, dx)?;
        let Shape { seqs, h, hv, .. } = &self.shape;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let [scratch, qk_partial, beta_partial, dg] = self.workspace_lens();
        let mut scratch = workspace.take::<f32>(scratch)?;
        let mut qk_partial = workspace.take::<f32>(qk_partial)?;
        let mut beta_partial = workspace.take::<f32>(beta_partial)?;
        let mut dg_of_logs = workspace.take::<f32>(dg)?;
        let (g, raw) = match x.g {
            Gate::None => (None, None),
            Gate::Log(g) => (Some(g), None),
            Gate::Raw { g, a_log, dt_bias } => (None, Some((g, a_log, dt_bias))),
        };
        if self.walk.blocks > 0 {
            // As many as multiprocessors at most, times a few.
            let grid = Grid::x(self.walk.blocks as u32);
            self.kernel.launch(stream, grid, |bind| RecurrentBwdParams {
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
                initial_state: bind.read_opt("initial_state", x.initial_state),
                d_o: bind.read("d_o", x.d_o),
                d_final_state: bind.read_opt("d_final_state", x.d_final_state),
                cu_seqlens: bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
                dq: bind.write("dq", &mut *dx.dq),
                dk: bind.write("dk", &mut *dx.dk),
                dv: bind.write("dv", &mut *dx.dv),
                dg: match &mut dx.dg {
                    GateGrads::None => PtrMut::NULL,
                    GateGrads::Log(dg) => bind.write("dg", &mut **dg),
                    GateGrads::Raw { .. } => bind.write("workspace", &mut dg_of_logs),
                },
                dgk: bind.write_opt("dgk", dx.dgk.as_deref_mut()),
                dgv: bind.write_opt("dgv", dx.dgv.as_deref_mut()),
                dbeta: bind.write_opt("dbeta", dx.dbeta.as_deref_mut()),
                d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
                scratch: bind.write("workspace", &mut scratch),
                qk_partial: bind.write("workspace", &mut qk_partial),
                beta_partial: bind.write("workspace", &mut beta_partial),
                n: seqs.n() as i64,
                t: seqs.t() as i64,
                segment: self.walk.segment as i64,
                scratch_states: self.walk.scratch_states as i64,
                qk_len: self.shape.qk_len() as i64,
                // `new` has checked that H and HV fit.
                h: *h as i32,
                hv: *hv as i32,
                scale: self.scale,
            })?;
        }
        match &self.output {
            Some(output) => output.run(stream, &self.shape, (x.g, &dg_of_logs), &mut dx.dg),
            None => Ok(()),
        }
    }

    /// Checks which tensors there are, and their lengths and places.
    fn check(&self, x: &RecurrentBwdInputs<'_, T>, dx: &RecurrentBwdOutputs<'_, T>) -> Result<(), Error> {
        let shape = &self.shape;
        for (name, len) in [("q", x.q.len()), ("k", x.k.len()), ("dq", dx.dq.len()), ("dk", dx.dk.len())] {
            check_len(name, "[B, T, H, K]", shape.qk_len(), len)?;
        }
        for (name, len) in [("v", x.v.len()), ("d_o", x.d_o.len()), ("dv", dx.dv.len())] {
            check_len(name, "[B, T, HV, V]", shape.v_len(), len)?;
        }
        GateTensors { g: x.g, gk: x.gk, gv: x.gv, beta: x.beta }.check(&self.forms, shape)?;
        check_gate_grads(shape, x.g, &dx.dg)?;
        let presence = |tensor, wanted| Err(Error::Presence { tensor, wanted });
        let (head_len, k_len, v_len) = (shape.head_len(), shape.k_len(), shape.v_len());
        let beta = match x.beta {
            Beta::One => None,
            Beta::PerHead(_) => Some(("[B, T, HV]", head_len)),
            Beta::PerChannel(_) => Some(("[B, T, HV, V]", v_len)),
        };
        for (name, wanted, got) in [
            ("dgk", x.gk.map(|_| ("[B, T, HV, K]", k_len)), dx.dgk.as_ref().map(|x| x.len())),
            ("dgv", x.gv.map(|_| ("[B, T, HV, V]", v_len)), dx.dgv.as_ref().map(|x| x.len())),
            ("dbeta", beta, dx.dbeta.as_ref().map(|x| x.len())),
        ] {
            match (wanted, got) {
                (Some((dims, wanted)), Some(got)) => check_len(name, dims, wanted, got)?,
                (None, None) => {}
                (Some(_), None) => return presence(name, "must be given, since its input is"),
                (None, Some(_)) => return presence(name, "must be absent, since its input is"),
            }
        }
        let state_len = shape.state_len();
        for (name, len) in [
            ("initial_state", x.initial_state.map(|s| s.len())),
            ("d_final_state", x.d_final_state.map(|s| s.len())),
            ("d_initial_state", dx.d_initial_state.as_ref().map(|s| s.len())),
        ] {
            check_len(name, self.forms.state_layout.dims().whole(), state_len, len.unwrap_or(state_len))?;
        }
        Ok(())
    }
}

/// Checks that the gradients of a gate are of its variant, and their lengths.
pub(crate) fn check_gate_grads<T: Element>(
    shape: &Shape,
    g: Gate<'_, T>,
    dg: &GateGrads<'_, T>,
) -> Result<(), Error> {
    match (g, dg) {
        (Gate::None, GateGrads::None) => Ok(()),
        (Gate::Log(_), GateGrads::Log(dg)) => check_len("dg", "[B, T, HV]", shape.head_len(), dg.len()),
        (Gate::Raw { .. }, GateGrads::Raw { dg, d_a_log, d_dt_bias }) => {
            check_len("dg", "[B, T, HV]", shape.head_len(), dg.len())?;
            for (name, tensor) in [("d_a_log", d_a_log), ("d_dt_bias", d_dt_bias)] {
                check_len(name, "[HV]", shape.hv, tensor.as_ref().map_or(shape.hv, |x| x.len()))?;
            }
            Ok(())
        }
        _ => {
            let wanted = "must be the variant of `GateGrads` that `g` is of `Gate`";
            Err(Error::Presence { tensor: "dg", wanted })
        }
    }
}

/// The stage `output`: from the gradient of log decays to those of logits and parameters. Passes by chunks end with it too.
#[derive(Debug)]
pub(crate) struct GateOfLogits<T> {
    kernel: Kernel<RecurrentBwdOutputParams<T>>,
}

impl<T: Element> GateOfLogits<T> {
    pub(crate) fn new(device: &Device) -> Result<Self, Error> {
        Ok(Self { kernel: device.kernel(&output_unit::<T>())? })
    }

    /// Queues the stage for the raw gate `g` and the gradients of its log decays; the lengths have been checked.
    pub(crate) fn run(
        &self,
        stream: &CudaStream,
        shape: &Shape,
        (g, dg_of_logs): (Gate<'_, T>, &RawSlice<'_, f32>),
        grads: &mut GateGrads<'_, T>,
    ) -> Result<(), Error> {
        let (Gate::Raw { g, a_log, dt_bias }, GateGrads::Raw { dg, d_a_log, d_dt_bias }) = (g, grads) else {
            return Ok(());
        };
        self.kernel.launch(stream, Grid::x(shape.hv as u32), |bind| RecurrentBwdOutputParams {
            g_logit: bind.read("g", g),
            a_log: bind.read("a_log", a_log),
            dt_bias: bind.read_opt("dt_bias", dt_bias),
            dg: bind.read("workspace", dg_of_logs),
            d_logit: bind.write("dg", &mut **dg),
            d_a_log: bind.write_opt("d_a_log", d_a_log.as_deref_mut()),
            d_dt_bias: bind.write_opt("d_dt_bias", d_dt_bias.as_deref_mut()),
            rows: (shape.head_len() / shape.hv) as i64,
            hv: shape.hv as i32,
        })
    }
}

/// Makes the plan, allocates gradients and workspace and runs, on the stream of `q`.
///
/// # Errors
///
/// As [`RecurrentBwd::new`] and [`RecurrentBwd::run`].
pub fn recurrent_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &RecurrentBwdInputs<'_, T>,
    options: &RecurrentFwdOptions,
) -> Result<RecurrentBwdResult<T>, Error> {
    let plan = RecurrentBwd::<T>::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.q.stream().clone();
    let narrow = |len| device.alloc::<T>(&stream, len);
    let wide = |given: bool, len| given.then(|| device.alloc::<f32>(&stream, len)).transpose();
    let (is_log, is_raw) = (matches!(x.g, Gate::Log(_)), matches!(x.g, Gate::Raw { .. }));
    let has_bias = matches!(x.g, Gate::Raw { dt_bias: Some(_), .. });
    let mut dx = RecurrentBwdResult {
        dq: narrow(shape.qk_len())?,
        dk: narrow(shape.qk_len())?,
        dv: narrow(shape.v_len())?,
        dg: wide(is_log, shape.head_len())?,
        dg_logits: is_raw.then(|| narrow(shape.head_len())).transpose()?,
        d_a_log: wide(is_raw, shape.hv)?,
        d_dt_bias: wide(has_bias, shape.hv)?,
        dgk: wide(x.gk.is_some(), shape.k_len())?,
        dgv: wide(x.gv.is_some(), shape.v_len())?,
        dbeta: match x.beta {
            Beta::One => None,
            Beta::PerHead(_) => Some(narrow(shape.head_len())?),
            Beta::PerChannel(_) => Some(narrow(shape.v_len())?),
        },
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    fn tensor<T>(x: &mut Option<CudaSlice<T>>) -> Option<&mut dyn DevicePtrMut<T>> {
        x.as_mut().map(|x| x as &mut dyn DevicePtrMut<T>)
    }
    let mut outputs = RecurrentBwdOutputs {
        dq: &mut dx.dq,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        dg: match (&mut dx.dg, &mut dx.dg_logits) {
            (Some(dg), _) => GateGrads::Log(dg),
            (_, Some(dg)) => {
                GateGrads::Raw { dg, d_a_log: tensor(&mut dx.d_a_log), d_dt_bias: tensor(&mut dx.d_dt_bias) }
            }
            (None, None) => GateGrads::None,
        },
        dgk: tensor(&mut dx.dgk),
        dgv: tensor(&mut dx.dgv),
        dbeta: tensor(&mut dx.dbeta),
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

pub(crate) fn units(_: Arch) -> Vec<Unit> {
    let mut out = vec![output_unit::<f32>(), output_unit::<bf16>(), output_unit::<f16>()];
    for (k, v) in [(64, 64), (128, 128), (256, 512), (60, 100), (33, 65)] {
        for (i, forms) in FORMS.iter().enumerate() {
            // What is usual in every type, the rest for one head.
            if i > 1 && k != 64 {
                continue;
            }
            out.push(any_unit::<bf16>(k, v, forms));
            if i == 0 {
                out.push(any_unit::<f32>(k, v, forms));
                out.push(any_unit::<f16>(k, v, forms));
            }
        }
    }
    out.push(any_unit::<bf16>(128, 128, &VALUE_MAJOR));
    out
}

/// The kernel for heads of K by V; how many sequences there are does not change it.
fn any_unit<T: Element>(k: usize, v: usize, forms: &Forms) -> Unit {
    let tile = StateTile { dtype: T::DTYPE, state: DType::F32, k, v };
    let walk = WalkBack::new(&tile, &fla_core::SeqLens::dense(1, 1), 1, 1).expect("lengths are known");
    unit::<T>(&tile, &walk, forms)
}

fn unit<T: Element>(tile: &StateTile, walk: &WalkBack, forms: &Forms) -> Unit {
    let unit = Unit::new::<RecurrentBwdParams<T>>("gated_delta", "recurrent_bwd", SOURCE, walk.threads());
    // All of these are below 2^31: `new` has checked K and V.
    with_forms(unit, tile, forms)
        .with_smem_bytes(smem_bytes(tile, walk, forms))
        .with("LANES_V", walk.lanes_v as i32)
        .with("WARPS", walk.warps as i32)
        .with("SCRATCH_ELEMS", walk.scratch_elems as i32)
}

/// Size of the kernel's shared memory; the unit compares it with the kernel's own.
fn smem_bytes(tile: &StateTile, walk: &WalkBack, forms: &Forms) -> u32 {
    let rows = tile.rows(walk.lanes_v) * (32 / walk.lanes_v);
    // dq and dk, and dgk; dg and dbeta.
    let vectors = if forms.rows() { 3 } else { 2 };
    (2 * walk.warps * (vectors * rows + 2) * size_of::<f32>()) as u32
}

fn output_unit<T: Element>() -> Unit {
    let threads = 32 * OUTPUT_WARPS as u32;
    Unit::new::<RecurrentBwdOutputParams<T>>("gated_delta", "recurrent_bwd_output", SOURCE_OUTPUT, threads)
        .with("Element", T::DTYPE)
        .with("WARPS", OUTPUT_WARPS as i32)
}

/// Twin of `fla::gated_delta::RecurrentBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentBwdParams<T> {
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
    initial_state: Ptr<f32>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dg: PtrMut<f32>,
    dgk: PtrMut<f32>,
    dgv: PtrMut<f32>,
    dbeta: PtrMut<T>,
    d_initial_state: PtrMut<f32>,
    scratch: PtrMut<f32>,
    qk_partial: PtrMut<f32>,
    beta_partial: PtrMut<f32>,
    n: i64,
    t: i64,
    segment: i64,
    scratch_states: i64,
    qk_len: i64,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for RecurrentBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::RecurrentBwdParams<Cfg::Element>";
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
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dg", "float*", offset_of!(Self, dg)),
        Field::new("dgk", "float*", offset_of!(Self, dgk)),
        Field::new("dgv", "float*", offset_of!(Self, dgv)),
        Field::new("dbeta", "Cfg::Element*", offset_of!(Self, dbeta)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("scratch", "float*", offset_of!(Self, scratch)),
        Field::new("qk_partial", "float*", offset_of!(Self, qk_partial)),
        Field::new("beta_partial", "float*", offset_of!(Self, beta_partial)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("segment", "fla::i64", offset_of!(Self, segment)),
        Field::new("scratch_states", "fla::i64", offset_of!(Self, scratch_states)),
        Field::new("qk_len", "fla::i64", offset_of!(Self, qk_len)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::gated_delta::RecurrentBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentBwdOutputParams<T> {
    g_logit: Ptr<T>,
    a_log: Ptr<f32>,
    dt_bias: Ptr<f32>,
    dg: Ptr<f32>,
    d_logit: PtrMut<T>,
    d_a_log: PtrMut<f32>,
    d_dt_bias: PtrMut<f32>,
    rows: i64,
    hv: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for RecurrentBwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::RecurrentBwdOutputParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("g_logit", "const Cfg::Element*", offset_of!(Self, g_logit)),
        Field::new("a_log", "const float*", offset_of!(Self, a_log)),
        Field::new("dt_bias", "const float*", offset_of!(Self, dt_bias)),
        Field::new("dg", "const float*", offset_of!(Self, dg)),
        Field::new("d_logit", "Cfg::Element*", offset_of!(Self, d_logit)),
        Field::new("d_a_log", "float*", offset_of!(Self, d_a_log)),
        Field::new("d_dt_bias", "float*", offset_of!(Self, d_dt_bias)),
        Field::new("rows", "fla::i64", offset_of!(Self, rows)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Element, FORMS, VALUE_MAJOR, any_unit, bf16};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    fn failures<T: Element>() -> Vec<String> {
        // Heads whose rows end anywhere: within an access, within a lane, within a warp.
        let heads =
            [(128, 128), (65, 64), (1, 1), (7, 20), (33, 64), (64, 95), (100, 72), (200, 20), (256, 512)];
        let units = heads.iter().enumerate().flat_map(|(i, (k, v))| {
            // Every option where rows end in the middle and where they do not, the usual ones everywhere.
            let forms = if i < 2 { &FORMS[..] } else { &FORMS[1..2] };
            forms.iter().chain([&VALUE_MAJOR]).map(|forms| any_unit::<T>(*k, *v, forms))
        });
        units.filter_map(|unit| compile(&unit, Arch::SM_90).err()).map(|error| error.to_string()).collect()
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        let failures = [failures::<f32>(), failures::<bf16>()].concat();
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}

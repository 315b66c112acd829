//! The recurrent backward pass: gradients from the inputs alone, token by token.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};
use fla_core::{
    Arch, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, Source, Unit, Workspace,
    check_len,
};
use half::{bf16, f16};

use crate::chunk_bwd::{ChunkBwdOutputParams, check_align, unit_output};
use crate::chunk_fwd::{COMMON_C, OTHER_C, grid};
use crate::config;
use crate::shape::Shape;

const SOURCE: Source =
    Source { name: "fla/rwkv4/recurrent_bwd.cu", text: include_str!("../kernels/recurrent_bwd.cu") };
const HEADERS: &[Source] = &[
    Source { name: "fla/rwkv4/average.cuh", text: include_str!("../kernels/average.cuh") },
    Source { name: "fla/rwkv4/tape.cuh", text: include_str!("../kernels/tape.cuh") },
];

/// Tokens between two states in the workspace.
const STEPS: usize = 16;

/// What may be changed; nothing yet.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentBwdOptions {}

impl RecurrentBwdOptions {
    /// The options; RWKV-4 asks for none.
    #[must_use]
    #[allow(
        clippy::new_without_default,
        reason = "options have no default: one without a safe value may be added"
    )]
    pub const fn new() -> Self {
        Self {}
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdInputs<'a, T> {
    /// Raw decay: `[C]`.
    pub w: &'a dyn DevicePtr<f32>,
    /// Bonus of the current token, in log space: `[C]`.
    pub u: &'a dyn DevicePtr<f32>,
    /// Keys, which are log weights: `[B, T, C]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, C]`.
    pub v: &'a dyn DevicePtr<T>,
    /// State before the first token of each sequence, or the fresh state when absent: `[N, 3, 1, C]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Gradient of `o`: `[B, T, C]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, 3, 1, C]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
    /// Offsets of the sequences, for [`SeqLens::packed_on_device`](fla_core::SeqLens::packed_on_device) only: `[N + 1]`.
    pub cu_seqlens: Option<&'a dyn DevicePtr<i64>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdOutputs<'a, T> {
    /// Gradient of `w`, the factor of exp(-exp(w)) included: `[C]`.
    pub dw: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `u`: `[C]`.
    pub du: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `k`: `[B, T, C]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, C]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of the initial state, when wanted; that at the fresh state when there was none: `[N, 3, 1, C]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct RecurrentBwdResult<T> {
    /// Gradient of `w`: `[C]`.
    pub dw: CudaSlice<f32>,
    /// Gradient of `u`: `[C]`.
    pub du: CudaSlice<f32>,
    /// Gradient of `k`: `[B, T, C]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, C]`.
    pub dv: CudaSlice<T>,
    /// Gradient of the initial state: `[N, 3, 1, C]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// Gradients of [`RecurrentFwd`](crate::RecurrentFwd) and of [`ChunkFwd`](crate::ChunkFwd), made once for a shape and run
/// many times.
///
/// The equations, the tensors and the numerics are those of [`ChunkBwd`](crate::ChunkBwd). This pass asks for nothing that
/// a forward pass kept, and takes lengths that only the device knows; it has one thread for each channel of a sequence, so
/// it is the pass for many short sequences, and `ChunkBwd` is the one for long ones.
///
/// | tensor                  | shape           | dtype | meaning                                             |
/// |-------------------------|-----------------|-------|-----------------------------------------------------|
/// | `w`, `u`                | `[C]`           | f32   | raw decay, bonus of the current token               |
/// | `k`, `v`                | `[B, T, C]`     | `T`   | keys, values                                        |
/// | `initial_state`         | `[N, 3, 1, C]`  | f32   | optional; (0, 0, -1e38) when absent                 |
/// | `d_o`                   | `[B, T, C]`     | `T`   | gradient of the outputs                             |
/// | `d_final_state`         | `[N, 3, 1, C]`  | f32   | optional; zero when absent                          |
/// | `cu_seqlens`            | `[N + 1]`       | i64   | only where the host does not know the lengths       |
/// | `dw`, `du` (out)        | `[C]`           | f32   | summed over all tokens of all sequences             |
/// | `dk`, `dv` (out)        | `[B, T, C]`     | `T`   |                                                     |
/// | `d_initial_state` (out) | `[N, 3, 1, C]`  | f32   | optional                                            |
///
/// The error against the float64 recurrence stays under the rows `rwkv4, recurrent_bwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.
#[derive(Debug)]
pub struct RecurrentBwd<T> {
    kernel: Kernel<RecurrentBwdParams<T>>,
    output: Kernel<ChunkBwdOutputParams>,
    shape: Shape,
    cu_seqlens: Option<CudaSlice<i64>>,
    /// Groups of sequences, whose sums of `dw` and `du` are in the workspace.
    groups: usize,
    /// None when there is nothing to launch but the sums of nothing.
    grid: Option<Grid>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentBwd<bf16>>();

impl<T: Element> RecurrentBwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when C is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`] or
    /// [`Error::OutOfMemory`] when the kernels cannot be had.
    pub fn new(device: &Device, shape: &Shape, _options: &RecurrentBwdOptions) -> Result<Self, Error> {
        shape.check()?;
        let blocks_c = shape.c.div_ceil(32);
        let groups = config::groups(shape.seqs.n(), blocks_c);
        tracing::debug!(c = shape.c, groups, "rwkv4 recurrent_bwd");
        Ok(Self {
            grid: grid(groups, blocks_c)?,
            kernel: device.kernel(&unit::<T>(shape.c))?,
            output: device.kernel(&unit_output())?,
            shape: shape.clone(),
            cu_seqlens: shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?,
            groups,
        })
    }

    /// Bytes of the workspace that [`RecurrentBwd::run`] asks for: 0.75 bytes for each token and channel, and a little.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let parts = [self.partials_len(), self.runs_len()];
        Workspace::bytes(&parts.map(|len| len.saturating_mul(size_of::<f32>())))
    }

    fn partials_len(&self) -> usize {
        self.groups.saturating_mul(2 * self.shape.c)
    }

    fn runs_len(&self) -> usize {
        let Shape { seqs, c } = &self.shape;
        // Every sequence has at most one run that is not whole, wherever its tokens start.
        let runs = (seqs.b().saturating_mul(seqs.t()) / STEPS).saturating_add(seqs.n()).saturating_add(2);
        runs.saturating_mul(3).saturating_mul(*c)
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`RecurrentBwd::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`], [`Error::Align`] and [`Error::Presence`], which name the tensor; [`Error::Context`] when the
    /// stream belongs to another context; nothing has been launched then. [`Error::Driver`] when a launch is refused.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentBwdInputs<'_, T>,
        dx: &mut RecurrentBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        for (name, len) in [("w", x.w.len()), ("u", x.u.len()), ("dw", dx.dw.len()), ("du", dx.du.len())] {
            check_len(name, "[C]", shape.c, len)?;
        }
        let tokens = [
            ("k", x.k.len()),
            ("v", x.v.len()),
            ("d_o", x.d_o.len()),
            ("dk", dx.dk.len()),
            ("dv", dx.dv.len()),
        ];
        for (name, len) in tokens {
            check_len(name, "[B, T, C]", shape.token_len(), len)?;
        }
        let states = [
            ("initial_state", x.initial_state.map(DeviceSlice::len)),
            ("d_final_state", x.d_final_state.map(DeviceSlice::len)),
            ("d_initial_state", dx.d_initial_state.as_ref().map(|state| state.len())),
        ];
        for (name, len) in states {
            check_len(name, "[N, 3, 1, C]", shape.state_len(), len.unwrap_or(shape.state_len()))?;
        }
        shape.seqs.check_cu_seqlens(x.cu_seqlens.map(DeviceSlice::len))?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.partials_len())?;
        let mut runs = workspace.take::<f32>(self.runs_len())?;
        // The second launch binds these, when the first has been queued.
        check_align("dw", stream, &mut *dx.dw)?;
        check_align("du", stream, &mut *dx.du)?;
        if let Some(grid) = self.grid {
            self.kernel.launch(stream, grid, |bind| RecurrentBwdParams {
                w: bind.read("w", x.w),
                u: bind.read("u", x.u),
                k: bind.read("k", x.k),
                v: bind.read("v", x.v),
                initial_state: bind.read_opt("initial_state", x.initial_state),
                d_o: bind.read("d_o", x.d_o),
                d_final_state: bind.read_opt("d_final_state", x.d_final_state),
                cu_seqlens: match x.cu_seqlens {
                    Some(offsets) => bind.read("cu_seqlens", offsets),
                    None => bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
                },
                dk: bind.write("dk", &mut *dx.dk),
                dv: bind.write("dv", &mut *dx.dv),
                d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
                partials: bind.write("workspace", &mut partials),
                runs: bind.write("workspace", &mut runs),
                n: shape.seqs.n() as i64,
                t: shape.seqs.t() as i64,
            })?;
        }
        self.output.launch(stream, Grid::x(shape.c.div_ceil(32) as u32), |bind| ChunkBwdOutputParams {
            w: bind.read("w", x.w),
            partials: bind.read("workspace", &partials),
            dw: bind.write("dw", &mut *dx.dw),
            du: bind.write("du", &mut *dx.du),
            groups: self.groups as i64,
            c: shape.c as i64,
        })
    }
}

/// Makes the plan, allocates outputs and workspace and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`RecurrentBwd::new`] and [`RecurrentBwd::run`].
pub fn recurrent_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &RecurrentBwdInputs<'_, T>,
    options: &RecurrentBwdOptions,
) -> Result<RecurrentBwdResult<T>, Error> {
    let plan = RecurrentBwd::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut dx = RecurrentBwdResult {
        dw: device.alloc(&stream, shape.c)?,
        du: device.alloc(&stream, shape.c)?,
        dk: device.alloc(&stream, shape.token_len())?,
        dv: device.alloc(&stream, shape.token_len())?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = RecurrentBwdOutputs {
        dw: &mut dx.dw,
        du: &mut dx.du,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

pub(crate) fn units(_arch: Arch) -> Vec<Unit> {
    let mut out: Vec<Unit> = COMMON_C.iter().map(|&c| unit::<bf16>(c)).collect();
    out.extend(OTHER_C.iter().map(|&c| unit::<f32>(c)));
    out.push(unit::<f16>(OTHER_C[0]));
    out
}

fn unit<T: Element>(c: usize) -> Unit {
    // Below 2^31: `new` has checked C.
    Unit::new::<RecurrentBwdParams<T>>("rwkv4", "recurrent_bwd", SOURCE, 32)
        .with_headers(HEADERS)
        .with("Element", T::DTYPE)
        .with("C", c as i32)
        .with("STEPS", STEPS as i32)
}

/// Twin of `fla::rwkv4::RecurrentBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentBwdParams<T> {
    w: Ptr<f32>,
    u: Ptr<f32>,
    k: Ptr<T>,
    v: Ptr<T>,
    initial_state: Ptr<f32>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    d_initial_state: PtrMut<f32>,
    partials: PtrMut<f32>,
    runs: PtrMut<f32>,
    n: i64,
    t: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for RecurrentBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv4::RecurrentBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("w", "const float*", offset_of!(Self, w)),
        Field::new("u", "const float*", offset_of!(Self, u)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("runs", "float*", offset_of!(Self, runs)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
    ];
}

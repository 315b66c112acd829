//! The chunk backward pass: gradients tile by tile, from the states that the forward pass kept.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    ALIGN_BYTES, Arch, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, Source, Unit,
    Workspace, check_len,
};
use half::{bf16, f16};

use crate::chunk_fwd::{COMMON_C, OTHER_C, grid};
use crate::config::{self, Tiling};
use crate::shape::{Offsets, Shape};

const SOURCE: Source =
    Source { name: "fla/rwkv4/chunk_bwd.cu", text: include_str!("../kernels/chunk_bwd.cu") };
const SOURCE_OUTPUT: Source =
    Source { name: "fla/rwkv4/chunk_bwd_output.cu", text: include_str!("../kernels/chunk_bwd_output.cu") };
const HEADERS: &[Source] = &[
    Source { name: "fla/rwkv4/average.cuh", text: include_str!("../kernels/average.cuh") },
    Source { name: "fla/rwkv4/tape.cuh", text: include_str!("../kernels/tape.cuh") },
];

/// What may be changed; nothing yet.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkBwdOptions {}

impl ChunkBwdOptions {
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
pub struct ChunkBwdInputs<'a, T> {
    /// Raw decay: `[C]`.
    pub w: &'a dyn DevicePtr<f32>,
    /// Bonus of the current token, in log space: `[C]`.
    pub u: &'a dyn DevicePtr<f32>,
    /// Keys, which are log weights: `[B, T, C]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, C]`.
    pub v: &'a dyn DevicePtr<T>,
    /// What [`ChunkFwd`](crate::ChunkFwd) wrote as `states` for the same inputs; the initial state is among them: `[NT, 3, 1, C]`.
    pub states: &'a dyn DevicePtr<f32>,
    /// Gradient of `o`: `[B, T, C]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, 3, 1, C]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdOutputs<'a, T> {
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
pub struct ChunkBwdResult<T> {
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

/// Gradients of [`ChunkFwd`](crate::ChunkFwd), made once for a shape and run many times.
///
/// With l = -exp(w), and D_t the denominator of o_t:
///
/// ```text
/// h_t = do_t / D_t        P_{t-1} = e^l P_t + h_t        R_{t-1} = e^l R_t - h_t o_t
/// dv_t = e^{k_t} P_t + e^{u + k_t} h_t
/// dk_t = e^{k_t} (v_t P_t + R_t) + e^{u + k_t} h_t (v_t - o_t)
/// du = sum_t e^{u + k_t} h_t (v_t - o_t)        dw = l sum_t e^l (A_{t-1} P_t + B_{t-1} R_t)
/// ```
///
/// | tensor                  | shape           | dtype | meaning                                             |
/// |-------------------------|-----------------|-------|-----------------------------------------------------|
/// | `w`, `u`                | `[C]`           | f32   | raw decay, bonus of the current token               |
/// | `k`, `v`                | `[B, T, C]`     | `T`   | keys, values                                        |
/// | `states`                | `[NT, 3, 1, C]` | f32   | what the forward pass kept                          |
/// | `d_o`                   | `[B, T, C]`     | `T`   | gradient of the outputs                             |
/// | `d_final_state`         | `[N, 3, 1, C]`  | f32   | optional; zero when absent                          |
/// | `dw`, `du` (out)        | `[C]`           | f32   | summed over all tokens of all sequences             |
/// | `dk`, `dv` (out)        | `[B, T, C]`     | `T`   |                                                     |
/// | `d_initial_state` (out) | `[N, 3, 1, C]`  | f32   | optional                                            |
///
/// The state is a triple (a, b, e), and all three have gradients. Those of a and b are for a fixed e. That of the final e
/// goes to whatever set it: the key whose decayed weight it is, or the initial state; a key that equals the decayed
/// exponent wins. Outputs depend on a exp(e) and b exp(e) only, so a loss of outputs needs none of this.
///
/// # Numerics
///
/// As in the forward pass; no factor on the way back exceeds 1, so nothing overflows that is finite in the end. `dw` and
/// `du` are summed by run, tile, sequence and group in a fixed order: the same inputs give the same bits on the same GPU.
/// The error stays under the rows `rwkv4, chunk_bwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.
#[derive(Debug)]
pub struct ChunkBwd<T> {
    kernel: Kernel<ChunkBwdParams<T>>,
    output: Kernel<ChunkBwdOutputParams>,
    shape: Shape,
    offsets: Option<Offsets>,
    /// Groups of sequences, whose sums of `dw` and `du` are in the workspace.
    groups: usize,
    /// None when there is nothing to launch but the sums of nothing.
    grid: Option<Grid>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkBwd<bf16>>();

impl<T: Element> ChunkBwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when C is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`] or
    /// [`Error::OutOfMemory`] when the kernels cannot be had.
    pub fn new(device: &Device, shape: &Shape, _options: &ChunkBwdOptions) -> Result<Self, Error> {
        shape.check()?;
        let tiling = config::chunk_bwd(shape, device.sm_count());
        let blocks_c = tiling.blocks_c(shape.c);
        let groups = config::groups(shape.seqs.n(), blocks_c);
        tracing::debug!(c = shape.c, ?tiling, groups, "rwkv4 chunk_bwd");
        Ok(Self {
            grid: grid(groups, blocks_c)?,
            kernel: device.kernel(&unit::<T>(shape.c, tiling))?,
            output: device.kernel(&unit_output())?,
            shape: shape.clone(),
            offsets: Offsets::new(device, &shape.seqs)?,
            groups,
        })
    }

    /// Bytes of the workspace that [`ChunkBwd::run`] asks for.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        Workspace::bytes(&[self.partials_len().saturating_mul(size_of::<f32>())])
    }

    fn partials_len(&self) -> usize {
        self.groups.saturating_mul(2 * self.shape.c)
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`ChunkBwd::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream belongs to
    /// another context; nothing has been launched then. [`Error::Driver`] when a launch is refused.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
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
        check_len("states", "[NT, 3, 1, C]", shape.states_len(), x.states.len())?;
        if let Some(state) = x.d_final_state {
            check_len("d_final_state", "[N, 3, 1, C]", shape.state_len(), state.len())?;
        }
        if let Some(state) = &dx.d_initial_state {
            check_len("d_initial_state", "[N, 3, 1, C]", shape.state_len(), state.len())?;
        }
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.partials_len())?;
        // The second launch binds these, when the first has been queued.
        check_align("dw", stream, &mut *dx.dw)?;
        check_align("du", stream, &mut *dx.du)?;
        if let Some(grid) = self.grid {
            self.kernel.launch(stream, grid, |bind| ChunkBwdParams {
                w: bind.read("w", x.w),
                u: bind.read("u", x.u),
                k: bind.read("k", x.k),
                v: bind.read("v", x.v),
                states: bind.read("states", x.states),
                d_o: bind.read("d_o", x.d_o),
                d_final_state: bind.read_opt("d_final_state", x.d_final_state),
                cu_seqlens: bind
                    .read_opt("cu_seqlens", self.offsets.as_ref().map(|offsets| &offsets.cu_seqlens)),
                chunk_offsets: bind
                    .read_opt("chunk_offsets", self.offsets.as_ref().map(|offsets| &offsets.chunks)),
                dk: bind.write("dk", &mut *dx.dk),
                dv: bind.write("dv", &mut *dx.dv),
                d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
                partials: bind.write("workspace", &mut partials),
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
/// As [`ChunkBwd::new`] and [`ChunkBwd::run`].
pub fn chunk_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &ChunkBwdInputs<'_, T>,
    options: &ChunkBwdOptions,
) -> Result<ChunkBwdResult<T>, Error> {
    let plan = ChunkBwd::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut dx = ChunkBwdResult {
        dw: device.alloc(&stream, shape.c)?,
        du: device.alloc(&stream, shape.c)?,
        dk: device.alloc(&stream, shape.token_len())?,
        dv: device.alloc(&stream, shape.token_len())?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = ChunkBwdOutputs {
        dw: &mut dx.dw,
        du: &mut dx.du,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

/// Refuses a tensor that a launch would refuse.
pub(crate) fn check_align(
    tensor: &'static str,
    stream: &CudaStream,
    memory: &mut dyn DevicePtrMut<f32>,
) -> Result<(), Error> {
    let (got, _guard) = memory.device_ptr_mut(stream);
    if got.is_multiple_of(ALIGN_BYTES as u64) {
        return Ok(());
    }
    Err(Error::Align { tensor, wanted: ALIGN_BYTES, got })
}

pub(crate) fn units(_arch: Arch) -> Vec<Unit> {
    let mut out = vec![unit_output()];
    for tiling in config::tilings() {
        out.extend(COMMON_C.iter().map(|&c| unit::<bf16>(c, tiling)));
        out.extend(OTHER_C.iter().map(|&c| unit::<f32>(c, tiling)));
        out.push(unit::<f16>(OTHER_C[0], tiling));
    }
    out
}

#[cfg(test)]
pub(crate) fn any_units(c: usize, tiling: Tiling) -> [Unit; 2] {
    [unit::<f32>(c, tiling), unit::<bf16>(c, tiling)]
}

fn unit<T: Element>(c: usize, tiling: Tiling) -> Unit {
    // All of these are below 2^31: `new` has checked C.
    Unit::new::<ChunkBwdParams<T>>("rwkv4", "chunk_bwd", SOURCE, tiling.threads())
        .with_headers(HEADERS)
        .with("Element", T::DTYPE)
        .with("C", c as i32)
        .with("CHANNELS", tiling.channels as i32)
        .with("SLOTS", tiling.slots as i32)
        .with("STEPS", tiling.steps as i32)
}

/// Groups that are summed side by side: enough for the few thousand that there are at most.
const OUTPUT_ROWS: i32 = 16;

pub(crate) fn unit_output() -> Unit {
    Unit::new::<ChunkBwdOutputParams>("rwkv4", "chunk_bwd_output", SOURCE_OUTPUT, 32 * OUTPUT_ROWS as u32)
        .with_headers(HEADERS)
        .with("ROWS", OUTPUT_ROWS)
}

/// Twin of `fla::rwkv4::ChunkBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdParams<T> {
    w: Ptr<f32>,
    u: Ptr<f32>,
    k: Ptr<T>,
    v: Ptr<T>,
    states: Ptr<f32>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    d_initial_state: PtrMut<f32>,
    partials: PtrMut<f32>,
    n: i64,
    t: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv4::ChunkBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("w", "const float*", offset_of!(Self, w)),
        Field::new("u", "const float*", offset_of!(Self, u)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("states", "const float*", offset_of!(Self, states)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
    ];
}

/// Twin of `fla::rwkv4::ChunkBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkBwdOutputParams {
    pub(crate) w: Ptr<f32>,
    pub(crate) partials: Ptr<f32>,
    pub(crate) dw: PtrMut<f32>,
    pub(crate) du: PtrMut<f32>,
    pub(crate) groups: i64,
    pub(crate) c: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for ChunkBwdOutputParams {
    const CUDA_TYPE: &'static str = "fla::rwkv4::ChunkBwdOutputParams";
    const FIELDS: &'static [Field] = &[
        Field::new("w", "const float*", offset_of!(Self, w)),
        Field::new("partials", "const float*", offset_of!(Self, partials)),
        Field::new("dw", "float*", offset_of!(Self, dw)),
        Field::new("du", "float*", offset_of!(Self, du)),
        Field::new("groups", "fla::i64", offset_of!(Self, groups)),
        Field::new("c", "fla::i64", offset_of!(Self, c)),
    ];
}

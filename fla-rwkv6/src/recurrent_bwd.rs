//! The recurrent backward pass: gradients token by token, with any decay exact.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, Shape, Source, StateTile,
    Unit, WalkBack, Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::Direction;
use crate::chunk_fwd::PARTS;
use crate::recurrent_fwd::{MAX_K, MAX_V, RecurrentFwdOptions};

const SOURCE: Source =
    Source { name: "fla/rwkv6/recurrent_bwd.cu", text: include_str!("../kernels/recurrent_bwd.cu") };
const OUTPUT_SOURCE: Source = Source {
    name: "fla/rwkv6/recurrent_bwd_output.cu",
    text: include_str!("../kernels/recurrent_bwd_output.cu"),
};

/// Threads of a block of the second launch.
const OUTPUT_THREADS: u32 = 256;

/// Gradients over K, which are added up over the columns of a state: of r, k and w.
const K_GRADS: usize = 3;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdInputs<'a, T> {
    /// Receptance, the query: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0: `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Bonus of the current token: `[H, K]`.
    pub u: &'a dyn DevicePtr<T>,
    /// State that the forward pass has started from, or zero when absent: `[N, H, K, V]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Gradient of the outputs: `[B, T, H, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, H, K, V]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdOutputs<'a, T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `w`, the log decay: `[B, T, H, K]`.
    pub dw: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `u`, over all tokens of all sequences: `[H, K]`.
    pub du: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of the initial state, when wanted: `[N, H, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct RecurrentBwdResult<T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `w`, the log decay: `[B, T, H, K]`.
    pub dw: CudaSlice<T>,
    /// Gradient of `u`: `[H, K]`.
    pub du: CudaSlice<f32>,
    /// Gradient of the initial state: `[N, H, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// The recurrent backward pass of RWKV-6, made once for a shape and run many times.
///
/// With `S_t` as in [`RecurrentFwd`](crate::RecurrentFwd), and from the token that was visited last to the first:
///
/// ```text
/// dr_t = scale (S_{t-1} + diag(u) k_t v_t^T) d_o_t
/// dk_t = dS_t v_t + scale (d_o_t . v_t) u r_t
/// dv_t = dS_t^T k_t + scale (sum_k r_t u k_t) d_o_t
/// dw_t = e^{w_t} sum_v S_{t-1} dS_t
/// du   = sum_t scale (d_o_t . v_t) r_t k_t
/// dS_{t-1} = diag(e^{w_t}) dS_t + scale r_t d_o_t^T
/// ```
///
/// | tensor                           | shape          | dtype | meaning                                     |
/// |----------------------------------|----------------|-------|---------------------------------------------|
/// | `r`, `k`                         | `[B, T, H, K]` | `T`   | receptance (the query), keys                |
/// | `v`, `d_o`                       | `[B, T, H, V]` | `T`   | values, gradient of the outputs             |
/// | `w`                              | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0          |
/// | `u`                              | `[H, K]`       | `T`   | bonus                                       |
/// | `initial_state`, `d_final_state` | `[N, H, K, V]` | f32   | optional; zero when absent                  |
/// | `dr`, `dk`, `dw` (out)           | `[B, T, H, K]` | `T`   | gradients                                   |
/// | `dv` (out)                       | `[B, T, H, V]` | `T`   | gradient of the values                      |
/// | `du` (out)                       | `[H, K]`       | f32   | gradient of the bonus, over all sequences   |
/// | `d_initial_state` (out)          | `[N, H, K, V]` | f32   | optional                                    |
///
/// `du` is f32 whatever the vectors are: it is the sum of as many terms as there are tokens, on its way to a parameter.
/// `T`, K, V and [`Direction`] are as in the forward pass. Lengths have to be known to the host.
///
/// Nothing of the forward pass has to be kept: a block walks forward once more, keeps about the root of T states, and
/// walks every segment between them again on its way back. The pass is for exact gradients of short sequences and few
/// heads; long ones belong to a chunk pass.
///
/// # Numerics
///
/// Everything is widened to f32. `dw` is the product of the state and its gradient at that token, and no difference of
/// larger sums, so it is as exact as the others under any decay and in both directions. Sums are taken in a fixed order:
/// the same inputs give the same bits. The error against the float64 recurrence stays under the rows
/// `rwkv6, recurrent_bwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892; the gradients
/// are its transpose, step by step.
#[derive(Debug)]
pub struct RecurrentBwd<T> {
    kernel: Kernel<RecurrentBwdParams<T>>,
    output: Kernel<RecurrentBwdOutputParams>,
    shape: Shape,
    cu_seqlens: Option<CudaSlice<i64>>,
    scale: f32,
    walk: WalkBack,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentBwd<bf16>>();

impl<T: Element> RecurrentBwd<T> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// As [`RecurrentFwd::new`](crate::RecurrentFwd::new); [`Error::SeqLens`] when only the device knows the lengths.
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let scale = options.checked_scale()?;
        let states = shape.seqs.n().saturating_mul(shape.h);
        let tile = StateTile { dtype: T::DTYPE, state: DType::F32, k: shape.k, v: shape.v };
        let walk = WalkBack::new(&tile, &shape.seqs, states, device.sm_count())?;
        tracing::debug!(?tile, ?walk, "rwkv6 recurrent_bwd");
        let kernel = device.kernel(&unit::<T>(&tile, &walk, options.direction))?;
        let output = device.kernel(&output_unit())?;
        let cu_seqlens = shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?;
        Ok(Self { kernel, output, shape: shape.clone(), cu_seqlens, scale, walk })
    }

    /// Bytes of the workspace that a run needs: for every block about twice the root of the longest sequence in states.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let parts = [
            self.walk.scratch_len(),
            self.walk.partial_len(K_GRADS, self.shape.k_len()),
            self.du_parts_len(),
        ];
        Workspace::bytes(&parts.map(|len| len.saturating_mul(size_of::<f32>())))
    }

    /// Gradients of the bonus, one for each sequence: `[N, H, K]`.
    fn du_parts_len(&self) -> usize {
        self.shape.seqs.n().saturating_mul(self.shape.h).saturating_mul(self.shape.k)
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream belongs to
    /// another context; [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentBwdInputs<'_, T>,
        dx: &mut RecurrentBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let Shape { seqs, h, .. } = &self.shape;
        let (k_len, v_len, state_len) = (self.shape.k_len(), self.shape.v_len(), self.shape.state_len());
        for (name, len) in [
            ("r", x.r.len()),
            ("k", x.k.len()),
            ("w", x.w.len()),
            ("dr", dx.dr.len()),
            ("dk", dx.dk.len()),
            ("dw", dx.dw.len()),
        ] {
            check_len(name, "[B, T, H, K]", k_len, len)?;
        }
        for (name, len) in [("v", x.v.len()), ("d_o", x.d_o.len()), ("dv", dx.dv.len())] {
            check_len(name, "[B, T, H, V]", v_len, len)?;
        }
        let u_len = h.saturating_mul(self.shape.k);
        check_len("u", "[H, K]", u_len, x.u.len())?;
        check_len("du", "[H, K]", u_len, dx.du.len())?;
        for (name, len) in [
            ("initial_state", x.initial_state.map(|s| s.len())),
            ("d_final_state", x.d_final_state.map(|s| s.len())),
            ("d_initial_state", dx.d_initial_state.as_ref().map(|s| s.len())),
        ] {
            check_len(name, "[N, H, K, V]", state_len, len.unwrap_or(state_len))?;
        }
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut scratch = workspace.take::<f32>(self.walk.scratch_len())?;
        let mut partial = workspace.take::<f32>(self.walk.partial_len(K_GRADS, k_len))?;
        let mut du_parts = workspace.take::<f32>(self.du_parts_len())?;
        // The second launch binds it, when the first has been queued.
        check_align("du", dx.du.device_ptr_mut(stream).0)?;
        if self.walk.blocks > 0 {
            // As many as multiprocessors at most, times a few.
            let grid = Grid::x(self.walk.blocks as u32);
            self.kernel.launch(stream, grid, |bind| RecurrentBwdParams {
                r: bind.read("r", x.r),
                k: bind.read("k", x.k),
                v: bind.read("v", x.v),
                w: bind.read("w", x.w),
                u: bind.read("u", x.u),
                initial_state: bind.read_opt("initial_state", x.initial_state),
                d_o: bind.read("d_o", x.d_o),
                d_final_state: bind.read_opt("d_final_state", x.d_final_state),
                cu_seqlens: bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
                dr: bind.write("dr", &mut *dx.dr),
                dk: bind.write("dk", &mut *dx.dk),
                dv: bind.write("dv", &mut *dx.dv),
                dw: bind.write("dw", &mut *dx.dw),
                d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
                du_parts: bind.write("workspace", &mut du_parts),
                scratch: bind.write("workspace", &mut scratch),
                partial: bind.write("workspace", &mut partial),
                n: seqs.n() as i64,
                t: seqs.t() as i64,
                segment: self.walk.segment as i64,
                scratch_states: self.walk.scratch_states as i64,
                partial_len: k_len as i64,
                // `new` has checked that H fits.
                h: *h as i32,
                scale: self.scale,
            })?;
        }
        // `new` has checked that the blocks fit.
        let grid = Grid::x(u_len.div_ceil(OUTPUT_THREADS as usize) as u32);
        self.output.launch(stream, grid, |bind| RecurrentBwdOutputParams {
            du_parts: bind.read("workspace", &du_parts),
            du: bind.write("du", &mut *dx.du),
            n: seqs.n() as i64,
            hk: u_len as i64,
        })
    }
}

/// Makes the plan, allocates gradients and workspace and runs, on the stream of `r`.
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
    let stream: Arc<CudaStream> = x.r.stream().clone();
    let over_k = || device.alloc::<T>(&stream, shape.k_len());
    let mut dx = RecurrentBwdResult {
        dr: over_k()?,
        dk: over_k()?,
        dv: device.alloc(&stream, shape.v_len())?,
        dw: over_k()?,
        du: device.alloc(&stream, shape.h.saturating_mul(shape.k))?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = RecurrentBwdOutputs {
        dr: &mut dx.dr,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        dw: &mut dx.dw,
        du: &mut dx.du,
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

pub(crate) fn units(_: Arch) -> Vec<Unit> {
    let mut out = vec![output_unit()];
    for (k, v) in [(64, 64), (128, 128), (256, 512), (60, 100), (33, 65)] {
        out.push(any_unit::<f32>(k, v, Direction::Forward));
        out.push(any_unit::<bf16>(k, v, Direction::Forward));
        out.push(any_unit::<f16>(k, v, Direction::Forward));
        if k == 64 {
            out.push(any_unit::<bf16>(k, v, Direction::Reverse));
        }
    }
    out
}

/// The kernel for heads of K by V; how many sequences there are does not change it.
fn any_unit<T: Element>(k: usize, v: usize, direction: Direction) -> Unit {
    let tile = StateTile { dtype: T::DTYPE, state: DType::F32, k, v };
    let walk = WalkBack::new(&tile, &fla_core::SeqLens::dense(1, 1), 1, 1).expect("lengths are known");
    unit::<T>(&tile, &walk, direction)
}

fn unit<T: Element>(tile: &StateTile, walk: &WalkBack, direction: Direction) -> Unit {
    // All of these are below 2^31: `new` has checked K and V.
    Unit::new::<RecurrentBwdParams<T>>("rwkv6", "recurrent_bwd", SOURCE, walk.threads())
        .with_smem_bytes(smem_bytes(tile, walk))
        .with("Element", T::DTYPE)
        .with("State", DType::F32)
        .with("K", tile.k as i32)
        .with("V", tile.v as i32)
        .with("LANES_V", walk.lanes_v as i32)
        .with("WARPS", walk.warps as i32)
        .with("SCRATCH_ELEMS", walk.scratch_elems as i32)
        .with("REVERSE", direction == Direction::Reverse)
}

fn output_unit() -> Unit {
    Unit::new::<RecurrentBwdOutputParams>("rwkv6", "recurrent_bwd_output", OUTPUT_SOURCE, OUTPUT_THREADS)
        .with_headers(PARTS)
        .with("THREADS", OUTPUT_THREADS as i32)
}

/// Size of the kernel's shared memory; the unit compares it with the kernel's own.
fn smem_bytes(tile: &StateTile, walk: &WalkBack) -> u32 {
    let rows = tile.rows(walk.lanes_v) * (32 / walk.lanes_v);
    (2 * walk.warps * (K_GRADS + 1) * rows * size_of::<f32>()) as u32
}

/// Twin of `fla::rwkv6::RecurrentBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentBwdParams<T> {
    r: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    w: Ptr<T>,
    u: Ptr<T>,
    initial_state: Ptr<f32>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    dr: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dw: PtrMut<T>,
    d_initial_state: PtrMut<f32>,
    du_parts: PtrMut<f32>,
    scratch: PtrMut<f32>,
    partial: PtrMut<f32>,
    n: i64,
    t: i64,
    segment: i64,
    scratch_states: i64,
    partial_len: i64,
    h: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for RecurrentBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv6::RecurrentBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("w", "const Cfg::Element*", offset_of!(Self, w)),
        Field::new("u", "const Cfg::Element*", offset_of!(Self, u)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("dr", "Cfg::Element*", offset_of!(Self, dr)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dw", "Cfg::Element*", offset_of!(Self, dw)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("du_parts", "float*", offset_of!(Self, du_parts)),
        Field::new("scratch", "float*", offset_of!(Self, scratch)),
        Field::new("partial", "float*", offset_of!(Self, partial)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("segment", "fla::i64", offset_of!(Self, segment)),
        Field::new("scratch_states", "fla::i64", offset_of!(Self, scratch_states)),
        Field::new("partial_len", "fla::i64", offset_of!(Self, partial_len)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::rwkv6::RecurrentBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentBwdOutputParams {
    du_parts: Ptr<f32>,
    du: PtrMut<f32>,
    n: i64,
    hk: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for RecurrentBwdOutputParams {
    const CUDA_TYPE: &'static str = "fla::rwkv6::RecurrentBwdOutputParams";
    const FIELDS: &'static [Field] = &[
        Field::new("du_parts", "const float*", offset_of!(Self, du_parts)),
        Field::new("du", "float*", offset_of!(Self, du)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("hk", "fla::i64", offset_of!(Self, hk)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Direction, Element, any_unit, bf16, output_unit};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    fn failures<T: Element>() -> Vec<String> {
        // Heads whose rows end anywhere: within an access, within a lane, within a warp.
        let heads =
            [(1, 1), (7, 20), (33, 64), (64, 95), (65, 64), (100, 72), (128, 128), (200, 20), (256, 512)];
        let units = heads.iter().flat_map(|(k, v)| {
            [Direction::Forward, Direction::Reverse].map(|direction| any_unit::<T>(*k, *v, direction))
        });
        units
            .chain([output_unit()])
            .filter_map(|unit| compile(&unit, Arch::SM_90).err())
            .map(|error| error.to_string())
            .collect()
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

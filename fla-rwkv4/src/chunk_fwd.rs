//! The chunk forward pass: a scan over time whose runs of tokens are worked on side by side.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, Source, Unit, check_len,
};
use half::{bf16, f16};

use crate::config::{self, Tiling};
use crate::shape::{Offsets, Shape};

const SOURCE: Source =
    Source { name: "fla/rwkv4/chunk_fwd.cu", text: include_str!("../kernels/chunk_fwd.cu") };
const HEADERS: &[Source] =
    &[Source { name: "fla/rwkv4/average.cuh", text: include_str!("../kernels/average.cuh") }];

/// What may be changed; nothing yet.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkFwdOptions {}

impl ChunkFwdOptions {
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
pub struct ChunkFwdInputs<'a, T> {
    /// Raw decay: a token multiplies the sums before it by `exp(-exp(w))`: `[C]`.
    pub w: &'a dyn DevicePtr<f32>,
    /// Bonus of the current token, in log space: `[C]`.
    pub u: &'a dyn DevicePtr<f32>,
    /// Keys, which are log weights: `[B, T, C]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, C]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Numerator, denominator and exponent before the first token of each sequence, or the fresh state
    /// (0, 0, -1e38) when absent: `[N, 3, 1, C]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdOutputs<'a, T> {
    /// Outputs: `[B, T, C]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence, when wanted: `[N, 3, 1, C]`.
    pub final_state: Option<&'a mut dyn DevicePtrMut<f32>>,
    /// State before every [`CHUNK`](crate::CHUNK) tokens of each sequence, when wanted: `[NT, 3, 1, C]`. The gradients
    /// start from them, see [`ChunkBwd`](crate::ChunkBwd).
    pub states: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkFwdResult<T> {
    /// Outputs: `[B, T, C]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, 3, 1, C]`.
    pub final_state: CudaSlice<f32>,
    /// States for [`chunk_bwd`](crate::chunk_bwd): `[NT, 3, 1, C]`.
    pub states: CudaSlice<f32>,
}

/// The chunk forward pass of RWKV-4's time mixing, made once for a shape and run many times.
///
/// ```text
/// o_t = (A + e^{u + k_t} v_t) / (B + e^{u + k_t})
/// A  <- e^{-e^w} A + e^{k_t} v_t        B  <- e^{-e^w} B + e^{k_t}
/// ```
///
/// with the state (a, b, e) for A = a exp(e) and B = b exp(e), so that no key is too large:
///
/// | tensor              | shape           | dtype | meaning                                              |
/// |---------------------|-----------------|-------|------------------------------------------------------|
/// | `w`, `u`            | `[C]`           | f32   | raw decay, bonus of the current token                |
/// | `k`, `v`            | `[B, T, C]`     | `T`   | keys (log weights, natural base), values             |
/// | `initial_state`     | `[N, 3, 1, C]`  | f32   | optional; (0, 0, -1e38) when absent                  |
/// | `o` (out)           | `[B, T, C]`     | `T`   | outputs                                              |
/// | `final_state` (out) | `[N, 3, 1, C]`  | f32   | optional; a, b, e, the exponent in natural base      |
/// | `states` (out)      | `[NT, 3, 1, C]` | f32   | optional; the states before every 16 tokens         |
///
/// `T` is f32, bf16 or f16; C is any number up to 2^20, T any. A sequence without tokens hands its state through, bit by
/// bit.
///
/// # Numerics
///
/// Everything is widened to f32 and the sums never leave it, whatever `T` is; `o` is rounded once. The larger exponent of
/// two sums is always the one that both get, so keys of any size are right in any order, and so is a decay that leaves
/// nothing. The error against the float64 recurrence stays under the rows `rwkv4, chunk_fwd` of
/// `fla_reference::tolerance`. Sums are taken in a fixed order: the same inputs give the same bits on the same GPU.
///
/// # Source
///
/// Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.
#[derive(Debug)]
pub struct ChunkFwd<T> {
    kernel: Kernel<ChunkFwdParams<T>>,
    shape: Shape,
    offsets: Option<Offsets>,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkFwd<bf16>>();

impl<T: Element> ChunkFwd<T> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when C is 0 or too large, or there are too many sequences for a launch; [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &Shape, _options: &ChunkFwdOptions) -> Result<Self, Error> {
        shape.check()?;
        let tiling = config::chunk_fwd(shape, device.sm_count());
        tracing::debug!(c = shape.c, ?tiling, "rwkv4 chunk_fwd");
        let grid = grid(shape.seqs.n(), tiling.blocks_c(shape.c))?;
        let kernel = device.kernel(&unit::<T>(shape.c, tiling))?;
        let offsets = Offsets::new(device, &shape.seqs)?;
        Ok(Self { kernel, shape: shape.clone(), offsets, grid })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream belongs to
    /// another context; [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        y: &mut ChunkFwdOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_len("w", "[C]", shape.c, x.w.len())?;
        check_len("u", "[C]", shape.c, x.u.len())?;
        check_len("k", "[B, T, C]", shape.token_len(), x.k.len())?;
        check_len("v", "[B, T, C]", shape.token_len(), x.v.len())?;
        check_len("o", "[B, T, C]", shape.token_len(), y.o.len())?;
        if let Some(state) = x.initial_state {
            check_len("initial_state", "[N, 3, 1, C]", shape.state_len(), state.len())?;
        }
        if let Some(state) = &y.final_state {
            check_len("final_state", "[N, 3, 1, C]", shape.state_len(), state.len())?;
        }
        if let Some(states) = &y.states {
            check_len("states", "[NT, 3, 1, C]", shape.states_len(), states.len())?;
        }
        let Some(grid) = self.grid else { return Ok(()) };
        self.kernel.launch(stream, grid, |bind| ChunkFwdParams {
            w: bind.read("w", x.w),
            u: bind.read("u", x.u),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            initial_state: bind.read_opt("initial_state", x.initial_state),
            cu_seqlens: bind.read_opt("cu_seqlens", self.offsets.as_ref().map(|offsets| &offsets.cu_seqlens)),
            chunk_offsets: bind
                .read_opt("chunk_offsets", self.offsets.as_ref().map(|offsets| &offsets.chunks)),
            o: bind.write("o", &mut *y.o),
            final_state: bind.write_opt("final_state", y.final_state.as_deref_mut()),
            states: bind.write_opt("states", y.states.as_deref_mut()),
            t: shape.seqs.t() as i64,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`ChunkFwd::new`] and [`ChunkFwd::run`].
pub fn chunk_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &ChunkFwdInputs<'_, T>,
    options: &ChunkFwdOptions,
) -> Result<ChunkFwdResult<T>, Error> {
    let plan = ChunkFwd::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = ChunkFwdResult {
        o: device.alloc(&stream, shape.token_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
        states: device.alloc(&stream, shape.states_len())?,
    };
    let mut outputs =
        ChunkFwdOutputs { o: &mut y.o, final_state: Some(&mut y.final_state), states: Some(&mut y.states) };
    plan.run(&stream, x, &mut outputs)?;
    Ok(y)
}

/// The blocks of a launch that gives `blocks_c` of them to each of `n`; none when there is nothing to do.
pub(crate) fn grid(n: usize, blocks_c: usize) -> Result<Option<Grid>, Error> {
    match i32::try_from(n.saturating_mul(blocks_c)) {
        Ok(0) => Ok(None),
        Ok(blocks) => Ok(Some(Grid::x(blocks as u32))),
        Err(_) => {
            let wanted = format!("at most {} with so many channels", i32::MAX as usize / blocks_c);
            Err(Error::Dim { dim: "N", wanted, got: n })
        }
    }
}

/// Channels of RWKV-4's models.
pub(crate) const COMMON_C: &[usize] = &[768, 1024, 2048, 2560, 4096, 5120];

/// A common count of channels, and one that fits no vector and no block.
pub(crate) const OTHER_C: &[usize] = &[4096, 33];

pub(crate) fn units(_arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for tiling in config::tilings() {
        out.extend(COMMON_C.iter().map(|&c| unit::<bf16>(c, tiling)));
        out.extend(OTHER_C.iter().map(|&c| unit::<f32>(c, tiling)));
        out.push(unit::<f16>(OTHER_C[0], tiling));
    }
    out
}

fn unit<T: Element>(c: usize, tiling: Tiling) -> Unit {
    // All of these are below 2^31: `new` has checked C.
    Unit::new::<ChunkFwdParams<T>>("rwkv4", "chunk_fwd", SOURCE, tiling.threads())
        .with_headers(HEADERS)
        .with("Element", T::DTYPE)
        .with("C", c as i32)
        .with("CHANNELS", tiling.channels as i32)
        .with("SLOTS", tiling.slots as i32)
        .with("STEPS", tiling.steps as i32)
}

/// Twin of `fla::rwkv4::ChunkFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkFwdParams<T> {
    w: Ptr<f32>,
    u: Ptr<f32>,
    k: Ptr<T>,
    v: Ptr<T>,
    initial_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    o: PtrMut<T>,
    final_state: PtrMut<f32>,
    states: PtrMut<f32>,
    t: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv4::ChunkFwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("w", "const float*", offset_of!(Self, w)),
        Field::new("u", "const float*", offset_of!(Self, u)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("final_state", "float*", offset_of!(Self, final_state)),
        Field::new("states", "float*", offset_of!(Self, states)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Tiling, Unit, bf16, config, unit};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        let units: fn(usize, Tiling) -> [Unit; 4] = |c, tiling| {
            let [wide, narrow] = crate::chunk_bwd::any_units(c, tiling);
            [unit::<f32>(c, tiling), unit::<bf16>(c, tiling), wide, narrow]
        };
        // Channels that fill blocks, that do not, and whose rows are farther apart than an address in an instruction.
        let failures = |channels: &[usize]| -> Vec<String> {
            let all =
                channels.iter().flat_map(|c| config::tilings().flat_map(move |tiling| units(*c, tiling)));
            all.filter_map(|unit| compile(&unit, Arch::SM_90).err()).map(|error| error.to_string()).collect()
        };
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures(&[100]));
            let mut all = failures(&[1 << 20]);
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}

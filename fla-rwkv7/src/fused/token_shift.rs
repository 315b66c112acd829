//! The difference of each token to the one before it, and its gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Field, Kernel, Params, Ptr, PtrMut, Source, Unit};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, SequencesParams, Spans, offsets, shapes_d};
use super::{ChannelShape, check_lens};
use crate::config;

const SOURCE: Source = Source {
    name: "fla/rwkv7/fused_token_shift.cu",
    text: include_str!("../../kernels/fused_token_shift.cu"),
};
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_token_shift_bwd.cu",
    text: include_str!("../../kernels/fused_token_shift_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedTokenShiftInputs<'a, T> {
    /// Tokens: `[B, T, D]`.
    pub x: &'a dyn DevicePtr<T>,
    /// Token before the first of each sequence; zero when absent: `[N, D]`.
    pub cache: Option<&'a dyn DevicePtr<T>>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedTokenShiftOutputs<'a, T> {
    /// Differences: `[B, T, D]`.
    pub y: &'a mut dyn DevicePtrMut<T>,
    /// Last token of each sequence, the `cache` of the next call; not written when absent: `[N, D]`.
    pub cache_out: Option<&'a mut dyn DevicePtrMut<T>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedTokenShiftResult<T> {
    /// Differences: `[B, T, D]`.
    pub y: CudaSlice<T>,
    /// Last token of each sequence, the `cache` of the next call; not written when absent: `[N, D]`.
    pub cache_out: CudaSlice<T>,
}

/// The difference of each token to the one before it, made once for a shape and run many times.
///
/// ```text
/// y_t = x_{t-1} - x_t        x_{-1} = cache        cache_out = x of the last token
/// ```
///
/// | tensor            | shape       | dtype | meaning                                                                                      |
/// |-------------------|-------------|-------|----------------------------------------------------------------------------------------------|
/// | `x`               | `[B, T, D]` | `T`   | tokens                                                                                       |
/// | `cache`           | `[N, D]`    | `T`   | optional; token before the first of each sequence; zero when absent                          |
/// | `y` (out)         | `[B, T, D]` | `T`   | differences                                                                                  |
/// | `cache_out` (out) | `[N, D]`    | `T`   | optional; last token of each sequence, the `cache` of the next call; not written when absent |
///
/// `T` is f32, bf16 or f16. D may be any size; multiples of 16 bytes are fastest. Sequences are dense or
/// packed; one without tokens hands its cache through.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `token shift,
/// fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `token_shift`.
#[derive(Debug)]
pub struct FusedTokenShift<T> {
    kernel: Kernel<FusedTokenShiftParams<T>>,
    shape: ChannelShape,
    launch: Launch,
    cu_seqlens: Option<CudaSlice<i64>>,
}

impl<T: Element> FusedTokenShift<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape) -> Result<Self, Error> {
        let spans = Spans::of_channels::<T>(shape, &config::TOKEN_SHIFT)?;
        let launch = spans.launch(device, &config::TOKEN_SHIFT)?;
        Ok(Self {
            kernel: device.kernel(&unit::<T>(&spans))?,
            shape: shape.clone(),
            launch,
            cu_seqlens: offsets(device, &shape.seqs)?,
        })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream
    /// belongs to another context; [`Error::Driver`] when the launch is refused. Nothing has been launched
    /// then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedTokenShiftInputs<'_, T>,
        y: &mut FusedTokenShiftOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens("[B, T, D]", shape.len(), &[("x", Some(x.x.len())), ("y", Some(y.y.len()))])?;
        check_lens(
            "[N, D]",
            shape.cache_len(),
            &[
                ("cache", x.cache.as_ref().map(|t| t.len())),
                ("cache_out", y.cache_out.as_ref().map(|t| t.len())),
            ],
        )?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedTokenShiftParams {
            x: bind.read("x", x.x),
            cache: bind.read_opt("cache", x.cache),
            y: bind.write("y", &mut *y.y),
            cache_out: bind.write_opt("cache_out", y.cache_out.as_deref_mut()),
            seqs: SequencesParams::new(&shape.seqs, bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref())),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `x`.
///
/// # Errors
///
/// As [`FusedTokenShift::new`] and [`FusedTokenShift::run`].
pub fn fused_token_shift<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedTokenShiftInputs<'_, T>,
) -> Result<FusedTokenShiftResult<T>, Error> {
    let plan = FusedTokenShift::new(device, shape)?;
    let stream: Arc<CudaStream> = x.x.stream().clone();
    let mut y = FusedTokenShiftResult {
        y: device.alloc(&stream, shape.len())?,
        cache_out: device.alloc(&stream, shape.cache_len())?,
    };
    let mut outputs = FusedTokenShiftOutputs { y: &mut y.y, cache_out: Some(&mut y.cache_out) };
    plan.run(&stream, x, &mut outputs)?;
    Ok(y)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedTokenShiftBwdInputs<'a, T> {
    /// Gradient of `y`: `[B, T, D]`.
    pub dy: &'a dyn DevicePtr<T>,
    /// Gradient of `cache_out`; zero when absent: `[N, D]`.
    pub d_cache_out: Option<&'a dyn DevicePtr<T>>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedTokenShiftBwdOutputs<'a, T> {
    /// Gradient of `x`: `[B, T, D]`.
    pub dx: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `cache`, also when there was none; not written when absent: `[N, D]`.
    pub d_cache: Option<&'a mut dyn DevicePtrMut<T>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedTokenShiftBwdResult<T> {
    /// Gradient of `x`: `[B, T, D]`.
    pub dx: CudaSlice<T>,
    /// Gradient of `cache`, also when there was none; not written when absent: `[N, D]`.
    pub d_cache: CudaSlice<T>,
}

/// Gradients of [`FusedTokenShift`], made once for a shape and run many times.
///
/// ```text
/// dx_t = dy_{t+1} - dy_t, with d_cache_out in place of dy_{t+1} at the last token        d_cache = dy_0
/// ```
///
/// | tensor          | shape       | dtype | meaning                                                                          |
/// |-----------------|-------------|-------|----------------------------------------------------------------------------------|
/// | `dy`            | `[B, T, D]` | `T`   | gradient of `y`                                                                  |
/// | `d_cache_out`   | `[N, D]`    | `T`   | optional; gradient of `cache_out`; zero when absent                              |
/// | `dx` (out)      | `[B, T, D]` | `T`   | gradient of `x`                                                                  |
/// | `d_cache` (out) | `[N, D]`    | `T`   | optional; gradient of `cache`, also when there was none; not written when absent |
///
/// `T` is f32, bf16 or f16. D may be any size; multiples of 16 bytes are fastest. Sequences are dense or
/// packed; one without tokens hands its cache through.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `token shift,
/// fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedTokenShiftBwd<T> {
    kernel: Kernel<FusedTokenShiftBwdParams<T>>,
    shape: ChannelShape,
    launch: Launch,
    cu_seqlens: Option<CudaSlice<i64>>,
}

impl<T: Element> FusedTokenShiftBwd<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape) -> Result<Self, Error> {
        let spans = Spans::of_channels::<T>(shape, &config::TOKEN_SHIFT_BWD)?;
        let launch = spans.launch(device, &config::TOKEN_SHIFT_BWD)?;
        Ok(Self {
            kernel: device.kernel(&bwd_unit::<T>(&spans))?,
            shape: shape.clone(),
            launch,
            cu_seqlens: offsets(device, &shape.seqs)?,
        })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream
    /// belongs to another context; [`Error::Driver`] when the launch is refused. Nothing has been launched
    /// then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedTokenShiftBwdInputs<'_, T>,
        y: &mut FusedTokenShiftBwdOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens("[B, T, D]", shape.len(), &[("dy", Some(x.dy.len())), ("dx", Some(y.dx.len()))])?;
        check_lens(
            "[N, D]",
            shape.cache_len(),
            &[
                ("d_cache_out", x.d_cache_out.as_ref().map(|t| t.len())),
                ("d_cache", y.d_cache.as_ref().map(|t| t.len())),
            ],
        )?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedTokenShiftBwdParams {
            dy: bind.read("dy", x.dy),
            d_cache_out: bind.read_opt("d_cache_out", x.d_cache_out),
            dx: bind.write("dx", &mut *y.dx),
            d_cache: bind.write_opt("d_cache", y.d_cache.as_deref_mut()),
            seqs: SequencesParams::new(&shape.seqs, bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref())),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `dy`.
///
/// # Errors
///
/// As [`FusedTokenShiftBwd::new`] and [`FusedTokenShiftBwd::run`].
pub fn fused_token_shift_bwd<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedTokenShiftBwdInputs<'_, T>,
) -> Result<FusedTokenShiftBwdResult<T>, Error> {
    let plan = FusedTokenShiftBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.dy.stream().clone();
    let mut y = FusedTokenShiftBwdResult {
        dx: device.alloc(&stream, shape.len())?,
        d_cache: device.alloc(&stream, shape.cache_len())?,
    };
    let mut outputs = FusedTokenShiftBwdOutputs { dx: &mut y.dx, d_cache: Some(&mut y.d_cache) };
    plan.run(&stream, x, &mut outputs)?;
    Ok(y)
}

pub(super) fn units() -> Vec<Unit> {
    let [common, other @ ..] = &shapes_d();
    let mut out: Vec<Unit> = units_of::<f32>(common).chain(units_of::<f16>(common)).collect();
    out.extend(units_of::<bf16>(common));
    out.extend(other.iter().flat_map(units_of::<bf16>));
    out
}

/// A shape that is refused has no units.
pub(super) fn units_of<T: Element>(shape: &ChannelShape) -> impl Iterator<Item = Unit> {
    [
        Spans::of_channels::<T>(shape, &config::TOKEN_SHIFT).map(|spans| unit::<T>(&spans)),
        Spans::of_channels::<T>(shape, &config::TOKEN_SHIFT_BWD).map(|spans| bwd_unit::<T>(&spans)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedTokenShiftParams<T>>("fused_token_shift", SOURCE, T::DTYPE, &config::TOKEN_SHIFT)
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedTokenShiftBwdParams<T>>(
        "fused_token_shift_bwd",
        BWD_SOURCE,
        T::DTYPE,
        &config::TOKEN_SHIFT_BWD,
    )
}

/// Twin of `fla::rwkv7::FusedTokenShiftParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedTokenShiftParams<T> {
    x: Ptr<T>,
    cache: Ptr<T>,
    y: PtrMut<T>,
    cache_out: PtrMut<T>,
    seqs: SequencesParams,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedTokenShiftParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedTokenShiftParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const Cfg::Element*", offset_of!(Self, x)),
        Field::new("cache", "const Cfg::Element*", offset_of!(Self, cache)),
        Field::new("y", "Cfg::Element*", offset_of!(Self, y)),
        Field::new("cache_out", "Cfg::Element*", offset_of!(Self, cache_out)),
        Field::new("seqs", "fla::rwkv7::Sequences", offset_of!(Self, seqs)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedTokenShiftBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedTokenShiftBwdParams<T> {
    dy: Ptr<T>,
    d_cache_out: Ptr<T>,
    dx: PtrMut<T>,
    d_cache: PtrMut<T>,
    seqs: SequencesParams,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedTokenShiftBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedTokenShiftBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("dy", "const Cfg::Element*", offset_of!(Self, dy)),
        Field::new("d_cache_out", "const Cfg::Element*", offset_of!(Self, d_cache_out)),
        Field::new("dx", "Cfg::Element*", offset_of!(Self, dx)),
        Field::new("d_cache", "Cfg::Element*", offset_of!(Self, d_cache)),
        Field::new("seqs", "fla::rwkv7::Sequences", offset_of!(Self, seqs)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

//! The key of unit length of each head, and its gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Field, Kernel, Params, Ptr, PtrMut, Source, Unit, Workspace};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, Spans, shapes_k};
use super::sums::{SumOutput, Sums};
use super::{HeadShape, check_lens};
use crate::config;

const SOURCE: Source =
    Source { name: "fla/rwkv7/fused_kk_norm.cu", text: include_str!("../../kernels/fused_kk_norm.cu") };
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_kk_norm_bwd.cu",
    text: include_str!("../../kernels/fused_kk_norm_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormInputs<'a, T> {
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Factor of each channel: `[H, K]`.
    pub k_k: &'a dyn DevicePtr<T>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormOutputs<'a, T> {
    /// Keys of unit length: `[B, T, H, K]`.
    pub kk: &'a mut dyn DevicePtrMut<T>,
}

/// The key of unit length of each head, made once for a shape and run many times.
///
/// ```text
/// kk = x / sqrt(sum x^2 + 1e-6)        x = k * k_k
/// ```
///
/// | tensor     | shape          | dtype | meaning                |
/// |------------|----------------|-------|------------------------|
/// | `k`        | `[B, T, H, K]` | `T`   | keys                   |
/// | `k_k`      | `[H, K]`       | `T`   | factor of each channel |
/// | `kk` (out) | `[B, T, H, K]` | `T`   | keys of unit length    |
///
/// A key of zeros gives zeros, because of the 1e-6. `T` is f32, bf16 or f16. K is at most 256, any size.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `rwkv7,
/// fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedKkNorm<T> {
    kernel: Kernel<FusedKkNormParams<T>>,
    shape: HeadShape,
    launch: Launch,
}

impl<T: Element> FusedKkNorm<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::KK_NORM)?;
        let launch = spans.launch(device, &config::KK_NORM)?;
        Ok(Self { kernel: device.kernel(&unit::<T>(&spans))?, shape: shape.clone(), launch })
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
        x: &FusedKkNormInputs<'_, T>,
        y: &mut FusedKkNormOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens("[B, T, H, K]", shape.len(), &[("k", Some(x.k.len())), ("kk", Some(y.kk.len()))])?;
        check_lens("[H, K]", shape.parameter_len(), &[("k_k", Some(x.k_k.len()))])?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKkNormParams {
            k: bind.read("k", x.k),
            k_k: bind.read("k_k", x.k_k),
            kk: bind.write("kk", &mut *y.kk),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`FusedKkNorm::new`] and [`FusedKkNorm::run`].
pub fn fused_kk_norm<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedKkNormInputs<'_, T>,
) -> Result<CudaSlice<T>, Error> {
    let plan = FusedKkNorm::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut kk = device.alloc(&stream, shape.len())?;
    plan.run(&stream, x, &mut FusedKkNormOutputs { kk: &mut kk })?;
    Ok(kk)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormBwdInputs<'a, T> {
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Factor of each channel: `[H, K]`.
    pub k_k: &'a dyn DevicePtr<T>,
    /// Gradient of `kk`: `[B, T, H, K]`.
    pub d_kk: &'a dyn DevicePtr<T>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormBwdOutputs<'a, T> {
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k_k`: `[H, K]`.
    pub dk_k: &'a mut dyn DevicePtrMut<f32>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedKkNormBwdResult<T> {
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `k_k`: `[H, K]`.
    pub dk_k: CudaSlice<f32>,
}

/// Gradients of [`FusedKkNorm`], made once for a shape and run many times.
///
/// ```text
/// dx = (d_kk - kk (kk . d_kk)) / sqrt(sum x^2 + 1e-6)        dk = dx * k_k        dk_k = sum over tokens of dx * k
/// ```
///
/// | tensor       | shape          | dtype | meaning                |
/// |--------------|----------------|-------|------------------------|
/// | `k`          | `[B, T, H, K]` | `T`   | keys                   |
/// | `k_k`        | `[H, K]`       | `T`   | factor of each channel |
/// | `d_kk`       | `[B, T, H, K]` | `T`   | gradient of `kk`       |
/// | `dk` (out)   | `[B, T, H, K]` | `T`   | gradient of `k`        |
/// | `dk_k` (out) | `[H, K]`       | f32   | gradient of `k_k`      |
///
/// `T` is f32, bf16 or f16. K is at most 256, any size.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `rwkv7,
/// fused` of `fla_reference::tolerance`. Gradients of parameters are f32: each group of rows adds up its own,
/// and a second kernel adds those in order, so the same inputs give the same bits.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedKkNormBwd<T> {
    kernel: Kernel<FusedKkNormBwdParams<T>>,
    shape: HeadShape,
    launch: Launch,
    sums: Sums,
}

impl<T: Element> FusedKkNormBwd<T> {
    /// Checks the shape and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::KK_NORM_BWD)?;
        let launch = spans.launch(device, &config::KK_NORM_BWD)?;
        Ok(Self {
            kernel: device.kernel(&bwd_unit::<T>(&spans))?,
            shape: shape.clone(),
            launch,
            sums: Sums::new(device, launch.groups, 1, shape.parameter_len())?,
        })
    }

    /// Bytes of the workspace that a run needs, for partial sums.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.sums.workspace_bytes()
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Context`] when the stream
    /// belongs to another context; [`Error::Driver`] when the launch is refused. Nothing has been launched
    /// then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedKkNormBwdInputs<'_, T>,
        y: &mut FusedKkNormBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, H, K]",
            shape.len(),
            &[("k", Some(x.k.len())), ("d_kk", Some(x.d_kk.len())), ("dk", Some(y.dk.len()))],
        )?;
        check_lens(
            "[H, K]",
            shape.parameter_len(),
            &[("k_k", Some(x.k_k.len())), ("dk_k", Some(y.dk_k.len()))],
        )?;
        let mut sums: [SumOutput<'_>; 1] = [("dk_k", Some(&mut *y.dk_k))];
        self.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.sums.partials_len())?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKkNormBwdParams {
            k: bind.read("k", x.k),
            k_k: bind.read("k_k", x.k_k),
            d_kk: bind.read("d_kk", x.d_kk),
            dk: bind.write("dk", &mut *y.dk),
            partials: bind.write("workspace", &mut partials),
            rows: self.launch.params,
        })?;
        self.sums.run(stream, &partials, sums)
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`FusedKkNormBwd::new`] and [`FusedKkNormBwd::run`].
pub fn fused_kk_norm_bwd<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedKkNormBwdInputs<'_, T>,
) -> Result<FusedKkNormBwdResult<T>, Error> {
    let plan = FusedKkNormBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = FusedKkNormBwdResult {
        dk: device.alloc(&stream, shape.len())?,
        dk_k: device.alloc(&stream, shape.parameter_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = FusedKkNormBwdOutputs { dk: &mut y.dk, dk_k: &mut y.dk_k };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

pub(super) fn units() -> Vec<Unit> {
    let [common, other @ ..] = &shapes_k();
    let mut out: Vec<Unit> = units_of::<f32>(common).chain(units_of::<f16>(common)).collect();
    out.extend(units_of::<bf16>(common));
    out.extend(other.iter().flat_map(units_of::<bf16>));
    out
}

/// A shape that is refused has no units.
pub(super) fn units_of<T: Element>(shape: &HeadShape) -> impl Iterator<Item = Unit> {
    [
        Spans::of_heads::<T>(shape, &config::KK_NORM).map(|spans| unit::<T>(&spans)),
        Spans::of_heads::<T>(shape, &config::KK_NORM_BWD).map(|spans| bwd_unit::<T>(&spans)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKkNormParams<T>>("fused_kk_norm", SOURCE, T::DTYPE, &config::KK_NORM)
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKkNormBwdParams<T>>("fused_kk_norm_bwd", BWD_SOURCE, T::DTYPE, &config::KK_NORM_BWD)
}

/// Twin of `fla::rwkv7::FusedKkNormParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKkNormParams<T> {
    k: Ptr<T>,
    k_k: Ptr<T>,
    kk: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKkNormParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKkNormParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("k_k", "const Cfg::Element*", offset_of!(Self, k_k)),
        Field::new("kk", "Cfg::Element*", offset_of!(Self, kk)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedKkNormBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKkNormBwdParams<T> {
    k: Ptr<T>,
    k_k: Ptr<T>,
    d_kk: Ptr<T>,
    dk: PtrMut<T>,
    partials: PtrMut<f32>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKkNormBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKkNormBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("k_k", "const Cfg::Element*", offset_of!(Self, k_k)),
        Field::new("d_kk", "const Cfg::Element*", offset_of!(Self, d_kk)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

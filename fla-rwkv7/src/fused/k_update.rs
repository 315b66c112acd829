//! The key after its rate, and its gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Field, Kernel, Params, Ptr, PtrMut, Source, Unit, Workspace};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, Spans, shapes_d};
use super::sums::{SumOutput, Sums};
use super::{ChannelShape, check_lens};
use crate::config;

const SOURCE: Source =
    Source { name: "fla/rwkv7/fused_k_update.cu", text: include_str!("../../kernels/fused_k_update.cu") };
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_k_update_bwd.cu",
    text: include_str!("../../kernels/fused_k_update_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKUpdateInputs<'a, T> {
    /// Keys: `[B, T, D]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Rates: `[B, T, D]`.
    pub a: &'a dyn DevicePtr<T>,
    /// How far a rate below 1 shrinks the key: `[D]`.
    pub ka: &'a dyn DevicePtr<T>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKUpdateOutputs<'a, T> {
    /// Updated keys: `[B, T, D]`.
    pub out: &'a mut dyn DevicePtrMut<T>,
}

/// The key after its rate, made once for a shape and run many times. With the unit key in the same pass:
/// [`FusedKkNormKUpdate`](crate::FusedKkNormKUpdate).
///
/// ```text
/// out = k * (1 + (a - 1) * ka)
/// ```
///
/// | tensor      | shape       | dtype | meaning                                |
/// |-------------|-------------|-------|----------------------------------------|
/// | `k`         | `[B, T, D]` | `T`   | keys                                   |
/// | `a`         | `[B, T, D]` | `T`   | rates                                  |
/// | `ka`        | `[D]`       | `T`   | how far a rate below 1 shrinks the key |
/// | `out` (out) | `[B, T, D]` | `T`   | updated keys                           |
///
/// `T` is f32, bf16 or f16. D may be any size; multiples of 16 bytes are fastest.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `rwkv7,
/// fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `fused_k_rwkv7`.
#[derive(Debug)]
pub struct FusedKUpdate<T> {
    kernel: Kernel<FusedKUpdateParams<T>>,
    shape: ChannelShape,
    launch: Launch,
}

impl<T: Element> FusedKUpdate<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape) -> Result<Self, Error> {
        let spans = Spans::of_channels::<T>(shape, &config::K_UPDATE)?;
        let launch = spans.launch(device, &config::K_UPDATE)?;
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
        x: &FusedKUpdateInputs<'_, T>,
        y: &mut FusedKUpdateOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[("k", Some(x.k.len())), ("a", Some(x.a.len())), ("out", Some(y.out.len()))],
        )?;
        check_lens("[D]", shape.d, &[("ka", Some(x.ka.len()))])?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKUpdateParams {
            k: bind.read("k", x.k),
            a: bind.read("a", x.a),
            ka: bind.read("ka", x.ka),
            out: bind.write("out", &mut *y.out),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`FusedKUpdate::new`] and [`FusedKUpdate::run`].
pub fn fused_k_update<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedKUpdateInputs<'_, T>,
) -> Result<CudaSlice<T>, Error> {
    let plan = FusedKUpdate::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut out = device.alloc(&stream, shape.len())?;
    plan.run(&stream, x, &mut FusedKUpdateOutputs { out: &mut out })?;
    Ok(out)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKUpdateBwdInputs<'a, T> {
    /// Keys: `[B, T, D]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Rates: `[B, T, D]`.
    pub a: &'a dyn DevicePtr<T>,
    /// How far a rate below 1 shrinks the key: `[D]`.
    pub ka: &'a dyn DevicePtr<T>,
    /// Gradient of `out`: `[B, T, D]`.
    pub d_out: &'a dyn DevicePtr<T>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKUpdateBwdOutputs<'a, T> {
    /// Gradient of `k`: `[B, T, D]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `a`: `[B, T, D]`.
    pub da: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `ka`: `[D]`.
    pub dka: &'a mut dyn DevicePtrMut<f32>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedKUpdateBwdResult<T> {
    /// Gradient of `k`: `[B, T, D]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `a`: `[B, T, D]`.
    pub da: CudaSlice<T>,
    /// Gradient of `ka`: `[D]`.
    pub dka: CudaSlice<f32>,
}

/// Gradients of [`FusedKUpdate`], made once for a shape and run many times.
///
/// ```text
/// dk = d_out * (1 + (a - 1) * ka)        da = d_out * k * ka        dka = sum over tokens of d_out * k * (a - 1)
/// ```
///
/// | tensor      | shape       | dtype | meaning                                |
/// |-------------|-------------|-------|----------------------------------------|
/// | `k`         | `[B, T, D]` | `T`   | keys                                   |
/// | `a`         | `[B, T, D]` | `T`   | rates                                  |
/// | `ka`        | `[D]`       | `T`   | how far a rate below 1 shrinks the key |
/// | `d_out`     | `[B, T, D]` | `T`   | gradient of `out`                      |
/// | `dk` (out)  | `[B, T, D]` | `T`   | gradient of `k`                        |
/// | `da` (out)  | `[B, T, D]` | `T`   | gradient of `a`                        |
/// | `dka` (out) | `[D]`       | f32   | gradient of `ka`                       |
///
/// `T` is f32, bf16 or f16. D may be any size; multiples of 16 bytes are fastest.
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
pub struct FusedKUpdateBwd<T> {
    kernel: Kernel<FusedKUpdateBwdParams<T>>,
    shape: ChannelShape,
    launch: Launch,
    sums: Sums,
}

impl<T: Element> FusedKUpdateBwd<T> {
    /// Checks the shape and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape) -> Result<Self, Error> {
        let spans = Spans::of_channels::<T>(shape, &config::K_UPDATE_BWD)?;
        let launch = spans.launch(device, &config::K_UPDATE_BWD)?;
        Ok(Self {
            kernel: device.kernel(&bwd_unit::<T>(&spans))?,
            shape: shape.clone(),
            launch,
            sums: Sums::new(device, launch.groups, 1, shape.d)?,
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
        x: &FusedKUpdateBwdInputs<'_, T>,
        y: &mut FusedKUpdateBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[
                ("k", Some(x.k.len())),
                ("a", Some(x.a.len())),
                ("d_out", Some(x.d_out.len())),
                ("dk", Some(y.dk.len())),
                ("da", Some(y.da.len())),
            ],
        )?;
        check_lens("[D]", shape.d, &[("ka", Some(x.ka.len())), ("dka", Some(y.dka.len()))])?;
        let mut sums: [SumOutput<'_>; 1] = [("dka", Some(&mut *y.dka))];
        self.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.sums.partials_len())?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKUpdateBwdParams {
            k: bind.read("k", x.k),
            a: bind.read("a", x.a),
            ka: bind.read("ka", x.ka),
            d_out: bind.read("d_out", x.d_out),
            dk: bind.write("dk", &mut *y.dk),
            da: bind.write("da", &mut *y.da),
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
/// As [`FusedKUpdateBwd::new`] and [`FusedKUpdateBwd::run`].
pub fn fused_k_update_bwd<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedKUpdateBwdInputs<'_, T>,
) -> Result<FusedKUpdateBwdResult<T>, Error> {
    let plan = FusedKUpdateBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = FusedKUpdateBwdResult {
        dk: device.alloc(&stream, shape.len())?,
        da: device.alloc(&stream, shape.len())?,
        dka: device.alloc(&stream, shape.d)?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = FusedKUpdateBwdOutputs { dk: &mut y.dk, da: &mut y.da, dka: &mut y.dka };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
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
        Spans::of_channels::<T>(shape, &config::K_UPDATE).map(|spans| unit::<T>(&spans)),
        Spans::of_channels::<T>(shape, &config::K_UPDATE_BWD).map(|spans| bwd_unit::<T>(&spans)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKUpdateParams<T>>("fused_k_update", SOURCE, T::DTYPE, &config::K_UPDATE)
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKUpdateBwdParams<T>>("fused_k_update_bwd", BWD_SOURCE, T::DTYPE, &config::K_UPDATE_BWD)
}

/// Twin of `fla::rwkv7::FusedKUpdateParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKUpdateParams<T> {
    k: Ptr<T>,
    a: Ptr<T>,
    ka: Ptr<T>,
    out: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKUpdateParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKUpdateParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("ka", "const Cfg::Element*", offset_of!(Self, ka)),
        Field::new("out", "Cfg::Element*", offset_of!(Self, out)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedKUpdateBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKUpdateBwdParams<T> {
    k: Ptr<T>,
    a: Ptr<T>,
    ka: Ptr<T>,
    d_out: Ptr<T>,
    dk: PtrMut<T>,
    da: PtrMut<T>,
    partials: PtrMut<f32>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKUpdateBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKUpdateBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("ka", "const Cfg::Element*", offset_of!(Self, ka)),
        Field::new("d_out", "const Cfg::Element*", offset_of!(Self, d_out)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("da", "Cfg::Element*", offset_of!(Self, da)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

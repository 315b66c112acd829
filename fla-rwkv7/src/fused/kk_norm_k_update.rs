//! The key of unit length and the updated key in one pass, and their gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Field, Kernel, Params, Ptr, PtrMut, Source, Unit, Workspace};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, Spans, shapes_k};
use super::sums::{SumOutput, Sums};
use super::{HeadShape, check_lens};
use crate::config;

const SOURCE: Source = Source {
    name: "fla/rwkv7/fused_kk_norm_k_update.cu",
    text: include_str!("../../kernels/fused_kk_norm_k_update.cu"),
};
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_kk_norm_k_update_bwd.cu",
    text: include_str!("../../kernels/fused_kk_norm_k_update_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormKUpdateInputs<'a, T> {
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Rates, in [0, 1]: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Factor of each channel: `[H, K]`.
    pub k_k: &'a dyn DevicePtr<T>,
    /// How far a rate below 1 shrinks the key: `[H, K]`.
    pub ka: &'a dyn DevicePtr<T>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormKUpdateOutputs<'a, T> {
    /// Keys after their rates: `[B, T, H, K]`.
    pub k_updated: &'a mut dyn DevicePtrMut<T>,
    /// Keys of unit length; not written when absent: `[B, T, H, K]`.
    pub kk: Option<&'a mut dyn DevicePtrMut<T>>,
    /// Their negatives, the `a` of the recurrence; not written when absent: `[B, T, H, K]`.
    pub neg_kk: Option<&'a mut dyn DevicePtrMut<T>>,
    /// Unit keys times rates, the `b` of the recurrence; not written when absent: `[B, T, H, K]`.
    pub b: Option<&'a mut dyn DevicePtrMut<T>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedKkNormKUpdateResult<T> {
    /// Keys after their rates: `[B, T, H, K]`.
    pub k_updated: CudaSlice<T>,
    /// Keys of unit length; not written when absent: `[B, T, H, K]`.
    pub kk: CudaSlice<T>,
    /// Their negatives, the `a` of the recurrence; not written when absent: `[B, T, H, K]`.
    pub neg_kk: CudaSlice<T>,
    /// Unit keys times rates, the `b` of the recurrence; not written when absent: `[B, T, H, K]`.
    pub b: CudaSlice<T>,
}

/// All that the transition of the state needs of a key, in one pass that reads key and rate once; made once for
/// a shape and run many times. `neg_kk` and `b` are the inputs `a` and `b` of
/// [`RecurrentFwd`](crate::RecurrentFwd) and of a chunk pass; `kk` is that of
/// [`FusedMulRecurrentFwd`](crate::FusedMulRecurrentFwd), which takes the rates as they are. What is absent is
/// not written and costs nothing.
///
/// ```text
/// kk = x / sqrt(sum x^2 + 1e-6)        x = k * k_k
/// k_updated = k * (1 + (a - 1) * ka)        neg_kk = -kk        b = kk * a
/// ```
///
/// | tensor            | shape          | dtype | meaning                                                                             |
/// |-------------------|----------------|-------|-------------------------------------------------------------------------------------|
/// | `k`               | `[B, T, H, K]` | `T`   | keys                                                                                |
/// | `a`               | `[B, T, H, K]` | `T`   | rates, in [0, 1]                                                                    |
/// | `k_k`             | `[H, K]`       | `T`   | factor of each channel                                                              |
/// | `ka`              | `[H, K]`       | `T`   | how far a rate below 1 shrinks the key                                              |
/// | `k_updated` (out) | `[B, T, H, K]` | `T`   | keys after their rates                                                              |
/// | `kk` (out)        | `[B, T, H, K]` | `T`   | optional; keys of unit length; not written when absent                              |
/// | `neg_kk` (out)    | `[B, T, H, K]` | `T`   | optional; their negatives, the `a` of the recurrence; not written when absent       |
/// | `b` (out)         | `[B, T, H, K]` | `T`   | optional; unit keys times rates, the `b` of the recurrence; not written when absent |
///
/// A key of zeros gives zeros, because of the 1e-6. `T` is f32, bf16 or f16. K is at most 256, any size.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `rwkv7,
/// fused` of `fla_reference::tolerance`. `b` is formed from `kk` before it is rounded.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. In FLA these are
/// `l2norm`, `fused_k_rwkv7` and products of the framework.
#[derive(Debug)]
pub struct FusedKkNormKUpdate<T> {
    kernel: Kernel<FusedKkNormKUpdateParams<T>>,
    shape: HeadShape,
    launch: Launch,
}

impl<T: Element> FusedKkNormKUpdate<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::KK_NORM_K_UPDATE)?;
        let launch = spans.launch(device, &config::KK_NORM_K_UPDATE)?;
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
        x: &FusedKkNormKUpdateInputs<'_, T>,
        y: &mut FusedKkNormKUpdateOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, H, K]",
            shape.len(),
            &[
                ("k", Some(x.k.len())),
                ("a", Some(x.a.len())),
                ("k_updated", Some(y.k_updated.len())),
                ("kk", y.kk.as_ref().map(|t| t.len())),
                ("neg_kk", y.neg_kk.as_ref().map(|t| t.len())),
                ("b", y.b.as_ref().map(|t| t.len())),
            ],
        )?;
        check_lens("[H, K]", shape.parameter_len(), &[("k_k", Some(x.k_k.len())), ("ka", Some(x.ka.len()))])?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKkNormKUpdateParams {
            k: bind.read("k", x.k),
            a: bind.read("a", x.a),
            k_k: bind.read("k_k", x.k_k),
            ka: bind.read("ka", x.ka),
            k_updated: bind.write("k_updated", &mut *y.k_updated),
            kk: bind.write_opt("kk", y.kk.as_deref_mut()),
            neg_kk: bind.write_opt("neg_kk", y.neg_kk.as_deref_mut()),
            b: bind.write_opt("b", y.b.as_deref_mut()),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// # Errors
///
/// As [`FusedKkNormKUpdate::new`] and [`FusedKkNormKUpdate::run`].
pub fn fused_kk_norm_k_update<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedKkNormKUpdateInputs<'_, T>,
) -> Result<FusedKkNormKUpdateResult<T>, Error> {
    let plan = FusedKkNormKUpdate::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = FusedKkNormKUpdateResult {
        k_updated: device.alloc(&stream, shape.len())?,
        kk: device.alloc(&stream, shape.len())?,
        neg_kk: device.alloc(&stream, shape.len())?,
        b: device.alloc(&stream, shape.len())?,
    };
    let mut outputs = FusedKkNormKUpdateOutputs {
        k_updated: &mut y.k_updated,
        kk: Some(&mut y.kk),
        neg_kk: Some(&mut y.neg_kk),
        b: Some(&mut y.b),
    };
    plan.run(&stream, x, &mut outputs)?;
    Ok(y)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormKUpdateBwdInputs<'a, T> {
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Rates, in [0, 1]: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Factor of each channel: `[H, K]`.
    pub k_k: &'a dyn DevicePtr<T>,
    /// How far a rate below 1 shrinks the key: `[H, K]`.
    pub ka: &'a dyn DevicePtr<T>,
    /// Gradient of `k_updated`: `[B, T, H, K]`.
    pub d_k_updated: &'a dyn DevicePtr<T>,
    /// Gradient of `kk`; zero when absent: `[B, T, H, K]`.
    pub d_kk: Option<&'a dyn DevicePtr<T>>,
    /// Gradient of `neg_kk`; zero when absent: `[B, T, H, K]`.
    pub d_neg_kk: Option<&'a dyn DevicePtr<T>>,
    /// Gradient of `b`; zero when absent: `[B, T, H, K]`.
    pub d_b: Option<&'a dyn DevicePtr<T>>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedKkNormKUpdateBwdOutputs<'a, T> {
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of the rates: `[B, T, H, K]`.
    pub da: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k_k`: `[H, K]`.
    pub dk_k: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `ka`: `[H, K]`.
    pub dka: &'a mut dyn DevicePtrMut<f32>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedKkNormKUpdateBwdResult<T> {
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of the rates: `[B, T, H, K]`.
    pub da: CudaSlice<T>,
    /// Gradient of `k_k`: `[H, K]`.
    pub dk_k: CudaSlice<f32>,
    /// Gradient of `ka`: `[H, K]`.
    pub dka: CudaSlice<f32>,
}

/// Gradients of [`FusedKkNormKUpdate`] in one pass, made once for a shape and run many times.
///
/// ```text
/// g  = d_kk - d_neg_kk + d_b * a        dx = (g - kk (kk . g)) / sqrt(sum x^2 + 1e-6)
/// dk = dx * k_k + d_k_updated * (1 + (a - 1) * ka)        dk_k = sum over tokens of dx * k
/// da = d_b * kk + d_k_updated * k * ka        dka = sum over tokens of d_k_updated * k * (a - 1)
/// ```
///
/// | tensor        | shape          | dtype | meaning                                          |
/// |---------------|----------------|-------|--------------------------------------------------|
/// | `k`           | `[B, T, H, K]` | `T`   | keys                                             |
/// | `a`           | `[B, T, H, K]` | `T`   | rates, in [0, 1]                                 |
/// | `k_k`         | `[H, K]`       | `T`   | factor of each channel                           |
/// | `ka`          | `[H, K]`       | `T`   | how far a rate below 1 shrinks the key           |
/// | `d_k_updated` | `[B, T, H, K]` | `T`   | gradient of `k_updated`                          |
/// | `d_kk`        | `[B, T, H, K]` | `T`   | optional; gradient of `kk`; zero when absent     |
/// | `d_neg_kk`    | `[B, T, H, K]` | `T`   | optional; gradient of `neg_kk`; zero when absent |
/// | `d_b`         | `[B, T, H, K]` | `T`   | optional; gradient of `b`; zero when absent      |
/// | `dk` (out)    | `[B, T, H, K]` | `T`   | gradient of `k`                                  |
/// | `da` (out)    | `[B, T, H, K]` | `T`   | gradient of the rates                            |
/// | `dk_k` (out)  | `[H, K]`       | f32   | gradient of `k_k`                                |
/// | `dka` (out)   | `[H, K]`       | f32   | gradient of `ka`                                 |
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
pub struct FusedKkNormKUpdateBwd<T> {
    kernel: Kernel<FusedKkNormKUpdateBwdParams<T>>,
    shape: HeadShape,
    launch: Launch,
    sums: Sums,
}

impl<T: Element> FusedKkNormKUpdateBwd<T> {
    /// Checks the shape and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::KK_NORM_K_UPDATE_BWD)?;
        let launch = spans.launch(device, &config::KK_NORM_K_UPDATE_BWD)?;
        Ok(Self {
            kernel: device.kernel(&bwd_unit::<T>(&spans))?,
            shape: shape.clone(),
            launch,
            sums: Sums::new(device, launch.groups, 2, shape.parameter_len())?,
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
        x: &FusedKkNormKUpdateBwdInputs<'_, T>,
        y: &mut FusedKkNormKUpdateBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, H, K]",
            shape.len(),
            &[
                ("k", Some(x.k.len())),
                ("a", Some(x.a.len())),
                ("d_k_updated", Some(x.d_k_updated.len())),
                ("d_kk", x.d_kk.as_ref().map(|t| t.len())),
                ("d_neg_kk", x.d_neg_kk.as_ref().map(|t| t.len())),
                ("d_b", x.d_b.as_ref().map(|t| t.len())),
                ("dk", Some(y.dk.len())),
                ("da", Some(y.da.len())),
            ],
        )?;
        check_lens(
            "[H, K]",
            shape.parameter_len(),
            &[
                ("k_k", Some(x.k_k.len())),
                ("ka", Some(x.ka.len())),
                ("dk_k", Some(y.dk_k.len())),
                ("dka", Some(y.dka.len())),
            ],
        )?;
        let mut sums: [SumOutput<'_>; 2] = [("dk_k", Some(&mut *y.dk_k)), ("dka", Some(&mut *y.dka))];
        self.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.sums.partials_len())?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedKkNormKUpdateBwdParams {
            k: bind.read("k", x.k),
            a: bind.read("a", x.a),
            k_k: bind.read("k_k", x.k_k),
            ka: bind.read("ka", x.ka),
            d_k_updated: bind.read("d_k_updated", x.d_k_updated),
            d_kk: bind.read_opt("d_kk", x.d_kk),
            d_neg_kk: bind.read_opt("d_neg_kk", x.d_neg_kk),
            d_b: bind.read_opt("d_b", x.d_b),
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
/// As [`FusedKkNormKUpdateBwd::new`] and [`FusedKkNormKUpdateBwd::run`].
pub fn fused_kk_norm_k_update_bwd<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedKkNormKUpdateBwdInputs<'_, T>,
) -> Result<FusedKkNormKUpdateBwdResult<T>, Error> {
    let plan = FusedKkNormKUpdateBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = FusedKkNormKUpdateBwdResult {
        dk: device.alloc(&stream, shape.len())?,
        da: device.alloc(&stream, shape.len())?,
        dk_k: device.alloc(&stream, shape.parameter_len())?,
        dka: device.alloc(&stream, shape.parameter_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs =
        FusedKkNormKUpdateBwdOutputs { dk: &mut y.dk, da: &mut y.da, dk_k: &mut y.dk_k, dka: &mut y.dka };
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
        Spans::of_heads::<T>(shape, &config::KK_NORM_K_UPDATE).map(|spans| unit::<T>(&spans)),
        Spans::of_heads::<T>(shape, &config::KK_NORM_K_UPDATE_BWD).map(|spans| bwd_unit::<T>(&spans)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKkNormKUpdateParams<T>>(
        "fused_kk_norm_k_update",
        SOURCE,
        T::DTYPE,
        &config::KK_NORM_K_UPDATE,
    )
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedKkNormKUpdateBwdParams<T>>(
        "fused_kk_norm_k_update_bwd",
        BWD_SOURCE,
        T::DTYPE,
        &config::KK_NORM_K_UPDATE_BWD,
    )
}

/// Twin of `fla::rwkv7::FusedKkNormKUpdateParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKkNormKUpdateParams<T> {
    k: Ptr<T>,
    a: Ptr<T>,
    k_k: Ptr<T>,
    ka: Ptr<T>,
    k_updated: PtrMut<T>,
    kk: PtrMut<T>,
    neg_kk: PtrMut<T>,
    b: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKkNormKUpdateParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKkNormKUpdateParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("k_k", "const Cfg::Element*", offset_of!(Self, k_k)),
        Field::new("ka", "const Cfg::Element*", offset_of!(Self, ka)),
        Field::new("k_updated", "Cfg::Element*", offset_of!(Self, k_updated)),
        Field::new("kk", "Cfg::Element*", offset_of!(Self, kk)),
        Field::new("neg_kk", "Cfg::Element*", offset_of!(Self, neg_kk)),
        Field::new("b", "Cfg::Element*", offset_of!(Self, b)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedKkNormKUpdateBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedKkNormKUpdateBwdParams<T> {
    k: Ptr<T>,
    a: Ptr<T>,
    k_k: Ptr<T>,
    ka: Ptr<T>,
    d_k_updated: Ptr<T>,
    d_kk: Ptr<T>,
    d_neg_kk: Ptr<T>,
    d_b: Ptr<T>,
    dk: PtrMut<T>,
    da: PtrMut<T>,
    partials: PtrMut<f32>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedKkNormKUpdateBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedKkNormKUpdateBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("k_k", "const Cfg::Element*", offset_of!(Self, k_k)),
        Field::new("ka", "const Cfg::Element*", offset_of!(Self, ka)),
        Field::new("d_k_updated", "const Cfg::Element*", offset_of!(Self, d_k_updated)),
        Field::new("d_kk", "const Cfg::Element*", offset_of!(Self, d_kk)),
        Field::new("d_neg_kk", "const Cfg::Element*", offset_of!(Self, d_neg_kk)),
        Field::new("d_b", "const Cfg::Element*", offset_of!(Self, d_b)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("da", "Cfg::Element*", offset_of!(Self, da)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

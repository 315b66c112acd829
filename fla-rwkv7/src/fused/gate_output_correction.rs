//! The bonus of the current token and the output gate, and their gradients.

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
    name: "fla/rwkv7/fused_gate_output_correction.cu",
    text: include_str!("../../kernels/fused_gate_output_correction.cu"),
};
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_gate_output_correction_bwd.cu",
    text: include_str!("../../kernels/fused_gate_output_correction_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedGateOutputCorrectionInputs<'a, T> {
    /// Normalised outputs of the recurrence: `[B, T, H, K]`.
    pub o: &'a dyn DevicePtr<T>,
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Weight of each channel in the bonus: `[H, K]`.
    pub r_k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, K]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Output gate: `[B, T, H, K]`.
    pub g: &'a dyn DevicePtr<T>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedGateOutputCorrectionOutputs<'a, T> {
    /// Corrected and gated outputs: `[B, T, H, K]`.
    pub out: &'a mut dyn DevicePtrMut<T>,
}

/// The bonus of the current token and the output gate, made once for a shape and run many times. `o` has been
/// through the group norm of the heads, which stays with the caller.
///
/// ```text
/// s = sum_k r k r_k        out = (o + s v) * g
/// ```
///
/// | tensor      | shape          | dtype | meaning                              |
/// |-------------|----------------|-------|--------------------------------------|
/// | `o`         | `[B, T, H, K]` | `T`   | normalised outputs of the recurrence |
/// | `r`         | `[B, T, H, K]` | `T`   | receptance                           |
/// | `k`         | `[B, T, H, K]` | `T`   | keys                                 |
/// | `r_k`       | `[H, K]`       | `T`   | weight of each channel in the bonus  |
/// | `v`         | `[B, T, H, K]` | `T`   | values                               |
/// | `g`         | `[B, T, H, K]` | `T`   | output gate                          |
/// | `out` (out) | `[B, T, H, K]` | `T`   | corrected and gated outputs          |
///
/// `T` is f32, bf16 or f16. K is at most 256, any size. V is K.
///
/// # Numerics
///
/// Everything is computed in f32 and rounded once. The error against float64 stays under the rows `rwkv7,
/// fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `gate_output_correction`.
#[derive(Debug)]
pub struct FusedGateOutputCorrection<T> {
    kernel: Kernel<FusedGateOutputCorrectionParams<T>>,
    shape: HeadShape,
    launch: Launch,
}

impl<T: Element> FusedGateOutputCorrection<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::GATE_OUTPUT_CORRECTION)?;
        let launch = spans.launch(device, &config::GATE_OUTPUT_CORRECTION)?;
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
        x: &FusedGateOutputCorrectionInputs<'_, T>,
        y: &mut FusedGateOutputCorrectionOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, H, K]",
            shape.len(),
            &[
                ("o", Some(x.o.len())),
                ("r", Some(x.r.len())),
                ("k", Some(x.k.len())),
                ("v", Some(x.v.len())),
                ("g", Some(x.g.len())),
                ("out", Some(y.out.len())),
            ],
        )?;
        check_lens("[H, K]", shape.parameter_len(), &[("r_k", Some(x.r_k.len()))])?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedGateOutputCorrectionParams {
            o: bind.read("o", x.o),
            r: bind.read("r", x.r),
            k: bind.read("k", x.k),
            r_k: bind.read("r_k", x.r_k),
            v: bind.read("v", x.v),
            g: bind.read("g", x.g),
            out: bind.write("out", &mut *y.out),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `o`.
///
/// # Errors
///
/// As [`FusedGateOutputCorrection::new`] and [`FusedGateOutputCorrection::run`].
pub fn fused_gate_output_correction<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedGateOutputCorrectionInputs<'_, T>,
) -> Result<CudaSlice<T>, Error> {
    let plan = FusedGateOutputCorrection::new(device, shape)?;
    let stream: Arc<CudaStream> = x.o.stream().clone();
    let mut out = device.alloc(&stream, shape.len())?;
    plan.run(&stream, x, &mut FusedGateOutputCorrectionOutputs { out: &mut out })?;
    Ok(out)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedGateOutputCorrectionBwdInputs<'a, T> {
    /// Normalised outputs of the recurrence: `[B, T, H, K]`.
    pub o: &'a dyn DevicePtr<T>,
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Weight of each channel in the bonus: `[H, K]`.
    pub r_k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, K]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Output gate: `[B, T, H, K]`.
    pub g: &'a dyn DevicePtr<T>,
    /// Gradient of `out`: `[B, T, H, K]`.
    pub d_out: &'a dyn DevicePtr<T>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedGateOutputCorrectionBwdOutputs<'a, T> {
    /// Gradient of `o`: `[B, T, H, K]`.
    pub d_o: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, K]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `g`: `[B, T, H, K]`.
    pub dg: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `r_k`: `[H, K]`.
    pub dr_k: &'a mut dyn DevicePtrMut<f32>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedGateOutputCorrectionBwdResult<T> {
    /// Gradient of `o`: `[B, T, H, K]`.
    pub d_o: CudaSlice<T>,
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, K]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `g`: `[B, T, H, K]`.
    pub dg: CudaSlice<T>,
    /// Gradient of `r_k`: `[H, K]`.
    pub dr_k: CudaSlice<f32>,
}

/// Gradients of [`FusedGateOutputCorrection`], made once for a shape and run many times.
///
/// ```text
/// s = sum_k r k r_k        d_o = d_out * g        ds = sum_k d_o v
/// dv = s d_o        dg = d_out * (o + s v)        dr = ds k * r_k        dk = ds r * r_k
/// dr_k = sum over tokens of ds r * k
/// ```
///
/// | tensor       | shape          | dtype | meaning                              |
/// |--------------|----------------|-------|--------------------------------------|
/// | `o`          | `[B, T, H, K]` | `T`   | normalised outputs of the recurrence |
/// | `r`          | `[B, T, H, K]` | `T`   | receptance                           |
/// | `k`          | `[B, T, H, K]` | `T`   | keys                                 |
/// | `r_k`        | `[H, K]`       | `T`   | weight of each channel in the bonus  |
/// | `v`          | `[B, T, H, K]` | `T`   | values                               |
/// | `g`          | `[B, T, H, K]` | `T`   | output gate                          |
/// | `d_out`      | `[B, T, H, K]` | `T`   | gradient of `out`                    |
/// | `d_o` (out)  | `[B, T, H, K]` | `T`   | gradient of `o`                      |
/// | `dr` (out)   | `[B, T, H, K]` | `T`   | gradient of `r`                      |
/// | `dk` (out)   | `[B, T, H, K]` | `T`   | gradient of `k`                      |
/// | `dv` (out)   | `[B, T, H, K]` | `T`   | gradient of `v`                      |
/// | `dg` (out)   | `[B, T, H, K]` | `T`   | gradient of `g`                      |
/// | `dr_k` (out) | `[H, K]`       | f32   | gradient of `r_k`                    |
///
/// `T` is f32, bf16 or f16. K is at most 256, any size. V is K.
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
pub struct FusedGateOutputCorrectionBwd<T> {
    kernel: Kernel<FusedGateOutputCorrectionBwdParams<T>>,
    shape: HeadShape,
    launch: Launch,
    sums: Sums,
}

impl<T: Element> FusedGateOutputCorrectionBwd<T> {
    /// Checks the shape and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H or K is 0, or K is above 256; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &HeadShape) -> Result<Self, Error> {
        let spans = Spans::of_heads::<T>(shape, &config::GATE_OUTPUT_CORRECTION_BWD)?;
        let launch = spans.launch(device, &config::GATE_OUTPUT_CORRECTION_BWD)?;
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
        x: &FusedGateOutputCorrectionBwdInputs<'_, T>,
        y: &mut FusedGateOutputCorrectionBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, H, K]",
            shape.len(),
            &[
                ("o", Some(x.o.len())),
                ("r", Some(x.r.len())),
                ("k", Some(x.k.len())),
                ("v", Some(x.v.len())),
                ("g", Some(x.g.len())),
                ("d_out", Some(x.d_out.len())),
                ("d_o", Some(y.d_o.len())),
                ("dr", Some(y.dr.len())),
                ("dk", Some(y.dk.len())),
                ("dv", Some(y.dv.len())),
                ("dg", Some(y.dg.len())),
            ],
        )?;
        check_lens(
            "[H, K]",
            shape.parameter_len(),
            &[("r_k", Some(x.r_k.len())), ("dr_k", Some(y.dr_k.len()))],
        )?;
        let mut sums: [SumOutput<'_>; 1] = [("dr_k", Some(&mut *y.dr_k))];
        self.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.sums.partials_len())?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedGateOutputCorrectionBwdParams {
            o: bind.read("o", x.o),
            r: bind.read("r", x.r),
            k: bind.read("k", x.k),
            r_k: bind.read("r_k", x.r_k),
            v: bind.read("v", x.v),
            g: bind.read("g", x.g),
            d_out: bind.read("d_out", x.d_out),
            d_o: bind.write("d_o", &mut *y.d_o),
            dr: bind.write("dr", &mut *y.dr),
            dk: bind.write("dk", &mut *y.dk),
            dv: bind.write("dv", &mut *y.dv),
            dg: bind.write("dg", &mut *y.dg),
            partials: bind.write("workspace", &mut partials),
            rows: self.launch.params,
        })?;
        self.sums.run(stream, &partials, sums)
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `o`.
///
/// # Errors
///
/// As [`FusedGateOutputCorrectionBwd::new`] and [`FusedGateOutputCorrectionBwd::run`].
pub fn fused_gate_output_correction_bwd<T: Element>(
    device: &Device,
    shape: &HeadShape,
    x: &FusedGateOutputCorrectionBwdInputs<'_, T>,
) -> Result<FusedGateOutputCorrectionBwdResult<T>, Error> {
    let plan = FusedGateOutputCorrectionBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.o.stream().clone();
    let mut y = FusedGateOutputCorrectionBwdResult {
        d_o: device.alloc(&stream, shape.len())?,
        dr: device.alloc(&stream, shape.len())?,
        dk: device.alloc(&stream, shape.len())?,
        dv: device.alloc(&stream, shape.len())?,
        dg: device.alloc(&stream, shape.len())?,
        dr_k: device.alloc(&stream, shape.parameter_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = FusedGateOutputCorrectionBwdOutputs {
        d_o: &mut y.d_o,
        dr: &mut y.dr,
        dk: &mut y.dk,
        dv: &mut y.dv,
        dg: &mut y.dg,
        dr_k: &mut y.dr_k,
    };
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
        Spans::of_heads::<T>(shape, &config::GATE_OUTPUT_CORRECTION).map(|spans| unit::<T>(&spans)),
        Spans::of_heads::<T>(shape, &config::GATE_OUTPUT_CORRECTION_BWD).map(|spans| bwd_unit::<T>(&spans)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedGateOutputCorrectionParams<T>>(
        "fused_gate_output_correction",
        SOURCE,
        T::DTYPE,
        &config::GATE_OUTPUT_CORRECTION,
    )
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedGateOutputCorrectionBwdParams<T>>(
        "fused_gate_output_correction_bwd",
        BWD_SOURCE,
        T::DTYPE,
        &config::GATE_OUTPUT_CORRECTION_BWD,
    )
}

/// Twin of `fla::rwkv7::FusedGateOutputCorrectionParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedGateOutputCorrectionParams<T> {
    o: Ptr<T>,
    r: Ptr<T>,
    k: Ptr<T>,
    r_k: Ptr<T>,
    v: Ptr<T>,
    g: Ptr<T>,
    out: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedGateOutputCorrectionParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedGateOutputCorrectionParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("o", "const Cfg::Element*", offset_of!(Self, o)),
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("r_k", "const Cfg::Element*", offset_of!(Self, r_k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("g", "const Cfg::Element*", offset_of!(Self, g)),
        Field::new("out", "Cfg::Element*", offset_of!(Self, out)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedGateOutputCorrectionBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedGateOutputCorrectionBwdParams<T> {
    o: Ptr<T>,
    r: Ptr<T>,
    k: Ptr<T>,
    r_k: Ptr<T>,
    v: Ptr<T>,
    g: Ptr<T>,
    d_out: Ptr<T>,
    d_o: PtrMut<T>,
    dr: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dg: PtrMut<T>,
    partials: PtrMut<f32>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedGateOutputCorrectionBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedGateOutputCorrectionBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("o", "const Cfg::Element*", offset_of!(Self, o)),
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("r_k", "const Cfg::Element*", offset_of!(Self, r_k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("g", "const Cfg::Element*", offset_of!(Self, g)),
        Field::new("d_out", "const Cfg::Element*", offset_of!(Self, d_out)),
        Field::new("d_o", "Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("dr", "Cfg::Element*", offset_of!(Self, dr)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dg", "Cfg::Element*", offset_of!(Self, dg)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

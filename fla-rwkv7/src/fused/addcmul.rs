//! The mixes of a token with its shifted neighbour, and their gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Field, Kernel, Params, Ptr, PtrMut, Source, Unit, Workspace};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, Spans, shapes_d};
use super::sums::{SumOutput, Sums};
use super::{ChannelShape, Mixes, check_lens, check_sixth, reborrow};
use crate::config;

const SOURCE: Source =
    Source { name: "fla/rwkv7/fused_addcmul.cu", text: include_str!("../../kernels/fused_addcmul.cu") };
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_addcmul_bwd.cu",
    text: include_str!("../../kernels/fused_addcmul_bwd.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedAddcmulInputs<'a, T> {
    /// Tokens: `[B, T, D]`.
    pub hidden: &'a dyn DevicePtr<T>,
    /// Token shift of `hidden`: `[B, T, D]`.
    pub delta: &'a dyn DevicePtr<T>,
    /// Mix of the receptance: `[D]`.
    pub xr: &'a dyn DevicePtr<T>,
    /// Mix of the decay: `[D]`.
    pub xw: &'a dyn DevicePtr<T>,
    /// Mix of the key: `[D]`.
    pub xk: &'a dyn DevicePtr<T>,
    /// Mix of the value: `[D]`.
    pub xv: &'a dyn DevicePtr<T>,
    /// Mix of the rate: `[D]`.
    pub xa: &'a dyn DevicePtr<T>,
    /// Mix of the output gate; absent when the model has none: `[D]`.
    pub xg: Option<&'a dyn DevicePtr<T>>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedAddcmulOutputs<'a, T> {
    /// Tokens mixed for the receptance: `[B, T, D]`.
    pub out_r: &'a mut dyn DevicePtrMut<T>,
    /// Tokens mixed for the decay: `[B, T, D]`.
    pub out_w: &'a mut dyn DevicePtrMut<T>,
    /// Tokens mixed for the key: `[B, T, D]`.
    pub out_k: &'a mut dyn DevicePtrMut<T>,
    /// Tokens mixed for the value: `[B, T, D]`.
    pub out_v: &'a mut dyn DevicePtrMut<T>,
    /// Tokens mixed for the rate: `[B, T, D]`.
    pub out_a: &'a mut dyn DevicePtrMut<T>,
    /// Tokens mixed for the output gate; present exactly when `xg` is: `[B, T, D]`.
    pub out_g: Option<&'a mut dyn DevicePtrMut<T>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedAddcmulResult<T> {
    /// Tokens mixed for the receptance: `[B, T, D]`.
    pub out_r: CudaSlice<T>,
    /// Tokens mixed for the decay: `[B, T, D]`.
    pub out_w: CudaSlice<T>,
    /// Tokens mixed for the key: `[B, T, D]`.
    pub out_k: CudaSlice<T>,
    /// Tokens mixed for the value: `[B, T, D]`.
    pub out_v: CudaSlice<T>,
    /// Tokens mixed for the rate: `[B, T, D]`.
    pub out_a: CudaSlice<T>,
    /// Tokens mixed for the output gate; present exactly when `xg` is: `[B, T, D]`.
    pub out_g: Option<CudaSlice<T>>,
}

/// The five or six mixes of each token with its shifted neighbour, made once for a shape and run many times.
/// When the tokens are at hand, [`FusedTokenShiftAddcmul`](crate::FusedTokenShiftAddcmul) makes them without
/// `delta`.
///
/// ```text
/// out_i = hidden + delta * x_i        for i in r, w, k, v, a and, if given, g
/// ```
///
/// | tensor        | shape       | dtype | meaning                                                                  |
/// |---------------|-------------|-------|--------------------------------------------------------------------------|
/// | `hidden`      | `[B, T, D]` | `T`   | tokens                                                                   |
/// | `delta`       | `[B, T, D]` | `T`   | token shift of `hidden`                                                  |
/// | `xr`          | `[D]`       | `T`   | mix of the receptance                                                    |
/// | `xw`          | `[D]`       | `T`   | mix of the decay                                                         |
/// | `xk`          | `[D]`       | `T`   | mix of the key                                                           |
/// | `xv`          | `[D]`       | `T`   | mix of the value                                                         |
/// | `xa`          | `[D]`       | `T`   | mix of the rate                                                          |
/// | `xg`          | `[D]`       | `T`   | optional; mix of the output gate; absent when the model has none         |
/// | `out_r` (out) | `[B, T, D]` | `T`   | tokens mixed for the receptance                                          |
/// | `out_w` (out) | `[B, T, D]` | `T`   | tokens mixed for the decay                                               |
/// | `out_k` (out) | `[B, T, D]` | `T`   | tokens mixed for the key                                                 |
/// | `out_v` (out) | `[B, T, D]` | `T`   | tokens mixed for the value                                               |
/// | `out_a` (out) | `[B, T, D]` | `T`   | tokens mixed for the rate                                                |
/// | `out_g` (out) | `[B, T, D]` | `T`   | optional; tokens mixed for the output gate; present exactly when `xg` is |
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
/// `fused_addcmul_rwkv7`.
#[derive(Debug)]
pub struct FusedAddcmul<T> {
    kernel: Kernel<FusedAddcmulParams<T>>,
    shape: ChannelShape,
    launch: Launch,
    mixes: i32,
}

impl<T: Element> FusedAddcmul<T> {
    /// Checks the shape and compiles or loads the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape, mixes: Mixes) -> Result<Self, Error> {
        let mixes = mixes.count();
        let spans = Spans::of_channels::<T>(shape, &config::ADDCMUL)?;
        let launch = spans.launch(device, &config::ADDCMUL)?;
        Ok(Self { kernel: device.kernel(&unit::<T>(&spans, mixes))?, shape: shape.clone(), launch, mixes })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Presence`] when one of `xg` and
    /// `out_g` is given without the other; [`Error::Context`] when the stream belongs to another context;
    /// [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedAddcmulInputs<'_, T>,
        y: &mut FusedAddcmulOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[
                ("hidden", Some(x.hidden.len())),
                ("delta", Some(x.delta.len())),
                ("out_r", Some(y.out_r.len())),
                ("out_w", Some(y.out_w.len())),
                ("out_k", Some(y.out_k.len())),
                ("out_v", Some(y.out_v.len())),
                ("out_a", Some(y.out_a.len())),
                ("out_g", y.out_g.as_ref().map(|t| t.len())),
            ],
        )?;
        check_lens(
            "[D]",
            shape.d,
            &[
                ("xr", Some(x.xr.len())),
                ("xw", Some(x.xw.len())),
                ("xk", Some(x.xk.len())),
                ("xv", Some(x.xv.len())),
                ("xa", Some(x.xa.len())),
                ("xg", x.xg.as_ref().map(|t| t.len())),
            ],
        )?;
        check_sixth(self.mixes, &[("xg", x.xg.is_some()), ("out_g", y.out_g.is_some())])?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedAddcmulParams {
            hidden: bind.read("hidden", x.hidden),
            delta: bind.read("delta", x.delta),
            factors: [
                bind.read("xr", x.xr),
                bind.read("xw", x.xw),
                bind.read("xk", x.xk),
                bind.read("xv", x.xv),
                bind.read("xa", x.xa),
                bind.read_opt("xg", x.xg),
            ],
            outs: [
                bind.write("out_r", &mut *y.out_r),
                bind.write("out_w", &mut *y.out_w),
                bind.write("out_k", &mut *y.out_k),
                bind.write("out_v", &mut *y.out_v),
                bind.write("out_a", &mut *y.out_a),
                bind.write_opt("out_g", y.out_g.as_deref_mut()),
            ],
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `hidden`.
///
/// # Errors
///
/// As [`FusedAddcmul::new`] and [`FusedAddcmul::run`].
pub fn fused_addcmul<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedAddcmulInputs<'_, T>,
) -> Result<FusedAddcmulResult<T>, Error> {
    let plan = FusedAddcmul::new(device, shape, Mixes::of(x.xg))?;
    let stream: Arc<CudaStream> = x.hidden.stream().clone();
    let mut y = FusedAddcmulResult {
        out_r: device.alloc(&stream, shape.len())?,
        out_w: device.alloc(&stream, shape.len())?,
        out_k: device.alloc(&stream, shape.len())?,
        out_v: device.alloc(&stream, shape.len())?,
        out_a: device.alloc(&stream, shape.len())?,
        out_g: match x.xg {
            Some(_) => Some(device.alloc(&stream, shape.len())?),
            None => None,
        },
    };
    let mut outputs = FusedAddcmulOutputs {
        out_r: &mut y.out_r,
        out_w: &mut y.out_w,
        out_k: &mut y.out_k,
        out_v: &mut y.out_v,
        out_a: &mut y.out_a,
        out_g: y.out_g.as_mut().map(|t| t as &mut dyn DevicePtrMut<T>),
    };
    plan.run(&stream, x, &mut outputs)?;
    Ok(y)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedAddcmulBwdInputs<'a, T> {
    /// Token shift of `hidden`: `[B, T, D]`.
    pub delta: &'a dyn DevicePtr<T>,
    /// Mix of the receptance: `[D]`.
    pub xr: &'a dyn DevicePtr<T>,
    /// Mix of the decay: `[D]`.
    pub xw: &'a dyn DevicePtr<T>,
    /// Mix of the key: `[D]`.
    pub xk: &'a dyn DevicePtr<T>,
    /// Mix of the value: `[D]`.
    pub xv: &'a dyn DevicePtr<T>,
    /// Mix of the rate: `[D]`.
    pub xa: &'a dyn DevicePtr<T>,
    /// Mix of the output gate; absent when the model has none: `[D]`.
    pub xg: Option<&'a dyn DevicePtr<T>>,
    /// Gradient of `out_r`: `[B, T, D]`.
    pub d_out_r: &'a dyn DevicePtr<T>,
    /// Gradient of `out_w`: `[B, T, D]`.
    pub d_out_w: &'a dyn DevicePtr<T>,
    /// Gradient of `out_k`: `[B, T, D]`.
    pub d_out_k: &'a dyn DevicePtr<T>,
    /// Gradient of `out_v`: `[B, T, D]`.
    pub d_out_v: &'a dyn DevicePtr<T>,
    /// Gradient of `out_a`: `[B, T, D]`.
    pub d_out_a: &'a dyn DevicePtr<T>,
    /// Gradient of `out_g`; present exactly when `xg` is: `[B, T, D]`.
    pub d_out_g: Option<&'a dyn DevicePtr<T>>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedAddcmulBwdOutputs<'a, T> {
    /// Gradient of `hidden`: `[B, T, D]`.
    pub d_hidden: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `delta`: `[B, T, D]`.
    pub d_delta: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `xr`: `[D]`.
    pub dxr: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `xw`: `[D]`.
    pub dxw: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `xk`: `[D]`.
    pub dxk: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `xv`: `[D]`.
    pub dxv: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `xa`: `[D]`.
    pub dxa: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `xg`; present exactly when `xg` is: `[D]`.
    pub dxg: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedAddcmulBwdResult<T> {
    /// Gradient of `hidden`: `[B, T, D]`.
    pub d_hidden: CudaSlice<T>,
    /// Gradient of `delta`: `[B, T, D]`.
    pub d_delta: CudaSlice<T>,
    /// Gradient of `xr`: `[D]`.
    pub dxr: CudaSlice<f32>,
    /// Gradient of `xw`: `[D]`.
    pub dxw: CudaSlice<f32>,
    /// Gradient of `xk`: `[D]`.
    pub dxk: CudaSlice<f32>,
    /// Gradient of `xv`: `[D]`.
    pub dxv: CudaSlice<f32>,
    /// Gradient of `xa`: `[D]`.
    pub dxa: CudaSlice<f32>,
    /// Gradient of `xg`; present exactly when `xg` is: `[D]`.
    pub dxg: Option<CudaSlice<f32>>,
}

/// Gradients of [`FusedAddcmul`], made once for a shape and run many times.
///
/// ```text
/// d_hidden = sum_i d_out_i        d_delta = sum_i d_out_i * x_i        dx_i = sum over tokens of d_out_i * delta
/// ```
///
/// | tensor           | shape       | dtype | meaning                                                          |
/// |------------------|-------------|-------|------------------------------------------------------------------|
/// | `delta`          | `[B, T, D]` | `T`   | token shift of `hidden`                                          |
/// | `xr`             | `[D]`       | `T`   | mix of the receptance                                            |
/// | `xw`             | `[D]`       | `T`   | mix of the decay                                                 |
/// | `xk`             | `[D]`       | `T`   | mix of the key                                                   |
/// | `xv`             | `[D]`       | `T`   | mix of the value                                                 |
/// | `xa`             | `[D]`       | `T`   | mix of the rate                                                  |
/// | `xg`             | `[D]`       | `T`   | optional; mix of the output gate; absent when the model has none |
/// | `d_out_r`        | `[B, T, D]` | `T`   | gradient of `out_r`                                              |
/// | `d_out_w`        | `[B, T, D]` | `T`   | gradient of `out_w`                                              |
/// | `d_out_k`        | `[B, T, D]` | `T`   | gradient of `out_k`                                              |
/// | `d_out_v`        | `[B, T, D]` | `T`   | gradient of `out_v`                                              |
/// | `d_out_a`        | `[B, T, D]` | `T`   | gradient of `out_a`                                              |
/// | `d_out_g`        | `[B, T, D]` | `T`   | optional; gradient of `out_g`; present exactly when `xg` is      |
/// | `d_hidden` (out) | `[B, T, D]` | `T`   | gradient of `hidden`                                             |
/// | `d_delta` (out)  | `[B, T, D]` | `T`   | gradient of `delta`                                              |
/// | `dxr` (out)      | `[D]`       | f32   | gradient of `xr`                                                 |
/// | `dxw` (out)      | `[D]`       | f32   | gradient of `xw`                                                 |
/// | `dxk` (out)      | `[D]`       | f32   | gradient of `xk`                                                 |
/// | `dxv` (out)      | `[D]`       | f32   | gradient of `xv`                                                 |
/// | `dxa` (out)      | `[D]`       | f32   | gradient of `xa`                                                 |
/// | `dxg` (out)      | `[D]`       | f32   | optional; gradient of `xg`; present exactly when `xg` is         |
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
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's backward writes
/// `d_hidden` over `hidden`; this one writes over nothing.
#[derive(Debug)]
pub struct FusedAddcmulBwd<T> {
    kernel: Kernel<FusedAddcmulBwdParams<T>>,
    shape: ChannelShape,
    launch: Launch,
    mixes: i32,
    sums: Sums,
}

impl<T: Element> FusedAddcmulBwd<T> {
    /// Checks the shape and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D is 0 or too large; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`]
    /// or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &ChannelShape, mixes: Mixes) -> Result<Self, Error> {
        let mixes = mixes.count();
        let spans = Spans::of_channels::<T>(shape, &config::ADDCMUL_BWD)?;
        let launch = spans.launch(device, &config::ADDCMUL_BWD)?;
        Ok(Self {
            kernel: device.kernel(&bwd_unit::<T>(&spans, mixes))?,
            shape: shape.clone(),
            launch,
            mixes,
            sums: Sums::new(device, launch.groups, mixes as usize, shape.d)?,
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
    /// [`Error::Len`] and [`Error::Align`], which name the tensor; [`Error::Presence`] when `xg`, `d_out_g`
    /// and `dxg` are not given together; [`Error::Context`] when the stream belongs to another context;
    /// [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedAddcmulBwdInputs<'_, T>,
        y: &mut FusedAddcmulBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[
                ("delta", Some(x.delta.len())),
                ("d_out_r", Some(x.d_out_r.len())),
                ("d_out_w", Some(x.d_out_w.len())),
                ("d_out_k", Some(x.d_out_k.len())),
                ("d_out_v", Some(x.d_out_v.len())),
                ("d_out_a", Some(x.d_out_a.len())),
                ("d_out_g", x.d_out_g.as_ref().map(|t| t.len())),
                ("d_hidden", Some(y.d_hidden.len())),
                ("d_delta", Some(y.d_delta.len())),
            ],
        )?;
        check_lens(
            "[D]",
            shape.d,
            &[
                ("xr", Some(x.xr.len())),
                ("xw", Some(x.xw.len())),
                ("xk", Some(x.xk.len())),
                ("xv", Some(x.xv.len())),
                ("xa", Some(x.xa.len())),
                ("xg", x.xg.as_ref().map(|t| t.len())),
                ("dxr", Some(y.dxr.len())),
                ("dxw", Some(y.dxw.len())),
                ("dxk", Some(y.dxk.len())),
                ("dxv", Some(y.dxv.len())),
                ("dxa", Some(y.dxa.len())),
                ("dxg", y.dxg.as_ref().map(|t| t.len())),
            ],
        )?;
        let sixth = [("xg", x.xg.is_some()), ("d_out_g", x.d_out_g.is_some()), ("dxg", y.dxg.is_some())];
        check_sixth(self.mixes, &sixth)?;
        let mut sums: [SumOutput<'_>; 6] = [
            ("dxr", Some(&mut *y.dxr)),
            ("dxw", Some(&mut *y.dxw)),
            ("dxk", Some(&mut *y.dxk)),
            ("dxv", Some(&mut *y.dxv)),
            ("dxa", Some(&mut *y.dxa)),
            ("dxg", reborrow(&mut y.dxg)),
        ];
        self.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut partials = workspace.take::<f32>(self.sums.partials_len())?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedAddcmulBwdParams {
            delta: bind.read("delta", x.delta),
            factors: [
                bind.read("xr", x.xr),
                bind.read("xw", x.xw),
                bind.read("xk", x.xk),
                bind.read("xv", x.xv),
                bind.read("xa", x.xa),
                bind.read_opt("xg", x.xg),
            ],
            d_outs: [
                bind.read("d_out_r", x.d_out_r),
                bind.read("d_out_w", x.d_out_w),
                bind.read("d_out_k", x.d_out_k),
                bind.read("d_out_v", x.d_out_v),
                bind.read("d_out_a", x.d_out_a),
                bind.read_opt("d_out_g", x.d_out_g),
            ],
            d_hidden: bind.write("d_hidden", &mut *y.d_hidden),
            d_delta: bind.write("d_delta", &mut *y.d_delta),
            partials: bind.write("workspace", &mut partials),
            rows: self.launch.params,
        })?;
        self.sums.run(stream, &partials, sums)
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `delta`.
///
/// # Errors
///
/// As [`FusedAddcmulBwd::new`] and [`FusedAddcmulBwd::run`].
pub fn fused_addcmul_bwd<T: Element>(
    device: &Device,
    shape: &ChannelShape,
    x: &FusedAddcmulBwdInputs<'_, T>,
) -> Result<FusedAddcmulBwdResult<T>, Error> {
    let plan = FusedAddcmulBwd::new(device, shape, Mixes::of(x.xg))?;
    let stream: Arc<CudaStream> = x.delta.stream().clone();
    let mut y = FusedAddcmulBwdResult {
        d_hidden: device.alloc(&stream, shape.len())?,
        d_delta: device.alloc(&stream, shape.len())?,
        dxr: device.alloc(&stream, shape.d)?,
        dxw: device.alloc(&stream, shape.d)?,
        dxk: device.alloc(&stream, shape.d)?,
        dxv: device.alloc(&stream, shape.d)?,
        dxa: device.alloc(&stream, shape.d)?,
        dxg: match x.xg {
            Some(_) => Some(device.alloc(&stream, shape.d)?),
            None => None,
        },
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = FusedAddcmulBwdOutputs {
        d_hidden: &mut y.d_hidden,
        d_delta: &mut y.d_delta,
        dxr: &mut y.dxr,
        dxw: &mut y.dxw,
        dxk: &mut y.dxk,
        dxv: &mut y.dxv,
        dxa: &mut y.dxa,
        dxg: y.dxg.as_mut().map(|t| t as &mut dyn DevicePtrMut<f32>),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

pub(super) fn units() -> Vec<Unit> {
    let [common, other @ ..] = &shapes_d();
    let mut out: Vec<Unit> = units_of::<f32>(common, 6).chain(units_of::<f16>(common, 6)).collect();
    out.extend(units_of::<bf16>(common, 6));
    out.extend(other.iter().flat_map(|shape| units_of::<bf16>(shape, 6)));
    out
}

/// A shape that is refused has no units.
pub(super) fn units_of<T: Element>(shape: &ChannelShape, mixes: i32) -> impl Iterator<Item = Unit> + use<T> {
    [
        Spans::of_channels::<T>(shape, &config::ADDCMUL).map(|spans| unit::<T>(&spans, mixes)),
        Spans::of_channels::<T>(shape, &config::ADDCMUL_BWD).map(|spans| bwd_unit::<T>(&spans, mixes)),
    ]
    .into_iter()
    .flatten()
}

fn unit<T: Element>(spans: &Spans, mixes: i32) -> Unit {
    spans
        .unit::<FusedAddcmulParams<T>>("fused_addcmul", SOURCE, T::DTYPE, &config::ADDCMUL)
        .with("MIXES", mixes)
}

fn bwd_unit<T: Element>(spans: &Spans, mixes: i32) -> Unit {
    spans
        .unit::<FusedAddcmulBwdParams<T>>("fused_addcmul_bwd", BWD_SOURCE, T::DTYPE, &config::ADDCMUL_BWD)
        .with("MIXES", mixes)
}

/// Twin of `fla::rwkv7::FusedAddcmulParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedAddcmulParams<T> {
    hidden: Ptr<T>,
    delta: Ptr<T>,
    factors: [Ptr<T>; 6],
    outs: [PtrMut<T>; 6],
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedAddcmulParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedAddcmulParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("hidden", "const Cfg::Element*", offset_of!(Self, hidden)),
        Field::new("delta", "const Cfg::Element*", offset_of!(Self, delta)),
        Field::new("factors", "const Cfg::Element*[6]", offset_of!(Self, factors)),
        Field::new("outs", "Cfg::Element*[6]", offset_of!(Self, outs)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedAddcmulBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedAddcmulBwdParams<T> {
    delta: Ptr<T>,
    factors: [Ptr<T>; 6],
    d_outs: [Ptr<T>; 6],
    d_hidden: PtrMut<T>,
    d_delta: PtrMut<T>,
    partials: PtrMut<f32>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedAddcmulBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedAddcmulBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("delta", "const Cfg::Element*", offset_of!(Self, delta)),
        Field::new("factors", "const Cfg::Element*[6]", offset_of!(Self, factors)),
        Field::new("d_outs", "const Cfg::Element*[6]", offset_of!(Self, d_outs)),
        Field::new("d_hidden", "Cfg::Element*", offset_of!(Self, d_hidden)),
        Field::new("d_delta", "Cfg::Element*", offset_of!(Self, d_delta)),
        Field::new("partials", "float*", offset_of!(Self, partials)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

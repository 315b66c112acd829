//! Channel mixing: token shift, two matrix products of cuBLAS and a squared rectifier, and their gradients.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Cublas, Device, Element, Error, Factor, Field, Intermediate, Kernel, Params, Product, Ptr, PtrMut,
    RawSlice, SeqLens, Source, Unit, Workspace, check_align,
};
use half::{bf16, f16};

use super::rows::{Launch, RowsParams, SequencesParams, Spans};
use super::sums::SumOutput;
use super::token_shift_addcmul::{
    FusedTokenShiftAddcmul, FusedTokenShiftAddcmulBwd, FusedTokenShiftAddcmulBwdParams,
    FusedTokenShiftAddcmulParams,
};
use super::{ChannelShape, check_lens, reborrow, tokens};
use crate::config;

const SOURCE: Source = Source {
    name: "fla/rwkv7/fused_channel_mixing.cu",
    text: include_str!("../../kernels/fused_channel_mixing.cu"),
};
const BWD_SOURCE: Source = Source {
    name: "fla/rwkv7/fused_channel_mixing_bwd.cu",
    text: include_str!("../../kernels/fused_channel_mixing_bwd.cu"),
};

/// Dims of channel mixing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelMixingShape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Channels of a token, D.
    pub d: usize,
    /// Channels of the hidden layer, F.
    pub f: usize,
}

impl ChannelMixingShape {
    /// Elements of a `[B, T, D]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn len(&self) -> usize {
        tokens(&self.seqs).saturating_mul(self.d)
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of a `[B, T, F]` tensor.
    #[must_use]
    pub fn hidden_len(&self) -> usize {
        tokens(&self.seqs).saturating_mul(self.f)
    }

    /// Elements of a `[N, D]` tensor.
    #[must_use]
    pub fn cache_len(&self) -> usize {
        self.seqs.n().saturating_mul(self.d)
    }

    /// Elements of a weight, `[D, F]` or `[F, D]`.
    #[must_use]
    pub fn weight_len(&self) -> usize {
        self.d.saturating_mul(self.f)
    }

    fn channels(&self) -> ChannelShape {
        ChannelShape { seqs: self.seqs.clone(), d: self.d }
    }

    /// Spans of the hidden layer; an error about its width is about F.
    fn hidden<T: Element>(&self, config: &config::FusedConfig) -> Result<Spans, Error> {
        let shape = ChannelShape { seqs: self.seqs.clone(), d: self.f };
        Spans::of_channels::<T>(&shape, config).map_err(|error| match error {
            Error::Dim { wanted, got, .. } => Error::Dim { dim: "F", wanted, got },
            other => other,
        })
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedChannelMixingInputs<'a, T> {
    /// Tokens: `[B, T, D]`.
    pub x: &'a dyn DevicePtr<T>,
    /// Token before the first of each sequence; zero when absent: `[N, D]`.
    pub x_prev: Option<&'a dyn DevicePtr<T>>,
    /// How far each channel is mixed with its predecessor: `[D]`.
    pub x_k: &'a dyn DevicePtr<T>,
    /// Weight of the first product: `[D, F]`.
    pub key_weight: &'a dyn DevicePtr<T>,
    /// Weight of the second product: `[F, D]`.
    pub value_weight: &'a dyn DevicePtr<T>,
}

/// What the pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedChannelMixingOutputs<'a, T> {
    /// Mixed channels: `[B, T, D]`.
    pub out: &'a mut dyn DevicePtrMut<T>,
    /// Last token of each sequence, the `x_prev` of the next call; not written when absent: `[N, D]`.
    pub x_last: Option<&'a mut dyn DevicePtrMut<T>>,
    /// m, for a backward pass that need not shift again; not written when absent: `[B, T, D]`.
    pub mixed: Option<&'a mut dyn DevicePtrMut<T>>,
    /// z, for a backward pass that need not multiply again; not written when absent: `[B, T, F]`.
    pub hidden: Option<&'a mut dyn DevicePtrMut<T>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedChannelMixingResult<T> {
    /// Mixed channels: `[B, T, D]`.
    pub out: CudaSlice<T>,
    /// Last token of each sequence, the `x_prev` of the next call: `[N, D]`.
    pub x_last: CudaSlice<T>,
}

/// The feed-forward half of an RWKV-7 block, made once for a shape and run many times.
///
/// ```text
/// m_t = x_t + (x_{t-1} - x_t) * x_k        z = m key_weight        out = relu(z)^2 value_weight
/// x_{-1} = x_prev        x_last = x of the last token of each sequence
/// ```
///
/// | tensor         | shape       | dtype | meaning                                                     |
/// |----------------|-------------|-------|-------------------------------------------------------------|
/// | `x`            | `[B, T, D]` | `T`   | tokens                                                      |
/// | `x_prev`       | `[N, D]`    | `T`   | optional; token before the first of each sequence, or zero  |
/// | `x_k`          | `[D]`       | `T`   | how far each channel is mixed with its predecessor          |
/// | `key_weight`   | `[D, F]`    | `T`   | weight of the first product                                 |
/// | `value_weight` | `[F, D]`    | `T`   | weight of the second product                                |
/// | `out` (out)    | `[B, T, D]` | `T`   | mixed channels                                              |
/// | `x_last` (out) | `[N, D]`    | `T`   | optional; last token of each sequence                       |
/// | `mixed` (out)  | `[B, T, D]` | `T`   | optional; m, for the backward pass                          |
/// | `hidden` (out) | `[B, T, F]` | `T`   | optional; z, for the backward pass                          |
///
/// `T` is f32, bf16 or f16; D and F may be any size, and multiples of 16 bytes are fastest. Sequences are dense or
/// packed; one without tokens hands its `x_prev` through. The matrix products are cuBLAS's, which is opened when a plan
/// is made. A first run loads its kernels, which the driver refuses inside a graph capture: run once before capturing.
///
/// # Numerics
///
/// Sums are in f32, f32 products without TF32. m, z and relu(z)^2 are rounded to `T` between the products. The error
/// against float64 stays under the rows `channel mixing, fused` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `channel_mixing_rwkv7`, whose second result is the last row of the batch.
#[derive(Debug)]
pub struct FusedChannelMixing<T> {
    cublas: Arc<Cublas>,
    shift: FusedTokenShiftAddcmul<T>,
    kernel: Kernel<FusedChannelMixingParams<T>>,
    launch: Launch,
    shape: ChannelMixingShape,
}

impl<T: Element> FusedChannelMixing<T> {
    /// Checks the shape, opens cuBLAS, and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when D or F is 0 or too large; [`Error::NoCublas`] and [`Error::Cublas`] when the products cannot
    /// be had; [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when the kernels
    /// cannot.
    pub fn new(device: &Device, shape: &ChannelMixingShape) -> Result<Self, Error> {
        let hidden = shape.hidden::<T>(&config::CHANNEL_MIXING)?;
        let shift = FusedTokenShiftAddcmul::with_mixes(device, &shape.channels(), 1)?;
        let launch = hidden.launch(device, &config::CHANNEL_MIXING)?;
        let kernel = device.kernel(&unit::<T>(&hidden))?;
        Ok(Self { cublas: device.cublas()?, shift, kernel, launch, shape: shape.clone() })
    }

    /// Bytes of the workspace that a run needs: m, relu(z)^2 and cuBLAS's own.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let bytes = |len: usize| len.saturating_mul(size_of::<T>());
        Workspace::bytes(&[bytes(self.shape.len()), bytes(self.shape.hidden_len()), Cublas::WORKSPACE_BYTES])
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph after a first
    /// run.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] and [`Error::Align`], which name the tensor, and [`Error::Context`] when the stream belongs to
    /// another context: nothing has been launched then. [`Error::Cublas`] or [`Error::Driver`] when a launch is refused.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedChannelMixingInputs<'_, T>,
        y: &mut FusedChannelMixingOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[
                ("x", Some(x.x.len())),
                ("out", Some(y.out.len())),
                ("mixed", y.mixed.as_ref().map(|t| t.len())),
            ],
        )?;
        check_lens(
            "[N, D]",
            shape.cache_len(),
            &[("x_prev", x.x_prev.map(|t| t.len())), ("x_last", y.x_last.as_ref().map(|t| t.len()))],
        )?;
        check_lens("[D]", shape.d, &[("x_k", Some(x.x_k.len()))])?;
        check_lens("[B, T, F]", shape.hidden_len(), &[("hidden", y.hidden.as_ref().map(|t| t.len()))])?;
        check_lens("[D, F]", shape.weight_len(), &[("key_weight", Some(x.key_weight.len()))])?;
        check_lens("[F, D]", shape.weight_len(), &[("value_weight", Some(x.value_weight.len()))])?;
        let mut saved_mixed = saved(stream, "mixed", &mut y.mixed)?;
        let mut saved_hidden = saved(stream, "hidden", &mut y.hidden)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let own_mixed = workspace.take::<T>(shape.len())?;
        let mut h = workspace.take::<T>(shape.hidden_len())?;
        let mut products = workspace.take::<u8>(Cublas::WORKSPACE_BYTES)?;
        let mut mixed = saved_mixed.as_mut().map_or(own_mixed, Intermediate::slice);

        let x_last = reborrow(&mut y.x_last);
        shift(&self.shift, stream, &Shifted { x: x.x, x_prev: x.x_prev, x_k: x.x_k }, (&mut mixed, x_last))?;
        let (m, d, f) = (tokens(&shape.seqs), shape.d, shape.f);
        let key = Product { m, n: f, k: d };
        let factors = [Factor::Plain(&mixed), Factor::Plain(x.key_weight)];
        if let Some(hidden) = &mut saved_hidden {
            let mut z = hidden.slice();
            self.cublas.multiply(stream, key, factors, (&mut z, &mut products))?;
            self.square(stream, Some(&z), &mut h)?;
        } else {
            self.cublas.multiply(stream, key, factors, (&mut h, &mut products))?;
            self.square(stream, None, &mut h)?;
        }
        let value = Product { m, n: d, k: f };
        let factors = [Factor::Plain(&h), Factor::Plain(x.value_weight)];
        self.cublas.multiply(stream, value, factors, (&mut *y.out, &mut products))
    }

    /// h = relu(z)^2; z lies in `h` when absent.
    fn square(
        &self,
        stream: &CudaStream,
        z: Option<&RawSlice<'_, T>>,
        h: &mut RawSlice<'_, T>,
    ) -> Result<(), Error> {
        self.kernel.launch(stream, self.launch.grid, |bind| FusedChannelMixingParams {
            z: bind.read_opt("hidden", z),
            h: bind.write("workspace", h),
            rows: self.launch.params,
        })
    }
}

/// Makes the plan, allocates outputs and workspace and runs, on the stream of `x`.
///
/// # Errors
///
/// As [`FusedChannelMixing::new`] and [`FusedChannelMixing::run`].
pub fn fused_channel_mixing<T: Element>(
    device: &Device,
    shape: &ChannelMixingShape,
    x: &FusedChannelMixingInputs<'_, T>,
) -> Result<FusedChannelMixingResult<T>, Error> {
    let plan = FusedChannelMixing::new(device, shape)?;
    let stream: Arc<CudaStream> = x.x.stream().clone();
    let mut y = FusedChannelMixingResult {
        out: device.alloc(&stream, shape.len())?,
        x_last: device.alloc(&stream, shape.cache_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs =
        FusedChannelMixingOutputs { out: &mut y.out, x_last: Some(&mut y.x_last), mixed: None, hidden: None };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

/// What the backward pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedChannelMixingBwdInputs<'a, T> {
    /// Tokens: `[B, T, D]`.
    pub x: &'a dyn DevicePtr<T>,
    /// Token before the first of each sequence; zero when absent: `[N, D]`.
    pub x_prev: Option<&'a dyn DevicePtr<T>>,
    /// How far each channel is mixed with its predecessor: `[D]`.
    pub x_k: &'a dyn DevicePtr<T>,
    /// Weight of the first product: `[D, F]`.
    pub key_weight: &'a dyn DevicePtr<T>,
    /// Weight of the second product: `[F, D]`.
    pub value_weight: &'a dyn DevicePtr<T>,
    /// m as the forward pass has left it; formed again when absent: `[B, T, D]`.
    pub mixed: Option<&'a dyn DevicePtr<T>>,
    /// z as the forward pass has left it; formed again when absent: `[B, T, F]`.
    pub hidden: Option<&'a dyn DevicePtr<T>>,
    /// Gradient of `out`: `[B, T, D]`.
    pub d_out: &'a dyn DevicePtr<T>,
    /// Gradient of `x_last`; zero when absent: `[N, D]`.
    pub d_x_last: Option<&'a dyn DevicePtr<T>>,
}

/// What the backward pass writes, whole; never an input.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedChannelMixingBwdOutputs<'a, T> {
    /// Gradient of `x`: `[B, T, D]`.
    pub dx: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `x_prev`, also when there was none; not written when absent: `[N, D]`.
    pub dx_prev: Option<&'a mut dyn DevicePtrMut<T>>,
    /// Gradient of `x_k`: `[D]`.
    pub dx_k: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `key_weight`: `[D, F]`.
    pub d_key_weight: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of `value_weight`: `[F, D]`.
    pub d_value_weight: &'a mut dyn DevicePtrMut<f32>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedChannelMixingBwdResult<T> {
    /// Gradient of `x`: `[B, T, D]`.
    pub dx: CudaSlice<T>,
    /// Gradient of `x_prev`, also when there was none: `[N, D]`.
    pub dx_prev: CudaSlice<T>,
    /// Gradient of `x_k`: `[D]`.
    pub dx_k: CudaSlice<f32>,
    /// Gradient of `key_weight`: `[D, F]`.
    pub d_key_weight: CudaSlice<f32>,
    /// Gradient of `value_weight`: `[F, D]`.
    pub d_value_weight: CudaSlice<f32>,
}

/// Gradients of [`FusedChannelMixing`], made once for a shape and run many times.
///
/// ```text
/// dh = d_out value_weight^T        dz = 2 relu(z) * dh        dm = dz key_weight^T
/// d_value_weight = h^T d_out, h = relu(z)^2        d_key_weight = m^T dz
/// dx_t = dm_t - (dm * x_k)_t + (dm * x_k)_{t+1}, with d_x_last in place of the last term at the last token
/// dx_prev = dm * x_k at the first token        dx_k = sum over tokens of dm * (x_{t-1} - x_t)
/// ```
///
/// | tensor                 | shape       | dtype | meaning                                                    |
/// |------------------------|-------------|-------|------------------------------------------------------------|
/// | `x`                    | `[B, T, D]` | `T`   | tokens                                                     |
/// | `x_prev`               | `[N, D]`    | `T`   | optional; token before the first of each sequence, or zero |
/// | `x_k`                  | `[D]`       | `T`   | how far each channel is mixed with its predecessor         |
/// | `key_weight`           | `[D, F]`    | `T`   | weight of the first product                                |
/// | `value_weight`         | `[F, D]`    | `T`   | weight of the second product                               |
/// | `mixed`                | `[B, T, D]` | `T`   | optional; m, or it is formed again                         |
/// | `hidden`               | `[B, T, F]` | `T`   | optional; z, or it is formed again                         |
/// | `d_out`                | `[B, T, D]` | `T`   | gradient of `out`                                          |
/// | `d_x_last`             | `[N, D]`    | `T`   | optional; gradient of `x_last`, or zero                    |
/// | `dx` (out)             | `[B, T, D]` | `T`   | gradient of `x`                                            |
/// | `dx_prev` (out)        | `[N, D]`    | `T`   | optional; gradient of `x_prev`                             |
/// | `dx_k` (out)           | `[D]`       | f32   | gradient of `x_k`                                          |
/// | `d_key_weight` (out)   | `[D, F]`    | f32   | gradient of `key_weight`                                   |
/// | `d_value_weight` (out) | `[F, D]`    | f32   | gradient of `value_weight`                                 |
///
/// Types, sizes, sequences and cuBLAS are as with [`FusedChannelMixing`].
///
/// # Numerics
///
/// Sums are in f32, f32 products without TF32. m, z, h, dh, dz and dm are rounded to `T` between the products; gradients
/// of parameters are f32. The error against float64 stays under the rows `channel mixing, fused` of
/// `fla_reference::tolerance`. The same inputs give the same bits on the same GPU.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedChannelMixingBwd<T> {
    cublas: Arc<Cublas>,
    shift: FusedTokenShiftAddcmul<T>,
    shift_bwd: FusedTokenShiftAddcmulBwd<T>,
    kernel: Kernel<FusedChannelMixingBwdParams<T>>,
    launch: Launch,
    shape: ChannelMixingShape,
}

impl<T: Element> FusedChannelMixingBwd<T> {
    /// Checks the shape, opens cuBLAS, and compiles or loads the kernels.
    ///
    /// # Errors
    ///
    /// As [`FusedChannelMixing::new`].
    pub fn new(device: &Device, shape: &ChannelMixingShape) -> Result<Self, Error> {
        let hidden = shape.hidden::<T>(&config::CHANNEL_MIXING_BWD)?;
        let shift = FusedTokenShiftAddcmul::with_mixes(device, &shape.channels(), 1)?;
        let shift_bwd = FusedTokenShiftAddcmulBwd::with_mixes(device, &shape.channels(), 1)?;
        let launch = hidden.launch(device, &config::CHANNEL_MIXING_BWD)?;
        let kernel = device.kernel(&bwd_unit::<T>(&hidden))?;
        Ok(Self { cublas: device.cublas()?, shift, shift_bwd, kernel, launch, shape: shape.clone() })
    }

    /// Bytes of the workspace that a run needs: m and dm, h, dz, partial sums and cuBLAS's own.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let bytes = |len: usize| len.saturating_mul(size_of::<T>());
        let hidden = bytes(self.shape.hidden_len());
        let partials = self.shift_bwd.workspace_bytes();
        Workspace::bytes(&[bytes(self.shape.len()), hidden, hidden, partials, Cublas::WORKSPACE_BYTES])
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph after a first
    /// run.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// As [`FusedChannelMixing::run`].
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedChannelMixingBwdInputs<'_, T>,
        y: &mut FusedChannelMixingBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        self.check(stream, x, y)?;
        let mut sums: [SumOutput<'_>; 1] = [("dx_k", Some(&mut *y.dx_k))];
        self.shift_bwd.sums.check(stream, &mut sums)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut own_mixed = workspace.take::<T>(shape.len())?;
        let mut h = workspace.take::<T>(shape.hidden_len())?;
        let mut dz = workspace.take::<T>(shape.hidden_len())?;
        let mut partials = workspace.take::<f32>(self.shift_bwd.sums.partials_len())?;
        let mut products = workspace.take::<u8>(Cublas::WORKSPACE_BYTES)?;
        let (m, d, f) = (tokens(&shape.seqs), shape.d, shape.f);

        if x.mixed.is_none() {
            let inputs = Shifted { x: x.x, x_prev: x.x_prev, x_k: x.x_k };
            shift(&self.shift, stream, &inputs, (&mut own_mixed, None))?;
        }
        if x.hidden.is_none() {
            let factors = [Factor::Plain(x.mixed.unwrap_or(&own_mixed)), Factor::Plain(x.key_weight)];
            self.cublas.multiply(stream, Product { m, n: f, k: d }, factors, (&mut h, &mut products))?;
        }
        let factors = [Factor::Plain(x.d_out), Factor::Transposed(x.value_weight)];
        self.cublas.multiply(stream, Product { m, n: f, k: d }, factors, (&mut dz, &mut products))?;
        self.kernel.launch(stream, self.launch.grid, |bind| FusedChannelMixingBwdParams {
            z: bind.read_opt("hidden", x.hidden),
            h: bind.write("workspace", &mut h),
            d_hidden: bind.write("workspace", &mut dz),
            rows: self.launch.params,
        })?;
        let factors = [Factor::Transposed(&h), Factor::Plain(x.d_out)];
        let value = Product { m: f, n: d, k: m };
        self.cublas.multiply(stream, value, factors, (&mut *y.d_value_weight, &mut products))?;
        let factors = [Factor::Transposed(x.mixed.unwrap_or(&own_mixed)), Factor::Plain(&dz)];
        let key = Product { m: d, n: f, k: m };
        self.cublas.multiply(stream, key, factors, (&mut *y.d_key_weight, &mut products))?;

        // m is used up, so dm takes its place.
        let mut dm = own_mixed;
        let factors = [Factor::Plain(&dz), Factor::Transposed(x.key_weight)];
        self.cublas.multiply(stream, Product { m, n: d, k: f }, factors, (&mut dm, &mut products))?;
        let shift = &self.shift_bwd;
        shift.kernel.launch(stream, shift.launch.grid, |bind| FusedTokenShiftAddcmulBwdParams {
            x: bind.read("x", x.x),
            cache: bind.read_opt("x_prev", x.x_prev),
            factors: first(bind.read("x_k", x.x_k), Ptr::NULL),
            d_outs: first(bind.read("workspace", &dm), Ptr::NULL),
            d_cache_out: bind.read_opt("d_x_last", x.d_x_last),
            dx: bind.write("dx", &mut *y.dx),
            d_cache: bind.write_opt("dx_prev", y.dx_prev.as_deref_mut()),
            partials: bind.write("workspace", &mut partials),
            seqs: SequencesParams::new(&shape.seqs, bind.read_opt("cu_seqlens", shift.cu_seqlens.as_ref())),
            rows: shift.launch.params,
        })?;
        shift.sums.run(stream, &partials, sums)
    }

    /// Everything that a launch would refuse, before the first.
    fn check(
        &self,
        stream: &CudaStream,
        x: &FusedChannelMixingBwdInputs<'_, T>,
        y: &mut FusedChannelMixingBwdOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_lens(
            "[B, T, D]",
            shape.len(),
            &[
                ("x", Some(x.x.len())),
                ("mixed", x.mixed.map(|t| t.len())),
                ("d_out", Some(x.d_out.len())),
                ("dx", Some(y.dx.len())),
            ],
        )?;
        check_lens(
            "[N, D]",
            shape.cache_len(),
            &[
                ("x_prev", x.x_prev.map(|t| t.len())),
                ("d_x_last", x.d_x_last.map(|t| t.len())),
                ("dx_prev", y.dx_prev.as_ref().map(|t| t.len())),
            ],
        )?;
        check_lens("[D]", shape.d, &[("x_k", Some(x.x_k.len())), ("dx_k", Some(y.dx_k.len()))])?;
        check_lens("[B, T, F]", shape.hidden_len(), &[("hidden", x.hidden.map(|t| t.len()))])?;
        let key_weights =
            [("key_weight", Some(x.key_weight.len())), ("d_key_weight", Some(y.d_key_weight.len()))];
        check_lens("[D, F]", shape.weight_len(), &key_weights)?;
        let value_weights =
            [("value_weight", Some(x.value_weight.len())), ("d_value_weight", Some(y.d_value_weight.len()))];
        check_lens("[F, D]", shape.weight_len(), &value_weights)?;

        let inputs = [
            ("x", Some(x.x)),
            ("x_prev", x.x_prev),
            ("x_k", Some(x.x_k)),
            ("hidden", x.hidden),
            ("d_x_last", x.d_x_last),
        ];
        for (name, tensor) in inputs {
            if let Some(tensor) = tensor {
                check_align(name, tensor.device_ptr(stream).0)?;
            }
        }
        check_align("dx", y.dx.device_ptr_mut(stream).0)?;
        if let Some(dx_prev) = &mut y.dx_prev {
            check_align("dx_prev", dx_prev.device_ptr_mut(stream).0)?;
        }
        Ok(())
    }
}

/// Makes the plan, allocates outputs and workspace and runs, on the stream of `x`.
///
/// # Errors
///
/// As [`FusedChannelMixingBwd::new`] and [`FusedChannelMixingBwd::run`].
pub fn fused_channel_mixing_bwd<T: Element>(
    device: &Device,
    shape: &ChannelMixingShape,
    x: &FusedChannelMixingBwdInputs<'_, T>,
) -> Result<FusedChannelMixingBwdResult<T>, Error> {
    let plan = FusedChannelMixingBwd::new(device, shape)?;
    let stream: Arc<CudaStream> = x.x.stream().clone();
    let mut y = FusedChannelMixingBwdResult {
        dx: device.alloc(&stream, shape.len())?,
        dx_prev: device.alloc(&stream, shape.cache_len())?,
        dx_k: device.alloc(&stream, shape.d)?,
        d_key_weight: device.alloc(&stream, shape.weight_len())?,
        d_value_weight: device.alloc(&stream, shape.weight_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = FusedChannelMixingBwdOutputs {
        dx: &mut y.dx,
        dx_prev: Some(&mut y.dx_prev),
        dx_k: &mut y.dx_k,
        d_key_weight: &mut y.d_key_weight,
        d_value_weight: &mut y.d_value_weight,
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

/// What the first step reads.
struct Shifted<'a, T> {
    x: &'a dyn DevicePtr<T>,
    x_prev: Option<&'a dyn DevicePtr<T>>,
    x_k: &'a dyn DevicePtr<T>,
}

/// m, and the last tokens where they are wanted: the mixes of time mixing, of which there is one here.
fn shift<T: Element>(
    plan: &FusedTokenShiftAddcmul<T>,
    stream: &CudaStream,
    x: &Shifted<'_, T>,
    (mixed, x_last): (&mut RawSlice<'_, T>, Option<&mut dyn DevicePtrMut<T>>),
) -> Result<(), Error> {
    plan.kernel.launch(stream, plan.launch.grid, |bind| FusedTokenShiftAddcmulParams {
        x: bind.read("x", x.x),
        cache: bind.read_opt("x_prev", x.x_prev),
        factors: first(bind.read("x_k", x.x_k), Ptr::NULL),
        outs: first(bind.write("mixed", mixed), PtrMut::NULL),
        cache_out: bind.write_opt("x_last", x_last),
        seqs: SequencesParams::new(&plan.shape.seqs, bind.read_opt("cu_seqlens", plan.cu_seqlens.as_ref())),
        rows: plan.launch.params,
    })
}

/// The first of six, and nothing else.
fn first<P: Copy>(pointer: P, null: P) -> [P; 6] {
    let mut all = [null; 6];
    all[0] = pointer;
    all
}

/// An output that later steps read, where it is wanted.
fn saved<'a, T>(
    stream: &'a CudaStream,
    name: &'static str,
    tensor: &'a mut Option<&mut dyn DevicePtrMut<T>>,
) -> Result<Option<Intermediate<'a, T>>, Error> {
    reborrow(tensor).map(|tensor| Intermediate::new(stream, name, tensor)).transpose()
}

pub(super) fn units() -> Vec<Unit> {
    // The hidden layer of a model of width 4096, and rows that no wide access fits.
    let [common, uneven] =
        [16_384, 4100].map(|f| ChannelMixingShape { seqs: SeqLens::dense(1, 1), d: 4096, f });
    let mut out: Vec<Unit> = units_of::<f32>(&common).chain(units_of::<f16>(&common)).collect();
    out.extend(units_of::<bf16>(&common));
    out.extend(units_of::<bf16>(&uneven));
    out
}

/// A shape that is refused has no units.
fn units_of<T: Element>(shape: &ChannelMixingShape) -> impl Iterator<Item = Unit> {
    let spans = shape.hidden::<T>(&config::CHANNEL_MIXING);
    let bwd_spans = shape.hidden::<T>(&config::CHANNEL_MIXING_BWD);
    let shifts = super::token_shift_addcmul::units_of::<T>(&shape.channels(), 1);
    [spans.map(|spans| unit::<T>(&spans)), bwd_spans.map(|spans| bwd_unit::<T>(&spans))]
        .into_iter()
        .flatten()
        .chain(shifts)
}

fn unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedChannelMixingParams<T>>(
        "fused_channel_mixing",
        SOURCE,
        T::DTYPE,
        &config::CHANNEL_MIXING,
    )
}

fn bwd_unit<T: Element>(spans: &Spans) -> Unit {
    spans.unit::<FusedChannelMixingBwdParams<T>>(
        "fused_channel_mixing_bwd",
        BWD_SOURCE,
        T::DTYPE,
        &config::CHANNEL_MIXING_BWD,
    )
}

/// Twin of `fla::rwkv7::FusedChannelMixingParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedChannelMixingParams<T> {
    z: Ptr<T>,
    h: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedChannelMixingParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedChannelMixingParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("z", "const Cfg::Element*", offset_of!(Self, z)),
        Field::new("h", "Cfg::Element*", offset_of!(Self, h)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

/// Twin of `fla::rwkv7::FusedChannelMixingBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedChannelMixingBwdParams<T> {
    z: Ptr<T>,
    h: PtrMut<T>,
    d_hidden: PtrMut<T>,
    rows: RowsParams,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for FusedChannelMixingBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedChannelMixingBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("z", "const Cfg::Element*", offset_of!(Self, z)),
        Field::new("h", "Cfg::Element*", offset_of!(Self, h)),
        Field::new("d_hidden", "Cfg::Element*", offset_of!(Self, d_hidden)),
        Field::new("rows", "fla::rwkv7::Rows", offset_of!(Self, rows)),
    ];
}

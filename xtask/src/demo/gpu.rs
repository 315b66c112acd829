//! The demo's operators on the GPU: the state stays on the device from one segment to the next.

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use fla_core::{Device, FinalState, SeqLens, Shape};

use super::memory::{HEADS, K, Segment, V};
use super::operators::{
    DeltaInputs, DeltaLayer, GatedDeltaGates, Rwkv4Inputs, Rwkv6Gates, VALUE_HEADS, rwkv4_channels,
};
use crate::Result;

/// A device, and the stream that everything runs on.
#[derive(Clone)]
pub(super) struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
}

/// What a pass over a segment returned, and how long the device took.
pub(super) struct GpuStep {
    /// `[T, H, V]`  what the memory returned.
    pub(super) o: Vec<f32>,
    /// From the launch to the end of the pass, without the copies of inputs and outputs.
    pub(super) seconds: f64,
}

/// An operator on the GPU, with its state.
pub(super) trait GpuMemory {
    /// Reads a segment, and goes on from the state that the one before left.
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep>;

    /// Reads it once more chunk by chunk, from a state of its own: what the memory returned, where there is such a pass.
    fn read_in_chunks(&mut self, _segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// How long the first call of an operator takes in a process of its own, in milliseconds.
pub(super) struct FirstCall {
    /// With an empty kernel cache: the kernel is compiled.
    pub(super) cold_ms: f64,
    /// With a filled cache: the kernel is loaded from disk.
    pub(super) warm_ms: f64,
}

impl FirstCall {
    /// Starts this program twice with a cache of its own.
    pub(super) fn measure(operator: &str) -> Result<FirstCall> {
        let folder = std::env::temp_dir().join(format!("fla-demo-cache-{}", std::process::id()));
        let call = || -> Result<f64> {
            let output = Command::new(std::env::current_exe()?)
                .args(["demo", "--first-call", operator])
                .env("FLA_CACHE_DIR", &folder)
                .output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            let error = String::from_utf8_lossy(&output.stderr);
            text.trim().parse().map_err(|_| format!("the first call of {operator}: {text}{error}").into())
        };
        let times = call().and_then(|cold_ms| Ok(FirstCall { cold_ms, warm_ms: call()? }));
        // Whatever was timed, the folder was only for that; if it stays, it lies in the folder for such things.
        let _ = std::fs::remove_dir_all(&folder);
        times
    }
}

impl Gpu {
    /// Opens the first device.
    pub(super) fn open() -> Result<Gpu> {
        let device = Device::new(0)?;
        let stream = device.context().new_stream()?;
        Ok(Gpu { device, stream })
    }

    /// The name and the architecture of the device.
    pub(super) fn describe(&self) -> Result<String> {
        Ok(format!("{}, {}", self.device.context().name()?, self.device.arch()))
    }

    fn upload(&self, values: &[f32]) -> Result<CudaSlice<f32>> {
        Ok(self.stream.clone_htod(values)?)
    }
}

fn shape(t: usize) -> Shape {
    Shape { seqs: SeqLens::dense(1, t), h: HEADS.len(), k: K, v: V }
}

/// The same with so many value heads.
fn value_head_shape(t: usize, hv: usize) -> fla_gated_delta::Shape {
    let Shape { seqs, h, k, v } = shape(t);
    fla_gated_delta::Shape { seqs, h, hv, k, v }
}

/// The six tensors of a delta rule, on the device.
struct Uploaded {
    q: CudaSlice<f32>,
    k: CudaSlice<f32>,
    v: CudaSlice<f32>,
    a: CudaSlice<f32>,
    b: CudaSlice<f32>,
    g: CudaSlice<f32>,
}

impl Uploaded {
    fn new(gpu: &Gpu, x: &DeltaInputs<'_>) -> Result<Uploaded> {
        Ok(Uploaded {
            q: gpu.upload(x.q)?,
            k: gpu.upload(x.k)?,
            v: gpu.upload(x.v)?,
            a: gpu.upload(&x.a)?,
            b: gpu.upload(&x.b)?,
            g: gpu.upload(&x.g)?,
        })
    }
}

/// What every operator with a matrix state keeps between segments.
struct Resident {
    gpu: Gpu,
    state: Option<CudaSlice<f32>>,
}

impl Resident {
    fn initial_state(&self) -> Option<&dyn DevicePtr<f32>> {
        self.state.as_ref().map(|state| state as &dyn DevicePtr<f32>)
    }

    /// Allocates the outputs of a pass, `o_len` and `state_len` elements, times it, and keeps the state.
    fn step(
        &mut self,
        o_len: usize,
        state_len: usize,
        run: impl FnOnce(&Resident, &mut CudaSlice<f32>, &mut CudaSlice<f32>) -> Result<()>,
    ) -> Result<GpuStep> {
        let (device, stream) = (&self.gpu.device, self.gpu.stream.clone());
        let mut o = device.alloc(&stream, o_len)?;
        let mut state = device.alloc(&stream, state_len)?;
        stream.synchronize()?;
        let begin = Instant::now();
        run(self, &mut o, &mut state)?;
        stream.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64();
        self.state = Some(state);
        Ok(GpuStep { o: stream.clone_dtoh(&o)?, seconds })
    }
}

/// Starts RWKV-7.
pub(super) fn rwkv7(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(Rwkv7(Resident { gpu: gpu.clone(), state: None }, None)))
}

/// Token by token, and the state of the chunk pass.
struct Rwkv7(Resident, Option<CudaSlice<f32>>);

impl GpuMemory for Rwkv7 {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let x = Uploaded::new(&gpu, &DeltaInputs::rwkv7(segment))?;
        let options = fla_rwkv7::RecurrentFwdOptions::new();
        let shape = shape(segment.t());
        let plan = fla_rwkv7::RecurrentFwd::<f32>::new(&gpu.device, &shape, &options)?;
        self.0.step(shape.v_len(), shape.state_len(), |resident, o, final_state| {
            let x = fla_rwkv7::RecurrentFwdInputs {
                r: &x.q,
                w: &x.g,
                k: &x.k,
                v: &x.v,
                a: &x.a,
                b: &x.b,
                initial_state: resident.initial_state(),
                cu_seqlens: None,
            };
            let mut y = fla_rwkv7::RecurrentFwdOutputs {
                o,
                final_state: FinalState::New(final_state),
                token_states: None,
            };
            Ok(plan.run(&gpu.stream, &x, &mut y)?)
        })
    }

    fn read_in_chunks(&mut self, segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        let gpu = &self.0.gpu;
        let x = Uploaded::new(gpu, &DeltaInputs::rwkv7(segment))?;
        let initial_state = self.1.as_ref().map(|state| state as &dyn DevicePtr<f32>);
        let (r, w, k, v, a, b) = (&x.q, &x.g, &x.k, &x.v, &x.a, &x.b);
        let x = fla_rwkv7::ChunkFwdInputs { r, w, k, v, a, b, initial_state };
        let options = fla_rwkv7::ChunkFwdOptions::new();
        let y = fla_rwkv7::chunk_fwd(&gpu.device, &shape(segment.t()), &x, &options)?;
        self.1 = Some(y.final_state);
        Ok(Some(gpu.stream.clone_dtoh(&y.o)?))
    }
}

/// Starts DPLR.
pub(super) fn dplr(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(Dplr(Resident { gpu: gpu.clone(), state: None }, None)))
}

/// Token by token, and the state of the chunk pass.
struct Dplr(Resident, Option<CudaSlice<f32>>);

impl GpuMemory for Dplr {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let x = Uploaded::new(&gpu, &DeltaInputs::dplr(segment))?;
        let options = fla_dplr::RecurrentFwdOptions::new(1.0);
        let shape = shape(segment.t());
        let plan = fla_dplr::RecurrentFwd::<f32>::new(&gpu.device, &shape, &options)?;
        self.0.step(shape.v_len(), shape.state_len(), |resident, o, final_state| {
            let x = fla_dplr::RecurrentFwdInputs {
                q: &x.q,
                k: &x.k,
                v: &x.v,
                a: &x.a,
                b: &x.b,
                g: &x.g,
                initial_state: resident.initial_state(),
                cu_seqlens: None,
            };
            let mut y = fla_dplr::RecurrentFwdOutputs {
                o,
                final_state: FinalState::New(final_state),
                token_states: None,
            };
            Ok(plan.run(&gpu.stream, &x, &mut y)?)
        })
    }

    fn read_in_chunks(&mut self, segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        let gpu = &self.0.gpu;
        let x = Uploaded::new(gpu, &DeltaInputs::dplr(segment))?;
        let initial_state = self.1.as_ref().map(|state| state as &dyn DevicePtr<f32>);
        let (q, k, v, a, b, g) = (&x.q, &x.k, &x.v, &x.a, &x.b, &x.g);
        let x = fla_dplr::ChunkFwdInputs { q, k, v, a, b, g, initial_state };
        let options = fla_dplr::ChunkFwdOptions::new(1.0);
        let y = fla_dplr::chunk_fwd(&gpu.device, &shape(segment.t()), &x, &options)?;
        self.1 = Some(y.final_state);
        Ok(Some(gpu.stream.clone_dtoh(&y.o)?))
    }
}

impl Resident {
    /// Tokens of the gated delta rule one by one, from the state that is kept.
    fn gated_delta_step(
        &mut self,
        shape: &fla_gated_delta::Shape,
        x: &fla_gated_delta::RecurrentFwdInputs<'_, f32>,
        options: &fla_gated_delta::RecurrentFwdOptions,
    ) -> Result<GpuStep> {
        let gpu = self.gpu.clone();
        let plan = fla_gated_delta::RecurrentFwd::<f32>::new(&gpu.device, shape, options)?;
        self.step(shape.v_len(), shape.state_len(), |resident, o, final_state| {
            let x = fla_gated_delta::RecurrentFwdInputs { initial_state: resident.initial_state(), ..*x };
            let final_state = FinalState::New(final_state);
            let mut y = fla_gated_delta::RecurrentFwdOutputs { o, final_state, token_states: None };
            Ok(plan.run(&gpu.stream, &x, &mut y)?)
        })
    }
}

/// The same tokens in chunks, from and to this state.
fn gated_delta_in_chunks(
    gpu: &Gpu,
    state: &mut Option<CudaSlice<f32>>,
    shape: &fla_gated_delta::Shape,
    x: &fla_gated_delta::ChunkFwdInputs<'_, f32>,
    options: &fla_gated_delta::ChunkFwdOptions,
) -> Result<Option<Vec<f32>>> {
    let initial_state = state.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let x = fla_gated_delta::ChunkFwdInputs { initial_state, ..*x };
    let y = fla_gated_delta::chunk_fwd(&gpu.device, shape, &x, options)?;
    *state = Some(y.final_state);
    Ok(Some(gpu.stream.clone_dtoh(&y.o)?))
}

/// Starts the gated delta rule.
pub(super) fn gated_delta(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(GatedDelta(Resident { gpu: gpu.clone(), state: None }, None)))
}

/// Token by token, and the state of the chunk pass.
struct GatedDelta(Resident, Option<CudaSlice<f32>>);

impl GpuMemory for GatedDelta {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let gates = GatedDeltaGates::new(segment);
        let (q, k, v) =
            (gpu.upload(segment.next_keys())?, gpu.upload(segment.keys())?, gpu.upload(&segment.values)?);
        let (g, beta) = (gpu.upload(&gates.g)?, gpu.upload(&gates.beta)?);
        let x = fla_gated_delta::RecurrentFwdInputs {
            q: &q,
            k: &k,
            v: &v,
            g: fla_gated_delta::Gate::Log(&g),
            gk: None,
            gv: None,
            beta: fla_gated_delta::Beta::PerHead(&beta),
            initial_state: None,
            cu_seqlens: None,
        };
        let options = fla_gated_delta::RecurrentFwdOptions::new(1.0);
        self.0.gated_delta_step(&value_head_shape(segment.t(), HEADS.len()), &x, &options)
    }

    fn read_in_chunks(&mut self, segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        let gpu = &self.0.gpu;
        let gates = GatedDeltaGates::new(segment);
        let (q, k, v) =
            (gpu.upload(segment.next_keys())?, gpu.upload(segment.keys())?, gpu.upload(&segment.values)?);
        let (g, beta) = (gpu.upload(&gates.g)?, gpu.upload(&gates.beta)?);
        let x = fla_gated_delta::ChunkFwdInputs {
            q: &q,
            k: &k,
            v: &v,
            g: fla_gated_delta::Gate::Log(&g),
            beta: fla_gated_delta::Beta::PerHead(&beta),
            initial_state: None,
        };
        let options = fla_gated_delta::ChunkFwdOptions::new(1.0);
        let shape = value_head_shape(segment.t(), HEADS.len());
        gated_delta_in_chunks(gpu, &mut self.1, &shape, &x, &options)
    }
}

/// Starts the gated delta rule with everything that it can be asked to make of its inputs itself.
pub(super) fn delta_layer(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(DeltaLayerOnGpu(Resident { gpu: gpu.clone(), state: None }, None)))
}

/// Token by token, and the state of the chunk pass.
struct DeltaLayerOnGpu(Resident, Option<CudaSlice<f32>>);

/// The tensors of a layer, on the device.
struct UploadedLayer {
    q: CudaSlice<f32>,
    k: CudaSlice<f32>,
    v: CudaSlice<f32>,
    g: CudaSlice<f32>,
    a_log: CudaSlice<f32>,
    dt_bias: CudaSlice<f32>,
    beta: CudaSlice<f32>,
}

impl UploadedLayer {
    fn new(gpu: &Gpu, x: &DeltaLayer) -> Result<UploadedLayer> {
        Ok(UploadedLayer {
            q: gpu.upload(&x.q)?,
            k: gpu.upload(&x.k)?,
            v: gpu.upload(&x.v)?,
            g: gpu.upload(&x.g)?,
            a_log: gpu.upload(&x.a_log)?,
            dt_bias: gpu.upload(&x.dt_bias)?,
            beta: gpu.upload(&x.beta)?,
        })
    }

    fn gate(&self) -> fla_gated_delta::Gate<'_, f32> {
        fla_gated_delta::Gate::Raw { g: &self.g, a_log: &self.a_log, dt_bias: Some(&self.dt_bias) }
    }
}

impl GpuMemory for DeltaLayerOnGpu {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let x = UploadedLayer::new(&gpu, &DeltaLayer::new(segment))?;
        let options = fla_gated_delta::RecurrentFwdOptions::new(1.0)
            .with_gate(fla_gated_delta::GateForm::Raw)
            .with_beta_map(fla_gated_delta::BetaMap::TwiceSigmoid)
            .with_qk_norm(fla_gated_delta::QkNorm::L2);
        let inputs = fla_gated_delta::RecurrentFwdInputs {
            q: &x.q,
            k: &x.k,
            v: &x.v,
            g: x.gate(),
            gk: None,
            gv: None,
            beta: fla_gated_delta::Beta::PerHead(&x.beta),
            initial_state: None,
            cu_seqlens: None,
        };
        self.0.gated_delta_step(&value_head_shape(segment.t(), VALUE_HEADS), &inputs, &options)
    }

    fn read_in_chunks(&mut self, segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        let gpu = &self.0.gpu;
        let x = UploadedLayer::new(gpu, &DeltaLayer::new(segment))?;
        let options = fla_gated_delta::ChunkFwdOptions::new(1.0)
            .with_gate(fla_gated_delta::GateForm::Raw)
            .with_beta_map(fla_gated_delta::BetaMap::TwiceSigmoid)
            .with_qk_norm(fla_gated_delta::QkNorm::L2);
        let inputs = fla_gated_delta::ChunkFwdInputs {
            q: &x.q,
            k: &x.k,
            v: &x.v,
            g: x.gate(),
            beta: fla_gated_delta::Beta::PerHead(&x.beta),
            initial_state: None,
        };
        let shape = value_head_shape(segment.t(), VALUE_HEADS);
        gated_delta_in_chunks(gpu, &mut self.1, &shape, &inputs, &options)
    }
}

/// Starts RWKV-6.
pub(super) fn rwkv6(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(Rwkv6(Resident { gpu: gpu.clone(), state: None }, None)))
}

/// Token by token, and the state of the chunk pass.
struct Rwkv6(Resident, Option<CudaSlice<f32>>);

impl GpuMemory for Rwkv6 {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let gates = Rwkv6Gates::new(segment);
        let (k, v) = (gpu.upload(segment.keys())?, gpu.upload(&segment.weighted_values)?);
        let (w, u) = (gpu.upload(&gates.w)?, gpu.upload(&gates.u)?);
        let options = fla_rwkv6::RecurrentFwdOptions::new(1.0);
        let shape = shape(segment.t());
        let plan = fla_rwkv6::RecurrentFwd::<f32>::new(&gpu.device, &shape, &options)?;
        self.0.step(shape.v_len(), shape.state_len(), |resident, o, final_state| {
            let x = fla_rwkv6::RecurrentFwdInputs {
                r: &k,
                k: &k,
                v: &v,
                w: &w,
                u: &u,
                initial_state: resident.initial_state(),
                cu_seqlens: None,
            };
            let final_state = FinalState::New(final_state);
            let mut y = fla_rwkv6::RecurrentFwdOutputs { o, final_state, token_states: None };
            Ok(plan.run(&gpu.stream, &x, &mut y)?)
        })
    }

    fn read_in_chunks(&mut self, segment: &Segment<'_>) -> Result<Option<Vec<f32>>> {
        let gpu = &self.0.gpu;
        let gates = Rwkv6Gates::new(segment);
        let (k, v) = (&gpu.upload(segment.keys())?, &gpu.upload(&segment.weighted_values)?);
        let (w, u) = (&gpu.upload(&gates.w)?, &gpu.upload(&gates.u)?);
        let initial_state = self.1.as_ref().map(|state| state as &dyn DevicePtr<f32>);
        let x = fla_rwkv6::ChunkFwdInputs { r: k, k, v, w, u, initial_state };
        let options = fla_rwkv6::ChunkFwdOptions::new(1.0);
        let y = fla_rwkv6::chunk_fwd(&gpu.device, &shape(segment.t()), &x, &options)?;
        self.1 = Some(y.final_state);
        Ok(Some(gpu.stream.clone_dtoh(&y.o)?))
    }
}

/// Starts RWKV-4.
pub(super) fn rwkv4(gpu: &Gpu) -> Result<Box<dyn GpuMemory>> {
    Ok(Box::new(Rwkv4(Resident { gpu: gpu.clone(), state: None })))
}

struct Rwkv4(Resident);

impl GpuMemory for Rwkv4 {
    fn read(&mut self, segment: &Segment<'_>) -> Result<GpuStep> {
        let gpu = self.0.gpu.clone();
        let inputs = Rwkv4Inputs::new(segment);
        let (w, u) = (gpu.upload(&inputs.w)?, gpu.upload(&inputs.u)?);
        let (k, v) = (gpu.upload(&inputs.k)?, gpu.upload(&inputs.v)?);
        let options = fla_rwkv4::RecurrentFwdOptions::new();
        let c = rwkv4_channels();
        let shape = fla_rwkv4::Shape { seqs: SeqLens::dense(1, segment.t()), c };
        let plan = fla_rwkv4::RecurrentFwd::<f32>::new(&gpu.device, &shape, &options)?;
        self.0.step(segment.t() * c, 3 * c, |resident, o, final_state| {
            let x = fla_rwkv4::RecurrentFwdInputs {
                w: &w,
                u: &u,
                k: &k,
                v: &v,
                initial_state: resident.initial_state(),
                cu_seqlens: None,
            };
            let final_state = FinalState::New(final_state);
            let mut y = fla_rwkv4::RecurrentFwdOutputs { o, final_state, token_states: None };
            Ok(plan.run(&gpu.stream, &x, &mut y)?)
        })
    }
}

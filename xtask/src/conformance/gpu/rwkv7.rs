//! RWKV-7, both forms, and the functions around it.

use fla_core::cudarc::driver::{CudaSlice, DevicePtr};
use fla_core::{Element, Shape};
use fla_rwkv7::{
    ChannelMixingShape, ChannelShape, ChunkBwdInputs, ChunkFwdInputs, ChunkFwdOptions, FusedAddcmulBwdInputs,
    FusedAddcmulInputs, FusedChannelMixingBwdInputs, FusedChannelMixingInputs,
    FusedGateOutputCorrectionBwdInputs, FusedGateOutputCorrectionInputs, FusedKUpdateBwdInputs,
    FusedKUpdateInputs, FusedMulChunkBwdInputs, FusedMulChunkFwdInputs, FusedMulRecurrentBwdInputs,
    FusedMulRecurrentFwdInputs, FusedTokenShiftBwdInputs, FusedTokenShiftInputs, HeadShape,
    RecurrentBwdInputs, RecurrentFwdInputs, RecurrentFwdOptions, SavedStates, chunk_bwd, chunk_fwd,
    fused_addcmul, fused_addcmul_bwd, fused_channel_mixing, fused_channel_mixing_bwd,
    fused_gate_output_correction, fused_gate_output_correction_bwd, fused_k_update, fused_k_update_bwd,
    fused_mul_chunk_bwd, fused_mul_chunk_fwd, fused_mul_recurrent_bwd, fused_mul_recurrent_fwd,
    fused_token_shift, fused_token_shift_bwd, recurrent_bwd, recurrent_fwd,
};

use super::{Case, Computed, Gpu, seqs, shape};
use crate::Result;

/// What the passes of the recurrence read; the two that differ by form have no name here.
struct Inputs<T> {
    shape: Shape,
    r: CudaSlice<T>,
    w: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    x4: CudaSlice<T>,
    x5: CudaSlice<T>,
    d_o: CudaSlice<T>,
    initial_state: Option<CudaSlice<f32>>,
    d_final_state: Option<CudaSlice<f32>>,
}

impl<T: Element> Inputs<T> {
    /// Those of a case, whose low-rank part has these names.
    fn new(gpu: &Gpu, case: &Case, [x4, x5]: [&str; 2]) -> Result<Self> {
        Ok(Self {
            shape: shape(case)?,
            r: gpu.upload(case, "r")?,
            w: gpu.upload(case, "w")?,
            k: gpu.upload(case, "k")?,
            v: gpu.upload(case, "v")?,
            x4: gpu.upload(case, x4)?,
            x5: gpu.upload(case, x5)?,
            d_o: gpu.upload(case, "do")?,
            initial_state: gpu.upload_optional(case, "initial_state")?,
            d_final_state: gpu.upload_optional(case, "d_final_state")?,
        })
    }
}

fn chunk_options(case: &Case) -> ChunkFwdOptions {
    ChunkFwdOptions::new().with_scale(case.scale() as f32).with_saved_states(SavedStates::Kept)
}

/// Outputs and gradients from (a, b), token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case, ["a", "b"])?;
    let Inputs { shape, r, w, k, v, x4, x5, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (given(&inputs.initial_state), given(&inputs.d_final_state));
    let options = RecurrentFwdOptions::new().with_scale(case.scale() as f32);
    let x = RecurrentFwdInputs { r, w, k, v, a: x4, b: x5, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, shape, &x, &options)?;
    let x = RecurrentBwdInputs { r, w, k, v, a: x4, b: x5, initial_state, d_o, d_final_state };
    let dx = recurrent_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("db", &dx.db)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients from (a, b), chunk by chunk.
pub(super) fn chunk<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case, ["a", "b"])?;
    let Inputs { shape, r, w, k, v, x4, x5, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (given(&inputs.initial_state), given(&inputs.d_final_state));
    let options = chunk_options(case);
    let x = ChunkFwdInputs { r, w, k, v, a: x4, b: x5, initial_state };
    let y = chunk_fwd(&gpu.device, shape, &x, &options)?;
    let states = y.states.as_ref().map(|states| states as &dyn DevicePtr<u16>);
    let x = ChunkBwdInputs { r, w, k, v, a: x4, b: x5, initial_state, states, d_o, d_final_state };
    let dx = chunk_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("db", &dx.db)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients from (kk, a), token by token.
pub(super) fn fused_mul_recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case, ["kk", "a"])?;
    let Inputs { shape, r, w, k, v, x4, x5, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (given(&inputs.initial_state), given(&inputs.d_final_state));
    let options = RecurrentFwdOptions::new().with_scale(case.scale() as f32);
    let x = FusedMulRecurrentFwdInputs { r, w, k, v, kk: x4, a: x5, initial_state, cu_seqlens: None };
    let y = fused_mul_recurrent_fwd(&gpu.device, shape, &x, &options)?;
    let x = FusedMulRecurrentBwdInputs { r, w, k, v, kk: x4, a: x5, initial_state, d_o, d_final_state };
    let dx = fused_mul_recurrent_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dkk", &dx.dkk)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients from (kk, a), chunk by chunk.
pub(super) fn fused_mul_chunk<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case, ["kk", "a"])?;
    let Inputs { shape, r, w, k, v, x4, x5, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (given(&inputs.initial_state), given(&inputs.d_final_state));
    let options = chunk_options(case);
    let x = FusedMulChunkFwdInputs { r, w, k, v, kk: x4, a: x5, initial_state };
    let y = fused_mul_chunk_fwd(&gpu.device, shape, &x, &options)?;
    let states = y.states.as_ref().map(|states| states as &dyn DevicePtr<u16>);
    let x = FusedMulChunkBwdInputs { r, w, k, v, kk: x4, a: x5, initial_state, states, d_o, d_final_state };
    let dx = fused_mul_chunk_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dkk", &dx.dkk)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// The mixes of a token with its shifted neighbour.
pub(super) fn addcmul<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let tensor = |name| gpu.upload::<T>(case, name);
    let (hidden, delta) = (tensor("hidden")?, tensor("delta")?);
    let (xr, xw, xk) = (tensor("xr")?, tensor("xw")?, tensor("xk")?);
    let (xv, xa, xg) = (tensor("xv")?, tensor("xa")?, gpu.upload_optional::<T>(case, "xg")?);
    let (d_out_r, d_out_w, d_out_k) = (tensor("dout_r")?, tensor("dout_w")?, tensor("dout_k")?);
    let (d_out_v, d_out_a) = (tensor("dout_v")?, tensor("dout_a")?);
    let d_out_g = gpu.upload_optional::<T>(case, "dout_g")?;
    let shape = channels(case)?;
    let x = FusedAddcmulInputs {
        hidden: &hidden,
        delta: &delta,
        xr: &xr,
        xw: &xw,
        xk: &xk,
        xv: &xv,
        xa: &xa,
        xg: given(&xg),
    };
    let y = fused_addcmul(&gpu.device, &shape, &x)?;
    let x = FusedAddcmulBwdInputs {
        delta: &delta,
        xr: &xr,
        xw: &xw,
        xk: &xk,
        xv: &xv,
        xa: &xa,
        xg: given(&xg),
        d_out_r: &d_out_r,
        d_out_w: &d_out_w,
        d_out_k: &d_out_k,
        d_out_v: &d_out_v,
        d_out_a: &d_out_a,
        d_out_g: given(&d_out_g),
    };
    let dx = fused_addcmul_bwd(&gpu.device, &shape, &x)?;
    let mut all = vec![
        gpu.computed("out_r", &y.out_r)?,
        gpu.computed("out_w", &y.out_w)?,
        gpu.computed("out_k", &y.out_k)?,
        gpu.computed("out_v", &y.out_v)?,
        gpu.computed("out_a", &y.out_a)?,
        gpu.computed("dhidden", &dx.d_hidden)?,
        gpu.computed("ddelta", &dx.d_delta)?,
        gpu.computed("dxr", &dx.dxr)?,
        gpu.computed("dxw", &dx.dxw)?,
        gpu.computed("dxk", &dx.dxk)?,
        gpu.computed("dxv", &dx.dxv)?,
        gpu.computed("dxa", &dx.dxa)?,
    ];
    if let (Some(out_g), Some(dxg)) = (&y.out_g, &dx.dxg) {
        all.extend([gpu.computed("out_g", out_g)?, gpu.computed("dxg", dxg)?]);
    }
    Ok(all)
}

/// The key after its rate.
pub(super) fn k_update<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let tensor = |name| gpu.upload::<T>(case, name);
    let (k, a, ka, d_out) = (tensor("k")?, tensor("a")?, tensor("ka")?, tensor("dout")?);
    let shape = channels(case)?;
    let out = fused_k_update(&gpu.device, &shape, &FusedKUpdateInputs { k: &k, a: &a, ka: &ka })?;
    let x = FusedKUpdateBwdInputs { k: &k, a: &a, ka: &ka, d_out: &d_out };
    let dx = fused_k_update_bwd(&gpu.device, &shape, &x)?;
    Ok(vec![
        gpu.computed("out", &out)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("dka", &dx.dka)?,
    ])
}

/// The bonus of the current token and the output gate.
pub(super) fn gate_output_correction<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let tensor = |name| gpu.upload::<T>(case, name);
    let (o, r, k, r_k) = (tensor("o")?, tensor("r")?, tensor("k")?, tensor("r_k")?);
    let (v, g, d_out) = (tensor("v")?, tensor("g")?, tensor("dout")?);
    let shape = HeadShape { seqs: seqs(case)?, h: case.dim("H"), k: case.dim("D") };
    let x = FusedGateOutputCorrectionInputs { o: &o, r: &r, k: &k, r_k: &r_k, v: &v, g: &g };
    let out = fused_gate_output_correction(&gpu.device, &shape, &x)?;
    let x =
        FusedGateOutputCorrectionBwdInputs { o: &o, r: &r, k: &k, r_k: &r_k, v: &v, g: &g, d_out: &d_out };
    let dx = fused_gate_output_correction_bwd(&gpu.device, &shape, &x)?;
    Ok(vec![
        gpu.computed("out", &out)?,
        gpu.computed("do", &dx.d_o)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dr_k", &dx.dr_k)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dg", &dx.dg)?,
    ])
}

/// The feed-forward half of a block.
pub(super) fn channel_mixing<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let tensor = |name| gpu.upload::<T>(case, name);
    let (x, x_prev, x_k) = (tensor("x")?, tensor("x_prev")?, tensor("x_k")?);
    let (key_weight, value_weight) = (tensor("key_weight")?, tensor("value_weight")?);
    let d_out = tensor("dout")?;
    let shape = ChannelMixingShape { seqs: seqs(case)?, d: case.dim("C"), f: case.dim("F") };
    let inputs = FusedChannelMixingInputs {
        x: &x,
        x_prev: Some(&x_prev),
        x_k: &x_k,
        key_weight: &key_weight,
        value_weight: &value_weight,
    };
    let y = fused_channel_mixing(&gpu.device, &shape, &inputs)?;
    let inputs = FusedChannelMixingBwdInputs {
        x: &x,
        x_prev: Some(&x_prev),
        x_k: &x_k,
        key_weight: &key_weight,
        value_weight: &value_weight,
        mixed: None,
        hidden: None,
        d_out: &d_out,
        d_x_last: None,
    };
    let dx = fused_channel_mixing_bwd(&gpu.device, &shape, &inputs)?;
    Ok(vec![
        gpu.computed("out", &y.out)?,
        gpu.computed("dx", &dx.dx)?,
        gpu.computed("dx_prev", &dx.dx_prev)?,
        gpu.computed("dx_k", &dx.dx_k)?,
        gpu.computed("dkey_weight", &dx.d_key_weight)?,
        gpu.computed("dvalue_weight", &dx.d_value_weight)?,
    ])
}

/// The difference of each token to the one before it.
pub(super) fn token_shift<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let (x, cache) = (gpu.upload::<T>(case, "x")?, gpu.upload_optional::<T>(case, "cache")?);
    let (dy, d_cache_out) = (gpu.upload::<T>(case, "dy")?, gpu.upload_optional::<T>(case, "dcache_out")?);
    let shape = channels(case)?;
    let inputs = FusedTokenShiftInputs { x: &x, cache: given(&cache) };
    let y = fused_token_shift(&gpu.device, &shape, &inputs)?;
    let inputs = FusedTokenShiftBwdInputs { dy: &dy, d_cache_out: given(&d_cache_out) };
    let dx = fused_token_shift_bwd(&gpu.device, &shape, &inputs)?;
    Ok(vec![
        gpu.computed("y", &y.y)?,
        gpu.computed("cache_out", &y.cache_out)?,
        gpu.computed("dx", &dx.dx)?,
        gpu.computed("dcache", &dx.d_cache)?,
    ])
}

fn channels(case: &Case) -> Result<ChannelShape> {
    Ok(ChannelShape { seqs: seqs(case)?, d: case.dim("D") })
}

fn given<T>(tensor: &Option<CudaSlice<T>>) -> Option<&dyn DevicePtr<T>> {
    tensor.as_ref().map(|tensor| tensor as &dyn DevicePtr<T>)
}

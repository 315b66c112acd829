//! Token shift with the six mixes over a prompt in one call, then token by token with the cache, which gives the same
//! numbers; and what one step of the state needs of its keys.
//!
//! ```sh
//! cargo run --example fused
//! ```

use std::error::Error;

use fla_rwkv7::{
    ChannelShape, Device, FusedKkNormKUpdate, FusedKkNormKUpdateInputs, FusedKkNormKUpdateOutputs,
    FusedTokenShiftAddcmul, FusedTokenShiftAddcmulInputs, FusedTokenShiftAddcmulOutputs, HeadShape, Mixes,
    SeqLens, fused_token_shift_addcmul,
};

/// Heads, channels of a head, tokens.
const H: usize = 4;
const K: usize = 64;
const T: usize = 8;
const D: usize = H * K;

fn main() -> Result<(), Box<dyn Error>> {
    let device = match Device::new(0) {
        Ok(device) => device,
        Err(error) => {
            // The text says what to install or to set.
            println!("this example needs an NVIDIA GPU: {error}");
            return Ok(());
        }
    };
    let stream = device.context().new_stream()?;
    let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let tokens = wave(T * D, 0.37);
    let factor = |step| stream.clone_htod(&wave(D, step));
    let (xr, xw, xk) = (factor(0.11)?, factor(0.13)?, factor(0.17)?);
    let (xv, xa, xg) = (factor(0.19)?, factor(0.23)?, factor(0.29)?);

    // The prompt at once. The one-call form makes the plan and allocates what it returns.
    let x = stream.clone_htod(&tokens)?;
    let prompt = ChannelShape { seqs: SeqLens::dense(1, T), d: D };
    let inputs = FusedTokenShiftAddcmulInputs {
        x: &x,
        cache: None,
        xr: &xr,
        xw: &xw,
        xk: &xk,
        xv: &xv,
        xa: &xa,
        xg: Some(&xg),
    };
    let whole = fused_token_shift_addcmul(&device, &prompt, &inputs)?;
    let whole_k = stream.clone_dtoh(&whole.out_k)?;

    // Token by token, as decoding goes: one plan, and two caches that take turns.
    let step = ChannelShape { seqs: SeqLens::dense(1, 1), d: D };
    let plan = FusedTokenShiftAddcmul::<f32>::new(&device, &step, Mixes::Six)?;
    let mut cache = stream.alloc_zeros::<f32>(D)?;
    let mut next = stream.alloc_zeros::<f32>(D)?;
    let [mut r, mut w, mut k] =
        [device.alloc(&stream, D)?, device.alloc(&stream, D)?, device.alloc(&stream, D)?];
    let [mut v, mut a, mut g] =
        [device.alloc(&stream, D)?, device.alloc(&stream, D)?, device.alloc(&stream, D)?];
    let mut same = true;
    for (i_t, token) in tokens.chunks(D).enumerate() {
        let x = stream.clone_htod(token)?;
        let inputs = FusedTokenShiftAddcmulInputs {
            x: &x,
            cache: Some(&cache),
            xr: &xr,
            xw: &xw,
            xk: &xk,
            xv: &xv,
            xa: &xa,
            xg: Some(&xg),
        };
        let mut outputs = FusedTokenShiftAddcmulOutputs {
            out_r: &mut r,
            out_w: &mut w,
            out_k: &mut k,
            out_v: &mut v,
            out_a: &mut a,
            out_g: Some(&mut g),
            cache_out: Some(&mut next),
        };
        plan.run(&stream, &inputs, &mut outputs)?;
        std::mem::swap(&mut cache, &mut next);
        same &= stream.clone_dtoh(&k)? == whole_k[i_t * D..][..D];
    }
    println!("the prompt at once and token by token give the same bits: {same}");

    // Of keys and rates, here the last ones mixed, the recurrence wants `a = -kk`, `b = kk * rate` and the updated key.
    let heads = HeadShape { seqs: SeqLens::dense(1, 1), h: H, k: K };
    let plan = FusedKkNormKUpdate::<f32>::new(&device, &heads)?;
    let rates: Vec<f32> = stream.clone_dtoh(&a)?.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let rates = stream.clone_htod(&rates)?;
    let [mut k_updated, mut neg_kk, mut b] =
        [device.alloc(&stream, D)?, device.alloc(&stream, D)?, device.alloc(&stream, D)?];
    let inputs = FusedKkNormKUpdateInputs { k: &k, a: &rates, k_k: &xk, ka: &xa };
    let mut outputs = FusedKkNormKUpdateOutputs {
        k_updated: &mut k_updated,
        kk: None,
        neg_kk: Some(&mut neg_kk),
        b: Some(&mut b),
    };
    plan.run(&stream, &inputs, &mut outputs)?;
    for (i_h, head) in stream.clone_dtoh(&neg_kk)?.chunks(K).enumerate() {
        let length = head.iter().map(|x: &f32| x * x).sum::<f32>().sqrt();
        println!("head {i_h}: the unit key has length {length:.6}");
    }
    Ok(())
}

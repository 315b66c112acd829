//! Decodes with RWKV-7: one plan, one token a call, the state handed from call to call on the device.
//!
//! ```sh
//! cargo run --example decode
//! ```

use std::error::Error;

use fla_rwkv7::{
    Device, FinalState, RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, SeqLens,
    Shape, recurrent_fwd,
};

/// Heads, key channels, value channels, tokens.
const H: usize = 4;
const K: usize = 64;
const V: usize = 64;
const T: usize = 8;

/// The six vectors of a run of tokens, `[1, T, H, K]` and `[1, T, H, V]`, as the layer hands them to the operator.
struct Vectors {
    r: Vec<f32>,
    w: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Vectors {
    /// What projections would give, as waves; then the layer's own maps for `w`, `a` and `b`.
    fn new() -> Self {
        let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
        let keys = |step| wave(T * H * K, step);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        // The layer's decay: between e^-0.6065 and 1 per token.
        let w = keys(0.29).iter().map(|raw| -0.606_530_66 * sigmoid(*raw)).collect();
        let k = keys(0.53);
        let mut kk = k.clone();
        for head in kk.chunks_mut(K) {
            let norm = head.iter().map(|x| x * x).sum::<f32>().sqrt();
            head.iter_mut().for_each(|x| *x /= norm);
        }
        let rate = keys(0.83);
        let b = kk.iter().zip(&rate).map(|(kk, rate)| kk * sigmoid(*rate)).collect();
        let a = kk.iter().map(|kk| -kk).collect();
        Self { r: keys(0.37), w, k, v: wave(T * H * V, 0.71), a, b }
    }
}

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
    let tokens = Vectors::new();
    let r = stream.clone_htod(&tokens.r)?;
    let w = stream.clone_htod(&tokens.w)?;
    let k = stream.clone_htod(&tokens.k)?;
    let v = stream.clone_htod(&tokens.v)?;
    let a = stream.clone_htod(&tokens.a)?;
    let b = stream.clone_htod(&tokens.b)?;

    // Once: the kernel is compiled, or comes from the cache.
    let one_token = Shape { seqs: SeqLens::dense(1, 1), h: H, k: K, v: V };
    let plan = RecurrentFwd::<f32>::new(&device, &one_token, &RecurrentFwdOptions::new())?;

    // Per token: a launch and nothing else. The two states take turns as input and output.
    let mut o = stream.alloc_zeros::<f32>(T * H * V)?;
    let mut state = stream.alloc_zeros::<f32>(one_token.state_len())?;
    let mut next = stream.alloc_zeros::<f32>(one_token.state_len())?;
    for i_t in 0..T {
        let at_k = i_t * H * K..(i_t + 1) * H * K;
        let at_v = i_t * H * V..(i_t + 1) * H * V;
        let x = RecurrentFwdInputs {
            r: &r.slice(at_k.clone()),
            w: &w.slice(at_k.clone()),
            k: &k.slice(at_k.clone()),
            v: &v.slice(at_v.clone()),
            a: &a.slice(at_k.clone()),
            b: &b.slice(at_k.clone()),
            initial_state: Some(&state),
            cu_seqlens: None,
        };
        let mut o_token = o.slice_mut(at_v);
        let mut y = RecurrentFwdOutputs {
            o: &mut o_token,
            final_state: FinalState::New(&mut next),
            token_states: None,
        };
        plan.run(&stream, &x, &mut y)?;
        std::mem::swap(&mut state, &mut next);
    }

    // The same tokens in one call, as a prompt is read.
    let shape = Shape { seqs: SeqLens::dense(1, T), ..one_token };
    let x = RecurrentFwdInputs {
        r: &r,
        w: &w,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        initial_state: None,
        cu_seqlens: None,
    };
    let whole = recurrent_fwd(&device, &shape, &x, &RecurrentFwdOptions::new())?;

    let (decoded, whole) = (stream.clone_dtoh(&o)?, stream.clone_dtoh(&whole.o)?);
    for (i_t, o) in decoded.chunks(H * V).enumerate() {
        println!("token {i_t}: o of head 0 starts with {:+.4} {:+.4} {:+.4}", o[0], o[1], o[2]);
    }
    let apart = decoded.iter().zip(&whole).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    println!("token by token and in one call, outputs differ by at most {apart:.1e}");
    Ok(())
}

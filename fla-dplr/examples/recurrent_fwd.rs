//! The DPLR delta rule in one call: two packed sequences, the second of which goes on from a given state.
//!
//! ```sh
//! cargo run --example recurrent_fwd
//! ```

use std::error::Error;

use fla_dplr::{Device, RecurrentFwdInputs, RecurrentFwdOptions, SeqLens, Shape, recurrent_fwd};

/// Heads, key channels, value channels.
const H: usize = 2;
const K: usize = 64;
const V: usize = 64;

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

    // 5 and 11 tokens on one axis of 16.
    let shape = Shape { seqs: SeqLens::packed(&[0, 5, 16], 16)?, h: H, k: K, v: V };
    let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin() / 8.0).collect::<Vec<f32>>();
    let a = wave(shape.k_len(), 0.11);
    // What `a` reads from the state is halved in the direction of `a`.
    let b: Vec<f32> = a.iter().map(|x| -0.5 * x).collect();

    let q = stream.clone_htod(&wave(shape.k_len(), 0.37))?;
    let k = stream.clone_htod(&wave(shape.k_len(), 0.53))?;
    let v = stream.clone_htod(&wave(shape.v_len(), 0.71))?;
    let a = stream.clone_htod(&a)?;
    let b = stream.clone_htod(&b)?;
    // Every channel keeps 95 % of its state per token.
    let g = stream.clone_htod(&vec![0.95_f32.ln(); shape.k_len()])?;
    // Zero for the first sequence, 0.01 everywhere for the second.
    let mut initial_state = vec![0.0_f32; shape.state_len()];
    initial_state[shape.state_len() / 2..].fill(0.01);
    let initial_state = stream.clone_htod(&initial_state)?;

    let x = RecurrentFwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state: Some(&initial_state),
        cu_seqlens: None,
    };
    let y = recurrent_fwd(&device, &shape, &x, &RecurrentFwdOptions::new((K as f32).powf(-0.5)))?;

    let o = stream.clone_dtoh(&y.o)?;
    let final_state = stream.clone_dtoh(&y.final_state)?;
    println!("o            [1, 16, {H}, {V}], root mean square {:.3e}", rms(&o));
    for (i_n, state) in final_state.chunks(H * K * V).enumerate() {
        println!("final_state  of sequence {i_n}: [{H}, {K}, {V}], root mean square {:.3e}", rms(state));
    }
    Ok(())
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt()
}

//! RWKV-6 in one call, forwards and backwards in time: two packed sequences, the second of which goes on from a given state.
//!
//! ```sh
//! cargo run --example recurrent_fwd
//! ```

use std::error::Error;

use fla_rwkv6::{Device, Direction, RecurrentFwdInputs, RecurrentFwdOptions, SeqLens, Shape, recurrent_fwd};

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

    let r = stream.clone_htod(&wave(shape.k_len(), 0.37))?;
    let k = stream.clone_htod(&wave(shape.k_len(), 0.53))?;
    let v = stream.clone_htod(&wave(shape.v_len(), 0.71))?;
    // Every channel keeps 95 % of its state per token, and the current token counts half as much again.
    let w = stream.clone_htod(&vec![0.95_f32.ln(); shape.k_len()])?;
    let u = stream.clone_htod(&vec![1.5_f32; H * K])?;
    // Zero for the first sequence, 0.01 everywhere for the second.
    let mut initial_state = vec![0.0_f32; shape.state_len()];
    initial_state[shape.state_len() / 2..].fill(0.01);
    let initial_state = stream.clone_htod(&initial_state)?;

    let x = RecurrentFwdInputs {
        r: &r,
        k: &k,
        v: &v,
        w: &w,
        u: &u,
        initial_state: Some(&initial_state),
        cu_seqlens: None,
    };
    for direction in [Direction::Forward, Direction::Reverse] {
        let options = RecurrentFwdOptions::new(1.0).with_direction(direction);
        let y = recurrent_fwd(&device, &shape, &x, &options)?;
        let o = stream.clone_dtoh(&y.o)?;
        let final_state = stream.clone_dtoh(&y.final_state)?;
        println!("{direction:?}");
        println!("  o            [1, 16, {H}, {V}], root mean square {:.3e}", rms(&o));
        for (i_n, state) in final_state.chunks(H * K * V).enumerate() {
            println!(
                "  final_state  of sequence {i_n}: [{H}, {K}, {V}], root mean square {:.3e}",
                rms(state)
            );
        }
    }
    Ok(())
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt()
}

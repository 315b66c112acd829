//! A prompt in one chunk pass, then token by token from its state: the outputs are those of one pass over all tokens.
//!
//! ```sh
//! cargo run --example decode
//! ```

use std::error::Error;

use fla_rwkv4::{
    ChunkFwdInputs, ChunkFwdOptions, Device, FinalState, RecurrentFwd, RecurrentFwdInputs,
    RecurrentFwdOptions, RecurrentFwdOutputs, SeqLens, Shape, chunk_fwd,
};

/// Sequences, tokens of the prompt, tokens after it, channels.
const B: usize = 2;
const PROMPT: usize = 300;
const STEPS: usize = 20;
const C: usize = 64;

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
    let wave = |i_b: usize, i_t: usize, step: f32| {
        (0..C).map(move |i_c| ((i_b * 7 + i_t * 3 + i_c) as f32 * step).sin()).collect::<Vec<f32>>()
    };
    // Rows `from..to` of every sequence.
    let rows = |from: usize, to: usize, step: f32| -> Vec<f32> {
        (0..B).flat_map(|i_b| (from..to).flat_map(move |i_t| wave(i_b, i_t, step))).collect()
    };
    // Decays from e^-0.007, which remembers hundreds of tokens, to e^-1.
    let w: Vec<f32> = (0..C).map(|i_c| -5.0 + 5.0 * i_c as f32 / C as f32).collect();
    let (w, u) = (stream.clone_htod(&w)?, stream.clone_htod(&vec![0.5_f32; C])?);

    let pass = |to: usize| -> Result<_, Box<dyn Error>> {
        let (k, v) = (stream.clone_htod(&rows(0, to, 0.37))?, stream.clone_htod(&rows(0, to, 0.11))?);
        let x = ChunkFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: None };
        let shape = Shape { seqs: SeqLens::dense(B, to), c: C };
        Ok(chunk_fwd(&device, &shape, &x, &ChunkFwdOptions::new())?)
    };
    let all = stream.clone_dtoh(&pass(PROMPT + STEPS)?.o)?;
    let mut state = pass(PROMPT)?.final_state;

    let shape = Shape { seqs: SeqLens::dense(B, 1), c: C };
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &RecurrentFwdOptions::new())?;
    let mut o = stream.alloc_zeros::<f32>(shape.token_len())?;
    let mut worst = 0.0_f32;
    for i_t in PROMPT..PROMPT + STEPS {
        let (k, v) =
            (stream.clone_htod(&rows(i_t, i_t + 1, 0.37))?, stream.clone_htod(&rows(i_t, i_t + 1, 0.11))?);
        let x = RecurrentFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: None, cu_seqlens: None };
        let final_state = FinalState::InPlace(&mut state);
        plan.run(&stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })?;
        let got = stream.clone_dtoh(&o)?;
        for i_b in 0..B {
            let row = (i_b * (PROMPT + STEPS) + i_t) * C;
            for (one, whole) in got[i_b * C..(i_b + 1) * C].iter().zip(&all[row..row + C]) {
                worst = worst.max((one - whole).abs());
            }
        }
    }
    println!(
        "{STEPS} tokens after a prompt of {PROMPT}: outputs differ from one pass by at most {worst:.1e}"
    );
    Ok(())
}

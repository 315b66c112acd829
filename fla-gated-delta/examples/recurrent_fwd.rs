//! A step of a small server: three requests with slots in a pool of states, gates and strengths from logits.
//!
//! ```sh
//! cargo run --example recurrent_fwd
//! ```

use std::error::Error;

use fla_gated_delta::{
    Beta, BetaMap, Device, FinalState, Gate, GateForm, QkNorm, RecurrentFwd, RecurrentFwdInputs,
    RecurrentFwdOptions, RecurrentFwdOutputs, SeqLens, Shape, StatePool,
};

/// Query heads, value heads, key channels, value channels.
const H: usize = 2;
const HV: usize = 4;
const K: usize = 64;
const V: usize = 64;
/// Slots of the pool.
const S: usize = 8;

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

    // One token of each request.
    let shape = Shape { seqs: SeqLens::dense(3, 1), h: H, hv: HV, k: K, v: V };
    let options = RecurrentFwdOptions::new((K as f32).powf(-0.5))
        .with_gate(GateForm::Raw)
        .with_beta_map(BetaMap::Sigmoid)
        .with_qk_norm(QkNorm::L2);
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &options)?;

    let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let q = stream.clone_htod(&wave(shape.qk_len(), 0.37))?;
    let k = stream.clone_htod(&wave(shape.qk_len(), 0.53))?;
    let v = stream.clone_htod(&wave(shape.v_len(), 0.71))?;
    let g = stream.clone_htod(&wave(shape.head_len(), 0.11))?;
    let beta = stream.clone_htod(&wave(shape.head_len(), 0.13))?;
    let a_log = stream.clone_htod(&[0.0_f32; HV])?;
    // The pool starts from zeros, and the requests have the slots 5, 0 and 3.
    let mut states = stream.alloc_zeros::<f32>(S * HV * K * V)?;
    let slots = stream.clone_htod(&[5, 0, 3])?;
    let mut o = stream.alloc_zeros::<f32>(shape.v_len())?;

    let x = RecurrentFwdInputs {
        q: &q,
        k: &k,
        v: &v,
        g: Gate::Raw { g: &g, a_log: &a_log, dt_bias: None },
        gk: None,
        gv: None,
        beta: Beta::PerHead(&beta),
        initial_state: None,
        cu_seqlens: None,
    };
    // Two steps with the same numbers: the second reads what the first has written.
    for step in 0..2 {
        let final_state = FinalState::Pool(StatePool { states: &mut states, slots: &slots, accepted: None });
        plan.run(&stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })?;
        println!("step {step}: o [3, 1, {HV}, {V}], root mean square {:.3e}", rms(&stream.clone_dtoh(&o)?));
    }
    for (slot, state) in stream.clone_dtoh(&states)?.chunks(HV * K * V).enumerate() {
        println!("slot {slot}: root mean square {:.3e}", rms(state));
    }
    Ok(())
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt()
}

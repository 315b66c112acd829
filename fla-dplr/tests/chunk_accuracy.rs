//! Errors of the chunk passes in bf16 for each regime of decays, beside those of FLA.
//!
//! `cargo test -p fla-dplr --test chunk_accuracy -- --nocapture` prints the table that the records hold.

mod problem;

use std::sync::Arc;

use fla_core::Device;
use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::testing::gpu;
use fla_dplr::{ChunkBwdInputs, ChunkFwdInputs, SavedStates, chunk_bwd, chunk_fwd};
use fla_reference::compare::relative_rms;
use fla_reference::tolerance::{BESIDE_FLA, FLA_ERRORS, FlaErrors, Model};
use half::bf16;
use problem::{BASE, Case, Problem, widened};

/// The tensors of [`FlaErrors`], in its order.
const NAMES: [&str; 7] = ["o", "dq", "dk", "dv", "da", "db", "dg"];

/// The problem that FLA's errors were measured with.
fn case(fla: &FlaErrors) -> Case {
    Case {
        b: 2,
        t: 512,
        h: 4,
        k: fla.channels,
        v: fla.channels,
        gates: fla.gates,
        initial_state: false,
        final_state: false,
        scale: if fla.model == Model::Rwkv7 { 1.0 } else { (fla.channels as f64).powf(-0.5) },
        ..BASE
    }
}

/// Relative RMS errors of o and of the gradients of q, k, v, a, b and g.
fn errors(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> [f64; 7] {
    let problem = Problem::beside_fla::<bf16>(case);
    let [q, k, v, a, b, g, d_o] = problem.vectors.each_ref().map(|x| {
        let values: Vec<bf16> = x.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    });
    let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
    let x = ChunkFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: None };
    let y = chunk_fwd(device, &shape, &x, &options).expect("runs");
    let x = ChunkBwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state: None,
        states: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let dx = chunk_bwd(device, &shape, &x, &options).expect("runs");
    let error = |got: &CudaSlice<bf16>, want: &[f64]| {
        relative_rms(&widened(&stream.clone_dtoh(got).expect("copies")), want)
    };
    let (o, want) = (problem.outputs(case).o, problem.grads(case).grads);
    [
        error(&y.o, &o),
        error(&dx.dq, &want[0]),
        error(&dx.dk, &want[1]),
        error(&dx.dv, &want[2]),
        error(&dx.da, &want[3]),
        error(&dx.db, &want[4]),
        error(&dx.dg, &want[5]),
    ]
}

#[test]
fn errors_in_bf16_are_not_far_above_those_of_fla() {
    let Some((device, stream)) = gpu("errors_in_bf16_are_not_far_above_those_of_fla") else { return };
    println!("relative RMS error in thousandths, and that of FLA 0.6.0; bf16, B = 2, T = 512, H = 4");
    print!("{:<18} {:>4}", "gates", "K, V");
    NAMES.iter().for_each(|name| print!(" {name:>13}"));
    println!();
    let mut failures = Vec::new();
    for fla in FLA_ERRORS {
        let case = case(fla);
        let errors = errors(&device, &stream, &case);
        let regime = format!("{:?} {:?}", fla.model, fla.gates);
        print!("{regime:<18} {:>4}", fla.channels);
        for ((name, error), of_fla) in NAMES.iter().zip(errors).zip([fla.o].iter().chain(&fla.grads)) {
            print!(" {:>6.2} {:>6.2}", 1e3 * error, 1e3 * of_fla);
            // A comparison that is not a number has to fail.
            if error.is_nan() || error > BESIDE_FLA * of_fla {
                failures.push(format!("{regime}, {}, {name}: {error:.2e}, FLA {of_fla:.2e}", fla.channels));
            }
        }
        println!();
    }
    assert!(failures.is_empty(), "more than {BESIDE_FLA} times FLA's\n{}", failures.join("\n"));
}

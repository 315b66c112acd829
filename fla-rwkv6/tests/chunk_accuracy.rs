//! Errors of the chunk passes in bf16 for each regime of decays, beside those of FLA.
//!
//! `cargo test -p fla-rwkv6 --test chunk_accuracy -- --nocapture` prints the table that the records hold.

mod problem;

use std::sync::Arc;

use fla_core::Device;
use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::testing::gpu;
use fla_reference::compare::relative_rms;
use fla_reference::inputs::Gates;
use fla_reference::tolerance::{BESIDE_FLA, RWKV6_FLA_ERRORS};
use fla_rwkv6::{ChunkBwdInputs, ChunkFwdInputs, SavedStates, chunk_bwd, chunk_fwd};
use half::bf16;
use problem::{BASE, Case, Decays, Problem, widened};

/// The tensors of [`RWKV6_FLA_ERRORS`], in its order.
const NAMES: [&str; 6] = ["o", "dr", "dk", "dv", "dw", "du"];

/// The problem that FLA's errors were measured with, with heads of `channels`.
fn case(gates: Gates, channels: usize) -> Case {
    Case {
        b: 2,
        t: 512,
        h: 4,
        k: channels,
        v: channels,
        decays: Decays::Of(gates),
        initial_state: false,
        final_state: false,
        scale: (channels as f64).powf(-0.5),
        ..BASE
    }
}

/// Relative RMS errors of o and of the gradients of r, k, v, w and u.
fn errors(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> [f64; 6] {
    let problem = Problem::new::<bf16>(case);
    let [r, k, v, w, u, d_o] = problem.vectors.each_ref().map(|x| {
        let values: Vec<bf16> = x.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    });
    let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
    let x = ChunkFwdInputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state: None };
    let y = chunk_fwd(device, &shape, &x, &options).expect("runs");
    let x = ChunkBwdInputs {
        r: &r,
        k: &k,
        v: &v,
        w: &w,
        u: &u,
        initial_state: None,
        states: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let dx = chunk_bwd(device, &shape, &x, &options).expect("runs");
    let error = |got: &CudaSlice<bf16>, want: &[f64]| {
        relative_rms(&widened(&stream.clone_dtoh(got).expect("copies")), want)
    };
    let (o, want) = (problem.outputs(case).o, problem.grads(case));
    [
        error(&y.o, &o),
        error(&dx.dr, &want.dr),
        error(&dx.dk, &want.dk),
        error(&dx.dv, &want.dv),
        error(&dx.dw, &want.dw),
        relative_rms(&widened(&stream.clone_dtoh(&dx.du).expect("copies")), &want.du),
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
    for (gates, of_fla) in RWKV6_FLA_ERRORS {
        for channels in [64, 128] {
            let errors = errors(&device, &stream, &case(*gates, channels));
            let regime = format!("{gates:?}");
            print!("{regime:<18} {channels:>4}");
            for ((name, error), of_fla) in NAMES.iter().zip(errors).zip(of_fla) {
                print!(" {:>6.2} {:>6.2}", 1e3 * error, 1e3 * of_fla);
                // A comparison that is not a number has to fail.
                if error.is_nan() || error > BESIDE_FLA * of_fla {
                    failures.push(format!("{regime}, {channels}, {name}: {error:.2e}, FLA {of_fla:.2e}"));
                }
            }
            println!();
        }
    }
    // FLA has no figure for these; the tests of both passes judge them.
    let errors = errors(&device, &stream, &case(Gates::Mixed, 64));
    print!("{:<18} {:>4}", "Mixed", 64);
    errors.iter().for_each(|error| print!(" {:>6.2} {:>6}", 1e3 * error, "-"));
    println!();
    assert!(failures.is_empty(), "more than {BESIDE_FLA} times FLA's\n{}", failures.join("\n"));
}

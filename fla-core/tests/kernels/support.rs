//! What the tests of building blocks share: compiling their units everywhere, running twice, comparing by bound.

use fla_core::compile::compile;
use fla_core::testing::{nvrtc, same_bits};
use fla_core::{Arch, Error, Unit};

/// One architecture of each kind that kernels are compiled for.
const ARCHS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];

/// Compiles every unit for every architecture that it is for, without a GPU.
///
/// Spills fail anywhere; local memory of any kind fails on sm_90a, which the kernels are tuned for. Without NVRTC
/// the test says that it was skipped; with `FLA_REQUIRE_NVRTC=1` it fails.
pub(crate) fn compile_everywhere(test: &str, units: &[Unit], is_for: impl Fn(Arch) -> bool) {
    if !nvrtc(test) {
        return;
    }
    let mut failures = Vec::new();
    for unit in units {
        for arch in ARCHS.iter().filter_map(|name| Arch::parse(name)).filter(|arch| is_for(*arch)) {
            match compile(unit, arch) {
                Err(error) => failures.push(error.to_string()),
                Ok(compiled) if arch == Arch::SM_90 && compiled.report.stack_bytes > 0 => {
                    let (bytes, constants) = (compiled.report.stack_bytes, unit.constants());
                    failures.push(format!("{constants}, {arch}: {bytes} bytes of local memory"));
                }
                Ok(_) => {}
            }
        }
    }
    assert!(failures.is_empty(), "{} units fail\n{}", failures.len(), failures.join("\n"));
}

/// Runs a kernel twice, each time into fresh outputs, and returns the outputs when both runs agree in every bit.
pub(crate) fn twice(run: impl Fn() -> Result<Vec<Vec<f32>>, Error>) -> Result<Vec<Vec<f32>>, String> {
    let first = run().map_err(|error| error.to_string())?;
    let second = run().map_err(|error| error.to_string())?;
    for (i, (first, second)) in first.iter().zip(&second).enumerate() {
        same_bits(&format!("output {i}"), first, second)?;
    }
    Ok(first)
}

/// Checks element by element that `got` is within `bound` of `want`, and reports the element furthest outside.
pub(crate) fn within(
    name: &str,
    got: &[f32],
    want: &[f64],
    bound: impl Fn(usize) -> f64,
) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("`{name}` has {} elements instead of {}", got.len(), want.len()));
    }
    let mut worst: Option<(f64, String)> = None;
    let mut outside = 0;
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        // Equal infinities have no difference.
        let error = if f64::from(got) == want { 0.0 } else { (f64::from(got) - want).abs() };
        let bound = bound(i);
        if error <= bound {
            continue;
        }
        outside += 1;
        let excess = if error.is_nan() { f64::INFINITY } else { error - bound };
        if worst.as_ref().is_none_or(|(most, _)| excess > *most) {
            let text =
                format!("element {i} is {got:e} instead of {want:e}, off by {error:.2e} > {bound:.2e}");
            worst = Some((excess, text));
        }
    }
    match worst {
        None => Ok(()),
        Some((_, text)) => Err(format!("`{name}`: {outside} of {} elements; {text}", got.len())),
    }
}

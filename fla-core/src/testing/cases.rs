//! Tables of named cases: all run, all reported together.

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

/// Runs every case and reports all failures at once.
///
/// `FLA_CASE=text` runs only cases whose name contains the text.
///
/// # Panics
///
/// When a case fails or panics, and when no case ran at all.
pub fn run_cases<C>(cases: &[C], name: impl Fn(&C) -> String, run: impl Fn(&C) -> Result<(), String>) {
    let filter = std::env::var("FLA_CASE").unwrap_or_default();
    let (mut ran, mut failures) = (0, Vec::new());
    for case in cases {
        let name = name(case);
        if !name.contains(&filter) {
            continue;
        }
        ran += 1;
        match catch_unwind(AssertUnwindSafe(|| run(case))) {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => failures.push(format!("{name}: {reason}")),
            Err(panic) => {
                let reason = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                failures.push(format!("{name}: panicked: {}", reason.unwrap_or("no message")));
            }
        }
    }
    assert!(ran > 0, "no case is named like `{filter}`");
    assert!(failures.is_empty(), "{} of {ran} cases failed\n{}", failures.len(), failures.join("\n"));
}

/// Makes the plans of all cases that [`run_cases`] will run, side by side: each compiles kernels of its own, which the cases
/// then find. A plan that cannot be made is for its case to report.
pub fn compile_ahead<C: Sync, P, E>(
    cases: &[C],
    name: impl Fn(&C) -> String,
    plan: impl Fn(&C) -> Result<P, E> + Sync,
) {
    let filter = std::env::var("FLA_CASE").unwrap_or_default();
    let cases: Vec<&C> = cases.iter().filter(|case| name(case).contains(&filter)).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    drop(plan(case));
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{compile_ahead, run_cases};

    #[test]
    fn every_plan_is_made_once() {
        let made = [const { AtomicUsize::new(0) }; 9];
        let cases: Vec<usize> = (0..made.len()).collect();
        compile_ahead(&cases, ToString::to_string, |&i| {
            made[i].fetch_add(1, Ordering::Relaxed);
            if i == 3 { Err("no plan") } else { Ok(()) }
        });
        assert!(made.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{made:?}");
    }

    #[test]
    fn every_failure_is_reported() {
        let run = || {
            run_cases(
                &[1, 2, 3, 4],
                |n| format!("case {n}"),
                |n| match n {
                    1 => Ok(()),
                    2 => Err("wrong".into()),
                    _ => panic!("broken {n}"),
                },
            );
        };
        let panic = std::panic::catch_unwind(run).expect_err("three cases fail");
        let text = panic.downcast_ref::<String>().expect("a formatted message");
        assert_eq!(
            text,
            "3 of 4 cases failed\ncase 2: wrong\ncase 3: panicked: broken 3\ncase 4: panicked: broken 4"
        );
    }
}

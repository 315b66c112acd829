//! Tables of named cases: all run, all reported together.

use std::panic::{AssertUnwindSafe, catch_unwind};

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

#[cfg(test)]
mod tests {
    use super::run_cases;

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

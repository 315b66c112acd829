//! What a conformance run found: one line per tensor as it goes, the counts at the end, and the same as JSON.

use std::io::Write;

use serde_json::{Value, json};

use crate::Result;

/// What is counted: one case, computed in one way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit<'a> {
    /// Name of the case.
    pub(super) case: &'a str,
    /// Who computes it.
    pub(super) backend: &'static str,
    /// The form.
    pub(super) pass: &'static str,
    /// Number format of the vectors.
    pub(super) dtype: &'static str,
}

/// One tensor, compared.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Its name in the file.
    pub(super) tensor: &'static str,
    /// Relative RMS error.
    pub(super) error: f64,
    /// The error may be this many times the limit; 1 but for gate gradients of chunk passes.
    pub(super) allowance: f64,
    /// The limit, or why there is none.
    pub(super) limit: std::result::Result<f64, String>,
    /// Whether the tensor is as it should be.
    pub(super) ok: bool,
    /// Whether the truth is a float64 recurrence over the rounded inputs, instead of the file's values.
    pub(super) recomputed: bool,
}

/// Collects and prints.
pub(super) struct Report<'a> {
    out: &'a mut dyn Write,
    case_width: usize,
    rows: Vec<Value>,
    skips: Vec<Value>,
    errors: Vec<Value>,
    failures: Vec<String>,
    passed: usize,
}

impl<'a> Report<'a> {
    /// A report that prints to `out`, with room for case names of `case_width` characters.
    pub(super) fn new(out: &'a mut dyn Write, case_width: usize) -> Report<'a> {
        Report {
            out,
            case_width: case_width.max("case".len()),
            rows: Vec::new(),
            skips: Vec::new(),
            errors: Vec::new(),
            failures: Vec::new(),
            passed: 0,
        }
    }

    /// Prints the names of the columns.
    pub(super) fn header(&mut self) -> Result<()> {
        let unit = Unit { case: "case", backend: "backend", pass: "pass", dtype: "dtype" };
        let lead = self.lead(unit);
        Ok(writeln!(self.out, "{lead}{:<14} {:>12} {:>9}", "tensor", "relative RMS", "limit")?)
    }

    /// Prints the tensors of a unit and counts it.
    pub(super) fn compared(&mut self, unit: Unit<'_>, rows: &[Row]) -> Result<()> {
        let lead = self.lead(unit);
        for row in rows {
            let limit = row.limit.as_ref().map_or_else(|_| "none".to_owned(), |limit| format!("{limit:.1e}"));
            let mut line = format!("{lead}{:<14} {:>12.1e} {limit:>9}  ", row.tensor, row.error);
            line += if row.ok { "ok" } else { "FAIL" };
            if let Err(reason) = &row.limit {
                line += &format!("  {reason}");
            }
            if row.allowance > 1.0 {
                line += &format!(
                    "  the limit allows {:.1e} times as much: a difference of larger terms",
                    row.allowance
                );
            }
            if row.recomputed {
                line += "  against float64 on the rounded inputs";
            }
            writeln!(self.out, "{line}")?;
            self.rows.push(json!({
                "case": unit.case,
                "backend": unit.backend,
                "pass": unit.pass,
                "dtype": unit.dtype,
                "tensor": row.tensor,
                "relative_rms": row.error,
                "allowance": row.allowance,
                "limit": row.limit.as_ref().ok(),
                "ok": row.ok,
                "recomputed": row.recomputed,
            }));
        }
        let failed: Vec<&str> = rows.iter().filter(|row| !row.ok).map(|row| row.tensor).collect();
        if failed.is_empty() && !rows.is_empty() {
            self.passed += 1;
        } else {
            let Unit { case, backend, pass, dtype } = unit;
            self.failures.push(format!("{case} {backend} {pass} {dtype}: {}", failed.join(" ")));
        }
        Ok(())
    }

    /// Prints that a unit could not be computed although it should, and counts it as failed.
    pub(super) fn broken(&mut self, unit: Unit<'_>, error: &str) -> Result<()> {
        let Unit { case, backend, pass, dtype } = unit;
        self.failures.push(format!("{case} {backend} {pass} {dtype}: not computed"));
        self.rows.push(json!({
            "case": case,
            "backend": backend,
            "pass": pass,
            "dtype": dtype,
            "ok": false,
            "error": error,
        }));
        let lead = self.lead(unit);
        Ok(writeln!(self.out, "{lead}FAIL  {error}")?)
    }

    /// Prints why a unit, or the gradients of one, did not run, and counts that.
    pub(super) fn skipped(&mut self, unit: Unit<'_>, reason: &str) -> Result<()> {
        self.skips.push(json!({
            "case": unit.case,
            "backend": unit.backend,
            "pass": unit.pass,
            "dtype": unit.dtype,
            "reason": reason,
        }));
        let lead = self.lead(unit);
        Ok(writeln!(self.out, "{lead}skipped: {reason}")?)
    }

    /// Prints a file that is not a usable case.
    pub(super) fn unusable(&mut self, file: &str, error: &str) -> Result<()> {
        self.errors.push(json!({ "file": file, "error": error }));
        Ok(writeln!(self.out, "error: {error}")?)
    }

    /// Prints the counts; `Ok(true)` when something was compared and nothing failed.
    ///
    /// # Errors
    ///
    /// When a file was not a usable case.
    pub(super) fn finish(&mut self) -> Result<bool> {
        for failure in &self.failures {
            writeln!(self.out, "failed: {failure}")?;
        }
        let (passed, failed, skipped) = (self.passed, self.failures.len(), self.skips.len());
        if passed + failed == 0 {
            writeln!(self.out, "nothing was compared")?;
        }
        writeln!(self.out, "{passed} passed, {failed} failed, {skipped} skipped")?;
        self.out.flush()?;
        let files: Vec<&str> = self.errors.iter().filter_map(|error| error["file"].as_str()).collect();
        if !files.is_empty() {
            return Err(format!("not usable as a case: {}", files.join(", ")).into());
        }
        Ok(passed > 0 && failed == 0)
    }

    /// Everything that was printed. An error that is not finite reads `null`.
    pub(super) fn json(&self) -> Value {
        json!({
            "passed": self.passed,
            "failed": self.failures.len(),
            "skipped": self.skips.len(),
            "rows": self.rows,
            "skips": self.skips,
            "errors": self.errors,
        })
    }

    fn lead(&self, unit: Unit<'_>) -> String {
        let Unit { case, backend, pass, dtype } = unit;
        format!("{case:<width$}  {backend:<9}  {pass:<9}  {dtype:<5}  ", width = self.case_width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Unit<'_> = Unit { case: "dplr-01", backend: "gpu", pass: "chunk", dtype: "bf16" };

    fn row(ok: bool) -> Row {
        Row { tensor: "dgk", error: 2e-3, allowance: 1.0, limit: Ok(3e-3), ok, recomputed: false }
    }

    #[test]
    fn units_are_counted_once_and_the_counts_stand_alone_on_the_last_line() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, 7);
        report.compared(UNIT, &[row(true), row(true)]).expect("written");
        report.compared(UNIT, &[row(true), row(false), row(false)]).expect("written");
        report.skipped(UNIT, "there is none").expect("written");
        assert!(!report.finish().expect("no file is unusable"));
        let text = String::from_utf8(out).expect("text");
        assert_eq!(text.lines().last(), Some("1 passed, 1 failed, 1 skipped"));
        assert!(text.contains("failed: dplr-01 gpu chunk bf16: dgk dgk"), "{text}");
        assert!(text.contains("skipped: there is none"), "{text}");
    }

    #[test]
    fn a_unit_that_could_not_be_computed_has_failed() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, 7);
        report.compared(UNIT, &[row(true)]).expect("written");
        report.broken(UNIT, "out of memory").expect("written");
        assert!(!report.finish().expect("no file is unusable"));
        assert_eq!(report.json()["rows"][1]["error"], "out of memory");
        let text = String::from_utf8(out).expect("text");
        assert!(text.contains("FAIL  out of memory"), "{text}");
        assert_eq!(text.lines().last(), Some("1 passed, 1 failed, 0 skipped"));
    }

    #[test]
    fn nothing_compared_is_no_success() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, 7);
        report.skipped(UNIT, "there is none").expect("written");
        assert!(!report.finish().expect("no file is unusable"));
        report.compared(UNIT, &[]).expect("written");
        assert!(!report.finish().expect("no file is unusable"));
    }

    #[test]
    fn an_unusable_file_is_an_error_even_when_the_rest_passes() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, 7);
        report.compared(UNIT, &[row(true)]).expect("written");
        report.unusable("bad.safetensors", "bad.safetensors: unknown operator").expect("written");
        let error = report.finish().expect_err("a file was unusable").to_string();
        assert!(error.contains("bad.safetensors"), "{error}");
    }

    #[test]
    fn the_json_is_valid_and_complete() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, 7);
        report.compared(UNIT, &[Row { error: f64::INFINITY, ..row(false) }]).expect("written");
        report.skipped(UNIT, "there is none").expect("written");
        let text = serde_json::to_string(&report.json()).expect("a value");
        let value: Value = serde_json::from_str(&text).expect("valid JSON");
        assert_eq!(value["failed"], 1);
        assert_eq!(value["rows"][0]["relative_rms"], Value::Null);
        assert_eq!(value["rows"][0]["limit"], 3e-3);
        assert_eq!(value["skips"][0]["reason"], "there is none");
    }
}

//! Compares conformance cases with the reference and with the GPU.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use fla_reference::compare::{F16_SPACING, relative_rms_beyond};
use fla_reference::tolerance::{self, Backend, Class, Dtype, Key, Pass};

use self::case::{Case, Rounding};
use self::gpu::{Gpu, Outcome};
use self::reference::{CHUNKS, Computed, Run, compute};
use self::report::{Report, Row, Unit};
use self::schema::{Form, Role};
use crate::Result;
use crate::home::Home;

mod case;
mod gpu;
mod reference;
mod report;
mod schema;

/// Compare every safetensors case of a folder with the reference, the GPU, or both.
///
/// A case holds inputs, incoming gradients, and the outputs and gradients that a float64 recurrence gives. Every
/// expected tensor is compared: relative RMS error against the limit of `fla_reference::tolerance`. Where rounding
/// to the number format changes the inputs, the truth is computed anew from the rounded ones.
///
/// The last line is `N passed, N failed, N skipped`, counted by case, backend, pass and dtype; a backward pass that
/// does not exist yet counts as one more skip. Operators with a single form run once, as pass `single`. The
/// reference has f64 and f32; the GPU f32, bf16 and f16.
#[derive(Debug, Args)]
pub(crate) struct ConformanceArgs {
    /// Folder of the cases; the project's own small set when absent.
    dir: Option<PathBuf>,
    /// Who computes. With `gpu` a missing GPU is an error, with `all` a reason to skip.
    #[arg(long, value_enum, default_value_t = BackendChoice::Reference)]
    backend: BackendChoice,
    /// Which form.
    #[arg(long, value_enum, default_value_t = PassChoice::All)]
    pass: PassChoice,
    /// Number format of the vectors; states stay in f32 or wider.
    #[arg(long, value_enum, default_value_t = DtypeChoice::All)]
    dtype: DtypeChoice,
    /// Also write every line to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Values of `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackendChoice {
    Reference,
    Gpu,
    All,
}

/// Values of `--pass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PassChoice {
    Recurrent,
    Chunk,
    All,
}

/// Values of `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DtypeChoice {
    F64,
    F32,
    Bf16,
    F16,
    All,
}

impl PassChoice {
    fn covers(self, form: Form) -> bool {
        match self {
            PassChoice::All => true,
            PassChoice::Recurrent => form != Form::Chunk,
            PassChoice::Chunk => form != Form::Recurrent,
        }
    }
}

impl DtypeChoice {
    /// What a backend is asked for: all that it has, or the one format, had or not.
    fn of(self, all: &[Dtype]) -> Vec<Dtype> {
        match self {
            DtypeChoice::F64 => vec![Dtype::F64],
            DtypeChoice::F32 => vec![Dtype::F32],
            DtypeChoice::Bf16 => vec![Dtype::Bf16],
            DtypeChoice::F16 => vec![Dtype::F16],
            DtypeChoice::All => all.to_vec(),
        }
    }
}

/// Somebody who computes.
enum Engine {
    Reference,
    Gpu(Gpu),
    /// There is none, for this reason.
    NoGpu(String),
}

impl Engine {
    fn backend(&self) -> Backend {
        match self {
            Engine::Reference => Backend::Reference,
            Engine::Gpu(_) | Engine::NoGpu(_) => Backend::Gpu,
        }
    }

    fn name(&self) -> &'static str {
        match self.backend() {
            Backend::Reference => "reference",
            Backend::Gpu => "gpu",
        }
    }

    fn dtypes(&self) -> &'static [Dtype] {
        match self.backend() {
            Backend::Reference => &[Dtype::F64, Dtype::F32],
            Backend::Gpu => &[Dtype::F32, Dtype::Bf16, Dtype::F16],
        }
    }
}

/// Runs the command; `Ok(true)` when something was compared and nothing failed.
pub(crate) fn run(args: &ConformanceArgs) -> Result<bool> {
    conform(args, &mut std::io::stdout().lock())
}

fn conform(args: &ConformanceArgs, out: &mut dyn Write) -> Result<bool> {
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => Home::find()?.vectors(),
    };
    let files = files(&dir)?;
    let mut engines = Vec::new();
    if args.backend != BackendChoice::Gpu {
        engines.push(Engine::Reference);
    }
    if args.backend != BackendChoice::Reference {
        match Gpu::open() {
            Ok(gpu) => engines.push(Engine::Gpu(gpu)),
            Err(error) if args.backend == BackendChoice::All => {
                engines.push(Engine::NoGpu(error.to_string()))
            }
            Err(error) => return Err(format!("no GPU to compare with: {error}").into()),
        }
    }
    let stem = |file: &PathBuf| file.file_stem().map_or(0, |stem| stem.len());
    let mut report = Report::new(out, files.iter().map(stem).max().unwrap_or(0));
    report.header()?;
    for file in &files {
        match Case::read(file) {
            Ok(case) => {
                for engine in &engines {
                    case_on(engine, &case, args, &mut report)?;
                }
            }
            Err(error) => {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                report.unusable(&name, &error.to_string())?;
            }
        }
    }
    let outcome = report.finish();
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))?;
    }
    outcome
}

/// The cases of a folder, by name.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let place = |error: std::io::Error| format!("{}: {error}", dir.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(place)? {
        let path = entry.map_err(place)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(format!("{}: there is no .safetensors file in this folder", dir.display()).into());
    }
    files.sort();
    Ok(files)
}

/// Every pass and number format of one case on one backend.
fn case_on(engine: &Engine, case: &Case, args: &ConformanceArgs, report: &mut Report<'_>) -> Result<()> {
    for dtype in args.dtype.of(engine.dtypes()) {
        for &form in case.operator.forms.iter().filter(|form| args.pass.covers(**form)) {
            let unit = Unit {
                case: &case.name,
                backend: engine.name(),
                pass: form.name(),
                dtype: dtype_name(dtype),
            };
            match attempt(engine, case, form, dtype) {
                Err(error) => report.broken(unit, &error.to_string())?,
                Ok(Attempt::Skipped(reason)) => report.skipped(unit, &reason)?,
                Ok(Attempt::Compared(rows)) => report.compared(unit, &rows)?,
            }
        }
    }
    Ok(())
}

/// What became of a unit.
enum Attempt {
    Skipped(String),
    Compared(Vec<Row>),
}

fn attempt(engine: &Engine, case: &Case, form: Form, dtype: Dtype) -> Result<Attempt> {
    let skip = |reason: String| Ok(Attempt::Skipped(reason));
    if !engine.dtypes().contains(&dtype) {
        let has: Vec<&str> = engine.dtypes().iter().map(|dtype| dtype_name(*dtype)).collect();
        return skip(format!("the {} computes in {} only", engine.name(), has.join(", ")));
    }
    let rounded = match case.rounded(dtype) {
        Rounding::Exact => None,
        Rounding::Changed(case) => Some(case),
        Rounding::Overflow(tensor) => {
            return skip(format!("`{tensor}` holds values that {} cannot", dtype_name(dtype)));
        }
    };
    let given = rounded.as_ref().unwrap_or(case);
    // Several results of one pass are all compared; the worse one is reported.
    let results = match engine {
        Engine::NoGpu(reason) => return skip(format!("no GPU: {reason}")),
        Engine::Gpu(gpu) => match gpu.compute(given, form, dtype)? {
            Outcome::Missing(reason) => return skip(reason),
            Outcome::Computed(computed) => vec![computed],
        },
        Engine::Reference => {
            let chunks = if form == Form::Chunk { CHUNKS } else { &CHUNKS[..1] };
            let run = |chunk: &usize| match dtype {
                Dtype::F32 => compute::<f32>(given, Run { form, chunk: *chunk }),
                _ => compute::<f64>(given, Run { form, chunk: *chunk }),
            };
            chunks.iter().map(run).collect()
        }
    };
    let truth = rounded.as_ref().map(|case| {
        let form = if form == Form::Single { Form::Single } else { Form::Recurrent };
        let computed = compute::<f64>(case, Run { form, chunk: CHUNKS[0] });
        computed.into_iter().map(|tensor| (tensor.name, tensor.values)).collect::<HashMap<_, _>>()
    });
    let bench = Bench { backend: engine.backend(), form, dtype };
    let rows = case
        .expected()
        .map(|(spec, tensor)| {
            let anew = truth.as_ref().and_then(|truth| truth.get(spec.name));
            let expected = Expected {
                name: spec.name,
                role: spec.role,
                stored: if anew.is_some() { Dtype::F64 } else { tensor.stored },
                values: anew.unwrap_or(&tensor.values),
                recomputed: anew.is_some(),
            };
            bench.judge(case, &expected, &results)
        })
        .collect();
    Ok(Attempt::Compared(rows))
}

/// What an expected tensor is.
struct Expected<'a> {
    name: &'static str,
    role: Role,
    stored: Dtype,
    values: &'a [f64],
    recomputed: bool,
}

/// What decides about limits, besides the tensor.
struct Bench {
    backend: Backend,
    form: Form,
    dtype: Dtype,
}

impl Bench {
    fn judge(&self, case: &Case, expected: &Expected<'_>, results: &[Vec<Computed>]) -> Row {
        let slack = if self.dtype == Dtype::F16 { F16_SPACING } else { 0.0 };
        let error = results
            .iter()
            .map(|result| {
                let computed = result.iter().find(|computed| computed.name == expected.name);
                match computed {
                    Some(x) if x.values.len() == expected.values.len() => {
                        relative_rms_beyond(&x.values, expected.values, slack)
                    }
                    _ => f64::INFINITY,
                }
            })
            // A comparison that is not a number has to stay bad, and `max` would drop it.
            .map(|error| if error.is_nan() { f64::INFINITY } else { error })
            .fold(0.0, f64::max);
        let relief = self.form == Form::Chunk && expected.role == Role::GateGrad;
        let allowance = if relief { case.cancellation(expected.name) } else { 1.0 };
        let limit = self.limit(case, expected);
        let judged = tolerance::relieved(error, allowance);
        let ok = limit.as_ref().is_ok_and(|limit| judged <= *limit);
        Row { tensor: expected.name, error, allowance, limit, ok, recomputed: expected.recomputed }
    }

    fn limit(&self, case: &Case, expected: &Expected<'_>) -> std::result::Result<f64, String> {
        let pass = match (self.form, expected.role.is_gradient()) {
            (Form::Recurrent, false) => Pass::RecurrentFwd,
            (Form::Recurrent, true) => Pass::RecurrentBwd,
            (Form::Chunk, false) => Pass::ChunkFwd,
            (Form::Chunk, true) => Pass::ChunkBwd,
            (Form::Single, _) => Pass::Fused,
        };
        let class = match expected.role {
            Role::FinalState => Class::FinalState,
            Role::Grad => Class::Grad,
            Role::GateGrad => Class::GateGrad,
            Role::Output | Role::Vector | Role::State => Class::Output,
        };
        let Bench { backend, dtype, .. } = *self;
        let limit = tolerance::limit(Key { backend, model: case.operator.model, pass, dtype, class })
            .map_err(|error| error.to_string())?;
        Ok(if expected.stored == Dtype::F64 { limit } else { tolerance::limit_against_f32(limit) })
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "f64",
        Dtype::F32 => "f32",
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::workspace_root;

    /// What is printed, and the outcome.
    struct Printed {
        text: String,
        outcome: std::result::Result<bool, String>,
    }

    impl Printed {
        fn last(&self) -> &str {
            self.text.lines().last().unwrap_or_default()
        }
    }

    fn conform_in(dir: &Path, change: impl FnOnce(&mut ConformanceArgs)) -> Printed {
        let mut args = ConformanceArgs {
            dir: Some(dir.to_path_buf()),
            backend: BackendChoice::Reference,
            pass: PassChoice::All,
            dtype: DtypeChoice::F64,
            json: None,
        };
        change(&mut args);
        let mut out = Vec::new();
        let outcome = conform(&args, &mut out).map_err(|error| error.to_string());
        Printed { text: String::from_utf8(out).expect("text"), outcome }
    }

    fn own_cases() -> PathBuf {
        workspace_root().join(crate::home::VECTORS)
    }

    /// A new folder that holds the given files.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, files: &[(&str, Vec<u8>)]) -> Folder {
            let folder = std::env::temp_dir().join(format!("fla-conformance-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("a folder");
            for (file, bytes) in files {
                std::fs::write(folder.join(file), bytes).expect("a file");
            }
            Folder(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // The folder lies among other temporary ones; failing to remove it is no failure of the test.
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// A case of the given operator with the shape `[1, 2, 3]`, whose expected values are `y = f(x)`.
    fn token_shift(op: &str, y: [f32; 6]) -> Vec<u8> {
        let x = [1.0f32, 2.0, 3.0, 5.0, 7.0, 11.0];
        let dy = [1.0f32, 0.0, 0.0, 0.0, 2.0, 0.0];
        // y_t = x_{t-1} - x_t, so dx_t = dy_{t+1} - dy_t.
        let dx = [-1.0f32, 2.0, 0.0, 0.0, -2.0, 0.0];
        let tensors: [(&str, &[usize], &[f32]); 5] = [
            ("x", &[1, 2, 3], &x),
            ("dy", &[1, 2, 3], &dy),
            ("y", &[1, 2, 3], &y),
            ("cache_out", &[1, 3], &x[3..]),
            ("dx", &[1, 2, 3], &dx),
        ];
        case::tests::file(&[("op", op), ("B", "1"), ("T", "2"), ("D", "3")], &tensors)
    }

    const Y: [f32; 6] = [-1.0, -2.0, -3.0, -4.0, -5.0, -8.0];

    #[test]
    fn the_own_cases_pass_in_f64_without_a_skip() {
        let printed = conform_in(&own_cases(), |_| ());
        assert_eq!(printed.outcome, Ok(true), "{}", printed.text);
        assert!(printed.last().ends_with(" passed, 0 failed, 0 skipped"), "{}", printed.last());
        for operator in schema::OPERATORS {
            let named = printed.text.lines().any(|line| line.starts_with(operator.name));
            assert!(named, "there is no case of {}", operator.name);
        }
    }

    #[test]
    fn a_wrong_value_fails_and_is_named() {
        let right = Folder::new("right", &[("a.safetensors", token_shift("token_shift", Y))]);
        assert_eq!(conform_in(&right.0, |_| ()).outcome, Ok(true));
        let mut y = Y;
        y[5] += 1e-4;
        let wrong = Folder::new("wrong", &[("a.safetensors", token_shift("token_shift", y))]);
        let printed = conform_in(&wrong.0, |_| ());
        assert_eq!(printed.outcome, Ok(false));
        assert_eq!(printed.last(), "0 passed, 1 failed, 0 skipped");
        assert!(printed.text.contains("failed: a reference single f64: y\n"), "{}", printed.text);
    }

    #[test]
    fn an_unknown_operator_and_a_truncated_file_are_named_and_the_rest_runs() {
        let good = token_shift("token_shift", Y);
        let files = [
            ("b-unknown.safetensors", token_shift("attention", Y)),
            ("c-cut.safetensors", good[..good.len() - 3].to_vec()),
            ("d-good.safetensors", good),
        ];
        let folder = Folder::new("errors", &files);
        let printed = conform_in(&folder.0, |_| ());
        let error = printed.outcome.clone().expect_err("two files are unusable");
        assert!(error.contains("b-unknown.safetensors") && error.contains("c-cut.safetensors"), "{error}");
        assert!(!error.contains("d-good"), "{error}");
        assert!(
            printed.text.contains("b-unknown.safetensors: unknown operator `attention`"),
            "{}",
            printed.text
        );
        assert_eq!(printed.last(), "1 passed, 0 failed, 0 skipped");
    }

    #[test]
    fn an_empty_folder_and_none_at_all_are_errors() {
        let folder = Folder::new("empty", &[]);
        for dir in [folder.0.clone(), folder.0.join("absent")] {
            let error = conform_in(&dir, |_| ()).outcome.expect_err("nothing to compare");
            assert!(error.contains("fla-conformance-empty"), "{error}");
        }
    }

    #[test]
    fn inputs_that_rounding_changes_are_compared_with_a_truth_of_their_own() {
        let folder = Folder::new("rounded", &[("a.safetensors", token_shift("token_shift", Y))]);
        let case = Case::read(&folder.0.join("a.safetensors")).expect("a case");
        // No longer exact in f32, and no longer what the expected values belong to.
        let case = case.with_first("x", 1.0 / 3.0);
        let rows = |dtype| match attempt(&Engine::Reference, &case, Form::Single, dtype) {
            Ok(Attempt::Compared(rows)) => rows,
            _ => Vec::new(),
        };
        let narrow = rows(Dtype::F32);
        assert_eq!(narrow.len(), 3);
        assert!(narrow.iter().all(|row| row.ok && row.recomputed), "{narrow:?}");
        let wide = rows(Dtype::F64);
        assert!(wide.iter().any(|row| !row.ok) && wide.iter().all(|row| !row.recomputed), "{wide:?}");
    }

    #[test]
    fn an_allowance_is_for_gate_gradients_of_chunk_passes_alone() {
        let files = files(&own_cases()).expect("the own cases");
        let cases = files.iter().map(|file| Case::read(file).expect("a case"));
        let case = cases.into_iter().find(|case| case.operator.name == "dplr").expect("a case of dplr");
        for form in [Form::Recurrent, Form::Chunk] {
            let Ok(Attempt::Compared(rows)) = attempt(&Engine::Reference, &case, form, Dtype::F64) else {
                panic!("{form:?} did not run");
            };
            for row in rows {
                let relieved = form == Form::Chunk && row.tensor == "dgk";
                let allowance = if relieved { case.cancellation("dgk") } else { 1.0 };
                assert_eq!(row.allowance, allowance, "{form:?} {}", row.tensor);
            }
        }
        assert!(case.cancellation("dgk") > 1.0, "the case shows nothing");
    }

    #[test]
    fn a_number_format_that_the_reference_lacks_is_skipped_with_a_reason() {
        let folder = Folder::new("bf16", &[("a.safetensors", token_shift("token_shift", Y))]);
        let printed = conform_in(&folder.0, |args| args.dtype = DtypeChoice::Bf16);
        assert_eq!(printed.outcome, Ok(false));
        assert!(
            printed.text.contains("skipped: the reference computes in f64, f32 only"),
            "{}",
            printed.text
        );
        assert_eq!(printed.last(), "0 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn a_pass_can_be_chosen_and_single_forms_always_run() {
        let rows = |pass: PassChoice| conform_in(&own_cases(), |args| args.pass = pass).text;
        let recurrent = rows(PassChoice::Recurrent);
        assert!(recurrent.contains("  recurrent  ") && !recurrent.contains("  chunk  "), "{recurrent}");
        let chunk = rows(PassChoice::Chunk);
        assert!(chunk.contains("  chunk  ") && !chunk.contains("  recurrent  "), "{chunk}");
        assert!(recurrent.contains("  single  ") && chunk.contains("  single  "));
    }

    #[test]
    fn the_json_holds_every_line() {
        let folder = Folder::new("json", &[("a.safetensors", token_shift("token_shift", Y))]);
        let path = folder.0.join("rows.json");
        let printed = conform_in(&folder.0, |args| args.json = Some(path.clone()));
        assert_eq!(printed.outcome, Ok(true));
        let text = std::fs::read_to_string(&path).expect("the file was written");
        let value: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        let tensors: Vec<_> =
            value["rows"].as_array().into_iter().flatten().map(|row| row["tensor"].clone()).collect();
        assert_eq!(tensors, ["y", "cache_out", "dx"]);
        assert_eq!(value["passed"], 1);
    }
}

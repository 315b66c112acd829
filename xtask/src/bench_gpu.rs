//! Runs the benchmarks, prints what they measured in one table, and appends it to the records.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use fla_core::Device;
use jiff::Zoned;
use serde_json::Value;

use crate::Result;
use crate::bundle;
use crate::flags::BenchGpuArgs;
use crate::home::{Executable, Home, Kind};
use crate::steps::{Step, Steps};
use crate::test_gpu::{cargo, logs, runs_on_the_gpu};
use crate::toolchain::Toolchain;
use crate::tree::{Tree, stem};

/// What criterion is told: a case is a few hundred samples of its own, so long runs add nothing.
const CRITERION: &[&str] =
    &["--noplot", "--quiet", "--warm-up-time", "0.3", "--measurement-time", "1", "--sample-size", "20"];

/// The columns of a record, by the names that the benchmarks give them.
const COLUMNS: &[&str] = &[
    "id",
    "dtype",
    "method",
    "median_us",
    "p20_us",
    "p80_us",
    "samples",
    "tb_per_s",
    "tflop_per_s",
    "floor_us",
    "percent_of_floor",
    "error",
    "extra_mib",
];

/// Runs the benchmarks; an error when there is no GPU, a failure when one of them failed or nothing was measured.
pub(crate) fn run(args: &BenchGpuArgs) -> Result<bool> {
    let device = Device::new(0)?;
    let home = Home::find()?;
    let toolchain = Toolchain::find(home.root())?;
    let gpu = device.context().name()?;
    println!("{gpu}, {}", toolchain.description);
    // Several gigabytes that the context holds would be missing to the benchmarks.
    drop(device);

    let measured = env::temp_dir().join(format!("fla-bench-{}.jsonl", std::process::id()));
    let _ = fs::remove_file(&measured);
    let benches = benches(&home, args.filter.as_deref())?;
    let mut run = Steps::new(logs(&home), benches.len())?;
    for mut step in benches {
        step.command.args(CRITERION).env("FLA_BENCH_JSON", &measured);
        toolchain.apply(&mut step.command);
        run.run(step)?;
    }
    let text = fs::read_to_string(&measured).unwrap_or_default();
    let _ = fs::remove_file(&measured);
    let rows = text.lines().map(serde_json::from_str).collect::<std::result::Result<Vec<Value>, _>>()?;
    if rows.is_empty() {
        let filter = args.filter.as_deref().unwrap_or_default();
        run.fail("measurements", &format!("no case was measured; is there one with `{filter}` in its name?"));
        return Ok(run.finish());
    }
    print!("{}", table(&rows));
    if let Some(path) = &args.json {
        let json = format!("{:#}\n", Value::Array(rows.clone()));
        fs::write(path, json).map_err(|source| format!("cannot write {}: {source}", path.display()))?;
    }
    let commit = match &home {
        Home::Workspace(root) => bundle::commit(root)?,
        Home::Bundle(bundle) => bundle.commit.clone(),
    };
    let folder = args.records.clone().unwrap_or_else(|| home.root().join("records"));
    let record = append(&folder, &gpu, &record(&rows, &commit))?;
    println!("appended to {}", record.display());
    Ok(run.finish())
}

/// The benchmarks of every crate, each told to run what has the filter in its name.
fn benches(home: &Home, filter: Option<&str>) -> Result<Vec<Step>> {
    let mut found: Vec<(String, Command)> = Vec::new();
    match home {
        Home::Workspace(root) => {
            let tree = Tree::load(root)?;
            for krate in tree.crates().into_iter().filter(|krate| runs_on_the_gpu(krate)) {
                for (path, _) in tree.under(&format!("{krate}/benches/")) {
                    let mut command = cargo(root);
                    command.args(["bench", "--package", krate, "--bench", stem(path), "--"]);
                    found.push((prefix(krate, stem(path)), command));
                }
            }
        }
        Home::Bundle(bundle) => {
            for Executable { name, krate, file, .. } in bundle.of_kind(Kind::Bench) {
                let mut command = Command::new(bundle.root.join(file));
                command.arg("--bench").current_dir(&bundle.root);
                found.push((prefix(krate, name), command));
            }
        }
    }
    if let Some(filter) = filter {
        // `rwkv7` and `rwkv7/recurrent_fwd/B1` both name one file; what names none is left to the cases.
        let names_file = |name: &str| name.contains(filter) || filter.starts_with(name);
        if found.iter().any(|(name, _)| names_file(name)) {
            found.retain(|(name, _)| names_file(name));
        }
        for (_, command) in &mut found {
            command.arg(filter);
        }
    }
    Ok(found.into_iter().map(|(name, command)| Step::new(name, command)).collect())
}

/// What the names of all cases of a file start with.
fn prefix(krate: &str, name: &str) -> String {
    format!("{}/{name}", krate.trim_start_matches("fla-").replace('-', "_"))
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or(f64::NAN)
}

/// One line a case, for the reader.
fn table(rows: &[Value]) -> String {
    let width = rows.iter().filter_map(|row| row["id"].as_str()).map(str::len).max().unwrap_or(0);
    let mut out = format!(
        "{:width$}  dtype   median us  (p20-p80)            TB/s  TFLOP/s  % of floor    error  extra MiB\n",
        "case"
    );
    for row in rows {
        let range = format!("({:.2}-{:.2})", number(row, "p20_us"), number(row, "p80_us"));
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:width$}  {:5} {:>11.2}  {range:18} {:>7.2} {:>8.2} {:>11.1} {:>8.1e} {:>10.1}",
            row["id"].as_str().unwrap_or_default(),
            row["dtype"].as_str().unwrap_or_default(),
            number(row, "median_us"),
            number(row, "tb_per_s"),
            number(row, "tflop_per_s"),
            number(row, "percent_of_floor"),
            number(row, "error"),
            number(row, "extra_mib"),
        );
    }
    out
}

/// The block of a run: what it ran on as comments, then the columns, then a line a case.
fn record(rows: &[Value], commit: &str) -> String {
    let first = &rows[0];
    let text = |key: &str| first[key].as_str().unwrap_or("unknown").to_owned();
    let mut out = format!(
        "# commit {commit}, {}, driver {}, NVRTC {}, copy {:.3} TB/s, {}\n# {}\n",
        text("gpu"),
        text("driver"),
        text("nvrtc"),
        number(first, "copy_tb_per_s"),
        Zoned::now().strftime("%Y-%m-%d %H:%M %Z"),
        "floor: bytes read and written once at the copy rate; times are medians with their 20 and 80 % quantiles",
    );
    let _ = writeln!(out, "{}", COLUMNS.join(","));
    for row in rows {
        let cells: Vec<String> = COLUMNS
            .iter()
            .map(|column| match &row[*column] {
                Value::String(text) => text.replace(',', ";"),
                value => value.as_f64().map_or_else(String::new, rounded),
            })
            .collect();
        let _ = writeln!(out, "{}", cells.join(","));
    }
    out
}

/// Four significant digits: more than repeats from run to run.
fn rounded(x: f64) -> String {
    let digits = if x == 0.0 { 0 } else { 3 - x.abs().log10().floor() as i32 };
    if (0..7).contains(&digits) { format!("{x:.*}", digits as usize) } else { format!("{x:.3e}") }
}

/// Appends to the file of this GPU and day.
fn append(folder: &Path, gpu: &str, block: &str) -> Result<PathBuf> {
    let gpu: String =
        gpu.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let folder = folder.join(gpu);
    let path = folder.join(format!("{}.csv", Zoned::now().strftime("%Y-%m-%d")));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(&folder)?;
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        if file.metadata()?.len() > 0 {
            writeln!(file)?;
        }
        file.write_all(block.as_bytes())
    };
    write().map_err(|source| format!("cannot write {}: {source}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row() -> Value {
        json!({
            "id": "rwkv7/recurrent_fwd/B1, T1", "dtype": "bf16", "method": "graph", "gpu": "NVIDIA H200",
            "driver": "580.1 (CUDA 13.0)", "nvrtc": "13.0", "median_us": 2.345_678, "p20_us": 2.3, "p80_us": 2.4,
            "samples": 40.0, "tb_per_s": 0.91, "tflop_per_s": 0.001_234, "copy_tb_per_s": 4.238,
            "floor_us": 0.51, "percent_of_floor": 21.7, "error": 0.001_66, "extra_mib": 0.0,
        })
    }

    #[test]
    fn a_record_says_what_it_ran_on_and_has_a_line_for_each_case() {
        let text = record(&[row(), row()], "abc");
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0]
                .starts_with("# commit abc, NVIDIA H200, driver 580.1 (CUDA 13.0), NVRTC 13.0, copy 4.238")
        );
        assert_eq!(lines[2].split(',').count(), COLUMNS.len());
        assert_eq!(
            lines[3],
            "rwkv7/recurrent_fwd/B1; T1,bf16,graph,2.346,2.300,2.400,40.00,0.9100,0.001234,0.5100,21.70,0.001660,0"
        );
        assert_eq!(lines.len(), 5);
        assert_eq!(table(&[row()]).lines().count(), 2);
    }

    #[test]
    fn numbers_keep_four_digits() {
        for (x, text) in
            [(0.0, "0"), (1234.56, "1235"), (0.05, "0.05000"), (1.66e-8, "1.660e-8"), (98766.0, "9.877e4")]
        {
            assert_eq!(rounded(x), text);
        }
    }

    #[test]
    fn a_second_run_of_a_day_is_appended() {
        let folder = env::temp_dir().join(format!("xtask-records-{}", std::process::id()));
        let path = append(&folder, "NVIDIA H200", "one\n").unwrap();
        assert!(path.starts_with(folder.join("nvidia-h200")));
        append(&folder, "NVIDIA H200", "two\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n\ntwo\n");
        fs::remove_dir_all(folder).unwrap();
    }
}

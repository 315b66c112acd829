//! Compiles every kernel for every architecture, without a GPU, and compares what came out with the last time.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use fla_core::compile::{Compiled, compile, nvrtc_version};
use fla_core::{Arch, Unit};
use indicatif::{ProgressBar, ProgressStyle};

use crate::flags::KernelsArgs;
use crate::home::Home;
use crate::toolchain::{Toolchain, nvdisasm};
use crate::{Error, Result};

/// What a release must compile for.
pub(crate) const ARCHS: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];

/// The architecture whose numbers are committed.
const TUNED: &str = "sm_90a";

/// The committed numbers, below the root of the workspace.
const RECORD: &str = "xtask/kernels.sm_90a.txt";

/// The units of every crate that has kernels; those of `fla-dplr` are among the ones of `fla-rwkv7`.
const CRATES: &[fn(Arch) -> Vec<Unit>] =
    &[fla_gated_delta::units, fla_rwkv4::units, fla_rwkv6::units, fla_rwkv7::units];

/// Compiles, prints the table, and compares; `Ok(false)` when a unit is refused or its numbers changed.
pub(crate) fn run(args: &KernelsArgs) -> Result<bool> {
    let home = Home::find()?;
    let toolchain = Toolchain::find(home.root())?;
    if !toolchain.is_visible_here() {
        // The environment of a running process is not changed: a child gets it from the start.
        let mut child = Command::new(std::env::current_exe()?);
        child.args(std::env::args_os().skip(1));
        toolchain.apply(&mut child);
        std::process::exit(child.status()?.code().unwrap_or(2));
    }
    println!("{}", toolchain.description);

    let jobs = jobs(args)?;
    let rows = compile_all(&jobs);
    print!("{}", table(&rows));
    if let Some(folder) = &args.sass {
        disassemble(&rows, folder, &nvdisasm(home.root())?)?;
    }
    let refused = rows.iter().filter(|row| row.outcome.is_err()).count();
    for row in &rows {
        if let Err(error) = &row.outcome {
            println!("\n{error}");
        }
    }
    println!("{} compiled, {refused} refused", rows.len() - refused);

    let whole = args.filter.is_none() && jobs.iter().any(|job| job.arch.to_string() == TUNED);
    if refused > 0 || !whole || home.is_bundle() {
        return Ok(refused == 0);
    }
    let record = record(&rows, &nvrtc_version()?.to_string());
    let path = home.root().join(RECORD);
    if args.write {
        fs::write(&path, record).map_err(|source| format!("cannot write {}: {source}", path.display()))?;
        println!("wrote {RECORD}");
        return Ok(true);
    }
    let committed = fs::read_to_string(&path).map_err(|source| {
        format!("cannot read {RECORD}: {source}; `cargo xtask kernels --write` makes it")
    })?;
    let comparison = Comparison::of(&committed, &record);
    println!("{}", comparison.text());
    Ok(!matches!(comparison, Comparison::Differs(_)))
}

/// One unit for one architecture.
struct Job {
    unit: Unit,
    arch: Arch,
}

struct Row<'a> {
    job: &'a Job,
    outcome: std::result::Result<Compiled, Error>,
}

fn jobs(args: &KernelsArgs) -> Result<Vec<Job>> {
    let mut archs = Vec::new();
    for name in &args.arch {
        let arch = Arch::parse(name).filter(|arch| arch.is_supported());
        archs.push(
            arch.ok_or_else(|| format!("`{name}` is not an architecture from sm_80 on, such as sm_90a"))?,
        );
    }
    let filter = args.filter.as_deref().unwrap_or_default();
    let mut jobs = Vec::new();
    for arch in archs {
        let units = CRATES.iter().flat_map(|units| units(arch));
        let wanted = units.filter(|unit| unit.symbol().contains(filter));
        // One unit of each kernel finds what an architecture does not have; all of them are for the tuned one.
        let mut seen = HashSet::new();
        let is_every = args.every || args.filter.is_some() || arch.to_string() == TUNED;
        let wanted = wanted.filter(|unit| is_every || seen.insert(unit.symbol()));
        jobs.extend(wanted.map(|unit| Job { unit, arch }));
    }
    // One kernel below the other, each for all architectures.
    jobs.sort_by_cached_key(|job| (job.unit.symbol(), job.unit.constants()));
    if jobs.is_empty() {
        return Err(format!("no kernel has `{filter}` in its symbol").into());
    }
    Ok(jobs)
}

/// Compiles on every core; the rows keep the order of the jobs.
fn compile_all(jobs: &[Job]) -> Vec<Row<'_>> {
    let bar = ProgressBar::new(jobs.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}") {
        bar.set_style(style);
    }
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(i) else { return };
            bar.set_message(format!("{} for {}", job.unit.symbol(), job.arch));
            let outcome = compile(&job.unit, job.arch).map_err(Error::from);
            outcomes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((i, outcome));
            bar.inc(1);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    bar.finish_and_clear();
    let mut outcomes = outcomes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcomes.sort_by_key(|(i, _)| *i);
    outcomes.into_iter().map(|(i, outcome)| Row { job: &jobs[i], outcome }).collect()
}

/// One paragraph for each unit, one line for each architecture.
fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut unit = String::new();
    for row in rows {
        let name = format!("{} ({})", row.job.unit.symbol(), row.job.unit.constants());
        if name != unit {
            text += &format!("{name}\n");
            unit = name;
        }
        let arch = row.job.arch.to_string();
        text += &match &row.outcome {
            Ok(compiled) => format!(
                "  {arch:<7}  {:>3} registers  {} bytes spilled  {:>6} bytes shared  {:>6} bytes cubin  {:>4.0} ms\n",
                compiled.report.registers,
                compiled.report.spill_bytes,
                shared_bytes(row.job, compiled),
                compiled.cubin.len(),
                compiled.elapsed.as_secs_f64() * 1e3,
            ),
            Err(_) => format!("  {arch:<7}  refused, see below\n"),
        };
    }
    text
}

/// What a block takes, static and dynamic.
fn shared_bytes(job: &Job, compiled: &Compiled) -> u32 {
    compiled.report.smem_bytes + job.unit.smem_bytes()
}

/// The numbers of the tuned architecture as they are committed: one line per unit below the line of the compiler.
fn record(rows: &[Row], nvrtc: &str) -> String {
    let mut lines: Vec<String> = rows
        .iter()
        .filter(|row| row.job.arch.to_string() == TUNED)
        .filter_map(|row| row.outcome.as_ref().ok().map(|compiled| (row.job, compiled)))
        .map(|(job, compiled)| {
            format!(
                "{} ({}): {} registers, {} spill bytes, {} shared bytes\n",
                job.unit.symbol(),
                job.unit.constants(),
                compiled.report.registers,
                compiled.report.spill_bytes,
                shared_bytes(job, compiled),
            )
        })
        .collect();
    lines.sort();
    format!("NVRTC {nvrtc}, {TUNED}\n{}", lines.concat())
}

/// The committed record against the one of now.
#[derive(Debug, PartialEq, Eq)]
enum Comparison {
    Same,
    /// Two compilers allocate registers differently, so there is nothing to compare.
    OtherCompiler(String),
    /// The lines that went and came.
    Differs(Vec<String>),
}

impl Comparison {
    fn of(committed: &str, now: &str) -> Comparison {
        let compiler = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        if compiler(committed) != compiler(now) {
            return Comparison::OtherCompiler(compiler(committed));
        }
        let gone = committed.lines().filter(|line| !now.lines().any(|other| other == *line));
        let come = now.lines().filter(|line| !committed.lines().any(|other| other == *line));
        let lines: Vec<String> =
            gone.map(|line| format!("-{line}")).chain(come.map(|line| format!("+{line}"))).collect();
        if lines.is_empty() { Comparison::Same } else { Comparison::Differs(lines) }
    }

    fn text(&self) -> String {
        match self {
            Comparison::Same => format!("the numbers are those of {RECORD}"),
            Comparison::OtherCompiler(compiler) => {
                format!("not compared with {RECORD}, which is of {compiler}")
            }
            Comparison::Differs(lines) => {
                let lines = lines.join("\n");
                format!(
                    "the numbers are not those of {RECORD}; `cargo xtask kernels --write` takes them over:\n{lines}"
                )
            }
        }
    }
}

/// Writes each cubin and its assembly into `folder`.
fn disassemble(rows: &[Row], folder: &Path, nvdisasm: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|source| format!("cannot create {}: {source}", folder.display()))?;
    for (i, row) in rows.iter().enumerate() {
        let Ok(compiled) = &row.outcome else { continue };
        // Units of one kernel differ in their constants alone, which are no file name.
        let name = format!("{i:03}-{}.{}", row.job.unit.symbol(), row.job.arch);
        let cubin = folder.join(format!("{name}.cubin"));
        fs::write(&cubin, &compiled.cubin)
            .map_err(|source| format!("cannot write {}: {source}", cubin.display()))?;
        let output = Command::new(nvdisasm)
            .arg(&cubin)
            .output()
            .map_err(|source| format!("cannot start {}: {source}", nvdisasm.display()))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("nvdisasm cannot read {}: {}", cubin.display(), why.trim()).into());
        }
        let title =
            format!("// {} ({}) for {}\n", row.job.unit.symbol(), row.job.unit.constants(), row.job.arch);
        let sass = [title.into_bytes(), output.stdout].concat();
        let path = folder.join(format!("{name}.sass"));
        fs::write(&path, sass).map_err(|source| format!("cannot write {}: {source}", path.display()))?;
    }
    println!("wrote cubins and assembly to {}", folder.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_number_differs_and_another_compiler_does_not() {
        let committed = "NVRTC 13.0, sm_90a\na: 10 registers\nb: 20 registers\n";
        assert_eq!(Comparison::of(committed, committed), Comparison::Same);
        let differs = Comparison::of(committed, "NVRTC 13.0, sm_90a\na: 11 registers\nb: 20 registers\n");
        let lines = ["-a: 10 registers", "+a: 11 registers"].map(String::from);
        assert_eq!(differs, Comparison::Differs(lines.to_vec()));
        let fewer = Comparison::of(committed, "NVRTC 13.0, sm_90a\na: 10 registers\n");
        assert_eq!(fewer, Comparison::Differs(vec!["-b: 20 registers".to_owned()]));
        let other = Comparison::of(committed, "NVRTC 13.5, sm_90a\na: 11 registers\n");
        assert_eq!(other, Comparison::OtherCompiler("NVRTC 13.0, sm_90a".to_owned()));
    }

    #[test]
    fn every_architecture_of_a_release_has_a_name_that_is_understood() {
        for name in ARCHS {
            assert_eq!(Arch::parse(name).map(|arch| arch.to_string()).as_deref(), Some(*name));
        }
    }
}

//! Runs commands one after the other, shows how far they are, and counts the outcomes.

use std::fs::{self, File};
use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::Result;

/// How often the last line of a running command is shown.
const TICK: Duration = Duration::from_millis(100);

/// Lines of a failed command that are printed; all of them are in its log file.
const SHOWN_LINES: usize = 200;

/// A command with a name for the reader.
pub(crate) struct Step {
    pub(crate) title: String,
    pub(crate) command: Command,
}

impl Step {
    pub(crate) fn new(title: impl Into<String>, command: Command) -> Step {
        Step { title: title.into(), command }
    }
}

/// A run of steps, each with its output in a file of its own.
pub(crate) struct Steps {
    logs: PathBuf,
    announced: usize,
    started: usize,
    failed: Vec<String>,
}

impl Steps {
    /// Will write the logs into the folder `logs` and number the steps up to `announced`.
    pub(crate) fn new(logs: PathBuf, announced: usize) -> Result<Steps> {
        fs::create_dir_all(&logs).map_err(|source| format!("cannot create {}: {source}", logs.display()))?;
        Ok(Steps { logs, announced, started: 0, failed: Vec::new() })
    }

    /// Runs one step to its end, prints one line on it, and its output when it failed; returns the output.
    pub(crate) fn run(&mut self, mut step: Step) -> Result<String> {
        self.started += 1;
        let header = format!("[{:>2}/{}] {:<50}", self.started, self.announced.max(self.started), step.title);
        let log = self.logs.join(format!("{:02}-{}.log", self.started, file_name(&step.title)));
        let start = Instant::now();
        let outcome = watch(&mut step.command, &log, &header);
        let seconds = start.elapsed().as_secs_f64();
        let output =
            fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        match outcome {
            Ok(status) if status.success() => println!("{header} ok     {seconds:6.1} s"),
            outcome => {
                println!("{header} FAILED {seconds:6.1} s");
                let lines: Vec<&str> = output.lines().collect();
                for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
                    println!("    {line}");
                }
                match outcome {
                    Ok(status) => println!("    {status}; the whole output is in {}", log.display()),
                    Err(error) => println!("    {error}"),
                }
                self.failed.push(step.title);
            }
        }
        Ok(output)
    }

    /// Counts a step that could not even be started.
    pub(crate) fn fail(&mut self, title: &str, why: &str) {
        self.started += 1;
        println!("[{:>2}/{}] {title:<50} FAILED", self.started, self.announced.max(self.started));
        println!("    {why}");
        self.failed.push(title.to_owned());
    }

    /// Prints what failed and the count; `true` when nothing did.
    pub(crate) fn finish(self) -> bool {
        for title in &self.failed {
            println!("failed: {title}");
        }
        println!("{} passed, {} failed", self.started - self.failed.len(), self.failed.len());
        self.failed.is_empty()
    }
}

/// Runs the command with its output in the file `log`, and shows the last line of it on a terminal.
fn watch(command: &mut Command, log: &PathBuf, header: &str) -> Result<ExitStatus> {
    let file = File::create(log).map_err(|source| format!("cannot write {}: {source}", log.display()))?;
    let second = file.try_clone().map_err(|source| format!("cannot write {}: {source}", log.display()))?;
    let bar = if stderr().is_terminal() {
        let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}")?;
        ProgressBar::new_spinner().with_style(style).with_prefix(header.trim_end().to_owned())
    } else {
        // Where nothing can be redrawn, the reader still sees what is running.
        println!("{header} ...");
        stdout().flush()?;
        ProgressBar::hidden()
    };
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(file)
        .stderr(second)
        .spawn()
        .map_err(|source| format!("cannot start {program}: {source}"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !bar.is_hidden() {
            let output = fs::read(log).unwrap_or_default();
            let output = String::from_utf8_lossy(&output);
            bar.set_message(output.lines().last().unwrap_or_default().trim().to_owned());
            bar.tick();
        }
        std::thread::sleep(TICK);
    };
    bar.finish_and_clear();
    Ok(status)
}

fn file_name(title: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = title.chars().map(plain).collect();
    name.split('-').filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failure_is_counted_and_the_rest_still_runs() {
        let logs = std::env::temp_dir().join(format!("xtask-steps-{}", std::process::id()));
        let mut steps = Steps::new(logs.clone(), 3).unwrap();
        steps.run(Step::new("It fails", shell("echo why; exit 3"))).unwrap();
        let output = steps.run(Step::new("It passes", shell("echo out; echo err >&2"))).unwrap();
        assert_eq!(output, "out\nerr\n");
        steps.run(Step::new("It does not exist", Command::new("./no-such-program"))).unwrap();
        assert_eq!(steps.failed, ["It fails", "It does not exist"]);
        assert_eq!(fs::read_to_string(logs.join("01-it-fails.log")).unwrap(), "why\n");
        assert!(!steps.finish());
        fs::remove_dir_all(logs).unwrap();
    }
}

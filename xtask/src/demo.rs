//! The demo: every operator as an associative memory that reads a text once and predicts each next byte.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use fla_core::testing::gpu_is_required;
use fla_reference::compare::relative_rms;
use fla_reference::tolerance::{self, Backend, Class, Dtype, Key, Pass};
use indicatif::{ProgressBar, ProgressStyle};

use self::gpu::{FirstCall, Gpu, GpuMemory};
use self::memory::{Codes, HEADS, K, MAX_CONTEXT, Segment, V};
use self::operators::{Form, OPERATORS, Operator};
use self::score::{OrderZero, Score, Scorer};
use self::text::Text;
use crate::Result;

mod gpu;
mod memory;
mod operators;
mod score;
mod text;

/// Read a text with every operator as an associative memory, and see how well each predicts the next byte.
///
/// There are no weights. In each head the hash of the last few bytes is a key of unit length and a code of the byte
/// that follows is the value; the operator keeps the pairs in its state, and what it returns for the key of the
/// next byte is decoded into a distribution over bytes, before that byte is looked at. Only the weights that
/// combine the heads are learnt, from bytes already seen.
///
/// It runs on the GPU when there is one, with the operators that have kernels; otherwise all run on the CPU
/// reference. Exit code 1 when two forms of an operator, or the GPU and the reference, disagree.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Any file; the repository's own text when absent.
    file: Option<PathBuf>,
    /// Stop after so many bytes. A given file is read whole unless this says otherwise; of the repository's own
    /// text 65536 bytes are read, which takes less than a minute on two CPU cores.
    #[arg(long, value_name = "N")]
    bytes: Option<u64>,
    /// Use the CPU reference even when there is a GPU.
    #[arg(long)]
    cpu: bool,
    /// Print how many milliseconds the first plan and pass of this operator take, and do nothing else: what the
    /// demo runs in processes of their own.
    #[arg(long, value_name = "OPERATOR", hide = true)]
    first_call: Option<String>,
}

/// Bytes that are turned into tensors at a time; what bounds the memory of the demo.
const SEGMENT: usize = 2048;

/// Bytes over which the GPU is compared with the reference.
const CHECKED: u64 = 4096;

/// Texts longer than this show a progress bar.
const LONG: u64 = 64 << 10;

/// Runs the command; `Ok(true)` when everything that was compared agrees.
pub(crate) fn run(args: &DemoArgs) -> Result<bool> {
    if let Some(name) = &args.first_call {
        return time_first_call(name);
    }
    let gpu = if args.cpu { Err("--cpu was given".into()) } else { Gpu::open() };
    let gpu = match gpu {
        Ok(gpu) => {
            println!("Running on the GPU: {}.", gpu.describe()?);
            Some(gpu)
        }
        Err(error) if !args.cpu && gpu_is_required() => {
            return Err(format!("a GPU is required, but there is none: {error}").into());
        }
        Err(reason) => {
            let reason = reason.to_string();
            let reason = reason.lines().map(str::trim).collect::<Vec<_>>().join(" ");
            println!("Running on the CPU reference: {}.", reason.trim_end_matches('.'));
            None
        }
    };
    let begin = Instant::now();
    let text = Text::open(args.file.as_deref(), args.bytes)?;
    println!("Reading {} bytes: {}.", text.bytes, text.what);
    if gpu.is_some() {
        print_first_calls()?;
    }
    let found = read(text, gpu.as_ref())?;
    print_table(&found, gpu.is_some());
    print_legend(&found, gpu.is_some());
    println!("\n{:.0} s in all.", begin.elapsed().as_secs_f64());
    Ok(found.readers.iter().all(|reader| reader.checks.iter().all(Check::ok)))
}

/// What reading a text gave.
struct Found {
    order_zero: Score,
    readers: Vec<Reader>,
}

/// Two results that ought to be the same.
struct Check {
    /// What was compared with what.
    what: &'static str,
    /// The worst relative RMS error of a segment.
    error: f64,
    /// The limit of the tolerance table.
    limit: f64,
}

impl Check {
    fn ok(&self) -> bool {
        self.error <= self.limit
    }

    fn add(&mut self, got: &[f32], want: &[f32]) {
        let error = relative_rms(got, want);
        // A comparison that is not a number has to stay bad.
        self.error = if error.is_nan() { f64::INFINITY } else { self.error.max(error) };
    }
}

/// One operator on its way through the text.
struct Reader {
    operator: &'static Operator,
    gpu: Option<Box<dyn GpuMemory>>,
    scorer: Scorer,
    /// What the operator returned for the last token of the segment before.
    last_row: Vec<f32>,
    recurrent_state: Option<Vec<f32>>,
    chunk_state: Option<Vec<f32>>,
    checks: Vec<Check>,
    tokens: u64,
    seconds: f64,
}

impl Reader {
    fn new(operator: &'static Operator, gpu: Option<Box<dyn GpuMemory>>) -> Result<Reader> {
        let (backend, pass) = match gpu {
            Some(_) => (Backend::Gpu, Pass::RecurrentFwd),
            None => (Backend::Reference, Pass::ChunkFwd),
        };
        let key = Key { backend, model: operator.model, pass, dtype: Dtype::F32, class: Class::Output };
        let limit = tolerance::limit(key)?;
        let whats: &[&str] =
            if gpu.is_some() { &["recurrent reference", "chunk reference"] } else { &["chunk form"] };
        let checks = whats.iter().map(|what| Check { what, error: 0.0, limit }).collect();
        Ok(Reader {
            operator,
            gpu,
            scorer: Scorer::new(operator.heads()),
            last_row: vec![0.0; operator.row()],
            recurrent_state: None,
            chunk_state: None,
            checks,
            tokens: 0,
            seconds: 0.0,
        })
    }

    fn read(&mut self, segment: &Segment<'_>) -> Result<()> {
        let (o, seconds) = match &mut self.gpu {
            Some(gpu) => {
                let step = gpu.read(segment)?;
                if self.tokens < CHECKED {
                    let in_chunks = gpu.read_in_chunks(segment)?;
                    let recurrent = self.reference(segment, Form::Recurrent);
                    self.checks[0].add(&step.o, &recurrent);
                    let chunk = self.reference(segment, Form::Chunk);
                    self.checks[1].add(&step.o, &chunk);
                    if let Some(in_chunks) = in_chunks {
                        self.in_chunks()?.add(&in_chunks, &step.o);
                    }
                }
                (step.o, step.seconds)
            }
            None => {
                let begin = Instant::now();
                let o = self.reference(segment, Form::Recurrent);
                let seconds = begin.elapsed().as_secs_f64();
                let chunk = self.reference(segment, Form::Chunk);
                self.checks[0].add(&chunk, &o);
                (o, seconds)
            }
        };
        self.seconds += seconds;
        self.tokens += segment.t() as u64;

        let mut rows = std::mem::take(&mut self.last_row);
        rows.extend(o);
        let mut said = Vec::new();
        for (i_t, &byte) in segment.bytes.iter().enumerate() {
            self.operator.prediction(segment, &rows, i_t, &mut said);
            self.scorer.observe(&said, byte);
        }
        self.last_row = rows.split_off(rows.len() - self.operator.row());
        Ok(())
    }

    /// The comparison of the operator's two passes on the GPU.
    fn in_chunks(&mut self) -> Result<&mut Check> {
        if self.checks.len() < 3 {
            let (backend, pass) = (Backend::Gpu, Pass::ChunkFwd);
            let model = self.operator.model;
            let limit =
                tolerance::limit(Key { backend, model, pass, dtype: Dtype::F32, class: Class::Output })?;
            self.checks.push(Check { what: "its own chunk pass", error: 0.0, limit });
        }
        Ok(&mut self.checks[2])
    }

    /// A segment on the CPU, going on from where that form stopped.
    fn reference(&mut self, segment: &Segment<'_>, form: Form) -> Vec<f32> {
        let state = match form {
            Form::Recurrent => &mut self.recurrent_state,
            Form::Chunk => &mut self.chunk_state,
        };
        let step = (self.operator.cpu)(segment, form, state.as_deref());
        *state = Some(step.state);
        step.o
    }
}

/// Reads the text once, segment by segment, with every operator that there is.
fn read(mut text: Text, gpu: Option<&Gpu>) -> Result<Found> {
    let mut readers = Vec::new();
    for operator in OPERATORS {
        match (gpu, operator.gpu) {
            (None, _) => readers.push(Reader::new(operator, None)?),
            (Some(gpu), Some(start)) => readers.push(Reader::new(operator, Some(start(gpu)?))?),
            (Some(_), None) => {}
        }
    }
    let progress = progress(text.bytes * readers.len() as u64);
    let codes = Codes::new();
    let mut order_zero = OrderZero::new();
    let mut before: Vec<u8> = Vec::new();
    loop {
        let bytes = text.next(SEGMENT)?;
        if bytes.is_empty() {
            break;
        }
        let segment = Segment::new(&codes, &before, &bytes);
        for reader in &mut readers {
            progress.set_message(reader.operator.name);
            reader.read(&segment)?;
            progress.inc(bytes.len() as u64);
        }
        bytes.iter().for_each(|byte| order_zero.observe(*byte));
        before.extend(&bytes);
        before.drain(..before.len().saturating_sub(MAX_CONTEXT));
    }
    progress.finish_and_clear();
    Ok(Found { order_zero: order_zero.score, readers })
}

/// A bar over the bytes of all operators, for long texts and people who are watching.
fn progress(bytes: u64) -> ProgressBar {
    if bytes < LONG || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent:>3} %  {eta:>4} left  {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn print_first_calls() -> Result<()> {
    println!("\nFirst call of a process       empty kernel cache   filled kernel cache");
    for operator in OPERATORS.iter().filter(|operator| operator.gpu.is_some()) {
        let FirstCall { cold_ms, warm_ms } = FirstCall::measure(operator.name)?;
        println!("  {:<26} {cold_ms:>16.1} ms {warm_ms:>18.1} ms", operator.name);
    }
    println!("  A plan and a pass on an open device, with the search for NVRTC.");
    Ok(())
}

/// The other side of [`FirstCall::measure`]: one call in this process, and its time as the only output.
fn time_first_call(name: &str) -> Result<bool> {
    let operator = OPERATORS.iter().find(|operator| operator.name == name);
    let start = operator.and_then(|operator| operator.gpu).ok_or_else(|| format!("no kernel of `{name}`"))?;
    let gpu = Gpu::open()?;
    let codes = Codes::new();
    let segment = Segment::new(&codes, b"", b"a first call is a plan and a pass");
    let begin = Instant::now();
    start(&gpu)?.read(&segment)?;
    println!("{}", 1e3 * begin.elapsed().as_secs_f64());
    Ok(true)
}

fn print_table(found: &Found, on_gpu: bool) {
    let compared = if on_gpu { "GPU against" } else { "recurrent against" };
    println!();
    println!(
        "{:<12} {:>11} {:>10} {:>10}   {:<22} {:>8} {:>8}",
        "", "next byte", "bits", "tokens", compared, "relative", ""
    );
    println!(
        "{:<12} {:>11} {:>10} {:>10}   {:<22} {:>8} {:>8}",
        "operator", "right", "per byte", "per s", "", "RMS", "limit"
    );
    let score = |name: &str, score: &Score| {
        format!("{name:<12} {:>9.1} % {:>10.3}", score.accuracy_percent(), score.bits_per_byte())
    };
    for reader in &found.readers {
        let lead = score(reader.operator.name, &reader.scorer.score);
        let speed = reader.tokens as f64 / reader.seconds;
        for (i, check) in reader.checks.iter().enumerate() {
            let left = if i == 0 { format!("{lead} {speed:>10.0}") } else { String::new() };
            let verdict = if check.ok() { "ok" } else { "DIFFERS" };
            println!(
                "{left:<46}   {:<22} {:>8.1e} {:>8.0e}  {verdict}",
                check.what, check.error, check.limit
            );
        }
    }
    println!("{}", score("order 0", &found.order_zero));
}

fn print_legend(found: &Found, on_gpu: bool) {
    let contexts: Vec<String> = HEADS.iter().map(|head| head.context.to_string()).collect();
    println!(
        "\nEach operator is a memory of {} heads with K = {K} and V = {V}, in f32. The key of a head is the",
        HEADS.len()
    );
    println!(
        "hash of the last {} bytes; the value is a code of the byte that follows. Each",
        contexts.join(", ")
    );
    println!(
        "byte is predicted before it is written. Tokens per second count the operator alone, without the"
    );
    println!("making of keys and the decoding of answers.");
    for reader in &found.readers {
        println!("  {:<12} {}", reader.operator.name, reader.operator.does);
    }
    println!("  {:<12} no memory: always the most frequent byte so far", "order 0");
    if on_gpu {
        let absent: Vec<&str> = OPERATORS
            .iter()
            .filter(|operator| operator.gpu.is_none())
            .map(|operator| operator.name)
            .collect();
        if !absent.is_empty() {
            println!("Not on the GPU yet, see --cpu: {}.", absent.join(", "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Text {
        Text::open(None, Some(6000)).expect("the repository's own text")
    }

    #[test]
    fn every_operator_agrees_with_its_chunk_form_and_those_with_keys_beat_the_baseline() {
        let found = read(text(), None).expect("a readable text");
        assert_eq!(found.order_zero.bytes, 6000);
        for reader in &found.readers {
            let Score { bytes, hits, .. } = reader.scorer.score;
            let name = reader.operator.name;
            assert_eq!(bytes, 6000, "{name}");
            for check in &reader.checks {
                assert!(check.ok(), "{name}: {} differs by {:.1e}", check.what, check.error);
            }
            if name != "RWKV-4" {
                assert!(hits > found.order_zero.hits, "{name}: {hits} of {bytes}");
            }
        }
    }

    #[test]
    fn a_prediction_does_not_depend_on_the_byte_or_on_what_follows() {
        let codes = Codes::new();
        let mut x = text().next(600).expect("text");
        let mut y = x.clone();
        y[400..].reverse();
        y[400] = x[400] ^ 1;
        for operator in OPERATORS {
            let mut predicted = [Vec::new(), Vec::new()];
            for (bytes, predicted) in [&mut x, &mut y].into_iter().zip(&mut predicted) {
                let segment = Segment::new(&codes, b"", bytes);
                let mut rows = vec![0.0; operator.row()];
                rows.extend((operator.cpu)(&segment, Form::Recurrent, None).o);
                operator.prediction(&segment, &rows, 400, predicted);
            }
            assert!(predicted[0].iter().any(|x| *x != 0.0), "{}", operator.name);
            assert_eq!(predicted[0], predicted[1], "{}", operator.name);
        }
    }

    #[test]
    fn segments_change_nothing() {
        let codes = Codes::new();
        let bytes = text().next(300).expect("text");
        for operator in OPERATORS {
            let whole = (operator.cpu)(&Segment::new(&codes, b"", &bytes), Form::Recurrent, None);
            let (first, second) = bytes.split_at(123);
            let start = (operator.cpu)(&Segment::new(&codes, b"", first), Form::Recurrent, None);
            let rest = Segment::new(&codes, first, second);
            let end = (operator.cpu)(&rest, Form::Recurrent, Some(&start.state));
            assert_eq!(whole.o, [start.o, end.o].concat(), "{}", operator.name);
            assert_eq!(whole.state, end.state, "{}", operator.name);
        }
    }
}

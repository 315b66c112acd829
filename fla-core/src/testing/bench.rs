//! Timing by events: graph replay for short kernels, a flushed L2 for long ones; and the record of a case.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, DriverError};

use crate::{Device, Error, compile};

/// Bytes of the copy that measures the memory's rate: far more than any L2 holds.
const COPY_BYTES: usize = 2 << 30;

/// A device opened for benchmarks, with its measured copy rate.
#[derive(Debug)]
pub struct Bench {
    device: Device,
    stream: Arc<CudaStream>,
    /// Bytes read and written per second by a large device-to-device copy.
    copy_rate: f64,
    flush: RefCell<CudaSlice<u8>>,
}

/// What a case does, whatever it costs: from this the floor follows.
#[derive(Clone, Debug)]
pub struct Case {
    /// `model/pass/shape`.
    pub id: String,
    /// Storage type of the vectors.
    pub dtype: &'static str,
    /// Fewest bytes that must cross device memory: each input read once, each output written once.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Relative RMS error against the float64 reference, seen just before the timing.
    pub error: f64,
    /// Device memory beyond inputs and outputs.
    pub extra_bytes: usize,
    /// How it was timed.
    pub method: &'static str,
}

/// Times of single launches, in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Samples(Rc<RefCell<Vec<f64>>>);

impl Samples {
    /// The sample below which a share of all lies.
    ///
    /// Infinite when nothing was timed.
    #[must_use]
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.borrow().clone();
        sorted.sort_by(f64::total_cmp);
        let at = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(at).copied().unwrap_or(f64::INFINITY)
    }

    /// How many samples there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.borrow().len()
    }

    /// Whether nothing was timed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn push(&self, us: f64) {
        self.0.borrow_mut().push(us);
    }
}

/// A captured sequence of launches that is replayed to be timed.
#[allow(missing_debug_implementations, reason = "a graph has nothing to print")]
pub struct Replay {
    graph: CudaGraph,
    launches: usize,
    start: CudaEvent,
    end: CudaEvent,
    stream: Arc<CudaStream>,
    samples: Samples,
}

impl Replay {
    /// Replays until `iterations` launches have run, and returns how long that many take.
    ///
    /// # Panics
    ///
    /// When the device fails: a benchmark has no better way out.
    pub fn time(&self, iterations: u64) -> Duration {
        let replays = iterations.div_ceil(self.launches as u64).max(1);
        let mut total_us = 0.0;
        for _ in 0..replays {
            self.start.record(&self.stream).expect("an event is recorded");
            self.graph.launch().expect("the graph runs");
            self.end.record(&self.stream).expect("an event is recorded");
            let ms = self.start.elapsed_ms(&self.end).expect("the launches finish");
            let us = f64::from(ms) * 1e3 / self.launches as f64;
            self.samples.push(us);
            total_us += us;
        }
        Duration::from_secs_f64(total_us / replays as f64 * iterations as f64 / 1e6)
    }

    /// The times so far.
    #[must_use]
    pub fn samples(&self) -> Samples {
        self.samples.clone()
    }
}

impl Bench {
    /// Opens the first GPU and measures its copy rate.
    ///
    /// Event tracking of the context is turned off, as a graph capture needs: everything here runs on one stream.
    ///
    /// # Errors
    ///
    /// Those of [`Device::new`], and [`Error::OutOfMemory`].
    pub fn open() -> Result<Self, Error> {
        let device = Device::new(0)?;
        let driver = |error: DriverError| Error::driver("the start of a benchmark", error);
        // SAFETY: all work of a benchmark is queued on one stream, so no order is lost.
        unsafe { device.context().disable_event_tracking() };
        let stream = device.context().new_stream().map_err(driver)?;
        let flush = stream.alloc_zeros::<u8>(4 * device.l2_bytes().max(1 << 20)).map_err(driver)?;
        let mut bench = Self { device, stream, copy_rate: f64::NAN, flush: RefCell::new(flush) };
        bench.copy_rate = bench.measure_copy_rate().map_err(driver)?;
        Ok(bench)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream that everything runs on.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Bytes read and written per second by a large device-to-device copy, measured by [`Bench::open`].
    #[must_use]
    pub fn copy_rate(&self) -> f64 {
        self.copy_rate
    }

    /// How many sets of buffers to rotate so that none is found in L2, when a launch reads and writes `bytes`: four
    /// times the L2 lies between two uses of a set.
    #[must_use]
    pub fn rotation(&self, bytes: f64) -> usize {
        (4.0 * self.device.l2_bytes() as f64 / bytes).ceil().clamp(2.0, 64.0) as usize
    }

    fn measure_copy_rate(&self) -> Result<f64, DriverError> {
        let from = self.stream.alloc_zeros::<u8>(COPY_BYTES)?;
        let mut to = self.stream.alloc_zeros::<u8>(COPY_BYTES)?;
        let samples = Samples::default();
        for _ in 0..12 {
            let start = self.event()?;
            self.stream.memcpy_dtod(&from, &mut to)?;
            let end = self.event()?;
            samples.push(f64::from(start.elapsed_ms(&end)?) * 1e3);
        }
        Ok(2.0 * COPY_BYTES as f64 / (samples.quantile(0.5) * 1e-6))
    }

    fn event(&self) -> Result<CudaEvent, DriverError> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
    }

    /// Captures `launches` launches into a graph; `queue` gets their numbers, to rotate buffers by.
    ///
    /// # Errors
    ///
    /// Those of `queue`, and [`Error::Driver`] when the capture fails.
    pub fn capture(
        &self,
        launches: usize,
        mut queue: impl FnMut(&Arc<CudaStream>, usize) -> Result<(), Error>,
    ) -> Result<Replay, Error> {
        let driver = |error: DriverError| Error::driver("a graph capture", error);
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(driver)?;
        let queued = (0..launches).try_for_each(|i| queue(&self.stream, i));
        // The capture has to be ended whatever happened in it.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        queued?;
        let graph = graph.map_err(driver)?.ok_or_else(|| {
            driver(DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED))
        })?;
        let (start, end) = (self.event().map_err(driver)?, self.event().map_err(driver)?);
        let samples = Samples::default();
        Ok(Replay { graph, launches, start, end, stream: self.stream.clone(), samples })
    }

    /// Times single runs, each after the L2 has been overwritten. Every sample is one call of `queue`.
    ///
    /// # Panics
    ///
    /// When the device fails or `queue` does: a benchmark has no better way out.
    pub fn time_flushed(
        &self,
        iterations: u64,
        samples: &Samples,
        mut queue: impl FnMut(&Arc<CudaStream>) -> Result<(), Error>,
    ) -> Duration {
        let mut total_us = 0.0;
        for _ in 0..iterations {
            self.stream.memset_zeros(&mut *self.flush.borrow_mut()).expect("the L2 is flushed");
            let start = self.event().expect("an event is recorded");
            queue(&self.stream).expect("the pass runs");
            let end = self.event().expect("an event is recorded");
            let us = f64::from(start.elapsed_ms(&end).expect("the pass finishes")) * 1e3;
            samples.push(us);
            total_us += us;
        }
        Duration::from_secs_f64(total_us / 1e6)
    }

    /// Prints the case and, when `FLA_BENCH_JSON` names a file, appends it there as one line.
    ///
    /// # Panics
    ///
    /// When that file cannot be written: a benchmark that loses its record has failed.
    pub fn report(&self, case: &Case, samples: &Samples) {
        if samples.is_empty() {
            // The benchmark harness was given a filter that leaves this case out.
            return;
        }
        let (median, p20, p80) = (samples.quantile(0.5), samples.quantile(0.2), samples.quantile(0.8));
        let floor = case.bytes / self.copy_rate * 1e6;
        let mut line = String::from("{");
        let mut text = |key: &str, value: &str| {
            let _ = write!(line, "\"{key}\":\"{}\",", value.replace(['"', '\\', '\n'], " "));
        };
        text("id", &case.id);
        text("dtype", case.dtype);
        text("method", case.method);
        text("gpu", &self.device.context().name().unwrap_or_default());
        text("driver", &driver_version(&self.device));
        text(
            "nvrtc",
            &compile::nvrtc_version().map_or_else(|_| "none".into(), |version| version.to_string()),
        );
        for (key, value) in [
            ("median_us", median),
            ("p20_us", p20),
            ("p80_us", p80),
            ("samples", samples.len() as f64),
            ("bytes", case.bytes),
            ("flops", case.flops),
            ("tb_per_s", case.bytes / median * 1e-6),
            ("tflop_per_s", case.flops / median * 1e-6),
            ("copy_tb_per_s", self.copy_rate * 1e-12),
            ("floor_us", floor),
            ("percent_of_floor", 100.0 * floor / median),
            ("error", case.error),
            ("extra_mib", case.extra_bytes as f64 / f64::from(1 << 20)),
        ] {
            let _ = write!(line, "\"{key}\":{value:.6e},");
        }
        line.pop();
        line.push('}');
        println!(
            "{:<52} {:<5} {median:>9.2} us ({p20:.2}-{p80:.2})  {:>6.2} TB/s {:>8.2} TFLOP/s  {:>5.1}% of floor  error {:.1e}  extra {:.1} MiB",
            case.id,
            case.dtype,
            case.bytes / median * 1e-6,
            case.flops / median * 1e-6,
            100.0 * floor / median,
            case.error,
            case.extra_bytes as f64 / f64::from(1 << 20),
        );
        if let Some(path) = std::env::var_os("FLA_BENCH_JSON").map(PathBuf::from) {
            let file = OpenOptions::new().append(true).create(true).open(&path);
            let written = file.and_then(|mut file| writeln!(file, "{line}"));
            written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// CUDA version that the driver supports; with the driver's own version where the kernel module tells it.
fn driver_version(device: &Device) -> String {
    let cuda = device.driver_version();
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let own = module
        .split_whitespace()
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or("unknown");
    format!("{own} (CUDA {}.{})", cuda / 1000, cuda % 1000 / 10)
}
